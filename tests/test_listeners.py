"""The hook `listeners` on a real database against its oracle: whatever was heard, however it is cut, in any order."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle_listeners import ListenersOracle, Play, dump, written
from replaykit import Picky, chain_of, world

from hooks.listeners import DERIVED, LIMIT, Listeners
from hooks.plays import COLUMNS, PLACE, Plays
from indexer import Block, Tx
from indexer.config import HookSettings
from indexer.rebuild import rebuild, verify
from indexer.registry import Registered
from indexer.testing import (
    Bench,
    assert_set_equals_rows,
    assert_undo_restores,
    make_blocks,
    one_span,
    one_span_a_block,
    run_hooks,
    spans_of,
)  # fmt: skip

START = datetime(2024, 2, 29, 22)
SMALL = 3


class Forgetful(Listeners):
    """Holds so few tracks that they fall out and come back."""

    limit = SMALL
    derived = tuple(
        msgspec.structs.replace(one, sql=one.sql.replace("place <= 1000", f"place <= {SMALL}")) for one in DERIVED
    )


def said(user: int | None, track: int, at: datetime) -> tuple[str, dict[str, str]]:
    return "Played", {
        "userId": "somebody" if user is None else str(user),
        "trackId": str(track),
        "playedAt": at.isoformat(),
    }


def made(blocks: Iterable[Sequence[Play]]) -> list[Block]:
    return make_blocks(*([said(*play) for play in plays] for plays in blocks))


def flat(blocks: Iterable[Sequence[Play]]) -> list[Play]:
    return [play for plays in blocks for play in plays]


def after(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


# equal times, one hour and the next, backwards by days, and parts of a second
TIMES = st.one_of(
    st.integers(0, 5).map(lambda hours: after(60 * hours)),
    st.integers(-3 * 1440, 400).map(after),
    st.builds(lambda n, part: after(n) + timedelta(microseconds=part), st.integers(0, 90), st.integers(1, 999_999)),
)
PLAYS = st.tuples(st.sampled_from([None, 1, 1, 1, 2, -7]), st.integers(1, 6), TIMES)
HISTORIES = st.lists(st.lists(PLAYS, max_size=9), min_size=1, max_size=7)


def few(examples: int) -> Any:
    """Settings for examples that cost many round trips to the database each."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
    return settings(max_examples=examples, deadline=None, suppress_health_check=quiet, phases=phases)


@asynccontextmanager
async def undone(connection: asyncpg.Connection) -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


async def others(connection: asyncpg.Connection, heard: Iterable[Play]) -> None:
    """Rows of `plays` as another writer leaves them, without a place on the chain; every second one was adopted."""
    sql = "insert into plays (user_id, play_item_id, created_at, slot) values ($1, $2, $3, 316000000)"
    await connection.executemany(sql, list(heard))
    await connection.execute(
        """
        update plays set chain = 1, slot = 0, tx_hash = '\\x00', event_index = id, counterpart = 'adopted'
        where chain is null and id % 2 = 0
        """
    )


async def pruned(connection: asyncpg.Connection, heard: Iterable[Play]) -> None:
    sql = """
        insert into pruned_listens values ($1, $2, 1, $3)
        on conflict (user_id, play_item_id) do update
        set count = pruned_listens.count + 1, latest = greatest(pruned_listens.latest, excluded.latest)
    """
    await connection.executemany(sql, [play for play in heard if play[0] is not None])


