"""CoreSource on good nodes: spans are exact whatever is asked for, and nothing in a block is an error."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from corekit import (
    MANAGED,
    PLAYED,
    RECORDING,
    assert_whole,
    chain_of,
    collected,
    entity,
    expected,
    found,
    hasty,
    heights,
    plays,
    source_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexer.config import Settings
from indexer.errors import ConfigError
from indexer.fakechain import FakeCore, FakeCoreNode, connect_error, cut_short, garbage, recorded_shape, slow
from indexer.model import BlockRef, BlockSource, Heads, Span
from indexer.sources import core_wire
from indexer.sources.choose import make_source
from indexer.sources.core import CoreSource
from indexer.sources.endpoint import Impossible

pytestmark = pytest.mark.usefixtures("hasty")
__all__ = ["hasty"]


# Whole spans


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_spans_cover_exactly_what_was_asked_for(data: st.DataObject) -> None:
    """Whatever the sizes, with nodes that fail, lag, hold other gaps and refuse long calls."""
    chain = recorded_shape(data.draw(st.integers(0, 1000), "seed"), data.draw(st.integers(20, 60), "blocks"))
    first = data.draw(st.integers(1, 6), "first")
    last = chain.height - data.draw(st.integers(0, 12), "left out")
    in_flight = data.draw(st.integers(1, 6), "requests_in_flight")
    start, most = data.draw(st.integers(1, 70), "start"), data.draw(st.integers(1, 70), "max_blocks")
    target = data.draw(st.integers(1, 60), "max_events")
    lacks = data.draw(st.sampled_from([{}, {"GetBlocks": "404"}, {"GetBlocks": "unimplemented"}]), "lacks")
    faults = data.draw(st.lists(st.sampled_from(["cut", "busy", "broken", "full", "html"]), max_size=4), "faults")
    holes = data.draw(st.sets(st.integers(first, chain.height - 5), max_size=3), "holes")
    limit = data.draw(st.sampled_from([500, 7]), "most_heights")

    async def check() -> None:
        async with FakeCoreNode(chain) as one, FakeCoreNode(chain) as other:
            one.lacks, one.missing, one.most_heights = dict(lacks), holes, limit
            one.faults += [
                {
                    "cut": lambda: cut_short(3), "busy": lambda: connect_error("unavailable", 2),
                    "broken": lambda: connect_error("internal", 2), "html": lambda: garbage(2),
                    "full": lambda: connect_error("resource_exhausted", 2, retry_after=0.01),
                }[fault]()
                for fault in faults
            ]  # fmt: skip
            other.lag = 5  # its own newest blocks only the first has
            other.missing = {number + 1 for number in holes} - holes
            sizes: dict[str, Any] = {"max_blocks": most, "start": start, "max_events": target}
            async with source_of(one, other, requests_in_flight=in_flight, **sizes) as source:
                assert_whole(await collected(source, first, last), chain, first, last)

    asyncio.run(asyncio.wait_for(check(), 30))


@pytest.mark.parametrize("which", ["generated", "recorded"])
async def test_the_shape_of_the_public_chain(which: str) -> None:
    if which == "recorded" and not RECORDING.exists():
        pytest.skip("the recording is not at hand")
    chain = FakeCore.load(RECORDING.open("rb")) if which == "recorded" else recorded_shape(1, 467)
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        assert await source.identity() == chain.chain_id
        assert await source.heads() == Heads(467, 467)
        spans = await collected(source, 1, 467)
    assert_whole(spans, chain, 1, 467)
    names = [name for _, name, *_ in found(spans)]
    if which == "recorded":
        assert (names.count("Played"), names.count("ManageEntity")) == (1641, 289)
    else:
        assert 1000 < names.count("Played") < 3000 and 100 < names.count("ManageEntity") < 600


def test_generated_blocks_are_as_the_recorded_ones() -> None:
    """The traps of the public chain are in it: repeats, other alphabets, empty texts, transactions sent again."""
    chain = recorded_shape(3, 2000)
    events = [event for event in expected(chain.blocks) if event[1] == "Played"]
    users = [args["userId"] for *_, args in events]
    assert 0.78 < sum(user.startswith("0x") for user in users) / len(users) < 0.86
    assert any(not args["city"].isascii() for *_, args in events) and any(not args["region"] for *_, args in events)
    again: dict[bytes, set[int]] = {}
    for number, _, tx_hash, *_ in events:
        again.setdefault(tx_hash, set()).add(number)
    assert any(len(numbers) > 1 for numbers in again.values())
    within = {(number, tx_hash, *args.values()) for number, _, tx_hash, _, args in events}
    assert len(within) < len(events)
    assert {len(json.loads(block.json).get("transactions", [])) for block in chain.blocks} >= {0, 1, 2, 9, 10}
    assert recorded_shape(3, 50).blocks == chain.blocks[:50]


async def test_none_are_asked_for() -> None:
    async with FakeCoreNode(chain_of([1, 1])) as node, source_of(node) as source:
        assert await collected(source, 3, 2) == []


async def test_what_is_ready_is_joined_up_to_the_target() -> None:
    chain = chain_of([2] * 100)
    async with FakeCoreNode(chain) as node, source_of(node, max_events=25, max_blocks=5, start=5) as source:
        source._history._max_blocks = 100
        spans: list[Span] = []
        async for span in source.spans(1, 100):
            spans.append(span)
            await asyncio.sleep(0.03)  # a commit; meanwhile the next ranges come
        assert_whole(spans, chain, 1, 100)
        assert max(span.events for span in spans) == 20  # a third range would be too much
        assert len(spans) <= 14


async def test_calls_in_flight_are_bounded_and_no_call_is_larger_than_nodes_take() -> None:
    chain = chain_of([0] * 2500)
    async with FakeCoreNode(chain, keep_log=True) as node, source_of(node, requests_in_flight=2) as source:
        node.faults.append(slow(0.01, None))
        spans = source.spans(1, 2500)
        taken = await anext(spans)
        await asyncio.sleep(0.1)
        assert max(map(max, heights(node))) <= taken.last + 2 * 8 * 500
        assert_whole([taken, *[span async for span in spans]], chain, 1, 2500)
        assert max(map(len, heights(node))) == 500


async def test_closing_early_leaves_nothing_behind(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    chain = chain_of([1] * 300)
    async with FakeCoreNode(chain) as node, source_of(node, max_blocks=5, start=5) as source:
        node.lacks["GetBlocks"] = "404"
        await source.heads()
        before = asyncio.all_tasks()
        node.faults.append(slow(0.01, None))
        spans = source.spans(1, 300)
        for _ in range(3):
            await anext(spans)
        await spans.aclose()
        assert not [task for task in asyncio.all_tasks() - before if "indexer/sources" in repr(task)]
        del spans
    gc.collect()
    assert not caplog.records
    assert not [one for one in recwarn if issubclass(one.category, (RuntimeWarning, ResourceWarning))]


# The head


async def test_following_the_head_costs_one_call_a_block_beside_the_polls() -> None:
    """As the Follower asks: heads, the ref at the cursor, spans."""
    chain = chain_of([1])
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        at = BlockRef(0, b"")
        polls = 0
        for _ in range(12):
            heads = await source.heads()
            polls += 1
            assert heads.newest == heads.final
            if heads.newest > at.number:
                if at.hash:
                    assert await source.ref(at.number) == at
                for span in await collected(source, at.number + 1, heads.newest):
                    at = span.end
                chain.mine(plays(7))
            await source.wait(0.001)
        assert at.number >= 6
        assert node.requests["GetBlocks"] == at.number
        assert node.requests["GetNodeInfo"] <= polls + 1
        assert node.requests.keys() == {"GetNodeInfo", "GetBlocks"}


async def test_the_height_that_came_with_blocks_is_not_asked_for_again() -> None:
    chain = chain_of([1, 1])
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        await collected(source, 1, 2)
        asked = node.requests["GetNodeInfo"]
        assert await source.heads() == Heads(2, 2)
        assert node.requests["GetNodeInfo"] == asked
        chain.mine()
        assert await source.heads() == Heads(3, 3)  # good only once
        assert node.requests["GetNodeInfo"] == asked + 1


async def test_a_ref_is_asked_for_where_it_is_not_remembered() -> None:
    chain = chain_of([1, 0, 2])
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        assert [await source.ref(number) for number in (1, 2, 3)] == [block.ref for block in chain.blocks]


async def test_polls_follow_the_block_time() -> None:
    chain = FakeCore(block_seconds=4)
    for _ in range(9):
        chain.mine()
    async with FakeCoreNode(chain) as node, source_of(node, poll_seconds=None) as source:
        assert source.poll_seconds == 0.25
        for number in range(1, 10):
            await collected(source, number, number)
        assert source.poll_seconds == 1.0


async def test_identity_by_status_where_the_node_does_not_know_itself() -> None:
    async with FakeCoreNode(chain_of([1])) as node, source_of(node) as source:
        node.lacks["GetNodeInfo"] = "unimplemented"
        assert await source.identity() == "core-test"
        assert await source.heads() == Heads(1, 1)


# What comes out of transactions


async def test_nothing_else_in_a_block_is_an_error() -> None:
    chain = FakeCore()
    unknown = [{"somethingNew": {"plays": 5}}, {"release": {"plays": "x"}}, {"requestId": "1"}]
    chain.mine(plays(1, 2), *unknown, {"transactionv2": {"signature": {}, "envelope": {"messages": [{"ern": {}}]}}})
    chain.mine(core_empty := {"plays": {}}, {"plays": {"plays": []}}, {})
    chain.mine({"transactionv2": plays(3)}, {"transactionv2": {"envelope": {"messages": [plays(4, 5), entity(6)]}}})
    chain.mine(plays(1, 2), plays(1, 2), entity(6), entity(6))
    assert core_empty
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        spans = await collected(source, 1, 4)
    assert_whole(spans, chain, 1, 4)
    assert [span.quarantined for span in spans] == [()]
    by_block: dict[int, list[tuple[str, int]]] = {}
    for number, name, _, index, args in found(spans):
        by_block.setdefault(number, []).append((args.get("trackId", name), index))
    assert by_block == {
        1: [("1", 0), ("2", 1)],
        3: [("3", 0), ("4", 0), ("5", 1), ("ManageEntity", 0)],
        4: [("1", 0), ("2", 1), ("1", 2), ("2", 3), ("ManageEntity", 0), ("ManageEntity", 1)],
    }


async def test_numbers_and_nulls_where_texts_belong() -> None:
    chain = FakeCore()
    chain.mine(plays(1))
    chain.mine({"plays": {"plays": [{"trackId": 12, "userId": None, "timestamp": "t", "extra": {"a": [1]}}]}}, plays(2))
    chain.mine({"manageEntity": {"userId": 7, "entityId": 9223372036854775807, "action": "Create"}})
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        spans = await collected(source, 1, 3)
    assert [event[4] for event in found(spans)][1:] == [
        dict.fromkeys(PLAYED, "") | {"trackId": "12", "playedAt": "t"}, expected(chain.blocks[1:2])[1][4],
        dict.fromkeys(MANAGED, "") | {"userId": "7", "entityId": "9223372036854775807", "action": "Create"},
    ]  # fmt: skip
    assert not any(span.quarantined for span in spans)


@pytest.mark.parametrize("lacks", [{}, {"GetBlocks": "404"}])
async def test_what_cannot_be_decoded_is_kept_raw_and_its_siblings_are_whole(lacks: dict[str, str]) -> None:
    spoilt: list[dict[str, Any]] = [
        {"plays": {"plays": {"trackId": "1"}}}, {"plays": [1]}, {"plays": {"plays": [{"trackId": {}}]}},
        {"plays": {"plays": ["x"]}}, {"manageEntity": []}, {"manageEntity": {"metadata": {"title": "t"}}},
        {**plays(5), "hash": "beef"}, {**entity(5), "hash": ""}, {**plays(5), "hash": 17},
    ]  # fmt: skip
    chain = FakeCore()
    for one in spoilt:
        chain.mine(plays(1, 2), one, entity(3), {**plays(7), "hash": ""} if one is spoilt[-1] else {})
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        node.lacks = lacks
        spans = await collected(source, 1, chain.height)
    assert [(number, name) for number, name, *_ in found(spans)] == [
        (number, name) for number in range(1, chain.height + 1) for name in ("Played", "Played", "ManageEntity")
    ]
    raw = [one for span in spans for one in span.quarantined]
    wanted = ["Played"] * 4 + ["ManageEntity"] * 2 + ["Played", "ManageEntity", "Played", "Played"]
    assert [(one.number, one.event) for one in raw] == [(min(n, 9), name) for n, name in enumerate(wanted, 1)]
    assert len({(one.number, one.index) for one in raw}) == len(raw)
    for one in raw:
        block = chain.block(one.number)
        assert block is not None and one.block_hash == block.hash
        assert json.loads(one.data)["hash"] in {tx["hash"] for tx in json.loads(block.json)["transactions"]}
        assert (one.topics, one.address) == ((), "") and one.error and len(one.tx_hash) in (0, 32)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1970-01-01T00:00:00Z", 0), ("2025-03-14T22:02:05.999999999Z", 1_741_989_725),
        ("2025-03-14T22:02:05+00:00", 1_741_989_725), ("2025-03-15T00:02:05.25+02:00", 1_741_989_725),
        ("9999-12-31T23:59:59z", 253_402_300_799),
    ],
)  # fmt: skip
def test_times(text: str, wanted: int) -> None:
    assert core_wire.seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "Z", "2025-03-14T22:02:05", "2025-03-14", "1741989725", "2025-13-14T22:02:05Z"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(Impossible):
        core_wire.seconds(text)


# Settings


def _settings(**sections: Any) -> Settings:
    chain = {"source": "core", "endpoints": [{"url": "http://127.0.0.1:1"}]}
    return Settings(**{"chain": chain, **sections})


async def test_it_is_chosen_by_the_settings_and_needs_no_contracts() -> None:
    source = make_source(_settings())
    assert isinstance(source, CoreSource) and isinstance(source, BlockSource)
    assert source.instant and source.first_block == 1
    assert source.events == {"Played": set(PLAYED), "ManageEntity": set(MANAGED)}
    assert [node.name for node in source.nodes] == ["127.0.0.1:1"]
    await source.close()


def test_contracts_make_no_sense_on_it() -> None:
    contract = {"address": "0x" + "ab" * 20, "abi": ["event A()"]}
    with pytest.raises(ConfigError, match="a Core chain has none"):
        make_source(_settings(contracts=[contract]))
    with pytest.raises(ConfigError, match=r"chain\.endpoints is empty"):
        make_source(_settings(chain={"source": "core"}))
