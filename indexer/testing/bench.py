"""A chain in a migrated database, with hooks that run on blocks through the real pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from indexer import journal, ledger
from indexer.config import HookSettings
from indexer.db import Connection
from indexer.ledger import Pace
from indexer.model import Block, BlockRef, Heads, Hook, Span
from indexer.pipeline import Pipeline, prepare
from indexer.registry import Registered
from indexer.testing.blocks import one_span, one_span_a_block, spans_of

CHAIN = "testing"
# every row of a table as Postgres writes it, in a fixed order; a text keeps apart what looks alike in Python and JSON
Tables: TypeAlias = Mapping[str, Sequence[str]]

# what a span leaves in the engine's own tables, without ids and clocks
_ENGINE = {
    "indexer.cursor": "select row(number, hash, block_time)::text from indexer.cursor where chain = $1",
    "indexer.block": "select block::text from indexer.block where chain = $1",
    "indexer.coverage": "select coverage::text from indexer.coverage where chain = $1",
    "indexer.quarantine": """
        select row(number, block_hash, log_index, error)::text from indexer.quarantine where chain = $1
    """,
    "indexer.journal": """
        select row(number, relation, key, before)::text from indexer.journal where chain = $1
    """,
}


class Bench:
    """The chain `testing` in the connection's database; `await Bench.open(...)` makes one.

    A later Bench on the same database goes on where the cursor is.
    """

    def __init__(self, connection: Connection, pipeline: Pipeline) -> None:
        self.connection, self.pipeline = connection, pipeline
        self.tables = sorted({table for one in pipeline.hooks for table in one.hook.tables})
        self._queries: dict[str, str] = {}

    @classmethod
    async def open(cls, connection: Connection, hooks: Sequence[Hook | Registered], *, first: int = 1) -> Bench:
        """`hooks` run in this order; Registered(hook, HookSettings(...)) gives one a policy. `first`: first block."""
        registered = [one if isinstance(one, Registered) else Registered(one, HookSettings()) for one in hooks]
        chain = await ledger.open_chain(connection, CHAIN, "testing", "0", first)
        await ledger.register_hooks(connection, chain.id, [one.name for one in registered])
        bench = cls(connection, Pipeline(chain, registered, "testing"))
        for one in registered:
            await prepare(connection, one.hook)
        await journal.watch(connection, bench.tables)
        return bench

    async def apply(self, spans: Iterable[Span], *, final: int | None = None) -> None:
        """Apply the spans from the cursor on. `final`: the finalised block, by default the end of a final span."""
        at = await self.cursor()
        for span in spans:
            finalised = final if final is not None else span.last if span.final else self.pipeline.chain.start_block - 1
            heads = Heads(max(span.last, finalised), finalised)
            async for applied in self.pipeline.apply(self.connection, at, span, Pace(heads)):
                at = applied.span.end

    async def undo(self, to: int) -> int:
        """Undo the blocks after number `to`, as a reorganisation does; how many rows were brought back."""
        at, chain = await self.cursor(), self.pipeline.chain
        refs = {ref.number: ref for ref in await journal.window(self.connection, chain.id)}
        refs[chain.start_block - 1] = BlockRef(chain.start_block - 1, b"")
        return await self.pipeline.undo(self.connection, at, refs[to])

    async def cursor(self) -> BlockRef:
        return (await ledger.cursor(self.connection, self.pipeline.chain.id)).ref

    async def state(self) -> Tables:
        """All rows of the tables that the hooks declare, and what the engine notes about the applied blocks."""
        if not self._queries:
            queries = await self.connection.fetch(
                """
                select name, format('select indexer_row::text from %s as indexer_row', name::regclass)
                from unnest($1::text[]) as name
                """,
                self.tables,
            )
            self._queries = {name: query for name, query in queries}  # noqa: C416  records are no pairs to mypy
        found: dict[str, Sequence[str]] = {}
        for table, query in self._queries.items():
            found[table] = sorted(row[0] for row in await self.connection.fetch(query))
        for table, query in _ENGINE.items():
            rows = await self.connection.fetch(query, self.pipeline.chain.id)
            found[table] = sorted(row[0] for row in rows)
        return found


async def run_hooks(
    connection: Connection,
    hooks: Sequence[Hook | Registered],
    blocks: Sequence[Block],
    *,
    spans: Sequence[int] | None = None,
    final: bool = False,
) -> Bench:
    """Run the hooks on the blocks, in transactions as the daemon makes them, and commit.

    At first as at a chain's head, a block at a time, where it can be undone (`await bench.undo(number)` of what is
    returned). `final`: as history, all blocks at once, or `spans` of so many blocks each. Called again, it goes on with
    the blocks that follow. Raises what halts the daemon: HookFailed, with the hook's own error as its cause.
    """
    if spans is not None and not final:
        raise ValueError("at the head every block is a span: spans= goes with final=True")
    bench = await Bench.open(connection, hooks, first=blocks[0].number if blocks else 1)
    if blocks:
        history = [one_span(blocks)] if spans is None else spans_of(blocks, spans)
        await bench.apply(history if final else one_span_a_block(blocks))
    return bench
