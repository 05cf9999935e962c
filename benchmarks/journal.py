"""What the journal costs a block at the head: the same blocks of 20 plays, journalled and not, in turns.

    python -m benchmarks.journal --blocks 300
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import statistics
import tempfile
import time
from pathlib import Path

import asyncpg

from indexer import journal, ledger
from indexer.app import migration_lines
from indexer.config import DatabaseSettings, HooksSettings
from indexer.db import Database
from indexer.embedded import EmbeddedPostgres
from indexer.ledger import Pace
from indexer.migrations import migrate
from indexer.model import Block, BlockRef, Event, Heads, Span
from indexer.pipeline import Pipeline
from indexer.registry import load_hooks

HOOKS = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones"]
PLAYS = 20


def block(number: int) -> Block:
    chance = random.Random(number)
    events = tuple(
        Event(
            index, "Played",
            {"trackId": str(chance.randrange(5000)), "userId": str(chance.randrange(20_000)),
             "playedAt": str(1_700_000_000 + number), "signature": f"0x{chance.getrandbits(520):0130x}",
             "city": "Berlin", "region": "", "country": "Germany"},
            "0x" + "a1" * 20, hashlib.sha256(f"{number} {index}".encode()).digest(),
        )
        for index in range(PLAYS)
    )  # fmt: skip
    digest = hashlib.sha256(str(number).encode()).digest()
    return Block(number, digest, None, 1_700_000_000 + number, events)


async def applied(
    pipeline: Pipeline, connection: asyncpg.Connection, at: BlockRef, one: Block, *, final: bool
) -> float:
    """Seconds that the block's transaction takes."""
    span = Span(one.number, one.number, (one,), one.ref, one.timestamp, final)
    # a window of 64 blocks, as Ethereum has it, for those that are not final
    pace = Pace(Heads(one.number, one.number + 1 if final else one.number - 64))
    started = time.perf_counter()
    async for _ in pipeline.apply(connection, at, span, pace):
        pass
    return time.perf_counter() - started


async def main(blocks: int) -> None:
    hooks = load_hooks(HooksSettings(enabled=HOOKS))
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as folder:
        async with EmbeddedPostgres(Path(folder) / "postgres") as server:
            connection = await Database(server.dsn, DatabaseSettings()).connect()
            await migrate(connection, migration_lines(hooks))
            chain = await ledger.open_chain(connection, "bench", "evm", "1", 0)
            for one in hooks:
                await journal.watch(connection, one.hook.tables)
            pipeline, at = Pipeline(chain, hooks, "bench"), BlockRef(-1, b"")
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for number in range(2 * blocks):
                one, final = block(number), number % 2 == 0
                seconds[final].append(await applied(pipeline, connection, at, one, final=final))
                at = one.ref
            plain, journalled = statistics.median(seconds[True]), statistics.median(seconds[False])
            print(f"{PLAYS} plays a block, {blocks} blocks each way; Postgres {server.version}, fsync on")
            print(f"median {plain * 1000:.1f} ms without the journal, {journalled * 1000:.1f} ms with it: "
                  f"{journalled / plain:.2f} times, {(journalled - plain) * 1000:.1f} ms more")
            await connection.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=300)
    asyncio.run(main(parser.parse_args().blocks))
