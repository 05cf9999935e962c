"""Migrations: plain files NNNN_name.sql, numbered from 0001 without a gap, applied once and forward only.

A line is a name and a folder: the engine's is ("indexer", SQL), a package of hooks brings its own. Each file is one
transaction. The engine's files name their schema; the tables of the other lines land in the search path's first one.

A file may begin with directives, a line each:

- `-- no-transaction` (for `create index concurrently`): it holds one statement and runs outside a transaction. It
  should say `if not exists`: a crash right after it lets it run again. An index of that name that an interrupted build
  has left invalid is dropped before.
- `-- unless: <condition>`: where this is true there is nothing to do, and the file counts as applied.
- `-- lock-timeout: 300ms`: it asks for locks on tables that others use all the time. Who waits for such a lock makes
  all others queue behind him, so it gives up after this long, and tries again.

A line's first file may have a sibling 0001_name.existing.sql, for a database in which another program has made the
line's tables: it begins with `-- where: <condition>`, and is taken instead, under the same number, where that is true
and nothing of the line is applied yet.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import asyncpg

from indexer import log
from indexer.db import Connection, is_transient, translated
from indexer.errors import DatabaseUnavailable, MigrationError

# in the wheel the files lie inside the package, in a checkout beside it
_IN_PACKAGE = Path(__file__).parent / "sql"
SQL: Path = _IN_PACKAGE if _IN_PACKAGE.is_dir() else Path(__file__).parent.parent / "sql"

POLL_SECONDS = 0.1
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
_FILE = re.compile(r"(\d{4})_([A-Za-z0-9_]+(\.existing)?)\.sql")
_DIRECTIVE = re.compile(r"-- (no-transaction|unless:|where:|lock-timeout:) *(.*?)\s*")
_INDEX = re.compile(r"^\s*create\s+(?:unique\s+)?index\s+concurrently\s+if\s+not\s+exists\s+(\w+)", re.I | re.M)
_CONTROL = re.compile(r"^\s*(begin|commit|rollback|start\s+transaction)\s*;", re.IGNORECASE | re.MULTILINE)
# asyncpg can't be told to wait for ever on a connection that has a limit of its own
_FOR_EVER_SECONDS = 7 * 86_400.0


def sql_folder(line: str) -> Path:
    """The folder of a migration line that is shipped with us, as `plays`."""
    return SQL / line


@dataclass(frozen=True)
class Migration:
    """A file of a line, as read from the disk; `checksum` is the sha256 of its bytes, in hex.

    `existing` is its sibling for a database that has the line's tables already.
    """

    line: str
    number: int
    name: str
    path: Path
    text: str
    checksum: str
    existing: Migration | None = None

    @cached_property
    def directives(self) -> Mapping[str, str]:
        """The directives at the file's head, as {"unless:": condition}."""
        found: dict[str, str] = {}
        for line in self.text.splitlines():
            match = _DIRECTIVE.fullmatch(line)
            if match is None:
                break
            found[match[1]] = match[2]
        return found

    @property
    def in_transaction(self) -> bool:
        return "no-transaction" not in self.directives


@dataclass(frozen=True, slots=True)
class Applied:
    """What `migrate` did; `seconds` is 0 in a dry run."""

    line: str
    number: int
    name: str
    seconds: float


async def migrate(
    connection: Connection,
    lines: Sequence[tuple[str, Path]],
    *,
    dry_run: bool = False,
    timeout_seconds: float = 60.0,
) -> list[Applied]:
    """Apply what is missing, line by line, and return it in order; a dry run returns the same and changes nothing.

    Of several starters one applies, and the others wait `timeout_seconds` for it; it waits as long for the locks that
    a file asks for with a lock-timeout. The files before one that fails stay applied. The connection is in no
    transaction. Raises MigrationError where the files are wrong, were changed after they were applied or are fewer than
    the database has seen, DatabaseUnavailable where the database has troubles.
    """
    missing = await pending(connection, lines)
    if dry_run or not missing:
        return [Applied(one.line, one.number, one.name, 0.0) for one in missing if dry_run]
    with translated():
        async with _alone(connection, timeout_seconds), _unlimited(connection):
            await _make_table(connection)
            missing = await pending(connection, lines)  # another starter may have been here
            return [await _apply(connection, one, timeout_seconds) for one in missing]


