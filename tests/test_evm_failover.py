"""EvmSource with several endpoints, with one that paces or bills, and with keys that must never be shown."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web
from evmkit import assert_whole, chain_of, collected, error, every, fails, hasty, play, ranges, source_of, until
from structlog.testing import capture_logs

from indexer.config import EndpointSettings
from indexer.errors import RpcUnavailable
from indexer.fakechain import (
    FakeChain,
    FakeNode,
    Fault,
    FaultSource,
    garbage,
    http_error,
    null_blocks,
    old_head,
    rate_limited,
    slow,
)  # fmt: skip
from indexer.sources import endpoints, evm

pytestmark = pytest.mark.usefixtures("hasty")
__all__ = ["hasty"]


FAULTS: list[tuple[str, Callable[[], FaultSource]]] = [
    ("connection", lambda: http_error(502, None, b"bad gateway")),
    ("garbage", lambda: garbage(None)),
    ("slow", lambda: slow(5, None)),
    ("rate", lambda: rate_limited(None, retry_after=30)),
    ("billing", lambda: http_error(402, None, b"Payment Required")),
    ("forbidden", lambda: http_error(403, None, b"invalid key")),
    ("lags", lambda: old_head(150)),
    ("nulls", lambda: null_blocks(None)),
    ("null-results", lambda: fails(None, Fault(result=None))),
    ("not-found", lambda: http_error(404, None, b"Not Found")),
    ("narrow", lambda: fails(None, error(-32005, "query returned more than 0 results"), "eth_getLogs")),
]  # fmt: skip


@pytest.mark.parametrize("after", [0, 12])
@pytest.mark.parametrize("fault", [row[1] for row in FAULTS], ids=[row[0] for row in FAULTS])
async def test_one_that_fails_is_replaced_by_the_other(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[], FaultSource], after: int
) -> None:
    """From the start, and in the middle of the work."""
    monkeypatch.setattr(endpoints, "_LONGEST_REST_SECONDS", 10.0)
    chain = chain_of([n % 4 for n in range(300)], final_lag=30)
    async with FakeNode(chain, keep_log=True) as bad, FakeNode(chain, keep_log=True) as good:
        async with source_of(bad, good, max_blocks=10, request_timeout_seconds=0.3, chain_id="31337") as source:
            struck = fault()
            bad.faults.append(lambda method, params: struck(method, params) if bad.requests.total() > after else None)
            spans = await collected(source, 0, 300)
            assert_whole(spans, chain, 0, 300)
            assert good.requests["eth_getLogs"] > 10
        assert bad.requests["eth_getLogs"] < 80


async def test_an_endpoint_that_is_gone_is_used_again_when_it_is_back() -> None:
    chain = chain_of([1] * 30)
    async with FakeNode(chain) as first, FakeNode(chain) as second, source_of(first, second) as source:
        assert_whole(await collected(source, 1, 30), chain, 1, 30)
        used = first.requests["eth_getLogs"]
        assert used and not second.requests["eth_getLogs"]
        await first.stop()
        with capture_logs() as logged:
            assert_whole(await collected(source, 1, 30), chain, 1, 30)
        assert second.requests["eth_getLogs"]
        assert [one["endpoint"] for one in logged if one["event"] == "endpoint rested"] == ["node0"]
        await first.start()
        taken = second.requests["eth_getLogs"]
        with capture_logs() as logged:
            for _ in range(100):
                await collected(source, 1, 30)
                if first.requests["eth_getLogs"] > used:
                    break
                await asyncio.sleep(0.01)
        assert first.requests["eth_getLogs"] > used
        assert second.requests["eth_getLogs"] > taken
        assert {"event": "endpoint rested: over", "log_level": "info", "endpoint": "node0"} in logged


async def test_one_that_answers_only_half_of_the_questions_is_asked_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is well whenever it is probed, and fails at every block: its rests grow all the same."""
    monkeypatch.setattr(endpoints, "_LONGEST_REST_SECONDS", 10.0)
    chain = chain_of([1] * 300, final_lag=300)
    async with FakeNode(chain) as half, FakeNode(chain) as good:
        half.faults.append(fails(None, Fault(500), "eth_getLogs"))
        async with source_of(half, good) as source:
            assert_whole(await collected(source, 1, 300), chain, 1, 300)
            assert half.requests["eth_getLogs"] <= 60


