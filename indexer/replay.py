"""Replay: blocks that are behind the cursor, through the hooks again. Fills holes; a dry run says what would change.

A replay is safe beside a running daemon:

- Its transactions hold the chain's cursor, so that they and those of the daemon take turns: a hook never runs beside
  itself, and may read a row before it writes it.
- Rows that blocks above finality have touched since are told by the journal. To undo such a block later would take
  the replay's part of the row along, and what the hooks read there is from the future. So these blocks are undone
  first, and applied anew afterwards, in the replay's own transaction: it looks as if the replayed blocks had never
  been missing. What can't be applied anew (the chain forked in that moment) is left to the daemon, whose
  compare-and-swap tells it. Blocks above finality are replayed in just this way.
- A hook that builds on an earlier one (`after`) gets what that one inserted in those blocks at the time: the earlier
  hook runs inside a savepoint that is given up, and its rows are found, not inserted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import asyncpg
import msgspec

from indexer import journal, ledger, log
from indexer.db import Connection
from indexer.errors import DatabaseUnavailable, HookFailed, Temporary, UndeclaredTable, UsageError
from indexer.ledger import ChainRow, Cursor, Pace
from indexer.model import BlockRef, BlockSource, Span
from indexer.pipeline import Applied, Pipeline, blockwise, transaction
from indexer.registry import Registered
from indexer.segments import Planner, Segment, cut, without
from indexer.transaction import Tx

T = TypeVar("T")
Piece = tuple[Span, Segment]

# A dry run is one transaction, and no RPC happens inside one: so much is fetched before it, and the daemon waits.
_REHEARSED_EVENTS = 100_000
_SAMPLES = 3
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
# How often the blocks above finality are fetched, if the daemon adds some meanwhile: then it has to apply these again.
_TRIES = 4
# So much is committed together beside blocks above finality, or what is fetched in so long: the daemon waits for it.
_BATCH_EVENTS = 10_000
_BATCH_SECONDS = 1.0


class Changed(msgspec.Struct, frozen=True):
    """What a dry run did to a table: numbers of rows, and samples as (before, after)."""

    table: str
    inserted: int
    changed: int
    deleted: int
    samples: list[tuple[Any, Any]]


class Rehearsal(msgspec.Struct, frozen=True):
    """What a dry run found. `failures`: hooks that fail again."""

    blocks: int
    events: int
    tables: list[Changed]
    failures: list[str]


class _Shared(Exception):
    """Blocks above finality have written rows: they must be fetched, to be undone and applied anew."""

    def __init__(self, final: int) -> None:
        super().__init__(final)
        self.final = final


class Replayer(Planner):
    """Replays blocks of one chain on a connection of its own, as it has planned it."""

    def __init__(
        self, connection: Connection, chain: ChainRow, hooks: Sequence[Registered], source: BlockSource, name: str
    ) -> None:
        super().__init__(connection, chain, hooks)
        self.source = source
        self.failures: list[HookFailed] = []  # blocks that were left out again
        self._pipeline = Pipeline(chain, hooks, name)
        self._rehearsing = False
        self._shared = False  # whether blocks above finality have written rows
        self._above: list[Span] = []  # blocks above finality as they were fetched last

    async def replay(self, plan: Sequence[Segment]) -> AsyncIterator[Applied]:
        """Carry out the plan, and yield what was committed.

        A block in which a hook fails again is left out (`failures`), or ends it: HookFailed where its policy is to
        halt. Raises Temporary where somebody else has filled the same hole meanwhile.
        """
        left = list(plan)
        while left:
            final = _final(await ledger.cursor(self.connection, self.chain.id))
            below = [cut(one, last=final) for one in left if one.first <= final]
            left = [cut(one, first=final + 1) for one in left if one.last > final]
            async with aclosing(self._batches(below)) as batches:
                async for batch in batches:
                    async for applied in self._narrowed(batch):
                        yield applied
            if not below:
                for applied in await self._patiently(lambda to=left[0].first - 1: self._anew(to)):  # type: ignore[misc]
                    yield applied
                return

    async def _batches(self, plan: Sequence[Segment]) -> AsyncGenerator[list[Piece], None]:
        """What to commit together: one span, or many where each transaction costs the blocks above finality again."""
        batch: list[Piece] = []
        events, since = 0, time.monotonic()
        async with aclosing(self._pieces(plan)) as pieces:
            async for piece in pieces:
                batch.append(piece)
                events += piece[0].events
                if not self._shared or events >= _BATCH_EVENTS or time.monotonic() - since > _BATCH_SECONDS:
                    yield batch
                    batch, events, since = [], 0, time.monotonic()
        if batch:
            yield batch

    async def _pieces(self, plan: Sequence[Segment]) -> AsyncGenerator[Piece, None]:
        for segment in plan:
            async with aclosing(self.source.spans(segment.first, segment.last)) as spans:  # type: ignore[type-var]
                async for span in spans:
                    yield span, segment

    async def _narrowed(self, batch: Sequence[Piece]) -> AsyncIterator[Applied]:
        """All in one transaction, or in halves where a hook fails, down to the block in which it does."""
        try:
            for applied in await self._patiently(lambda: self._commit(batch)):
                yield applied
            return
        except HookFailed as error:
            failed = error
            if failed.first > batch[-1][0].last:  # above finality: nothing was replayed, and the daemon's rows stay
                raise
        span, segment = batch[0]
        if len(batch) > 1:
            parts = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
        elif len(span.blocks) > 1:
            parts = [[(half, segment)] for half in _halves(span)]
        else:
            await self._leave_out(span, segment, failed)
            rest = without(self.hooks, segment, failed.hook)
            parts = [[(span, rest)]] if rest.fill or rest.again else []
        for part in parts:
            async for applied in self._narrowed(part):
                yield applied

    async def _leave_out(self, span: Span, segment: Segment, failed: HookFailed) -> None:
        """Keep why the hook failed; of its hole only the block itself is left."""
        self.failures.append(failed)
        rest = without(self.hooks, segment, failed.hook)
        holes = [name for name in segment.fill if name not in rest.fill]
        bad = span.blocks[0].number if span.blocks else span.first
        async with transaction(self.connection):
            await ledger.record_failure(self.connection, self.chain.id, failed, "skip")
            for first, last in ((span.first, bad - 1), (bad + 1, span.last)):
                if first <= last:
                    await ledger.cover(self.connection, self.chain.id, holes, first, last)
        log.get().warning(
            "hook failed", chain=self.chain.name, block=failed.first, hook=failed.hook, error=str(failed.__cause__)
        )
        if next(one for one in self.hooks if one.name == failed.hook).policy.on_error == "halt":
            raise failed

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Try again what the database did not take (a deadlock, a timeout), as long as the connection lives."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return await work()
            except DatabaseUnavailable as error:
                lost = self.connection.is_closed() or self._rehearsing
                if lost or pause > _LONGEST_PAUSE_SECONDS:
                    raise
                log.get().warning("database unavailable", chain=self.chain.name, error=str(error), seconds=pause)
            await asyncio.sleep(pause)
            pause *= 2

    async def _commit(self, batch: Sequence[Piece]) -> list[Applied]:
        """One transaction, once it is known what is to be applied anew above finality."""
        above: list[Span] | None = None
        for tries_left in range(_TRIES, -1, -1):
            try:
                return await self._apply(batch, above, whole=tries_left > 0)
            except _Shared as shared:
                above = await self._fetch_above(shared.final)
        raise AssertionError("what is not whole is refused only while tries are left")

    async def _apply(self, batch: Sequence[Piece], above: Sequence[Span] | None, *, whole: bool) -> list[Applied]:
        """One transaction: spans of final blocks, between the undoing and the new applying of those above finality."""
        async with transaction(self.connection):
            cursor = await ledger.hold(self.connection, self.chain.id)
            final = _final(cursor)
            self._shared = not self._rehearsing and await journal.journalled(self.connection, self.chain.id, final)
            if self._shared:
                if above is None or (whole and [one.end for one in above[-1:]] != [cursor.ref]):
                    raise _Shared(final)
                base = await self._rewind(cursor.ref, final)
            done = [await self._apply_piece(span, segment) for span, segment in batch]
            if self._shared:
                await self._reapply(base, above or (), cursor)
        return done

    async def _apply_piece(self, span: Span, segment: Segment) -> Applied:
        started, chain = time.perf_counter(), self.chain.id
        if await ledger.have_applied(self.connection, chain, segment.fill, span.first, span.last):
            raise Temporary(f"blocks {span.first} to {span.last} were filled by somebody else meanwhile: try again")
        written = await self._run(span, segment)
        await ledger.cover(self.connection, chain, segment.fill, span.first, span.last)
        hooks = [*segment.fill, *segment.again]
        await ledger.resolve_failures(self.connection, chain, hooks, span.first, span.last)
        return Applied(span, written, time.perf_counter() - started)

    async def _run(self, span: Span, segment: Segment) -> dict[tuple[str, str], int]:
        """Run the hooks of the segment on the span, inside the caller's transaction; returns the rows written.

        What is done again comes first: rows that it brings back are then among those that are recalled.
        """
        before = await journal.writes_elsewhere(self.connection, self._pipeline.tables)
        written: Counter[tuple[str, str]] = Counter()
        for names in (segment.again, segment.fill):
            tx = Tx(self.connection, self.chain.id)
            for one in self.hooks:
                if names is segment.fill and one.name in segment.recall:
                    await self._recall(one, tx, span)
                elif one.name in names:
                    await self._run_one(one, tx, span, before)
            written += tx.written
        return dict(written)

    async def _run_one(self, one: Registered, tx: Tx, span: Span, before: dict[str, int]) -> None:
        await self._pipeline.run_hook(one, tx, self.connection, span)
        await self._check(one, span, before)

    async def _check(self, one: Registered, span: Span, before: dict[str, int]) -> None:
        """Find the hook that wrote elsewhere, or broke a constraint that is only looked at by COMMIT."""
        try:
            await self._pipeline.check_declared(self.connection, before)
            await self.connection.execute("set constraints all immediate")
        except (UndeclaredTable, asyncpg.IntegrityConstraintViolationError) as error:
            numbers = [block.number for block in span.blocks] or [span.first]
            raise HookFailed(one.name, numbers[0], numbers[-1], error) from error

    async def _recall(self, one: Registered, tx: Tx, span: Span) -> None:
        """Remember what the hook inserted in these blocks at the time; whatever else it does now is given up."""
        written, skipped = tx.written.copy(), tx.skipped.copy()
        tx.recalling = True
        try:
            async with given_up(self.connection):
                await self._pipeline.run_hook(one, tx, self.connection, span)
        finally:
            tx.recalling = False
            tx.written, tx.skipped = written, skipped

    # -- blocks above finality -----------------------------------------------------------------------------------

    async def _anew(self, number: int) -> list[Applied]:
        """Undo the blocks after `number`, and apply them anew with all hooks, in one transaction."""
        above = await self._fetch_above(number)
        async with transaction(self.connection):
            cursor = await ledger.hold(self.connection, self.chain.id)
            if cursor.ref.number <= number:
                return []  # a reorganisation has taken them back: the daemon is about to apply them
            return await self._reapply(await self._rewind(cursor.ref, number), above, cursor)

    async def _fetch_above(self, number: int) -> list[Span]:
        """The blocks from `number` + 1 to the cursor; those that were fetched before and are still ours only once."""
        at = (await ledger.cursor(self.connection, self.chain.id)).ref
        ours = {at, *await journal.window(self.connection, self.chain.id)}
        spans = [one for one in self._above if one.first > number and one.end in ours]
        first = spans[-1].last + 1 if spans else number + 1
        if first <= at.number:
            async with aclosing(self.source.spans(first, at.number)) as fetched:  # type: ignore[type-var]
                spans += [span async for span in fetched]
        self._above = spans
        return spans

    async def _rewind(self, at: BlockRef, number: int) -> BlockRef:
        """Undo the blocks after `number`, inside the caller's transaction, which holds the cursor."""
        refs = [*await journal.window(self.connection, self.chain.id), BlockRef(self.chain.start_block - 1, b"")]
        to = next((ref for ref in refs if ref.number == number), None)
        if to is None:
            raise Temporary(f"block {number} is no longer in the window of blocks that can be undone: try again")
        await journal.rewind(self.connection, self.chain.id, at, to)
        return to

    async def _reapply(self, at: BlockRef, above: Sequence[Span], cursor: Cursor) -> list[Applied]:
        """Apply the blocks `above` on top of `at`, as far as they follow, inside the caller's transaction."""
        assert cursor.heads is not None
        done: list[Applied] = []
        for span in above:
            if span.last <= at.number:
                continue
            parent = span.blocks[0].parent_hash if span.blocks else None
            if span.first != at.number + 1 or parent not in (None, at.hash or parent):
                break
            async for applied in self._pipeline.apply(self.connection, at, span, Pace(cursor.heads)):
                done.append(applied)
                at = applied.span.end
        if at.number < cursor.ref.number:
            log.get().info(
                "rewound", chain=self.chain.name, block=at.number,
                why="the chain has changed above: the daemon applies it (start it, if none runs)",
            )  # fmt: skip
        return done

    # -- the dry run ---------------------------------------------------------------------------------------------

    async def rehearse(self, plan: Sequence[Segment]) -> Rehearsal:
        """What the plan would do to final blocks, table by table; everything is rolled back."""
        final = _final(await ledger.cursor(self.connection, self.chain.id))
        if any(segment.last > final for segment in plan):
            raise UsageError(f"blocks above {final} are not final and can't be rehearsed: end the range there")
        fetched, events = list[Piece](), 0
        async with aclosing(self._pieces(plan)) as pieces:
            async for piece in pieces:
                fetched.append(piece)
                events += piece[0].events
                if events > _REHEARSED_EVENTS:
                    raise UsageError(f"a dry run takes at most {_REHEARSED_EVENTS:,} events: give fewer blocks")
        self._rehearsing = True
        try:
            async with transaction(self.connection), given_up(self.connection):
                await ledger.hold(self.connection, self.chain.id)
                await journal.watch_meanwhile(self.connection, self._pipeline.tables)
                # no block has number -1, so that these entries are this transaction's own
                await journal.journal_from(self.connection, self.chain.id, -1)
                for piece in fetched:
                    async for _ in self._narrowed([piece]):
                        pass
                changes = await journal.changes(self.connection, self.chain.id, -1)
        finally:
            self._rehearsing = False
        blocks = sum(span.last - span.first + 1 for span, _ in fetched)
        tables = [changed(table, rows) for table, rows in changes.items() if rows]
        return Rehearsal(blocks, events, tables, [str(one) for one in self.failures])


