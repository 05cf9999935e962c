"""Of several writers at most one commits: a split network, a foreign hand on the cursor; and a node with two heads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

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


class Line:
    """A line to Postgres that can be cut: what is sent then is lost, as in a network that splits, and no end hears."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self._host, self._port = query.get("host", parts.hostname), query.get("port", str(parts.port or 5432))
        self._user, self._path = parts.netloc.rpartition("@")[0], parts.path
        self.up = asyncio.Event()
        self.up.set()
        self.url = ""

    async def _ahead(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._host and self._host.startswith("/"):
            return await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
        return await asyncio.open_connection(self._host, int(self._port))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65_536):
                await self.up.wait()
                target.write(data)
                await target.drain()
            await self.up.wait()
        target.close()

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Line]:
        tasks: set[asyncio.Task[None]] = set()

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.up.wait()
            far_reader, far_writer = await self._ahead()
            tasks.add(asyncio.create_task(self._carry(reader, far_writer)))
            tasks.add(asyncio.create_task(self._carry(far_reader, writer)))

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = f"postgresql://{self._user}@127.0.0.1:{port}{self._path}"
        try:
            yield self
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def assert_right(connection: asyncpg.Connection, plays: list[Placed]) -> None:
    found, wanted = await tables(connection), expected(plays)
    for name, rows in wanted.items():
        assert found[name] == rows, name
    assert await gaps(connection) == 0


async def test_a_leader_that_is_cut_off_from_postgres(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    chain, plays = history(40)
    async with (
        FakeNode(chain) as node,
        Line(database_url).laid() as line,
        Daemon(tmp_path, settings(line.url, node.url)) as cut_off,
    ):
        await cut_off.reached(connection, 40)
        async with Daemon(tmp_path, settings(database_url, node.url)) as standby:
            await split(connection, chain, plays, line, cut_off, standby)


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


async def split(
    connection: asyncpg.Connection, chain: FakeChain, plays: list[Placed], line: Line, cut_off: Daemon, standby: Daemon
) -> None:
    """Cut the leader off, let the standby take over, and join them again."""
    await standby.logged("standing by")
    line.up.clear()
    cut = time.monotonic()
    plays = plays + mine(chain, Listeners(5).plays(6, 1_700_000_000))
    await standby.logged("leader acquired", seconds=15)
    assert time.monotonic() - cut < 10
    await standby.reached(connection, chain.head.number)
    since = len(cut_off.log)
    line.up.set()
    plays += mine(chain, Listeners(6).plays(6, 1_700_000_000))
    await standby.reached(connection, chain.head.number)

    async def stands_by() -> bool:
        return bool((await cut_off.get_json("readyz"))[1]["role"] == "standby")

    await until(stands_by, "the one that was cut off stands by")
    told = [one["event"] for one in cut_off.log[max(0, since - 5) :] if one["level"] == "warning"]
    assert "database unavailable" in told or "leadership lost" in told
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
