"""Derived tables: compare them with what their base tables say (`verify`), or put them right (`rebuild`).

A hook says in its attribute `derived` which of its tables follow from others, each with one select that gives exactly
the rows that it must have (`Derived`). Both commands compare that with the rows that are there.

`verify` does so in one repeatable-read transaction: a snapshot sees whole blocks only, so it may run beside a daemon.

`rebuild` does so in one transaction that nobody else writes into, and writes only rows that differ:

- It locks the cursor of each chain that the hook or its base has coverage of: no span commits meanwhile. The daemon
  waits at the first statement of its span, and tries again if that takes too long; so does a replay, which then finds
  that its holes are closed. It locks the derived tables against writers too, for those that hold no cursor: a person,
  another chain's hooks. Readers see the old rows until COMMIT.
- The journal holds what rows were before blocks that may still be reorganised. For a row that was wrong, it holds the
  wrong row: a reorganisation right after the rebuild would bring it back. And a row that the rebuild adds because of a
  play in the window would stay, though that play is undone. So where something differs, and the window has touched
  base or derived tables, the chain is first rewound to the block before it did, in the same transaction; then nothing
  of these tables is in the journal, and what is right there is right. The daemon finds its cursor moved (compare and
  swap), reads it anew, and applies the window again. Where nothing differs, nothing is written and nothing rewound.
- Then the hook has, in effect, applied every block: its holes are closed, unless it has tables that are neither derived
  nor `kept` (rows that say what was known at the time, and that no rebuild writes).

What can't be derived is refused: a base with holes, one that was pruned, one in which another writer's rows count too.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import msgspec

from indexer import journal, ledger
from indexer.db import Connection, translated
from indexer.derivation import Compared, Statements, Written, compare, derived_of, is_shared, statements_of, write
from indexer.errors import Temporary, UsageError
from indexer.model import BlockRef, Derived, Hook
from indexer.registry import Registered

SAMPLES = 5

Say = Callable[[str], None]


class Verified(msgspec.Struct, frozen=True):
    """`shared`: tables in which rows of another writer may count as well. `kept`: tables that were not compared."""

    hook: str
    equal: bool
    tables: tuple[Compared, ...]
    kept: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()


class Rewound(msgspec.Struct, frozen=True):
    """A chain that the daemon applies again from the block after `block`."""

    chain: str
    block: int


class Rebuilt(msgspec.Struct, frozen=True):
    """What a rebuild wrote, or would have. `closed_blocks`: holes of the hook that it filled."""

    hook: str
    dry_run: bool
    tables: tuple[Written, ...]
    rewound: tuple[Rewound, ...] = ()
    closed_blocks: int = 0
    open_tables: tuple[str, ...] = ()  # neither derived nor kept: because of them holes stay open


class _Locked(msgspec.Struct, frozen=True):
    """A chain whose cursor we hold."""

    id: int
    name: str
    start_block: int
    at: BlockRef


async def verify(
    connection: Connection, hooks: Sequence[Registered], name: str, *, samples: int = SAMPLES, say: Say = lambda _: None
) -> Verified:
    """Compare the hook's derived tables with what their base tables say, at one moment.

    Raises UsageError where that can't be said: no such hook, a pruned base.
    """
    hook, derived = derived_of(hooks, name)
    async with _transaction(connection, isolation="repeatable_read", readonly=True):
        await _refuse_pruned(connection, derived)
        tables = []
        for one in derived:
            say(f"{one.table}: comparing")
            tables.append(await compare(connection, await statements_of(connection, name, one), samples))
        shared = tuple([one.table for one in derived if await is_shared(connection, one)])
    derived_tables = {one.table for one in derived}
    kept = tuple(table for table in hook.tables if table not in derived_tables)
    return Verified(name, all(one.equal for one in tables), tuple(tables), kept, shared)


async def rebuild(
    connection: Connection,
    hooks: Sequence[Registered],
    name: str,
    *,
    dry_run: bool = False,
    only_ours: bool = False,
    say: Say = lambda _: None,
) -> Rebuilt:
    """Write the rows of the hook's derived tables that differ from what their base tables say.

    `dry_run` does all of it and rolls back. Raises UsageError where it can't be right: no such hook, a base that was
    pruned or has holes; one with rows of another writer, unless `only_ours` says that they don't count.
    """
    hook, derived = derived_of(hooks, name)
    async with _transaction(connection, keep=not dry_run):
        say("waiting for the cursor")
        base = _base_hooks(hooks, hook, derived)
        chains = await _lock_cursors(connection, [name, *base])
        await _refuse_pruned(connection, derived)
        await _refuse_gaps(connection, chains, name, base)
        if not only_ours:
            await _refuse_shared(connection, derived)
        statements = [await statements_of(connection, name, one) for one in derived]
        for one in statements:
            await connection.execute(one.lock)
        chains, rewound = await _out_of_the_journal(connection, chains, statements, say)
        written = []
        for one in statements:
            say(f"{one.derived.table}: computing")
            written.append(await write(connection, one))
        left = _open_tables(hook, derived)
        closed = 0 if left else await _close_holes(connection, chains, name)
    return Rebuilt(name, dry_run, tuple(written), tuple(rewound), closed, left)


def _base_hooks(hooks: Sequence[Registered], hook: Hook, derived: Sequence[Derived]) -> list[str]:
    """The enabled hooks that write the base tables: where they miss blocks, so would the rebuilt rows."""
    tables = {table for one in derived for table in one.base}
    return [one.name for one in hooks if one.hook is not hook and tables.intersection(one.hook.tables)]


def _open_tables(hook: Hook, derived: Sequence[Derived]) -> tuple[str, ...]:
    known = {one.table for one in derived}.union(getattr(hook, "kept", ()))
    return tuple(table for table in hook.tables if table not in known)


async def _lock_cursors(connection: Connection, hooks: Sequence[str]) -> list[_Locked]:
    """Hold the cursors of the chains that these hooks follow: the first thing that a span's transaction asks for."""
    rows = await connection.fetch(
        """
        select chain.id, chain.name, chain.start_block, cursor.number, cursor.hash
        from indexer.cursor join indexer.chain on chain.id = cursor.chain
        where exists (select from indexer.coverage where coverage.chain = cursor.chain and hook = any($1::text[]))
        order by chain.id
        for update of cursor
        """,
        list(hooks),
    )
    return [_Locked(row["id"], row["name"], row["start_block"], BlockRef(row["number"], row["hash"])) for row in rows]


