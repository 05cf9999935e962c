"""EvmSource's new heads by WebSocket: they wake it at once, and nothing hangs on them."""

from __future__ import annotations

import asyncio
import time

import pytest
from evmkit import assert_whole, chain_of, collected, hasty, play, source_of, until
from structlog.testing import capture_logs

from indexer.config import EndpointSettings
from indexer.fakechain import FakeNode
from indexer.fakechain import chain as fake
from indexer.sources import newheads

pytestmark = pytest.mark.usefixtures("hasty")
__all__ = ["hasty"]

FAR = 10_000  # a final lag with which nothing is final


def speaking(node: FakeNode) -> EndpointSettings:
    return EndpointSettings.model_validate({"url": node.url, "ws": node.ws_url, "name": "ws"})


async def subscribed(node: FakeNode, times: int = 1) -> None:
    await until(lambda: node.requests["eth_subscribe"] >= times)
    await asyncio.sleep(0.05)


async def test_new_heads_wake_at_once_and_bring_the_header() -> None:
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain, keep_log=True) as node, source_of(speaking(node), poll_seconds=5) as source:
        await subscribed(node)
        await source.heads()
        node.requests.clear()
        asyncio.get_running_loop().call_later(0.05, lambda: chain.mine([play(8)]))
        started = time.monotonic()
        await source.wait(5)
        assert time.monotonic() - started < 1
        now = await source.heads()
        assert (now.newest, now.hash) == (6, chain.head.hash)
        assert_whole(await collected(source, 6, 6), chain, 6, 6)
        assert node.requests == {"eth_getLogs": 1}


async def test_new_heads_of_chains_with_signatures_in_extra_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on BSC and Polygon; web3 refuses such headers by default."""
    chain = chain_of([1], final_lag=FAR)
    async with FakeNode(chain) as node, source_of(speaking(node), poll_seconds=5) as source:
        await subscribed(node)
        monkeypatch.setitem(fake._FILLING, "extraData", "0x" + "11" * 97)
        chain.mine()
        await source.wait(2)
        assert source._newheads.take() is not None


async def test_an_announced_block_that_was_replaced_is_asked_for_anew() -> None:
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain) as node, source_of(speaking(node), poll_seconds=5) as source:
        await subscribed(node)
        chain.mine([play(8)])
        await source.wait(5)
        assert (await source.heads()).newest == 6
        node.muted = True
        chain.fork(1, [[[play(9)]]])
        assert_whole(await collected(source, 6, 6), chain, 6, 6)


async def test_when_the_socket_is_killed_polling_goes_on_and_it_comes_back() -> None:
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain) as node, source_of(speaking(node), poll_seconds=0.05) as source:
        await subscribed(node)
        for round_ in (1, 2):
            with capture_logs() as logged:
                await node.drop_sockets()
                chain.mine([play(8)])
                await source.wait(1)
                assert (await source.heads()).newest == chain.head.number
                await subscribed(node, round_ + 1)
            said = [one["event"] for one in logged if one["event"].startswith("new heads")]
            assert said == ["new heads silent", "new heads silent: over"]
        chain.mine()
        await until(lambda: source._newheads._announced is not None)
        assert (await source.heads()).newest == 8


async def test_a_silent_subscription_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newheads, "_SILENT_SECONDS", 0.1)
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain) as node, source_of(speaking(node), poll_seconds=0.02) as source:
        await subscribed(node)
        node.muted = True
        chain.mine()
        with capture_logs() as logged:
            await source.wait(1)
            assert (await source.heads()).newest == 6
            await subscribed(node, 2)
        assert [one["reason"] for one in logged if one["event"] == "new heads silent"] == ["silent while blocks come"]
        node.muted = False
        chain.mine()
        await source.wait(1)
        assert (await source.heads()).newest == 7


async def test_a_socket_that_is_not_there_costs_nothing_but_a_warning() -> None:
    chain = chain_of([1] * 5, final_lag=FAR)
    async with FakeNode(chain, ws=False) as node, source_of(speaking(node)) as source:
        with capture_logs() as logged:
            await until(lambda: any(one["event"] == "new heads silent" for one in logged))
            assert_whole(await collected(source, 1, 5), chain, 1, 5)
        assert len([one for one in logged if one["event"] == "new heads silent"]) == 1
