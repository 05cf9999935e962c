"""The journal: SQL on what must be kept to undo blocks that may still be reorganised, and the undoing itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import asyncpg

from indexer import queue
from indexer.db import Connection
from indexer.errors import LostLeadership
from indexer.ledger import moment
from indexer.model import BlockRef, Span

_WATCH_SECONDS = 30.0
_WATCH_PAUSE_SECONDS = 0.2


async def remember(connection: Connection, chain: int, span: Span, final: int) -> None:
    """Keep the ref of the span's end, which may still be reorganised, and forget those that no longer can."""
    parent_hash = span.blocks[-1].parent_hash if span.blocks and span.blocks[-1].number == span.last else None
    await connection.execute(
        """
        insert into indexer.block (chain, number, hash, parent_hash, block_time) values ($1, $2, $3, $4, $5)
        on conflict (chain, number) do update
        set hash = excluded.hash, parent_hash = excluded.parent_hash, block_time = excluded.block_time
        """,
        chain, span.end.number, span.end.hash, parent_hash, moment(span.end_timestamp),
    )  # fmt: skip
    # the final block itself stays: a fork's common ancestor may be it
    await connection.execute("delete from indexer.block where chain = $1 and number < $2", chain, final)
    await connection.execute("delete from indexer.journal where chain = $1 and number <= $2", chain, final)


async def window(connection: Connection, chain: int) -> list[BlockRef]:
    """The stored refs of blocks that may still be reorganised, newest first."""
    rows = await connection.fetch("select number, hash from indexer.block where chain = $1 order by number desc", chain)
    return [BlockRef(row["number"], row["hash"]) for row in rows]


async def watch(connection: Connection, tables: Sequence[str]) -> None:
    """Journal these tables (triggers, made once), so that a reorganisation can be undone in them.

    To make a trigger we wait for those who write the table, and who comes then waits behind us: so in short turns.
    """
    deadline = time.monotonic() + _WATCH_SECONDS
    for table in tables:
        while True:
            try:
                async with connection.transaction():
                    before = await connection.fetchval("select current_setting('lock_timeout')")
                    await connection.execute("set local lock_timeout = '300ms'")
                    await connection.execute("select indexer.watch($1::text::regclass)", table)
                    await connection.fetchval("select set_config('lock_timeout', $1, true)", before)
                break
            except asyncpg.LockNotAvailableError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_WATCH_PAUSE_SECONDS)


async def watch_meanwhile(connection: Connection, tables: Sequence[str]) -> list[str]:
    """Journal these tables for the rest of the caller's transaction, which is to be rolled back, also where no
    reorganisation makes that necessary; returns those of which it can't be had: not ours, without a key, or in use."""
    lacking = await connection.fetch(
        """
        select name from unnest($1::text[]) as given (name)
        where not exists (
            select from pg_trigger where tgrelid = to_regclass(name) and tgname = 'indexer_journal_insert'
        )
        """,
        list(tables),
    )
    left: list[str] = []
    for row in lacking:
        try:
            async with connection.transaction():
                before = await connection.fetchval("select current_setting('lock_timeout')")
                await connection.execute("set local lock_timeout = '300ms'")
                await connection.execute("select indexer.watch($1::text::regclass)", row["name"])
                await connection.fetchval("select set_config('lock_timeout', $1, true)", before)
        except (
            asyncpg.LockNotAvailableError, asyncpg.UndefinedTableError, asyncpg.RaiseError,
            asyncpg.InsufficientPrivilegeError,
        ):  # fmt: skip
            left.append(row["name"])
    return left


async def rows_of(connection: Connection, chain: int, number: int) -> dict[str, int]:
    """By table how many rows are kept to undo that block."""
    rows = await connection.fetch(
        """
        select relation::regclass::text as name, count(*) as rows from indexer.journal
        where chain = $1 and number = $2
        group by relation order by 1
        """,
        chain, number,
    )  # fmt: skip
    return {row["name"]: row["rows"] for row in rows}


async def journal_from(connection: Connection, chain: int, number: int) -> None:
    """Journal what the rest of this transaction does to watched tables, as done by the block `number`."""
    await connection.execute(
        "select set_config('indexer.chain', $1::text, true), set_config('indexer.block', $2::text, true)",
        str(chain), str(number),
    )  # fmt: skip


async def journal_rows(connection: Connection, chain: int) -> int:
    """How many rows are kept to undo a reorganisation."""
    return int(await connection.fetchval("select count(*) from indexer.journal where chain = $1", chain))


