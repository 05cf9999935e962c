"""EvmSource on history: every refusal that providers are known for, and spans that are exact whatever comes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
from evmkit import (
    ADDRESS,
    OTHER,
    SIGNATURE,
    THIRD,
    assert_whole,
    chain_of,
    collected,
    error,
    fails,
    hasty,
    play,
    ranges,
    source_of,
)  # fmt: skip

from indexer.config import ContractSettings, EndpointSettings
from indexer.errors import RpcUnavailable
from indexer.fakechain import FakeChain, FakeNode, Fault, FaultSource, limit_range, limit_results
from indexer.model import Span

pytestmark = pytest.mark.usefixtures("hasty")
__all__ = ["hasty"]

BLOCKS = 12_000


@pytest.fixture(scope="module")
def sparse() -> FakeChain:
    """12,000 blocks, every 37th with one to three plays."""
    return chain_of([0 if n % 37 else 1 + n % 3 for n in range(BLOCKS)])


@pytest.fixture(scope="module")
def dense() -> FakeChain:
    """400 blocks with up to 12 plays each."""
    return chain_of([n % 13 for n in range(400)])


def works(a: int, b: int) -> str:
    return f"this block range should work: [{a:#x}, {b:#x}]"


# What each refuses, by how many blocks it really takes
RANGES: list[tuple[str, int, int, str | Callable[[int, int], str], int]] = [
    ("alchemy", 2000, -32602, lambda a, b: f"Log response size exceeded. You can make eth_getLogs requests with up to "
        f"a 2K block range. Based on your parameters, {works(a, a + 1999)}", 400),
    ("alchemy-inverted", 500, -32602, lambda a, b: works(a + 499, a), 200),
    ("alchemy-same", 500, -32602, lambda a, b: works(a, b), 200),
    ("alchemy-elsewhere", 500, -32602, lambda a, b: works(0, 5), 200),
    ("alchemy-free", 10, -32600, lambda a, b: "Under the Free tier plan, you can make eth_getLogs requests with up to "
        f"a 10 block range. Based on your parameters, {works(a, a + 9)}. Upgrade to PAYG for more.", 400),
    ("aurora", 2000, -32000, "You can make eth_getLogs requests with up to a 2,000 block range.", 200),
    ("infura-try", 700, -32005, lambda a, b: f"Try with this block range [0x{a:X}, 0x{a + 699:X}].", 200),
    ("llama-retry", 400, -32602, lambda a, b: "query exceeds max results 20000, retry with the range "
        f"{a}-{a + 399}", 200),
    ("infura-2026", 10_000, -32602, lambda a, b: f"range {b - a + 1} exceeds limit of 10000", 200),
    ("quicknode", 10_000, -32614, "eth_getLogs is limited to a 10,000 range", 413),
    ("1rpc", 1000, -32000, "eth_getLogs is limited to 0 - 1000 blocks range", 200),
    ("zkevm", 10_000, -32005, "logs are limited to a 10.000 block range", 200),
    ("blockpi", 1024, -32602, "eth_getLogs is limited to 1024 block. Please check the parameter requirements", 200),
    ("blast-paid", 5000, -32600, lambda a, b: "block range exceeds the range allowed for your plan "
        f"({b - a} > 5000)", 200),
    ("ankr", 3000, -32600, "block range is too wide", 200),
    ("ankr-narrow", 800, -32600, "block range is too wide", 200),
    ("moonriver", 1024, -32603, "block range is too wide (maximum 1024)", 200),
    ("ankr-tac", 1000, -32000, "requested range exceeds maximum [from, to] blocks distance: 1000", 200),
    ("cloudflare", 799, -32047, "Invalid block range. Max range: 800", 200),
    ("thirdweb", 3500, -32602, "Maximum allowed number of requested blocks is 3500", 200),
    ("avalanche", 2047, -32000, lambda a, b: f"requested too many blocks from {a} to {b}, maximum is set to 2048", 200),
    ("chainstack", 10_000, -32602, "Block range limit exceeded. See more details at https://docs.chainstack.com", 200),
    ("chainstack-small", 100, -32602, "Block range limit exceeded.", 200),
    ("coinbase", 999, -32602, "please limit the query to at most 1000 blocks", 200),
    ("publicnode", 5000, -32701, "exceed maximum block range: 5000", 403),
    ("hyperliquid", 1000, -32602, "query exceeds max block range 1000", 200),
    ("tron", 4999, -32600, "exceed max block range: 5000", 200),
    ("swell", 10_000, -32000, "block range greater than 10000 max", 200),
    ("somnia", 1000, -32000, "block range exceeds 1000", 200),
    ("harmony", 1024, -32000, "query must be smaller than size 1024", 200),
    ("merkle", 10_000, -32602, "eth_getLogs range is too large, max is 10k blocks", 200),
    ("llama-1k", 1000, -32602, "range is too large, max is 1k blocks", 200),
    ("sei", 2000, -32000, lambda a, b: f"block range too large ({b - a}), maximum allowed is 2000 blocks", 200),
    ("base", 2000, -32614, "block range too large", 200),
    ("monad-100", 100, -32602, "Block range is too large", 413),
    ("drpc", 10_000, 35, "ranges over 10000 blocks are not supported on freetier", 400),
    ("altitude", 3000, -32000, "allowed block range threshold exceeded", 200),
    ("erpc", 3000, -32012, "exceeded max allowed range", 413),
    ("infura-time", 6000, -32005, "query timeout exceeded. Consider reducing your block range.", 200),
    ("bsc", 5000, -32005, "limit exceeded", 200),
    ("alchemy-server", 5000, -32000, "ServerError(-32000): execution timeout", 200),
]  # fmt: skip


@pytest.mark.parametrize(("limit", "code", "message", "status"), [r[1:] for r in RANGES], ids=[r[0] for r in RANGES])
async def test_a_range_that_is_refused(
    sparse: FakeChain, limit: int, code: int, message: str | Callable[[int, int], str], status: int
) -> None:
    last = min(BLOCKS, 40 * limit)
    async with FakeNode(sparse, keep_log=True) as node, source_of(node, start=BLOCKS, max_blocks=20_000) as source:
        node.faults.append(limit_range(limit, code, message, status=status))
        assert_whole(await collected(source, 1, last), sparse, 1, last)
        assert len(ranges(node)) <= 3 * ceil(last / limit) + 12


# What each takes in one answer, by how many logs
RESULTS: list[tuple[str, int, int, str | Callable[[int, int], str], int]] = [
    ("infura", 100, -32005, lambda a, b: "query returned more than 100 results. Try with this block range "
        f"[{a:#x}, {b:#x}].", 200),
    ("alchemy", 50, -32602, lambda a, b: f"Log response size exceeded. {works(a, b)}", 400),
    ("alchemy-inverted", 50, -32602, lambda a, b: works(b, a), 400),
    ("llama", 80, -32602, lambda a, b: f"query exceeds max results 80, retry with the range {a}-{b}", 200),
    ("infura-plain", 100, -32005, "query returned more than 10000 results", 200),
    ("zkevm", 30, -32005, "logs: more than 30 logs", 200),
    ("arbitrum", 100, -32000, "logs matched by query exceeds limit of 100", 200),
    ("hyperrpc", 100, -32000, "50000 logs returned", 200),
    ("many", 100, -32000, "too many logs", 200),
    ("1rpc", 40, -32000, "response size should not greater than 10000000 bytes", 200),
    ("optimism", 40, -32020, "backend response too large", 503),
    ("reth", 40, -32008, "Response is too big", 200),
    ("rust-client", 40, -32603, "error decoding response body", 200),
    ("ankr", 12, -32602, "query exceeds max results 20000", 200),
]  # fmt: skip


@pytest.mark.parametrize(("limit", "code", "message", "status"), [r[1:] for r in RESULTS], ids=[r[0] for r in RESULTS])
async def test_an_answer_that_is_too_much(
    dense: FakeChain, limit: int, code: int, message: str | Callable[[int, int], str], status: int
) -> None:
    async with FakeNode(dense, keep_log=True) as node, source_of(node, start=400) as source:
        node.faults.append(limit_results(limit, code, message, status=status))
        spans = await collected(source, 0, 400)
        assert_whole(spans, dense, 0, 400)
        assert len(ranges(node)) <= 3 * ceil(len(dense.logs()) / limit) + 30


def refused_above(limit: int, fault: Fault) -> FaultSource:
    return fails(None, lambda p: fault if int(p[0]["toBlock"], 16) - int(p[0]["fromBlock"], 16) >= limit else None,
                 "eth_getLogs")  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        Fault(413, body=b"<html><head><title>413 Request Entity Too Large</title></head></html>"),
        Fault(413),
        Fault(503, body=b"503 Service Unavailable"),
        Fault(200, body=b'{"jsonrpc":"2.0","id":null,"error":"query exceeds max results"}'),
    ],
    ids=["nginx", "bare", "503", "an-error-that-is-a-text"],
)
async def test_a_refusal_without_json_rpc(sparse: FakeChain, fault: Fault) -> None:
    async with FakeNode(sparse, keep_log=True) as node, source_of(node, start=4000) as source:
        node.faults.append(refused_above(1000, fault))
        assert_whole(await collected(source, 1, 4000), sparse, 1, 4000)
        assert len(ranges(node)) <= 24


PASSING = [
    ("429", error(-32005, "rate limit exceeded", 429)),
    ("429-retry-after", error(-32005, "too many requests", 429, Retry_After="0.05")),
    ("429-retry-after-0", error(-32005, "too many requests", 429, Retry_After="0")),
    ("429-retry-after-date", error(-32005, "too many requests", 429, Retry_After="Wed, 21 Oct 2026 07:28:00 GMT")),
    ("429-html", Fault(429, body=b"<html>Too Many Requests</html>")),
    ("infura", error(-32005, "project ID request rate exceeded")),
    ("quicknode", error(-32012, "credits limited to 6000/sec")),
    ("alchemy", error(429, "Your app has exceeded its compute units per second capacity")),
    ("base", error(-32016, "over rate limit")),
    ("quota", error(-32000, "Exceeded the quota usage")),
    ("load", error(-32000, "the node is under too much load")),
    ("reached", error(-32007, "50/second request limit reached")),
    ("proxyd", error(-32011, "no backend is currently healthy to serve traffic", 503)),
    ("bsc", error(-32005, "limit exceeded")),
    ("alchemy-503", Fault(503, body=b"503 Service Unavailable")),
    ("502", Fault(502, body=b"<html><h1>502 Bad Gateway</h1></html>")),
    ("base-behind", error(-32000, "block range extends beyond current head block")),
    ("avalanche", error(-32000, "requested from block 1 after last accepted block 0")),
    ("unfinalized", error(-32000, "cannot query unfinalized data")),
    ("missing-trie", error(-32000, "missing trie node 0d53c4")),
    ("internal", error(-32603, "internal error")),
    ("strange-code", Fault(error={"code": "E_BUSY", "message": "busy"})),
    ("no-words", Fault(error={})),
    ("empty", Fault(body=b"")),
    ("null", Fault(result=None)),
    ("text", Fault(result="0x")),
    ("no-result", Fault(body=b'{"jsonrpc":"2.0","id":1}')),
    ("not-utf8", Fault(body=b'{"result": "\xff\xfe"}')),
    ("a-list", Fault(body=b"[]")),
]  # fmt: skip


@pytest.mark.parametrize("fault", [row[1] for row in PASSING], ids=[row[0] for row in PASSING])
async def test_trouble_that_passes(sparse: FakeChain, fault: Fault) -> None:
    """Six times in a row, in answer to anything; then all is well, and ranges are as large as before soon."""
    async with FakeNode(sparse, keep_log=True) as node, source_of(node, start=500) as source:
        await source.heads()
        node.faults.append(fails(6, fault, "" if fault.status != 200 else "eth_getLogs"))
        assert_whole(await collected(source, 1, BLOCKS), sparse, 1, BLOCKS)
        asked = ranges(node)
        assert len(asked) <= 45
        assert max(b - a + 1 for a, b in asked[-6:]) >= 500


@pytest.mark.parametrize(
    "fault",
    [
        error(-32005, "busy"), error(-32602, "busy"), error(-32603, "internal error"), Fault(429), Fault(body=b""),
        Fault(504, body=b"gateway time-out"), Fault(delay_seconds=0.5, body=b""),
    ],
    ids=["-32005", "-32602", "-32603", "504", "429", "cut", "timeout"],
)  # fmt: skip
async def test_a_range_that_is_too_much_in_no_words_for_it(sparse: FakeChain, fault: Fault) -> None:
    async with FakeNode(sparse, keep_log=True) as node:
        node.faults.append(refused_above(900, fault))
        async with source_of(node, start=2000, request_timeout_seconds=0.1) as source:
            assert_whole(await collected(source, 1, 6000), sparse, 1, 6000)
            assert len(ranges(node)) <= 40


ADDRESSES = [
    ("alchemy", error(-32602, "Please, specify less number of addresses")),
    ("geth", error(-32602, "exceed max addresses or topics per search position: 100")),
    ("infura", error(-32602, "too many filters given: 6000, current limit is 5000")),
]


@pytest.mark.parametrize("fault", [row[1] for row in ADDRESSES], ids=[row[0] for row in ADDRESSES])
async def test_too_many_addresses_are_split_and_blocks_are_not(fault: Fault) -> None:
    many = [f"0x{n:040x}" for n in range(1, 40)]
    chain = FakeChain(final_lag=5)
    for n in range(60):
        chain.mine([play(n, many[n % 39]), play(n, many[(7 * n) % 39])], [play(n, many[0])])
    contracts = [ContractSettings(address=many, abi=[SIGNATURE])]
    async with FakeNode(chain, keep_log=True) as node, source_of(node, contracts=contracts) as source:
        node.faults.append(fails(None, lambda p: fault if len(p[0].get("address", [])) > 6 else None, "eth_getLogs"))
        assert_whole(await collected(source, 0, 60), chain, 0, 60, many)
        assert {b - a + 1 for a, b in ranges(node)} == {56}
        assert source.endpoints.all[0].max_addresses == 4


async def test_one_block_that_is_too_much_is_asked_for_in_parts() -> None:
    chain = FakeChain(final_lag=1)
    for _ in range(2):
        chain.mine([play(1), play(2), play(3, OTHER), play(4, THIRD)], [play(5, OTHER), play(6, THIRD)])
    contracts = [ContractSettings(address=[ADDRESS, OTHER, THIRD], abi=[SIGNATURE])]

    def judge(logs: Any) -> Fault | None:
        return error(-32005, "query returned more than 2 results") if len(logs) > 2 else None

    async with FakeNode(chain) as node, source_of(node, contracts=contracts) as source:
        node.faults.append(lambda method, _params: Fault(after=judge) if method == "eth_getLogs" else None)
        assert_whole(await collected(source, 0, 2), chain, 0, 2, (ADDRESS, OTHER, THIRD))


async def test_one_block_that_is_always_too_much_ends_in_the_providers_words(dense: FakeChain) -> None:
    async with FakeNode(dense, keep_log=True) as node, source_of(node, node_again(node), start=3) as source:
        node.faults.append(limit_results(5, -32005, "query returned more than 5 results, dear customer"))
        given: list[Span] = []

        async def take() -> None:
            async for span in source.spans(0, 100):
                given.append(span)
                await asyncio.sleep(0.2)

        with pytest.raises(RpcUnavailable, match=r"node\d: eth_getLogs: query returned more than 5 results, dear"):
            await take()
        assert_whole(given, dense, 0, 5)  # what is whole is given before the failure is
        assert len(ranges(node)) < 100


def node_again(node: FakeNode) -> EndpointSettings:
    return EndpointSettings.model_validate({"url": node.url, "name": "node1"})


async def test_ranges_grow_towards_the_events_wanted_and_back(dense: FakeChain) -> None:
    async with FakeNode(dense, keep_log=True) as node:
        async with source_of(node, start=2, max_events=60) as source:
            assert_whole(await collected(source, 0, 400), dense, 0, 400)
        sizes = [b - a + 1 for a, b in ranges(node)]
        assert max(sizes) < 40  # 12 events a block at most, 6 in the mean
        assert len(sizes) < 80


async def test_a_named_limit_cuts_ranges_but_gives_no_endless_one(sparse: FakeChain) -> None:
    """A range is at most a few pieces, so that something can be committed before long."""
    async with FakeNode(sparse, keep_log=True) as node, source_of(node, start=2000, requests_in_flight=1) as source:
        node.faults.append(limit_range(10, -32600, "you can make eth_getLogs requests with up to a 10 block range"))
        source.endpoints.all[0].max_blocks = 10
        spans = await collected(source, 1, 2000)
        assert_whole(spans, sparse, 1, 2000)
        assert len(spans) == len(ranges(node)) / 8 == 25


async def test_what_one_piece_gave_is_not_asked_for_again(sparse: FakeChain) -> None:
    """A provider that lets through a few requests at a time would else never finish a range of many pieces."""
    async with FakeNode(sparse, keep_log=True) as node, source_of(node, start=BLOCKS) as source:
        node.faults.append(limit_range(100, -32000, "too many logs"))
        calls = iter(range(1_000_000))
        limited = error(-32005, "rate limit exceeded", 429)
        node.faults.insert(0, fails(None, lambda _p: limited if next(calls) % 5 == 4 else None))
        assert_whole(await collected(source, 1, BLOCKS), sparse, 1, BLOCKS)
        assert len(ranges(node)) < 400


async def test_blocks_without_times_in_their_logs_cost_a_batch_of_headers(dense: FakeChain) -> None:
    async with FakeNode(dense, block_timestamp_in_logs=False) as node, source_of(node, start=400) as source:
        node.reverse_batches = True
        await source.heads()
        before = node.http_requests
        assert_whole(await collected(source, 1, 400), dense, 1, 400)
        assert node.http_requests - before <= 1 + 1 + 1 + 4  # chain id, logs, header, 369 headers in batches


@pytest.mark.parametrize("refusal", [
    error(-32600, "Batch of more than 7 requests are not allowed on free tier"),
    Fault(413, body=b"too large"),
    Fault(400, body=b"batches are not supported"),
    Fault(body=b'{"jsonrpc":"2.0","id":null,"error":{"code":-32005,"message":"batch size too large"}}'),
    Fault(body=b'[{"jsonrpc":"2.0","id":null,"error":{"code":-32600,"message":"batch limit exceeded"}}]'),
])  # fmt: skip
async def test_batches_as_small_as_the_node_wants(dense: FakeChain, refusal: Fault) -> None:
    async with FakeNode(dense, block_timestamp_in_logs=False) as node, source_of(node, start=400) as source:
        answer = node._answer

        async def only_small_batches(body: bytes, socket: Any) -> Any:
            if body.count(b'"id"') > 7:
                node.requests["refused"] += 1
                text = refusal.body or b'{"jsonrpc":"2.0","id":null,"error":%s}' % json.dumps(refusal.error).encode()
                return text, refusal
            return await answer(body, socket)

        node._answer = only_small_batches  # type: ignore[method-assign]
        assert_whole(await collected(source, 1, 100), dense, 1, 100)
        assert node.requests["refused"] <= 12
