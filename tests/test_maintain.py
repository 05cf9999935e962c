"""`indexer maintain`: trending is computed anew beside its readers, and old plays go without a count going down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import HOOKS, Commands, Ended, settings, toml
from oracle import dump
from pydantic import ValidationError
from test_chain_cli import refused
from test_recorded import recorded

from hooks import upkeep
from hooks.aggregates import Aggregates
from hooks.milestones import Milestones
from hooks.plays import Plays, PlaysSettings
from indexer import ledger
from indexer.errors import UsageError
from indexer.model import Block
from indexer.rebuild import rebuild, verify
from indexer.replay import Replayer
from indexer.testing import Bench, crash_point, make_blocks, one_span, one_span_a_block
from indexer.testing.crash import When

Run = Callable[..., Awaitable[Ended]]
DAY = 86_400
OLD_BLOCKS, BLOCKS = 6, 9
SESSION = {"timezone": "UTC", "search_path": "public"}


def play(track: int, user: str, days: float) -> tuple[str, dict[str, str]]:
    """A play that many days ago."""
    return "Played", {"trackId": str(track), "userId": user, "playedAt": str(int(time.time() - days * DAY))}


def some_blocks() -> list[Block]:
    """Six blocks with two old plays of user 5 and one of nobody in each, three with new plays."""
    old = [[play(1, "5", 500 - n), play(2, "5", 450 - n), play(1, "anonymous", 480)] for n in range(OLD_BLOCKS)]
    new = [[play(1, "5", 2), play(2, "6", 10)] for _ in range(BLOCKS - OLD_BLOCKS)]
    return make_blocks(*old, *new)


@pytest.fixture
async def bench(connection: asyncpg.Connection) -> Bench:
    found = await Bench.open(connection, [Plays(PlaysSettings(prune_after_days=400)), Aggregates(), Milestones()])
    await found.apply([one_span(some_blocks())])
    return found


async def heard(connection: Any) -> list[tuple[Any, ...]]:
    """What each person heard of each track, in plays and in what is kept of those that were pruned."""
    rows = await connection.fetch(
        """
        select user_id, play_item_id, sum(count)::int, max(latest) from (
            select user_id, play_item_id, count, latest from pruned_listens
            union all
            select user_id, play_item_id, count(*), max(created_at) from plays where user_id is not null group by 1, 2
        ) as parts group by 1, 2 order by 1, 2
        """
    )
    return [tuple(row) for row in rows]


async def prune(connection: Any, days: int = 400) -> str:
    (chore,) = [one for one in upkeep.chores(days) if one.name == "prune_plays"]
    return await chore.run(connection)


async def plays_left(connection: Any) -> int:
    return int(await connection.fetchval("select count(*) from plays"))


# -- pruning ---------------------------------------------------------------------------------------------------------


async def test_what_is_pruned_and_what_stays(bench: Bench) -> None:
    connection = bench.connection
    await connection.execute(
        "insert into plays (user_id, play_item_id, created_at) values (5, 1, now() - interval '2 years')"
    )  # another writer's
    before, listened = await dump(connection), await heard(connection)
    said = await prune(connection)
    assert said.startswith("19 plays from before ") and said.endswith(" pruned")
    after = await dump(connection)
    assert {table for table in after if after[table] != before[table]} == {"plays"}
    assert await plays_left(connection) == 6
    assert await heard(connection) == listened
    pruned = await connection.fetch("select user_id, play_item_id, count from pruned_listens order by 1, 2")
    assert [tuple(row) for row in pruned] == [(5, 1, 7), (5, 2, 6)]
    noted = await connection.fetchrow("select before < now() - interval '440 days', rows from indexer.pruned")
    assert noted is not None and tuple(noted) == (True, 19)
    assert await prune(connection) == ""
    assert await dump(connection) == after


async def test_so_many_a_run_oldest_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = bench.connection
    listened, left = await heard(connection), [24 - 7, 24 - 14, 24 - 18, 24 - 18]
    monkeypatch.setattr(upkeep, "PRUNED_PLAYS", 7)
    oldest = await connection.fetch("select id, created_at from plays order by created_at, id")
    for count, plays in enumerate(left, 1):
        said = await prune(connection)
        assert (said == "") is (count == 4)
        assert await plays_left(connection) == plays
        kept = await connection.fetch("select id, created_at from plays order by created_at, id")
        assert kept == oldest[24 - plays :]
        assert await heard(connection) == listened
        assert await connection.fetchval(
            "select before - interval '1 microsecond' <= $1 from indexer.pruned", kept[0]["created_at"]
        )
    assert await connection.fetchval("select rows from indexer.pruned") == 18


async def test_a_crash_at_every_statement(bench: Bench, database_url: str) -> None:
    """Killed before or after any statement: all of it or nothing, and the next run ends with the same."""
    listened, struck = await heard(bench.connection), []
    places: list[tuple[int, When]] = [(at, when) for at in range(1, 6) for when in ("before", "after")]
    for at, when in places:
        connection = await asyncpg.connect(database_url, server_settings=SESSION)
        with crash_point(connection, at, when) as point, suppress(asyncpg.PostgresError, asyncpg.InterfaceError):
            await prune(connection)
        struck.append(point.struck)
        connection.terminate()
        assert await heard(bench.connection) == listened
        gone = await bench.connection.fetchval("select coalesce(sum(rows), 0) from indexer.pruned")
        assert await plays_left(bench.connection) == 24 - gone
        assert gone == (18 if (at, when) == (5, "after") else 0)
    assert all(struck)
    assert point.statements[-1].upper().startswith("COMMIT")
    assert await prune(bench.connection) == ""


async def test_rows_that_somebody_holds_are_left_for_later(bench: Bench, database_url: str) -> None:
    other = await asyncpg.connect(database_url, server_settings=SESSION)
    async with other.transaction():
        await other.execute("update plays set city = 'Bonn' where slot = 1")
        async with asyncio.timeout(20):
            assert (await prune(bench.connection)).startswith("15 plays")
    assert (await prune(bench.connection)).startswith("3 plays")
    await other.close()


async def test_a_commit_of_the_daemon_does_not_wait(bench: Bench, database_url: str) -> None:
    other = await asyncpg.connect(database_url, server_settings=SESSION)
    async with other.transaction():
        await prune(other)
        async with asyncio.timeout(20):
            await bench.apply([one_span(make_blocks([play(1, "5", 500)], first=BLOCKS + 1))])
    await other.close()
    assert await plays_left(bench.connection) == 7


async def test_blocks_that_may_be_reorganised_are_left_alone(bench: Bench) -> None:
    """A play may say any time, but a block that is undone takes all of its plays along."""
    connection = bench.connection
    before = await bench.state()
    blocks = make_blocks([play(1, "5", 900)], [play(2, "6", 900)], first=BLOCKS + 1)
    await bench.apply(one_span_a_block(blocks), final=BLOCKS)
    assert (await prune(connection)).startswith("18 plays")
    assert await connection.fetchval("select count(*) from plays where slot > $1", BLOCKS) == 2
    await bench.undo(BLOCKS)
    after = await bench.state()
    assert {table for table in after if after[table] != before[table]} <= {"plays", "indexer.block"}
    assert await plays_left(connection) == 6


async def test_rebuild_and_verify_are_refused_then(bench: Bench) -> None:
    hooks = bench.pipeline.hooks
    assert (await verify(bench.connection, hooks, "aggregates")).equal
    await prune(bench.connection)
    for verb in (verify, rebuild):
        with pytest.raises(UsageError, match="plays was pruned: 18 rows from before"):
            await verb(bench.connection, hooks, "aggregates")  # type: ignore[operator]


async def test_replays_that_would_count_wrongly_are_refused(bench: Bench, database_url: str, tmp_path: Path) -> None:
    connection, chain = bench.connection, bench.pipeline.chain
    await prune(connection)
    other = await asyncpg.connect(database_url, server_settings=SESSION)
    try:
        replayer = Replayer(other, chain, bench.pipeline.hooks, None, "replay")  # type: ignore[arg-type]
        every = [one.name for one in bench.pipeline.hooks]
        with pytest.raises(UsageError, match=r"of blocks up to 6: .* 1 to 9 would insert its rows again"):
            await replayer.plan(1, 9, every, force=True)
        with pytest.raises(UsageError, match=r"up to 6: .*; begin after block 6"):
            await replayer.plan(6, 6, ["plays"], force=True)
        assert len(await replayer.plan(7, 9, every, force=True)) == 1
        # the hook's own hole is fine, and so is what does not build on the pruned rows
        assert await replayer.plan(1, 9, every) == []
        assert len(await replayer.plan(1, 9, ["aggregates"], force=True)) == 1
        await connection.execute("update indexer.coverage set blocks = '{[7,10)}'")
        (segment,) = await replayer.plan(1, 9, every)
        assert (segment.first, segment.last, segment.fill) == (1, 6, tuple(every))
        # but a hook that was skipped there would not hear of the pruned plays
        await connection.execute("update indexer.coverage set blocks = '{[1,10)}' where hook = 'plays'")
        with pytest.raises(UsageError, match="not give aggregates and milestones what plays inserted there"):
            await replayer.plan(1, 9, every)
    finally:
        await other.close()


async def test_what_was_pruned_of_another_chain_does_not_matter(bench: Bench) -> None:
    await prune(bench.connection)
    other = await ledger.open_chain(bench.connection, "other", "testing", "1", 1)
    assert await ledger.pruned_blocks(bench.connection, other.id, ["plays", "milestones"]) == {}
    assert await ledger.pruned_blocks(bench.connection, bench.pipeline.chain.id, ["plays", "nothing"]) == {"plays": 6}


def test_pruning_is_off_by_default_and_never_early() -> None:
    assert [chore.name for chore in Plays().chores] == ["aggregate_interval_plays"]
    assert len(Plays(PlaysSettings(prune_after_days=400)).chores) == 2
    assert Plays(PlaysSettings(prune_after_days=400)).listens == Plays().listens
    with pytest.raises(ValidationError, match="400"):
        PlaysSettings(prune_after_days=399)


# -- what trending reads ---------------------------------------------------------------------------------------------


async def interval_plays(connection: Any) -> list[tuple[Any, ...]]:
    rows = await connection.fetch(
        "select track_id, week_listen_counts, month_listen_counts from aggregate_interval_plays order by 1"
    )
    return [tuple(row) for row in rows]


async def test_the_plays_of_week_and_month(bench: Bench, database_url: str) -> None:
    connection = bench.connection
    await connection.execute(
        "insert into tracks (track_id, owner_id, created_at, is_unlisted)"
        " values (1, 7, 'now', false), (2, 7, 'now', false), (3, 7, 'now', false), (4, 7, 'now', true)"
    )
    assert await upkeep.refresh_interval_plays(connection) == "2 tracks with plays in the last 30 days"
    assert await interval_plays(connection) == [(1, 3, 3), (2, 0, 3), (3, 0, 0)]
    await bench.apply([one_span(make_blocks([play(3, "5", 1)], first=BLOCKS + 1))])
    reader = await asyncpg.connect(database_url, server_settings=SESSION)
    async with reader.transaction(), asyncio.timeout(20):
        assert await interval_plays(reader) == [(1, 3, 3), (2, 0, 3), (3, 0, 0)]  # holds its lock until the end
        await upkeep.refresh_interval_plays(connection)
        assert await interval_plays(reader) == [(1, 3, 3), (2, 0, 3), (3, 1, 1)]
    await reader.close()


# -- the command -----------------------------------------------------------------------------------------------------

CHORES = """
import asyncio
from indexer import Chore

