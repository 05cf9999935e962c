"""Replay: holes are filled exactly once, beside a daemon, through reorganisations, and whenever it is interrupted."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any

import asyncpg
import pytest
from daemon import played
from hypothesis import given
from hypothesis import strategies as st
from replaykit import MET, ORDERED, TALLY, Picky, Tally, World, chain_of, everything, mine, own_plays, some_plays, world

from indexer import ledger, replay
from indexer.config import HookSettings
from indexer.errors import HookFailed, Temporary, UsageError
from indexer.follow import Outcome
from indexer.model import Block, Span
from indexer.registry import Registered
from indexer.replay import Replayer
from indexer.segments import earlier, segments
from indexer.transaction import Tx

Enter = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def enter(database_url: str, connection: asyncpg.Connection) -> Enter:
    """A world on the test's own database."""
    return partial(world, database_url, connection)


# more of them, to look for trouble
SEEDS = range(int(os.environ.get("REPLAY_SEEDS", "3")))
SMALL = {"span": {"max_events": 10, "max_blocks": 5}}


# -- what is to be done where ------------------------------------------------------------------------------------------


class Named:
    def __init__(self, name: str, after: Sequence[str] = ()) -> None:
        self.name, self.after, self.listens, self.tables = name, tuple(after), (), ()

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None: ...


HOOKS = tuple(
    Registered(one, HookSettings())
    for one in (Named("a"), Named("b", ["a"]), Named("c", ["b"]), Named("d"), Named("e", ["d", "b"]))
)
NAMES = [one.name for one in HOOKS]
BUILDS_ON = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": set(), "e": {"a", "b", "d"}}
holes = st.dictionaries(st.sampled_from(NAMES), st.sets(st.integers(0, 14)))