@pytest.mark.parametrize("message", ["no backend is currently healthy to serve traffic", "503 Service Unavailable"])
async def test_one_that_is_overloaded_is_left_for_another_at_once(message: str) -> None:
    """It would be asked for less after a pause; but here is one that can do it now."""
    chain = chain_of([1] * 200)
    async with FakeNode(chain, keep_log=True) as tired, FakeNode(chain, keep_log=True) as good:
        tired.faults.append(fails(None, error(-32011, message, 503, Retry_After="9"), "eth_getLogs"))
        async with source_of(tired, good, start=200, requests_in_flight=1) as source:
            assert_whole(await collected(source, 1, 200), chain, 1, 200)
        assert ranges(tired) == [(1, 200)]
        assert len(ranges(good)) <= 4


async def test_two_nodes_on_two_forks_are_never_mixed_within_a_block() -> None:
    """Two nodes with other blocks at every height, which fail in turn: each block is wholly of one of them."""
    one, other = chain_of([2, 3, 1, 2] * 10, final_lag=8), FakeChain(final_lag=8)
    for n in range(40):
        other.mine([play(1000 + n), play(2000 + n)])
    async with FakeNode(one, keep_log=True) as first, FakeNode(other, keep_log=True) as second:
        first.faults.append(every(3, Fault(500)))
        second.faults.append(every(4, Fault(500)))
        async with source_of(first, second, max_blocks=4, start=4, requests_in_flight=3) as source:
            spans = await collected(source, 1, 40)
    origins = defaultdict(set)
    for span in spans:
        for block in span.blocks:
            chain = one if block.hash == one.blocks[block.number].hash else other
            origins[chain is one].add(block.number)
            mined = chain.blocks[block.number]
            assert block.hash == mined.hash
            transactions = ["0x" + event.tx_hash.hex() for event in block.events]
            assert transactions == [log["transactionHash"] for log in mined.logs]
            assert block.parent_hash in (None, mined.parent_hash)
        assert span.end.hash in (one.blocks[span.last].hash, other.blocks[span.last].hash)
    assert origins[True] and origins[False]


async def test_a_node_behind_the_range_is_not_taken_for_one_without_logs() -> None:
    """It answers with the logs that it has, and no error; and it grows past the range between the two questions."""
    chain = chain_of([1] * 100)
    async with FakeNode(chain) as behind, FakeNode(chain) as good:
        lag = [60]

        def catching_up(method: str, _params: list[Any]) -> Fault | None:
            if method == "eth_getLogs":
                answered, lag[0] = lag[0], 0
                return Fault(behind=answered)
            return Fault(behind=lag[0])

        async with source_of(behind, good, start=100) as source:
            source._heads = await source.heads()
            source.endpoints.all[0].newest = -1
            behind.faults.append(catching_up)
            assert_whole(await collected(source, 1, 100), chain, 1, 100)


# Wrong networks


async def test_a_node_of_another_network_is_never_used() -> None:
    chain, foreign = chain_of([1] * 40, final_lag=10), chain_of([5] * 60, final_lag=10)
    foreign.chain_id = 5
    async with FakeNode(chain) as ours, FakeNode(foreign) as wrong:
        async with source_of(ours, wrong) as source:
            assert await source.identity() == "31337"
            ours.faults.append(fails(5, Fault(503)))
            with capture_logs() as logged:
                assert_whole(await collected(source, 1, 40), chain, 1, 40)
        assert wrong.requests.keys() == {"eth_chainId"}
        said = [one["error"] for one in logged if one.get("endpoint") == "node1"]
        assert said == ["a node of chain 5, not 31337: mend or remove it in chain.endpoints"]