class TestAnyHistory:
    @few(25)
    @given(HISTORIES, st.lists(st.integers(1, 3), max_size=4), st.lists(PLAYS, max_size=6), st.lists(PLAYS, max_size=6))
    async def test_the_tables_are_the_oracles_whatever_the_cut(
        self,
        connection: asyncpg.Connection,
        blocks: list[list[Play]],
        sizes: list[int],
        theirs: list[Play],
        gone: list[Play],
    ) -> None:
        chain = made(blocks)
        expected = ListenersOracle(SMALL, [*theirs, *gone]).all(flat(blocks)).dump()
        for spans in (one_span_a_block(chain, final=True), spans_of(chain, sizes), [one_span(chain)]):
            async with undone(connection):
                await others(connection, theirs)
                await pruned(connection, gone)
                bench = await Bench.open(connection, [Plays(), Forgetful()])
                await bench.apply(spans)
                assert await dump(connection) == expected

    @few(30)
    @given(HISTORIES, st.data())
    async def test_holes_are_filled_in_any_order(
        self, connection: asyncpg.Connection, blocks: list[list[Play]], data: st.DataObject
    ) -> None:
        """Blocks that are missing as a whole, and those that this hook alone has missed; only the hours may differ."""
        order = data.draw(st.permutations([*range(len(blocks))] * 2))
        late = data.draw(st.sets(st.integers(0, len(blocks) - 1)))
        chain = made(blocks)
        async with undone(connection):
            there = set[int]()
            for number in order:
                if number not in there:
                    await run(connection, [chain[number]], listeners=number not in late)
                    there.add(number)
                elif number in late:
                    await run(connection, [chain[number]], recalled=True)
            left = await dump(connection)
        expected = ListenersOracle(SMALL).all(flat(blocks)).dump()
        assert left["history"] == expected["history"]
        assert [row[:2] for row in left["tracks"]] == [row[:2] for row in expected["tracks"]]

    @pytest.mark.parametrize("seed", range(3))
    async def test_a_fork_is_undone_and_the_cut_does_not_matter(
        self, connection: asyncpg.Connection, seed: int
    ) -> None:
        chain = made(some(random.Random(seed)))
        await assert_set_equals_rows(connection, [Plays(), Forgetful()], chain, ignore=["plays.id", "plays.updated_at"])
        await assert_undo_restores(connection, [Plays(), Forgetful()], chain)

    @pytest.mark.parametrize("seed", range(4))
    async def test_verify_agrees_and_rebuild_mends(self, connection: asyncpg.Connection, seed: int) -> None:
        chance = random.Random(seed)
        hooks = [Registered(one, HookSettings()) for one in (Plays(), Forgetful())]
        blocks = some(chance)
        await run_hooks(connection, hooks, made(blocks), final=True)
        right = await dump(connection)
        assert right == ListenersOracle(SMALL).all(flat(blocks)).dump()
        assert (await verify(connection, hooks, "listeners")).equal
        for damage in DAMAGE:
            await connection.execute(damage)
        assert [one.equal for one in (await verify(connection, hooks, "listeners")).tables] == [False] * 3
        await rebuild(connection, hooks, "listeners")
        assert await dump(connection) == right


DAMAGE = (
    "update user_distinct_play_hours set hours_with_play = hours_with_play + 1 where user_id = 1",
    "delete from user_distinct_play_tracks where user_id = 2",
    "insert into user_distinct_play_tracks values (99, 1, now())",
    "update user_listening_history set listening_history = listening_history - 0 where user_id = 1",
)


def some(chance: random.Random) -> list[list[Play]]:
    """A dozen blocks in which three people hear eight tracks, now and then out of order."""
    return [
        [
            (
                chance.choice([None, 1, 1, 2, 3]),
                chance.randint(1, 8),
                after(chance.choice([20 * number, 20 * number, chance.randint(-500, 200)]))
                + timedelta(microseconds=chance.choice([0, 0, 500_000, 1])),
            )
            for _ in range(chance.choice([0, 1, 3, 12]))
        ]
        for number in range(12)
    ] + [[(1, 1, START), (2, 1, START)]]


@pytest.mark.parametrize("seed", range(2))
async def test_replays_fill_what_was_skipped_and_rebuild_puts_the_hours_right(
    connection: asyncpg.Connection, database_url: str, seed: int
) -> None:
    chance = random.Random(seed)
    chain, small = chain_of(seed, 30, chance.choice([0, 5])), {"span": {"max_events": 10, "max_blocks": 5}}
    async with world(database_url, connection, chain, **small) as w:
        listeners = Picky(Forgetful())
        w.hooks.append(listeners)
        for one in (w.plays, listeners):
            one.bad.update(chance.sample(range(1, 31), 8))
        await w.follow()
        assert len(await w.gaps()) == 4
        for one in (w.plays, listeners):
            one.bad.clear()
        for first, last, targets in (
            (15, 25, ["listeners", "plays"]),
            (5, 30, ["plays"]),
            (0, 30, ["plays", "listeners"]),
        ):
            await w.fill(*targets, first=first, last=last)
        await w.fill()
        rows = await connection.fetch("select user_id, play_item_id, created_at from plays order by slot, id")
        expected, left = ListenersOracle(SMALL).all(tuple(row) for row in rows).dump(), await dump(connection)
        assert left["history"] == expected["history"]
        assert [row[:2] for row in left["tracks"]] == [row[:2] for row in expected["tracks"]]
        await rebuild(connection, w.registered, "listeners")
        await w.follow()
        assert await dump(connection) == expected


