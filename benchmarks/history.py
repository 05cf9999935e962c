"""How fast history goes into plays, aggregates and milestones, against the floor of the same bytes and the same rows.

    python -m benchmarks.history                      200,000 events in 10,000 blocks (mining them once takes minutes)
    python -m benchmarks.history --events 20000 --blocks 1000
    python -m benchmarks.history --kills 10           the same with kill -9 on the way; the tables must come out equal

Node, Postgres and daemon are real processes that share this machine; figures are ratios within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import asyncpg

from benchmarks.chain import SIGNATURE, Made, served
from indexer.embedded import EmbeddedPostgres

TABLES = {
    "plays": "user_id, play_item_id, created_at, slot, signature, city, region, country, tx_hash, event_index",
    "aggregate_plays": "play_item_id, count",
    "aggregate_monthly_plays": "play_item_id, timestamp, country, count",
    "hourly_play_counts": "hourly_timestamp, play_count",
    "milestones": "id, name, threshold, slot, timestamp",
}
CONFIG = """
[database]
url = "{dsn}"
[chain]
endpoints = [{{url = "{url}", name = "anvil"}}]
[[contracts]]
address = "{address}"
abi = ["{signature}"]
[hooks]
enabled = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones"]
[http]
port = 0
[log]
format = "json"
level = "error"
"""


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of the processes and of their living children (Linux)."""
    ticks = 0
    for pid in pids:
        children = Path(f"/proc/{pid}/task/{pid}/children")
        below = [int(child) for child in children.read_text().split()] if children.exists() else []
        for one in [pid, *below]:
            stat = Path(f"/proc/{one}/stat")
            if stat.exists():
                fields = stat.read_text().rpartition(")")[2].split()
                # the children that ended count too: each connection of Postgres is one
                ticks += sum(int(field) for field in (fields[11:15] if one == pid else fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def daemon(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "indexer.cli", "run", "--config", str(folder / "indexer.toml")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


async def cursor(connection: asyncpg.Connection) -> int:
    if await connection.fetchval("select to_regclass('indexer.cursor') is null"):
        return -1
    return await connection.fetchval("select coalesce(max(number), -1) from indexer.cursor")


async def checksums(connection: asyncpg.Connection) -> dict[str, str]:
    """Each table's rows in order, as one hash."""
    sums = {}
    for table, columns in TABLES.items():
        query = f"select md5(string_agg(md5(row({columns})::text), '' order by row({columns})::text)) from {table}"
        sums[table] = await connection.fetchval(query, timeout=300)
    return sums


async def fetch_floor(url: str, made: Made) -> float:
    """Seconds to fetch the bytes of all logs, 200 blocks a request and four at a time, and to look at none of them."""
    started = time.perf_counter()
    gate = asyncio.Semaphore(4)
    async with aiohttp.ClientSession() as session:

        async def one(first: int) -> None:
            query = {"address": made.address, "fromBlock": hex(first), "toBlock": hex(first + 199)}
            call = {"jsonrpc": "2.0", "id": 1, "method": "eth_getLogs", "params": [query]}
            async with gate, session.post(url, json=call) as response:
                await response.read()

        await asyncio.gather(*(one(first) for first in range(0, made.blocks + 1, 200)))
    return time.perf_counter() - started


async def copy_floor(connection: asyncpg.Connection) -> float:
    """Seconds to COPY the same rows of plays, 5,000 at a time, into an equal empty table."""
    columns = f"chain, {TABLES['plays']}"
    rows = [tuple(row) for row in await connection.fetch(f"select {columns} from plays order by id", timeout=300)]
    await connection.execute("create table plays_floor (like plays including all)")
    names = columns.replace(" ", "").split(",")
    started = time.perf_counter()
    for first in range(0, len(rows), 5000):
        await connection.copy_records_to_table("plays_floor", records=rows[first : first + 5000], columns=names)
    seconds = time.perf_counter() - started
    await connection.execute("drop table plays_floor")
    return seconds


async def indexed(
    folder: Path, dsn: str, url: str, made: Made, kills: int, pids: list[int]
) -> tuple[float, dict[str, str]]:
    """Index the whole chain into a new database; seconds from the daemon's start to its last commit, and checksums."""
    text = CONFIG.format(dsn=dsn, url=url, address=made.address, signature=SIGNATURE)
    (folder / "indexer.toml").write_text(text)
    connection = await asyncpg.connect(dsn)
    try:
        started = time.perf_counter()
        before = cpu_seconds(pids)
        marks = sorted(random.sample(range(made.blocks // 20, made.blocks), kills), reverse=True)
        first_commit = 0.0
        while (at := await cursor(connection)) < made.blocks:
            with daemon(folder) as process:
                daemon_cpu = 0.0
                while (at := await cursor(connection)) < made.blocks:
                    if at >= 0 and not first_commit:
                        first_commit = time.perf_counter()
                    if marks and at >= marks[-1]:
                        marks.pop()
                        process.kill()
                        process.wait()
                        break
                    if process.poll() is not None:
                        sys.exit(f"the daemon ended with {process.returncode}")
                    daemon_cpu = cpu_seconds([process.pid])
                    await asyncio.sleep(0.02)
        seconds = time.perf_counter() - started
        if not kills:
            since_first = time.perf_counter() - first_commit
            speed = made.events / since_first
            print(f"  start to first commit {first_commit - started:.2f} s, then {speed:,.0f} events/s")
            print(f"  CPU seconds: daemon {daemon_cpu:.1f}, node and Postgres {cpu_seconds(pids) - before:.1f}")
        return seconds, await checksums(connection)
    finally:
        await connection.close()


async def main(events: int, blocks: int, kills: int, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as name:
        async with (
            served(folder, events, blocks, 20) as (anvil, made),
            EmbeddedPostgres(Path(name) / "postgres") as server,
        ):
            work = Path(name)
            admin = await asyncpg.connect(server.dsn)
            pids = [anvil.process.pid, int((server.data_dir / "postmaster.pid").read_text().split()[0])]
            print(f"{made.events:,} events in {made.blocks:,} blocks; Postgres {server.version}, fsync on")
            for database in ("undisturbed", "killed"):
                await admin.execute(f"create database {database}")
            await admin.close()
            whole = server.dsn.replace("/indexer?", "/undisturbed?")
            seconds, sums = await indexed(work, whole, anvil.url, made, 0, pids)
            print(f"history: {seconds:.2f} s from the daemon's start, {made.events / seconds:,.0f} events/s")
            fetch = await fetch_floor(anvil.url, made)
            connection = await asyncpg.connect(whole)
            counted = await connection.fetchval("select count(*) from plays")
            copy = await copy_floor(connection)
            await connection.close()
            print(f"floors: raw fetch {fetch:.2f} s (ratio {seconds / fetch:.2f}), "
                  f"raw COPY into plays {copy:.2f} s (ratio {seconds / copy:.2f})")
            print(f"plays: {counted:,} of {made.events:,}")
            ok = counted == made.events
            if kills:
                killed = server.dsn.replace("/indexer?", "/killed?")
                seconds, again = await indexed(work, killed, anvil.url, made, kills, pids)
                print(f"killed {kills} times: {seconds:.2f} s, tables {'equal' if again == sums else 'DIFFERENT'}")
                ok = ok and again == sums
            if not ok:
                sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--blocks", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--chain", type=Path, help="folder with the mined chain; below .dev by default")
    options = parser.parse_args()
    where = options.chain or Path(".dev") / f"chain-{options.events}-{options.blocks}"
    asyncio.run(main(options.events, options.blocks, options.kills, where))
