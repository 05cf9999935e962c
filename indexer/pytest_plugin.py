"""pytest fixtures for hooks: a migrated Postgres database for each test.

The server is TEST_DATABASE_URL's (of a role that may create databases), else an embedded one, else a container, where
testcontainers is installed. Which hooks' migrations the databases have says the ini option `indexer_hooks`, or for one
test (or module) the marker `@pytest.mark.indexer_hooks("shop.hooks:sales")`. The migrations run once, in a template of
which each test gets a copy.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pytest

try:  # async fixtures are whose plugin is there; anyio takes plain ones
    from pytest_asyncio import fixture as async_fixture
except ImportError:
    async_fixture = pytest.fixture  # type: ignore[assignment]

# pytest imports this file in every project where indexer is installed: what is slow waits until a fixture is used
if TYPE_CHECKING:
    from indexer.db import Connection
    from indexer.errors import IndexerError

T = TypeVar("T")
Lines = tuple[tuple[str, Path], ...]

# a test's data need not outlive it, and autovacuum would hold on to the template while it is copied
HASTY = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "autovacuum": "off",
    "max_wal_size": "128MB",  # the log may lie in memory
    "min_wal_size": "32MB",
}
# as the daemon connects: the embedded server's role is called indexer, so that "$user" would be the engine's own schema
SESSION = {"timezone": "UTC", "search_path": "public"}
OPTION = "indexer_hooks"
MEMORY = Path("/dev/shm")  # noqa: S108  what we make in it is private
MEMORY_BYTES = 4 * 1024**3  # a session takes some hundred MiB; a container's /dev/shm has 64 unless told otherwise


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(OPTION, "hooks whose migrations the test databases have, as module:attribute", "linelist", [])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{OPTION}(*places): hooks whose migrations this test's database has, as module:attribute"
    )


class Databases:
    """A server's databases for tests: empty ones, and copies of templates with the migrations that they name."""

    def __init__(self, server: str) -> None:
        self.server = server
        self._prefix = f"indexer_{os.getpid()}_{os.urandom(3).hex()}"
        self._numbers = itertools.count(1)
        self._templates: dict[Lines, str] = {}
        self._strategy: str | None = None

    @contextmanager
    def empty(self) -> Iterator[str]:
        """The address of a database without any tables, which is dropped at the end."""
        with self._made("template0") as name:
            yield with_database(self.server, name)

    @contextmanager
    def migrated(self, places: Sequence[str]) -> Iterator[str]:
        """The address of one with the tables of the engine and of these hooks."""
        with self._made(self._template(places)) as name:
            yield with_database(self.server, name)

    def _template(self, places: Sequence[str]) -> str:
        lines = _migration_lines(places)
        if lines not in self._templates:
            name = f"{self._prefix}_template_{len(self._templates)}"
            run(_execute(self.server, f"create database {name} template template0"))
            try:
                run(_migrate(with_database(self.server, name), lines))
            except BaseException:
                run(_execute(self.server, f"drop database {name} with (force)"))
                raise
            self._templates[lines] = name
        return self._templates[lines]

    @contextmanager
    def _made(self, template: str) -> Iterator[str]:
        name = f"{self._prefix}_{next(self._numbers)}"
        if self._strategy is None:
            self._strategy = run(_strategy(self.server))
        run(_execute(self.server, f"create database {name} template {template}{self._strategy}"))
        try:
            yield name
        finally:
            run(_execute(self.server, f"drop database {name} with (force)"))

    def drop_templates(self) -> None:
        run(_execute(self.server, *(f"drop database {name} with (force)" for name in self._templates.values())))


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run in a loop of its own that leaves the one of pytest-asyncio alone."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(coroutine)


def with_database(url: str, name: str) -> str:
    """The address `url` with another database."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/{name}{'?' + parts.query if parts.query else ''}"


def _migration_lines(places: Sequence[str]) -> Lines:
    from indexer.config import HooksSettings
    from indexer.migrations import SQL
    from indexer.registry import load_hooks, migration_lines

    hooks = load_hooks(HooksSettings(enabled=list(places)))
    return ("indexer", SQL), *migration_lines(hooks)


async def _execute(url: str, *statements: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(url, timeout=30)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def _strategy(url: str) -> str:
    """How `create database` is to copy: the server's default logs each page, and in memory copying files is faster."""
    import asyncpg

    connection = await asyncpg.connect(url, timeout=30)
    try:
        # nothing where we may not see it, and another way is known since version 15
        folder = await connection.fetchval("select setting from pg_settings where name = 'data_directory'")
        in_memory = folder is not None and MEMORY in Path(folder).parents
        return " strategy file_copy" if in_memory and connection.get_server_version().major >= 15 else ""
    finally:
        await connection.close()


async def _migrate(url: str, lines: Lines) -> None:
    import asyncpg

    from indexer.migrations import migrate

    connection = await asyncpg.connect(url, timeout=30, server_settings=SESSION)
    try:
        await migrate(connection, lines)
    finally:
        await connection.close()


def _memory() -> Path | None:
    """A folder in memory, where there is one with room: a database is hundreds of files, and each test makes one."""
    try:
        room = shutil.disk_usage(MEMORY).free
    except OSError:
        return None
    return MEMORY if room >= MEMORY_BYTES and os.access(MEMORY, os.W_OK | os.X_OK) else None


@contextmanager
def server() -> Iterator[str]:
    """The address of the server for tests, while the block runs."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    from indexer.embedded import EmbeddedPostgres
    from indexer.errors import IndexerError

    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="indexer-tests-", dir=_memory(), ignore_cleanup_errors=True)
        server = EmbeddedPostgres(Path(stack.enter_context(folder)), options=HASTY)
        try:
            run(server.start())
        except IndexerError as error:
            yield stack.enter_context(_container(error))
        else:
            stack.callback(lambda: run(server.stop()))
            yield server.dsn


@contextmanager
def _container(trouble: IndexerError) -> Iterator[str]:
    try:
        from testcontainers.community.postgres import PostgresContainer

        container = PostgresContainer("postgres:18", driver=None)
        container.with_command([word for name, value in HASTY.items() for word in ("-c", f"{name}={value}")])
        container.start()
    except Exception as error:
        message = f"no Postgres for the tests: {trouble}; no container either ({error}). Set TEST_DATABASE_URL."
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    try:
        yield container.get_connection_url()
    finally:
        container.stop()


@pytest.fixture(scope="session")
def indexer_databases() -> Iterator[Databases]:
    """The session's server; skips (in CI: fails) where none is to be had."""
    with server() as address:
        databases = Databases(address)
        try:
            yield databases
        finally:
            databases.drop_templates()


@pytest.fixture
def indexer_database_url(indexer_databases: Databases, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a migrated database that is this test's alone."""
    marker = request.node.get_closest_marker(OPTION)
    with indexer_databases.migrated(marker.args if marker else request.config.getini(OPTION)) as url:
        yield url


@async_fixture
async def indexer_connection(indexer_database_url: str) -> AsyncIterator[Connection]:
    """A connection to the test's own database, with the daemon's session settings."""
    import asyncpg

    opened = await asyncpg.connect(indexer_database_url, timeout=30, server_settings=SESSION)
    try:
        yield opened
    finally:
        await opened.close(timeout=5)
