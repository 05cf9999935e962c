"""The daemon end to end: real processes, a real Postgres, a real anvil, and trouble at the worst moments."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import asyncpg
import pytest
from asyncpg.transaction import Transaction
from conftest import HASTY
from daemon import (
    ABI,
    HOOKS,
    Daemon,
    Placed,
    Settings,
    command,
    cursor,
    dawdle,
    expected,
    gaps,
    history,
    in_transaction,
    mine,
    settings,
    tables,
    toml,
    until,
)

from indexer import app
from indexer.config import Settings as Parsed
from indexer.demochain import PLAY_REGISTRY, Listeners
from indexer.devchain import Anvil, DevClient, encode_call, find_anvil, load_artifact
from indexer.embedded import EmbeddedPostgres
from indexer.fakechain import FakeChain, FakeNode, slow

pytestmark = pytest.mark.timeout(120)

needs_anvil = pytest.mark.skipif(find_anvil() is None, reason="no anvil is at hand: make anvil")
SLIM = Path(__file__).parent / "contracts" / "slim_registry.json"


def catching_up(database_url: str, node_url: str) -> Settings:
    """Settings that make many transactions of a short chain."""
    return settings(database_url, node_url, span={"max_events": 10, "max_blocks": 3})


def mine_many(chain: FakeChain, blocks: int = 30) -> list[Placed]:
    """Work for a while, at the head of the chain."""
    people = Listeners(chain.head.number)
    return [one for _ in range(blocks) for one in mine(chain, people.plays(4, 1_700_000_000))]


async def assert_right(connection: asyncpg.Connection, plays: list[Placed]) -> None:
    """Every row of every table, and no hole."""
    found, wanted = await tables(connection), expected(plays)
    for name, rows in wanted.items():
        assert rows, name
        assert found[name] == rows, name
    assert await gaps(connection) == 0


# -- a real chain ----------------------------------------------------------------------------------------------------


async def play_on(client: DevClient, address: str, people: Listeners, at: int, counts: list[int]) -> list[Placed]:
    """Mine a block with a transaction for each of `counts`, of so many plays; where they came to stand."""
    txs = [people.plays(count, at) for count in counts]
    calls = [encode_call(ABI, "playMany", plays) for plays in txs]
    receipts = await client.send_in_one_block(address, calls, gas=8_000_000)
    found = []
    for receipt, plays in zip(receipts, txs, strict=True):
        for log, play in zip(receipt["logs"], plays, strict=True):
            place = int(log["blockNumber"], 16), bytes.fromhex(log["transactionHash"][2:]), int(log["logIndex"], 16)
            found.append(Placed(*place, play))
    return found


@needs_anvil
async def test_anvil_from_the_first_block_to_the_newest(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    """History, a restart in the middle of it, the head by WebSocket: every row, and new plays within a second."""
    people, now = Listeners(7), int(time.time())
    async with Anvil(slots_in_an_epoch=4) as anvil, DevClient(anvil.url) as client:
        address = await client.deploy(load_artifact(PLAY_REGISTRY))
        plays: list[Placed] = []
        for n in range(20):
            plays += await play_on(client, address, people, now - 86_400 * (20 - n), [1 + n % 3, 2, 5])
        values = settings(
            database_url, anvil.url, span={"max_blocks": 2}, contracts=[{
                "name": "PlayRegistry", "address": address, "abi": str(PLAY_REGISTRY), "events": ["Played"],
            }], chain={"endpoints": [{"url": anvil.url, "ws": anvil.ws_url, "name": "anvil"}]},
        )  # fmt: skip
        await dawdle(connection, 0.1)
        async with Daemon(tmp_path, values) as first:
            await first.reached(connection, 4)
            assert await first.stop() == 0
            assert 4 <= await cursor(connection) < 21
        await connection.execute("drop trigger dawdle on plays")
        async with Daemon(tmp_path, values) as daemon:
            await daemon.reached(connection, 21)
            await assert_right(connection, plays)
            delays = []
            for n in range(5):
                plays += await play_on(client, address, people, now + n, [3, 1])
                delays.append(await seconds_until(connection, plays[-1].slot))
            assert statistics.median(delays) < 1.0, delays
            await assert_right(connection, plays)
            assert await daemon.stop() == 0


async def seconds_until(connection: asyncpg.Connection, number: int) -> float:
    started = time.monotonic()

    async def there() -> bool:
        return await cursor(connection) >= number

    await until(there, f"block {number}")
    return time.monotonic() - started


@needs_anvil
async def test_a_slim_event_by_configuration_alone(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    """Numbers instead of texts and fewer fields: an event signature and a few names in TOML, and no code."""
    artifact = load_artifact(SLIM)
    async with Anvil(slots_in_an_epoch=4) as anvil, DevClient(anvil.url) as client:
        address = await client.deploy(artifact)
        calls = [
            encode_call(artifact["abi"], "play", 7 + n % 2, 100 + n, 1_700_000_000 + n, "Chile") for n in range(12)
        ]
        for start in (0, 6):
            await client.send_in_one_block(address, calls[start : start + 6], gas=200_000)
        config = f"""
            [database]
            url = "{database_url}"
            [chain]
            endpoints = [{{url = "{anvil.url}"}}]
            [[contracts]]
            address = "{address}"
            abi = ["event Played(uint256 indexed trackId, uint256 indexed userId, uint64 playedAt, string country)"]
            [hooks]
            enabled = {HOOKS}
            [hooks.plays]
            signature = ""
            city = ""
            region = ""
            [http]
            port = 0
        """
        async with Daemon(tmp_path, config) as daemon:
            await daemon.reached(connection, 3)
            rows = await connection.fetch(
                """
                select user_id, play_item_id, extract(epoch from created_at)::bigint, slot, signature, city, country
                from plays order by id
                """
            )
            assert [tuple(row) for row in rows] == [
                (100 + n, 7 + n % 2, 1_700_000_000 + n, 2 + n // 6, "", "", "Chile") for n in range(12)
            ]
            assert await connection.fetch("select play_item_id, count from aggregate_plays order by 1") == [
                (7, 6),
                (8, 6),
            ]
            assert await daemon.stop() == 0


@pytest.mark.parametrize("ws", [True, False], ids=["ws", "polling"])
async def test_new_blocks_arrive_within_a_second(
    ws: bool, connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    chain, plays = history(30)
    people = Listeners(3)
    async with FakeNode(chain) as node:
        # with ws, polling is too slow to be what brings the news
        listening = {"endpoints": [{"url": node.url, "ws": node.ws_url}], "poll_seconds": 60.0}
        values = settings(database_url, node.url, chain=listening if ws else {"poll_seconds": 0.2})
        async with Daemon(tmp_path, values) as daemon:
            await daemon.reached(connection, 30)
            await until(lambda: bool(node.requests["eth_subscribe"]) is ws, "a subscription")
            await asyncio.sleep(0.2)  # the answer to it
            delays = []
            for n in range(7):
                plays += mine(chain, people.plays(3, 1_700_000_000 + n), people.plays(2, 1_700_000_000))
                delays.append(await seconds_until(connection, chain.head.number))
            assert statistics.median(delays) < 1.0, delays
            await assert_right(connection, plays)
            assert await daemon.stop() == 0


# -- ends -------------------------------------------------------------------------------------------------------------


async def test_kill_9_in_the_middle_of_transactions(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    chain, plays = history(200)
    async with FakeNode(chain) as node:
        values = catching_up(database_url, node.url)
        await dawdle(connection, 0.03)
        stops = []
        for wanted in (20, 60, 110, 180):
            async with Daemon(tmp_path, values) as daemon:
                await daemon.reached(connection, wanted)
                await in_transaction(connection)
                await daemon.kill()
            stops.append(await cursor(connection))
        assert len(set(stops)) == 4 and stops[-1] < 200, stops
        await connection.execute("drop trigger dawdle on plays")
        async with Daemon(tmp_path, values) as daemon:
            await daemon.reached(connection, 200)
            await assert_right(connection, plays)
            assert await daemon.stop() == 0


async def test_signals_end_it_at_once_and_in_order(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    """While catching up, as a standby, at the head, and while the node does not answer: code 0 within 5 seconds."""
    chain, plays = history(60)
    async with FakeNode(chain) as node:
        values = catching_up(database_url, node.url)
        await dawdle(connection, 0.1)
        async with Daemon(tmp_path, values) as leader, Daemon(tmp_path, values) as other:
            await until(lambda: leader.find("leader acquired") or other.find("leader acquired"), "a leader")
            leading, standby = (leader, other) if leader.find("leader acquired") else (other, leader)
            await standby.logged("standing by")
            assert await standby.stop(signal.SIGINT) == 0
            plays += mine_many(chain)
            await in_transaction(connection)
            assert await leading.stop(signal.SIGTERM) == 0
            assert leading.log[-1]["event"] == "stopped" and leading.other == []
            assert await cursor(connection) < chain.head.number
        await connection.execute("drop trigger dawdle on plays")
        async with Daemon(tmp_path, values) as daemon:
            await daemon.reached(connection, chain.head.number)
            assert await daemon.stop(signal.SIGINT) == 0
            assert daemon.log[-1]["event"] == "stopped" and daemon.other == []
        await assert_right(connection, plays)
        async with Daemon(tmp_path, values) as daemon:
            await daemon.logged("leader acquired")
            node.faults.append(slow(60, None))
            asked = node.http_requests
            await until(lambda: node.http_requests > asked, "a request that hangs")
            assert await daemon.stop(signal.SIGTERM) == 0
            assert daemon.other == []
        async with Daemon(tmp_path, values) as daemon:  # it can't even start: the node hangs from the beginning
            asked = node.http_requests
            await until(lambda: node.http_requests > asked, "a request that hangs")
            assert await daemon.stop(signal.SIGINT) == 0
            assert daemon.other == []


# -- the world's trouble ---------------------------------------------------------------------------------------------


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        yield Path(folder)


async def test_postgres_stops_and_starts_again(short_folder: Path, tmp_path: Path) -> None:
    chain, plays = history(80)
    link = short_folder / "socket"

    @contextlib.asynccontextmanager
    async def postgres() -> AsyncIterator[str]:
        """The server, at an address that stays: each start makes a new folder for the socket."""
        async with EmbeddedPostgres(tmp_path / "data", options=HASTY) as server:
            folder = server.dsn.partition("host=")[2].partition("&")[0]
            link.unlink(missing_ok=True)
            link.symlink_to(folder)
            yield f"postgresql://indexer@/indexer?host={quote(str(link))}&port=5432"

    async with FakeNode(chain) as node, contextlib.AsyncExitStack() as stack:
        async with postgres() as url:
            daemon = await stack.enter_async_context(Daemon(tmp_path, catching_up(url, node.url)))
            await daemon.logged("leader acquired")
            connection = await asyncpg.connect(url, server_settings={"search_path": "public"})
            await daemon.reached(connection, 30)
            await connection.close()
        await daemon.logged("database unavailable")
        assert (await daemon.get_json("readyz"))[0] == 503
        plays += mine(chain, Listeners(5).plays(4, 1_700_000_000))
        since = len(daemon.log)
        async with postgres() as url:
            connection = await asyncpg.connect(url, server_settings={"search_path": "public"})
            await daemon.logged("leader acquired", since=since)
            await daemon.reached(connection, 81)
            await assert_right(connection, plays)
            assert (await daemon.get_json("readyz"))[0] == 200
            assert await daemon.stop() == 0
            assert daemon.other == []
            await connection.close()


async def test_the_node_goes_away_twice(connection: asyncpg.Connection, database_url: str, tmp_path: Path) -> None:
    chain, plays = history(100)
    async with FakeNode(chain) as node:
        await dawdle(connection, 0.03)
        async with Daemon(tmp_path, catching_up(database_url, node.url)) as daemon:
            await daemon.reached(connection, 10)
            for _ in range(2):  # while catching up, and at the head
                await node.stop()
                since = len(daemon.log)
                await daemon.logged("endpoint rested", since=since, level="warning")
                await asyncio.sleep(1.5)
                plays += mine(chain, Listeners(chain.head.number).plays(4, 1_700_000_000))
                await node.start()
                await daemon.reached(connection, chain.head.number)
                await daemon.logged("endpoint rested: over", since=since)
            await assert_right(connection, plays)
            assert await daemon.stop() == 0


# -- hooks ------------------------------------------------------------------------------------------------------------

PICKY = """
from indexer import hook