async def well(connection):
    return f"{await connection.fetchval('select 6 * 7')} swept"

async def badly(connection):
    await connection.execute("select 1 / 0")

async def slowly(connection):
    return await connection.fetchval("select setting from pg_settings where name = 'statement_timeout'")

class Tidy:
    name, listens, tables, after = "tidy", (), (), ()
    chores = (Chore("first", badly), Chore("second", well), Chore("third", slowly))
    async def apply(self, tx, blocks): ...
"""


@pytest.fixture
def run(commands: Commands, tmp_path: Path, database_url: str) -> Run:
    (tmp_path / "tidy_hooks.py").write_text(CHORES)

    async def with_settings(*arguments: str, url: str = database_url, **hooks: Any) -> Ended:
        values = settings(url, "", contracts=[], hooks={"enabled": [*HOOKS, "tidy_hooks:Tidy"], **hooks})
        values["chain"] = {"source": "recorded", "file": "f"}
        values["database"]["connect_timeout_seconds"] = 0.5
        (tmp_path / "indexer.toml").write_text(toml(values))
        return await commands(*arguments, folder=tmp_path)

    return with_settings


async def test_maintain(run: Run) -> None:
    listed = await run("maintain", "--list", plays={"prune_after_days": 1000})
    assert (listed.code, listed.out.splitlines()) == (
        0,
        [
            "aggregate_interval_plays (hook plays)", "prune_plays (hook plays)", "first (hook tidy)",
            "second (hook tidy)", "third (hook tidy)",
        ],
    )  # fmt: skip
    done = await run("maintain")
    assert (done.code, done.errors) == (1, [])
    assert done.out.splitlines() == [
        "aggregate_interval_plays: 0 tracks with plays in the last 30 days",
        "first: failed: DivisionByZeroError: division by zero",
        "second: 42 swept",
        "third: 86400000",
    ]
    done = await run("maintain", "--only", "second")
    assert (done.code, done.out) == (0, "second: 42 swept\n")
    done = await run("maintain", "--only", "prune_plays", plays={"prune_after_days": 1000})
    assert (done.code, done.out) == (0, "prune_plays: nothing to do\n")
    refused(await run("maintain", "--only", "prune_plays"), 2, "no enabled hook has a chore prune_plays", "second")
    refused(await run("maintain", plays={"prune_after_days": 30}), 2, "hooks.plays.prune_after_days", "400")
    refused(await run("maintain", url="postgresql://127.0.0.1:1/nothing"), 75, "the database can't be reached")


async def test_one_process_at_a_time(run: Run, connection: asyncpg.Connection) -> None:
    await connection.execute("select pg_advisory_lock(hashtext('indexer.chore'), hashtext('tidy second'))")
    done = await run("maintain", "--only", "second")
    assert (done.code, done.out) == (0, "second: left to another process, which works on it\n")


async def test_a_forced_replay_over_pruned_plays(run: Run, tmp_path: Path, connection: asyncpg.Connection) -> None:
    recorded(tmp_path / "f", 1, BLOCKS, some_blocks())
    old = {"plays": {"prune_after_days": 400}}
    assert (await run("run", "--from-file", "f", **old)).code == 0
    done = await run("maintain", "--only", "prune_plays", **old)
    assert done.out.startswith("prune_plays: 18 plays from before ")
    before = await dump(connection)
    refused(await run("replay", "3", "9", "--force", **old), 2, "plays was pruned, of blocks up to 6", "twice")
    refused(await run("replay", "3", "9", "--force", "--dry-run", **old), 2, "begin after block 6")
    assert (await run("replay", "7", "9", "--force", **old)).code == 0
    rebuilt = await run("rebuild", "aggregates", **old)
    assert (rebuilt.code, rebuilt.errors[-1][:28]) == (2, "indexer: plays was pruned: 1")
    assert await dump(connection) == before
