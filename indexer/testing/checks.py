"""What must hold for any hook: every fork is undone exactly, and it does not matter how blocks are cut into spans."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager

import asyncpg

from indexer.db import Connection
from indexer.model import Block, Hook, Span
from indexer.registry import Registered
from indexer.testing.bench import Bench, Tables
from indexer.testing.blocks import one_span, one_span_a_block, spans_of

_SHOWN_ROWS = 5


async def assert_undo_restores(
    connection: Connection,
    hooks: Sequence[Hook | Registered],
    blocks: Sequence[Block],
    *,
    jumps: int = 3,
    seed: int = 1,
) -> None:
    """Every state on the way back equals the state on the way out, in every row and column of the declared tables.

    The blocks are applied one by one; then `jumps` times some of the last ones are undone at once and applied again;
    then they are undone one at a time. Leaves the database as it was before the blocks.
    """
    chance = random.Random(seed)  # noqa: S311
    bench = await Bench.open(connection, hooks, first=blocks[0].number)
    base = (await bench.cursor()).number
    states = [await bench.state()]
    await _forward(bench, blocks, states)
    for _ in range(jumps):
        kept = chance.randrange(len(blocks))
        await bench.undo(base + kept)
        _assert_same(states[kept], await bench.state(), f"undone from block {base + len(blocks)} to {base + kept}")
        del states[kept + 1 :]
        await _forward(bench, blocks[kept:], states)
    for kept in range(len(blocks) - 1, -1, -1):
        await bench.undo(base + kept)
        _assert_same(states[kept], await bench.state(), f"undone from block {base + kept + 1} to {base + kept}")


async def _forward(bench: Bench, blocks: Sequence[Block], states: list[Tables]) -> None:
    for span in one_span_a_block(blocks):
        await bench.apply([span])
        states.append(await bench.state())


async def assert_set_equals_rows(
    connection: Connection,
    hooks: Sequence[Hook | Registered],
    blocks: Sequence[Block],
    *,
    ignore: Collection[str] | None = None,
    cuts: int = 3,
    seed: int = 1,
) -> None:
    """All blocks in one span, one block at a time, and `cuts` times cut at random leave the same rows.

    `ignore`: columns that may differ, as "table.column"; by default those whose default value is a sequence's, a
    clock's or a random one (and identity columns). Nothing stays in the database.
    """
    chance = random.Random(seed)  # noqa: S311
    ways: dict[str, list[Span]] = {
        "one span": [one_span(blocks)],
        "one block at a time": one_span_a_block(blocks, final=True),
    }
    for _ in range(cuts):
        sizes = [chance.randint(1, max(1, len(blocks) // 2)) for _ in blocks]
        ways[f"spans of {sizes} blocks"] = spans_of(blocks, sizes)
    found: dict[str, Tables] = {}
    async with _undone(connection):
        await Bench.open(connection, hooks, first=blocks[0].number)  # one chain for all: hooks may write its number
        for way, spans in ways.items():
            found[way] = await _rows_left(connection, hooks, spans, ignore)
    first, *others = found
    for other in others:
        _assert_same(found[first], found[other], f"{other}, against {first}")


async def _rows_left(
    connection: Connection, hooks: Sequence[Hook | Registered], spans: Sequence[Span], ignore: Collection[str] | None
) -> Tables:
    """The rows that the spans leave; they are undone afterwards."""
    async with _undone(connection):
        bench = await Bench.open(connection, hooks, first=spans[0].first)
        await bench.apply(spans)
        await connection.execute("set constraints all immediate")
        return {table: await _rows(connection, table, ignore) for table in bench.tables}


@asynccontextmanager
async def _undone(connection: Connection) -> AsyncIterator[None]:
    """A transaction (within another a savepoint) of which nothing stays."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


async def _rows(connection: Connection, table: str, ignore: Collection[str] | None) -> list[str]:
    columns = await connection.fetch(
        """
        select attname, attidentity <> '' or coalesce(
            pg_get_expr(adbin, adrelid) ~* '(nextval|now|random|uuid|_timestamp|current_|local|timeofday)', false
        ) and attgenerated = '' as varies
        from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
        where attrelid = $1::text::regclass and attnum > 0 and not attisdropped
        order by attnum
        """,
        table,
    )
    kept = [
        name for name, varies in columns if not (varies if ignore is None else f"{table}.{name}" in ignore)
    ]  # fmt: skip
    query = await connection.fetchval(
        """
        select format('select row(%s)::text from %s as indexer_row', columns, $1::text::regclass)
        from (select string_agg(format('indexer_row.%I', name), ', ' order by place) as columns
              from unnest($2::text[]) with ordinality as kept (name, place)) as listed
        """,
        table, kept,
    )  # fmt: skip
    rows: list[asyncpg.Record] = await connection.fetch(query)
    return sorted(row[0] for row in rows)


def _assert_same(expected: Tables, found: Tables, what: str) -> None:
    for table, rows in expected.items():
        if rows == found[table]:
            continue
        missing, surplus = _without(rows, found[table]), _without(found[table], rows)
        raise AssertionError(
            f"{what}: the table {table} differs in {len(missing)} + {len(surplus)} rows\n"
            + "".join(f"  - {row}\n" for row in missing[:_SHOWN_ROWS])
            + "".join(f"  + {row}\n" for row in surplus[:_SHOWN_ROWS])
        )


def _without(rows: Sequence[str], others: Sequence[str]) -> list[str]:
    left = list(rows)
    for row in others:
        if row in left:
            left.remove(row)
    return left
