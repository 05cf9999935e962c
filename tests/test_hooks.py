"""The bundled hooks on a real database against the oracle: whatever the plays are, and however they are cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
from eth_abi import encode
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from made import ADDRESS, GENESIS, SECONDS, block, cut, event, heads, span
from oracle import COLUMNS, MILESTONES, Dump, Oracle, dump

from indexer import ledger, metrics
from indexer.config import ContractSettings, DatabaseSettings, HooksSettings
from indexer.db import Database
from indexer.errors import ConfigError
from indexer.ledger import Pace
from indexer.model import Block, BlockRef, Span
from indexer.pipeline import Pipeline
from indexer.registry import Registered, check_events, load_hooks
from indexer.sources.contracts import Contracts
from indexer.transaction import Tx

ENABLED = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones"]
SLIM = "event Played(uint256 indexed trackId, uint256 indexed userId, uint64 playedAt, string country)"
OWNERS = {1: 100, 2: 2**31, 3: -(2**31) - 1, 4: 2**31 - 1}  # those beyond int32 can't be in notification.user_ids
FORMER = 5  # a track whose row is not current

_chains = itertools.count(1)


def bundled(**settings_: dict[str, Any]) -> tuple[Registered, ...]:
    return load_hooks(HooksSettings(enabled=ENABLED, **settings_))


async def start(connection: asyncpg.Connection, hooks: Sequence[Registered] | None = None) -> Pipeline:
    """A chain of its own in the database, and its pipeline."""
    chain = await ledger.open_chain(connection, f"chain{next(_chains)}", "test", "1", 1)
    hooks = bundled() if hooks is None else hooks
    await ledger.register_hooks(connection, chain.id, [one.name for one in hooks])
    return Pipeline(chain, hooks, "test")


async def apply(connection: asyncpg.Connection, pipeline: Pipeline, spans: Iterable[Span]) -> None:
    at = (await ledger.cursor(connection, pipeline.chain.id)).ref
    for one in spans:
        async for applied in pipeline.apply(connection, at, one, Pace(heads(10**6))):
            at = applied.span.end


async def rewind(connection: asyncpg.Connection, pipeline: Pipeline, to: BlockRef = GENESIS) -> None:
    sql = "update indexer.cursor set number = $2, hash = $3 where chain = $1"
    await connection.execute(sql, pipeline.chain.id, to.number, to.hash)


async def clear(connection: asyncpg.Connection) -> None:
    """Nothing but the tracks' owners."""
    await connection.execute(f"truncate {', '.join(COLUMNS)}, tracks restart identity")
    sql = "insert into tracks (track_id, owner_id, created_at, is_current) values ($1, $2, 'now', $3)"
    rows = [(track, owner, True) for track, owner in OWNERS.items()]
    await connection.executemany(sql, [*rows, (FORMER, 100, False)])


@pytest.fixture
async def owned(connection: asyncpg.Connection) -> asyncpg.Connection:
    await clear(connection)
    return connection


def play(index: int = 0, **args: Any) -> Any:
    whole = {"trackId": "1", "userId": "7", "playedAt": str(SECONDS), "signature": "", "city": "", "region": ""}
    return event(index, {**whole, "country": "", **args})


def plays(*args: Mapping[str, Any]) -> list[Any]:
    return [play(index, **one) for index, one in enumerate(args)]


# -- what a chain may say ----------------------------------------------------------------------------------------------

