"""One derived table: the SQL that compares it with what its base says, and that writes what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import asyncpg
import msgspec

from indexer.db import Connection, is_transient
from indexer.errors import HookLoadError, UsageError
from indexer.model import Derived, Hook
from indexer.registry import Registered

# a long history is not a query gone wrong; asyncpg can't be told to wait for ever on a connection with a limit
_FOR_EVER_SECONDS = 7 * 86_400.0


class Sample(msgspec.Struct, frozen=True):
    """A row that differs: as it is, and as it must be."""

    kind: str  # missing, superfluous, different
    present: dict[str, Any] | None
    wanted: dict[str, Any] | None


class Compared(msgspec.Struct, frozen=True):
    """A derived table beside what it must hold. `rows`: how many of the hook's rows are there."""

    table: str
    rows: int
    missing: int
    superfluous: int
    different: int
    samples: tuple[Sample, ...] = ()

    @property
    def equal(self) -> bool:
        return not (self.missing or self.superfluous or self.different)


class Written(msgspec.Struct, frozen=True):
    table: str
    inserted: int
    changed: int
    deleted: int


class Statements(msgspec.Struct, frozen=True):
    """SQL on one derived table, as Postgres itself put it together (sql/0003_derived.sql)."""

    derived: Derived
    lock: str
    counting: str
    comparing: str
    collecting: str
    deleting: str
    changing: str
    inserting: str


def derived_of(hooks: Sequence[Registered], name: str) -> tuple[Hook, tuple[Derived, ...]]:
    """The hook and its derived tables. Raises UsageError where it has none, HookLoadError where they can't be meant."""
    known = [one.hook for one in hooks if getattr(one.hook, "derived", ())]
    found = next((one.hook for one in hooks if one.name == name), None)
    able = ", ".join(one.name for one in known) or "none"
    if found is None:
        raise UsageError(f"no enabled hook is called {name} (with derived tables: {able})")
    derived: tuple[Derived, ...] = tuple(getattr(found, "derived", ()))
    if not derived:
        raise UsageError(
            f"the hook {name} derives no table from others, so only its blocks can tell: use `indexer replay` "
            f"(with derived tables: {able})"
        )
    for one in derived:
        if one.table not in found.tables:
            raise HookLoadError(f"hook {name} derives {one.table}, which is not among its tables: declare it")
    return found, derived


async def statements_of(connection: Connection, hook: str, one: Derived) -> Statements:
    """The SQL on one derived table; raises HookLoadError where its select does not suit it."""
    with _blamed(one):
        given = [column.name for column in (await connection.prepare(one.sql)).get_attributes()]
        known = await connection.fetch(
            """
            select attname as name, conkey is not null as key
            from pg_attribute
            left join pg_constraint on conrelid = attrelid and contype = 'p' and attnum = any(conkey)
            where attrelid = $1::text::regclass and attnum > 0 and not attisdropped
            """,
            one.table,
        )
    columns, keys = [row["name"] for row in known], [row["name"] for row in known if row["key"]]
    wrong = next((column for column in given if column not in columns or given.count(column) > 1), None)
    if wrong is not None:
        raise HookLoadError(f"hook {hook}: the select of {one.table} gives {wrong}, which is not one column of it")
    if not keys or not set(keys) <= set(given):
        raise HookLoadError(
            f"hook {hook}: the select of {one.table} must give its primary key ({', '.join(keys) or 'it has none'})"
        )
    row = await connection.fetchrow(
        """
        select format('lock table %s in share row exclusive mode', $1::text::regclass) as lock, sql.*
        from indexer.derivation($1::text::regclass, $2, $3, $4) as sql
        """,
        one.table, given, one.sql, one.only,
    )  # fmt: skip
    assert row is not None
    return Statements(one, **dict(row))


async def compare(connection: Connection, statements: Statements, samples: int) -> Compared:
    with _blamed(statements.derived):
        ours = await connection.fetchval(statements.counting, timeout=_FOR_EVER_SECONDS)
        # a row of each kind comes along in any case: it carries how many there are
        rows = await connection.fetch(statements.comparing, max(1, samples), timeout=_FOR_EVER_SECONDS)
    totals = {row["kind"]: row["total"] for row in rows}
    shown = tuple(Sample(row["kind"], _object(row["present"]), _object(row["wanted"])) for row in rows)
    return Compared(
        statements.derived.table, ours, totals.get("missing", 0), totals.get("superfluous", 0),
        totals.get("different", 0), shown if samples else (),
    )  # fmt: skip


def _object(text: str | None) -> dict[str, Any] | None:
    return None if text is None else json.loads(text)


async def write(connection: Connection, statements: Statements) -> Written:
    """Compute the table anew, and write the rows that differ."""
    with _blamed(statements.derived):
        await connection.execute(statements.collecting, timeout=_FOR_EVER_SECONDS)
        # deleted before inserted: another unique key of the table may be theirs in turn
        deleted, changed, inserted = [
            int((await connection.execute(sql, timeout=_FOR_EVER_SECONDS)).rpartition(" ")[2])
            for sql in (statements.deleting, statements.changing, statements.inserting)
        ]
        await connection.execute("drop table indexer_difference")
    return Written(statements.derived.table, inserted, changed, deleted)


async def is_shared(connection: Connection, one: Derived) -> bool:
    """Whether another writer's rows may count in the table as well."""
    if not one.shared:
        return False
    with _blamed(one):
        return bool(await connection.fetchval(one.shared, timeout=_FOR_EVER_SECONDS))


@contextmanager
def _blamed(one: Derived) -> Iterator[None]:
    """What Postgres says about a derived table's SQL is its hook's author's to hear."""
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        if is_transient(error):
            raise
        raise HookLoadError(f"the derived table {one.table} can't be computed: {error}") from error
