"""Replay: what was skipped, or never applied, is filled exactly once; what fails again is left out alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial

import asyncpg
import pytest
from replaykit import (
    BUNDLED,
    MET,
    ORDERED,
    TALLY,
    Picky,
    Tally,
    World,
    chain_of,
    consume,
    everything,
    mine,
    own_plays,
    some_plays,
    world,
)

from indexer import ledger, rebuild, replay
from indexer.errors import HookFailed, Temporary, UsageError
from indexer.follow import Outcome
from indexer.model import Block
from indexer.transaction import Tx

Enter = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def enter(database_url: str, connection: asyncpg.Connection) -> Enter:
    """A world on the test's own database."""
    return partial(world, database_url, connection)


SMALL = {"span": {"max_events": 10, "max_blocks": 5}}


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
        assert await w.gaps() == dict.fromkeys(HOLES[name], holed)
        found = await ledger.open_failures(w.connection, w.row.id)
        assert [(one["hook"], one["first"], one["last"]) for one in found] == [(name, n, n) for n in bad]
        if name != "milestones":
            with pytest.raises(AssertionError, match=r"plays|aggregate_plays"):
                await w.is_right(unordered=ORDERED)
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


@pytest.mark.parametrize("seed", range(3))
async def test_holes_anywhere_in_any_order(seed: int, enter: Enter) -> None:
    """Hooks fail here and there, on tracks that all blocks share, and holes are filled bit by bit: all is counted once.

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
            targets = chance.choice([["plays"], ["tally"], ["aggregates", "milestones"], [*BUNDLED, "tally"]])
            with suppress(UsageError):  # aggregates without its plays
                await w.fill(*targets, first=first, last=last)
        await w.fill()
        assert await w.gaps() == {}
        await rebuild.rebuild(w.connection, w.registered, "milestones")
        await w.follow()
        await w.is_right(unordered=["notification"])


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
            targets = chance.choice([["plays"], ["plays", "aggregates"], ["aggregates", "milestones"], BUNDLED])
            covered = [number for number in range(first, last + 1) if number not in bad]
            async with w.replayer() as replayer:
                try:
                    plan = await replayer.plan(first, last, targets, force=True)
                except UsageError:  # milestones without its aggregates
                    continue
                blocks = [number for one in plan for number in range(one.first, one.last + 1)]
                assert set(covered) <= set(blocks)
                async for _ in replayer.replay(plan):
                    pass
        await w.fill()
        await w.is_right()
        async with w.replayer() as replayer:
            async for _ in replayer.replay(await replayer.plan(0, 30, BUNDLED, force=True)):
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
            async for _ in replayer.replay(await replayer.plan(4, 4, BUNDLED, force=True)):
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
            async for _ in replayer.replay(await replayer.plan(None, None, [*BUNDLED, "tally"])):
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
        await w.is_right(unordered=ORDERED)


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
            plan = await replayer.plan(None, None, BUNDLED)
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