async def pending(connection: Connection, lines: Sequence[tuple[str, Path]]) -> list[Migration]:
    """The files that the database lacks, in the order in which they would run. Changes nothing; raises as `migrate`."""
    with translated():
        known = await _known(connection)
    missing: list[Migration] = []
    for line, folder in lines:
        files = _read(line, folder)
        seen = known.get(line, {})
        if seen and max(seen) > len(files):
            raise MigrationError(
                f"the database is newer than this indexer: it has {line} {max(seen):04d}, the newest file here is "
                f"{len(files):04d}; install the version that migrated it, or a newer one"
            )
        for one in files:
            if one.number not in seen:
                missing.append(await _suited(connection, one))
            elif seen[one.number] not in (one.checksum, one.existing and one.existing.checksum):
                raise MigrationError(
                    f"{one.path.name} of {line} was changed after it was applied: restore the file and put the change "
                    "into a new one"
                )
    return missing


async def _suited(connection: Connection, one: Migration) -> Migration:
    """The file itself, or its sibling where the database has the line's tables already."""
    if one.existing is None:
        return one
    with translated(), _explained(one.existing):
        there = await connection.fetchval("select " + one.existing.directives["where:"])
    return one.existing if there else one


def _read(line: str, folder: Path) -> list[Migration]:
    """The files of a line by number, which are 1, 2, 3 ..."""
    if not folder.is_dir():
        raise MigrationError(f"the migrations of {line} are not there: {folder} is no folder")
    migrations: list[Migration] = []
    siblings: list[Migration] = []
    for path in sorted(folder.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise MigrationError(f"{path.name} of {line} must be called NNNN_name.sql")
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MigrationError(f"{path.name} of {line} is not UTF-8: {error}") from error
        if _CONTROL.search(text):
            raise MigrationError(f"{path.name} of {line} must not begin or end transactions: each file is one already")
        checksum = hashlib.sha256(content).hexdigest()
        one = Migration(line, int(match[1]), match[2], path, text, checksum)
        (siblings if match[3] else migrations).append(one)
    for expected, one in enumerate(migrations, 1):
        if one.number != expected:
            trouble = "stands twice" if one.number < expected else f"follows {expected - 1:04d}"
            raise MigrationError(
                f"the migrations of {line} must be numbered from 0001 without a gap: {one.path.name} {trouble}"
            )
    for one in siblings:
        _check_sibling(one, migrations)
        migrations[0] = replace(migrations[0], existing=one)
    return migrations


def _check_sibling(one: Migration, migrations: Sequence[Migration]) -> None:
    # what an earlier file of the same run makes would be there for a later one's condition as if others had made it
    if not migrations or one.number != 1 or one.name != f"{migrations[0].name}.existing":
        raise MigrationError(f"{one.path.name} of {one.line} must be named as the first file, 0001_name.existing.sql")
    if not one.directives.get("where:"):
        raise MigrationError(f'{one.path.name} of {one.line} must begin with "-- where: <condition>"')


async def _known(connection: Connection) -> Mapping[str, Mapping[int, str]]:
    """What the database has: the checksums by line and number."""
    if await connection.fetchval("select to_regclass('indexer.migration')") is None:
        return {}
    known: dict[str, dict[int, str]] = {}
    for line, number, checksum in await connection.fetch("select line, number, checksum from indexer.migration"):
        known.setdefault(line, {})[number] = checksum
    return known


async def _make_table(connection: Connection) -> None:
    # `if not exists` asks for the right to create all the same, so a role without it must not get there
    if await connection.fetchval("select to_regclass('indexer.migration')") is not None:
        return
    await connection.execute(
        """
        create schema if not exists indexer;
        create table indexer.migration (
            line       text not null,
            number     integer not null,
            name       text not null,
            checksum   text not null,
            applied_at timestamptz not null default now(),
            seconds    double precision not null,
            primary key (line, number)
        )
        """
    )


@asynccontextmanager
async def _alone(connection: Connection, timeout_seconds: float) -> AsyncIterator[None]:
    """Hold the database's migration lock.

    Asked for again and again instead of waited for: a statement that waits has a snapshot, for which another starter's
    `create index concurrently` waits in turn.
    """
    deadline = time.monotonic() + timeout_seconds
    while not await connection.fetchval("select pg_try_advisory_lock(hashtext('indexer.migration'), 0)"):
        if time.monotonic() > deadline:
            raise DatabaseUnavailable(
                f"another process has been migrating the database for {timeout_seconds:g} seconds: try again later"
            )
        await asyncio.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        if not connection.is_closed():
            await connection.execute("select pg_advisory_unlock(hashtext('indexer.migration'), 0)")


@asynccontextmanager
async def _unlimited(connection: Connection) -> AsyncIterator[None]:
    """Let statements take the time that they need: an index on a long history is not a query gone wrong."""
    before = await connection.fetchval("select current_setting('statement_timeout')")
    await connection.execute("set statement_timeout = 0")
    try:
        yield
    finally:
        if not connection.is_closed():
            await connection.fetchval("select set_config('statement_timeout', $1, false)", before)


async def _apply(connection: Connection, one: Migration, patience_seconds: float) -> Applied:
    began = time.monotonic()
    path = await connection.fetchval("select current_setting('search_path')")
    unless = one.directives.get("unless:")
    with _explained(one):
        if unless and await connection.fetchval("select " + unless):
            seconds = await _record(connection, one, began)
        elif one.in_transaction:
            seconds = await _apply_whole(connection, one, began, patience_seconds)
        else:
            await _drop_unfinished(connection, one)
            await connection.execute(one.text, timeout=_FOR_EVER_SECONDS)
            seconds = await _record(connection, one, began)
    # a file that sets it for itself must not move the tables of the next line
    await connection.fetchval("select set_config('search_path', $1, false)", path)
    return Applied(one.line, one.number, one.name, seconds)


async def _apply_whole(connection: Connection, one: Migration, began: float, patience_seconds: float) -> float:
    """One transaction; tried again where the file would rather give up a lock than have others wait behind it."""
    lock_timeout = one.directives.get("lock-timeout:")
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            async with connection.transaction():
                if lock_timeout:
                    await connection.fetchval("select set_config('lock_timeout', $1, true)", lock_timeout)
                await connection.execute(one.text, timeout=_FOR_EVER_SECONDS)
                return await _record(connection, one, began)
        except asyncpg.LockNotAvailableError as error:
            waited = time.monotonic() - began
            if not lock_timeout or waited > patience_seconds:
                raise
            log.get().warning(
                "migration waits for a lock", file=one.path.name, line=one.line, error=str(error),
                seconds=round(waited, 1),
            )  # fmt: skip
        await asyncio.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)


