"""A simulated node's HTTP server: on a free port of 127.0.0.1, and at the same one again after a stop."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

from aiohttp import web

S = TypeVar("S", bound="Server")


class Server:
    """Listens while its context is entered. What it answers is a subclass' affair, in `routes`."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def routes(self, router: web.UrlDispatcher) -> None:
        raise NotImplementedError

    async def __aenter__(self: S) -> S:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. After a stop() it is at the same port again."""
        app = web.Application(client_max_size=64 << 20)
        self.routes(app.router)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close all connections and the port: what a client sees of a node that went away."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None
