"""Random histories of forks, lies and deaths without one wrong row; and the same with real processes."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import chaos
import pytest
from daemon import HOOKS, Daemon, Placed, cursor, expected, gaps, settings, tables, until

from indexer import journal
from indexer.demochain import PLAY_REGISTRY, Listeners, Play
from indexer.devchain import Anvil, DevClient, encode_call, find_anvil, load_artifact
from indexer.embedded import EmbeddedPostgres
from indexer.errors import DeepReorg, IndexerError
from indexer.pytest_plugin import HASTY, SESSION, Databases

HISTORIES, SECONDS = 120, 40.0
PLAY_HOOKS = ["hooks.plays:plays"]


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("CHAOS_SEED") or random.randrange(10**9))


@pytest.fixture
def urls(indexer_databases: Databases) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [stack.enter_context(indexer_databases.migrated(PLAY_HOOKS)) for _ in range(os.cpu_count() or 1)]


def test_random_histories(urls: list[str], seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    """120 of them, or as many as there is time for; `make chaos SECONDS=600` tells thousands."""
    failed = chaos.run_workers(urls, seed, HISTORIES, SECONDS)
    out, err = capfd.readouterr()
    with capfd.disabled():
        print(f"\n{out.strip()}")
    assert not failed, f"{out}{err}"
    assert "\n0 histories" not in out


async def test_a_wrong_row_is_noticed(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a journal nothing can be undone: the histories must not end well."""

    async def nothing(*_: object) -> None: ...

    chaos.quiet()
    monkeypatch.setattr(journal, "journal_from", nothing)
    with pytest.raises(chaos.WrongRow, match=r"seed \d+: AssertionError: \w+: missing .* surplus"):
        await chaos.histories(database_url, 1, number=40)


# -- told histories ----------------------------------------------------------------------------------------------------


async def to_the_first_block(told: chaos.History) -> None:
    told.mine(3)
    told.start()
    await told.arrive()
    told.fork(3, 4)


async def final_before_anybody_looks(told: chaos.History) -> None:
    """The fork lies below the finalised block when the daemon comes back: final blocks come without their parents."""
    told.mine(10)
    told.start()
    await told.arrive()
    await told.stop()
    told.fork(3, 3)
    told.mine(20)
    told.start()


async def to_the_finalised_block_after_catching_up(told: chaos.History) -> None:
    told.mine(20)
    told.start()
    await told.arrive()
    told.fork(4, 5)


async def two_in_quick_succession(told: chaos.History) -> None:
    told.mine(9)
    told.start()
    await told.arrive()
    told.fork(3, 4)
    told.fork(2, 3)
    await told.arrive()
    told.fork(4, 4)
    told.fork(1, 1)


async def a_shorter_and_an_equal_rival(told: chaos.History) -> None:
    told.mine(9)
    told.start()
    for depth, blocks in ((3, 2), (2, 2), (1, 1)):
        await told.arrive()
        told.fork(depth, blocks)


async def below_the_finalised_block(told: chaos.History) -> None:
    told.mine(20)
    told.start()
    await told.arrive()
    told.fork(6, 8)
    await told.arrive()


@pytest.fixture
async def tell(database_url: str) -> AsyncIterator[Callable[[Any], Awaitable[None]]]:
    chaos.quiet()
    async with chaos.prepared(database_url) as (database, connection):

        async def tell(blows: Callable[[chaos.History], Awaitable[None]]) -> None:
            for seed in range(3):
                history = chaos.History(database, connection, seed, lag=4)
                history.blows = partial(blows, history)  # type: ignore[method-assign]
                await history.run()

        yield tell


@pytest.mark.parametrize("blows", [
    to_the_first_block, final_before_anybody_looks, to_the_finalised_block_after_catching_up, two_in_quick_succession,
    a_shorter_and_an_equal_rival,
])  # fmt: skip
async def test_a_fork(tell: Any, blows: Any) -> None:
    await tell(blows)


async def test_a_fork_that_is_too_deep(tell: Any) -> None:
    with pytest.raises(DeepReorg, match=r"block 16 is 0x[0-9a-f]{64} here, but the chain goes by 0x[0-9a-f]{64}"):
        await tell(below_the_finalised_block)


# -- real processes ----------------------------------------------------------------------------------------------------


class Server:
    """A server of our own that is restarted under the daemon, at the same address."""

    def __init__(self, folder: Path) -> None:
        self._postgres = EmbeddedPostgres(folder, options=HASTY)

    @property
    def url(self) -> str:
        return self._postgres.dsn

    async def start(self) -> None:
        await self._postgres.start()

    async def stop(self) -> None:
        await self._postgres.stop()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url, server_settings=SESSION)
    try:
        yield connection
    finally:
        await connection.close(timeout=5)


