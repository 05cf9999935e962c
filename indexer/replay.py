"""Replay: blocks that are behind the cursor, through the hooks again. Fills holes; a dry run says what would change.

A replay is safe beside a running daemon:

- It works below the final block only. Blocks above it are the daemon's: there a replay undoes them, in one
  transaction, and the daemon (its compare-and-swap tells it) applies them anew.
- Rows that it shares with blocks above finality are told by the journal. Undoing such a block would take the replay's
  part of the row along, so these blocks are undone first, in the replay's own transaction.
- A hook that builds on an earlier one (`after`) gets what that one inserted in those blocks at the time: the earlier
  hook runs inside a savepoint that is given up, and its rows are found, not inserted.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import msgspec

from indexer import ledger, log
from indexer.db import Connection
from indexer.errors import HookFailed, LostLeadership, Temporary, UsageError
from indexer.ledger import ChainRow, Ranges
from indexer.model import BlockSource, Span
from indexer.pipeline import Applied, Pipeline, blockwise, transaction
from indexer.registry import Registered
from indexer.transaction import Tx

# A dry run is one transaction, and no RPC happens inside one: so much is fetched before it.
_REHEARSED_EVENTS = 200_000
_SAMPLES = 3


class Segment(msgspec.Struct, frozen=True):
    """Blocks in which the same hooks have something to do.

    `fill`: hooks that have not applied them. `recall`: hooks that have, and on which those build. `again`: hooks that
    have applied them and are to do so once more.
    """

    first: int
    last: int
    fill: tuple[str, ...]
    recall: tuple[str, ...]
    again: tuple[str, ...]


class Rehearsal(msgspec.Struct, frozen=True):
    """What a dry run found in a table: numbers of rows, and samples as (before, after) in JSON."""

    table: str
    inserted: int
    changed: int
    deleted: int
    samples: list[tuple[Any, Any]]


class _Entangled(Exception):
    """A block above finality has touched a row of ours since."""


def segments(
    hooks: Sequence[Registered], gaps: dict[str, Ranges], targets: Sequence[str], first: int, last: int, *, force: bool
) -> list[Segment]:
    """Cut the blocks `first` to `last` where what is to be done changes; parts with nothing to do are left out.

    Raises UsageError where a target builds on a hook that has a hole there and is no target itself.
    """
    names = [one.name for one in hooks]
    edges = {first, last + 1}
    for ranges in gaps.values():
        edges.update(edge for low, high in ranges for edge in (low, high + 1) if first < edge <= last)
    cuts = sorted(edges)
    found: list[Segment] = []
    for low, end in pairwise(cuts):
        missing = {name for name in names if any(a <= low <= b for a, b in gaps.get(name, []))}
        fill = [name for name in names if name in missing and name in targets]
        again = [name for name in names if name in targets and name not in missing] if force else []
        earlier = _earlier(hooks, fill)
        for name in earlier:
            if name in missing and name not in fill:
                raise UsageError(
                    f"{fill[-1]} comes after {name}, which has a hole at blocks {low} to {end - 1}: "
                    f"add --hook {name}, or fill it first"
                )
        if fill or again:
            recall = tuple(name for name in earlier if name not in fill)
            found.append(Segment(low, end - 1, tuple(fill), recall, tuple(again)))
    return found


def _earlier(hooks: Sequence[Registered], of: Sequence[str]) -> list[str]:
    """All hooks on which those in `of` build, directly or not, in order."""
    after = {one.name: set(one.hook.after) for one in hooks}
    wanted: set[str] = set()
    ahead = set().union(*(after[name] for name in of)) if of else set()
    while ahead - wanted:
        wanted |= ahead
        ahead = set().union(*(after[name] for name in wanted))
    return [one.name for one in hooks if one.name in wanted]


class Replayer:
    """Replays blocks of one chain on a connection of its own."""

    def __init__(
        self, connection: Connection, chain: ChainRow, hooks: Sequence[Registered], source: BlockSource, name: str
    ) -> None:
        self.connection, self.chain, self.hooks, self.source = connection, chain, tuple(hooks), source
        self._pipeline = Pipeline(chain, hooks, name)
        self._by_name = {one.name: one for one in self.hooks}

    async def plan(self, first: int, last: int, targets: Sequence[str], *, force: bool) -> list[Segment]:
        """What there is to do between `first` and `last` (at most up to the cursor); see `segments`."""
        for name in targets:
            if name not in self._by_name:
                raise UsageError(f"no enabled hook is called {name} (enabled: {', '.join(self._by_name)})")
        if first > last:
            raise UsageError(f"the blocks {first} to {last} run backwards: the first number is the lower one")
        cursor = await ledger.cursor(self.connection, self.chain.id)
        if first < self.chain.start_block or first > cursor.ref.number:
            raise UsageError(
                f"block {first} is not behind the cursor: "
                f"this chain is applied from block {self.chain.start_block} to {cursor.ref.number}"
            )
        gaps = await ledger.gaps(self.connection, self.chain.id)
        return segments(self.hooks, gaps, targets, first, min(last, cursor.ref.number), force=force)

    async def replay(self, plan: Sequence[Segment]) -> AsyncIterator[Applied]:
        """Carry out the plan, and yield what was committed; ends with the blocks above finality, if it has such.

        Raises HookFailed at the first block in which a hook whose policy is to halt fails again, Temporary where
        another replay runs on this chain.
        """
        if not await ledger.lock_replays(self.connection, self.chain.id):
            raise Temporary("another replay runs on this chain: wait for it")
        final = await self._final()
        for segment in plan:
            last = min(segment.last, final)
            if segment.first <= last:
                async with aclosing(self.source.spans(segment.first, last)) as spans:  # type: ignore[type-var]
                    async for span in spans:
                        async for applied in self._narrowed(span, segment):
                            yield applied
        above = [max(segment.first, final + 1) for segment in plan if segment.last > final]
        if above:
            await self._rewind(min(above) - 1)

    async def _final(self) -> int:
        heads = (await ledger.cursor(self.connection, self.chain.id)).heads
        return heads.final if heads is not None else -1

    async def _narrowed(self, span: Span, segment: Segment) -> AsyncIterator[Applied]:
        """The span in one transaction, or block by block where a hook fails; a block that fails is recorded."""
        try:
            yield await self._commit(span, segment)
            return
        except HookFailed:
            parts = blockwise(span)
        for part in parts:
            try:
                yield await self._commit(part, segment)
            except HookFailed as failed:
                policy = self._by_name[failed.hook].policy.on_error
                await ledger.record_failure(self.connection, self.chain.id, failed, "skip")
                if policy == "halt":
                    raise
                log.get().warning("hook failed", chain=self.chain.name, block=failed.first, hook=failed.hook)

    async def _commit(self, span: Span, segment: Segment) -> Applied:
        try:
            return await self._apply(span, segment, rewind=False)
        except _Entangled:
            return await self._apply(span, segment, rewind=True)

    async def _apply(self, span: Span, segment: Segment, *, rewind: bool) -> Applied:
        """Apply a span of final blocks. The journal's entries under the final block tell which rows we touch."""
        started, chain = time.perf_counter(), self.chain.id
        async with transaction(self.connection):
            final = await self._final()
            if rewind:
                await self._rewind_here(final)
            await ledger.journal_from(self.connection, chain, final)
            txs = await self._run(span, segment)
            if await ledger.entangled(self.connection, chain, final):
                raise _Entangled
            await ledger.forget_journal(self.connection, chain, final)
            hooks = [*segment.fill, *segment.again]
            await ledger.cover(self.connection, chain, segment.fill, span.first, span.last)
            await ledger.resolve_failures(self.connection, chain, hooks, span.first, span.last)
        for tx in txs:
            self._pipeline.publish_rows(tx)
        written = {key: count for tx in txs for key, count in tx.written.items()}
        return Applied(span, written, time.perf_counter() - started)

    async def _run(self, span: Span, segment: Segment) -> list[Tx]:
        """Run the hooks of the segment on the span, inside the caller's transaction."""
        connection = self.connection
        before = await ledger.writes_elsewhere(connection, self._pipeline.tables)
        fill, again = Tx(connection, self.chain.id), Tx(connection, self.chain.id)
        for one in self.hooks:
            if one.name in segment.recall:
                await self._recall(one, fill, span)
            elif one.name in segment.fill:
                await self._pipeline.run_hook(one, fill, connection, span)
        for one in self.hooks:
            if one.name in segment.again:
                await self._pipeline.run_hook(one, again, connection, span)
        await self._pipeline.check_declared(connection, before)
        return [fill, again]

    async def _recall(self, one: Registered, tx: Tx, span: Span) -> None:
        """Remember what the hook inserted in these blocks at the time; whatever else it does now is given up."""
        savepoint = self.connection.transaction()
        await savepoint.start()
        tx.recalling = True
        written, skipped = tx.written.copy(), tx.skipped.copy()
        try:
            await self._pipeline.run_hook(one, tx, self.connection, span)
        finally:
            tx.recalling = False
            tx.written, tx.skipped = written, skipped
            await savepoint.rollback()

    async def _rewind(self, number: int) -> None:
        """Give the blocks after `number` back to the daemon, which applies them anew."""
        async with transaction(self.connection):
            await self._rewind_here(number)
        log.get().info(
            "rewound", chain=self.chain.name, block=number,
            why="the blocks above are not final: the daemon applies them anew (start it, if none runs)",
        )  # fmt: skip

    async def _rewind_here(self, number: int) -> None:
        at = (await ledger.cursor(self.connection, self.chain.id)).ref
        if at.number <= number:
            return
        to = next((ref for ref in await ledger.window(self.connection, self.chain.id) if ref.number == number), None)
        if to is None:
            raise Temporary(f"block {number} is no longer in the stored window: try again")
        try:
            await ledger.rewind(self.connection, self.chain.id, at, to)
        except LostLeadership:
            raise Temporary("the daemon moved on in the same moment: try again") from None

    async def rehearse(self, plan: Sequence[Segment]) -> list[Rehearsal]:
        """What the plan would do, table by table; everything is rolled back. Final blocks only."""
        final = await self._final()
        if any(segment.last > final for segment in plan):
            raise UsageError(f"blocks above {final} are not final and can't be rehearsed: end the range there")
        fetched: list[tuple[Segment, Span]] = []
        events = 0
        for segment in plan:
            async for span in self.source.spans(segment.first, segment.last):
                events += span.events
                if events > _REHEARSED_EVENTS:
                    raise UsageError(f"a dry run holds at most {_REHEARSED_EVENTS:,} events: take fewer blocks")
                fetched.append((segment, span))
        trial = self.connection.transaction()
        await trial.start()
        try:
            # No block has number -1, so these entries are this transaction's own.
            await ledger.journal_from(self.connection, self.chain.id, -1)
            for segment, span in fetched:
                await self._run(span, segment)
            changes = await ledger.changes(self.connection, self.chain.id, -1)
        finally:
            await trial.rollback()
        return [_rehearsal(table, rows) for table, rows in changes.items() if rows]


def _rehearsal(table: str, rows: Sequence[tuple[str | None, str | None]]) -> Rehearsal:
    parsed = [tuple(None if text is None else msgspec.json.decode(text) for text in row) for row in rows]
    inserted = sum(before is None for before, _ in rows)
    deleted = sum(after is None for _, after in rows)
    samples = [(before, after) for before, after in parsed[:_SAMPLES]]
    return Rehearsal(table, inserted, len(rows) - inserted - deleted, deleted, samples)
