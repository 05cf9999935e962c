"""How long a new block takes to become rows, and a reorganisation to be right again.

    python -m benchmarks.head                 100 blocks of 20 plays, four a second, heard by ws and then by polling

The node is simulated (real JSON-RPC, no EVM), so that the moment of a block is known; the daemon is a real process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import asyncpg

from benchmarks.history import CONFIG, daemon
from indexer.demochain import PLAY_REGISTRY, Listeners
from indexer.devchain import load_artifact
from indexer.embedded import EmbeddedPostgres
from indexer.fakechain import FakeChain, FakeLog, FakeNode, encode_event, event_abi

ADDRESS = "0x" + "a1" * 20
FIELDS = ("trackId", "userId", "playedAt", "signature", "city", "region", "country")
PLAYS = 20
START = 1_700_000_000


class Player:
    """Blocks of plays."""

    def __init__(self) -> None:
        self._event = event_abi(load_artifact(PLAY_REGISTRY)["abi"], "Played")
        self._listeners = Listeners()

    def block(self, number: int) -> list[list[FakeLog]]:
        plays = self._listeners.plays(PLAYS, START + number)
        return [[encode_event(self._event, dict(zip(FIELDS, play, strict=True)), ADDRESS) for play in plays]]


async def until(connection: asyncpg.Connection, chain: FakeChain) -> None:
    """Wait until the daemon has committed the chain's very head."""
    while await connection.fetchval("select hash from indexer.cursor") != chain.head.hash:
        await asyncio.sleep(0.0005)


async def measure(dsn: str, folder: Path, blocks: int, *, ws: bool) -> None:
    player, chain = Player(), FakeChain(final_lag=64)
    for number in range(80):
        chain.mine(*player.block(number))
    async with FakeNode(chain) as node:
        text = CONFIG.format(dsn=dsn, url=node.url, address=ADDRESS, signature="")
        text = text.replace('abi = [""]', f'abi = "{PLAY_REGISTRY}"')
        text = text.replace("[[contracts]]", "poll_seconds = 0.1\n[[contracts]]")
        if ws:
            text = text.replace('name = "anvil"', f'name = "anvil", ws = "{node.ws_url}"')
        (folder / "indexer.toml").write_text(text)
        connection = await asyncpg.connect(dsn)
        with daemon(folder):
            while await connection.fetchval("select to_regclass('indexer.cursor') is null"):
                await asyncio.sleep(0.05)
            await until(connection, chain)
            while ws and not node.sockets:
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            head, reorgs = [], []
            for number in range(blocks):
                await asyncio.sleep(0.25)
                block = player.block(80 + number)
                started = time.perf_counter()
                chain.mine(*block)
                await until(connection, chain)
                head.append(time.perf_counter() - started)
            for _ in range(10):
                await asyncio.sleep(0.5)
                rivals = [player.block(200 + n) for n in range(5)]
                started = time.perf_counter()
                chain.fork(5, rivals)
                await until(connection, chain)
                reorgs.append(time.perf_counter() - started)
            plays = await connection.fetchval("select count(*) from plays")
        await connection.close()
        assert plays == len(chain.logs()), f"{plays} plays of {len(chain.logs())}"
    how = "ws" if ws else "polling every 0.1 s"
    p95 = statistics.quantiles(head, n=20)[-1]
    print(f"{how}: head to row p50 {statistics.median(head) * 1000:.0f} ms, p95 {p95 * 1000:.0f} ms; "
          f"reorganisation of 5 blocks p50 {statistics.median(reorgs) * 1000:.0f} ms, max {max(reorgs) * 1000:.0f} ms")


async def main(blocks: int) -> None:
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as name:
        async with EmbeddedPostgres(Path(name) / "postgres") as server:
            print(f"{PLAYS} plays a block; Postgres {server.version}, fsync on")
            admin = await asyncpg.connect(server.dsn)
            for ws in (True, False):
                database = "ws" if ws else "polling"
                await admin.execute(f"create database {database}")
                await measure(server.dsn.replace("/indexer?", f"/{database}?"), Path(name), blocks, ws=ws)
            await admin.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=100)
    asyncio.run(main(parser.parse_args().blocks))