async def test_identity_is_what_the_node_says_whatever_is_configured() -> None:
    async with FakeNode(chain_of([])) as node, source_of(node, chain_id="1") as source:
        assert await source.identity() == "31337"  # compared, and refused, by who asked


@pytest.mark.parametrize(
    "fault",
    [
        http_error(404, None, b"nothing here"), garbage(None), slow(5, None), rate_limited(None, retry_after=60),
        http_error(401, None, b"no"), fails(None, Fault(result="chain one")),
    ],
    ids=["404", "garbage", "slow", "rate", "401", "nonsense"],
)  # fmt: skip
async def test_identity_gives_up_in_time(fault: FaultSource) -> None:
    async with FakeNode(chain_of([])) as node, source_of(node, connect_timeout_seconds=0.3) as source:
        node.faults.append(fault)
        started = time.monotonic()
        with pytest.raises(RpcUnavailable, match=r"no node answers \(node0: .*check chain.endpoints and the node"):
            await source.identity()
        assert time.monotonic() - started < 1


# Pace and rests


async def test_max_requests_per_second_is_kept() -> None:
    chain = chain_of([1] * 40)
    async with FakeNode(chain, block_timestamp_in_logs=False) as node:
        paced = EndpointSettings.model_validate({"url": node.url, "max_requests_per_second": 200})
        async with source_of(paced, max_blocks=5, start=5, requests_in_flight=8) as source:
            started = time.monotonic()
            assert_whole(await collected(source, 1, 40), chain, 1, 40)
            seconds = time.monotonic() - started
        calls = node.requests.total()
        assert calls >= 50  # those of a batch count each
        assert (calls - 8) / 200 <= seconds


async def test_retry_after_is_kept_though_requests_from_before_succeed() -> None:
    chain = chain_of([1] * 40)
    async with FakeNode(chain, keep_log=True) as node, source_of(node, max_blocks=5, start=5) as source:
        await source.heads()
        times: list[float] = []

        def limited(method: str, _params: list[Any]) -> Fault | None:
            if method != "eth_getLogs":
                return None
            times.append(time.monotonic())
            if len(times) == 4:
                return error(-32005, "rate limit", 429, Retry_After="0.3")
            return Fault(delay_seconds=0.05) if len(times) < 4 else None

        node.faults.append(limited)
        assert_whole(await collected(source, 1, 40), chain, 1, 40)
        assert times[4] - times[3] >= 0.3


async def test_a_bill_leaves_the_endpoint_alone() -> None:
    chain = chain_of([1] * 100)
    async with FakeNode(chain) as poor, FakeNode(chain) as rich:
        poor.faults.append(http_error(402, None, b"Monthly capacity limit exceeded"))
        async with source_of(poor, rich, max_blocks=5, start=5) as source:
            assert_whole(await collected(source, 1, 100), chain, 1, 100)
            assert poor.requests.total() <= 5
            assert 50 < source.endpoints.all[0].resting <= 600
            assert source.endpoints.best() is source.endpoints.all[1]


async def test_rests_are_bounded() -> None:
    async with FakeNode(chain_of([])) as node, source_of(node) as source:
        (endpoint,) = source.endpoints.all
        for fault in (Fault(500), error(-32005, "rate limit"), error(-32000, "header not found"), Fault(402)):
            for _ in range(12):
                node.faults[:] = [fails(1, fault)]
                with pytest.raises(endpoints.RpcTrouble) as raised:
                    await source.endpoints.ask(endpoint, lambda one: one.call("eth_blockNumber", [], str))
                source.endpoints._rest(raised.value, time.monotonic())
            assert 0 < endpoint.resting <= (600 if fault.status == 402 else 0.06)