INTEGERS = [
    "0", "7", "-7", "+7", "007", "-0", "+-7", "--7", "+", "-", "", " 7", "7 ", "7\n", "7\0", "1.5", "1e3", "1_000",
    "0x7",
    "0x" + "ab" * 20, "abc", "７", "٧", "²", "+٧", "NaN", "null", "9" * 30, "-" + "9" * 5000, "0" * 5000 + "7",
    "-" + "0" * 30 + "7", *(str(sign * 2**bits + step) for sign in (1, -1) for bits in (31, 63) for step in (-1, 0,
    1)),
    7, -7, 0, 2**63 - 1, 2**63, -(2**63), 2**256 - 1, True, None, b"7",
]  # fmt: skip
# the ends of hours, months, years, of both kinds of a day when the clocks change, and of what a datetime holds
BORDERS = [
    datetime(1970, 1, 1), datetime(2024, 2, 29, 23), datetime(2024, 3, 1), datetime(2023, 12, 31, 23),
    datetime(2024, 3, 10, 7), datetime(2024, 3, 10, 10), datetime(2024, 3, 31, 1), datetime(2024, 10, 27, 1),
    datetime(2024, 11, 3, 6), datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59), datetime(2038, 1, 19, 3, 14, 8),
]  # fmt: skip
ODD_TIMES = [
    "", "soon", "-1", "+1", "1.5", "1e9", "0", "00000001", "253402300799", "253402300800", "999999999999",
    "1700000000000",
    "2024010112000", "20240101", "20240101T000000Z", "2024-01-01", "2024-W01-1", "2024-01-01T00:00Z",
    "2024-1-1T0:0:0Z",
    "2024-01-01T24:00:00Z", "2024-01-01T23:59:60Z", "2024-02-30T00:00:00Z", "2024-01-01x00:00:00Z",
    "2024-01-01T00:00:00+24:00", "2024-01-01T00:00:00+05:60", "2024-01-01T00:00:00+05:30:15",
    "2024-01-01T00:00:00,5Z",
    "2024-01-01T00:00:00.Z", "2024-01-01T00:00:00Z\0", "2024-01-01t00:00:00z", "2024-01-01 00:00:00+00",
    "2024-01-01T00:00:00.1234567890123456789+0530", "0001-01-01T00:00:00+00:01", "9999-12-31T23:59:59-00:01",
    "10000-01-01T00:00:00Z", "+10000-01-01T00:00:00Z", "２024-01-01T00:00:00Z", "2024-01-01\ud80000:00:00",
    0, -1, 253_402_300_799, 253_402_300_800, 2**64 - 1,
]  # fmt: skip
LONG = "".join(random.Random(1).choices([chr(code) for code in range(0x20, 0x3000)], k=5000))
TEXTS = [
    "", "\0", "Zü\0rich", "日本", "🎵", "a" * 199 + "🎵b", "a" * 199 + "🎵c", LONG[:200], LONG, LONG + "?",
    "\ud83c alone", "NULL",
    "\\N", "\t\n\r", "'; drop table plays; --", "{}", "%s", LONG * 4,
]  # fmt: skip


@st.composite
def written_times(draw: st.DrawFn) -> str | int:
    """A moment within a day of a border, as unix seconds or with any offset, and with any number of digits."""
    at = draw(st.sampled_from(BORDERS))
    moves = [-3600, -1, 0, 1, 1799, 3599, 3600, 86_399]
    with suppress(OverflowError):
        at += timedelta(seconds=draw(st.sampled_from(moves)))
    seconds = int((at - datetime(1970, 1, 1)).total_seconds())
    style = draw(st.sampled_from(["text", "number", "utc", "offset", "none"]))
    if style in ("text", "number"):
        return str(seconds) if style == "text" else seconds
    fraction = draw(st.sampled_from(["", ".5", ".999999", ".9999999", ".123456789", ".000000001"]))
    if style != "offset":
        return at.isoformat() + fraction + ("Z" if style == "utc" else "")
    zone = timezone(timedelta(minutes=draw(st.sampled_from([-720, -301, -240, 0, 60, 330, 345, 840]))))
    try:
        local = at.replace(tzinfo=timezone.utc).astimezone(zone)  # noqa: UP017
    except OverflowError:
        local = at.replace(tzinfo=zone)
    return local.isoformat()[:-6] + fraction + local.isoformat()[-6:]


