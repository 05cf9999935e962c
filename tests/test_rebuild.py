"""Derived tables against their base: whatever was done to them, verify finds exactly that and rebuild puts it right."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import Commands, settings, toml
from made import GENESIS, SECONDS, block, cut, event, heads, span
from oracle import COLUMNS, Oracle, dump

from hooks.aggregates import COUNTRY_CHARACTERS, Aggregates
from hooks.milestones import DERIVED, THRESHOLDS
from indexer import Block, Derived, Tx, hook, journal, ledger
from indexer.config import HookSettings, HooksSettings
from indexer.errors import HookLoadError, LostLeadership, UsageError
from indexer.ledger import Pace, note_pruned
from indexer.model import Span
from indexer.pipeline import Pipeline
from indexer.rebuild import Rebuilt, Verified, Written, describe, rebuild, verify
from indexer.registry import Registered, load_hooks

ENABLED = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones"]
DERIVING = ("aggregates", "milestones")
SEEDS = range(12)

# Of each derived table: what deletes a row, what changes one (by its place, so that only that one is hit), a stranger.
DAMAGE = {
    "aggregate_plays": (
        "update aggregate_plays set count = count + 3 where ctid = $1",
        "insert into aggregate_plays values (900 + $1, 5)",
    ),
    "aggregate_monthly_plays": (
        "update aggregate_monthly_plays set count = count - 1 where ctid = $1",
        "insert into aggregate_monthly_plays values (1, date '1999-01-01' + $1::int, 'XX', 1)",
    ),
    "hourly_play_counts": (
        "update hourly_play_counts set play_count = 0 where ctid = $1",
        "insert into hourly_play_counts values (timestamp '1999-01-01' + $1 * interval '1 hour', 1)",
    ),
    "milestones": (
        "update milestones set slot = null where ctid = $1",
        "insert into milestones values (900 + $1, 'LISTEN_COUNT', 10, 1, now())",
    ),
}
OF = {"aggregates": ["aggregate_plays", "aggregate_monthly_plays", "hourly_play_counts"], "milestones": ["milestones"]}


class Bench:
    """The bundled hooks on a chain of the test's own database, with its tables journalled."""

    def __init__(self, url: str, connection: asyncpg.Connection, hooks: Sequence[Registered]) -> None:
        self.url, self.connection, self.hooks = url, connection, tuple(hooks)
        self.final = 0

    async def open(self, name: str = "main") -> Bench:
        self.chain = await ledger.open_chain(self.connection, name, "test", "1", 1)
        await ledger.register_hooks(self.connection, self.chain.id, [one.name for one in self.hooks])
        for one in self.hooks:
            await journal.watch(self.connection, one.hook.tables)
        self.pipeline = Pipeline(self.chain, self.hooks, "test")
        return self

    async def apply(self, *spans: Span, connection: asyncpg.Connection | None = None) -> None:
        at = (await ledger.cursor(self.connection, self.chain.id)).ref
        for one in spans:
            self.final = max(self.final, one.last if one.final else 0)
            pace = Pace(heads(max(one.last, self.final), self.final))
            async for applied in self.pipeline.apply(connection or self.connection, at, one, pace):
                at = applied.span.end

    async def undo(self, to: int) -> None:
        at = (await ledger.cursor(self.connection, self.chain.id)).ref
        refs = {ref.number: ref for ref in await journal.window(self.connection, self.chain.id)}
        await self.pipeline.undo(self.connection, at, refs.get(to, GENESIS))

    async def at(self) -> int:
        return (await ledger.cursor(self.connection, self.chain.id)).ref.number

    async def verify(self, name: str, **options: Any) -> Verified:
        return await verify(self.connection, self.hooks, name, **options)

    async def rebuild(self, name: str, **options: Any) -> Rebuilt:
        return await rebuild(self.connection, self.hooks, name, **options)

    async def is_right(self, blocks: Sequence[Block]) -> None:
        """All tables are the oracle's; what was told to owners is not asked for: here tracks have none."""
        assert await dump(self.connection) == Oracle(self.chain.id).apply(blocks).dump()
        for name in DERIVING:
            assert (await self.verify(name)).equal


