"""Every row of the table of providers' errors, with whole messages as the providers word them."""

from __future__ import annotations

from typing import Any

import pytest

from indexer.sources.provider_errors import Kind, Trouble, classify, too_large

FIRST, LAST = 1_000_000, 1_099_999  # 100,000 blocks


def seen(
    message: str, code: int | None = -32000, data: str = "", status: int | None = 200,
    first: int | None = FIRST, last: int | None = LAST, retry_after: float | None = None,
) -> Trouble:  # fmt: skip
    return classify(
        status=status, code=code, message=message, data=data, first=first, last=last, retry_after=retry_after
    )


HINTS: list[tuple[str, str, int, tuple[int, int]]] = [
    (
        "alchemy-results",
        "Log response size exceeded. You can make eth_getLogs requests with up to a 2K block range and no limit on the "
        "response size, or you can request any block range with a cap of 10K logs in the response. Based on your "
        "parameters and the response size, this block range should work: [0xf4240, 0xf4300]",
        -32602,
        (1_000_000, 1_000_192),
    ),
    ("alchemy-inverted", "this block range should work: [0xf4300, 0xf4240]", -32602, (1_000_000, 1_000_192)),
    (
        "infura",
        "query returned more than 10000 results. Try with this block range [0xF4240, 0xF4250].",
        -32005,
        (1_000_000, 1_000_016),
    ),
    ("tight-brackets", "Try with this block range [0xf4240,0xf4250].", -32005, (1_000_000, 1_000_016)),
    (
        "zksync",
        "Query returned more than 10000 results. Try with this block range [0xf4240, 0xf4240].",
        -32602,
        (1_000_000, 1_000_000),
    ),
    (
        "llama",
        "query exceeds max results 20000, retry with the range 1000000-1000400",
        -32602,
        (1_000_000, 1_000_400),
    ),
    ("base", "block range too large", -32614, (1_000_000, 1_001_999)),
    ("monad", "Block range is too large", -32602, (1_000_000, 1_001_999)),
    ("candle", "block range too high", -32600, (1_000_000, 1_001_999)),
]


@pytest.mark.parametrize(("message", "code", "hint"), [row[1:] for row in HINTS], ids=[row[0] for row in HINTS])
def test_range_that_will_do(message: str, code: int, hint: tuple[int, int]) -> None:
    trouble = seen(message, code)
    assert (trouble.kind, trouble.hint, trouble.max_blocks) == (Kind.RANGE, hint, None)
    assert trouble.message == message
    assert too_large(FIRST, LAST, trouble) == hint[1] - hint[0] + 1


LIMITS: list[tuple[str, str, int, int]] = [
    (
        "alchemy-free",
        "Under the Free tier plan, you can make eth_getLogs requests with up to a 10 block range.",
        -32600,
        10,
    ),
    ("aurora", "You can make eth_getLogs requests with up to a 2,000 block range.", -32000, 2000),
    ("infura-2026", "range 100000 exceeds limit of 10000", -32602, 10_000),
    ("quicknode", "eth_getLogs is limited to a 10,000 range", -32614, 10_000),
    ("quicknode-blocks", "eth_getLogs and eth_newFilter are limited to a 10,000 blocks range", -32602, 10_000),
    ("1rpc", "eth_getLogs is limited to 0 - 10000 blocks range", -32000, 10_000),
    ("blast", "eth_getLogs is limited to 500 blocks range", -32600, 500),
    ("zkevm", "logs are limited to a 10.000 block range", -32005, 10_000),
    ("blockpi", "eth_getLogs is limited to 1024 block. Please check the parameter requirements", -32602, 1024),
    ("blast-paid", "block range exceeds the range allowed for your plan (100000 > 5000)", -32600, 5000),
    ("ankr", "block range is too wide", -32600, 3000),
    ("moonriver", "block range is too wide (maximum 1024)", -32603, 1024),
    ("ankr-tac", "requested range exceeds maximum [from, to] blocks distance: 1000", -32000, 1000),
    ("morph", "block range is larger than max block range, block range = 100000, max block range = 5000", -32000, 5000),
    ("cloudflare", "Invalid block range. Max range: 800", -32047, 799),
    ("thirdweb", "Maximum allowed number of requested blocks is 3500", -32602, 3500),
    ("avalanche", "requested too many blocks from 1000000 to 1099999, maximum is set to 2048", -32000, 2047),
    ("chainstack", "Block range limit exceeded. See more details at https://docs.chainstack.com", -32602, 10_000),
    ("coinbase", "please limit the query to at most 1000 blocks", -32602, 999),
    ("publicnode", "exceed maximum block range: 50000", -32701, 50_000),
    ("hyperliquid", "query exceeds max block range 1000", -32602, 1000),
    ("tron", "exceed max block range: 5000", -32600, 4999),
    ("swell", "block range greater than 10000 max", -32000, 10_000),
    ("somnia", "block range exceeds 1000", -32000, 1000),
    ("harmony", "query must be smaller than size 1024", -32000, 1024),
    ("merkle", "eth_getLogs range is too large, max is 10k blocks", -32602, 10_000),
    ("llama-1k", "range is too large, max is 1k blocks", -32602, 1000),
    ("sei", "block range too large (100000), maximum allowed is 2000 blocks", -32000, 2000),
    ("etherlink", "Cannot request logs over more than 1000 blocks", -32000, 1000),
]