class Rival:
    """Mines plays on anvil, and reorganises what is not final: half of what was there comes again."""

    def __init__(self, client: DevClient, address: str, chance: random.Random) -> None:
        self.client, self.address, self.chance = client, address, chance
        self.abi = load_artifact(PLAY_REGISTRY)["abi"]
        self.listeners = Listeners(chance.randrange(1000))
        self.sent: dict[str, list[Play]] = {}

    def call(self, plays: list[Play]) -> str:
        return encode_call(self.abi, "playMany", plays)

    async def mine(self) -> None:
        for _ in range(self.chance.randint(0, 3)):
            plays = self.listeners.plays(self.chance.randint(1, 4), int(time.time()))
            self.sent[await self.client.send(self.address, self.call(plays), gas=3_000_000)] = plays
        await self.client.mine()

    async def reorg(self, deepest: int) -> None:
        depth = self.chance.randint(1, deepest)
        sender = (await self.client.accounts())[1]
        requests = []
        for n in range(depth):
            if self.chance.random() < 0.6:
                plays = self.listeners.plays(self.chance.randint(1, 3), int(time.time()))
                requests.append(
                    ({"from": sender, "to": self.address, "data": self.call(plays), "gas": hex(3_000_000)}, n)
                )
        await self.client.reorg(depth, requests)

    async def canonical(self) -> list[Placed]:
        """The plays that are on the chain now, as the node itself decodes nothing: from the calls that made them."""
        found: list[Placed] = []
        for number in range(await self.client.block_number() + 1):
            block = await self.client.rpc("eth_getBlockByNumber", hex(number), True)
            index = 0
            for tx in block["transactions"]:
                if tx["to"] != self.address:
                    continue
                for play in decoded(tx["input"]):
                    found.append(Placed(number, bytes.fromhex(tx["hash"][2:]), index, play))
                    index += 1
        return found


def decoded(data: str) -> list[Play]:
    from eth_abi.abi import decode

    [plays] = decode(["(string,string,string,string,string,string,string)[]"], bytes.fromhex(data[10:]))
    return list(plays)


@pytest.mark.skipif(find_anvil() is None, reason="no anvil is at hand: make anvil")
async def test_real_processes(tmp_path: Path, seed: int) -> None:
    """anvil with anvil_reorg, the daemon killed by kill -9 at random moments, Postgres restarted under it."""
    print(f"CHAOS_SEED={seed}")
    chance, deepest, seconds = random.Random(seed), 6, 14.0
    server = Server(tmp_path / "postgres")
    try:
        await server.start()
    except IndexerError as error:
        pytest.skip(f"no server of our own: {error}")
    try:
        async with Anvil(slots_in_an_epoch=deepest) as anvil, DevClient(anvil.url) as client:
            address = await client.deploy(load_artifact(PLAY_REGISTRY))
            await client.set_automine(False)
            rival = Rival(client, address, chance)
            values = settings(
                f"{server.url}", anvil.url, contracts=[{
                    "name": "PlayRegistry", "address": address, "abi": str(PLAY_REGISTRY), "events": ["Played"],
                }], chain={"endpoints": [{"url": anvil.url, "ws": anvil.ws_url, "name": "anvil"}]},
                hooks={"enabled": HOOKS}, database={"data_dir": str(tmp_path / "postgres")},
            )  # fmt: skip
            del values["database"]["url"]
            await blows(tmp_path, values, rival, server, chance, seconds, deepest)
            async with Daemon(tmp_path, values), connected(server.url) as connection:
                head = await client.block_number()

                async def there() -> bool:
                    block = await client.rpc("eth_getBlockByNumber", "latest", False)
                    row = await connection.fetchrow("select number, hash from indexer.cursor")
                    return row is not None and (row[0], "0x" + row[1].hex()) == (head, block["hash"])

                await until(there, f"block {head} committed")
                assert await tables(connection) == expected(await rival.canonical())
                assert await gaps(connection) == 0
                assert await cursor(connection) == head
    finally:
        await server.stop()


async def blows(
    folder: Path, values: dict[str, object], rival: Rival, server: Server, chance: random.Random, seconds: float,
    deepest: int,
) -> None:  # fmt: skip
    """For so long: blocks and forks all the time; the daemon dies again and again, the server once."""
    started = time.monotonic()

    async def chain() -> None:
        while time.monotonic() - started < seconds:
            await rival.mine()
            if chance.random() < 0.25 and await rival.client.block_number() > 2 * deepest:
                await rival.reorg(deepest)
            await asyncio.sleep(chance.random() * 0.1)

    chaining = asyncio.create_task(chain())
    restarted = False
    while not chaining.done():
        async with Daemon(folder, values) as daemon:
            await daemon.logged("leader acquired")
            await asyncio.sleep(chance.random() * 2)
            if not restarted and time.monotonic() - started > seconds / 2:
                restarted = True
                await server.stop()
                await asyncio.sleep(0.3)
                await server.start()
                await asyncio.sleep(1.0)
            await daemon.kill()
    await chaining
    assert restarted
