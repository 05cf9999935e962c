"""EvmSource above finality: block by block and by hash, with nodes that lie, and new heads by WebSocket."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from evmkit import (
    ADDRESS,
    OTHER,
    assert_whole,
    chain_of,
    collected,
    error,
    fails,
    hasty,
    like,
    play,
    source_of,
    until,
)  # fmt: skip
from structlog.testing import capture_logs

from indexer.fakechain import (
    FakeChain,
    FakeLog,
    FakeNode,
    Fault,
    empty_logs,
    logs_bloom,
    missing_block,
    null_blocks,
    old_head,
    slow,
)  # fmt: skip
from indexer.sources import evm, heads

pytestmark = pytest.mark.usefixtures("hasty")
__all__ = ["hasty"]

FAR = 10_000  # a final lag with which nothing is final


def asked(node: FakeNode, method: str) -> list[Any]:
    return [params for name, params in node.log if name == method]


async def test_block_by_block_by_hash() -> None:
    chain = chain_of([2, 0, 1, 3, 0, 0], final_lag=FAR)
    async with FakeNode(chain, keep_log=True) as node, source_of(node) as source:
        spans = await collected(source, 1, 6)
        assert_whole(spans, chain, 1, 6)
        assert [span.blocks[0].number for span in spans] == list(range(1, 7))
        hashes = [block.header["hash"] for block in chain.blocks[1:]]
        assert sorted(params[0]["blockHash"] for params in asked(node, "eth_getLogs")) == sorted(hashes)


async def test_history_and_head_meet_at_the_final_block() -> None:
    chain = chain_of([1] * 30, final_lag=10)
    async with FakeNode(chain) as node, source_of(node) as source:
        now = await source.heads()
        assert (now.newest, now.final, now.hash) == (30, 20, chain.head.hash)
        spans = await collected(source, 5, 30)
        assert_whole(spans, chain, 5, 30)
        assert [span.last for span in spans if span.final][-1] == 20
        assert len([span for span in spans if not span.final]) == 10


async def test_one_request_tells_of_a_head_and_two_bring_it() -> None:
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain, keep_log=True) as node, source_of(node) as source:
        await source.heads()
        chain.mine([play(9)])
        node.requests.clear()
        assert (await source.heads()).newest == 6
        assert_whole(await collected(source, 6, 6), chain, 6, 6)
        assert node.requests == {"eth_getBlockByNumber": 1, "eth_getLogs": 1}


# Empty answers


async def test_an_empty_answer_is_doubted_until_the_node_has_indexed_the_block() -> None:
    chain = chain_of([1, 2, 0, 1], final_lag=FAR)
    async with FakeNode(chain) as node, source_of(node) as source:
        node.faults.append(empty_logs(5, 2))
        assert_whole(await collected(source, 1, 4), chain, 1, 4)
        assert node.requests["eth_getLogs"] <= 4 + 8


async def test_an_empty_answer_is_taken_from_nobody_who_shows_our_logs_unfiltered() -> None:
    """The filter's index lags behind the block's own logs."""
    chain = chain_of([1, 2], final_lag=FAR)
    async with FakeNode(chain) as node, source_of(node) as source:
        node.faults.append(fails(4, lambda p: Fault(result=[]) if "address" in p[0] else None, "eth_getLogs"))
        assert_whole(await collected(source, 1, 2), chain, 1, 2)


async def test_without_check_bloom_an_empty_answer_is_believed() -> None:
    chain = chain_of([0, 2], final_lag=FAR)
    async with FakeNode(chain) as node, source_of(node, check_bloom=False) as source:
        node.faults.append(empty_logs(None))
        assert [span.events for span in await collected(source, 1, 2)] == [0, 0]
        assert node.requests["eth_getLogs"] == 2


def lookalikes() -> list[FakeLog]:
    """Logs of others whose addresses and topics set, together, every bit that a play of ours would."""
    ours = int(logs_bloom([{"address": ADDRESS, "topics": [play(1).topics[0]]}]), 16)
    source, covered, found = random.Random(7), 0, []
    while covered & ours != ours:
        address, topic = "0x" + source.randbytes(20).hex(), "0x" + source.randbytes(32).hex()
        bits = int(logs_bloom([{"address": address, "topics": [topic]}]), 16)
        if bits & ours & ~covered:
            covered |= bits
            found.append(FakeLog(address, (topic,), "0x"))
    return found


@pytest.mark.parametrize(
    "logs",
    [lookalikes, lambda: [like(1), play(2, OTHER)], lambda: [FakeLog(OTHER, (play(1).topics[0],), "0x"), like(3)]],
    ids=["lookalikes", "our-other-event-and-their-play", "their-play"],
)
async def test_a_bloom_that_speaks_falsely_is_seen_through(logs: Callable[[], list[FakeLog]]) -> None:
    chain = FakeChain(final_lag=FAR)
    chain.mine([play(1)])
    chain.mine(logs())
    async with FakeNode(chain) as node, source_of(node) as source:
        assert source.contracts.may_be_in(int(chain.head.header["logsBloom"], 16))
        assert_whole(await collected(source, 1, 2), chain, 1, 2)
        assert node.requests["eth_getLogs"] == 3


async def test_a_node_that_never_shows_whole_blocks_is_believed_after_a_while() -> None:
    chain = FakeChain(final_lag=FAR)
    chain.mine([like(1), play(2, OTHER)])
    refusal = error(-32602, "please specify an address or a topic")
    async with FakeNode(chain) as node, source_of(node) as source:
        node.faults.append(fails(None, lambda p: None if "address" in p[0] else refusal, "eth_getLogs"))
        with capture_logs() as logged:
            assert_whole(await collected(source, 1, 1), chain, 1, 1)
        assert [one["block"] for one in logged if one["event"] == "empty logs believed"] == [1]
        assert node.requests["eth_getLogs"] == 12


# Other lies


@pytest.mark.parametrize(
    "fault",
    [
        lambda: null_blocks(3, 4),
        lambda: missing_block(4, 3),
        lambda: fails(4, Fault(behind=2)),
        lambda: fails(3, error(-32000, "unknown block"), "eth_getLogs"),
        lambda: fails(3, Fault(503)),
    ],
    ids=["null", "missing", "balancer", "unknown", "503"],
)
async def test_a_block_that_was_announced_is_waited_for(fault: Callable[[], Any]) -> None:
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain) as node, source_of(node) as source:
        await source.heads()
        node.faults.append(fault())
        assert_whole(await collected(source, 1, 5), chain, 1, 5)
        assert node.requests.total() < 60


def changed(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], times: int | None = 3) -> Any:
    """The next true answers with logs are changed so."""
    left = [times]

    def judge(logs: Any) -> Fault | None:
        if not logs or left[0] == 0:
            return None
        left[0] = None if left[0] is None else left[0] - 1
        return Fault(result=change(json.loads(json.dumps(logs))))

    return lambda method, _params: Fault(after=judge) if method == "eth_getLogs" else None


def with_field(name: str, value: Any, at: int = -1) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    def change(logs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        logs[at][name] = value
        return logs

    return change


LIES: dict[str, Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = {
    "other-block": lambda logs: [
        {**log, "blockHash": "0x" + "11" * 32, "topics": [log["topics"][0], "0x" + "99" * 32]} for log in logs
    ],
    "mixed-blocks": lambda logs: [
        {**logs[0], "blockHash": "0x" + "22" * 32, "topics": [logs[0]["topics"][0], "0x" + "99" * 32]}, *logs[1:]
    ],
    "removed": lambda logs: [
        {**log, "removed": True, "topics": [log["topics"][0], "0x" + "99" * 32]} for log in logs
    ],
    "twice": lambda logs: [*logs, logs[-1]],
    "all-twice": lambda logs: logs + logs,
    "elsewhere": with_field("blockNumber", "0x9999"),
    "no-number": with_field("blockNumber", "0xzz"),
    "null-number": with_field("blockNumber", None),
    "no-index": with_field("logIndex", ""),
    "short-hash": with_field("blockHash", "0x12"),
    "short-tx": with_field("transactionHash", "0x12"),
    "no-tx": with_field("transactionHash", "0x" + "zz" * 32),
    "no-topics": lambda logs: [{key: value for key, value in log.items() if key != "topics"} for log in logs],
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
@pytest.mark.parametrize("final_lag", [0, FAR])
async def test_logs_that_cannot_be_are_asked_for_again(lie: Any, final_lag: int) -> None:
    chain = chain_of([2, 3, 2, 4], final_lag=final_lag)
    async with FakeNode(chain) as node, source_of(node) as source:
        node.faults.append(changed(lie))
        assert_whole(await collected(source, 1, 4), chain, 1, 4)
        assert node.requests["eth_getLogs"] <= 12


@pytest.mark.parametrize("final_lag", [0, FAR])
async def test_logs_in_any_order_come_out_in_the_chains(final_lag: int) -> None:
    chain = chain_of([2, 30, 20, 4], final_lag=final_lag)
    async with FakeNode(chain) as node, source_of(node) as source:
        node.faults.append(changed(lambda logs: random.Random(1).sample(logs, len(logs)), None))
        assert_whole(await collected(source, 1, 4), chain, 1, 4)
        assert node.requests["eth_getLogs"] == (1 if final_lag == 0 else 4)


HEADERS = {
    "number": "0x77", "hash": "0x12", "timestamp": "soon", "logsBloom": "0xgg", "parentHash": "0x" + "gg" * 32,
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("final_lag", [0, FAR])
async def test_headers_that_cannot_be_are_asked_for_again(name: str, final_lag: int) -> None:
    chain = chain_of([2, 3, 2, 4], final_lag=final_lag)

    def judge(header: Any) -> Fault | None:
        return Fault(result={**header, name: HEADERS[name]})

    async with FakeNode(chain, block_timestamp_in_logs=False) as node, source_of(node) as source:
        await source.heads()
        node.faults.append(fails(3, Fault(after=judge), "eth_getBlockByNumber"))
        assert_whole(await collected(source, 1, 4), chain, 1, 4)


async def test_a_block_that_was_replaced_between_its_header_and_its_logs() -> None:
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain) as node, source_of(node) as source:
        await source.heads()
        chain.fork(2, [[[play(50)]], [[play(51)]], [[play(52)]]])
        assert_whole(await collected(source, 1, 6), chain, 1, 6)
        assert await source.ref(5) == chain.blocks[5].ref


async def test_a_chain_that_became_shorter_ends_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_PATIENCE_SECONDS", 0.05)
    chain = chain_of([1] * 8, final_lag=FAR)
    async with FakeNode(chain) as node, source_of(node) as source:
        last = (await source.heads()).newest
        chain.fork(3, [[[play(50)]]])
        assert_whole(await collected(source, 1, last), chain, 1, 6)
        now = await source.heads()
        assert (now.newest, now.hash) == (6, chain.head.hash)


async def test_a_block_that_is_slow_to_come_does_not_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_PATIENCE_SECONDS", 0.01)
    chain = chain_of([1] * 8, final_lag=FAR)
    async with FakeNode(chain) as node, source_of(node) as source:
        await source.heads()
        node.faults.append(slow(0.05, None, ("eth_getLogs",)))
        assert_whole(await collected(source, 1, 8), chain, 1, 8)


# Heads


async def test_a_head_that_goes_backwards_behind_a_balancer() -> None:
    chain = chain_of([1] * 40, final_lag=20)
    async with FakeNode(chain) as node, source_of(node) as source:
        assert (await source.heads()).newest == 40
        node.faults.append(old_head(3, 1))
        back = await source.heads()
        assert (back.newest, back.hash) == (37, chain.blocks[37].hash)
        assert back.final == 20
        node.faults.clear()
        assert (await source.heads()).newest == 40


async def test_a_head_that_drops_far_is_looked_for_elsewhere() -> None:
    chain = chain_of([1] * 40)
    async with FakeNode(chain) as syncing, FakeNode(chain) as good, source_of(syncing, good) as source:
        assert (await source.heads()).newest == 40
        syncing.faults.append(old_head(30))
        assert (await source.heads()).newest == 40
        assert source.endpoints.best() is source.endpoints.all[1]


@pytest.mark.parametrize("confirmations", [0, 7, 64, 500])
async def test_without_a_finalized_tag_it_is_confirmations(confirmations: int) -> None:
    chain = chain_of([1] * 100)
    async with FakeNode(chain, supports_finalized=False) as node:
        with capture_logs() as logged:
            async with source_of(node, confirmations=confirmations) as source:
                assert (await source.heads()).final == max(100 - confirmations, -1)
                chain.mine()
                assert (await source.heads()).final == max(101 - confirmations, -1)
                assert_whole(await collected(source, 1, 101), chain, 1, 101)
        assert [one["event"] for one in logged] == ["no finalized tag"]


TAG_TROUBLE = [
    ("502", Fault(502), False),
    ("429", error(-32005, "rate limit", 429), False),
    ("garbage", Fault(body=b"<html>"), False),
    ("internal-once", error(-32603, "internal error"), False),
    ("geth", error(-39001, "finalized block not found"), True),
    ("erigon-internal", error(-32603, "Internal error"), True),
    ("null", Fault(result=None), True),
    ("unsupported", error(-32000, "tag finalized is not supported on pre-merge network"), True),
]


@pytest.mark.parametrize(("fault", "unknown"), [row[1:] for row in TAG_TROUBLE], ids=[row[0] for row in TAG_TROUBLE])
async def test_trouble_is_not_taken_for_a_missing_tag(fault: Fault, unknown: bool) -> None:
    """To take it so would make blocks final that are not."""
    chain = chain_of([1] * 100, final_lag=80)
    async with FakeNode(chain) as node, source_of(node, confirmations=10) as source:
        times = None if unknown else 1 if fault.error and fault.status == 200 else 4
        node.faults.append(fails(times, lambda p: fault if p[0] == "finalized" else None, "eth_getBlockByNumber"))
        assert (await source.heads()).final == (90 if unknown else 20)


async def test_what_was_final_stays_so() -> None:
    chain = chain_of([1] * 50, final_lag=10)
    async with FakeNode(chain) as node, source_of(node) as source:
        assert (await source.heads()).final == 40
        node.faults.append(old_head(5))
        source._final_at = -100.0
        assert (await source.heads()).final == 40


async def test_the_final_block_is_learnt_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evm, "_FINAL_SECONDS", 0.01)
    chain = chain_of([1] * 50, final_lag=10)
    async with FakeNode(chain) as node, source_of(node) as source:
        assert (await source.heads()).final == 40
        chain.mine_empty(5)
        await asyncio.sleep(0.02)
        await source.wait(0.05)
        await until(lambda: source._final == 45)


async def test_poll_seconds_follow_the_chain() -> None:
    chain = FakeChain(block_seconds=6, final_lag=FAR)
    chain.mine_empty(20)
    async with FakeNode(chain) as node, source_of(node, poll_seconds=None) as source:
        assert source.poll_seconds == 0.25
        await collected(source, 1, 20)
        assert source.poll_seconds == 1.5
    async with FakeNode(chain) as node, source_of(node, poll_seconds=0.7) as source:
        assert source.poll_seconds == 0.7
