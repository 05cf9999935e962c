"""Apply a span: cursor, hooks, coverage in one transaction. The heart; replay and following both beat here."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import asyncpg
import msgspec

from indexer import journal, ledger, metrics, queue
from indexer.db import Connection, translated
from indexer.errors import DatabaseUnavailable, HookFailed, UndeclaredTable
from indexer.ledger import Pace
from indexer.model import Block, BlockRef, Hook, Span
from indexer.registry import Registered
from indexer.transaction import Tx


class Applied(msgspec.Struct, frozen=True):
    """What one transaction committed: the span, the rows by (table, op), and its seconds in hooks and in all."""

    span: Span
    written: dict[tuple[str, str], int]
    seconds: float


class Pipeline:
    """Applies spans of one chain with its hooks."""

    def __init__(self, chain: ledger.ChainRow, hooks: Sequence[Registered], leader: str) -> None:
        self.chain, self.hooks, self.leader = chain, tuple(hooks), leader
        self.halted_at: int | None = None  # the block at which an earlier run halted, until it is passed
        self.tables = sorted({table for one in self.hooks for table in one.hook.tables})
        self._look_at_each = False  # after each hook, which one writes where it should not

    async def apply(
        self, connection: Connection, at: BlockRef, span: Span, pace: Pace
    ) -> AsyncGenerator[Applied, None]:
        """Apply `span` from the cursor `at`, and yield what was committed.

        A span that fails in a hook is tried again block by block, so that everything before the bad block is
        committed and the bad one is named: HookFailed. Raises LostLeadership where the cursor was moved by another
        process, DatabaseUnavailable for the database's own troubles (nothing of the transaction is left then).
        """
        try:
            yield await self._commit(connection, at, span, pace)
            return
        except HookFailed:
            if len(span.blocks) <= 1:
                raise
        except (UndeclaredTable, asyncpg.IntegrityConstraintViolationError):
            # the one that wrote elsewhere, or broke a constraint that is only looked at by COMMIT, is still to be found
            self._look_at_each = True
        for part in blockwise(span):
            yield await self._commit(connection, at, part, pace)
            at = part.end

    async def _commit(self, connection: Connection, at: BlockRef, span: Span, pace: Pace) -> Applied:
        """One transaction: nothing of it is visible before all of it is."""
        started = time.perf_counter()
        tx = Tx(connection, self.chain.id, waits_at=None if span.final else span.last)
        failures: list[HookFailed] = []
        async with transaction(connection):
            await ledger.advance(connection, self.chain.id, at, span, pace, self.leader)
            if not span.final:
                await journal.journal_from(connection, self.chain.id, span.last)
            before = await journal.writes_elsewhere(connection, self.tables)
            covered = await self._run_hooks(tx, connection, span, failures, before)
            await self.check_declared(connection, before)
            await ledger.cover(connection, self.chain.id, covered, span.first, span.last)
            if failures:
                await self._cover_around(connection, span, covered)
            if span.last >= pace.heads.final:  # the final block itself is kept as well: a fork may begin there
                await journal.remember(connection, self.chain.id, span, pace.heads.final)
            await queue.release(connection, self.chain.id, min(pace.heads.final, span.last))
            if span.quarantined:
                await ledger.quarantine(connection, self.chain.id, span.quarantined)
            if self.halted_at is not None and span.last >= self.halted_at:
                await ledger.resolve_failures(connection, self.chain.id, covered, self.halted_at, span.last)
            for failed in failures:
                await ledger.record_failure(connection, self.chain.id, failed, "skip")
            applied = time.perf_counter()
        done = time.perf_counter()
        metrics.span_seconds.labels("apply").observe(applied - started)
        metrics.span_seconds.labels("commit").observe(done - applied)
        self.publish(tx, span, failures)
        if self.halted_at is not None and span.last >= self.halted_at:
            self.halted_at = None
            metrics.halted.clear()
        return Applied(span, dict(tx.written), done - started)

    async def undo(self, connection: Connection, at: BlockRef, to: BlockRef) -> int:
        """Undo the blocks after `to`, in one transaction with the cursor; returns the rows brought back."""
        async with transaction(connection):
            rows = await journal.rewind(connection, self.chain.id, at, to)
        name = self.chain.name
        metrics.reorgs_total.labels(name).inc()
        metrics.reorg_depth.labels(name).observe(at.number - to.number)
        return rows

    async def release(self, connection: Connection, at: BlockRef, pace: Pace) -> None:
        """Queue the jobs that have waited for finality, while there is no block to commit that would do it.

        For a caller who knows that the cursor's block is on the chain: of blocks that a fork has replaced, jobs must
        not get out.
        """
        async with transaction(connection):
            await ledger.heartbeat(connection, self.chain.id, at, pace, self.leader)
            await queue.release(connection, self.chain.id, min(pace.heads.final, at.number))

    async def _run_hooks(
        self, tx: Tx, connection: Connection, span: Span, failures: list[HookFailed], before: Mapping[str, int]
    ) -> list[str]:
        """Run the hooks in order; returns the names of those that have now applied the span."""
        covered: list[str] = []
        holes: set[str] = set()
        for one in self.hooks:
            if holes.intersection(one.after):
                holes.add(one.name)  # what it builds on is missing here, so its part is a hole as well
                continue
            try:
                await self.run_hook(one, tx, connection, span)
                if self._look_at_each:
                    await self.check_declared(connection, before)
                    await connection.execute("set constraints all immediate")
            except (UndeclaredTable, asyncpg.IntegrityConstraintViolationError) as error:
                raise HookFailed(one.name, span.first, span.last, error) from error
            except HookFailed as failed:
                if one.policy.on_error == "halt" or len(span.blocks) > 1:
                    raise
                failures.append(failed)
                holes.add(one.name)
            else:
                covered.append(one.name)
        return covered

    async def check_declared(self, connection: Connection, before: Mapping[str, int]) -> None:
        """Only rows of declared tables are journalled, so a write elsewhere is an error at once, not at the first fork.

        Postgres' own counts of this transaction show it: whatever the way, by a trigger or a function too.
        """
        after = await journal.writes_elsewhere(connection, self.tables)
        wrong = [table for table, rows in after.items() if rows > before.get(table, 0)]
        if wrong:
            raise UndeclaredTable(f"it wrote the table {wrong[0]}, which no hook declares: add it to the hook's tables")

    async def _cover_around(self, connection: Connection, span: Span, covered: Sequence[str]) -> None:
        """A hook that was skipped at the span's one block misses nothing in the empty blocks before and after it."""
        holes = [one.name for one in self.hooks if one.name not in covered]
        bad = span.blocks[0].number
        for first, last in ((span.first, bad - 1), (bad + 1, span.last)):
            if first <= last:
                await ledger.cover(connection, self.chain.id, holes, first, last)

    async def run_hook(self, one: Registered, tx: Tx, connection: Connection, span: Span) -> None:
        """Run one hook on the blocks that it listens to; raises HookFailed once its policy's retries are used up."""
        # a hook that listens to no event in particular works on what earlier hooks inserted: it gets every block
        names = {spec.name for spec in one.hook.listens}
        blocks = heard(span.blocks, names) if names else span.blocks
        if not blocks:
            return
        started = time.perf_counter()
        for tries_left in range(one.policy.retries, -1, -1):
            mark, tx.hook = tx.mark(), one.name
            skipped, written = tx.skipped.copy(), tx.written.copy()
            try:
                if one.policy.on_error == "halt" and one.policy.retries == 0:
                    await _run(one.hook, tx, blocks)  # its failure undoes the whole transaction: no savepoint needed
                else:
                    async with connection.transaction():
                        await _run(one.hook, tx, blocks)
            except DatabaseUnavailable:
                raise
            except Exception as error:
                tx.back_to(mark)
                tx.skipped, tx.written = skipped, written
                if tries_left == 0:
                    first, last = blocks[0].number, blocks[-1].number
                    raise HookFailed(one.name, first, last, error) from error
            else:
                break
        metrics.hook_seconds.labels(one.name).observe(time.perf_counter() - started)

    def publish_rows(self, tx: Tx) -> None:
        """Metrics of the rows that a committed transaction wrote and passed over."""
        for (table, op), count in tx.written.items():
            metrics.rows_total.labels(table, op).inc(count)
        for (hook, reason), count in tx.skipped.items():
            metrics.skipped_total.labels(hook, reason).inc(count)

    def publish(self, tx: Tx, span: Span, failures: Sequence[HookFailed]) -> None:
        """Metrics of what is committed now, and of nothing else."""
        name = self.chain.name
        metrics.blocks_total.labels(name).inc(span.last - span.first + 1)
        metrics.events_total.labels(name).inc(span.events)
        metrics.spans_total.labels(name).inc()
        self.publish_rows(tx)
        for log in span.quarantined:
            metrics.quarantined_total.labels("source", log.error.split(":")[0][:40]).inc()
        for failed in failures:
            metrics.hook_failures_total.labels(failed.hook, "skip").inc()