async def _refuse_gaps(connection: Connection, chains: Sequence[_Locked], name: str, base: Sequence[str]) -> None:
    for chain in chains:
        await ledger.register_hooks(connection, chain.id, [name, *base])
        gaps = await ledger.gaps(connection, chain.id)
        for hook in base:
            if ranges := gaps.get(hook):
                first, last = ranges[0]
                more = f" and {len(ranges) - 1} more ranges" if len(ranges) > 1 else ""
                raise UsageError(
                    f"{name} can't be rebuilt: the hook {hook}, whose tables it is derived from, lacks the blocks "
                    f"{first} to {last}{more} of chain {chain.name}; fill them first: indexer gaps --fill"
                )


async def _refuse_pruned(connection: Connection, derived: Sequence[Derived]) -> None:
    row = await connection.fetchrow(
        """
        select relation::text, before, rows from indexer.pruned
        where rows > 0 and relation in (select to_regclass(name) from unnest($1::text[]) as name)
        order by relation::text
        """,
        sorted({table for one in derived for table in one.base}),
    )
    if row is not None:
        tables = ", ".join(one.table for one in derived)
        raise UsageError(
            f"{row['relation']} was pruned: {row['rows']} rows from before {row['before']:%Y-%m-%d} are gone that "
            f"count in {tables}, and nothing can count them again; index the whole history into a database (or "
            "database.schema) of its own, and take the tables from there"
        )


async def _refuse_shared(connection: Connection, derived: Sequence[Derived]) -> None:
    for one in derived:
        if await is_shared(connection, one):
            raise UsageError(
                f"{' and '.join(one.base)} has rows of another writer, and {one.table} may count them as well: a "
                "rebuild would lose them; look at `indexer verify`, and where they don't count give --only-ours"
            )


async def _out_of_the_journal(
    connection: Connection, chains: Sequence[_Locked], statements: Sequence[Statements], say: Say
) -> tuple[list[_Locked], list[Rewound]]:
    """Rewind the chains whose journal holds rows of these tables or their base, if there is something to put right."""
    tables = {table for one in statements for table in (one.derived.table, *one.derived.base)}
    targets = {chain.id: await _before_touched(connection, chain, sorted(tables)) for chain in chains}
    if not any(targets.values()):
        return list(chains), []
    for one in statements:
        say(f"{one.derived.table}: comparing")
        if not (await compare(connection, one, 0)).equal:
            break
    else:
        return list(chains), []
    left, rewound = [], []
    for chain in chains:
        to = targets[chain.id]
        if to is not None:
            say(f"chain {chain.name}: rewinding to block {to.number}")
            await journal.rewind(connection, chain.id, chain.at, to)
            rewound.append(Rewound(chain.name, to.number))
        left.append(msgspec.structs.replace(chain, at=to or chain.at))
    return left, rewound


