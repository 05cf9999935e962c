"""The daemon on Core nodes, as a process: it follows, survives a node's death, and stops at a hole or another chain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from corekit import chain_of, expected, plays
from daemon import HOOKS, Daemon, cursor, gaps

from indexer.fakechain import FakeCore, FakeCoreBlock, FakeCoreNode, recorded_shape

pytestmark = pytest.mark.timeout(120)


def daemon_settings(database_url: str, *nodes: FakeCoreNode, **chain: Any) -> dict[str, Any]:
    listed = [{"url": node.url, "name": f"n{n}"} for n, node in enumerate(nodes)]
    return {
        "database": {"url": database_url, "connect_timeout_seconds": 5},
        "chain": {"source": "core", "endpoints": listed, "poll_seconds": 0.1, **chain},
        "hooks": {"enabled": HOOKS}, "http": {"port": 0},
    }  # fmt: skip


async def listened(connection: asyncpg.Connection) -> list[tuple[Any, ...]]:
    rows = await connection.fetch("select slot, tx_hash, event_index, play_item_id, city from plays order by id")
    return [tuple(row) for row in rows]


def plays_of(blocks: Sequence[FakeCoreBlock]) -> list[tuple[Any, ...]]:
    return [
        (number, tx_hash, index, int(args["trackId"]), args["city"])
        for number, name, tx_hash, index, args in expected(blocks) if name == "Played"
    ]  # fmt: skip


async def test_the_daemon_follows_survives_a_dead_node_and_halts_at_a_hole(
    tmp_path: Path, database_url: str, connection: asyncpg.Connection
) -> None:
    chain = recorded_shape(9, 300)
    async with FakeCoreNode(chain) as one, FakeCoreNode(chain) as other:
        settings = daemon_settings(database_url, one, other)
        async with Daemon(tmp_path, settings) as daemon:
            await daemon.reached(connection, 300)
            for number in range(3):
                chain.mine(plays(number), plays(1, 1))
                await daemon.reached(connection, chain.height)
            await one.stop()
            chain.mine(plays(4))
            await daemon.reached(connection, chain.height)
            await one.start()
            # a block with a transaction that nobody can read, and one of plays after it
            chain.mine(plays(5), {"plays": {"plays": 7}})
            await daemon.reached(connection, chain.height)
            one.missing = other.missing = {chain.height + 1}
            for _ in range(3):
                chain.mine(plays(8))
            assert await daemon.ended() == 3
            hole = next(iter(one.missing))
            halted = await daemon.logged("halted")
        assert halted["block"] == hole and f"block {hole} is missing" in halted["error"]
        assert any(f"block {hole} is missing: the chain is at block" in line for line in daemon.other)
        assert await cursor(connection) == hole - 1
        wanted = plays_of(chain.blocks[: hole - 2])
        assert [(*row[:1], *row[2:]) for row in await listened(connection)] == [
            *((*row[:1], *row[2:]) for row in wanted), (hole - 1, 0, 5, "Köln")
        ]  # fmt: skip
        counts = await connection.fetch("select play_item_id, count from aggregate_plays")
        assert sum(count for _, count in counts) == len(wanted) + 1
        assert [tuple(row) for row in await connection.fetch("select number, event from indexer.quarantine")] == [
            (hole - 1, "Played")
        ]
        assert await gaps(connection) == 0
        one.missing = other.missing = set()
        async with Daemon(tmp_path, settings) as daemon:
            await daemon.reached(connection, chain.height)
            assert await daemon.stop() == 0
    rows = await listened(connection)
    assert rows[: len(wanted)] == wanted
    assert rows[len(wanted) + 1 :] == plays_of(chain.blocks[hole - 1 :])


@pytest.fixture
async def renamed(tmp_path: Path, database_url: str, connection: asyncpg.Connection) -> AsyncIterator[FakeCoreNode]:
    """A node whose chain was started anew under another id while a daemon followed it, which has ended for that."""
    chain, anew = chain_of([1] * 20), FakeCore("core-next")
    anew.mine()
    async with FakeCoreNode(chain) as node, Daemon(tmp_path, daemon_settings(database_url, node)) as daemon:
        await daemon.reached(connection, 20)
        node.chain = anew
        assert await daemon.ended() == 2
        text = "this chain is core-test, but its nodes answer for core-next now"
        assert any(text in line and "`indexer chain accept core-next`" in line for line in daemon.other), daemon.story
        yield node


async def test_the_daemon_stops_at_a_changed_chain_and_does_not_start_on_it(
    tmp_path: Path, database_url: str, renamed: FakeCoreNode
) -> None:
    for chain_id in ({}, {"chain_id": "core-test"}):
        async with Daemon(tmp_path, daemon_settings(database_url, renamed, **chain_id)) as daemon:
            assert await daemon.ended() == 2
        assert any(
            "core-test" in line and "core-next" in line and "`indexer chain accept core-next`" in line
            for line in daemon.other
        ), daemon.story
