"""Of several writers at most one commits: two at once, a foreign hand on the cursor; and a node with two heads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from daemon import Daemon, Placed, expected, gaps, history, mine, settings, tables, until

from indexer import journal
from indexer.demochain import Listeners
from indexer.fakechain import FakeChain, FakeNode
from indexer.model import BlockRef

pytestmark = pytest.mark.timeout(120)


async def assert_right(connection: asyncpg.Connection, plays: list[Placed]) -> None:
    found, wanted = await tables(connection), expected(plays)
    for name, rows in wanted.items():
        assert found[name] == rows, name
    assert await gaps(connection) == 0


async def test_two_that_start_at_the_same_moment(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    chain, plays = history(40)
    async with FakeNode(chain) as node:
        values = settings(database_url, node.url)
        async with Daemon(tmp_path, values) as one, Daemon(tmp_path, values) as other:
            await until(lambda: at_hash(connection, chain), "the head is committed")

            async def both_ready() -> bool:
                roles = [(await each.get_json("readyz"))[1]["role"] for each in (one, other)]
                return sorted(roles) == ["leader", "standby"]

            await until(both_ready, "one leads and one stands by")
            await assert_right(connection, plays)


async def test_a_foreign_hand_on_the_cursor(connection: asyncpg.Connection, database_url: str, tmp_path: Path) -> None:
    chain, plays = history(40)
    async with FakeNode(chain) as node, Daemon(tmp_path, settings(database_url, node.url)) as daemon:
        await daemon.reached(connection, 40)
        row = await connection.fetchrow("select chain, number, hash from indexer.cursor")
        to = next(ref for ref in await journal.window(connection, row["chain"]) if ref.number == 37)
        async with connection.transaction():
            await journal.rewind(connection, row["chain"], BlockRef(row["number"], row["hash"]), to)
        # with nothing new on the chain the next heartbeat notices it
        await daemon.logged("leadership lost", seconds=10)
        await daemon.reached(connection, 40)
        plays += mine(chain, Listeners(5).plays(6, 1_700_000_000))
        await daemon.reached(connection, 41)
        await assert_right(connection, plays)


@asynccontextmanager
async def balancer(nodes: list[FakeNode]) -> AsyncIterator[str]:
    """A load balancer that asks each node for a while; take nodes out of the list to be rid of them."""
    async with aiohttp.ClientSession() as session:

        async def forward(request: web.Request) -> web.Response:
            node = nodes[int(time.monotonic() / 0.2) % len(nodes)]
            async with session.post(node.url, data=await request.read(), headers=request.headers) as answer:
                return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")

        application = web.Application()
        application.add_routes([web.post("/", forward)])
        runner = web.AppRunner(application)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
        finally:
            await runner.cleanup()


async def test_a_load_balancer_that_answers_from_two_heads(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    ours, plays = history(40)
    rival, _ = history(40)
    assert ours.head.hash == rival.head.hash
    async with FakeNode(ours) as one, FakeNode(rival) as other:
        nodes = [one, other]
        async with balancer(nodes) as url, Daemon(tmp_path, settings(database_url, url)) as daemon:
            await daemon.reached(connection, 40)
            for number in range(8):
                mine(rival, Listeners(100 + number).plays(3, 1_700_000_000))
                plays += mine(ours, Listeners(number).plays(3, 1_700_000_000))
                await asyncio.sleep(0.25)
            nodes.remove(other)  # the rival head dies out
            plays += mine(ours, Listeners(50).plays(3, 1_700_000_000))
            await daemon.reached(connection, 49)
            await until(lambda: at_hash(connection, ours), "the chain's own head is committed")
            await assert_right(connection, plays)
            assert daemon.find("reorg undone") is not None


async def at_hash(connection: asyncpg.Connection, chain: FakeChain) -> bool:
    return bool(await connection.fetchval("select hash from indexer.cursor") == chain.head.hash)
