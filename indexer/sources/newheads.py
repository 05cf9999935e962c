"""New heads by WebSocket: a hint that wakes the follower at once, never the only way to hear of a block."""

from __future__ import annotations

import asyncio
import importlib
import time
from typing import TYPE_CHECKING, Any

from indexer import log

if TYPE_CHECKING:
    from indexer.sources.rpc import Endpoint

# Announced headers kept until their block is fetched; only the newest few can be of use.
_KEPT_HEADERS = 64
_LONGEST_PAUSE_SECONDS = 30.0


class NewHeads:
    """Listens at every endpoint that has a ws address. `take` gives each announced number once.

    Headers are kept per endpoint, since a block must be whole from one node.
    """

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self._tasks = [asyncio.create_task(self._listen(one)) for one in endpoints if one.ws_url is not None]
        self._announced: int | None = None
        self._news = asyncio.Event()
        self._headers: dict[tuple[str, int], dict[str, Any]] = {}
        self._thinned = log.Thinned()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def take(self) -> int | None:
        """The newest number announced since the last call; None where nothing was."""
        announced, self._announced = self._announced, None
        self._news.clear()
        return announced

    def header(self, endpoint: Endpoint, number: int) -> dict[str, Any] | None:
        """The header that this endpoint announced for `number`, given once: if it proves stale, the node is asked."""
        return self._headers.pop((endpoint.name, number), None)

    async def wait(self, seconds: float) -> None:
        """Return at the next announcement, at the latest after `seconds`."""
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
        except TimeoutError:
            return

    async def _listen(self, endpoint: Endpoint) -> None:
        """Subscribe, and again whenever the connection ends, with growing pauses."""
        # importing web3 takes a second or so, which the event loop has better uses for
        web3 = await asyncio.to_thread(importlib.import_module, "web3")
        pause = 0.5
        while True:
            started = time.monotonic()
            try:
                assert endpoint.ws_url is not None
                async with web3.AsyncWeb3(web3.WebSocketProvider(endpoint.ws_url.get_secret_value())) as w3:
                    await w3.eth.subscribe("newHeads")
                    self._thinned.over("new heads silent", about=endpoint.name, endpoint=endpoint.name)
                    async for message in w3.socket.process_subscriptions():
                        self._hear(endpoint, message["result"])
                reason = "the connection ended"
            except Exception as error:
                # the texts of websocket errors can hold the address, and with it a key
                reason = type(error).__name__
            self._thinned.warning("new heads silent", about=endpoint.name, endpoint=endpoint.name, reason=reason)
            pause = 0.5 if time.monotonic() - started > 60 else min(pause * 2, _LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    def _hear(self, endpoint: Endpoint, header: Any) -> None:
        number = int(header["number"])
        bloom = header.get("logsBloom")
        if bloom is not None:
            self._headers[endpoint.name, number] = {
                "number": hex(number),
                "hash": "0x" + bytes(header["hash"]).hex(),
                "parent_hash": "0x" + bytes(header["parentHash"]).hex(),
                "timestamp": hex(int(header["timestamp"])),
                "logs_bloom": "0x" + bytes(bloom).hex(),
            }
            while len(self._headers) > _KEPT_HEADERS:
                self._headers.pop(next(iter(self._headers)))
        self._announced = number
        self._news.set()
