"""Replay beside a daemon, through reorganisations, beside another replay, and whenever it is interrupted."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Any

import asyncpg
import pytest
from daemon import played
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
    some_plays,
    world,
)

from indexer import journal, ledger, replay
from indexer.errors import HookFailed, Temporary
from indexer.model import Span
from indexer.replay import Replayer

Enter = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def enter(database_url: str, connection: asyncpg.Connection) -> Enter:
    """A world on the test's own database."""
    return partial(world, database_url, connection)


# more of them, to look for trouble
SEEDS = range(int(os.environ.get("REPLAY_SEEDS", "2")))
SMALL = {"span": {"max_events": 10, "max_blocks": 5}}


# -- two at once -----------------------------------------------------------------------------------------------------


async def test_only_one_replay_at_a_time(enter: Enter) -> None:
    async with enter(chain_of(2, 10, 0, own=[4]), **SMALL) as w:
        w.plays.bad.add(4)
        await w.follow()
        w.plays.bad.clear()
        async with w.replayer() as first, w.replayer() as second:
            plan = await first.plan(None, None, BUNDLED)
            with pytest.raises(Temporary, match="another replay or rebuild works on this chain"):
                await second.plan(None, None, BUNDLED)
            await consume(first, plan)
            with pytest.raises(Temporary, match="blocks 4 to 4 were filled by somebody else meanwhile"):
                await consume(first, plan)
        assert await w.fill() == []
        await w.is_right()


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
                await asyncio.sleep(chance.uniform(0.01, 0.08))
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
        await w.is_right(unordered=ORDERED)
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
    """A source whose chain forks while blocks above finality are fetched, `left` blocks before the last one."""

    def __init__(self, w: World, left: int) -> None:
        self.w, self.left, self.forked = w, left, False

    async def spans(self, first: int, last: int) -> AsyncIterator[Span]:
        async for span in self.w.source.spans(first, last):
            yield span
            if span.last == last - self.left and first > await self.w.final() and not self.forked:
                self.forked = True
                chance = random.Random(1)
                self.w.chain.fork(11, [random_block(chance) for _ in range(12)])
                await self.w.follow()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.w.source, name)


@pytest.mark.parametrize("left", [0, 3], ids=["after", "amid"])
@pytest.mark.parametrize("at", [10, 25], ids=["below", "above"])
async def test_a_fork_between_fetching_and_applying(at: int, left: int, enter: Enter) -> None:
    """What does not hang together is left to the daemon."""
    async with enter(chain_of(9, 30, 12, own=[at]), **SMALL) as w:
        w.plays.bad.add(at)
        await w.follow()
        w.plays.bad.clear()
        source = Slipping(w, left)
        async with w.replayer(source) as replayer:  # type: ignore[arg-type]
            await consume(replayer, await replayer.plan(None, None, BUNDLED))
        assert source.forked
        at_end = (await ledger.cursor(w.connection, w.row.id)).ref  # of a chain that hangs together
        window = await journal.window(w.connection, w.row.id)
        assert [ref.number for ref in window] == list(range(at_end.number, window[-1].number - 1, -1))
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
