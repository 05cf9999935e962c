"""For the tests of replay: a chain of plays on a node, the bundled hooks that fail where they are told to, and what
must be in the tables of the canonical chain."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from daemon import played, settings
from oracle import Dump, Oracle, dump

from hooks.aggregates import Aggregates
from hooks.milestones import Milestones
from hooks.plays import Plays
from indexer import journal, ledger
from indexer.config import HookSettings
from indexer.config import Settings as Parsed
from indexer.demochain import Play
from indexer.fakechain import FakeChain, FakeNode
from indexer.follow import Follower, Outcome
from indexer.model import Block, BlockSource, EventSpec, Hook
from indexer.pipeline import Pipeline
from indexer.registry import Registered
from indexer.replay import Replayer
from indexer.segments import Segment
from indexer.sources.choose import make_source
from indexer.sources.evm import EvmSource
from indexer.state import State
from indexer.transaction import Tx

SESSION = {"timezone": "UTC", "search_path": "public"}  # as the daemon connects
SECONDS = 1_700_000_000
OWNERS = {track: 100 + track for track in range(1, 6)} | {1000 + number: 7 for number in range(0, 1000, 2)}
BUNDLED = ["plays", "aggregates", "milestones"]
ORDERED = ("milestones", "notification")  # whose rows say which play was counted as the tenth


class Picky:
    """A hook that fails at the blocks in `bad` that have events, and is `inner` elsewhere."""

    def __init__(self, inner: Hook) -> None:
        self.inner, self.bad = inner, set[int]()
        self.name, self.listens, self.tables, self.after = inner.name, inner.listens, inner.tables, inner.after
        self.derived, self.kept = getattr(inner, "derived", ()), getattr(inner, "kept", ())
        self.calls: list[list[int]] = []

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        self.calls.append([block.number for block in blocks])
        await self.inner.apply(tx, blocks)
        for block in blocks:
            if block.number in self.bad and block.events:
                raise ValueError(f"{self.name} does not like block {block.number}")


class Tally:
    """Reads a row before it writes it, and notes what it sees for the first time: neither bears a second writer."""

    name, listens, tables, after = "tally", (EventSpec("Played"),), ("tally", "met"), ()

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        for block in blocks:
            total = await tx.fetchval("select total from tally")
            await tx.execute("update tally set total = $1", total + len(block.events))
            for event in block.events:
                await tx.execute("insert into met values ($1) on conflict do nothing", event.args["trackId"])


TALLY = "create table tally (id int primary key, total bigint); insert into tally values (1, 0)"
MET = "create table met (track text primary key)"


class World:
    """One chain, its node, a source and a database with the bundled hooks, and those that are added."""

    def __init__(self, chain: FakeChain, node: FakeNode, source: EvmSource, url: str, connection: Any) -> None:
        self.chain, self.node, self.source, self.url, self.connection = chain, node, source, url, connection
        self.plays, self.aggregates, self.milestones = Picky(Plays()), Picky(Aggregates()), Picky(Milestones())
        self.hooks: list[Hook] = [self.plays, self.aggregates, self.milestones]
        self.policy: dict[str, Any] = {"on_error": "skip"}
        self.row: ledger.ChainRow

    def picky(self, name: str) -> Picky:
        return next(one for one in (self.plays, self.aggregates, self.milestones) if one.name == name)

    @property
    def registered(self) -> tuple[Registered, ...]:
        return tuple(Registered(one, HookSettings(**self.policy)) for one in self.hooks)

    async def start(self) -> Pipeline:
        """What the daemon does at its start."""
        self.row = await ledger.open_chain(self.connection, "main", "evm", "31337", 0)
        await ledger.register_hooks(self.connection, self.row.id, [one.name for one in self.hooks])
        for one in self.hooks:
            await journal.watch(self.connection, one.tables)
        return Pipeline(self.row, self.registered, "test")

    async def follow(self) -> list[Outcome]:
        """Follow to the head of the chain, as the daemon does; what came of each step."""
        pipeline = await self.start()
        cursor = await ledger.cursor(self.connection, self.row.id)
        state = State("main", 0)
        follower = Follower(self.connection, self.source, pipeline, state, cursor)
        outcomes = []
        try:
            while (outcome := await follower.step()) is not Outcome.IDLE:
                outcomes.append(outcome)
            await follower.beat()
        finally:
            await follower.close()
        return outcomes

    @asynccontextmanager
    async def replayer(self, source: BlockSource | None = None) -> AsyncIterator[Replayer]:
        connection = await asyncpg.connect(self.url, server_settings=SESSION)
        try:
            yield Replayer(connection, self.row, self.registered, source or self.source, "replay")
        finally:
            await connection.close()

    async def fill(self, *targets: str, first: int | None = None, last: int | None = None) -> list[Segment]:
        """Replay what is missing; the plan."""
        async with self.replayer() as replayer:
            plan = await replayer.plan(first, last, targets or [one.name for one in self.hooks])
            async for _ in replayer.replay(plan):
                pass
        return plan

    async def gaps(self, reader: Any = None) -> dict[str, list[tuple[int, int]]]:
        found = await ledger.gaps(reader or self.connection, self.row.id)
        return {name: ranges for name, ranges in found.items() if ranges}

    async def final(self) -> int:
        heads = (await ledger.cursor(self.connection, self.row.id)).heads
        assert heads is not None
        return heads.final

    async def blocks(self) -> list[Block]:
        """The canonical chain's, from a source of their own."""
        parsed = Parsed(**settings(self.url, self.node.url, span={"max_events": 10_000}))
        source = make_source(parsed)
        try:
            spans = [span async for span in source.spans(0, self.chain.head.number)]
        finally:
            await source.close()
        return [block for span in spans for block in span.blocks]

    async def is_right(self, *, unordered: Sequence[str] = ()) -> None:
        """Every row of every table, as play by play over the canonical chain; in those of `unordered` it does not
        matter which play was the tenth."""
        found = await dump(self.connection)
        wanted = Oracle(self.row.id, OWNERS).apply(await self.blocks()).dump()
        for table, rows in wanted.items():
            if table not in unordered:
                assert found[table] == rows, table
            else:
                assert reached(found, table) == reached(wanted, table), table
        assert found["plays"]
        await self.tally_is_right()

    async def tally_is_right(self) -> None:
        if not any(one.name == "tally" for one in self.hooks):
            return
        events = [event for block in await self.blocks() for event in block.events]
        assert await self.connection.fetchval("select total from tally") == len(events)
        met = await self.connection.fetch("select track from met")
        assert {row["track"] for row in met} == {event.args["trackId"] for event in events}


