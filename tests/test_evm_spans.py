"""EvmSource's spans are exact whatever is asked for, end cleanly, and stay within their bounds."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import pytest
from evmkit import (
    ADDRESS,
    LIKED,
    OTHER,
    SIGNATURE,
    assert_whole,
    chain_of,
    collected,
    hasty,
    like,
    play,
    ranges,
    source_of,
    until,
)  # fmt: skip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from indexer.config import ContractSettings
from indexer.fakechain import FakeChain, FakeLog, FakeNode, Fault, limit_range, limit_results, slow
from indexer.model import Span
from indexer.sources import ahead
from indexer.sources.ranges import EventTarget

pytestmark = pytest.mark.usefixtures("hasty")
__all__ = ["hasty"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_spans_cover_exactly_what_was_asked_for(monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    events = data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 5]), min_size=20, max_size=60), "events")
    chain = chain_of(events, final_lag=data.draw(st.integers(0, 20), "final_lag"))
    first = data.draw(st.integers(0, 5), "first")
    last = len(events) - data.draw(st.integers(0, 15), "left out")
    target = data.draw(st.integers(1, 30), "max_events")
    in_flight = data.draw(st.integers(1, 6), "requests_in_flight")
    faults = [
        limit_range(limit, code, message)
        for limit, code, message in data.draw(
            st.lists(
                st.tuples(
                    st.integers(1, 20), st.sampled_from([-32602, -32005, -32000]),
                    st.sampled_from(["block range too large", "query exceeds max results 20", "busy"]),
                ),
                max_size=1,
            ),
            "limit_range",
        )
    ]  # fmt: skip
    faults += [limit_results(data.draw(st.integers(5, 20), "limit_results"), -32005, "too many logs")]
    start = data.draw(st.integers(1, 70), "start")
    with_times = data.draw(st.booleans(), "block_timestamp_in_logs")

    joined = ahead._joined

    def small_enough(span: Span, ready: Sequence[Span]) -> Span:
        assert sum(one.events for one in (span, *ready)) <= target
        return joined(span, ready)

    async def check() -> None:
        async with (
            FakeNode(chain, block_timestamp_in_logs=with_times, keep_log=True) as node,
            source_of(node, max_events=target, requests_in_flight=in_flight, start=start) as source,
        ):
            node.faults.extend(faults)
            spans = await collected(source, first, last)
            assert_whole(spans, chain, first, last)

    with monkeypatch.context() as patched:
        patched.setattr(ahead, "_joined", small_enough)
        asyncio.run(asyncio.wait_for(check(), 20))


async def test_none_are_asked_for() -> None:
    async with FakeNode(chain_of([1, 1])) as node, source_of(node) as source:
        assert await collected(source, 2, 1) == []


async def test_what_is_ready_is_joined_up_to_the_target() -> None:
    chain = chain_of([2] * 100)
    async with FakeNode(chain) as node, source_of(node, max_events=25, max_blocks=5, start=5) as source:
        source._history._max_blocks = 100
        spans: list[Span] = []
        async for span in source.spans(1, 100):
            spans.append(span)
            await asyncio.sleep(0.02)  # a commit; meanwhile the next ranges come
        assert_whole(spans, chain, 1, 100)
        assert max(span.events for span in spans) == 20  # a third range would be too much
        assert len(spans) <= 12


@pytest.mark.parametrize(("max_events", "most"), [(10_000, 240), (100, 40 + 20)])
async def test_what_is_fetched_ahead_is_bounded_while_nobody_takes_it(max_events: int, most: int) -> None:
    """By how many ranges there are, and by the events in those that are ready (others are under way still)."""
    chain = chain_of([3] * 600)
    async with (
        FakeNode(chain, keep_log=True) as node,
        source_of(node, max_blocks=10, max_events=max_events, requests_in_flight=3, start=10) as source,
    ):
        spans = source.spans(1, 600)
        for _ in range(3):
            taken = await anext(spans)
            assert taken.last - taken.first + 1 <= 10
            await asyncio.sleep(0.3)
            assert taken.last + 30 <= max(ranges(node))[1] <= taken.last + most
        await spans.aclose()


@pytest.mark.parametrize("final_lag", [0, 500])
@pytest.mark.parametrize("taken", [0, 1, 3])
async def test_closing_early_leaves_nothing_behind(
    final_lag: int, taken: int, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    chain = chain_of([1] * 300, final_lag=final_lag)
    async with FakeNode(chain) as node, source_of(node, max_blocks=5, start=5) as source:
        await source.heads()
        before = asyncio.all_tasks()
        node.faults.append(slow(0.01, None))
        spans = source.spans(1, 300)
        for _ in range(taken):
            await anext(spans)
        await spans.aclose()
        assert not [task for task in asyncio.all_tasks() - before if "indexer/sources" in repr(task)]
        del spans
    gc.collect()
    assert not caplog.records
    assert not [one for one in recwarn if issubclass(one.category, (RuntimeWarning, ResourceWarning))]


async def test_being_cancelled_in_the_middle_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    chain = chain_of([1] * 300)
    async with FakeNode(chain) as node, source_of(node, max_blocks=5, start=5) as source:
        node.faults.append(slow(0.02, None))

        async def follow() -> None:
            async for _span in source.spans(1, 300):
                pass

        task = asyncio.create_task(follow())
        await until(lambda: node.requests["eth_getLogs"] > 8)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gc.collect()
    assert not caplog.records


async def test_closing_the_source_ends_everything(caplog: pytest.LogCaptureFixture) -> None:
    chain = chain_of([1] * 50)
    before = asyncio.all_tasks()
    async with FakeNode(chain) as node:
        async with source_of(node) as source:
            node.faults.append(slow(0.2, None))
            await source.wait(0.01)  # asks for the finalised block, behind the scenes
        await asyncio.sleep(0)
        assert not [task for task in asyncio.all_tasks() - before if "finalized" in task.get_name()]
    gc.collect()
    assert not caplog.records


# What comes out of the logs


async def test_logs_of_nobody_and_from_before_the_contract() -> None:
    """The filter is a cross product; what only that lets in is passed over, and so is what is older than a contract."""
    chain = FakeChain(final_lag=2)
    for n in range(8):
        chain.mine([play(n), like(n), play(n, OTHER), like(n, OTHER)], [FakeLog(ADDRESS, (), "0x")])
    contracts = [
        ContractSettings(address=ADDRESS.upper().replace("0X", "0x"), abi=[SIGNATURE], start_block=4),
        ContractSettings(address=OTHER, abi=[LIKED]),
    ]
    async with FakeNode(chain) as node, source_of(node, contracts=contracts) as source:
        spans = await collected(source, 0, 8)
    blocks = [block for span in spans for block in span.blocks if block.events]
    assert {b.number: [(e.name, e.address) for e in b.events] for b in blocks} == {
        n: ([("Played", ADDRESS)] if n >= 4 else []) + [("Liked", OTHER)] for n in range(1, 9)
    }
    assert source.contracts.first_block == 0
    assert source.contracts.events == {"Played": {"track", "city"}, "Liked": {"track"}}


async def test_addresses_with_checksums_come_out_in_lower_case() -> None:
    chain = chain_of([2, 0, 1])

    def shouting(logs: Any) -> Fault | None:
        louder = [{**log, "address": "0x" + log["address"][2:].upper()} for log in logs]
        return Fault(result=louder)

    async with FakeNode(chain) as node, source_of(node) as source:
        node.faults.append(lambda method, _params: Fault(after=shouting) if method == "eth_getLogs" else None)
        spans = await collected(source, 0, 3)
        assert_whole(spans, chain, 0, 3)
        assert {event.address for span in spans for block in span.blocks for event in block.events} == {ADDRESS}


@pytest.mark.parametrize("final_lag", [0, 10])
async def test_what_cannot_be_decoded_is_kept_raw_and_its_neighbours_are_whole(final_lag: int) -> None:
    good = play(7)
    spoilt = [
        FakeLog(good.address, good.topics, good.data[:-64]),
        FakeLog(good.address, good.topics[:1], good.data),
        FakeLog(good.address, good.topics, "0x" + "ff" * 64),
        FakeLog(good.address, good.topics, "0x"),
    ]
    chain = FakeChain(final_lag=final_lag)
    chain.mine([good, spoilt[0], play(8)])
    chain.mine([spoilt[1]], [spoilt[2]], [spoilt[3]])
    chain.mine([play(9)])
    async with FakeNode(chain) as node, source_of(node) as source:
        spans = await collected(source, 0, 3)
    events = [(b.number, e.index, e.args["track"]) for span in spans for b in span.blocks for e in b.events]
    assert events == [(1, 0, 7), (1, 2, 8), (3, 0, 9)]
    raw = [one for span in spans for one in span.quarantined]
    assert [(one.number, one.index, one.event, one.address) for one in raw] == [
        (1, 1, "Played", ADDRESS), *((2, n, "Played", ADDRESS) for n in range(3))
    ]  # fmt: skip
    mined = [chain.blocks[1].logs[1], *chain.blocks[2].logs]
    for one, log in zip(raw, mined, strict=True):
        assert one.block_hash == chain.blocks[one.number].hash
        assert ("0x" + one.data.hex(), ["0x" + topic.hex() for topic in one.topics]) == (log["data"], log["topics"])
        assert "0x" + one.tx_hash.hex() == log["transactionHash"]
        assert one.error


def test_spans_shrink_where_their_transaction_takes_too_long_and_grow_back() -> None:
    target = EventTarget(5_000, 2.0)
    target.took(8.0)
    assert target.events == 1_250
    target.took(1.0)
    assert target.events == 1_376
    for _ in range(40):
        target.took(0.1)
    assert target.events == 5_000
    target.took(1e9)
    assert target.events == 1
