"""What all stand-ins share: a port, a record of the calls, and the faults."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, ClassVar, Self

import msgspec
from aiohttp import web

from indexer.sidecar.fakes.faults import Call, Fault, Kind

_HTML = "<html><head><title>200 OK</title></head><body>Welcome to the proxy</body></html>"

Handler = Callable[[web.Request], Awaitable["Reply"]]
KeyOf = Callable[[web.Request], Awaitable[str]]


class Reply(msgspec.Struct):
    """The true answer to a call: JSON, or bytes that go out as they are. `sent` is called once it is out whole."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = {}
    content_type: str = "application/json"
    sent: Callable[[], None] | None = None

    @property
    def raw(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else msgspec.json.encode(self.body)


class Fake:
    """A stand-in that serves on a port of 127.0.0.1 while its context is entered; a free one unless one is given.

    `calls` are the requests in the order in which they came, noted before anything else happens to them: those that
    were given no answer count, too. `faults` are asked in order, and the first that strikes rules the answer.
    Every answer comes `latency_seconds` late. GET /_calls tells the calls to who is in another process.
    """

    name: ClassVar[str]
    # what the clients must send; any other is a 401
    key: ClassVar[str] = ""

    def __init__(self, *, port: int = 0) -> None:
        self.port = port
        self.calls: list[Call] = []
        self.faults: list[Fault] = []
        self.latency_seconds = 0.0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault(
        self, kind: Kind, *, count: int | None = 1, match: str | Callable[[Call], bool] | None = None, skip: int = 0,
        status: int = 500, retry_after: float | str | None = None, seconds: float = 5.0,
    ) -> Fault:  # fmt: skip
        """Append a fault; see `Fault`."""
        made = Fault(kind, count, match, skip, status, retry_after, seconds)
        self.faults.append(made)
        return made

    def counts(self, route: str | None = None) -> Counter[str]:
        """How often each key was asked for, in one route or all."""
        return Counter(call.key for call in self.calls if route in (None, call.route))

    def keys(self, route: str | None = None) -> list[str]:
        """What was asked for, in order."""
        return [call.key for call in self.calls if route in (None, call.route)]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen. After a stop() it is at the same port again."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/_calls", self._recorded)
        self.routes(app.router)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close all connections and the port: what a client sees of a provider that is down."""
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    def routes(self, router: web.UrlDispatcher) -> None:
        """Add what the provider answers, each route by `self.answering`."""
        raise NotImplementedError

    def authorized(self, request: web.Request) -> bool:
        """Whether the request has the key where the provider wants it."""
        return request.headers.get("Authorization") == f"Bearer {self.key}"

    def error(self, status: int) -> Any:
        """The body of an error, as the provider words it."""
        return {"error": {"message": f"error {status}"}}

    def answering(
        self, route: str, handler: Handler, key_of: KeyOf | None = None
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """An aiohttp handler that notes the call, lets the faults have their say, and then answers."""

        async def answer(request: web.Request) -> web.StreamResponse:
            call = Call(route, await key_of(request) if key_of is not None else "")
            self.calls.append(call)
            if self.latency_seconds:
                await asyncio.sleep(self.latency_seconds)
            fault = self.striking(call)
            if fault is not None and (refused := _refused(request, call, fault, self.error)) is not None:
                return refused
            reply = Reply(self.error(401), 401) if not self.authorized(request) else await handler(request)
            if fault is not None:
                return await _struck(request, call, fault, reply)
            return _whole(request, call, reply)

        return answer

    def striking(self, call: Call) -> Fault | None:
        """The fault that rules the answer to this call, if any."""
        return next((fault for fault in self.faults if fault.strikes(call)), None)

    async def _recorded(self, _: web.Request) -> web.Response:
        return _json(Reply({"calls": self.calls, "counts": self.counts()}))


def _refused(
    request: web.Request, call: Call, fault: Fault, error: Callable[[int], Any]
) -> web.StreamResponse | None:
    """The answer to a call that never came to the provider, if it is of such a kind."""
    if fault.kind == "drop":
        _hang_up(request)
        return web.Response()
    if fault.kind == "status":
        call.status = fault.status
        headers = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
        return _json(Reply(error(fault.status), fault.status, headers))
    if fault.kind in ("html", "empty"):
        call.status = 200
        text, kind = (_HTML, "text/html") if fault.kind == "html" else ("{}", "application/json")
        return web.Response(text=text, content_type=kind)
    return None


async def _struck(request: web.Request, call: Call, fault: Fault, reply: Reply) -> web.StreamResponse:
    """The true answer, spoilt on its way back."""
    if fault.kind == "slow":
        await asyncio.sleep(fault.seconds)
        return _whole(request, call, reply)
    call.status = 200
    raw = reply.raw
    half = len(raw) // 2
    if fault.kind == "truncated":
        return web.Response(body=raw[:half], content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(len(raw))})
    await response.prepare(request)
    await response.write(raw[:half])
    if fault.kind == "cut":
        _hang_up(request)
        return response
    await asyncio.sleep(fault.seconds)
    await response.write(raw[half:])
    return response


def _whole(request: web.Request, call: Call, reply: Reply) -> web.Response:
    call.status = reply.status
    # Who has hung up by now gets nothing.
    if reply.sent is not None and request.transport is not None:
        reply.sent()
    return _json(reply)


def _json(reply: Reply) -> web.Response:
    return web.Response(body=reply.raw, status=reply.status, headers=reply.headers, content_type=reply.content_type)


def _hang_up(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.close()
