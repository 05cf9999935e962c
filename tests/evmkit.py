"""For the tests of EvmSource: chains with known events, sources on their nodes, and what must come out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest

from indexer.config import ChainSettings, ContractSettings, EndpointSettings, SpanSettings
from indexer.fakechain import FakeChain, FakeLog, FakeNode, Fault, FaultSource, encode_event
from indexer.model import Span
from indexer.sources import endpoints, newheads, provider_errors, queries
from indexer.sources.abi import parse_signature
from indexer.sources.evm import EvmSource

ADDRESS, OTHER, THIRD = ("0x" + pair * 20 for pair in ("ab", "cd", "ef"))
SIGNATURE = "event Played(uint256 indexed track, string city)"
LIKED = "event Liked(uint256 indexed track)"


def play(track: int, address: str = ADDRESS, city: str = "Köln") -> FakeLog:
    return encode_event(parse_signature(SIGNATURE), {"track": track, "city": city}, address)


def like(track: int, address: str = ADDRESS) -> FakeLog:
    return encode_event(parse_signature(LIKED), {"track": track}, address)


_PLAYED = play(0).topics[0]


def chain_of(events: Sequence[int], final_lag: int = 0, address: str = ADDRESS) -> FakeChain:
    """A chain whose block n+1 has `events[n]` plays, in transactions of two."""
    chain, track = FakeChain(final_lag=final_lag), 0
    for many in events:
        plays = [play(track + n, address) for n in range(many)]
        track += many
        chain.mine(*(plays[n : n + 2] for n in range(0, many, 2)))
    return chain


@asynccontextmanager
async def source_of(
    *nodes: FakeNode | EndpointSettings,
    contracts: Sequence[ContractSettings] | None = None,
    max_events: int = 5000,
    max_blocks: int = 10_000,
    start: int | None = None,
    **chain: Any,
) -> AsyncIterator[EvmSource]:
    """A source on these nodes; `start` is how many blocks it asks for first."""
    listed = [
        node
        if isinstance(node, EndpointSettings)
        else EndpointSettings.model_validate({"url": node.url, "name": f"node{n}"})
        for n, node in enumerate(nodes)
    ]
    settings = ChainSettings(endpoints=listed, **{"poll_seconds": 0.02, **chain})
    contracts = contracts or [ContractSettings(address=[ADDRESS], abi=[SIGNATURE])]
    source = EvmSource(settings, contracts, SpanSettings(max_events=max_events, max_blocks=max_blocks))
    if start is not None:
        source._history._size.blocks = min(start, max_blocks)
    try:
        yield source
    finally:
        await source.close()


async def collected(source: EvmSource, first: int, last: int) -> list[Span]:
    return [span async for span in source.spans(first, last)]


def assert_whole(
    spans: Sequence[Span], chain: FakeChain, first: int, last: int, addresses: Sequence[str] = (ADDRESS,)
) -> None:
    """The spans cover `first` to `last` without hole or overlap, and hold all plays of the chain, in order."""
    assert [span.first for span in spans] == [first, *(span.last + 1 for span in spans[:-1])]
    assert spans[-1].last == last
    wanted = [
        (int(log["blockNumber"], 16), int(log["logIndex"], 16), int(log["topics"][1], 16), log["transactionHash"])
        for log in chain.logs(first, last)
        if log["address"] in addresses and log["topics"][0] == _PLAYED
    ]
    given = [
        (block.number, event.index, event.args["track"], "0x" + event.tx_hash.hex())
        for span in spans
        for block in span.blocks
        for event in block.events
    ]
    assert given == wanted
    for span in spans:
        assert span.end == chain.blocks[span.last].ref
        assert span.end_timestamp == chain.blocks[span.last].timestamp
        if span.final:
            assert all(block.events for block in span.blocks)
        else:
            assert span.first == span.last == span.blocks[0].number
        for block in span.blocks:
            mined = chain.blocks[block.number]
            assert (block.hash, block.timestamp) == (mined.hash, mined.timestamp)
            assert block.parent_hash == (None if span.final else mined.parent_hash)


def fails(times: int | None, fault: Fault | Callable[[list[Any]], Fault | None], method: str = "") -> FaultSource:
    """The next `times` calls (of the method, if one is named) are answered so."""
    left = [times]

    def source(asked: str, params: list[Any]) -> Fault | None:
        if left[0] == 0 or (method and asked != method):
            return None
        found = fault(params) if callable(fault) else fault
        if found is not None and left[0] is not None:
            left[0] -= 1
        return found

    return source


def every(nth: int, fault: Fault) -> FaultSource:
    """The first call and each `nth` after it are answered so."""
    calls = count()
    return lambda _method, _params: fault if next(calls) % nth == 0 else None


def error(code: int, message: str, status: int = 200, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Fault(status, {"code": code, "message": message}, headers=named)


def ranges(node: FakeNode) -> list[tuple[int, int]]:
    """The ranges of eth_getLogs that a node was asked for (refused ones as well)."""
    queries = [params[0] for method, params in node.log if method == "eth_getLogs"]
    return [(int(one["fromBlock"], 16), int(one["toBlock"], 16)) for one in queries if "fromBlock" in one]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rests and pauses."""
    for module, name, seconds in (
        (endpoints, "_FIRST_REST_SECONDS", 0.005),
        (endpoints, "_LONGEST_REST_SECONDS", 0.05),
        (endpoints, "_RATE_REST_SECONDS", 0.01),
        (endpoints, "_BEHIND_REST_SECONDS", 0.01),
        (provider_errors, "_PAUSE_SECONDS", 0.01),
        (queries, "_PAUSE_SECONDS", 0.01),
        (newheads, "_FIRST_PAUSE_SECONDS", 0.02),
    ):
        monkeypatch.setattr(module, name, seconds)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "did not come about in time"
        await asyncio.sleep(0.005)
