"""The daemon end to end: real processes, a real Postgres, a real anvil, and what goes wrong at the worst moments."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest
from daemon import Daemon, at_once, expected, gaps, history, in_transaction, settings, tables

from indexer.fakechain import FakeNode


async def test_x(connection: asyncpg.Connection, database_url: str, tmp_path: Path) -> None:
    chain, plays = history(120)
    async with FakeNode(chain) as node, Daemon(tmp_path, settings(database_url, node.url)) as daemon:
        await daemon.reached(connection, 120)
        assert await tables(connection) == expected(plays)
        assert await gaps(connection) == 0
        assert await daemon.stop() == 0
        print(daemon.story)