async def run(
    connection: asyncpg.Connection, blocks: Sequence[Block], *, listeners: bool = True, recalled: bool = False
) -> None:
    """The hooks on blocks wherever they are, as a replay runs them."""
    tx = Tx(connection, 1)
    tx.recalling = recalled
    await Plays().apply(tx, blocks)
    tx.recalling = False
    if listeners:
        await Forgetful().apply(tx, blocks)


class TestTrap2:
    async def test_trap_2_two_plays_of_one_user_and_a_new_track_in_one_statement(
        self, connection: asyncpg.Connection
    ) -> None:
        twice = [[(1, 5, START)], [(1, 8, after(1)), (1, 8, after(2))]]
        await run_hooks(connection, [Plays(), Listeners()], made(twice), spans=[2], final=True)
        assert await connection.fetchval("select track_count from user_distinct_play_tracks") == 2
        assert (await dump(connection))["history"] == [(1, [(8, written(after(2)), 2), (5, written(START), 1)])]

    async def test_trap_2_two_new_tracks_in_one_statement(self, connection: asyncpg.Connection) -> None:
        two = [[(1, 5, START)], [(1, 8, after(1)), (1, 9, after(2))]]
        await run_hooks(connection, [Plays(), Listeners()], made(two), spans=[2], final=True)
        assert await connection.fetchval("select track_count from user_distinct_play_tracks") == 3


async def test_hours_count_once_and_only_forwards(connection: asyncpg.Connection) -> None:
    times = [30, 59, 60, 119, 45, 60 * 3 + 20, 60 * 3 + 40, 60 * 2]
    await run_hooks(connection, [Plays(), Listeners()], made([[(1, 5, after(minutes)) for minutes in times]]))
    assert (await dump(connection))["hours"] == [(1, 3, after(200))]
    await run_hooks(connection, [Plays(), Listeners()], make_blocks([said(2, 5, after(30))], first=2))
    assert (await dump(connection))["hours"][1] == (2, 1, START)  # the first one leaves the hour, not the time


async def test_anonymous_plays_leave_nothing(connection: asyncpg.Connection) -> None:
    await run_hooks(connection, [Plays(), Listeners()], made([[(None, 5, START)]]))
    assert not any((await dump(connection)).values())


async def test_a_thousand_tracks_and_one_that_comes_back(connection: asyncpg.Connection) -> None:
    whole = [[(1, track, after(track)) for track in range(LIMIT + 5)], [(1, 2, after(5000)), (1, 3, after(-1))]]
    await run_hooks(connection, [Plays(), Listeners()], made(whole), spans=[1, 1], final=True)
    left = await dump(connection)
    assert left == ListenersOracle().all(flat(whole)).dump()
    entries = left["history"][0][1]
    assert (len(entries), entries[0]) == (LIMIT, (2, written(after(5000)), 2))
    assert 3 not in [track for track, _, _ in entries]


