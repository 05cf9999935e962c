"""Jobs that blocks order: they come out with the block, once it is final, and not at all if it is undone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import Daemon, played, settings, until
from replaykit import chain_of, world

from indexer import Block, NewJob, Tx, hook
from indexer.config import HookSettings
from indexer.demochain import Listeners
from indexer.errors import HookFailed
from indexer.fakechain import FakeChain, FakeLog, FakeNode
from indexer.registry import Registered
from indexer.testing import Bench, make_blocks, one_span, one_span_a_block

HOOK = '''
from indexer import hook

@hook("orders", listens=["Played"], tables=[])
async def orders(tx, blocks):
    for block in blocks:
        for event in block.events:
            await tx.enqueue("test.play", {"block": block.number, "tx": event.tx_hash.hex(), "index": event.index},
                             key=f"{block.number}/{event.index}")
'''


@hook("orders", listens=["Played"], tables=[])
async def orders(tx: Tx, blocks: Sequence[Block]) -> None:
    for block in blocks:
        jobs = [NewJob({"block": block.number}, key=f"{block.number}/{event.index}") for event in block.events]
        await tx.enqueue_many("test.play", jobs)


@hook("failing", listens=["Played"], tables=[])
async def failing(tx: Tx, blocks: Sequence[Block]) -> None:
    await tx.enqueue("test.failing", {})
    raise ValueError("after it has ordered")


async def queued(connection: asyncpg.Connection) -> list[int]:
    """The blocks whose jobs can run."""
    rows = await connection.fetch("select payload from indexer.pgqueuer order by id")
    return [json.loads(row["payload"])["block"] for row in rows]


async def waiting(connection: asyncpg.Connection) -> list[int]:
    rows = await connection.fetch("select number from indexer.waiting_job order by id")
    return [row["number"] for row in rows]


def blocks(numbers: int = 5) -> list[Block]:
    return make_blocks(*[[("Played", {})]] * numbers)


class TestPipeline:
    async def test_final_blocks_order_at_once(self, connection: asyncpg.Connection) -> None:
        bench = await Bench.open(connection, [orders])
        await bench.apply([one_span(blocks(), final=True)])
        assert await queued(connection) == [1, 2, 3, 4, 5]
        assert await waiting(connection) == []

    async def test_others_wait_for_finality(self, connection: asyncpg.Connection) -> None:
        bench = await Bench.open(connection, [orders])
        spans = one_span_a_block(blocks(), final=False)
        await bench.apply(spans[:3])
        assert (await queued(connection), await waiting(connection)) == ([], [1, 2, 3])
        await bench.apply(spans[3:4], final=2)
        assert (await queued(connection), await waiting(connection)) == ([1, 2], [3, 4])
        await bench.apply(spans[4:], final=5)
        assert (await queued(connection), await waiting(connection)) == ([1, 2, 3, 4, 5], [])

    async def test_undone_blocks_leave_none(self, connection: asyncpg.Connection) -> None:
        bench = await Bench.open(connection, [orders])
        await bench.apply(one_span_a_block(blocks(), final=False))
        await bench.undo(2)
        assert (await queued(connection), await waiting(connection)) == ([], [1, 2])
        await bench.undo(0)
        assert await waiting(connection) == []

    async def test_a_hook_that_fails_leaves_none(self, connection: asyncpg.Connection) -> None:
        bench = await Bench.open(connection, [orders, failing])
        for final in (True, False):
            with pytest.raises(HookFailed):
                await bench.apply([one_span(blocks(1), final=final)])
        assert (await queued(connection), await waiting(connection)) == ([], [])

    async def test_a_hook_that_is_skipped_leaves_none(self, connection: asyncpg.Connection) -> None:
        bench = await Bench.open(connection, [orders, Registered(failing, HookSettings(on_error="skip"))])
        await bench.apply([one_span(blocks(1), final=True)])
        assert await queued(connection) == [1]


class TestReplay:
    async def test_a_rehearsal_leaves_nothing(self, database_url: str, connection: asyncpg.Connection) -> None:
        async with world(database_url, connection, chain_of(1, 20, final_lag=5)) as here:
            here.hooks = [orders]
            await here.follow()
            before = await queued(connection)
            waits = await waiting(connection)
            await connection.execute("delete from indexer.pgqueuer")
            async with here.replayer() as replayer:
                await replayer.rehearse(await replayer.plan(1, 10, ["orders"], force=True))
            assert await queued(connection) == []
            assert await waiting(connection) == waits
            assert before

    async def test_a_replay_by_force_orders_again_and_a_key_bears_it(
        self, database_url: str, connection: asyncpg.Connection
    ) -> None:
        async with world(database_url, connection, chain_of(1, 20, final_lag=5)) as here:
            here.hooks = [orders]
            await here.follow()
            before, waits = await queued(connection), await waiting(connection)
            async with here.replayer() as replayer:
                async for _ in replayer.replay(await replayer.plan(0, 20, ["orders"], force=True)):
                    pass
            assert await queued(connection) == before
            assert await waiting(connection) == waits


def canonical(chain: FakeChain) -> list[dict[str, Any]]:
    """What the hook orders for the chain as it is now, in order."""
    return [
        {"block": block.number, "tx": entry["transactionHash"][2:], "index": int(entry["logIndex"], 16)}
        for block in chain.blocks
        for entry in block.logs
    ]


class TestDaemon:
    async def test_forks_and_finality(self, tmp_path: Path, database_url: str, connection: asyncpg.Connection) -> None:
        """What comes out is the canonical chain's, each block's once, and nothing of a fork's."""
        (tmp_path / "ordering.py").write_text(HOOK)
        chain, people = FakeChain(block_seconds=1, final_lag=4), Listeners(1)

        def txs() -> list[list[FakeLog]]:
            return [[played(play) for play in people.plays(2, chain.head.timestamp + 1)]]

        async def caught_up() -> bool:
            return bool(await connection.fetchval("select hash from indexer.cursor") == chain.head.hash)

        async def released() -> bool:
            oldest = await connection.fetchval("select min(number) from indexer.waiting_job")
            return bool(oldest > chain.head.number - 4)

        for _ in range(6):
            chain.mine(*txs())
        async with FakeNode(chain) as node:
            values = settings(database_url, node.url, hooks={"enabled": ["ordering:orders"]})
            async with Daemon(tmp_path, values, env={"PYTHONPATH": str(tmp_path)}) as daemon:
                for depth in (1, 3, 2, 3):
                    await until(caught_up, f"our cursor is the chain's head\n{daemon.story}")
                    assert await connection.fetchval("select count(*) from indexer.waiting_job")
                    chain.fork(depth, [txs() for _ in range(depth + 1)])
                await until(caught_up, "our cursor is the chain's head")
                # the node is asked for its final block now and then only: the head need not move for it
                await until(released, "what is final is released")
                found = await connection.fetch("select payload from indexer.pgqueuer order by id")
                waits = await connection.fetch("select payload from indexer.waiting_job order by id")
        final = chain.head.number - 4
        wanted = canonical(chain)
        assert [json.loads(row["payload"]) for row in found] == [one for one in wanted if one["block"] <= final]
        assert [json.loads(row["payload"]) for row in waits] == [one for one in wanted if one["block"] > final]
