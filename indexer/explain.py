"""`indexer explain`: one block from bytes to rows. What the nodes gave, what was decoded of it, what each hook makes of
it (in a dry run that is rolled back), and how long everything took.

Where the block may still be reorganised, the dry run undoes it first, with those after it, so that it shows just what
the block has done. Below finality nothing tells what was there before: there the hooks run over what is there now, as
a forced replay would, and rows that are there already are counted as found.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import msgspec

from indexer import journal, ledger
from indexer.app import Parts
from indexer.config import ChainSettings
from indexer.db import Connection
from indexer.errors import HookFailed, RpcUnavailable, Temporary, UsageError
from indexer.ledger import ChainRow, Cursor
from indexer.model import BlockSource, Event, Heads, Span
from indexer.pipeline import heard, transaction
from indexer.registry import Registered
from indexer.replay import Changed, Replayer, changed, given_up
from indexer.segments import Segment, segments
from indexer.sources.trace import Trace, traced
from indexer.transaction import Tx


class Fetched(msgspec.Struct, frozen=True):
    """A block as the source gave it: `span` has just this block. `parent` is b"" where nobody knows it."""

    span: Span
    parent: bytes
    heads: Heads
    trace: Trace
    fetch_seconds: float

    @property
    def events(self) -> tuple[Event, ...]:
        return self.span.blocks[0].events if self.span.blocks else ()


class HookRun(msgspec.Struct):
    """What a hook did in the dry run. `counted`: rows by its own word, where the table could not be watched; `found`:
    rows of the block that are there already. `error`: why it failed, or why it was left out."""

    seconds: float = 0.0
    tables: list[Changed] = []
    counted: dict[str, int] = {}
    found: dict[str, int] = {}
    error: str = ""


class DryRun(msgspec.Struct):
    """`how`: undone (the block, first), next (it follows on the cursor), again (over what is there), none; `why`."""

    how: str
    why: str = ""
    seconds: float = 0.0
    hooks: dict[str, HookRun] = {}


async def fetch(source: BlockSource, chain: ChainRow, settings: ChainSettings, number: int) -> Fetched:
    """The block from the source, with what that took.

    Raises UsageError for a block that the chain does not have, RpcUnavailable where no node gives it in time.
    """
    seconds = max(settings.connect_timeout_seconds, settings.request_timeout_seconds)
    try:
        async with asyncio.timeout(seconds):
            heads = await source.heads()
            if number > heads.newest:
                raise UsageError(f"block {number} is above the chain's head, which is {heads.newest}")
            with traced() as trace:
                started = time.perf_counter()
                span = await _span(source, number)
                took = time.perf_counter() - started
            return Fetched(span, await _parent(source, span, chain), heads, trace, took)
    except TimeoutError:
        reasons = "; ".join(f"{one.name}: {one.last_error or 'no answer'}" for one in source.nodes)
        raise RpcUnavailable(f"no node gives block {number} within {seconds:g} s ({reasons})") from None


async def _span(source: BlockSource, number: int) -> Span:
    async with aclosing(source.spans(number, number)) as spans:  # type: ignore[type-var]
        async for span in spans:
            return span
    raise Temporary(f"block {number} is gone: the chain has just become shorter; try again")


async def _parent(source: BlockSource, span: Span, chain: ChainRow) -> bytes:
    """The parent's hash: below finality a block comes without it."""
    known = span.blocks[0].parent_hash if span.blocks else None
    if known is not None or span.first == 0:
        return known or b""
    try:
        return (await source.ref(span.first - 1)).hash
    except UsageError:  # a file that does not have it
        return b""
    except Temporary:
        if span.first == chain.start_block:  # a node may have pruned what was never asked for
            return b""
        raise


