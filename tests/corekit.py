"""For the tests of CoreSource: sources on simulated nodes, and the events that are in a chain's own JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from indexer.config import ChainSettings, EndpointSettings, SpanSettings
from indexer.fakechain import FakeCore, FakeCoreBlock, FakeCoreNode, core_play, core_plays
from indexer.model import Span
from indexer.sources import core_history, endpoints
from indexer.sources.core import CoreSource

# beside the checkout, where there is one: it is not ours to publish
RECORDING = Path(__file__).parents[2] / "shared" / "data" / "core_blocks.jsonl"
PLAYED = {
    "trackId": "trackId", "userId": "userId", "playedAt": "timestamp", "signature": "signature", "city": "city",
    "region": "region", "country": "country",
}  # fmt: skip
MANAGED = ("userId", "entityType", "entityId", "action", "metadata", "signature", "signer", "nonce")

Found = tuple[int, str, bytes, int, dict[str, str]]  # block, event, transaction, index, arguments


def plays(*tracks: int, at: str = "2025-03-14T22:02:39Z") -> dict[str, Any]:
    return core_plays(*(core_play(str(track), "0xabc", at, f"0x{track}", city="Köln") for track in tracks))


def entity(number: int) -> dict[str, Any]:
    fields = {"userId": str(number), "entityType": "User", "entityId": str(number), "action": "Create", "nonce": "0x1"}
    return {"manageEntity": fields}


def chain_of(counts: Sequence[int]) -> FakeCore:
    """A chain whose block n has `counts[n - 1]` plays, in transactions of two, each of another track."""
    chain, track = FakeCore(), 0
    for many in counts:
        tracks = range(track, track + many)
        chain.mine(*(plays(*tracks[n : n + 2]) for n in range(0, many, 2)))
        track += many
    return chain


@asynccontextmanager
async def source_of(
    *nodes: FakeCoreNode | EndpointSettings, max_events: int = 5000, max_blocks: int = 10_000,
    start: int | None = None, **chain: Any,
) -> AsyncIterator[CoreSource]:  # fmt: skip
    """A source on these nodes; `start` is how many blocks it asks for first."""
    listed = [
        one if isinstance(one, EndpointSettings) else EndpointSettings.model_validate({"url": one.url, "name": f"n{n}"})
        for n, one in enumerate(nodes)
    ]
    settings = ChainSettings(source="core", endpoints=listed, **{"poll_seconds": 0.02, **chain})
    source = CoreSource(settings, SpanSettings(max_events=max_events, max_blocks=max_blocks))
    if start is not None:
        source._history._size.blocks = min(start, max_blocks)
    try:
        yield source
    finally:
        await source.close()


async def collected(source: CoreSource, first: int, last: int) -> list[Span]:
    return [span async for span in source.spans(first, last)]


def expected(blocks: Sequence[FakeCoreBlock]) -> list[Found]:
    """The events in the blocks' JSON, in order."""
    return [event for block in blocks for event in _events(json.loads(block.json))]


def _events(block: dict[str, Any]) -> Iterator[Found]:
    seen: Counter[tuple[str, str]] = Counter()

    def event(name: str, tx: dict[str, Any], args: dict[str, str]) -> Found:
        index = seen[name, tx["hash"]]
        seen[name, tx["hash"]] += 1
        return int(block["height"]), name, bytes.fromhex(tx["hash"]), index, args

    for tx in block.get("transactions", []):
        newer = tx.get("transactionv2", {})
        for content in (tx.get("transaction", {}), newer, *newer.get("envelope", {}).get("messages", [])):
            for play in content.get("plays", {}).get("plays", []):
                yield event("Played", tx, {name: play.get(field, "") for name, field in PLAYED.items()})
            if (managed := content.get("manageEntity")) is not None:
                yield event("ManageEntity", tx, {name: managed.get(name, "") for name in MANAGED})


def found(spans: Sequence[Span]) -> list[Found]:
    return [
        (block.number, event.name, event.tx_hash, event.index, dict(event.args))
        for span in spans for block in span.blocks for event in block.events
    ]  # fmt: skip


def assert_whole(spans: Sequence[Span], chain: FakeCore, first: int, last: int) -> None:
    """The spans cover `first` to `last` without hole or overlap, and hold all events of the chain, in order."""
    assert [span.first for span in spans] == [first, *(span.last + 1 for span in spans[:-1])]
    assert spans[-1].last == last
    wanted = expected(chain.blocks[first - chain.first : last - chain.first + 1])
    assert found(spans) == wanted
    for span in spans:
        end = chain.block(span.last)
        assert end is not None and (span.end, span.end_timestamp) == (end.ref, end.timestamp)
        assert span.final
        for block in span.blocks:
            mined = chain.block(block.number)
            assert mined is not None and block.events
            assert (block.hash, block.timestamp, block.parent_hash) == (mined.hash, mined.timestamp, None)


def heights(node: FakeCoreNode) -> list[tuple[int, ...]]:
    """The heights of each GetBlocks that a node was asked for."""
    return [tuple(map(int, message["height"])) for method, message in node.log if method == "GetBlocks"]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rests, and little patience with holes."""
    for module, name, seconds in (
        (endpoints, "_FIRST_REST_SECONDS", 0.005),
        (endpoints, "_LONGEST_REST_SECONDS", 0.05),
        (endpoints, "_RATE_REST_SECONDS", 0.01),
        (endpoints, "_BEHIND_REST_SECONDS", 0.01),
        (core_history, "_HOLE_SECONDS", 0.1),
        (core_history, "_LONGEST_HOLE_SECONDS", 0.5),
    ):
        monkeypatch.setattr(module, name, seconds)