def reached(tables: Dump, table: str) -> list[Any]:
    """Milestones (or their notifications) without the play that reached them."""
    places = (0, 1, 2) if table == "milestones" else (0, 1, 5)
    return sorted(tuple(row[place] for place in places) for row in tables[table])


@asynccontextmanager
async def world(url: str, connection: Any, fake: FakeChain, /, **sections: Mapping[str, Any]) -> AsyncIterator[World]:
    rows = [(track, owner) for track, owner in OWNERS.items()]
    await connection.executemany("insert into tracks (track_id, owner_id, created_at) values ($1, $2, 'now')", rows)
    async with FakeNode(fake) as node:
        source = make_source(Parsed(**settings(url, node.url, **sections)))
        try:
            yield World(fake, node, source, url, connection)
        finally:
            await source.close()


def some_plays(chance: random.Random, count: int, tracks: int = 5) -> list[Play]:
    return [
        (str(chance.randint(1, tracks)), str(chance.choice(["", 1, 2])), str(SECONDS + chance.randrange(10**7)),
             str(chance.random()), "Köln", "", chance.choice(["", "DE"]))
        for _ in range(count)
    ]  # fmt: skip


def own_plays(number: int, count: int = 12) -> list[Play]:
    """Plays of a track that is this block's alone: whenever they are counted, the tenth of them is the tenth."""
    return [(str(1000 + number), "3", str(SECONDS + number), f"{number} {n}", "", "", "") for n in range(count)]


def mine(chain: FakeChain, *plays: Sequence[Play]) -> None:
    chain.mine(*([played(play) for play in tx] for tx in plays))


def chain_of(seed: int, blocks: int, final_lag: int, own: Iterable[int] = ()) -> FakeChain:
    """A chain with plays in two blocks of three; those in `own` have tracks of their own."""
    chance, chain, alone = random.Random(seed), FakeChain(block_seconds=1, final_lag=final_lag), set(own)
    for number in range(1, blocks + 1):
        if number in alone:
            mine(chain, own_plays(number))
        elif chance.random() < 0.66:
            mine(chain, some_plays(chance, chance.randint(1, 4)), some_plays(chance, chance.randint(0, 2)))
        else:
            chain.mine_empty()
    return chain


async def everything(connection: Any) -> dict[str, list[str]]:
    """All rows of all tables, the engine's too."""
    tables = await connection.fetch(
        "select oid::regclass::text as name from pg_class"
        " where relkind = 'r' and relnamespace in ('public'::regnamespace, 'indexer'::regnamespace)"
    )
    return {
        row["name"]: sorted(
            one[0] for one in await connection.fetch(f"select indexer_row::text from {row['name']} as indexer_row")
        )
        for row in tables
    }


async def consume(replayer: Replayer, plan: Sequence[Segment]) -> None:
    async for _ in replayer.replay(plan):
        pass