async def gather(
    parts: Parts, connection: Connection, settings: ChainSettings, number: int, only: Sequence[str], limit: int
) -> dict[str, Any]:
    """All facts of a block, with plain values but for hashes (bytes). `only`: hooks to speak of, or all; `limit`: of
    events. Raises UsageError for a block that is not the chain's, and for a hook that is not enabled."""
    chain = parts.chain
    if number < chain.start_block:
        raise UsageError(f"block {number} is before chain {chain.name}'s first block, which is {chain.start_block}")
    explainer = Explainer(connection, chain, parts.hooks, parts.source, "explain")
    explainer.check_names(only)
    fetched = await fetch(parts.source, chain, settings, number)
    facts = await _standing(connection, chain, fetched, number)
    dry_run = await explainer.explain(fetched.span, fetched.parent)
    hooks = [one for one in parts.hooks if not only or one.name in only]
    takers = {one.name: {event.name for event in _heard(one, fetched.span)} for one in hooks}
    events = [one for one in fetched.events if not only or any(one.name in names for names in takers.values())]
    quarantined = [
        {"index": one.index, "event": one.event, "address": one.address, "tx_hash": one.tx_hash, "error": one.error}
        for one in fetched.span.quarantined
    ]  # fmt: skip
    return {
        **facts,
        "fetched": {**_fetched(fetched, settings), "events": len(fetched.events), "quarantined": quarantined},
        "events": [
            {"index": one.index, "name": one.name, "args": dict(one.args), "address": one.address,
             "tx_hash": one.tx_hash, "hooks": [name for name, names in takers.items() if one.name in names]}
            for one in events[:limit]
        ],
        "events_left_out": max(0, len(events) - limit),
        "hooks": [
            await _hook(connection, chain, one, fetched.span, dry_run.hooks.get(one.name)) for one in hooks
        ],
        "dry_run": {"how": dry_run.how, "why": dry_run.why, "seconds": round(dry_run.seconds, 6)},
    }  # fmt: skip


async def _standing(connection: Connection, chain: ChainRow, fetched: Fetched, number: int) -> dict[str, Any]:
    """What the block is, and how it stands with the cursor, with finality and with the journal."""
    at = await ledger.cursor(connection, chain.id)
    ours = {ref.number: ref.hash for ref in await journal.window(connection, chain.id)}
    block_hash, final = fetched.span.end.hash, at.heads.final if at.heads else -1
    if number > at.ref.number:
        state = "not applied yet"
    elif number <= final:
        state = "final"
    elif ours.get(number, block_hash) != block_hash:
        state = "reorganised"
    else:
        state = "can be undone"
    waiting = await connection.fetchval(
        "select count(*) from indexer.waiting_job where chain = $1 and number = $2", chain.id, number
    )
    seconds = fetched.span.end_timestamp if block_hash else None
    return {
        "chain": chain.name, "chain_id": chain.identity, "source": chain.source, "block": number,
        "hash": block_hash or None, "parent_hash": fetched.parent or None,
        "time": datetime.fromtimestamp(seconds, UTC).isoformat() if seconds is not None else None,
        "age_seconds": round(time.time() - seconds, 1) if seconds is not None else None,
        "head": max(fetched.heads.newest, at.ref.number), "cursor": at.ref.number,
        "final": final if final >= 0 else None,
        "state": state, "applied_hash": ours.get(number),
        "journal": {"rows": await journal.rows_of(connection, chain.id, number), "waiting_jobs": waiting},
    }  # fmt: skip


def _fetched(fetched: Fetched, settings: ChainSettings) -> dict[str, Any]:
    trace = fetched.trace
    by = trace.requests[-1].endpoint if trace.requests else settings.file.name if settings.file else None
    return {
        "by": by, "records": trace.records, "bytes": sum(one.bytes for one in trace.requests),
        "fetch_seconds": round(fetched.fetch_seconds - trace.decode_seconds, 6),
        "decode_seconds": round(trace.decode_seconds, 6),
        "requests": [
            {"endpoint": one.endpoint, "method": one.method, "seconds": round(one.seconds, 6), "bytes": one.bytes}
            for one in trace.requests
        ],
        "troubles": trace.troubles,
    }  # fmt: skip


def _heard(one: Registered, span: Span) -> list[Event]:
    names = {spec.name for spec in one.hook.listens}
    return [event for block in heard(span.blocks, names) for event in block.events] if names else []


async def _hook(
    connection: Connection, chain: ChainRow, one: Registered, span: Span, run: HookRun | None
) -> dict[str, Any]:
    """What there is to say of one hook at the block."""
    known = await ledger.known_hooks(connection, chain.id)
    failures = [f for f in await ledger.failures_at(connection, chain.id, span.first) if f["hook"] == one.name]
    pruned = await ledger.pruned_blocks(connection, chain.id, one.hook.tables)
    return {
        "name": one.name, "listens": [spec.name for spec in one.hook.listens], "events": len(_heard(one, span)),
        "tables": list(one.hook.tables), "after": list(one.after), "known": one.name in known,
        "covered": await ledger.have_applied(connection, chain.id, [one.name], span.first, span.first),
        "failures": [
            {
                "id": f["id"], "policy": f["policy"], "error": f["error"],
                "failed_at": f["failed_at"].isoformat(timespec="seconds"),
                "resolved_at": f["resolved_at"].isoformat(timespec="seconds") if f["resolved_at"] else None,
            }
            for f in failures
        ],
        "pruned": [table for table, last in pruned.items() if span.first <= last],
        "dry_run": None if run is None else msgspec.to_builtins(run),
    }  # fmt: skip