@hook("picky", listens=["Played"], tables=[])
async def picky(tx, blocks):
    for block in blocks:
        if block.number == {bad}:
            raise RuntimeError("block {bad} tastes bad")
"""


@pytest.mark.parametrize("bad", [37, 79], ids=["in history", "above finality"])
async def test_halted_by_a_hook_and_going_on_once_it_is_fixed(
    bad: int, connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    chain, plays = history(80, final_lag=20)
    assert chain.blocks[bad].logs
    module = tmp_path / "picky_hooks.py"
    module.write_text(PICKY.format(bad=bad))
    env = {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    async with FakeNode(chain) as node:
        values = settings(database_url, node.url, hooks={"enabled": [*HOOKS, "picky_hooks:picky"]})
        (tmp_path / "indexer.toml").write_text(toml(values))
        async with Daemon(tmp_path, values, env=env) as daemon:
            halted = await daemon.logged("halted")
            assert (halted["block"], halted["hook"], halted["error"]) == (bad, "picky", f"block {bad} tastes bad")
            assert await daemon.ended(5) == 3
            assert daemon.other == [f"indexer: hook picky failed at block {bad}: RuntimeError: block {bad} tastes bad"]
        # everything before the bad block is there, and nothing of it
        before = [one for one in plays if one.slot < bad]
        assert await cursor(connection) == max(one.slot for one in before)
        await assert_right(connection, before)
        status = await command("status", folder=tmp_path, env=env)
        assert f"block {bad}, hook picky: RuntimeError: block {bad} tastes bad" in status.out
        async with Daemon(tmp_path, values, env=env) as daemon:  # still bad: the same end
            assert await daemon.ended() == 3
            warning = next(line for line in daemon.log if line["level"] == "warning")
            assert (warning["event"], warning["block"], warning["hook"]) == ("halted before", bad, "picky")
        await assert_right(connection, before)
        module.write_text(PICKY.format(bad=-1))
        async with Daemon(tmp_path, values, env=env) as daemon:
            await daemon.reached(connection, 80)
            assert daemon.find("halted before", block=bad) is not None
            await assert_right(connection, plays)
            failures = await connection.fetch("select first, last, hook, resolved_at is not null from indexer.failure")
            assert [tuple(row) for row in failures] == [(bad, bad, "picky", True)]
            assert 'indexer_halted{chain="main"' not in (await daemon.get("metrics"))[1]
            assert await daemon.stop() == 0


# -- the rule of the house: no RPC between BEGIN and COMMIT ----------------------------------------------------------


async def test_a_slow_node_never_holds_a_transaction_open(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    """Every answer takes a second; no transaction of the writer lives nearly that long."""
    chain, plays = history(45, final_lag=40)
    async with FakeNode(chain) as node:
        node.faults.append(slow(1.0, None, methods=["eth_getLogs"]))
        async with Daemon(tmp_path, settings(database_url, node.url)) as daemon:
            oldest, samples = 0.0, 0
            while await cursor(connection) < 25:
                assert daemon.process.returncode is None, daemon.story
                age = await connection.fetchval(
                    """
                    select coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0)::float8
                    from pg_stat_activity
                    where datname = current_database() and application_name = 'indexer writer'
                    """
                )
                oldest, samples = max(oldest, age), samples + 1
                await asyncio.sleep(0.005)
            assert samples > 100 and oldest < 0.8
            assert len(plays) > 0 and await daemon.stop() == 0


IMPOLITE = """
import aiohttp
from indexer import hook