async def test_one_that_lags_is_rested_by_the_probe_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evm, "_PROBE_SECONDS", 0.01)
    monkeypatch.setattr(endpoints, "_LAG_REST_SECONDS", 0.05)
    chain = chain_of([1] * 50)
    async with FakeNode(chain) as laggard, FakeNode(chain) as good, source_of(laggard, good) as source:
        lags = [True]
        laggard.faults.append(lambda _method, _params: Fault(behind=20) if lags[0] else None)
        first, second = source.endpoints.all
        await source.heads()
        await asyncio.sleep(0.02)
        for _ in range(20):
            await source.wait(0.01)
            if first.resting:
                break
        assert first.last_error == "20 blocks behind"
        assert source.endpoints.best() is second
        assert (await source.heads()).newest == 50
        lags[0] = False
        for _ in range(50):
            await source.heads()
            await asyncio.sleep(0.01)
            if source.endpoints.best() is first:
                break
        assert source.endpoints.best() is first


# Keys

KEY = "5ecret-K3y-0f-the-0perator"


@pytest.mark.parametrize("where", [f"/v2/{KEY}", f"/rpc?apikey={KEY}&x=1", f"/{KEY}/eth%2Fmainnet"])
async def test_no_key_in_any_text(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """The gateway repeats the address in every kind of refusal; nothing of it is logged, raised or shown."""
    caplog.set_level("WARNING")
    modes = ["express", "rpc", "data", "redirect", "range", "text", "cut", "null"]
    asked: list[str] = []

    async def gateway(request: web.Request) -> web.Response:
        mode = modes[len(asked) % len(modes)]
        asked.append(mode)
        path = request.raw_path
        if request.method == "GET":
            return web.Response(status=401, text=f"no {path}")
        said = {
            "rpc": {"error": {"code": -32000, "message": f"cannot serve {path} for {KEY.lower()}"}},
            "data": {"error": {"code": -32603, "message": "internal", "data": {"url": path, "key": KEY}}},
            "range": {"error": {"code": -32005, "message": f"query returned more than 5 results for {KEY}"}},
            "text": {"error": f"bad key {KEY}"},
            "null": {"result": KEY},
        }.get(mode)
        if mode == "redirect":
            return web.Response(status=500, headers={"Location": path}, text=f"see {request.url}")
        if mode == "cut":
            return web.Response(status=502, text="x" * 275 + path)
        if said is None:
            return web.Response(status=404, text=f"<pre>Cannot POST {path}</pre>")
        return web.Response(body=json.dumps({"jsonrpc": "2.0", "id": 1, **said}), content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", gateway)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    texts: list[str] = []
    unheard = EndpointSettings.model_validate(
        {"url": f"http://127.0.0.1:{port}{where}", "ws": f"ws://127.0.0.1:{port}{where}"}
    )
    closed = EndpointSettings.model_validate({"url": f"http://127.0.0.1:1{where}", "ws": f"ws://127.0.0.1:1{where}"})
    with capture_logs() as logged:
        async with source_of(unheard, closed, connect_timeout_seconds=0.2) as source:
            source.endpoints._thinned._seconds = 0
            for work in (source.identity(), source.heads(), source.ref(3)):
                try:
                    await asyncio.wait_for(work, 0.3)
                except Exception as failed:
                    texts += [repr(failed), "".join(traceback.format_exception(failed))]
            for endpoint in source.endpoints.all:
                for n in range(2 * len(modes)):
                    try:
                        await (endpoint.call("m", [], int) if n % 2 else endpoint.batch("m", [[]], int))
                    except endpoints.RpcTrouble as failed:
                        texts += [repr(failed), "".join(traceback.format_exception(failed)), failed.trouble.message]
                texts.append(endpoint.last_error)
            await until(lambda: sum(one["event"] == "new heads silent" for one in logged) >= 2)
    await runner.cleanup()
    assert set(asked) == set(modes)
    everything = "\n".join([*texts, repr(logged), caplog.text]).lower()
    assert len(texts) > 40 and "rested" in everything
    for piece in (KEY.lower(), KEY[:12].lower(), "apikey=", "eth%2fmainnet"):
        assert piece not in everything
