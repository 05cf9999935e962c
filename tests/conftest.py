"""The databases of the tests: those of our own pytest plugin, under shorter names."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import asyncpg
import pytest
import pytest_asyncio
import structlog
from daemon import Commands
from hypothesis import settings
from privacy import overheard, personal

from indexer import metrics
from indexer.pytest_plugin import HASTY, Databases

if TYPE_CHECKING:
    from playwright.async_api import Browser

__all__ = ["HASTY"]

# how long an example takes says how busy the machine is
settings.register_profile("calm", deadline=None)
settings.load_profile("calm")

# Some machines forbid Python to keep what it compiled. The hundreds of processes that the tests start would each
# compile every library anew, for more than a second each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules that start processes first: they take longest and mostly wait, and at the end all would wait."""
    starters = {"Daemon", "EmbeddedPostgres", "INDEXER", "command"}
    items.sort(key=lambda item: starters.isdisjoint(vars(getattr(item, "module", None) or object)))


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """One test's setting of the log is none of the next one's."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Whatever a test is about: no token, e-mail or name gets into the log or into an error of the API."""
    with overheard(monkeypatch) as heard:
        yield heard
    found = personal("".join(heard))
    assert not found, f"said aloud: {found[:3]}"


@pytest.fixture(autouse=True, scope="session")
def _nothing_personal_in_metrics() -> Iterator[None]:
    """Nor, at the end of all of them, into the metrics."""
    yield
    assert not personal(metrics.exposition().decode())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """A real Chromium for the tests of one module, which share the module's loop."""
    from browserkit import chromium  # slow to import, and for few

    async with chromium() as started:
        yield started


@pytest.fixture
def database_url(indexer_database_url: str) -> str:
    """The address of a database of this test's alone, with the migrations that pyproject.toml names."""
    return indexer_database_url


@pytest.fixture
def connection(indexer_connection: asyncpg.Connection) -> asyncpg.Connection:
    return indexer_connection


@pytest.fixture
def empty_database_url(indexer_databases: Databases) -> Iterator[str]:
    """The address of a database without any of our tables."""
    with indexer_databases.empty() as url:
        yield url


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Runs commands of `indexer` in processes of their own, without the second that their imports take."""
    running = Commands(tmp_path_factory.mktemp("commands"))
    try:
        yield running
    finally:
        running.close()
