"""A Core chain through the daemon and all bundled hooks, killed on the way, against oracles that go play by play."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import oracle_listeners
import pytest
from corekit import RECORDING, expected
from daemon import Daemon, cursor, until
from oracle_challenges import World, dump
from oracle_listeners import ListenersOracle

from indexer.fakechain import FakeCore, FakeCoreNode, recorded_shape
from indexer.model import Block, Event

pytestmark = pytest.mark.timeout(150)

NAMES = ("entities", "plays", "aggregates", "milestones", "listeners", "challenges")
HOOKS = [f"hooks.{name}:{name}" for name in NAMES]
TIERS = (("p1", 1, 250), ("p2", 250, 1_000), ("p3", 1_000, 10_000))
EVERYTHING = 10_000

Dump = dict[str, list[tuple[Any, ...]]]


def blocks_of(chain: FakeCore) -> list[Block]:
    """The chain's blocks as a source must give them, read from their JSON without the source's code."""
    found = {height: list(events) for height, events in itertools.groupby(expected(chain.blocks), lambda one: one[0])}
    return [
        Block(
            one.height, one.hash, None, one.timestamp,
            tuple(Event(index, name, args, "", tx) for _, name, tx, index, args in found.get(one.height, ())),
        )
        for one in chain.blocks
    ]  # fmt: skip


def wanted(chain: FakeCore, number: int) -> Dump:
    """All tables as they must be; `number` is what the database calls the chain."""
    world = World(number, TIERS).apply(blocks_of(chain))
    listeners = ListenersOracle().all((user, track, at) for user, _, track, at, *_ in world.plays.plays.values())
    return world.dump() | listeners.dump()


@asynccontextmanager
async def in_the_middle_of_a_span(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """Holds a lock on the last table that a span writes, and enters once the daemon waits for it."""
    async with connection.transaction():
        await connection.execute("lock table challenge_listen_streak in share mode")
        waiting = "select exists (select from pg_locks where not granted and database = (select oid from pg_database"
        waiting += " where datname = current_database()))"
        await until(lambda: connection.fetchval(waiting), "a span that is being written")
        yield


@pytest.fixture(scope="module", params=["recording", "generated"])
def chain(request: pytest.FixtureRequest) -> FakeCore:
    if request.param == "generated":
        return recorded_shape(20, 200)
    if not RECORDING.is_file():
        pytest.skip("the recording is not beside this checkout; blocks of the same shape are tested in any case")
    with RECORDING.open("rb") as lines:
        return FakeCore.load(lines)


@pytest.mark.parametrize("size", [1, 7, 100, EVERYTHING])
async def test_all_tables_are_those_of_the_oracles_whatever_the_spans_and_the_deaths(
    tmp_path: Path, database_url: str, connection: asyncpg.Connection, chain: FakeCore, size: int
) -> None:
    await connection.execute("update challenges set active = true where id = 'e'")
    async with FakeCoreNode(chain) as node:
        settings = {
            "database": {"url": database_url, "connect_timeout_seconds": 5},
            "chain": {"source": "core", "endpoints": [{"url": node.url, "name": "node"}], "poll_seconds": 0.1},
            "span": {"max_blocks": size, "max_events": 1_000_000 if size == EVERYTHING else 5_000},
            "hooks": {"enabled": HOOKS}, "http": {"port": 0},
        }  # fmt: skip
        for part in (0.2, 0.6)[: 2 if size == 7 else 1]:
            async with Daemon(tmp_path, settings) as daemon:
                if size != EVERYTHING:
                    await daemon.reached(connection, chain.first + int(part * len(chain.blocks)))
                async with in_the_middle_of_a_span(connection):
                    await daemon.kill()
        async with Daemon(tmp_path, settings) as daemon:
            await daemon.reached(connection, chain.height)
    assert await cursor(connection) == chain.height
    number = await connection.fetchval("select id from indexer.chain")
    found: Dump = await dump(connection) | await oracle_listeners.dump(connection)
    for table, rows in wanted(chain, number).items():
        assert found[table] == rows, table
    if chain.chain_id == "audius-mainnet-alpha-beta":
        assert len(found["plays"]) == 1641
