"""Migrations: applied once whoever starts, refused when the files and the database disagree, whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from indexer import migrations
from indexer.db import Connection
from indexer.errors import DatabaseUnavailable, MigrationError
from indexer.migrations import SQL, Applied, migrate, pending

TABLES = "select array_agg(relname::text order by relname) from pg_class where relkind = 'r' and relname ~ '^made_'"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sql"
    path.mkdir()
    return path


@pytest.fixture
async def empty(empty_database_url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(empty_database_url, timeout=30)
    yield connection
    await connection.close(timeout=5)


def write(folder: Path, **files: str) -> list[tuple[str, Path]]:
    """Write `_0001_name="text"` as 0001_name.sql and return the folder as the line `made`; `__` is a dot."""
    for name, text in files.items():
        (folder / f"{name.removeprefix('_').replace('__', '.')}.sql").write_text(text)
    return [("made", folder)]


async def test_the_project_s_own_files_apply(empty: Connection) -> None:
    done = await migrate(empty, [("indexer", SQL)])
    assert [one.number for one in done] == list(range(1, len(list(SQL.glob("*.sql"))) + 1))
    assert await migrate(empty, [("indexer", SQL)]) == []


async def test_applies_in_order_once_and_several_statements(empty: Connection, folder: Path) -> None:
    lines = write(
        folder,
        _0002_body="create function made() returns int language plpgsql as $$ begin return 2; end $$; select made();",
        _0001_tables="create table made_a (n int);\n-- a comment; with a semicolon\ncreate table made_b (n int);\n",
    )
    done = await migrate(empty, lines)
    assert [(one.line, one.number, one.name) for one in done] == [("made", 1, "tables"), ("made", 2, "body")]
    assert all(0 < one.seconds < 10 for one in done)
    assert await empty.fetchval(TABLES) == ["made_a", "made_b"]
    rows = await empty.fetch("select line, number, name, length(checksum) from indexer.migration order by number")
    assert [tuple(row) for row in rows] == [("made", 1, "tables", 64), ("made", 2, "body", 64)]
    assert await migrate(empty, lines) == []

    write(folder, _0003_more="create table made_c (n int)")
    assert [one.number for one in await pending(empty, lines)] == [3]
    assert [one.number for one in await migrate(empty, lines)] == [3]


async def test_lines_are_apart_and_land_in_the_search_path(empty: Connection, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "0001_a.sql").write_text("set search_path to pg_catalog; create table public.made_a (n int)")
    (tmp_path / "two" / "0001_b.sql").write_text("create table made_b (n int)")
    await empty.execute("create schema shadow; set search_path to shadow")
    done = await migrate(empty, [("one", tmp_path / "one"), ("two", tmp_path / "two")])
    assert [(one.line, one.number) for one in done] == [("one", 1), ("two", 1)]
    assert await empty.fetchval("select to_regclass('shadow.made_b') is not null")
    assert await empty.fetchval("show search_path") == "shadow"


async def test_dry_run_changes_nothing(empty: Connection, folder: Path) -> None:
    lines = write(folder, _0001_a="create table made_a (n int)", _0002_b="create table made_b (n int)")
    assert await migrate(empty, lines, dry_run=True) == [Applied("made", 1, "a", 0.0), Applied("made", 2, "b", 0.0)]
    assert await empty.fetchval(TABLES) is None
    assert await empty.fetchval("select to_regnamespace('indexer')") is None
    await migrate(empty, lines)
    assert await migrate(empty, lines, dry_run=True) == []


async def test_three_starters_apply_once_with_an_index_built_concurrently(
    empty: Connection, empty_database_url: str, folder: Path
) -> None:
    lines = write(
        folder,
        _0001_table="create table made_a as select generate_series(1, 50000) as n; select pg_sleep(0.3)",
        _0002_index="-- no-transaction\ncreate index concurrently if not exists made_index on made_a (n)",
        _0003_table="create table made_b (n int)",
    )

    async def start() -> list[Applied]:
        connection = await asyncpg.connect(empty_database_url, timeout=30)
        try:
            return await migrate(connection, lines, timeout_seconds=30)
        finally:
            await connection.close()

    done = await asyncio.wait_for(asyncio.gather(start(), start(), start()), 60)
    assert sorted(len(one) for one in done) == [0, 0, 3]
    assert await empty.fetchval("select indisvalid from pg_index where indexrelid = 'made_index'::regclass")
    assert await empty.fetchval("select count(*) from pg_locks where locktype = 'advisory'") == 0


async def test_waits_only_so_long_for_another_starter(
    empty: Connection, empty_database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "POLL_SECONDS", 0.01)
    lines = write(folder, _0001_a="create table made_a (n int)")
    other = await asyncpg.connect(empty_database_url)
    await other.execute("select pg_advisory_lock(hashtext('indexer.migration'), 0)")
    with pytest.raises(DatabaseUnavailable, match="another process has been migrating"):
        await migrate(empty, lines, timeout_seconds=0.1)
    await other.close()
    assert len(await migrate(empty, lines)) == 1


async def test_a_changed_file_is_named(empty: Connection, folder: Path) -> None:
    lines = write(folder, _0001_a="create table made_a (n int)")
    await migrate(empty, lines)
    write(folder, _0001_a="create table made_a (n bigint)", _0002_b="create table made_b (n int)")
    with pytest.raises(MigrationError, match=r"0001_a\.sql of made was changed after it was applied"):
        await migrate(empty, lines)
    with pytest.raises(MigrationError, match="was changed"):
        await migrate(empty, lines, dry_run=True)
    assert await empty.fetchval(TABLES) == ["made_a"]


async def test_a_database_that_is_newer(empty: Connection, folder: Path) -> None:
    lines = write(folder, _0001_a="select 1", _0002_b="select 2")
    await migrate(empty, lines)
    (folder / "0002_b.sql").unlink()
    with pytest.raises(MigrationError, match="database is newer than this indexer: it has made 0002"):
        await pending(empty, lines)
    (folder / "0001_a.sql").unlink()
    with pytest.raises(MigrationError, match="database is newer"):
        await migrate(empty, lines)
    assert await migrate(empty, []) == []  # a line that is no longer configured is nobody's business


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("0001_a", "0003_c"), r"without a gap: 0003_c\.sql follows 0001"),
        (("0002_b",), r"without a gap: 0002_b\.sql follows 0000"),
        (("0000_z", "0001_a"), r"without a gap: 0000_z\.sql"),
        (("0001_a", "0001_b"), r"0001_b\.sql stands twice"),
        (("0001_a", "2_b"), r"2_b\.sql of made must be called NNNN_name\.sql"),
    ],
)
async def test_wrong_names(empty: Connection, folder: Path, names: tuple[str, ...], message: str) -> None:
    for name in names:
        (folder / f"{name}.sql").write_text("create table if not exists made_a (n int)")
    with pytest.raises(MigrationError, match=message):
        await migrate(empty, [("made", folder)])
    assert await empty.fetchval(TABLES) is None


async def test_wrong_files(empty: Connection, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="of other are not there"):
        await migrate(empty, [("other", tmp_path / "missing")])
    for text in ("create table made_a (n int);\ncommit;", "BEGIN;\nselect 1", "start  transaction;"):
        with pytest.raises(MigrationError, match="must not begin or end transactions"):
            await migrate(empty, write(folder, _0001_a=text))
    (folder / "0001_a.sql").write_bytes(b"select '\xff'")
    with pytest.raises(MigrationError, match="not UTF-8"):
        await migrate(empty, [("made", folder)])
    assert await empty.fetchval(TABLES) is None


async def test_a_failing_file_leaves_nothing_and_says_where(empty: Connection, folder: Path) -> None:
    lines = write(
        folder,
        _0001_a="create table made_a (n int)",
        _0002_b="create table made_b (n int);\n\nselect 'ä', wrong\n  from made_b;\n",
        _0003_c="create table made_c (n int)",
    )
    with pytest.raises(MigrationError) as caught:
        await migrate(empty, lines)
    assert str(caught.value) == '0002_b.sql, line 3, of made failed: column "wrong" does not exist'
    assert await empty.fetchval(TABLES) == ["made_a"]
    assert [one.number for one in await pending(empty, lines)] == [2, 3]
    assert not empty.is_in_transaction()
    assert await empty.fetchval("select count(*) from pg_locks where locktype = 'advisory'") == 0

    write(folder, _0002_b="create table made_b (n int);\ninsert into made_b select 1 / 0")  # no position to show
    with pytest.raises(MigrationError, match=r"^0002_b\.sql of made failed: division by zero$"):
        await migrate(empty, lines)
    write(folder, _0002_b="create table made_b (n int)")
    assert [one.number for one in await migrate(empty, lines)] == [2, 3]


async def test_no_transaction_takes_one_statement(empty: Connection, folder: Path) -> None:
    two = "-- no-transaction\ncreate table made_a (n int); create index concurrently on made_a (n)"
    with pytest.raises(MigrationError, match="cannot"):
        await migrate(empty, write(folder, _0001_a=two))
    assert await empty.fetchval(TABLES) is None


async def test_a_lock_that_is_not_to_be_had_is_temporary(
    empty: Connection, empty_database_url: str, folder: Path
) -> None:
    lines = write(folder, _0001_a="create table made_a (n int)", _0002_b="alter table made_a add m int")
    await migrate(empty, [("made", folder)], dry_run=True)
    (folder / "0002_b.sql").rename(folder / "later")
    await migrate(empty, lines)
    (folder / "later").rename(folder / "0002_b.sql")
    other = await asyncpg.connect(empty_database_url)
    await other.execute("begin; lock table made_a")
    await empty.execute("set lock_timeout = '50ms'")
    with pytest.raises(DatabaseUnavailable, match="lock timeout"):
        await migrate(empty, lines)
    await other.close()
    assert [one.number for one in await migrate(empty, lines)] == [2]


async def test_limits_of_the_connection_do_not_stop_a_long_file(empty_database_url: str, folder: Path) -> None:
    connection = await asyncpg.connect(
        empty_database_url, command_timeout=0.5, server_settings={"statement_timeout": "400"}
    )
    lines = write(folder, _0001_a="select pg_sleep(0.8)", _0002_b="-- no-transaction\nselect pg_sleep(0.8)")
    assert len(await migrate(connection, lines)) == 2
    assert await connection.fetchval("show statement_timeout") == "400ms"
    await connection.close()


async def test_a_lost_connection_is_temporary(empty_database_url: str, empty: Connection, folder: Path) -> None:
    lost = await asyncpg.connect(empty_database_url)
    lines = write(folder, _0001_a="select pg_terminate_backend(pg_backend_pid())")
    with pytest.raises(DatabaseUnavailable):
        await migrate(lost, lines)
    with pytest.raises(DatabaseUnavailable):
        await pending(lost, lines)


async def test_a_role_that_may_not_create_schemas(empty: Connection, empty_database_url: str, folder: Path) -> None:
    """Such a role can start when all is applied: nothing is asked of it."""
    lines = write(folder, _0001_a="create table made_a (n int)")
    await migrate(empty, lines)
    await empty.execute(
        "create role made_reader; grant usage on schema indexer to made_reader;"
        "grant select on indexer.migration to made_reader; set role made_reader"
    )
    try:
        assert await migrate(empty, lines) == []
    finally:
        await empty.execute("reset role; drop owned by made_reader; drop role made_reader")


# -- directives, and tables that are there before us -------------------------------------------------------------------

EXISTING = "-- where: to_regclass('made_a') is not null\nalter table made_a add m int"


async def test_unless_there_is_nothing_to_do(empty: Connection, folder: Path) -> None:
    lines = write(
        folder,
        _0001_a="-- unless: to_regclass('made_a') is null\ncreate table made_a (n int)",
        _0002_b="-- no-transaction\n-- unless: to_regclass('made_a') is not null\ncreate table made_b (n int)",
        _0003_c="-- prose comes first\n-- unless: true\ncreate table made_c (n int)",
    )
    assert [one.number for one in await migrate(empty, lines)] == [1, 2, 3]
    assert await empty.fetchval(TABLES) == ["made_b", "made_c"]
    assert await pending(empty, lines) == []

    write(folder, _0004_d="-- unless: wrong\nselect 1")
    with pytest.raises(MigrationError, match=r'0004_d\.sql, line 1, of made failed: column "wrong"'):
        await migrate(empty, lines)


@pytest.mark.parametrize("there", [False, True])
async def test_a_sibling_for_tables_that_are_there(empty: Connection, folder: Path, there: bool) -> None:
    lines = write(
        folder,
        _0001_a="create table made_a (n int, m int)",
        _0001_a__existing=EXISTING,
        _0002_b="create table made_b (n int)",
    )
    if there:
        await empty.execute("create table made_a (n int)")
    name = "a.existing" if there else "a"
    assert [one.name for one in await migrate(empty, lines, dry_run=True)] == [name, "b"]
    assert [one.name for one in await migrate(empty, lines)] == [name, "b"]
    assert await empty.fetch("select n, m from made_a") == []
    assert await empty.fetchval("select name from indexer.migration where number = 1") == name
    assert await migrate(empty, lines) == []  # though the tables are there now

    write(folder, **{"_0001_a__existing" if there else "_0001_a": f"{EXISTING} -- another one"})
    with pytest.raises(MigrationError, match="was changed after it was applied"):
        await migrate(empty, lines)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"_0001_a__existing": EXISTING}, r"0001_a\.existing\.sql of made must be named as the first file"),
        ({"_0001_a": "", "_0001_b__existing": EXISTING}, r"0001_b\.existing\.sql of made must be named as"),
        ({"_0001_a": "", "_0002_b": "", "_0002_b__existing": EXISTING}, r"0002_b\.existing\.sql of made must be named"),
        ({"_0001_a": "", "_0001_a__existing": "select 1"}, r'must begin with "-- where: <condition>"'),
        ({"_0001_a": "", "_0001_a__other": EXISTING}, r"0001_a\.other\.sql of made must be called NNNN_name\.sql"),
        ({"_0001_a": "", "_0001_a__existing": "-- where: wrong"}, r"0001_a\.existing\.sql, line 1, of made failed"),
    ],
)
async def test_wrong_siblings(empty: Connection, folder: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(MigrationError, match=message):
        await migrate(empty, write(folder, **files))


async def test_a_lock_timeout_is_tried_again(
    empty: Connection, empty_database_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody queues behind us for longer than the timeout; what else the file did is rolled back each time."""
    monkeypatch.setattr(migrations, "_LONGEST_PAUSE_SECONDS", 0.1)
    await empty.execute("create table made_a (n int)")
    lines = write(folder, _0001_b="-- lock-timeout: 50ms\ncreate table made_b (n int);\nalter table made_a add m int")
    other = await asyncpg.connect(empty_database_url)
    await other.execute("begin; select from made_a")
    with pytest.raises(DatabaseUnavailable, match="lock timeout"):
        await migrate(empty, lines, timeout_seconds=0.3)
    assert await empty.fetchval(TABLES) == ["made_a"]

    migrating = asyncio.create_task(migrate(empty, lines))
    reader = await asyncpg.connect(empty_database_url)
    for _ in range(20):
        await asyncio.wait_for(reader.execute("select from made_a"), 5)
        await asyncio.sleep(0.02)
    assert not migrating.done()
    await other.execute("commit")
    assert [one.number for one in await migrating] == [1]
    assert await empty.fetchval("show lock_timeout") == "0"
    for session in (other, reader):
        await session.close()


async def test_an_invalid_index_is_dropped_before_it_is_built(empty: Connection, folder: Path) -> None:
    await empty.execute("create table made_a as select 1 as n from generate_series(1, 2)")
    with pytest.raises(asyncpg.UniqueViolationError):
        await empty.execute("create unique index concurrently made_index on made_a (n)")
    lines = write(
        folder, _0001_a="-- no-transaction\n-- it is\ncreate index concurrently if not exists made_index on made_a (n)"
    )
    await migrate(empty, lines)
    assert await empty.fetchval("select indisvalid from pg_index where indexrelid = 'made_index'::regclass")