@pytest.mark.parametrize(("message", "code", "blocks"), [row[1:] for row in LIMITS], ids=[row[0] for row in LIMITS])
def test_limit_of_blocks(message: str, code: int, blocks: int) -> None:
    trouble = seen(message, code)
    assert (trouble.kind, trouble.max_blocks, trouble.hint) == (Kind.RANGE, blocks, None)
    assert too_large(FIRST, LAST, trouble) == blocks
    assert seen("INVALID PARAMS", code, data=f'"{message.upper()}"').max_blocks == blocks


@pytest.mark.parametrize(("message", "code", "blocks"), [row[1:] for row in LIMITS], ids=[row[0] for row in LIMITS])
def test_a_limit_that_is_kept_already_means_halve(message: str, code: int, blocks: int) -> None:
    trouble = seen(message, code, first=10, last=10 + blocks - 1)
    again = {10_000: 100} if "limit exceeded" in message else {}  # Chainstack has a smaller one below
    assert (trouble.kind, trouble.max_blocks) == (Kind.RANGE, again.get(blocks))
    assert too_large(10, 10 + blocks - 1, trouble) == again.get(blocks, blocks // 2)


HALVES: list[tuple[str, str, int]] = [
    ("drpc", "ranges over 10000 blocks are not supported on freetier", 35),
    ("infura", "query returned more than 10000 results", -32005),
    ("zkevm", "logs: more than 10000 logs", -32005),
    ("arbitrum", "logs matched by query exceeds limit of 10000", -32000),
    ("hyperrpc", "50000 logs returned", -32000),
    ("many-logs", "too many logs", -32000),
    ("llama-ankr", "query exceeds max results 20000", -32602),
    ("1rpc", "response size should not greater than 10000000 bytes", -32000),
    ("optimism", "backend response too large", -32020),
    ("reth", "Response is too big", -32008),
    ("alchemy-old", "Log response size exceeded. Please reduce query block range.", -32602),
    ("proxy", "error decoding response body", -32603),
    ("infura-time", "query timeout exceeded", -32005),
    ("altitude", "allowed block range threshold exceeded", -32000),
    ("erpc", "exceeded max allowed", -32012),
    ("erpc-threshold", "range threshold exceeded", -32012),
    ("scroll", "block range is bigger than maxBlockRange", -32000),
    ("quicknode-code", "something new", -32614),
    ("unheard-of", "your block range spans more blocks than the maximum", -32602),
]


@pytest.mark.parametrize(("message", "code"), [row[1:] for row in HALVES], ids=[row[0] for row in HALVES])
def test_halve(message: str, code: int) -> None:
    trouble = seen(message, code)
    assert trouble == Trouble(Kind.RANGE, message)
    assert too_large(FIRST, LAST, trouble) == 50_000


def test_limit_and_hint_of_alchemys_free_tier() -> None:
    trouble = seen(
        "You can make eth_getLogs requests with up to a 500 block range. Based on your parameters, this block range "
        "should work: [0xf4240, 0xf4433]",
        -32600,
    )
    assert (trouble.max_blocks, trouble.hint) == (500, (1_000_000, 1_000_499))
    assert too_large(FIRST, LAST, trouble) == 500


def test_tenderly_says_it_in_the_data() -> None:
    data = '{"error_id":"4ed94073","payload":"range 100000 is bigger than range limit 2000"}'
    trouble = seen("invalid params", -32602, data)
    assert trouble.max_blocks == 2000
    assert "bigger than range limit" in trouble.message


def test_chainstack_has_a_second_limit() -> None:
    message = "Block range limit exceeded."
    assert seen(message, first=1, last=10_000).max_blocks == 100
    assert seen(message, first=1, last=100) == Trouble(Kind.RANGE, message)
    assert seen(message, first=None, last=None).max_blocks == 10_000


@pytest.mark.parametrize(
    "message",
    [
        "this block range should work: [0xf4240, 0x10c8df]",  # what was asked
        "this block range should work: [0x10c8df, 0xf4240]",
        "this block range should work: [0x0, 0xf4300]",  # before what was asked
        "retry with the range 1000000-1099999",
        "retry with the range 1000000-1100000",
    ],
)
def test_a_hint_that_helps_nobody_means_halve(message: str) -> None:
    assert seen(message, -32602) == Trouble(Kind.RANGE, message)


def test_413_means_halve_unless_the_text_knows_better() -> None:
    assert seen("HTTP 413", None, status=413) == Trouble(Kind.RANGE, "HTTP 413")
    assert seen("eth_getLogs is limited to a 10,000 range", -32614, status=413).max_blocks == 10_000


@pytest.mark.parametrize(
    ("message", "code", "status", "blocks"),
    [
        ("no backend is currently healthy to serve traffic", -32011, 503, 50_000),
        ("503 Service Unavailable", None, 503, 10_000),
        ("ServerError(-32000)", None, 200, 10_000),
        ("ServerError(-32005)", None, 200, 10_000),
        ("limit exceeded", -32005, 200, 10_000),
        ("internal trouble", -32000, 200, 10_000),
    ],
    ids=["proxyd", "503", "alchemy", "infura", "bsc", "geth"],
)
def test_overload_asks_for_less_after_a_pause(message: str, code: int | None, status: int, blocks: int) -> None:
    trouble = seen(message, code, status=status)
    assert (trouble.kind, trouble.max_blocks, trouble.retry_after) == (Kind.RANGE, None, 1.0)
    assert trouble.hint == (FIRST, FIRST + blocks - 1)
    assert too_large(FIRST, LAST, trouble) == blocks
    assert seen(message, code, status=status, retry_after=7).retry_after == 7
    for first, last in ((5, 5), (None, None)):  # nothing to make smaller
        other = seen(message, code, status=status, first=first, last=last)
        assert other.kind is (Kind.RATE_LIMITED if code == -32005 else Kind.TRANSIENT)


ADDRESSES = [
    ("alchemy", "Please, specify less number of addresses"),
    ("drpc", "eth_getLogs: specify less number of address in the filter"),
    ("geth", "exceed max addresses or topics per search position: 1000"),
    ("infura", "too many filters given: 6000, current limit is 5000"),
]


@pytest.mark.parametrize("message", [row[1] for row in ADDRESSES], ids=[row[0] for row in ADDRESSES])
def test_too_many_addresses(message: str) -> None:
    assert seen(message, -32602) == Trouble(Kind.ADDRESSES, message)


BEHIND = [
    ("base", "block range extends beyond current head block"),
    ("avalanche", "requested from block 1000000 after last accepted block 999999"),
    ("avalanche-final", "cannot query unfinalized data"),
    ("geth", "header not found"),
    ("geth-trie", "missing trie node 0d53c4 (path ) state 0x11 is not available"),
    ("geth-block", "unknown block"),
    ("cosmos", "height is not available (requested: 12, base: 100)"),
    ("erigon", "block not found: 0xf4240"),
    ("erpc", "block number 1000000 is greater than latest 999999"),
    ("erigon-canonical", "hash 0x12 is not currently canonical"),
]


@pytest.mark.parametrize("code", [-32000, -32602, -32001])
@pytest.mark.parametrize("message", [row[1] for row in BEHIND], ids=[row[0] for row in BEHIND])
def test_node_lacks_the_block(message: str, code: int) -> None:
    assert seen(message, code) == Trouble(Kind.BEHIND, message)


RATES: list[tuple[str, str, int | None, int]] = [
    ("http", "HTTP 429", None, 429),
    ("json", "slow down", 429, 200),
    ("infura", "project ID request rate exceeded", -32005, 200),
    ("infura-day", "daily request count exceeded, request rate limited", -32005, 200),
    ("base", "over rate limit", -32016, 200),
    ("quicknode", "credits limited to 6000/sec", -32012, 200),
    ("quicknode-rps", "50/second request limit reached - reduce calls per second", -32007, 200),
    ("alchemy", "Your app has exceeded its compute units per second capacity", 429, 429),
    ("ankr", "Too many requests, reason: call rate limit exhausted", -32090, 200),
    ("erpc", "Exceeded the quota usage", -32000, 200),
    ("load", "the node is under too much load", -32000, 200),
]


@pytest.mark.parametrize(("message", "code", "status"), [row[1:] for row in RATES], ids=[row[0] for row in RATES])
def test_rate_limits(message: str, code: int | None, status: int) -> None:
    assert seen(message, code, status=status) == Trouble(Kind.RATE_LIMITED, message)
    assert seen(message, code, status=status, retry_after=2.5).retry_after == 2.5


OTHERS: list[tuple[str, str, int | None, int, Kind]] = [
    ("402", "Payment Required", None, 402, Kind.BILLING),
    ("alchemy-month", "Monthly capacity limit exceeded. Visit your dashboard to upgrade", 429, 429, Kind.BILLING),
    ("drpc-free", "You've reached the free tier limit", -32000, 200, Kind.BILLING),
    ("401", "invalid project id", None, 401, Kind.BILLING),
    ("parse", "Parse error", -32700, 200, Kind.FATAL),
    ("no-method", "the method eth_foo does not exist/is not available", -32601, 200, Kind.FATAL),
    ("no-method-text", "the method eth_foo does not exist/is not available", -32000, 200, Kind.FATAL),
    ("unsupported", "Method not supported", -32004, 200, Kind.FATAL),
    ("version", "JSON-RPC version not supported", -32006, 200, Kind.FATAL),
    ("revert", "execution reverted", 3, 200, Kind.FATAL),
    ("404", "Not Found", None, 404, Kind.FATAL),
    ("405", "Method Not Allowed", None, 405, Kind.FATAL),
    ("501", "Not Implemented", None, 501, Kind.FATAL),
    ("505", "HTTP Version Not Supported", None, 505, Kind.FATAL),
    ("500", "HTTP 500", None, 500, Kind.TRANSIENT),
    ("502", "Bad Gateway", None, 502, Kind.TRANSIENT),
    ("503", "HTTP 503", None, 503, Kind.TRANSIENT),
    ("504", "Gateway Time-out", None, 504, Kind.TRANSIENT),
    ("internal", "Internal error", -32603, 200, Kind.TRANSIENT),
    ("timeout", "request timed out", None, 200, Kind.TRANSIENT),
]


@pytest.mark.parametrize(
    ("message", "code", "status", "kind"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS]
)
def test_the_rest(message: str, code: int | None, status: int, kind: Kind) -> None:
    assert seen(message, code, status=status) == Trouble(kind, message)


@pytest.mark.parametrize(
    ("trouble", "size", "blocks"),
    [
        ({}, 1, 1),
        ({}, 2, 1),
        ({}, 7, 3),
        ({"max_blocks": 5}, 7, 5),
        ({"max_blocks": 7}, 7, 3),
        ({"max_blocks": 9}, 7, 3),
        ({"hint": (100, 102)}, 7, 3),
        ({"hint": (100, 106)}, 7, 3),
        ({"hint": (100, 101), "max_blocks": 5}, 7, 2),
    ],
)
def test_next_size(trouble: dict[str, Any], size: int, blocks: int) -> None:
    assert too_large(100, 100 + size - 1, Trouble(Kind.RANGE, **trouble)) == blocks


def test_a_long_error_stays_short_and_quick() -> None:
    trouble = seen("x" * 1_000_000, -32603, data="block range " * 100_000)
    assert len(trouble.message) == 500