def ranges(numbers: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


@given(holes, st.sets(st.sampled_from(NAMES)), st.integers(0, 14), st.integers(0, 14), st.booleans())
def test_segments_are_exactly_what_is_asked_for(
    missing: dict[str, set[int]], targets: set[str], one: int, other: int, force: bool
) -> None:
    first, last = min(one, other), max(one, other)
    wanted: dict[int, tuple[set[str], set[str], set[str]]] = {}
    refused = False
    for number in range(first, last + 1):
        lacking = {name for name, numbers in missing.items() if number in numbers}
        fill = targets & lacking
        under = {below for name in fill for below in BUILDS_ON[name]}
        refused = refused or bool(under & lacking - fill)
        again = targets - lacking if force else set()
        if fill or again:
            wanted[number] = fill, under - fill, again
    given_ = {name: ranges(numbers) for name, numbers in missing.items()}
    if refused:
        with pytest.raises(UsageError, match="has a hole at blocks"):
            segments(HOOKS, given_, list(targets), first, last, force=force)
        return
    found = segments(HOOKS, given_, list(targets), first, last, force=force)
    assert {
        number: (set(one.fill), set(one.recall), set(one.again))
        for one in found
        for number in range(one.first, one.last + 1)
    } == wanted
    assert sum(one.last - one.first + 1 for one in found) == len(wanted)  # no block twice
    assert [one.first for one in found] == sorted(one.first for one in found)
    for one in found:  # hooks in the configured order
        for names in (one.fill, one.recall, one.again):
            assert list(names) == [name for name in NAMES if name in names]
    for before, after in zip(found, found[1:], strict=False):  # no more parts than needed
        assert before.last + 1 < after.first or wanted[before.last] != wanted[after.first]


def test_neighbours_with_the_same_work_are_one_segment() -> None:
    given_ = {"a": [(3, 5)], "d": [(0, 9)]}
    [one] = segments(HOOKS, given_, ["d"], 0, 20, force=False)
    assert (one.first, one.last, one.fill, one.recall, one.again) == (0, 9, ("d",), (), ())


def test_the_refusal_names_the_remedy() -> None:
    with pytest.raises(UsageError) as refused:
        segments(HOOKS, {"b": [(4, 6)], "e": [(0, 9)], "d": [(4, 4)]}, ["e", "d"], 0, 9, force=False)
    text = str(refused.value)
    assert "e comes after b, which has a hole at blocks 4 to 4" in text
    assert "add --hook b" in text and "indexer gaps --fill --hook b" in text


def test_earlier_hooks_are_found_through_others() -> None:
    assert {name: set(earlier(HOOKS, [name])) for name in NAMES} == BUILDS_ON
    assert earlier(HOOKS, ["e", "c"]) == ["a", "b", "d"]


# -- holes -----------------------------------------------------------------------------------------------------------

HOLES = {"plays": ["plays", "aggregates", "milestones"], "aggregates": ["aggregates", "milestones"]}
HOLES["milestones"] = ["milestones"]


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize("final_lag", [0, 6, 100], ids=["final", "some final", "none final"])
async def test_what_was_skipped_is_as_if_it_had_never_been(name: str, final_lag: int, enter: Enter) -> None:
    """The hook's holes and those of the hooks downstream; a failure for each; then all as in the undisturbed run."""
    bad = [6, 7, 14, 18]
    async with enter(chain_of(3, 20, final_lag, own=bad), **SMALL) as w:
        w.picky(name).bad.update(bad)
        await w.follow()
        holed = [(6, 7), (14, 14), (18, 18)]
        assert await w.gaps() == {hook: holed for hook in HOLES[name]}
        found = await ledger.open_failures(w.connection, w.row.id)
        assert [(one["hook"], one["first"], one["last"]) for one in found] == [(name, n, n) for n in bad]
        if name != "milestones":
            with pytest.raises(AssertionError, match=r"plays|aggregate_plays"):
                await w.is_right(ordered=False)
        w.picky(name).bad.clear()
        plan = await w.fill()
        assert [(one.first, one.last, list(one.fill)) for one in plan] == [
            (first, last, HOLES[name]) for first, last in holed
        ]
        await w.is_right()
        assert await w.gaps() == {}
        assert await ledger.open_failures(w.connection, w.row.id) == []
        before = await everything(w.connection)
        assert await w.fill() == []
        assert await everything(w.connection) == before
        # and the journal knows of it: what is above finality can still be undone
        depth = min(final_lag, 7)
        if depth:
            w.chain.fork(depth, [[]] * (depth - 1) + [[[]]])
            mine(w.chain, own_plays(30), some_plays(random.Random(1), 9))
            assert Outcome.REWOUND in await w.follow()
            await w.is_right()


@pytest.mark.parametrize("seed", range(4))
async def test_holes_anywhere_in_any_order(seed: int, enter: Enter) -> None:
    """Hooks fail here and there, on tracks that all blocks share, and holes are filled bit by bit; all counts are right.

    Which play was counted as the tenth depends on the order: for that `rebuild` is there.
    """
    chance = random.Random(seed)
    chain = chain_of(seed, 40, chance.choice([0, 5, 20]))
    async with enter(chain, **SMALL) as w:
        await w.connection.execute(TALLY)
        await w.connection.execute(MET)
        tally = Picky(Tally())
        w.hooks.append(tally)
        for one in (w.plays, w.aggregates, tally):
            one.bad.update(chance.sample(range(1, 41), 6))
        await w.follow()
        for one in (w.plays, w.aggregates, tally):
            one.bad.clear()
        for _ in range(5):
            first, last = sorted(chance.choices(range(41), k=2))
            targets = chance.choice([["plays"], ["tally"], ["aggregates", "milestones"], NAMES_ALL])
            with suppress(UsageError):  # aggregates without its plays
                await w.fill(*targets, first=first, last=last)
        await w.fill()
        assert await w.gaps() == {}
        await w.is_right(ordered=False)


NAMES_ALL = ["plays", "aggregates", "milestones", "tally"]


async def test_a_hook_added_late(enter: Enter) -> None:
    """Several hundred blocks, in many small spans: it starts with a hole from the first block on."""
    async with enter(chain_of(5, 400, 30), span={"max_events": 40, "max_blocks": 20}) as w:
        late = w.hooks[1:]
        del w.hooks[1:]
        await w.follow()
        w.hooks += late
        async with w.replayer() as replayer:  # before the daemon knows it, its tables are not ready
            assert (await replayer.gaps())["aggregates"] == [(0, 400)]
            with pytest.raises(UsageError, match="hook aggregates is new: start the daemon with it once"):
                await replayer.plan(0, 400, ["aggregates"])
        await w.start()
        assert await w.gaps() == {"aggregates": [(0, 400)], "milestones": [(0, 400)]}
        with pytest.raises(UsageError, match="milestones comes after aggregates, which has a hole at blocks 0 to 400"):
            await w.fill("milestones")
        await w.fill(last=399)
        assert await w.gaps() in ({}, {"aggregates": [(400, 400)], "milestones": [(400, 400)]})
        await w.fill()
        await w.is_right()
        assert w.aggregates.calls and max(len(one) for one in w.aggregates.calls) > 1  # many blocks to a span


@pytest.mark.parametrize("seed", range(2))
async def test_force_leaves_everything_as_it_is(seed: int, enter: Enter) -> None:
    """Any hooks, any range: covered, uncovered and mixed. The guards make it harmless."""
    chance = random.Random(seed)
    bad = [5, 6, 15, 22]
    async with enter(chain_of(seed, 30, 8, own=bad), **SMALL) as w:
        w.aggregates.bad.update(bad)
        await w.follow()
        w.aggregates.bad.clear()
        for _ in range(3):
            first, last = sorted(chance.choices(range(31), k=2))
            targets = chance.choice([["plays"], ["plays", "aggregates"], ["aggregates", "milestones"], NAMES_ALL[:3]])
            covered = [number for number in range(first, last + 1) if number not in bad]
            async with w.replayer() as replayer:
                try:
                    plan = await replayer.plan(first, last, targets, force=True)
                except UsageError as error:
                    assert "which has a hole" in str(error)
                    continue
                blocks = [number for one in plan for number in range(one.first, one.last + 1)]
                assert set(covered) <= set(blocks)
                async for _ in replayer.replay(plan):
                    pass
        await w.fill()
        await w.is_right()
        async with w.replayer() as replayer:
            async for _ in replayer.replay(await replayer.plan(0, 30, NAMES_ALL[:3], force=True)):
                pass
        await w.is_right()


async def test_force_brings_back_rows_that_are_gone(enter: Enter) -> None:
    """Rows that somebody deleted come back, also where a hook downstream has a hole that is filled at the same time."""
    async with enter(chain_of(1, 12, 0, own=[4, 9]), **SMALL) as w:
        w.aggregates.bad.add(4)
        await w.follow()
        w.aggregates.bad.clear()
        await w.connection.execute("delete from plays where slot = 4 and event_index < 3")
        async with w.replayer() as replayer:
            async for _ in replayer.replay(await replayer.plan(4, 4, NAMES_ALL[:3], force=True)):
                pass
        await w.is_right()


# -- failing again ---------------------------------------------------------------------------------------------------


async def test_a_block_that_fails_again_is_left_out_alone(enter: Enter) -> None:
    """The rest of the hole is filled, hooks that don't build on it are too, and the failure stays one."""
    async with enter(chain_of(2, 30, 5, own=range(4, 30, 2)), span={"max_events": 1000}) as w:
        await w.connection.execute(TALLY)
        await w.connection.execute(MET)
        w.hooks.append(tally := Picky(Tally()))
        bad = list(range(4, 24, 2))
        w.aggregates.bad.update(bad)
        tally.bad.update(bad)
        await w.follow()
        tally.bad.clear()
        w.aggregates.bad = {10, 16}
        async with w.replayer() as replayer:
            async for _ in replayer.replay(await replayer.plan(None, None, NAMES_ALL)):
                pass
            assert [(one.hook, one.first) for one in replayer.failures] == [("aggregates", 10), ("aggregates", 16)]
        assert await w.gaps() == {name: [(10, 10), (16, 16)] for name in ("aggregates", "milestones")}
        await w.tally_is_right()
        rows = await w.connection.fetch("select hook, first, resolved_at is null as open from indexer.failure")
        assert sorted((row["hook"], row["first"]) for row in rows if row["open"]) == [
            ("aggregates", 10), ("aggregates", 16)
        ]  # fmt: skip
        assert len(rows) == 2 * len(bad)
        w.aggregates.bad.clear()
        await w.fill()
        await w.is_right()


async def test_a_long_hole_with_one_bad_block_shrinks_to_it(enter: Enter) -> None:
    async with enter(chain_of(4, 200, 0), span={"max_events": 10_000}) as w:
        late = w.hooks[1:]
        del w.hooks[1:]
        await w.follow()
        w.hooks += late
        await w.start()
        bad = next(block.number for block in w.chain.blocks[100:] if block.logs)
        w.aggregates.bad.add(bad)
        await w.fill()
        assert await w.gaps() == {"aggregates": [(bad, bad)], "milestones": [(bad, bad)]}
        assert len(w.aggregates.calls) < 30  # halved, and not block by block
        w.aggregates.bad.clear()
        await w.fill()
        await w.is_right(ordered=False)


async def test_halt_ends_it_at_the_bad_block(enter: Enter) -> None:
    async with enter(chain_of(2, 30, 0, own=[6, 12, 18]), **SMALL) as w:
        w.aggregates.bad.update([6, 12, 18])
        await w.follow()
        w.aggregates.bad = {12}
        w.policy = {}
        with pytest.raises(HookFailed, match="hook aggregates failed at block 12: ValueError"):
            await w.fill()
        holed = {name: [(12, 12), (18, 18)] for name in ("aggregates", "milestones")}
        assert await w.gaps() == holed
        # not a halt of the daemon: it has passed the block long ago
        assert {one["policy"] for one in await ledger.open_failures(w.connection, w.row.id)} == {"skip"}
        w.aggregates.bad.clear()
        await w.fill()
        await w.is_right()


class Meddler:
    """Writes a table that it does not declare."""

    name, listens, tables, after = "meddler", (), ("met",), ("plays",)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        await tx.execute("update tally set total = total + 1")


async def test_a_foreign_table_is_the_hooks_failure(enter: Enter) -> None:
    async with enter(chain_of(2, 9, 0), **SMALL) as w:
        await w.connection.execute(TALLY)
        await w.connection.execute(MET)
        await w.follow()
        w.hooks.append(Meddler())
        await w.start()
        async with w.replayer() as replayer:
            async for _ in replayer.replay(await replayer.plan(0, 9, ["meddler"])):
                pass
            assert {one.hook for one in replayer.failures} == {"meddler"}
            assert "wrote the table tally, which no hook declares" in str(replayer.failures[0])
        assert await w.connection.fetchval("select total from tally") == 0
        numbers = [block.number for block in w.chain.blocks if block.logs]
        gaps = (await w.gaps())["meddler"]
        assert [n for low, high in gaps for n in range(low, high + 1)] == numbers


async def test_the_databases_trouble_is_waited_out(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is not to be had in time: tried again, and nobody's failure."""
    async with enter(chain_of(2, 10, 0, own=[4]), **SMALL) as w:
        w.plays.bad.add(4)
        await w.follow()
        w.plays.bad.clear()
        async with w.replayer() as replayer:
            await replayer.connection.execute("set lock_timeout = '50ms'")
            plan = await replayer.plan(None, None, NAMES_ALL[:3])
            blocking = w.connection.transaction()
            await blocking.start()
            await w.connection.execute("lock table hourly_play_counts")
            task = asyncio.create_task(consume(replayer, plan))
            await asyncio.sleep(0.3)
            assert not task.done()
            await blocking.rollback()
            await task
            assert replayer.failures == []
        assert len([one for one in w.plays.calls if one == [4]]) > 2
        await w.is_right()
        monkeypatch.setattr(replay, "_LONGEST_PAUSE_SECONDS", 0.0)
        w.milestones.bad.add(4)
        async with w.replayer() as replayer:
            await replayer.connection.execute("set lock_timeout = '20ms'")
            plan = await replayer.plan(4, 4, ["plays"], force=True)
            async with w.connection.transaction():
                await w.connection.execute("lock table plays")
                with pytest.raises(Temporary, match="LockNotAvailable"):
                    await consume(replayer, plan)


async def consume(replayer: Replayer, plan: Sequence[Any]) -> None:
    async for _ in replayer.replay(plan):
        pass


# -- two at once -----------------------------------------------------------------------------------------------------


async def test_only_one_replay_at_a_time(enter: Enter) -> None:
    async with enter(chain_of(2, 10, 0, own=[4]), **SMALL) as w:
        w.plays.bad.add(4)
        await w.follow()
        w.plays.bad.clear()
        async with w.replayer() as first, w.replayer() as second:
            plan = await first.plan(None, None, NAMES_ALL[:3])
            with pytest.raises(Temporary, match="another replay or rebuild works on this chain"):
                await second.plan(None, None, NAMES_ALL[:3])
            await consume(first, plan)
            with pytest.raises(Temporary, match="blocks 4 to 4 were filled by somebody else meanwhile"):
                await consume(first, plan)
        assert await w.fill() == []
        await w.is_right()


# -- the dry run -----------------------------------------------------------------------------------------------------


def rows_by_key(tables: dict[str, dict[Any, str]], others: dict[str, dict[Any, str]]) -> dict[str, tuple[int, ...]]:
    found = {}
    for table, rows in tables.items():
        after = others[table]
        changed = sum(1 for key, row in rows.items() if key in after and after[key] != row)
        numbers = (len(after.keys() - rows.keys()), changed, len(rows.keys() - after.keys()))
        if any(numbers):
            found[table] = numbers
    return found


async def keyed(connection: asyncpg.Connection) -> dict[str, dict[Any, str]]:
    keys = {
        "plays": "chain, slot, tx_hash, event_index", "aggregate_plays": "play_item_id", "met": "track",
        "aggregate_monthly_plays": "play_item_id, timestamp, country", "hourly_play_counts": "hourly_timestamp",
        "milestones": "id, name, threshold", "notification": "group_id, specifier", "tally": "id",
    }  # fmt: skip
    found = {}
    for table, key in keys.items():
        rows = await connection.fetch(
            f"select row({key})::text, (to_jsonb(indexer_row) - '{{id, updated_at}}'::text[])::text"
            f" from {table} as indexer_row"
        )
        found[table] = dict(map(tuple, rows))
    return found


class Cleaner:
    """Inserts, changes and deletes."""

    name, listens, tables, after = "cleaner", (), ("met",), ("plays",)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        for track in tx.inserted("plays")["play_item_id"]:
            await tx.execute("delete from met where track = $1", f"old {track}")
            await tx.execute("insert into met values ($1) on conflict do nothing", f"new {track}")
            await tx.execute("delete from met where track = 'never there'")


@pytest.mark.parametrize("final_lag", [0, 10], ids=["all final", "some above"])
async def test_a_dry_run_says_what_a_real_one_does(final_lag: int, enter: Enter) -> None:
    bad = [5, 6, 12, 19]
    async with enter(chain_of(7, 30, final_lag, own=[6, 12]), **SMALL) as w:
        await w.connection.execute(TALLY)
        await w.connection.execute(MET)
        await w.connection.execute("insert into met select 'old ' || n from generate_series(1, 2000) as n")
        w.hooks.append(tally := Picky(Tally()))
        w.hooks.append(Cleaner())
        for one in (w.plays, tally):
            one.bad.update(bad)
        await w.follow()
        for one in (w.plays, tally):
            one.bad.clear()
        names = [one.name for one in w.hooks]
        untouched, before = await everything(w.connection), await keyed(w.connection)
        async with w.replayer() as replayer:
            found = await replayer.rehearse(await replayer.plan(0, 20, names))
        assert await everything(w.connection) == untouched
        async with w.replayer() as replayer:
            await consume(replayer, await replayer.plan(0, 20, names))
        real = rows_by_key(before, await keyed(w.connection))
        said = {one.table: (one.inserted, one.changed, one.deleted) for one in found.tables}
        if final_lag:  # what is above is applied anew, and finds other milestones reached already
            assert {table: said[table] for table in said if table not in ORDERED} == {
                table: real[table] for table in real if table not in ORDERED
            }
        else:
            assert said == real
        assert {"plays", "aggregate_plays", "milestones", "notification", "met", "tally"} <= real.keys()
        assert real["met"][0] > 0 and real["met"][2] > 0 and real["aggregate_plays"][1] > 0
        for one in found.tables:
            assert 0 < len(one.samples) <= 3
            for old, new in one.samples:
                assert old != new and (old is None or isinstance(old, dict))
        assert (found.blocks, found.failures) == (sum(bool(w.chain.blocks[number].logs) for number in bad), [])
        assert found.events == sum(len(w.chain.blocks[number].logs) for number in bad)


async def test_a_dry_run_that_finds_a_failure(enter: Enter) -> None:
    async with enter(chain_of(7, 30, 0, own=[5, 11]), span={"max_events": 1000}) as w:
        w.aggregates.bad.update([5, 11])
        await w.follow()
        w.aggregates.bad = {11}
        untouched = await everything(w.connection)
        async with w.replayer() as replayer:
            found = await replayer.rehearse(await replayer.plan(0, 30, NAMES_ALL[:3]))
        assert found.failures == ["hook aggregates failed at block 11: ValueError: aggregates does not like block 11"]
        assert {one.table: (one.inserted, one.changed) for one in found.tables} == {
            "aggregate_plays": (1, 0), "aggregate_monthly_plays": (1, 0), "hourly_play_counts": (1, 0),
            "milestones": (1, 0),
        }  # fmt: skip
        assert await everything(w.connection) == untouched


async def test_what_can_not_be_rehearsed(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    async with enter(chain_of(7, 30, 10), **SMALL) as w:
        await w.follow()
        async with w.replayer() as replayer:
            plan = await replayer.plan(0, 30, NAMES_ALL[:3], force=True)
            with pytest.raises(UsageError, match="blocks above 20 are not final"):
                await replayer.rehearse(plan)
            monkeypatch.setattr(replay, "_REHEARSED_EVENTS", 5)
            with pytest.raises(UsageError, match="at most 5 events"):
                await replayer.rehearse(await replayer.plan(0, 20, NAMES_ALL[:3], force=True))


# -- beside a daemon -------------------------------------------------------------------------------------------------


def random_block(chance: random.Random) -> list[Any]:
    return [[played(play) for play in some_plays(chance, chance.randint(0, 4))] for _ in range(chance.randint(0, 2))]


@pytest.mark.parametrize("seed", SEEDS)
async def test_beside_a_daemon_and_through_reorganisations(
    seed: int, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New blocks on the same tracks, forks during the replay and right after it: at the end all rows are those of the
    canonical chain, also of a hook that reads before it writes."""
    chance = random.Random(seed)
    chain = chain_of(seed, 50, 12)
    rewound: list[int] = []
    rewind = Replayer._rewind

    async def noted(self: Replayer, at: Any, number: int) -> Any:
        rewound.append(at.number - number)
        return await rewind(self, at, number)

    monkeypatch.setattr(Replayer, "_rewind", noted)
    monkeypatch.setattr(replay, "_BATCH_EVENTS", chance.choice([1, 5, 10_000]))
    async with enter(chain, span={"max_events": 8, "max_blocks": 3}, chain={"poll_seconds": 0.01}) as w:
        await w.connection.execute(TALLY)
        await w.connection.execute(MET)
        w.hooks.append(tally := Picky(Tally()))
        for one in (w.plays, w.aggregates, tally):
            one.bad.update(chance.sample(range(1, 50), 6))
        await w.follow()
        for one in (w.plays, w.aggregates, tally):
            one.bad.clear()
        stop, reader = asyncio.Event(), await asyncpg.connect(w.url)

        async def live() -> None:
            """The chain goes on, and forks."""
            while not stop.is_set():
                await asyncio.sleep(chance.uniform(0, 0.04))
                if chance.random() < 0.3:
                    depth = chance.randint(1, 10)
                    chain.fork(depth, [random_block(chance) for _ in range(depth + chance.randint(0, 1))])
                else:
                    chain.mine(*random_block(chance))

        async def daemon() -> None:
            while not stop.is_set():
                with suppress(Temporary):  # its compare-and-swap tells it: it begins anew
                    await w.follow()
                await asyncio.sleep(0.005)

        tasks = [asyncio.create_task(live()), asyncio.create_task(daemon())]
        try:
            async with asyncio.timeout(40):
                while await w.gaps(reader):
                    with suppress(Temporary):
                        await w.fill()
                await asyncio.sleep(0.1)
        finally:
            stop.set()
            await asyncio.gather(*tasks)
            await reader.close()
        chain.fork(9, [random_block(chance) for _ in range(10)])
        for _ in range(3):
            chain.mine(*random_block(chance))
        await w.follow()
        assert await w.gaps() == {}
        await w.is_right(ordered=False)
        assert len(rewound) > 1 and max(rewound) > 5


async def test_above_finality_it_is_undone_and_applied_anew(enter: Enter) -> None:
    """In one transaction: no reader sees less in between, and the daemon's cursor is where it was."""
    async with enter(chain_of(8, 30, 20, own=[4, 14, 25]), **SMALL) as w:
        w.aggregates.bad.update([4, 14, 25])
        await w.follow()
        w.aggregates.bad.clear()
        at = await ledger.cursor(w.connection, w.row.id)
        least, done = 10**9, asyncio.Event()

        async def watch() -> None:
            nonlocal least
            reader = await asyncpg.connect(w.url)
            while not done.is_set():
                least = min(least, await reader.fetchval("select count(*) from plays"))
            await reader.close()

        plays = await w.connection.fetchval("select count(*) from plays")
        watching = asyncio.create_task(watch())
        await asyncio.sleep(0.05)
        await w.fill()
        done.set()
        await watching
        assert least == plays
        assert (await ledger.cursor(w.connection, w.row.id)).ref == at.ref
        await w.is_right()


class Slipping:
    """A source whose chain forks at the moment when blocks above finality were fetched."""

    def __init__(self, w: World) -> None:
        self.w, self.forked = w, False

    async def spans(self, first: int, last: int) -> AsyncIterator[Span]:
        async for span in self.w.source.spans(first, last):
            yield span
            if span.last == last and first > await self.w.final() and not self.forked:
                self.forked = True
                chance = random.Random(1)
                self.w.chain.fork(5, [random_block(chance) for _ in range(6)])
                await self.w.follow()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.w.source, name)


@pytest.mark.parametrize("at", [10, 25], ids=["below", "above"])
async def test_a_fork_between_fetching_and_applying(at: int, enter: Enter) -> None:
    async with enter(chain_of(9, 30, 12, own=[at]), **SMALL) as w:
        w.plays.bad.add(at)
        await w.follow()
        w.plays.bad.clear()
        source = Slipping(w)
        async with w.replayer(source) as replayer:  # type: ignore[arg-type]
            await consume(replayer, await replayer.plan(None, None, NAMES_ALL[:3]))
        assert source.forked
        await w.follow()
        await w.fill()
        assert await w.gaps() == {}
        await w.is_right()


async def test_a_hook_that_halts_above_finality_ends_it_unharmed(enter: Enter) -> None:
    """The daemon got past that block; the replay does not put it before it again."""
    async with enter(chain_of(9, 30, 12, own=[10, 25]), **SMALL) as w:
        w.aggregates.bad.add(10)
        await w.follow()
        w.aggregates.bad = {25}
        w.policy = {}
        before = await everything(w.connection)
        with pytest.raises(HookFailed, match="at block 25"):
            await w.fill()
        assert await everything(w.connection) == before


# -- interrupted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_lag", [0, 10])
async def test_whenever_it_is_cancelled_the_rest_can_be_done_later(final_lag: int, enter: Enter) -> None:
    async with enter(chain_of(6, 40, final_lag), **SMALL) as w:
        late = w.hooks[1:]
        del w.hooks[1:]
        await w.follow()
        w.hooks += late
        await w.start()
        chance, cancelled = random.Random(final_lag), 0
        while await w.gaps():
            task = asyncio.create_task(w.fill())
            await asyncio.sleep(chance.uniform(0, 0.05 + cancelled / 20))
            task.cancel()
            with suppress(asyncio.CancelledError, Temporary):
                await task
                continue
            cancelled += 1
        assert cancelled > 2
        await w.is_right()