async def writes_elsewhere(connection: Connection, declared: Sequence[str]) -> dict[str, int]:
    """Rows written in this transaction (and since the server's last report, so take differences) by table, for all
    tables but the engine's, temporary ones and those in `declared`."""
    rows = await connection.fetch(
        """
        select relid::regclass::text as name, n_tup_ins + n_tup_upd + n_tup_del as written
        from pg_stat_xact_user_tables
        where schemaname <> 'indexer' and schemaname not like 'pg_temp%'
          and n_tup_ins + n_tup_upd + n_tup_del > 0
          and not exists (
              select from unnest($1::text[]) as declared (name)
              where to_regclass(declared.name) in (relid, pg_partition_root(relid))
          )
        """,
        list(declared),
    )
    return {row["name"]: row["written"] for row in rows}


async def rewind(connection: Connection, chain: int, at: BlockRef, to: BlockRef) -> int:
    """Undo the blocks after `to`, inside the caller's transaction; returns how many rows were brought back.

    Moves the cursor by compare-and-swap (LostLeadership where it is not at `at`), restores every journalled row, and
    takes the blocks out of the coverage, the window, the quarantine and the failures, and their waiting jobs away.
    """
    status = await connection.execute(
        """
        update indexer.cursor
        set number = $4, hash = $5, updated_at = now(), seen_at = now(),
            block_time = (select block_time from indexer.block where chain = $1 and number = $4)
        where chain = $1 and number = $2 and hash = $3
        """,
        chain, at.number, at.hash, to.number, to.hash,
    )  # fmt: skip
    if status != "UPDATE 1":
        raise LostLeadership(f"the cursor is no longer at block {at.number}: another process writes this chain")
    # Tables that point at others by foreign keys go before them, and no key is looked at before all rows are back.
    await connection.execute("set constraints all deferred")
    relations = await connection.fetch(
        """
        with recursive touched as (
            select distinct relation::oid as relation from indexer.journal where chain = $1 and number > $2
        ), pointed_at (relation, depth) as (
            select relation, 0 from touched
            union
            select confrelid, depth + 1 from pointed_at
            join pg_constraint on conrelid = relation and contype = 'f' and confrelid <> relation
            where confrelid in (select relation from touched) and depth < (select count(*) from touched)
        )
        select relation from pointed_at group by relation order by max(depth)
        """,
        chain, to.number,
    )  # fmt: skip
    rows = 0
    for relation in relations:
        rows += await connection.fetchval(
            "select indexer.restore($1::smallint, $2, $3::oid::regclass)", chain, to.number, relation["relation"]
        )
    await connection.execute("set constraints all immediate")
    await connection.execute("delete from indexer.journal where chain = $1 and number > $2", chain, to.number)
    await connection.execute("delete from indexer.block where chain = $1 and number > $2", chain, to.number)
    await connection.execute("delete from indexer.quarantine where chain = $1 and number > $2", chain, to.number)
    await connection.execute("delete from indexer.failure where chain = $1 and first > $2", chain, to.number)
    await queue.forget(connection, chain, to.number)
    await connection.execute(
        "update indexer.coverage set blocks = blocks - int8multirange(int8range($2, null)) where chain = $1",
        chain, to.number + 1,
    )  # fmt: skip
    return rows


async def journalled(connection: Connection, chain: int, number: int) -> bool:
    """Whether a block after `number` has written rows that a reorganisation would bring back."""
    return bool(
        await connection.fetchval(
            "select exists (select from indexer.journal where chain = $1 and number > $2)", chain, number
        )
    )


async def changes(connection: Connection, chain: int, number: int) -> dict[str, list[tuple[Any, Any]]]:
    """What this transaction, journalled under block `number`, did: by table the rows (before, after) as JSON texts."""
    relations = await connection.fetch(
        """
        select distinct relation::oid as relation, relation::text as name from indexer.journal
        where chain = $1 and number = $2 order by name
        """,
        chain, number,
    )  # fmt: skip
    found: dict[str, list[tuple[Any, Any]]] = {}
    for relation in relations:
        rows = await connection.fetch(
            "select before::text, after::text from indexer.changes($1::smallint, $2, $3::oid::regclass)",
            chain, number, relation["relation"],
        )  # fmt: skip
        found[relation["name"]] = [(row["before"], row["after"]) for row in rows if row["before"] != row["after"]]
    return found