@hook("impolite", listens=["Played"], tables=[])
async def impolite(tx, blocks):
    async with aiohttp.ClientSession() as session, session.post("{url}", json={{}}):
        pass
"""


@pytest.mark.parametrize("impolite", [False, True], ids=["ours", "a hook that asks"])
async def test_nothing_in_a_transaction_asks_the_node(
    impolite: bool, connection: asyncpg.Connection, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: requests know whether what awaits them, or started them, is inside a transaction.

    A hook that breaks the rule shows that the test can tell.
    """
    inside: ContextVar[int] = ContextVar("inside", default=0)
    asked: list[int] = []

    def counting(method: Callable[..., Any], step: int) -> Callable[..., Any]:
        async def counted(self: Transaction, *args: Any) -> Any:
            inside.set(inside.get() + step)
            return await method(self, *args)

        return counted

    request = aiohttp.ClientSession._request

    async def noted(self: aiohttp.ClientSession, *args: Any, **named: Any) -> Any:
        asked.append(inside.get())
        return await request(self, *args, **named)

    monkeypatch.setattr(Transaction, "__aenter__", counting(Transaction.__aenter__, 1))
    monkeypatch.setattr(Transaction, "__aexit__", counting(Transaction.__aexit__, -1))
    monkeypatch.setattr(aiohttp.ClientSession, "_request", noted)
    chain, plays = history(120, final_lag=30)
    async with FakeNode(chain) as node:
        values = catching_up(database_url, node.url)
        if impolite:
            (tmp_path / "impolite_hooks.py").write_text(IMPOLITE.format(url=node.url))
            monkeypatch.syspath_prepend(tmp_path)
            values["hooks"] = {"enabled": [*HOOKS, "impolite_hooks:impolite"]}
        running = asyncio.create_task(app.run(Parsed(**values)))

        async def done() -> bool:
            if running.done():
                running.result()
            return await cursor(connection) >= 120

        try:
            await until(done, "the head")
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
    assert len(asked) > 60
    assert any(asked) is impolite
    await assert_right(connection, plays)