class TestWhatAnotherWriterLeft:
    async def test_a_row_that_begins_counts_its_first_track(self, connection: asyncpg.Connection) -> None:
        await others(connection, [(1, 5, START), (1, 6, START), (2, 6, START), (2, 5, START)])
        first = [(1, 5, after(1)), (1, 6, after(2)), (1, 7, START), (2, 5, after(1)), (2, 6, after(2)), (2, 7, START)]
        await run_hooks(connection, [Plays(), Listeners()], made([first]))
        assert (await dump(connection))["tracks"] == [(1, 2, START), (2, 2, START)]

    async def test_its_plays_are_not_counted_by_verify(self, connection: asyncpg.Connection) -> None:
        await run_hooks(connection, [Plays(), Listeners()], made([[(1, 5, START)]]))
        await others(connection, [(1, 6, after(90)), (1, 7, after(99))])
        found = await verify(connection, [Registered(Listeners(), HookSettings())], "listeners")
        assert found.equal and set(found.shared) == set(Listeners.tables)

    async def test_its_types(self, connection: asyncpg.Connection) -> None:
        """Ids are integers there, and `updated_at` has a timezone."""
        await connection.execute("drop materialized view if exists aggregate_interval_plays")
        await connection.execute("alter table plays alter user_id type integer, alter play_item_id type integer")
        await connection.execute("alter table user_listening_history alter user_id type integer")
        for table, column in (("hours", "hours_with_play"), ("tracks", "track_count")):
            await connection.execute(
                f"alter table user_distinct_play_{table} alter user_id type integer, alter {column} type integer,"
                " alter updated_at type timestamptz"
            )
        blocks = some(random.Random(7))
        await run_hooks(connection, [Plays(), Forgetful()], made(blocks), spans=[5, 5, 5], final=True)
        assert await dump(connection) == ListenersOracle(SMALL).all(flat(blocks)).dump()
        hooks = [Registered(one, HookSettings()) for one in (Plays(), Forgetful())]
        assert (await verify(connection, hooks, "listeners")).equal

    async def test_a_history_in_another_form_is_mended(self, connection: asyncpg.Connection) -> None:
        await others(connection, [(1, 5, START), (1, 5, START), (1, 6, START)])
        theirs = [
            {"track_id": 4, "timestamp": "2024-01-01T00:00:00.5", "play_count": 3},
            {"track_id": 5, "timestamp": "2024-02-29 22:00:00", "play_count": None},
            {"track_id": 6, "timestamp": "2024-02-29 22:00:00", "play_count": 7, "more": [1]},
            {"track_id": 6, "timestamp": "2023-02-28T23:00:00+01:00", "play_count": 2},
            {"track_id": 7, "timestamp": "2022-01-01 00:00:00"},
        ]
        await keep(connection, 1, theirs)
        await run_hooks(connection, [Plays(), Listeners()], made([[(1, 6, after(1))]]))
        assert (await dump(connection))["history"] == [(1, [
            (6, "2024-02-29 22:01:00", 8), (5, "2024-02-29 22:00:00", 2),
            (4, "2024-01-01 00:00:00.500000", 3), (7, "2022-01-01 00:00:00", 1),
        ])]  # fmt: skip

    @pytest.mark.parametrize(
        "theirs",
        [
            None, 5, {}, "", [None, 7, [], {}], [{"track_id": "5", "timestamp": "2024-01-01"}],
            [{"track_id": 9**30, "timestamp": "2024-01-01", "play_count": 1}],
            [{"track_id": 5, "timestamp": time} for time in (None, 5, "soon", "", "0001-01-01T00:00:00+14:00")],
        ],
    )  # fmt: skip
    async def test_what_can_not_be_read_stops_nothing(self, connection: asyncpg.Connection, theirs: Any) -> None:
        await keep(connection, 1, theirs)
        await run_hooks(connection, [Plays(), Listeners()], made([[(1, 6, START)]]))
        assert (await dump(connection))["history"] == [(1, [(6, written(START), 1)])]

    async def test_a_history_that_is_too_long_or_not_in_order(self, connection: asyncpg.Connection) -> None:
        theirs = [{"track_id": n, "timestamp": written(after(n)), "play_count": 1} for n in range(LIMIT + 50)]
        random.Random(1).shuffle(theirs)
        await keep(connection, 1, theirs)
        await run_hooks(connection, [Plays(), Listeners()], made([[(1, 5000, after(5000))]]))
        entries = (await dump(connection))["history"][0][1]
        assert [track for track, _, _ in entries] == [5000, *range(LIMIT + 49, 50, -1)]


async def keep(connection: asyncpg.Connection, user: int, history: Any) -> None:
    await connection.execute("insert into user_listening_history values ($1, $2::jsonb)", user, json.dumps(history))


async def test_two_chains_at_one_person_count_a_track_once(connection: asyncpg.Connection, database_url: str) -> None:
    rows = [(1, 5, START, 1, "", "", "", "", "relay", chain, b"x", 0) for chain in (1, 2)]
    second = await asyncpg.connect(database_url)

    async def other_chain() -> None:
        async with second.transaction():
            await listen(second, rows[1])

    try:
        async with connection.transaction():
            await listen(connection, rows[0])
            task = asyncio.create_task(other_chain())
            waiting = "select exists (select from pg_locks where not granted)"
            while not await connection.fetchval(waiting):
                await asyncio.sleep(0.01)
        await task
    finally:
        await second.close()
    assert await connection.fetchval("select track_count from user_distinct_play_tracks") == 1
    assert (await dump(connection))["history"] == [(1, [(5, written(START), 2)])]


async def listen(connection: asyncpg.Connection, row: tuple[Any, ...]) -> None:
    tx = Tx(connection, row[COLUMNS.index("chain")])
    await tx.insert_new("plays", COLUMNS, [row], key=PLACE)
    await Listeners().apply(tx, ())
