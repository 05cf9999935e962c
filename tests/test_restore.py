"""Backup and restore, as the handbook has them: pg_dump of a daemon's database, pg_restore into an empty one."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import asyncpg
import pytest
from daemon import Commands, Daemon, cursor, expected, gaps, history, mine, placed, played, settings, tables, toml

from indexer.binaries import find_binaries
from indexer.demochain import Listeners
from indexer.errors import ConfigError
from indexer.fakechain import FakeNode


def tool(name: str) -> str:
    """The newest of the client programs at hand: an older pg_dump refuses a newer server."""
    try:
        beside_server = find_binaries().folder / name
    except ConfigError:
        beside_server = Path("-")
    found = str(beside_server) if beside_server.exists() else shutil.which(name)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no {name} is at hand")
    return found


async def ran(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(*arguments, stderr=asyncio.subprocess.PIPE)
    _, said = await process.communicate()
    assert process.returncode == 0 and not said, said.decode()


async def test_a_restored_daemon_goes_on_and_undoes_a_fork_of_before(
    connection: asyncpg.Connection, database_url: str, empty_database_url: str, tmp_path: Path, commands: Commands
) -> None:
    chain, plays = history(30, final_lag=15)
    dump = str(tmp_path / "indexer.dump")
    async with FakeNode(chain) as node:
        async with Daemon(tmp_path, settings(database_url, node.url)) as daemon:
            await daemon.reached(connection, 30)
            # beside the running daemon: a dump is one snapshot, at a block's border
            await ran(tool("pg_dump"), "--format=custom", f"--file={dump}", database_url)
            assert await daemon.stop() == 0
        # by the time of the restore, the chain has other blocks from 26 on and is further on
        people, plays = Listeners(7), [one for one in plays if one.slot <= 25]
        others = [people.plays(3, 1_700_000_000) for _ in range(5)]
        fork = chain.fork(5, [[[played(one) for one in some]] for some in others])
        for block, some in zip(fork, others, strict=True):
            plays += placed(block, some)
        for _ in range(5):
            plays += mine(chain, people.plays(3, 1_700_000_000))

        await ran(tool("pg_restore"), "--exit-on-error", f"--dbname={empty_database_url}", dump)
        restored = settings(empty_database_url, node.url)
        (tmp_path / "indexer.toml").write_text(toml(restored))
        dry = await commands("migrate", "--dry-run", folder=tmp_path)
        assert "up to date" in dry.out
        there = await asyncpg.connect(empty_database_url)
        try:
            assert await cursor(there) == 30
            async with Daemon(tmp_path, restored) as daemon:
                await daemon.reached(there, 35)
                assert daemon.find("reorg undone", depth=5)
            assert await gaps(there) == 0
            found, wanted = await tables(there), expected(plays)
            assert found == wanted
            verified = await commands("verify", "aggregates", folder=tmp_path)
            assert verified.code == 0, verified.out
        finally:
            await there.close()
