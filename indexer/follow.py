"""Follow a chain: one step at a time, with the lead or standing by. `follow` is the only loop that sleeps."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager, suppress
from enum import Enum
from typing import TypeVar

from indexer import journal, ledger, log, metrics
from indexer.db import (
    HEARTBEAT_SECONDS,
    LEADER_SILENCE_SECONDS,
    Connection,
    Database,
    silent_holder,
    stand_by,
    translated,
    try_lead,
)
from indexer.errors import DatabaseUnavailable, DeepReorg, Halted, HookFailed, LostLeadership
from indexer.ledger import Cursor, Pace
from indexer.model import BlockRef, BlockSource, Heads, Span
from indexer.pipeline import Applied, Pipeline
from indexer.state import Role, State

T = TypeVar("T")

_STANDBY_SECONDS = 0.5
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0


class Outcome(Enum):
    IDLE = "idle"
    ADVANCED = "advanced"
    REWOUND = "rewound"


class Follower:
    """Brings the database one step nearer to the chain at a time. Holds the writer's connection and the cursor."""

    def __init__(
        self, connection: Connection, source: BlockSource, pipeline: Pipeline, state: State, cursor: Cursor
    ) -> None:
        self.connection, self.source, self.pipeline, self.state = connection, source, pipeline, state
        self.at = cursor.ref
        self._spans: AsyncIterator[Span] | None = None
        # up to here the journal is gone
        self._pruned = cursor.heads.final if cursor.heads else -1
        self._released = -1  # up to here no job waits for finality
        self._said_at = self._heads_at = 0.0
        self._beaten_at = time.monotonic()
        state.at(cursor.ref.number, cursor.block_time)

    async def step(self) -> Outcome:
        """One span, or nothing to do. Every error leaves database and cursor at a block's border."""
        if self._spans is None:
            heads = await self._look_up()
            if heads.newest <= self.at.number:
                return await self._compare(heads)
            if self.at.hash and self.at.number < heads.final:
                # final blocks come without their parents: what they follow on is compared here
                on_chain = await self.alive(self.source.ref(self.at.number))
                if on_chain != self.at:
                    return await self._rewind(on_chain.hash)
            self._spans = self.source.spans(self.at.number + 1, heads.newest)
        elif time.monotonic() - self._heads_at > HEARTBEAT_SECONDS:
            await self._look_up()  # a long catch-up must not count its lag from the head of its beginning
        self.state.waiting_on = "fetch"
        span = await self.alive(anext(self._spans, None))
        if span is None:
            self._spans = None
            return Outcome.ADVANCED
        if self._broken(span):
            return await self._rewind(span.blocks[0].parent_hash or b"")
        self.state.waiting_on = "write"
        with translated():
            async with aclosing(self.pipeline.apply(self.connection, self.at, span, self.pace)) as parts:
                async for applied in parts:
                    self.at = applied.span.end
                    self._pruned = max(self._pruned, self.state.heads.final)
                    self.state.committed(applied.span)
                    self.source.took(applied.seconds)
                    self._say(applied)
        return Outcome.ADVANCED

    async def _look_up(self) -> Heads:
        heads = await self.alive(self.source.heads())
        self.state.saw(heads)
        self._heads_at = time.monotonic()
        return heads

    def _say(self, applied: Applied) -> None:
        """One line a block at the head; catching up, at most one a second."""
        now, span = time.monotonic(), applied.span
        if self.state.lag_blocks and now - self._said_at < 1.0:
            return
        self._said_at = now
        log.get().info(
            "span committed", chain=self.state.chain, first=span.first, last=span.last, events=span.events,
            rows=sum(applied.written.values()), seconds=round(applied.seconds, 4), lag_blocks=self.state.lag_blocks,
        )  # fmt: skip

    def _broken(self, span: Span) -> bool:
        """Whether the new block hangs on another one than ours."""
        if not self.at.hash or not span.blocks or span.blocks[0].number != self.at.number + 1:
            return False
        parent = span.blocks[0].parent_hash
        return parent is not None and parent != self.at.hash

    async def _compare(self, heads: Heads) -> Outcome:
        """A head that is no higher than ours: the same chain (or a node that lags), or a rival one."""
        if not heads.hash or not self.at.hash or heads.newest < heads.final:
            return Outcome.IDLE
        with translated():
            stored = {ref.number: ref.hash for ref in await journal.window(self.connection, self.pipeline.chain.id)}
        if heads.newest == self.at.number:
            stored[self.at.number] = self.at.hash
        ours = stored.get(heads.newest)
        # a head below all that we have stored is a node that syncs, and nothing is undone for it
        if ours is None:
            return Outcome.IDLE
        if ours == heads.hash:
            if heads.final > self._released and heads.newest == self.at.number:
                await self.pipeline.release(self.connection, self.at, self.pace)
                self._released = heads.final
            return Outcome.IDLE
        return await self._rewind(heads.hash)

    async def _rewind(self, theirs: bytes) -> Outcome:
        """Undo back to the newest of our blocks that is on the chain still. `theirs`: the hash that replaced ours."""
        started = time.monotonic()
        await self.close()
        ancestor = await self._ancestor(theirs)
        if ancestor is None:
            return Outcome.IDLE
        depth = self.at.number - ancestor.number
        rows = await self.pipeline.undo(self.connection, self.at, ancestor)
        log.get().warning(
            "reorg undone", chain=self.state.chain, first=ancestor.number + 1, last=self.at.number, depth=depth,
            rows=rows, old_hash="0x" + self.at.hash.hex(), new_hash="0x" + theirs.hex(),
            seconds=round(time.monotonic() - started, 4),
        )  # fmt: skip
        self.state.undone(ancestor.number + 1, self.at.number)
        self.at = ancestor
        return Outcome.REWOUND

    async def _ancestor(self, theirs: bytes) -> BlockRef | None:
        """The newest stored block that the chain still has; None where all of ours is still there (a node wavered).

        Looks at a few more blocks at a time, so that a shallow fork costs one round of questions. Raises DeepReorg
        where the whole window, down to the final block, is another one on the chain. Where it reaches down to the start
        block, everything may go.
        """
        with translated():
            window = await journal.window(self.connection, self.pipeline.chain.id)
        if not window or window[0] != self.at:
            window.insert(0, self.at)
        position, size = 0, 8
        while position < len(window):
            some = window[position : position + size]
            # a number that the chain does not have (any more, or yet) is not asked for: it is not an ancestor
            newest = (await self._look_up()).newest
            asked = [ref for ref in some if ref.number <= newest]
            found = await self.alive(asyncio.gather(*(self.source.ref(ref.number) for ref in asked)))
            for ours, on_chain in zip(asked, found, strict=True):
                if ours == on_chain:
                    return None if ours == self.at else ours
            position, size = position + size, size * 2
        oldest, start = window[-1], self.pipeline.chain.start_block
        if newest < oldest.number:
            return None  # a node that syncs
        if oldest.number == start and self._pruned < start:
            return BlockRef(start - 1, b"")
        raise DeepReorg(
            f"the chain was reorganised below its final block: block {oldest.number} is 0x{oldest.hash.hex()} here, "
            f"but the chain goes by 0x{theirs.hex()}; check the node, or rebuild this database from an earlier block"
        )

    @property
    def pace(self) -> Pace:
        return Pace(self.state.heads, *self.state.rates)

    async def alive(self, work: Awaitable[T]) -> T:
        """Wait for the world, telling the database every few seconds that we are still here."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                due = self._beaten_at + HEARTBEAT_SECONDS
                done, _ = await asyncio.wait({task}, timeout=max(0.0, due - time.monotonic()))
                if time.monotonic() >= due:  # also between many short waits, as those for a new head are
                    await self.beat()
                if done:
                    return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})  # awaited itself, it would hide a cancellation of our own
                if not task.cancelled():
                    task.exception()  # taken note of: how a thing ends that nobody waits for any more is no news

    async def beat(self) -> None:
        """Tell the database that we live; raises LostLeadership where the cursor was moved meanwhile."""
        self._beaten_at = time.monotonic()
        with translated():
            await ledger.heartbeat(self.connection, self.pipeline.chain.id, self.at, self.pace, self.pipeline.leader)

    async def close(self) -> None:
        """Stop fetching ahead."""
        spans, self._spans = self._spans, None
        if spans is not None:
            await spans.aclose()  # type: ignore[attr-defined]


async def follow(database: Database, source: BlockSource, pipeline: Pipeline, state: State) -> None:
    """Follow for ever: lead where nobody else does, stand by otherwise, and try again what the database did not take.

    Ends only by cancellation or by an error that is not the database's: Halted (already logged), WrongNetwork, a bug.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        before = state.spans
        try:
            async with _leading(database, pipeline, state) as connection:
                await _lead(connection, source, pipeline, state)
        except HookFailed as failed:
            await _record_halt(database, pipeline, state, failed)
            raise
        except Halted as halted:
            state.became(Role.HALTED, str(halted))
            log.get().error("halted", chain=state.chain, block=state.cursor + 1, error=str(halted))
            raise
        except LostLeadership as error:
            state.became(Role.STARTING, str(error))
            log.get().warning("leadership lost", chain=state.chain, reason=str(error))
        except DatabaseUnavailable as error:
            state.became(Role.STARTING, f"database: {error}")
            log.get().warning("database unavailable", chain=state.chain, error=str(error), seconds=round(pause, 2))
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError  # a connection that was lost as well has hidden it behind an error of its own
        pause = _FIRST_PAUSE_SECONDS if state.spans > before else min(pause * 2, _LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(pause)


async def _lead(connection: Connection, source: BlockSource, pipeline: Pipeline, state: State) -> None:
    with translated():
        cursor = await ledger.cursor(connection, pipeline.chain.id)
    follower = Follower(connection, source, pipeline, state, cursor)
    state.became(Role.LEADER)
    log.get().info("leader acquired", chain=state.chain, block=cursor.ref.number, leader=pipeline.leader)
    try:
        while True:
            if await follower.step() is Outcome.IDLE:
                await follower.alive(source.wait(HEARTBEAT_SECONDS))
    finally:
        await follower.close()


@asynccontextmanager
async def _leading(database: Database, pipeline: Pipeline, state: State) -> AsyncIterator[Connection]:
    """The writer's connection, once it holds the chain's lock; until then we stand by."""
    connection = await database.writer()
    silence = ("", 0.0)
    try:
        while not await try_lead(connection, pipeline.chain.id):
            if state.role is not Role.STANDBY:
                await stand_by(connection, pipeline.chain.id)
                state.became(Role.STANDBY, "another process leads this chain")
                log.get().info("standing by", chain=state.chain)
            await _watch_leader(connection, pipeline, state)
            silence = await _end_silent(connection, pipeline, silence)
            await asyncio.sleep(_STANDBY_SECONDS)
        if state.role is Role.STANDBY:
            await stand_by(connection, pipeline.chain.id, over=True)
        yield connection
    finally:
        # a lock dies with its connection; one that does not close in time is dropped
        try:
            with suppress(Exception):
                async with asyncio.timeout(1.0):
                    await connection.close()
        finally:
            connection.terminate()


async def _watch_leader(connection: Connection, pipeline: Pipeline, state: State) -> None:
    """Show on a standby's probes and page how far the leader is."""
    with translated():
        cursor = await ledger.cursor(connection, pipeline.chain.id)
    state.at(cursor.ref.number, cursor.block_time)
    if cursor.heads is not None:
        state.saw(cursor.heads)


async def _end_silent(connection: Connection, pipeline: Pipeline, silence: tuple[str, float]) -> tuple[str, float]:
    """End the session of a leader that says nothing; `silence` is its last mark, and since when it is the same.

    The server's own timeouts end an idle session, but not one that fell silent in the middle of a message or a COPY.
    """
    now = time.monotonic()
    with translated():
        holder = await silent_holder(connection, pipeline.chain.id)
        if holder is None or holder[1] != silence[0]:
            return (holder[1] if holder else "", now)
        if now - silence[1] > LEADER_SILENCE_SECONDS:
            log.get().warning("silent leader ended", chain=pipeline.chain.name, seconds=round(now - silence[1], 1))
            await connection.execute("select pg_terminate_backend($1)", holder[0])
    return silence


async def _record_halt(database: Database, pipeline: Pipeline, state: State, failed: HookFailed) -> None:
    """Keep the reason in the database, where `status` and the next start find it."""
    state.became(Role.HALTED, str(failed))
    metrics.halted.labels(state.chain, failed.hook).set(1)
    metrics.hook_failures_total.labels(failed.hook, "halt").inc()
    log.get().error("halted", chain=state.chain, block=failed.first, hook=failed.hook, error=str(failed.__cause__))
    try:
        async with database.acquire() as connection:
            await ledger.record_failure(connection, pipeline.chain.id, failed, "halt")
    except DatabaseUnavailable as error:
        log.get().error("halt not recorded", chain=state.chain, error=str(error))


def leader_name() -> str:
    """How this process is named in the database: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"
