"""One Postgres server a session, one database a test.

The server is TEST_DATABASE_URL's (a superuser's address, or of a role that may create databases), else an embedded one,
else a container. The migrations run once, in a template of which each test gets a copy.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import asyncpg
import pytest

from indexer.embedded import EmbeddedPostgres
from indexer.errors import IndexerError
from indexer.migrations import SQL, migrate

T = TypeVar("T")

# a test's data need not outlive it, and autovacuum would hold on to the template while it is copied
HASTY = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "autovacuum": "off",
}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Template:
    """A server's address, with a database in which to create others, and the name of the migrated template."""

    server: str
    name: str


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run in a loop of its own that leaves the one of pytest-asyncio alone."""
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        return runner.run(coroutine)


def with_database(url: str, name: str) -> str:
    """The address `url` with another database."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/{name}{'?' + parts.query if parts.query else ''}"


def migration_lines() -> list[tuple[str, Path]]:
    """The engine's line, and those of the bundled hooks that have files."""
    bundled = [("plays", SQL / "plays")]
    return [("indexer", SQL), *((name, folder) for name, folder in bundled if any(folder.glob("*.sql")))]


async def execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url, timeout=30)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


@contextmanager
def _server() -> Iterator[str]:
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="indexer-tests-", ignore_cleanup_errors=True) as folder:
        server = EmbeddedPostgres(Path(folder), options=HASTY)
        try:
            run(server.start())
        except IndexerError as error:
            trouble = error
        else:
            try:
                yield server.dsn
            finally:
                run(server.stop())
            return
    with _container(trouble) as url:
        yield url


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


# as the daemon connects: the embedded server's role is called indexer, so that "$user" would be the engine's own schema
SESSION = {"timezone": "UTC", "search_path": "public"}


async def _migrated(url: str) -> None:
    connection = await asyncpg.connect(url, timeout=30, server_settings=SESSION)
    try:
        await migrate(connection, migration_lines())
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def database_template() -> Iterator[Template]:
    """The session's server with a migrated database to copy; skips (in CI: fails) where no server is to be had."""
    with _server() as server:
        name = f"indexer_template_{os.getpid()}_{os.urandom(3).hex()}"
        run(execute(server, f"create database {name} template template0"))
        try:
            run(_migrated(with_database(server, name)))
            yield Template(server, name)
        finally:
            run(execute(server, f"drop database {name} with (force)"))


@pytest.fixture
def database_url(database_template: Template) -> Iterator[str]:
    """The address of a migrated database that is this test's alone."""
    server, template = database_template.server, database_template.name
    name = f"{template.replace('template', 'test')}_{next(_numbers)}"
    run(execute(server, f"create database {name} template {template}"))
    try:
        yield with_database(server, name)
    finally:
        run(execute(server, f"drop database {name} with (force)"))


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the test's own database, with the daemon's session settings."""
    opened = await asyncpg.connect(database_url, timeout=30, server_settings=SESSION)
    try:
        yield opened
    finally:
        await opened.close(timeout=5)


@pytest.fixture
def empty_database_url(database_template: Template) -> Iterator[str]:
    """The address of a database without any of our tables."""
    name = f"{database_template.name.replace('template', 'empty')}_{next(_numbers)}"
    run(execute(database_template.server, f"create database {name} template template0"))
    try:
        yield with_database(database_template.server, name)
    finally:
        run(execute(database_template.server, f"drop database {name} with (force)"))
