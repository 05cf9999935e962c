"""Beside another writer of the same plays: what is adopted, what the guard drops, and which hooks refuse to run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest

from hooks.aggregates import Aggregates
from hooks.listeners import Listeners
from hooks.milestones import Milestones
from hooks.plays import Plays, PlaysSettings
from indexer.config import HookSettings
from indexer.errors import ConfigError, DatabaseUnavailable, HookFailed
from indexer.ledger import ChainRow
from indexer.model import Block, Span
from indexer.pipeline import Pipeline, prepare
from indexer.rebuild import rebuild, verify
from indexer.registry import Registered
from indexer.testing import assert_undo_restores, make_blocks, one_span_a_block, run_hooks
from indexer.transaction import Tx

SECONDS = 1_700_000_000
AT = datetime(1970, 1, 1) + timedelta(seconds=SECONDS)
THEIRS = "insert into plays (user_id, play_item_id, created_at, signature, slot) values ($1, $2, $3, $4, 316000000)"
ON_PLAY = """
    create function handle_play() returns trigger language plpgsql as $$
    begin
        insert into aggregate_plays (play_item_id, count) values (new.play_item_id, 1)
        on conflict (play_item_id) do update set count = aggregate_plays.count + 1;
        return null;
    end $$;
    create trigger on_play after insert on plays for each row execute function handle_play()
"""

Theirs = tuple[int | None, int, datetime, str | None]


def play(track: int = 1, user: str = "7", at: int = SECONDS, signature: str = "s") -> tuple[str, dict[str, Any]]:
    return "Played", {"trackId": str(track), "userId": user, "playedAt": str(at), "signature": signature}


def hooks(*, beside: bool = True, counting: bool = True) -> list[Registered]:
    made: list[Any] = [Plays(PlaysSettings(beside_writer=beside))]
    return [Registered(one, HookSettings()) for one in ([*made, Aggregates()] if counting else made)]


def final(blocks: list[Block]) -> list[Span]:
    return one_span_a_block(blocks, final=True)


async def rows(connection: asyncpg.Connection) -> list[tuple[Any, ...]]:
    """(track, whether it has a place on the chain, counterpart) of all plays, in the order of their ids."""
    found = await connection.fetch("select play_item_id, chain is not null, counterpart from plays order by id")
    return [tuple(row) for row in found]


async def counted(connection: asyncpg.Connection) -> dict[int, int]:
    return dict(await connection.fetch("select play_item_id, count from aggregate_plays"))  # type: ignore[arg-type]


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """The other writer's session."""
    session = await asyncpg.connect(database_url)
    yield session
    await session.close()


# -- adoption ----------------------------------------------------------------------------------------------------------


async def test_of_three_plays_two_adopt_and_one_is_inserted(connection: asyncpg.Connection) -> None:
    theirs: list[Theirs] = [(7, 1, AT, "s"), (7, 1, AT, "s")]
    await connection.executemany(THEIRS, theirs)
    blocks = make_blocks([play(), play()], [play(), play(2)])
    await run_hooks(connection, hooks(), blocks)
    assert await rows(connection) == [(1, True, "adopted"), (1, True, "adopted"), (1, True, None), (2, True, None)]
    assert await counted(connection) == {1: 1, 2: 1}
    places = await connection.fetch("select slot, tx_hash, event_index from plays order by id")
    events = [(one.number, event.tx_hash, event.index) for one in blocks for event in one.events]
    assert places == events  # the first on the chain took the oldest row, and each has its own place