async def _drop_unfinished(connection: Connection, one: Migration) -> None:
    """Drop the index that an interrupted build of this file has left: `if not exists` would take it for a good one."""
    match = _INDEX.search(one.text)
    drop = match and await connection.fetchval(
        """
        select format('drop index concurrently %s', indexrelid::regclass)
        from pg_index where indexrelid = to_regclass($1) and not indisvalid
        """,
        match[1],
    )
    if drop:
        await connection.execute(drop, timeout=_FOR_EVER_SECONDS)


async def _record(connection: Connection, one: Migration, began: float) -> float:
    seconds = time.monotonic() - began
    await connection.execute(
        "insert into indexer.migration (line, number, name, checksum, seconds) values ($1, $2, $3, $4, $5)",
        one.line,
        one.number,
        one.name,
        one.checksum,
        seconds,
    )
    return seconds


@contextmanager
def _explained(one: Migration) -> Iterator[None]:
    """Turn what Postgres says about the file's SQL into one line that names file and line."""
    try:
        yield
    except asyncpg.PostgresError as error:
        if is_transient(error):
            raise
        raise MigrationError(f"{one.path.name}{_line_of(error, one)} of {one.line} failed: {_said(error)}") from error


def _line_of(error: asyncpg.PostgresError, one: Migration) -> str:
    position = getattr(error, "position", None)  # in characters, from 1; only where the parser knows
    return f", line {one.text.count(chr(10), 0, int(position) - 1) + 1}," if position else ""


def _said(error: asyncpg.PostgresError) -> str:
    left = (error.message, getattr(error, "detail", None), getattr(error, "hint", None))
    return "; ".join(" ".join(part.split()) for part in left if part)