@pytest.fixture
async def bench(database_url: str, connection: asyncpg.Connection) -> Bench:
    return await Bench(database_url, connection, load_hooks(HooksSettings(enabled=ENABLED))).open()


def some_blocks(chance: random.Random, count: int, *, first: int = 1, fork: str = "") -> list[Block]:
    """Blocks in which few tracks are played so often that milestones are passed, also several in a block."""
    blocks = []
    for number in range(first, first + count):
        plays = [
            event(
                index,
                {
                    "trackId": str(chance.choice([1, 1, 1, 2, 3])),
                    "userId": str(chance.randrange(9)),
                    "playedAt": (datetime(2024, 1, 31) + timedelta(minutes=chance.randrange(4000))).isoformat() + "Z",
                    "country": chance.choice(["", "CH", "é" * 300]),
                },
                tx=index // 2,
            )
            for index in range(chance.choice([0, 1, 7, 30]))
        ]
        blocks.append(block(number, plays, fork=fork))
    return blocks


def above(blocks: Sequence[Block]) -> list[Span]:
    return [span([one], final=False) for one in blocks]


async def damage(chance: random.Random, connection: asyncpg.Connection, table: str) -> tuple[int, int, int]:
    """Rows taken away, added and changed; how many then are missing, superfluous and different."""
    change, stranger = DAMAGE[table]
    query = "select ctid from aggregate_plays order by random()".replace("aggregate_plays", table)
    places = [row[0] for row in await connection.fetch(query)]
    gone, changed = chance.randint(0, len(places) // 2), chance.randint(0, len(places) // 2)
    delete = "delete from aggregate_plays where ctid = $1".replace("aggregate_plays", table)
    for place in places[:gone]:
        await connection.execute(delete, place)
    for place in places[gone : gone + changed]:
        await connection.execute(change, place)
    strangers = chance.randint(0, 3)
    for number in range(strangers):
        await connection.execute(stranger, number)
    return gone, strangers, changed


class TestAnyDamage:
    @pytest.mark.parametrize("seed", SEEDS)
    async def test_verify_finds_exactly_what_was_done_and_rebuild_undoes_it(self, bench: Bench, seed: int) -> None:
        chance = random.Random(seed)
        blocks = some_blocks(chance, 10)
        await bench.apply(*cut(blocks, chance.sample(range(1, 10), 3)))
        await bench.is_right(blocks)
        done = {table: await damage(chance, bench.connection, table) for table in DAMAGE}
        for name in DERIVING:
            found = await bench.verify(name, samples=1000)
            assert {one.table: (one.missing, one.superfluous, one.different) for one in found.tables} == {
                table: done[table] for table in OF[name]
            }
            for one in found.tables:
                kinds = [sample.kind for sample in one.samples]
                counted = {kind: kinds.count(kind) for kind in ("missing", "superfluous", "different")}
                assert tuple(counted.values()) == done[one.table]
                assert one.rows == await bench.connection.fetchval(f"select count(*) from {one.table}")
            rehearsed, rebuilt = await bench.rebuild(name, dry_run=True), await bench.rebuild(name)
            assert rehearsed.tables == rebuilt.tables
            assert rebuilt.tables == tuple(
                Written(table, missing, different, superfluous)
                for table in OF[name]
                for missing, superfluous, different in [done[table]]
            )
            assert rebuilt.rewound == ()
        await bench.is_right(blocks)

    async def test_rows_that_are_right_are_not_touched(self, bench: Bench) -> None:
        await bench.apply(*cut(some_blocks(random.Random(1), 10), ()))
        await bench.connection.execute("update aggregate_plays set count = 0 where play_item_id = 1")
        query = "select xmin, ctid, * from aggregate_plays where play_item_id <> 1 order by play_item_id"
        before = await bench.connection.fetch(query)
        assert (await bench.rebuild("aggregates")).tables[0] == Written("aggregate_plays", 0, 1, 0)
        assert await bench.connection.fetch(query) == before

    async def test_a_dry_run_leaves_everything_as_it_was(self, bench: Bench) -> None:
        blocks = some_blocks(random.Random(1), 8)
        await bench.apply(*cut(blocks[:5], ()), *above(blocks[5:]))
        await bench.connection.execute("delete from aggregate_plays; delete from milestones")
        before = await dump(bench.connection)
        for name in DERIVING:
            rehearsed = await bench.rebuild(name, dry_run=True)
            assert rehearsed.rewound
            assert "rolled back" in describe(rehearsed)
        assert await dump(bench.connection) == before
        assert await bench.at() == 8

    async def test_tables_emptied_are_filled_again(self, bench: Bench) -> None:
        blocks = some_blocks(random.Random(3), 10)
        await bench.apply(*cut(blocks, ()))
        await bench.connection.execute(f"truncate {', '.join(DAMAGE)}")
        for name in DERIVING:
            await bench.rebuild(name)
        await bench.is_right(blocks)

    async def test_the_hooks_go_on_from_rebuilt_rows(self, bench: Bench) -> None:
        blocks = some_blocks(random.Random(4), 10)
        await bench.apply(*cut(blocks[:5], ()))
        for table in DAMAGE:
            await damage(random.Random(4), bench.connection, table)
        for name in DERIVING:
            await bench.rebuild(name)
        await bench.apply(*(span([one]) for one in blocks[5:]))
        await bench.is_right(blocks)


class TestTheWindow:
    """Blocks that may still be reorganised: the journal must not bring wrong rows back."""

    @pytest.mark.parametrize("seed", SEEDS)
    async def test_a_reorganisation_right_after_a_rebuild(self, bench: Bench, seed: int) -> None:
        chance = random.Random(seed)
        blocks = some_blocks(chance, 12)
        split = chance.randint(1, 8)
        await bench.apply(*cut(blocks[:split], ()))
        middle = chance.randint(split, 11)
        await bench.apply(*above(blocks[split:middle]))
        for table in DAMAGE:  # some blocks of the window come before the damage, and some after it
            await damage(chance, bench.connection, table)
        await bench.apply(*above(blocks[middle:]))
        for name in chance.sample(DERIVING, 2):
            await bench.rebuild(name)
            at = await bench.at()
            assert split <= at <= 12
            assert (await bench.verify(name)).equal
            if chance.random() < 0.5:
                await bench.apply(*above(blocks[at:]))  # the daemon, by its cursor
        at = await bench.at()
        # a hook that was rebuilt before another one is right as well, once both were
        await bench.apply(*above(blocks[at:]))
        await bench.is_right(blocks)
        fork = chance.randint(split, 11)
        await bench.undo(fork)
        await bench.is_right(blocks[:fork])
        other = some_blocks(chance, 3, first=fork + 1, fork="other")
        await bench.apply(*above(other))
        await bench.is_right([*blocks[:fork], *other])

    async def test_nothing_is_rewound_where_nothing_differs(self, bench: Bench) -> None:
        blocks = some_blocks(random.Random(5), 10)
        await bench.apply(*cut(blocks[:5], ()), *above(blocks[5:]))
        for name in DERIVING:
            assert (await bench.rebuild(name)).rewound == ()
        assert await bench.at() == 10

    async def test_nothing_is_rewound_where_the_window_did_not_touch_the_tables(self, bench: Bench) -> None:
        blocks = [*some_blocks(random.Random(1), 5), *(block(number) for number in range(6, 9))]
        await bench.apply(*cut(blocks[:5], ()), *above(blocks[5:]))
        await bench.connection.execute("update aggregate_plays set count = 0")
        assert (await bench.rebuild("aggregates")).rewound == ()
        await bench.undo(6)
        await bench.is_right(blocks[:6])

    async def test_a_journal_that_is_out_of_date_is_not_played_back(self, bench: Bench) -> None:
        """The daemon stood still for long: what was a window is final now, and final blocks came after it."""
        blocks = some_blocks(random.Random(6), 12)
        await bench.apply(*cut(blocks[:3], ()), *above(blocks[3:6]))
        bench.final = 20
        for one in blocks[6:9]:
            await bench.apply(span([one]))
        assert await journal.journal_rows(bench.connection, bench.chain.id)
        await bench.connection.execute("update aggregate_plays set count = 0")
        assert (await bench.rebuild("aggregates")).rewound == ()
        await bench.is_right(blocks[:9])

    async def test_a_window_that_begins_with_the_chain(self, bench: Bench) -> None:
        blocks = some_blocks(random.Random(1), 4)
        assert blocks[0].events or blocks[1].events
        await bench.apply(*above(blocks))
        await bench.connection.execute("update aggregate_plays set count = 0")
        await bench.rebuild("aggregates")
        await bench.apply(*above(blocks[await bench.at() :]))
        await bench.is_right(blocks)


class TestBesideOthers:
    async def test_a_writer_at_work(self, bench: Bench) -> None:
        """Spans are committed by a second connection all the time; it reads its cursor anew when it was moved."""
        blocks = some_blocks(random.Random(7), 80)
        writer = await asyncpg.connect(bench.url, server_settings={"timezone": "UTC", "search_path": "public"})
        lost = 0

        async def write() -> None:
            nonlocal lost
            bench.final = 20
            while (at := await cursor_of(writer, bench)) < len(blocks):
                for one in blocks[at:]:
                    try:
                        await bench_apply(one)
                    except LostLeadership:
                        lost += 1
                        break

        async def bench_apply(one: Block) -> None:
            at = (await ledger.cursor(writer, bench.chain.id)).ref
            if at.number != one.number - 1:
                raise LostLeadership("moved")
            pace = Pace(heads(80, min(20, one.number)))
            async for _ in bench.pipeline.apply(writer, at, span([one], final=one.number <= 20), pace):
                pass

        try:
            writing = asyncio.create_task(write())
            chance = random.Random(8)
            for _ in range(12):  # each of them takes the window away again
                await asyncio.sleep(chance.random() / 4)
                await bench.connection.execute("update aggregate_plays set count = count + 1 where play_item_id = 1")
                if chance.random() < 0.5:
                    await bench.connection.execute("delete from hourly_play_counts where play_count % 2 = 0")
                    await bench.connection.execute("delete from milestones")
                for name in DERIVING:
                    await bench.rebuild(name)
                    # one snapshot sees whole blocks only; a milestone goes by totals that were wrong for a moment
                    assert name != "aggregates" or (await bench.verify(name)).equal
            await writing
        finally:
            await writer.close()
        assert lost
        for name in DERIVING:
            await bench.rebuild(name)
        await bench.apply(*above(blocks[await bench.at() :]))
        await bench.is_right(blocks)

    async def test_the_daemon_waits_while_a_rebuild_works(self, bench: Bench) -> None:
        blocks = some_blocks(random.Random(1), 6)
        await bench.apply(*cut(blocks[:5], ()))
        await bench.connection.execute("update aggregate_plays set count = 0")
        second = await asyncpg.connect(bench.url)
        said: list[str] = []
        waiting: list[asyncio.Task[None]] = []

        def say(text: str) -> None:
            said.append(text)
            if "computing" in text and not waiting:
                spans = [span([blocks[5]], final=False)]
                waiting.append(asyncio.create_task(bench_on(second, bench, spans)))

        await bench.rebuild("aggregates", say=say)
        await waiting[0]
        await second.close()
        await bench.is_right(blocks)
        assert [text for text in said if "computing" in text] == [f"{table}: computing" for table in OF["aggregates"]]

    async def test_another_writer_of_the_tables_is_waited_for(self, bench: Bench) -> None:
        """It holds no cursor, has added its plays and not yet counted them all: a rebuild sees all of it or nothing."""
        blocks = some_blocks(random.Random(1), 5)
        await bench.apply(*cut(blocks, ()))
        await bench.connection.execute("update hourly_play_counts set play_count = 0")
        second = await asyncpg.connect(bench.url)
        play = "insert into plays (play_item_id, created_at, chain, slot) values (77, '2024-01-01', $1, 1)"
        async with second.transaction():
            await second.execute("insert into aggregate_plays values (77, 1)")
            await second.execute(play, bench.chain.id)
            rebuilding = asyncio.create_task(bench.rebuild("aggregates"))
            await asyncio.sleep(0.3)
            assert not rebuilding.done()
            await second.execute("insert into aggregate_monthly_plays values (77, '2024-01-01', '', 1)")
            await second.execute("insert into hourly_play_counts values ('2024-01-01', 1)")
        rebuilt = await rebuilding
        await second.close()
        assert rebuilt.tables[:2] == (Written("aggregate_plays", 0, 0, 0), Written("aggregate_monthly_plays", 0, 0, 0))
        assert (await bench.verify("aggregates")).equal

    async def test_two_chains_in_one_database(self, bench: Bench) -> None:
        other = await Bench(bench.url, bench.connection, bench.hooks).open("other")
        blocks, others = some_blocks(random.Random(9), 6), some_blocks(random.Random(10), 6)
        await bench.apply(*cut(blocks[:3], ()), *above(blocks[3:]))
        await other.apply(*cut(others, ()))
        await bench.connection.execute(f"truncate {', '.join(DAMAGE)}")
        # not undone in the tables that were emptied: what one chain wrote is another's before-image here
        for name in DERIVING:
            await bench.rebuild(name)
        await bench.apply(*above(blocks[await bench.at() :]))
        assert (await bench.verify("aggregates")).equal
        plays = sum(len(one.events) for one in (*blocks, *others))
        assert await bench.connection.fetchval("select sum(count) from aggregate_plays") == plays


async def bench_on(connection: asyncpg.Connection, bench: Bench, spans: Sequence[Span]) -> None:
    at = (await ledger.cursor(connection, bench.chain.id)).ref
    for one in spans:
        async for applied in bench.pipeline.apply(connection, at, one, Pace(heads(one.last, bench.final))):
            at = applied.span.end


async def cursor_of(connection: asyncpg.Connection, bench: Bench) -> int:
    return (await ledger.cursor(connection, bench.chain.id)).ref.number


class TestHoles:
    async def test_a_hook_added_late_gets_its_history(self, database_url: str, connection: asyncpg.Connection) -> None:
        hooks = load_hooks(HooksSettings(enabled=ENABLED))
        early = await Bench(database_url, connection, hooks[:1]).open()
        blocks = some_blocks(random.Random(11), 10)
        await early.apply(*cut(blocks, ()))
        late = await Bench(database_url, connection, hooks).open()
        for name in DERIVING:
            assert not (await late.verify(name)).equal
            rebuilt = await late.rebuild(name)
            assert rebuilt.closed_blocks == 10
            assert "10 blocks closed" in describe(rebuilt)
        assert await ledger.gaps(connection, late.chain.id) == {"plays": [], "aggregates": [], "milestones": []}
        await late.is_right(blocks)

    async def test_a_hole_that_a_failure_left_is_closed_with_it(self, bench: Bench) -> None:
        class Failing(Aggregates):
            async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
                if any(one.number == 4 for one in blocks):
                    raise RuntimeError("no")
                await super().apply(tx, blocks)

        hooks = [*bench.hooks]
        hooks[1] = Registered(Failing(), HookSettings(on_error="skip"))
        failing = await Bench(bench.url, bench.connection, hooks).open()
        blocks = [block(number, [event(0, {"trackId": "1", "playedAt": str(SECONDS)})]) for number in range(1, 7)]
        await failing.apply(*cut(blocks, ()))
        assert len(await ledger.open_failures(bench.connection, bench.chain.id)) == 1
        found = (await bench.verify("aggregates")).tables[0]
        assert (found.missing, found.superfluous, found.different) == (0, 0, 1)
        for name in DERIVING:
            assert (await bench.rebuild(name)).closed_blocks == 1
        assert not any((await ledger.gaps(bench.connection, bench.chain.id)).values())
        assert await ledger.open_failures(bench.connection, bench.chain.id) == []
        await bench.is_right(blocks)

    async def test_a_base_with_holes_is_refused(self, bench: Bench) -> None:
        await bench.apply(*cut(some_blocks(random.Random(1), 6), ()))
        await bench.connection.execute("update aggregate_plays set count = 0")
        sql = "update indexer.coverage set blocks = '{[1,3),[4,7)}' where hook = 'plays'"
        await bench.connection.execute(sql)
        before = await dump(bench.connection)
        with pytest.raises(UsageError, match=r"hook plays.* lacks the blocks 3 to 3 of chain main.*gaps --fill") as one:
            await bench.rebuild("aggregates")
        assert one.value.exit_code == 2
        assert await dump(bench.connection) == before

    async def test_milestones_are_in_chain_order_whatever_was_filled_in_later(self, bench: Bench) -> None:
        blocks = [
            block(number, [event(index, {"trackId": "1", "playedAt": str(SECONDS + number)}) for index in range(6)])
            for number in (1, 2, 3)
        ]
        await bench.apply(*cut(blocks, ()))
        # as after a replay: the plays of the first block came in last
        await bench.connection.execute("update plays set id = id + 1000 where slot = 1")
        assert (await bench.verify("milestones")).equal
        await bench.connection.execute("update milestones set slot = 3")
        await bench.rebuild("milestones")
        await bench.is_right(blocks)


class TestRefusals:
    @pytest.mark.parametrize("verb", [verify, rebuild])
    async def test_a_pruned_base(self, bench: Bench, verb: Any) -> None:
        await bench.apply(*cut(some_blocks(random.Random(1), 3), ()))
        for rows in (5, 7):
            await note_pruned(bench.connection, "plays", datetime(2024, 5, rows), rows)
        for name in DERIVING:
            with pytest.raises(UsageError, match="plays was pruned: 12 rows from before 2024-05-07 are gone"):
                await verb(bench.connection, bench.hooks, name)

    async def test_another_tables_pruning_is_none_of_it(self, bench: Bench) -> None:
        await note_pruned(bench.connection, "notification", datetime(2024, 5, 1), 3)
        assert (await bench.verify("aggregates")).equal

    @pytest.mark.parametrize("verb", [verify, rebuild])
    @pytest.mark.parametrize(
        ("name", "words"),
        [("nobody", "no enabled hook is called nobody .*aggregates, milestones"), ("plays", "derives no table")],
    )
    async def test_no_such_hook(self, bench: Bench, verb: Any, name: str, words: str) -> None:
        with pytest.raises(UsageError, match=words):
            await verb(bench.connection, bench.hooks, name)

    async def test_rows_of_another_writer(self, bench: Bench) -> None:
        """They are none of our counts; but theirs may be in the same tables, so a rebuild must be told."""
        blocks = some_blocks(random.Random(1), 5)
        await bench.apply(*cut(blocks, ()))
        await bench.connection.execute("insert into plays (play_item_id, created_at, slot) values (1, now(), 1)")
        for name in DERIVING:
            found = await bench.verify(name)
            assert found.equal
            assert found.shared
            assert "another writer" in describe(found)
            with pytest.raises(UsageError, match=r"plays has rows of another writer.*--only-ours"):
                await bench.rebuild(name)
            rebuilt = await bench.rebuild(name, only_ours=True)
            assert not any(one.inserted or one.changed or one.deleted for one in rebuilt.tables)

    async def test_milestones_of_other_kinds_are_left_alone(self, bench: Bench) -> None:
        sql = "insert into milestones values (1, $1, 10, 1, now())"
        await bench.connection.executemany(sql, [("FOLLOWER_COUNT",), ("LISTEN_COUNT",)])
        assert [one.superfluous for one in (await bench.verify("milestones")).tables] == [1]
        await bench.rebuild("milestones")
        assert await bench.connection.fetchval("select array_agg(name) from milestones") == ["FOLLOWER_COUNT"]

    async def test_a_database_that_was_not_migrated(self, bench: Bench) -> None:
        await bench.connection.execute("drop table indexer.pruned")
        for verb in (verify, rebuild):
            with pytest.raises(UsageError, match="run `indexer migrate`"):
                await verb(bench.connection, bench.hooks, "aggregates")


class TestYourOwnHook:
    """No private door: a hook of anybody's may have derived tables."""

    TABLES = """
        create table sale (id int primary key, buyer text, price numeric(10, 2));
        create table buyer (name varchar(9), "Day of" int, total numeric(12, 2), note text default 'new',
                            primary key ("Day of", name));
        create table known (name text primary key);
        insert into sale values (1, 'ann', 1.5), (2, 'bob', 2), (3, 'ann', 3), (4, '', 0.1);
    """
    BUYER = 'select buyer as name, 1 as "Day of", sum(price) as total from sale group by buyer -- all of them'

    def registered(self, *derived: Derived, kept: Sequence[str] = ()) -> list[Registered]:
        tables = ["buyer", "known", "told"] if kept else ["buyer", "known"]

        @hook("buyers", listens=[], tables=tables, derived=derived, kept=kept)
        async def buyers(tx: Tx, blocks: Sequence[Block]) -> None:
            raise AssertionError

        return [Registered(buyers, HookSettings())]

    async def test_any_types_names_and_keys(self, connection: asyncpg.Connection) -> None:
        await connection.execute(self.TABLES)
        await connection.execute("insert into buyer values ('ann', 1, 7, 'kept'), ('eve', 1, 1, 'gone')")
        await connection.execute("insert into known values ('bob'), ('eve')")
        known = Derived("known", "select distinct buyer from sale where buyer <> ''", base=("sale",))
        mine = self.registered(
            Derived("buyer", self.BUYER, base=("sale",), only="total is not null -- each"),
            Derived("known", known.sql.replace("buyer from", "buyer as name from"), base=("sale",)),
        )
        found = await verify(connection, mine, "buyers")
        assert [(one.missing, one.superfluous, one.different) for one in found.tables] == [(2, 1, 1), (1, 1, 0)]
        sample = next(one for one in found.tables[0].samples if one.kind == "different")
        assert sample.present == {"name": "ann", "Day of": 1, "total": 7.0}
        assert sample.wanted == {"name": "ann", "Day of": 1, "total": 4.5}
        assert (await rebuild(connection, mine, "buyers")).tables == (
            Written("buyer", 2, 1, 1),
            Written("known", 1, 0, 1),
        )
        rows = await connection.fetch("select name, total::float, note from buyer order by name")
        assert [tuple(row) for row in rows] == [("", 0.1, "new"), ("ann", 4.5, "kept"), ("bob", 2.0, "new")]
        assert (await verify(connection, mine, "buyers")).equal

    @pytest.mark.parametrize(
        ("derived", "words"),
        [
            (Derived("buyer", "select 1 as wrong", ()), "gives wrong, which is not one column"),
            (Derived("buyer", "select 1 as total", ()), r"must give its primary key \((name, Day of|Day of, name)\)"),
            (Derived("buyer", "select nonsense", ()), "buyer can't be computed: column"),
            (Derived("sale", "select 1 as id", ()), "sale, which is not among its tables"),
            (Derived("known", "select 'a' as name from generate_series(1, 2)", ()), "known can't be computed: dup"),
            (Derived("known", "select null::text as name", ()), "known can't be computed: null value"),
        ],
    )
    async def test_a_select_that_does_not_suit(
        self, connection: asyncpg.Connection, derived: Derived, words: str
    ) -> None:
        await connection.execute(self.TABLES)
        with pytest.raises(HookLoadError, match=words):
            await rebuild(connection, self.registered(derived), "buyers")
        assert await connection.fetchval("select count(*) from known") == 0

    async def test_holes_stay_open_where_a_table_is_not_derived(self, connection: asyncpg.Connection) -> None:
        await connection.execute(self.TABLES)
        chain = await ledger.open_chain(connection, "main", "test", "1", 1)
        await ledger.register_hooks(connection, chain.id, ["buyers"])
        await connection.execute("update indexer.cursor set number = 9")
        buyer = Derived("buyer", self.BUYER, base=("sale",))
        rebuilt = await rebuild(connection, self.registered(buyer), "buyers")
        assert (rebuilt.closed_blocks, rebuilt.open_tables) == (0, ("known",))
        assert "stay open" in describe(rebuilt)
        assert (await rebuild(connection, self.registered(buyer, kept=["known", "told"]), "buyers")).closed_blocks == 9


def test_the_selects_say_what_the_hooks_do() -> None:
    numbers = re.search(r"where total in \(([0-9, \n]+)\)", DERIVED.sql)
    assert numbers is not None
    assert tuple(int(number) for number in numbers[1].split(",")) == THRESHOLDS
    assert f"left(country, {COUNTRY_CHARACTERS})" in Aggregates.derived[1].sql
    assert set(DAMAGE) == set(COLUMNS) - {"plays", "notification"}


async def test_the_commands(bench: Bench, tmp_path: Path, commands: Commands) -> None:
    """Exit codes, facts on stdout, progress on stderr."""
    blocks = some_blocks(random.Random(1), 6)
    await bench.apply(*cut(blocks, ()))
    (tmp_path / "indexer.toml").write_text(toml(settings(bench.url, "http://127.0.0.1:1")))
    await bench.connection.execute("delete from aggregate_plays where play_item_id = 2")

    async def indexer(*words: str) -> Any:
        return await commands(*words, folder=tmp_path)

    found = await indexer("verify", "aggregates", "--json")
    assert found.code == 1, found.err
    facts = json.loads(found.out)
    assert not facts["equal"]
    assert facts["tables"][0]["missing"] == 1
    assert facts["tables"][0]["samples"][0]["wanted"]["play_item_id"] == 2
    assert (await indexer("verify", "milestones")).code == 0
    rehearsed = await indexer("rebuild", "aggregates", "--dry-run")
    assert rehearsed.code == 0, rehearsed.err
    assert "aggregate_plays: 1 inserted, 0 changed, 0 deleted" in rehearsed.out
    assert "hourly_play_counts: computing" in rehearsed.err
    assert (await indexer("verify", "aggregates")).code == 1
    done = await indexer("rebuild", "aggregates", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["tables"][0] == {"table": "aggregate_plays", "inserted": 1, "changed": 0, "deleted": 0}
    assert (await indexer("verify", "aggregates")).code == 0
    await note_pruned(bench.connection, "plays", datetime(2024, 5, 1), 3)
    for words in (("verify", "aggregates"), ("rebuild", "aggregates"), ("rebuild", "plays"), ("verify",)):
        refused = await indexer(*words)
        assert refused.code == 2, refused.err
        assert refused.err.splitlines()[-1].startswith("indexer: ")
    assert await dump(bench.connection) == Oracle(bench.chain.id).apply(blocks).dump()