def changed(table: str, rows: Sequence[tuple[str | None, str | None]]) -> Changed:
    inserted = sum(before is None for before, _ in rows)
    deleted = sum(after is None for _, after in rows)
    samples = [(_parsed(before), _parsed(after)) for before, after in rows[:_SAMPLES]]
    return Changed(table, inserted, len(rows) - inserted - deleted, deleted, samples)


def _parsed(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)


def _final(cursor: Cursor) -> int:
    """The newest block that can't be reorganised, as the daemon last saw it."""
    return cursor.heads.final if cursor.heads is not None else -1


def _halves(span: Span) -> list[Span]:
    parts = blockwise(span)
    middle = len(span.blocks) // 2
    return [_joined(parts[:middle]), _joined(parts[middle:])]


def _joined(parts: Sequence[Span]) -> Span:
    blocks = tuple(block for part in parts for block in part.blocks)
    logs = tuple(one for part in parts for one in part.quarantined)
    end = parts[-1]
    return Span(parts[0].first, end.last, blocks, end.end, end.end_timestamp, end.final, logs)


@asynccontextmanager
async def given_up(connection: Connection) -> AsyncIterator[None]:
    """A savepoint that is always rolled back, so that nothing done in it is left."""
    savepoint = connection.transaction()
    await savepoint.start()
    try:
        yield
    finally:
        await savepoint.rollback()
