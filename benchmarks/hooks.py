"""What each bundled hook takes of a span of 5,000 plays, on a database that has many already.

    python -m benchmarks.hooks
    python -m benchmarks.hooks --filled 50000 --spans 5 --known 0.2

Who listens to what is spread as on the real chain: a few people and tracks have most of the plays, and some people have
heard more tracks than a listening history holds. Figures are shares and ratios within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import asyncpg

from indexer import ledger
from indexer.app import migration_lines
from indexer.config import DatabaseSettings, HooksSettings
from indexer.db import Database
from indexer.embedded import EmbeddedPostgres
from indexer.ledger import Pace
from indexer.migrations import migrate
from indexer.model import Block, BlockRef, Event, Heads, Span
from indexer.pipeline import Pipeline, prepare
from indexer.rebuild import rebuild
from indexer.registry import Registered, load_hooks

NAMES = ("plays", "entities", "aggregates", "milestones", "listeners", "challenges")
PLAYS, BLOCKS = 5000, 250  # of a span
USERS, TRACKS = 30_000, 100_000
SECONDS = 1_700_000_000


class Timed:
    """A hook, and the seconds that it took."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seconds = inner, 0.0
        self.name, self.listens, self.tables, self.after = inner.name, inner.listens, inner.tables, inner.after

    async def apply(self, tx: Any, blocks: Sequence[Block]) -> None:
        started = time.perf_counter()
        await self.inner.apply(tx, blocks)
        self.seconds += time.perf_counter() - started


@dataclass
class World:
    """Spans of plays: `known` of them by people who are known."""

    known: float
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    number: int = 0

    def __post_init__(self) -> None:
        self.users = list(accumulate(1 / rank**0.8 for rank in range(1, USERS + 1)))
        self.tracks = list(accumulate(1 / rank**0.8 for rank in range(1, TRACKS + 1)))

    def span(self) -> Span:
        first = self.number + 1
        blocks = tuple(self._blocks())
        return Span(first, self.number, blocks, blocks[-1].ref, blocks[-1].timestamp, True)

    def _blocks(self) -> Iterator[Block]:
        chance = self.chance
        users = chance.choices(range(1, USERS + 1), cum_weights=self.users, k=PLAYS)
        tracks = chance.choices(range(1, TRACKS + 1), cum_weights=self.tracks, k=PLAYS)
        each = PLAYS // BLOCKS
        for start in range(0, PLAYS, each):
            self.number += 1
            digest = hashlib.sha256(str(self.number).encode()).digest()
            at = SECONDS + 60 * self.number
            events = tuple(
                Event(
                    index, "Played",
                    {"trackId": str(tracks[start + index]), "playedAt": str(at + index),
                     "userId": str(users[start + index]) if chance.random() < self.known else "0x12ab",
                     "signature": f"0x{chance.getrandbits(520):0130x}", "city": "Berlin", "region": "",
                     "country": "Germany"},
                    "0x" + "a1" * 20, hashlib.sha256(f"{self.number} {index}".encode()).digest(),
                )
                for index in range(each)
            )  # fmt: skip
            yield Block(self.number, digest, None, at, events)


async def apply(pipeline: Pipeline, connection: asyncpg.Connection, at: BlockRef, span: Span) -> float:
    started = time.perf_counter()
    async for _ in pipeline.apply(connection, at, span, Pace(Heads(span.last, span.last))):
        pass
    return time.perf_counter() - started


async def heard_much(connection: asyncpg.Connection, hooks: Sequence[Registered], heavy: int) -> None:
    """The first people have heard 1,200 tracks each before, as in a long history."""
    await connection.execute(
        """
        insert into plays (user_id, play_item_id, created_at, slot, signature, chain, tx_hash, event_index)
        select listener, 300 * track + listener, timestamp '2020-01-01' + track * interval '1 hour', 0, 'heavy', 1,
               sha256(listener::text::bytea), track
        from generate_series(1, $1::int) as listener, generate_series(1, 1200) as track
        """,
        heavy, timeout=600,
    )  # fmt: skip
    for one in hooks:
        if getattr(one.hook, "derived", ()):
            await rebuild(connection, hooks, one.name)


async def main(filled: int, spans: int, known: float, heavy: int) -> None:
    enabled = [f"hooks.{name}:{name}" for name in NAMES if find_spec(f"hooks.{name}")]
    loaded = load_hooks(HooksSettings(enabled=enabled))
    timed = [Timed(one.hook) for one in loaded]
    world = World(known)
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as folder:
        async with EmbeddedPostgres(Path(folder) / "postgres") as server:
            connection = await Database(server.dsn, DatabaseSettings()).connect()
            await migrate(connection, migration_lines(loaded))
            chain = await ledger.open_chain(connection, "bench", "evm", "1", 1)
            for one in loaded:
                await prepare(connection, one.hook)
            hooks = [Registered(hook, one.policy) for hook, one in zip(timed, loaded, strict=True)]
            pipeline, at = Pipeline(chain, hooks, "bench"), BlockRef(0, b"")
            for _ in range(filled // PLAYS):
                span = world.span()
                await apply(pipeline, connection, at, span)
                at = span.end
            await heard_much(connection, loaded, heavy)
            await connection.execute("vacuum analyze")
            before, whole = Counter({one.name: one.seconds for one in timed}), 0.0
            for _ in range(spans):
                span = world.span()
                whole += await apply(pipeline, connection, at, span)
                at = span.end
            print(f"{filled:,} plays before, then {spans} spans of {PLAYS:,}; Postgres {server.version}, fsync on")
            full = await connection.fetchval(
                "select count(*) from user_listening_history where jsonb_array_length(listening_history) = 1000"
            )
            people = await connection.fetchval("select count(*) from user_listening_history")
            print(f"{known:.0%} of them by people who are known: {people:,}, of whom {full:,} have a full history")
            report({one.name: one.seconds - before[one.name] for one in timed}, whole, spans)
            await connection.close()


def report(seconds: dict[str, float], whole: float, spans: int) -> None:
    print(f"a span takes {whole / spans * 1000:.0f} ms: {PLAYS * spans / whole:,.0f} plays/s")
    for name, took in [*seconds.items(), ("the rest", whole - sum(seconds.values()))]:
        print(f"  {name:12} {took / whole:6.1%}  {took / seconds['plays']:5.2f} times plays")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filled", type=int, default=300_000)
    parser.add_argument("--spans", type=int, default=20)
    parser.add_argument("--known", type=float, default=0.35, help="share of the plays by people who are known")
    parser.add_argument("--heavy", type=int, default=200, help="people with 1,200 tracks more than those plays give")
    options = parser.parse_args()
    asyncio.run(main(options.filled, options.spans, options.known, options.heavy))