@pytest.mark.parametrize(
    ("theirs", "said", "same"),
    [
        ((None, 1, AT, "s"), play(user="0xabc"), True),
        ((None, 1, AT, "s"), play(user="7"), False),
        ((7, 1, AT, "s"), play(user="0xabc"), False),
        ((7, 1, AT, None), play(signature=""), True),
        ((7, 1, AT, ""), play(signature=""), True),
        ((7, 1, AT, "t"), play(), False),
        ((7, 2, AT, "s"), play(), False),
        ((8, 1, AT, "s"), play(), False),
        ((7, 1, AT + timedelta(microseconds=1), "s"), play(), False),
    ],
)
@pytest.mark.parametrize("first", ["theirs", "ours"])
async def test_what_is_the_same_play(
    connection: asyncpg.Connection, theirs: Theirs, said: tuple[str, dict[str, Any]], same: bool, first: str
) -> None:
    """Both ways round: what we adopt is what the guard drops."""
    await connection.execute("alter table plays alter signature drop not null")
    await run_hooks(connection, hooks(), [])  # puts the guard on
    if first == "theirs":
        await connection.execute(THEIRS, *theirs)
    await run_hooks(connection, hooks(), make_blocks([said]))
    if first == "ours":
        await connection.execute(THEIRS, *theirs)
    kind = {"theirs": "adopted", "ours": "dropped"}[first]
    present = await connection.fetch("select counterpart from plays")
    assert sorted(map(str, (row[0] for row in present))) == ([kind] if same else ["None", "None"])
    assert sum((await counted(connection)).values()) == (0 if same and first == "theirs" else 1)


async def test_a_replay_adopts_nothing_and_counts_nothing(connection: asyncpg.Connection) -> None:
    await connection.execute(THEIRS, 7, 1, AT, "s")
    blocks = make_blocks([play(), play(2)])
    bench = await run_hooks(connection, hooks(), blocks, final=True)
    # a play that they wrote before the guard was there, say: it must wait for a play of its own
    await connection.execute("alter table plays disable trigger user")
    await connection.execute(THEIRS, 7, 1, AT, "s")
    await connection.execute("alter table plays enable trigger user")
    before = await connection.fetch("select xmin, * from plays order by id")
    tx = Tx(connection, bench.pipeline.chain.id)
    async with connection.transaction():
        await hooks()[0].hook.apply(tx, blocks)
        locks = await connection.fetchval("select count(*) from pg_locks where locktype = 'advisory'")
    assert len(tx.inserted("plays")) == 0
    assert locks == 0  # where nothing is new, nobody waits for us
    assert await connection.fetch("select xmin, * from plays order by id") == before


@pytest.mark.parametrize("beside", [True, False])
async def test_what_is_recalled_are_the_plays_that_we_inserted(connection: asyncpg.Connection, beside: bool) -> None:
    """Whatever the setting is by then: a hook that is replayed counts what it counted at the time."""
    await connection.execute(THEIRS, 7, 1, AT, "s")
    blocks = make_blocks([play(), play(), play(2)])
    bench = await run_hooks(connection, hooks(), blocks, final=True)
    await connection.execute(THEIRS, 7, 2, AT, "s")  # dropped, which takes nothing from ours
    tx = Tx(connection, bench.pipeline.chain.id)
    tx.recalling = True
    async with connection.transaction():
        await hooks(beside=beside)[0].hook.apply(tx, blocks)
    assert [(row[1], row[-1]) for row in tx.inserted("plays")] == [(1, 1), (2, 2)]


async def test_derived_rows_are_those_of_our_own_plays(connection: asyncpg.Connection) -> None:
    await connection.execute(THEIRS, 7, 1, AT, "s")
    await run_hooks(connection, hooks(), make_blocks([play(), play(), play(2)]), final=True)
    await connection.execute(THEIRS, 7, 2, AT, "s")
    verified = await verify(connection, hooks(), "aggregates")
    assert verified.equal
    assert set(verified.shared) == set(Aggregates.tables)  # theirs may count as well: an adopted one says so
    await connection.execute("truncate aggregate_plays")
    await rebuild(connection, hooks(), "aggregates", only_ours=True)
    assert await counted(connection) == {1: 1, 2: 1}


async def test_undo_gives_adopted_rows_back(connection: asyncpg.Connection) -> None:
    await connection.execute("alter table plays alter signature drop not null")
    await connection.executemany(THEIRS, [(7, 1, AT, "s"), (None, 2, AT, None), (9, 9, AT, "")])
    before = await connection.fetch("select * from plays order by id")
    contents = [[play(), play()], [play(2, "", signature="")], [play(), play(3)], [play(2, "", signature="")]]
    await assert_undo_restores(connection, hooks(), make_blocks(*contents))
    assert await connection.fetch("select * from plays order by id") == before