TIMES = st.one_of(written_times(), st.sampled_from(ODD_TIMES))
STRINGS = st.one_of(st.sampled_from(TEXTS), st.text(max_size=8))
SOME = st.fixed_dictionaries(
    {
        "trackId": st.one_of(st.sampled_from(["1", "2", "3", "4", "5"]), st.sampled_from(INTEGERS)),
        "userId": st.one_of(st.just("7"), st.sampled_from(INTEGERS)),
        "playedAt": TIMES,
    },
    optional={"signature": STRINGS, "city": STRINGS, "region": STRINGS, "country": STRINGS},
)
# a play that is one, and so often that milestones are crossed
GOOD = st.fixed_dictionaries(
    {"trackId": st.sampled_from(["1", "2", "+1", "-1"]), "playedAt": written_times(), "country": STRINGS}
)


@st.composite
def chains(draw: st.DrawFn) -> list[Block]:
    """Up to eight blocks with up to five kinds of play each, every one of them up to 60 times."""
    kinds = draw(st.lists(st.one_of(GOOD, SOME, SOME), min_size=1, max_size=12))
    times = st.sampled_from([1, 1, 2, 9, 10, 26, 60])
    parts = st.lists(st.tuples(st.sampled_from(kinds), times), max_size=5)
    blocks = []
    for number, listed in enumerate(draw(st.lists(parts, min_size=1, max_size=8)), 1):
        said = [args for args, count in listed for _ in range(count)]
        if draw(st.booleans()):
            random.Random(number).shuffle(said)
        # one transaction may hold many plays, and a transaction's hash may come back in another block
        blocks.append(block(number, [event(index, args, tx=index // 3) for index, args in enumerate(said)]))
    return blocks


def few(examples: int) -> Any:
    """Settings for examples that cost many round trips to the database each."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
    return settings(max_examples=examples, deadline=None, suppress_health_check=quiet, phases=phases)


async def outcome(connection: asyncpg.Connection, spans: Sequence[Span], blocks: Sequence[Block]) -> tuple[Dump, Dump]:
    """The tables after the spans, and what they should be."""
    await clear(connection)
    pipeline = await start(connection)
    before = skipped()
    await apply(connection, pipeline, spans)
    expected = Oracle(pipeline.chain.id, OWNERS).apply(blocks)
    # a metric says by reason what was passed over
    assert {reason: count - before[reason] for reason, count in skipped().items()} == {
        reason: expected.skipped.get(reason, 0) for reason in before
    }
    return await dump(connection), expected.dump()


def skipped() -> dict[str, float]:
    return {reason: metrics.skipped_total.labels("plays", reason)._value.get() for reason in ("track_id", "created_at")}


def one_by_one(blocks: Sequence[Block]) -> list[Span]:
    return [span([one], final=False) for one in blocks]


EVERYTHING = [
    block(1, plays(*({"trackId": one} for one in INTEGERS), *({"userId": one} for one in INTEGERS))),
    block(2, plays(*({"playedAt": one} for one in ODD_TIMES))),
    block(3, plays(*({"city": one, "country": one, "signature": one, "region": one} for one in TEXTS))),
]


class TestAnyChain:
    @few(20)
    @given(chains(), st.sets(st.integers(1, 7), max_size=4))
    @example(EVERYTHING, {1})
    async def test_the_tables_are_the_oracles_whatever_the_cut(
        self, connection: asyncpg.Connection, blocks: list[Block], borders: set[int]
    ) -> None:
        in_one = cut(blocks, ())
        for spans in (one_by_one(blocks), cut(blocks, {b for b in borders if b < len(blocks)}), in_one):
            left, expected = await outcome(connection, spans, blocks)
            assert left == expected
            rows = await connection.fetch("select slot, event_index from plays order by id")
            assert rows == sorted(rows)  # ids are in chain order, for those who page by them

    @few(6)
    @given(chains())
    @example(EVERYTHING)
    async def test_trap_3_no_timezone_moves_a_play(
        self, foreign: list[asyncpg.Connection], blocks: list[Block]
    ) -> None:
        for connection in foreign:
            left, expected = await outcome(connection, cut(blocks, ()), blocks)
            assert left == expected

    @few(6)
    @given(chains(), st.sets(st.integers(1, 7), max_size=3), st.integers(0, 2))
    @example([block(1, plays(*[{}] * 30))], set(), 0)
    async def test_a_replay_over_some_of_the_rows_adds_the_others(
        self, connection: asyncpg.Connection, blocks: list[Block], borders: set[int], kept: int
    ) -> None:
        await clear(connection)
        pipeline = await start(connection)
        some = [block(b.number, [e for e in b.events if e.index % 3 == kept]) for b in blocks]
        spans = cut(blocks, {b for b in borders if b < len(blocks)})
        expected = Oracle(pipeline.chain.id, OWNERS)
        for part, cuts in ((some, cut(some, ())), (blocks, spans)):
            await rewind(connection, pipeline)
            await apply(connection, pipeline, cuts)
            assert await dump(connection) == expected.apply(part).dump()
        before = await everything(connection)
        for again in (one_by_one(blocks), cut(blocks, ())):
            await rewind(connection, pipeline)
            await apply(connection, pipeline, again)
        assert await everything(connection) == before


async def everything(connection: asyncpg.Connection) -> dict[str, list[asyncpg.Record]]:
    """All rows with all columns, and with the transaction that wrote them: an update to the same values shows."""
    return {
        table: sorted(await connection.fetch(f"select xmin::text, ctid::text, * from {table}"), key=repr)
        for table in COLUMNS
    }


@pytest.fixture
async def foreign(database_url: str) -> AsyncIterator[list[asyncpg.Connection]]:
    """Sessions on a database that lives in New York: one of the daemon's kind, and one that even keeps that time."""
    admin = await asyncpg.connect(database_url)
    name = await admin.fetchval("select current_database()")
    await admin.execute(f"alter database {name} set timezone to 'America/New_York'")
    await admin.close()
    sessions = [await Database(database_url, DatabaseSettings()).connect(), await asyncpg.connect(database_url)]
    assert [await one.fetchval("show timezone") for one in sessions] == ["UTC", "America/New_York"]
    try:
        yield sessions
    finally:
        for session in sessions:
            await session.close()


async def test_updated_at_is_utc(foreign: list[asyncpg.Connection]) -> None:
    session = foreign[0]
    await apply(session, await start(session), [span([block(1, [play()])])])
    age = await session.fetchval("select abs(extract(epoch from (now() at time zone 'UTC') - updated_at)) from plays")
    assert age < 60


# -- the traps that cost the predecessors data -------------------------------------------------------------------------


class TestTrap1:
    """One bad play must not take its siblings along."""

    BAD = (
        {"userId": str(2**63)}, {"trackId": str(2**63)}, {"trackId": "abc"}, {"city": "Zü\0rich"}, {"playedAt": "soon"},
        {"playedAt": "2024-01-01T00:30:00.123456789+05:30"}, {"trackId": "0" * 5000 + "9"}, {"country": LONG},
        {"signature": LONG * 4}, {"city": "\ud83c"},
    )  # fmt: skip

    async def test_trap_1_one_bad_play_among_a_thousand(self, owned: asyncpg.Connection) -> None:
        said = plays(*({} for _ in range(500)), *self.BAD, *({} for _ in range(499)))
        await apply(owned, await start(owned), [span([block(1, said)])])
        assert await owned.fetchval("select count(*) from plays") == 999 + len(self.BAD) - 3
        rows = await owned.fetch("select * from plays where event_index between 500 and 509 order by id")
        assert [row["event_index"] for row in rows] == [500, 503, 505, 506, 507, 508, 509]
        assert rows[0]["user_id"] is None
        assert rows[1]["city"] == "Zürich"
        assert rows[2]["created_at"] == datetime(2023, 12, 31, 19, 0, 0, 123456)
        assert rows[3]["play_item_id"] == 9
        assert (rows[4]["country"], rows[5]["signature"], rows[6]["city"]) == (LONG, LONG * 4, "?")

    async def test_trap_1_the_range_is_that_of_the_column(self, owned: asyncpg.Connection) -> None:
        """In a database that was there before us ids are integers of 32 bits, and `source` has no default."""
        await owned.execute("drop materialized view aggregate_interval_plays")  # it holds the columns fast
        await owned.execute(
            "alter table plays alter user_id type integer, alter play_item_id type integer, alter source drop default"
        )
        numbers = [str(sign * 2**31 + step) for sign in (1, -1) for step in (-1, 0, 1)]
        said = plays(*({"userId": n} for n in numbers), *({"trackId": n} for n in numbers), {})
        blocks, pipeline = [block(1, said)], await start(owned)
        await apply(owned, pipeline, cut(blocks, ()))
        oracle = Oracle(pipeline.chain.id, OWNERS, bits=32).apply(blocks)
        assert await dump(owned) == oracle.dump()
        assert len(oracle.plays) == len(said) - 3
        assert oracle.skipped == {"track_id": 3}


class TestTrap2:
    """Many plays in one statement count as if they came one at a time."""

    async def test_trap_2_two_plays_of_one_user_and_a_new_track_in_one_statement(
        self, owned: asyncpg.Connection
    ) -> None:
        said = plays({"trackId": "8"}, {"trackId": "9"}, {"trackId": "8"})
        await apply(owned, await start(owned), [span([block(1, said)])])
        assert await owned.fetch("select * from aggregate_plays order by 1") == [(8, 2), (9, 1)]
        assert await owned.fetchval("select play_count from hourly_play_counts") == 3

    async def test_trap_2_a_milestone_is_the_play_that_reached_it(self, owned: asyncpg.Connection) -> None:
        """From 8 plays to 109 in one statement, with another track's between."""
        first = [block(1, plays(*[{}] * 8))]
        times = iter(range(SECONDS, SECONDS + 1000))

        def mixed(count: int) -> list[Any]:
            return plays(*({"trackId": t, "playedAt": str(next(times))} for _ in range(count) for t in ("1", "6")))

        rest = [block(2, mixed(41)), block(3, mixed(60))]
        pipeline = await start(owned)
        await apply(owned, pipeline, [span(first), span(rest)])
        rows = await owned.fetch("select threshold, slot, timestamp from milestones where id = 1 order by 1")
        expected = [(10, 2, 2), (25, 2, 32), (50, 3, 82), (100, 3, 182)]
        at = datetime(1970, 1, 1) + timedelta(seconds=SECONDS)
        assert rows == [(n, slot, at + timedelta(seconds=passed)) for n, slot, passed in expected]
        notified = await owned.fetch("select group_id, slot, user_ids from notification order by id")
        groups = [f"milestone:LISTEN_COUNT:id:1:threshold:{threshold}" for threshold, _, _ in expected]
        assert notified == [(group, slot, [100]) for group, (_, slot, _) in zip(groups, expected, strict=True)]


async def test_every_threshold_is_reached_exactly_once(owned: asyncpg.Connection) -> None:
    pipeline = await start(owned)
    await apply(owned, pipeline, [span([block(1, [play()])])])
    for number, threshold in enumerate(sorted(MILESTONES), 2):
        sql = "update aggregate_plays set count = $1"
        await owned.execute(sql, threshold - 2)
        await apply(owned, pipeline, [span([block(number, plays({}, {}, {}))])])
    reached = await owned.fetch("select threshold, slot from milestones order by 1")
    assert reached == [(threshold, number) for number, threshold in enumerate(sorted(MILESTONES), 2)]
    assert await owned.fetchval("select count(*) from notification") == len(MILESTONES)


async def test_a_total_that_had_reached_it_before_does_not_reach_it_again(owned: asyncpg.Connection) -> None:
    await owned.execute("insert into aggregate_plays values (1, 10)")
    await apply(owned, await start(owned), [span([block(1, plays(*[{}] * 14))])])
    assert await owned.fetch("select * from milestones") == []


async def test_a_milestone_that_another_writer_announced_is_not_announced_again(owned: asyncpg.Connection) -> None:
    await owned.execute("insert into milestones values (1, 'LISTEN_COUNT', 10, 316000000, 'epoch')")
    await apply(owned, await start(owned), [span([block(1, plays(*[{}] * 25))])])
    assert await owned.fetch("select threshold, slot from milestones order by 1") == [(10, 316000000), (25, 1)]
    assert await owned.fetchval("select count(*) from notification") == 1


# -- another writer's constraints, and the guard -----------------------------------------------------------------------


async def test_another_writers_unique_constraint_stops_nothing(owned: asyncpg.Connection) -> None:
    await owned.execute("create unique index theirs on plays (user_id, play_item_id, created_at)")
    said = [block(1, plays({}, {}, {"trackId": "2"})), block(2, plays({}, {"userId": "8"}))]
    await apply(owned, await start(owned), [span(said)])
    rows = await owned.fetch("select slot, event_index from plays order by id")
    assert rows == [(1, 0), (1, 2), (2, 1)]
    assert await owned.fetch("select play_item_id, count from aggregate_plays order by 1") == [(1, 2), (2, 1)]


class TestInsertNew:
    COLUMNS = ("key", "other", "value")

    @pytest.fixture
    async def tx(self, connection: asyncpg.Connection) -> AsyncIterator[Tx]:
        await connection.execute('create table "Odd ""name" (key int unique, other int unique, value text)')
        async with connection.transaction():
            yield Tx(connection, 1)

    async def insert(self, tx: Tx, records: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        rows = await tx.insert_new('Odd "name', self.COLUMNS, records, key=("key",))
        assert rows.columns == self.COLUMNS
        return rows.values

    async def stored(self, tx: Tx) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await tx.fetch('select * from "Odd ""name" order by key, value')]

    async def test_duplicates_inside_one_call(self, tx: Tx) -> None:
        first = [(2, 20, "a"), (1, 10, "b"), (2, 21, "c"), (1, 11, "d"), (3, 30, "e")]
        assert await self.insert(tx, first) == [(2, 20, "a"), (1, 10, "b"), (3, 30, "e")]
        assert await self.insert(tx, [(4, 40, "f"), (4, 40, "g")]) == [(4, 40, "f")]
        assert await self.insert(tx, first) == []
        assert await self.insert(tx, []) == []
        assert await self.stored(tx) == [(1, 10, "b"), (2, 20, "a"), (3, 30, "e"), (4, 40, "f")]
        assert tx.inserted('Odd "name')["value"] == ["a", "b", "e", "f"]
        assert tx.written == {('Odd "name', "inserted"): 4}

    async def test_a_key_that_is_null_is_never_there_already(self, tx: Tx) -> None:
        await self.insert(tx, [(1, 10, "there")])
        again = [(None, 11, "a"), (1, 12, "b"), (None, 13, "c"), (None, 11, "d")]
        assert len(await self.insert(tx, again)) == 2
        assert await self.stored(tx) == [(1, 10, "there"), (None, 11, "a"), (None, 13, "c")]

    async def test_a_second_list_of_columns_is_refused(self, tx: Tx) -> None:
        await self.insert(tx, [(1, 10, "a")])
        with pytest.raises(ValueError, match="one list of columns"):
            await tx.insert_new('Odd "name', ("key", "value"), [(2, "b")], key=("key",))

    async def test_nothing_is_remembered_of_a_table_that_nobody_wrote(self, tx: Tx) -> None:
        rows = tx.inserted("plays")
        assert not rows
        assert rows["play_item_id"] == []


# -- another event, by configuration alone -----------------------------------------------------------------------------


def contracts(*signatures: str) -> Contracts:
    return Contracts([ContractSettings(address=[ADDRESS], abi=list(signatures))])


def slim_log(number: int, index: int, track: int, user: int, at: int, country: str) -> Any:
    decoder = "0x" + contracts(SLIM).topics[0].removeprefix("0x")
    return SimpleNamespace(
        address=ADDRESS, topics=[decoder, f"0x{track:064x}", f"0x{user:064x}"], log_index=hex(index),
        data="0x" + encode(["uint64", "string"], [at, country]).hex(), block_number=hex(number),
        transaction_hash="0x" + f"{number:064x}", block_hash="0x" + "22" * 32,
    )  # fmt: skip


async def test_the_slim_event_needs_no_configuration(owned: asyncpg.Connection) -> None:
    known, hooks = contracts(SLIM), bundled()
    check_events(hooks, known.events)
    said = [
        (1, 7, SECONDS, "DE"), (2**63, 7, SECONDS, ""), (2, 2**256 - 1, SECONDS, "DE"), (2, 0, 2**64 - 1, "DE"),
        *[(1, 7, SECONDS + 3600, "日本")] * 10,
    ]  # fmt: skip
    logs = [slim_log(1, index, *values) for index, values in enumerate(said)]
    decoded, quarantined = await known.blocks(logs, {1: SECONDS})
    assert not quarantined
    events = list(decoded[0].events)
    assert events[0].args == {"trackId": 1, "userId": 7, "playedAt": SECONDS, "country": "DE"}
    pipeline = await start(owned, hooks)
    await apply(owned, pipeline, [span([block(1, events)])])
    expected = Oracle(pipeline.chain.id, OWNERS).apply([block(1, events)])
    assert await dump(owned) == expected.dump()
    assert (len(expected.plays), expected.skipped) == (12, {"track_id": 1, "created_at": 1})


async def test_a_play_without_a_time_has_its_blocks(owned: asyncpg.Connection) -> None:
    hooks = bundled(plays={"created_at": "", "event": "Listened"})
    check_events(hooks, contracts("event Listened(uint256 trackId)").events)
    one = block(5, [event(0, {"trackId": 3}, name="Listened"), event(1, {"trackId": 4})])
    await apply(owned, await start(owned, hooks), [span([one], 1)])
    rows = await owned.fetch("select play_item_id, user_id, created_at, country from plays")
    assert rows == [(3, None, datetime(1970, 1, 1) + timedelta(seconds=one.timestamp), "")]


async def test_renamed_arguments(owned: asyncpg.Connection) -> None:
    names = {"event": "Heard", "track_id": "song", "user_id": "who", "created_at": "at", "signature": "proof"}
    names |= {"city": "town", "region": "state", "country": "land"}
    hooks = bundled(plays=names)
    known = contracts(
        "event Heard(uint256 song, string who, uint64 at, string proof, string town, string state, string land)"
    )
    check_events(hooks, known.events)
    args = {"song": 1, "who": "7", "at": SECONDS, "proof": "p", "town": "t", "state": "s", "land": "l"}
    await apply(owned, await start(owned, hooks), [span([block(1, [event(0, args, name="Heard")])])])
    row = await owned.fetchrow("select user_id, play_item_id, created_at, signature, city, region, country from plays")
    assert row == (7, 1, datetime(1970, 1, 1) + timedelta(seconds=SECONDS), "p", "t", "s", "l")


@pytest.mark.parametrize(
    ("names", "signature", "text"),
    [
        ({"city": "town"}, SLIM, "hook plays needs the argument town of Played, which has: country, playedAt, "),
        ({"track_id": "song"}, SLIM, "hook plays needs the argument song of Played, which has: country, "),
        ({}, "event Played(uint256 song)", "hook plays needs the argument trackId of Played, which has: song"),
        ({"event": "Heard"}, SLIM, r"listens to the event Heard, which no \[\[contracts\]\] has \(there: Played\)"),
    ],
)  # fmt: skip
def test_an_argument_that_the_event_lacks_is_an_error(names: dict[str, str], signature: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_events(bundled(plays=names), contracts(signature).events)
