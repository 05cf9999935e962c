"""The demo's local chain: anvil where it is at hand, else a simulated node; and people who listen to music."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from indexer.devchain import Anvil, DevClient, encode_call, find_anvil, load_artifact
from indexer.errors import UsageError
from indexer.fakechain import FakeChain, FakeNode, encode_event, event_abi

_HOOKS = find_spec("hooks")
PLAY_REGISTRY = Path(_HOOKS.origin or "").parent / "play_registry.json" if _HOOKS else Path("play_registry.json")

# trackId, userId, playedAt, signature, city, region, country
Play = tuple[str, str, str, str, str, str, str]
_FIELDS = ("trackId", "userId", "playedAt", "signature", "city", "region", "country")

_HISTORY_BLOCKS = 120
_BLOCK_SECONDS = 1.0
_TRACKS = 400
_PLACES = (
    ("Berlin", "Berlin", "Germany"), ("São Paulo", "São Paulo", "Brazil"), ("Goyang-si", "Gyeonggi-do", "South Korea"),
    ("Kamianske", "Dnipropetrovsk Oblast", "Ukraine"), ("Austin", "Texas", "United States"), ("", "", "Iceland"),
)  # fmt: skip


async def _nobody_plays() -> None:
    await asyncio.Event().wait()


class DemoChain(msgspec.Struct):
    """A chain to follow; `play` makes plays arrive until it is cancelled (on a real chain others do)."""

    name: str
    description: str
    url: str
    ws_url: str | None
    contract: str
    start_block: int = 0
    play: Callable[[], Coroutine[Any, Any, None]] = _nobody_plays


class Listeners:
    """People who play tracks at random: few tracks are played much, and half of the plays are anonymous."""

    def __init__(self, seed: int = 1) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._weights = [1 / (rank + 1) for rank in range(_TRACKS)]

    def plays(self, count: int, at: int) -> list[Play]:
        """`count` plays at the unix time `at`."""
        tracks = self._random.choices(range(1_000_001, 1_000_001 + _TRACKS), self._weights, k=count)
        return [(str(track), self._listener(), str(at), self._signature(), *self._place()) for track in tracks]

    def some(self) -> int:
        return self._random.randint(1, 25)

    def _listener(self) -> str:
        known = self._random.random() < 0.5
        return str(self._random.randint(1, 500)) if known else f"0x{self._random.getrandbits(160):040x}"

    def _signature(self) -> str:
        return f"0x{self._random.getrandbits(520):0130x}"

    def _place(self) -> tuple[str, str, str]:
        return self._random.choice(_PLACES)


@asynccontextmanager
async def local_chain(kind: str) -> AsyncIterator[DemoChain]:
    """A chain on this machine with a little history; `kind` is anvil, simulated or auto.

    Raises UsageError where anvil is asked for and not at hand.
    """
    if kind == "anvil" and find_anvil() is None:
        raise UsageError("no anvil is at hand: run `make anvil`, set ANVIL_BIN, or use --chain simulated")
    opened = _anvil() if kind != "simulated" and find_anvil() is not None else _simulated()
    async with opened as chain:
        yield chain


@asynccontextmanager
async def _anvil() -> AsyncIterator[DemoChain]:
    artifact, listeners = load_artifact(PLAY_REGISTRY), Listeners()
    async with Anvil(slots_in_an_epoch=8) as anvil, DevClient(anvil.url) as client:
        address = await client.deploy(artifact)

        async def send(plays: Sequence[Play]) -> None:
            await client.send(address, encode_call(artifact["abi"], "playMany", list(plays)), gas=25_000_000)

        start = int(time.time()) - 2 * _HISTORY_BLOCKS
        await client.set_automine(False)
        for n in range(_HISTORY_BLOCKS):
            await send(listeners.plays(listeners.some(), start + n))
            await client.mine()
        await client.rpc("evm_setIntervalMining", int(_BLOCK_SECONDS))

        async def play() -> None:
            while True:
                await asyncio.sleep(_BLOCK_SECONDS / 2)
                await send(listeners.plays(listeners.some(), int(time.time())))

        yield DemoChain("anvil", "a local chain made by anvil", anvil.url, anvil.ws_url, address, play=play)


@asynccontextmanager
async def _simulated() -> AsyncIterator[DemoChain]:
    played, listeners = event_abi(load_artifact(PLAY_REGISTRY)["abi"], "Played"), Listeners()
    address = "0x" + "a1" * 20
    start = int(time.time()) - _HISTORY_BLOCKS - 1
    chain = FakeChain(block_seconds=1, genesis_timestamp=start, final_lag=16)

    def mine(at: int) -> None:
        plays = listeners.plays(listeners.some(), at)
        events = [encode_event(played, dict(zip(_FIELDS, play, strict=True)), address) for play in plays]
        chain.mine(events, timestamp=max(at, chain.head.timestamp + 1))

    for n in range(_HISTORY_BLOCKS):
        mine(start + n + 1)
    async with FakeNode(chain) as node:

        async def play() -> None:
            while True:
                await asyncio.sleep(_BLOCK_SECONDS)
                mine(int(time.time()))

        description = "a SIMULATED chain (no anvil at hand): real JSON-RPC, logs and hashes, but no EVM behind them"
        yield DemoChain("simulated", description, node.url, node.ws_url, address, play=play)