async def test_undo_puts_a_row_back_that_the_guard_would_drop(connection: asyncpg.Connection) -> None:
    """A row of theirs comes back although one of ours, equal and without a counterpart, is there."""
    await connection.execute(THEIRS, 7, 1, AT, "s")
    bench = await run_hooks(connection, hooks(), make_blocks([], [play()], [play()]))
    await connection.execute("update plays set counterpart = null where slot = 3")
    await connection.execute("delete from indexer.journal where number = 3")  # as if block 3 were another chain's
    await bench.undo(1)
    assert await rows(connection) == [(1, False, None), (1, True, None)]


async def test_another_constraint_of_theirs_stops_nobody(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """Theirs is met by our row, but the guard drops their copy before the constraint is looked at."""
    await connection.execute("create unique index theirs on plays (user_id, play_item_id, created_at, signature)")
    await other.execute(THEIRS, 7, 1, AT, "s")
    await run_hooks(connection, hooks(), make_blocks([play(), play(2)]))
    await other.execute(THEIRS, 7, 2, AT, "s")
    assert await rows(connection) == [(1, True, "adopted"), (2, True, "dropped")]


@pytest.mark.parametrize("many", [False, True])
async def test_the_plan_stays_on_the_index(connection: asyncpg.Connection, many: bool) -> None:
    """Adoption and guard look up what they need in a table of 200,000 rows, with and without statistics of it."""
    await connection.execute(
        """
        insert into plays (user_id, play_item_id, created_at, signature)
        select nullif(n % 2 * n % 1000, 0), n % 500, timestamp '2024-01-01' + n / 3 * interval '1 second', 'x' || n
        from generate_series(1, 200000) as n
        """
    )
    if many:
        await connection.execute("vacuum analyze plays")
    pipeline = await run_hooks(connection, hooks(), [])
    reads = "select seq_scan, seq_tup_read, idx_tup_fetch from pg_stat_xact_user_tables where relname = 'plays'"
    said = [play(n % 500, at=1_704_067_200 + n, signature=f"x{n}") for n in range(500)]
    async with connection.transaction():
        before = await connection.fetchrow(reads)
        tx = Tx(connection, pipeline.pipeline.chain.id)
        await hooks()[0].hook.apply(tx, make_blocks(said))
        await connection.executemany(THEIRS, [(7, n % 500, AT, "y") for n in range(100)])
        after = await connection.fetchrow(reads)
    assert after["seq_tup_read"] == before["seq_tup_read"]
    assert after["idx_tup_fetch"] - before["idx_tup_fetch"] < 20_000


# -- the guard ---------------------------------------------------------------------------------------------------------


async def test_one_row_of_ours_stops_one_of_theirs(connection: asyncpg.Connection, other: asyncpg.Connection) -> None:
    bench = await run_hooks(connection, hooks(), make_blocks([play(), play()]))
    statement = "insert into plays (user_id, play_item_id, created_at, signature) select 7, 1, $1, 's' "
    assert await other.execute(statement + "from generate_series(1, 3)", AT) == "INSERT 0 1"
    await other.execute(THEIRS, 7, 1, AT, "s")
    assert Counter(row[2] for row in await rows(connection)) == {"dropped": 2, None: 2}
    # their two rows wait for plays of ours
    await bench.apply(final(make_blocks([play()], [play(), play()], first=2)))
    assert Counter(row[2] for row in await rows(connection)) == {"dropped": 2, "adopted": 2, None: 1}
    assert await counted(connection) == {1: 3}


async def test_a_copy_in_bulk_is_guarded(connection: asyncpg.Connection, other: asyncpg.Connection) -> None:
    await run_hooks(connection, hooks(), make_blocks([play(), play(2)]))
    columns = ["user_id", "play_item_id", "created_at", "signature"]
    copied: list[Theirs] = [(7, 1, AT, "s"), (7, 2, AT, "s"), (7, 3, AT, "s")]
    await other.copy_records_to_table("plays", records=copied, columns=columns)
    assert await rows(connection) == [(1, True, "dropped"), (2, True, "dropped"), (3, False, None)]


async def test_their_rollback_leaves_our_row_as_it_was(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await run_hooks(connection, hooks(), make_blocks([play()]))
    transaction = other.transaction()
    await transaction.start()
    await other.execute(THEIRS, 7, 1, AT, "s")
    await transaction.rollback()
    assert await rows(connection) == [(1, True, None)]
    await other.execute(THEIRS, 7, 1, AT, "s")
    assert await rows(connection) == [(1, True, "dropped")]


async def test_two_sessions_of_theirs_never_wait_for_each_other(
    connection: asyncpg.Connection, other: asyncpg.Connection, database_url: str
) -> None:
    await run_hooks(connection, hooks(), make_blocks([play()]))
    third = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute(THEIRS, 7, 1, AT, "s")
        await asyncio.wait_for(third.execute(THEIRS, 7, 1, AT, "s"), 5)
    await third.close()
    assert await rows(connection) == [(1, True, "dropped"), (1, False, None)]


async def test_we_wait_but_shortly_for_their_transaction_and_adopt_what_it_commits(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    bench = await run_hooks(connection, hooks(), [])
    transaction = other.transaction()
    await transaction.start()
    await other.execute(THEIRS, 7, 1, AT, "s")
    spans = final(make_blocks([play()]))
    with pytest.raises(DatabaseUnavailable, match="lock timeout"):
        await asyncio.wait_for(bench.apply(spans), 5)
    assert await connection.fetchval("show lock_timeout") == "0"
    waiting = asyncio.create_task(bench.apply(spans))
    await asyncio.sleep(0.1)
    await transaction.commit()
    await waiting
    assert await rows(connection) == [(1, True, "adopted")]


async def test_they_wait_for_our_transaction_and_see_what_it_committed(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    bench = await run_hooks(connection, hooks(), [])
    transaction = connection.transaction()
    await transaction.start()
    await hooks()[0].hook.apply(Tx(connection, bench.pipeline.chain.id), make_blocks([play()]))
    theirs = asyncio.create_task(other.execute(THEIRS, 7, 1, AT, "s"))
    done, _ = await asyncio.wait({theirs}, timeout=0.2)
    assert not done
    await transaction.commit()
    assert await theirs == "INSERT 0 0"
    assert await rows(connection) == [(1, True, "dropped")]


async def test_where_both_hold_what_the_other_wants_we_give_way(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """They count by themselves, and first: they hold a row of the counts and wait for us, and we want that row."""
    await connection.execute("insert into aggregate_plays values (1, 5)")
    bench = await run_hooks(connection, hooks(), [])
    transaction = other.transaction()
    await transaction.start()
    await other.execute("update aggregate_plays set count = count + 1 where play_item_id = 1")
    ours = asyncio.create_task(bench.apply(final(make_blocks([play()]))))
    await asyncio.sleep(0.1)  # we have the lock by now, and wait for their row
    await other.execute(THEIRS, 7, 1, AT, "s")
    with pytest.raises(DatabaseUnavailable, match="lock timeout"):
        await ours
    await transaction.commit()
    await bench.apply(final(make_blocks([play()])))
    assert await rows(connection) == [(1, True, "adopted")]
    assert await counted(connection) == {1: 6}


async def test_the_guard_is_there_only_beside_a_writer(connection: asyncpg.Connection) -> None:
    names = "select array_agg(tgname::text order by tgname) from pg_trigger where tgname like 'indexer_guard%'"
    on, off = hooks()[0].hook, hooks(beside=False)[0].hook
    for hook, wanted in ((off, None), (on, ["indexer_guard_drop", "indexer_guard_lock"])):
        for _ in range(2):
            await prepare(connection, hook)
            assert await connection.fetchval(names) == wanted
    await prepare(connection, off)
    assert await connection.fetchval(names) is None


async def test_without_its_guard_the_hook_stops(connection: asyncpg.Connection) -> None:
    """Another process, without the setting, has taken it off."""
    bench = await run_hooks(connection, hooks(), [])
    await prepare(connection, hooks(beside=False)[0].hook)
    with pytest.raises(HookFailed, match="the guard on plays is gone"):
        await bench.apply(final(make_blocks([play()])))


async def test_the_guard_waits_in_short_turns(
    connection: asyncpg.Connection, other: asyncpg.Connection, database_url: str
) -> None:
    third = await asyncpg.connect(database_url)
    transaction = other.transaction()
    await transaction.start()
    await other.execute(THEIRS, 7, 1, AT, "s")
    putting = asyncio.create_task(prepare(connection, hooks()[0].hook))
    for _ in range(10):  # others go on writing meanwhile
        await asyncio.wait_for(third.execute(THEIRS, 7, 2, AT, "s"), 5)
    assert not putting.done()
    await transaction.commit()
    await putting
    await third.close()
    assert await connection.fetchval("select count(*) from pg_trigger where tgname like 'indexer_guard%'") == 2


async def test_a_table_that_is_another_role_s(connection: asyncpg.Connection) -> None:
    await connection.execute("create role beside_writer; grant usage on schema indexer to beside_writer")
    await connection.execute("set role beside_writer")
    try:
        with pytest.raises(ConfigError, match="can't be put on the table plays, which is another role's"):
            await prepare(connection, hooks()[0].hook)
        await prepare(connection, hooks(beside=False)[0].hook)
    finally:
        await connection.execute("reset role; drop owned by beside_writer; drop role beside_writer")


async def test_a_writer_that_may_only_insert(connection: asyncpg.Connection, other: asyncpg.Connection) -> None:
    await run_hooks(connection, hooks(), make_blocks([play()]))
    await connection.execute(
        "create role inserter; grant insert on plays to inserter; grant usage on sequence plays_id_seq to inserter"
    )
    await other.execute("set role inserter; create temporary table plays_ (n int)")
    try:
        await other.execute(THEIRS, 7, 1, AT, "s")
        await other.execute(THEIRS, 7, 2, AT, "s")
        assert await rows(connection) == [(1, True, "dropped"), (2, False, None)]
    finally:
        await other.execute("reset role; drop owned by inserter; drop role inserter")


def test_spans_are_brief_only_beside_a_writer() -> None:
    assert [getattr(hooks(beside=beside)[0].hook, "brief", False) for beside in (True, False)] == [True, False]


# -- the trigger that does our hooks' work -----------------------------------------------------------------------------


class TestTrap6:
    async def test_trap_6_the_trigger_is_named_and_the_hooks_refuse(self, connection: asyncpg.Connection) -> None:
        await connection.execute(ON_PLAY)
        for make in (Aggregates(), Milestones(), Listeners()):
            with pytest.raises(ConfigError, match=rf"the trigger on_play on the table plays .* hook {make.name}"):
                await prepare(connection, make)

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ("alter trigger on_play on plays rename to counts", "counts"),
            ("alter function handle_play() rename to played", "on_play"),
            ("alter table plays enable always trigger on_play", "on_play"),
            ("alter table plays disable trigger on_play", None),
            ("alter table plays enable replica trigger on_play", None),
            ("drop trigger on_play on plays", None),
            ("create schema old; alter table plays set schema old", None),
        ],
    )
    async def test_trap_6_by_its_name_or_its_function(
        self, connection: asyncpg.Connection, change: str, found: str | None
    ) -> None:
        await connection.execute(ON_PLAY)
        await connection.execute(change)
        if found is None:
            await prepare(connection, Aggregates())
            return
        with pytest.raises(ConfigError, match=f"the trigger {found} on"):
            await prepare(connection, Aggregates())

    async def test_trap_6_the_plays_hook_runs_beside_it(self, connection: asyncpg.Connection) -> None:
        """The trigger counts each row that lands, ours and theirs, once."""
        await connection.execute(ON_PLAY)
        await connection.execute(THEIRS, 7, 1, AT, "s")
        await run_hooks(connection, hooks(counting=False), make_blocks([play(), play(), play(2)]))
        await connection.execute(THEIRS, 7, 2, AT, "s")
        assert await rows(connection) == [(1, True, "adopted"), (1, True, None), (2, True, "dropped")]
        assert await counted(connection) == {1: 2, 2: 1}

    async def test_trap_6_also_without_the_setting(self, connection: asyncpg.Connection) -> None:
        await connection.execute(ON_PLAY)
        hook = Plays()
        await prepare(connection, hook)
        assert "aggregate_plays" in Pipeline(ChainRow(1, "", "", "", 1), [Registered(hook, HookSettings())], "").tables