async def prepare(connection: Connection, hook: Hook) -> None:
    """Let the hook look at its database and make it ready, where it has something to look at."""
    look = getattr(hook, "prepare", None)
    if look is not None:
        with translated():
            await look(connection)


async def _run(one: Hook, tx: Tx, blocks: Sequence[Block]) -> None:
    """Run the hook, and take neither its silence nor its own words for what Postgres said.

    A hook that catches an error of Postgres, and passes over it or raises another, leaves the transaction broken.
    """
    tx.trouble = None
    try:
        await one.apply(tx, blocks)
    except DatabaseUnavailable:
        raise
    except Exception as error:
        if isinstance(tx.trouble, DatabaseUnavailable):
            raise DatabaseUnavailable(str(tx.trouble)) from error
        raise
    if tx.trouble is not None:
        raise tx.trouble


@asynccontextmanager
async def transaction(connection: Connection) -> AsyncIterator[None]:
    """A transaction whose troubles with the database are DatabaseUnavailable."""
    with translated():
        async with connection.transaction():
            yield


def heard(blocks: tuple[Block, ...], names: set[str]) -> tuple[Block, ...]:
    """The blocks with only those events that are in `names`; blocks that have none are left out.

    Where every event is wanted, as with a single contract, the very same blocks come back: nothing is copied.
    """
    if all(event.name in names for block in blocks for event in block.events):
        return blocks if all(block.events for block in blocks) else tuple(b for b in blocks if b.events)
    kept = []
    for block in blocks:
        events = tuple(event for event in block.events if event.name in names)
        if events:
            kept.append(msgspec.structs.replace(block, events=events))
    return tuple(kept)


def blockwise(span: Span) -> list[Span]:
    """The same span in spans that end at each listed block, and one for the empty blocks after the last."""
    parts: list[Span] = []
    first = span.first
    for block in span.blocks:
        parts.append(Span(first, block.number, (block,), block.ref, block.timestamp, span.final))
        first = block.number + 1
    if first <= span.last:
        parts.append(Span(first, span.last, (), span.end, span.end_timestamp, span.final))
    return [_with_quarantined(part, span) for part in parts]


def _with_quarantined(part: Span, span: Span) -> Span:
    logs = tuple(log for log in span.quarantined if part.first <= log.number <= part.last)
    return msgspec.structs.replace(part, quarantined=logs) if logs else part
