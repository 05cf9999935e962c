"""How fast a Core chain's history goes into all tables that plays feed, and whether memory stays flat on the way.

    python -m benchmarks.core                        500,000 blocks with 1.6 plays each, all bundled hooks
    python -m benchmarks.core --blocks 50000
    python -m benchmarks.core --hooks plays,aggregates

The node is a process of its own that only copies bytes; node, daemon and Postgres share this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import asyncpg

from benchmarks import core_chain
from benchmarks.history import cpu_seconds, cursor, daemon
from indexer.embedded import EmbeddedPostgres

HOOKS = "entities,plays,aggregates,milestones,listeners,challenges"
CONFIG = """
[database]
url = "{dsn}"
[chain]
source = "core"
endpoints = [{{url = "{url}", name = "bench"}}]
start_block = 1
[hooks]
enabled = [{hooks}]
[http]
port = 0
[log]
format = "json"
level = "error"
"""
MEBIBYTE = 1 << 20


@contextmanager
def node(folder: Path) -> Iterator[tuple[int, str]]:
    """The process number and the address of a node that serves the chain of `folder`."""
    command = [sys.executable, "-m", "benchmarks.core_chain", "serve", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def fetch_floor(url: str, blocks: int) -> float:
    """Seconds to fetch the bytes of all blocks, 500 a request and four at a time, and to look at none of them."""
    started = time.perf_counter()
    gate = asyncio.Semaphore(4)
    async with aiohttp.ClientSession() as session:

        async def one(first: int) -> None:
            heights = [str(height) for height in range(first, min(first + 500, blocks + 1))]
            async with gate, session.post(f"{url}/core.v1.CoreService/GetBlocks", json={"height": heights}) as response:
                await response.read()

        await asyncio.gather(*(one(first) for first in range(1, blocks + 1, 500)))
    return time.perf_counter() - started


async def indexed(folder: Path, dsn: str, blocks: int, node_pid: int, postgres_pid: int) -> tuple[float, float]:
    """Index the chain; seconds from the daemon's start and from its first commit. Prints the way there."""
    connection = await asyncpg.connect(dsn)
    try:
        started, before, shown, first = time.perf_counter(), cpu_seconds([postgres_pid]), 0, 0.0
        served = cpu_seconds([node_pid])
        with daemon(folder) as process:
            cpu = 0.0
            while (at := await cursor(connection)) < blocks:
                if process.poll() is not None:
                    sys.exit(f"the daemon ended with {process.returncode}")
                first = first or (time.perf_counter() if at > 0 else 0.0)
                cpu = cpu_seconds([process.pid])
                if at * 10 // blocks > shown:
                    shown = at * 10 // blocks
                    memory = resident_bytes(process.pid) / MEBIBYTE
                    print(f"  {shown * 10:3} %  {time.perf_counter() - started:6.1f} s  daemon {memory:5.0f} MiB")
                await asyncio.sleep(0.05)
            seconds = time.perf_counter() - started
        postgres, served = cpu_seconds([postgres_pid]) - before, cpu_seconds([node_pid]) - served
        print(f"  CPU seconds: daemon {cpu:.1f}, Postgres {postgres:.1f}, node {served:.1f}, of {seconds:.1f} s")
        return seconds, seconds - (first - started)
    finally:
        await connection.close()


async def main(blocks: int, folder: Path, hooks: str) -> None:
    if not (folder / "plays").is_file():
        print(f"making {blocks:,} blocks ...", file=sys.stderr)
        core_chain.make(folder, blocks)
    plays = int((folder / "plays").read_text())
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as name:
        async with EmbeddedPostgres(Path(name) / "postgres") as server:
            with node(folder) as (pid, url):
                enabled = ", ".join(f'"hooks.{one}:{one}"' for one in hooks.split(","))
                text = CONFIG.format(dsn=server.dsn, url=url, hooks=enabled)
                (Path(name) / "indexer.toml").write_text(text)
                print(f"{blocks:,} blocks, {plays:,} plays; Postgres {server.version}, fsync on; hooks {hooks}")
                postmaster = int((server.data_dir / "postmaster.pid").read_text().split()[0])
                seconds, net = await indexed(Path(name), server.dsn, blocks, pid, postmaster)
                print(f"history: {blocks / seconds:,.0f} blocks/s, {plays / seconds:,.0f} plays/s from the start; "
                      f"{blocks / net:,.0f} blocks/s, {plays / net:,.0f} plays/s from the first commit")
                floor = await fetch_floor(url, blocks)
                print(f"floor: raw fetch {floor:.1f} s (ratio {seconds / floor:.2f})")
            connection = await asyncpg.connect(server.dsn)
            counted = await connection.fetchval("select count(*) from plays", timeout=120)
            await connection.close()
            print(f"plays: {counted:,} of {plays:,}")
            if counted != plays:
                sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=500_000)
    parser.add_argument("--chain", type=Path, help="folder with the chain; below .dev by default")
    parser.add_argument("--hooks", default=HOOKS)
    options = parser.parse_args()
    where = options.chain or Path(".dev") / f"core-{options.blocks}"
    asyncio.run(main(options.blocks, where, options.hooks))
