"""New heads by WebSocket: a hint that wakes the follower at once, never the only way to hear of a block."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import Any

from indexer import log
from indexer.sources.rpc import RpcEndpoint
from indexer.sources.wire import Header

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0
# A subscription that has been silent for so long about a block that a poll has seen is made anew.
_SILENT_SECONDS = 30.0


class NewHeads:
    """Listens at every endpoint that has a ws address. `take` gives each announcement once.

    The headers are noted at the endpoint that announced them, since a block must be whole from one node.
    """

    def __init__(self, endpoints: list[RpcEndpoint]) -> None:
        self._subscriptions = [_Subscription(self, one) for one in endpoints if one.ws_url is not None]
        self._announced: Header | None = None
        self._news = asyncio.Event()

    async def close(self) -> None:
        for one in self._subscriptions:
            one.task.cancel()
        await asyncio.gather(*(one.task for one in self._subscriptions), return_exceptions=True)

    def take(self) -> Header | None:
        """The newest header announced since the last call; None where nothing was."""
        announced, self._announced = self._announced, None
        self._news.clear()
        return announced

    def heard(self, header: Header) -> None:
        # of several nodes one is always a little behind
        if self._announced is None or int(header.number, 16) >= int(self._announced.number, 16):
            self._announced = header
        self._news.set()

    def polled(self, number: int) -> None:
        """A poll found this head: whoever does not announce it before long has gone silent."""
        for one in self._subscriptions:
            one.expect(number)

    async def wait(self, seconds: float) -> None:
        """Return at the next announcement, at the latest after `seconds`."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return


class _Subscription:
    """One endpoint's newHeads, subscribed to again whenever the connection ends, with growing pauses."""

    def __init__(self, newheads: NewHeads, endpoint: RpcEndpoint) -> None:
        self._newheads, self._endpoint = newheads, endpoint
        self._heard = -1
        self._patience: asyncio.Timeout | None = None
        self._thinned = log.Thinned()
        self.task = asyncio.create_task(self._run(), name=f"newheads {endpoint.name}")

    def expect(self, number: int) -> None:
        if self._patience is not None and self._patience.when() is None and number > self._heard:
            self._patience.reschedule(asyncio.get_running_loop().time() + _SILENT_SECONDS)

    async def _run(self) -> None:
        pause, name = _FIRST_PAUSE_SECONDS, self._endpoint.name
        while True:
            started = time.monotonic()
            try:
                await self._listen()
                reason = "the connection ended"
            except TimeoutError:
                reason = "silent while blocks come"
            except Exception as error:
                # the texts of websocket errors can hold the address, and with it a key
                reason = type(error).__name__
            self._thinned.warning("new heads silent", endpoint=name, reason=reason)
            long = time.monotonic() - started > 60
            pause = _FIRST_PAUSE_SECONDS if long else min(pause * 2, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _listen(self) -> None:
        """Subscribe and hear, until the connection ends."""
        assert self._endpoint.ws_url is not None
        # importing web3 takes a second or so, which the event loop has better uses for
        web3 = await asyncio.to_thread(importlib.import_module, "web3")
        middleware = await asyncio.to_thread(importlib.import_module, "web3.middleware")
        url = self._endpoint.ws_url.get_secret_value()
        async with web3.AsyncWeb3(web3.WebSocketProvider(url, max_connection_retries=1)) as w3:
            # without it, web3 can't read the headers of chains that keep signatures in extraData (BSC, Polygon)
            w3.middleware_onion.inject(middleware.ExtraDataToPOAMiddleware, layer=0)
            await w3.eth.subscribe("newHeads")
            self._thinned.over("new heads silent", endpoint=self._endpoint.name)
            try:
                async with asyncio.timeout(None) as self._patience:
                    async for message in w3.socket.process_subscriptions():
                        self._hear(message["result"])
            finally:
                self._patience = None

    def _hear(self, given: Any) -> None:
        number = int(given["number"])
        bloom = given.get("logsBloom")
        header = Header(
            hex(number), "0x" + bytes(given["hash"]).hex(), "0x" + bytes(given["parentHash"]).hex(),
            hex(int(given["timestamp"])), "0x" + bytes(bloom or b"\0").hex(),
        )  # fmt: skip
        # a header without a bloom is good for the news alone: the block's own is asked for
        if bloom is not None:
            self._endpoint.announce(header)
        self._heard = max(self._heard, number)
        if self._patience is not None:
            self._patience.reschedule(None)
        self._newheads.heard(header)