async def _before_touched(connection: Connection, chain: _Locked, tables: Sequence[str]) -> BlockRef | None:
    """The newest block before the first that touched these tables and may still be reorganised; None without such."""
    row = await connection.fetchrow(
        """
        with touched as (
            select min(journal.number) as number, min(cursor.final) as final
            from indexer.journal join indexer.cursor using (chain)
            where chain = $1 and journal.number > coalesce(cursor.final, -1)
                and relation in (select to_regclass(name) from unnest($2::text[]) as name)
        )
        select touched.number as touched, stored.number, stored.hash, block.parent_hash
        from touched
        left join lateral (
            select number, hash from indexer.block
            where chain = $1 and block.number >= coalesce(touched.final, -1) and block.number < touched.number
            order by number desc limit 1
        ) as stored on true
        left join indexer.block on block.chain = $1 and block.number = touched.number
        where touched.number is not null
        """,
        chain.id, tables,
    )  # fmt: skip
    if row is None:
        return None
    if row["number"] is not None:
        return BlockRef(row["number"], row["hash"])
    before: int = row["touched"] - 1
    if before < chain.start_block:
        return BlockRef(before, b"")
    if row["parent_hash"] is None:
        raise Temporary(f"block {before} of chain {chain.name} is no longer in the stored window: try again")
    return BlockRef(before, row["parent_hash"])


async def _close_holes(connection: Connection, chains: Sequence[_Locked], name: str) -> int:
    """The tables are now as if the hook had applied every block up to the cursor; returns how many it had not."""
    closed = 0
    for chain in chains:
        first, last = chain.start_block, chain.at.number
        if first <= last:
            gaps = await ledger.gaps(connection, chain.id)
            closed += sum(high - low + 1 for low, high in gaps.get(name, []))
            await ledger.cover(connection, chain.id, [name], first, last)
            await ledger.resolve_failures(connection, chain.id, [name], first, last)
    return closed


def as_json(result: Verified | Rebuilt) -> str:
    return msgspec.json.encode(result).decode()


def describe(result: Verified | Rebuilt) -> str:
    """The result for people, a line a fact."""
    return "\n".join(_lines_verified(result) if isinstance(result, Verified) else _lines_rebuilt(result))


def _lines_verified(found: Verified) -> Iterator[str]:
    for one in found.tables:
        yield (
            f"{one.table}: {one.rows:,} rows, {one.missing:,} missing, {one.superfluous:,} superfluous, "
            f"{one.different:,} different"
        )
        for sample in one.samples:
            sides = [json.dumps(side) for side in (sample.present, sample.wanted) if side is not None]
            yield f"  {sample.kind}: {' must be '.join(sides)}"
    if found.kept:
        yield f"not derived, so not compared: {', '.join(found.kept)}"
    if found.shared:
        yield f"the base has rows of another writer, which are not counted here: {', '.join(found.shared)}"


def _lines_rebuilt(done: Rebuilt) -> Iterator[str]:
    if done.dry_run:
        yield "a dry run, rolled back:"
    for one in done.tables:
        yield f"{one.table}: {one.inserted:,} inserted, {one.changed:,} changed, {one.deleted:,} deleted"
    for chain in done.rewound:
        yield f"chain {chain.chain}: rewound to block {chain.block}; a running daemon applies the rest again"
    if done.closed_blocks:
        yield f"holes of {done.hook}: {done.closed_blocks:,} blocks closed"
    if done.open_tables:
        yield f"holes of {done.hook} stay open, since these tables are not derived: {', '.join(done.open_tables)}"


@asynccontextmanager
async def _transaction(connection: Connection, *, keep: bool = True, **options: Any) -> AsyncIterator[None]:
    """A transaction whose statements may take their time, but don't wait for locks without end."""
    with translated():
        try:
            transaction = connection.transaction(**options)
            await transaction.start()
            try:
                await connection.execute(
                    """
                    select set_config('lock_timeout', current_setting('statement_timeout'), true),
                           set_config('statement_timeout', '0', true)
                    """
                )
                yield
            except BaseException:
                await transaction.rollback()
                raise
            await (transaction.commit() if keep else transaction.rollback())
        except (asyncpg.UndefinedTableError, asyncpg.UndefinedFunctionError, asyncpg.InvalidSchemaNameError) as error:
            raise UsageError(f"the database is not up to date ({error}): run `indexer migrate`") from error