class Explainer(Replayer):
    """A replay of one block that is always rolled back, looked at hook by hook."""

    def __init__(
        self, connection: Connection, chain: ChainRow, hooks: Sequence[Registered], source: BlockSource, name: str
    ) -> None:
        super().__init__(connection, chain, hooks, source, name)
        self._runs: dict[str, HookRun] = {}
        self._unwatched: set[str] = set()

    async def explain(self, span: Span, parent: bytes) -> DryRun:
        """Run the hooks on the one block of `span`; everything is rolled back. The daemon waits meanwhile."""
        self._runs, started = {}, time.perf_counter()
        try:
            async with transaction(self.connection), given_up(self.connection):
                cursor = await ledger.hold(self.connection, self.chain.id)
                found = await self._run_at(span, parent, cursor)
        except Temporary as error:
            found = DryRun("none", str(error))
        found.hooks, found.seconds = self._runs, time.perf_counter() - started
        return found

    async def _run_at(self, span: Span, parent: bytes, cursor: Cursor) -> DryRun:
        number, at = span.first, cursor.ref
        if number > at.number + 1:
            return DryRun("none", f"the daemon is at block {at.number}, and what comes before is not applied yet")
        every = tuple(one.name for one in self.hooks)
        plan = Segment(number, number, every, (), ())
        if number <= (cursor.heads.final if cursor.heads else -1) and number <= at.number:
            # fails for no target: each of them is one
            again = segments(self.hooks, await self.gaps(), every, number, number, force=True)
            found, plan = DryRun("again"), again[0] if again else plan
        elif number == at.number + 1:
            found, base = DryRun("next"), at
            if at.hash and parent not in (b"", at.hash):
                return DryRun("none", "it follows on another block than ours: the daemon is about to undo that")
        else:
            ours = {ref.number: ref for ref in await journal.window(self.connection, self.chain.id)}
            if ours.get(number, span.end) != span.end:
                return DryRun("none", "the chain has another block here by now: the daemon is about to undo ours")
            found, base = DryRun("undone"), await self._rewind(at, number - 1)
            assert base.number == number - 1
        self._unwatched = set(await journal.watch_meanwhile(self.connection, self._pipeline.tables))
        await self._run(span, plan)
        return found

    async def _run_one(self, one: Registered, tx: Tx, span: Span, before: dict[str, int]) -> None:
        """One hook inside a savepoint of its own, with what it changed and how long that took."""
        run = self._runs[one.name] = HookRun()
        missing = [name for name in one.after if name in self._runs and self._runs[name].error]
        if missing:
            run.error = f"left out, since {missing[0]} is missing here"
            return
        applied = await ledger.have_applied(self.connection, self.chain.id, [one.name], span.first, span.first)
        # no block has such a number, so that the entries are this hook's own
        mark, written = -1 - len(self._runs), tx.written.copy()
        await journal.journal_from(self.connection, self.chain.id, mark)
        try:
            async with self.connection.transaction():
                started = time.perf_counter()
                await self._pipeline.run_hook(one, tx, self.connection, span)
                run.seconds = round(time.perf_counter() - started, 6)
                await self._check(one, span, before)
        except HookFailed as failed:
            cause = failed.__cause__
            run.error = f"{type(cause).__name__}: {cause}"
            return
        changes = await journal.changes(self.connection, self.chain.id, mark)
        run.tables = [changed(table, rows) for table, rows in changes.items() if rows]
        run.counted = {
            f"{table} {op}": count for (table, op), count in (tx.written - written).items() if table in self._unwatched
        }
        if applied:
            run.found = await self._found(one, span)

    async def _found(self, one: Registered, span: Span) -> dict[str, int]:
        """How many of the rows that the hook would insert are there, by table: found as a replay recalls them."""
        tx = Tx(self.connection, self.chain.id)
        await journal.journal_from(self.connection, self.chain.id, -1)
        try:
            await self._recall(one, tx, span)
        except HookFailed:
            return {}
        found = {table: len(tx.inserted(table)) for table in one.hook.tables}
        return {table: count for table, count in found.items() if count}
