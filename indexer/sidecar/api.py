"""The sidecar's HTTP API: routes made into an application, and served. In this order: who calls, what is sent, work."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import msgspec
from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict
from pydantic import BaseModel, ConfigDict

from indexer import log, metrics
from indexer.config import Settings, SidecarSettings
from indexer.db import Database
from indexer.errors import ConfigError, IndexerError
from indexer.sidecar import checks, openapi, pages
from indexer.sidecar.auth import Auth
from indexer.sidecar.listening.session import cookie_name
from indexer.sidecar.middleware import CALLER, LISTENER, PAGE, REQUEST_ID, Frame, failed
from indexer.sidecar.routes import HTML, Answer, Call, Cookie, Failure, Form, Refused, Reply, Route, route
from indexer.sidecar.streams import streamed
from indexer.version import version

_BODY_SECONDS = 30.0
_PROBE_SECONDS = 2.0
# An idle connection is ours to end before long: proxies open new ones.
_KEEPALIVE_SECONDS = 75.0
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


class Live(Answer):
    """Whether the process works; `reason` where it does not."""

    live: bool
    reason: str | None = None


class Ready(Answer):
    """Whether the process can do its work, with whatever else may be told; `reason` where it can't."""

    model_config = ConfigDict(extra="allow")
    ready: bool
    reason: str | None = None


LiveProbe: TypeAlias = Callable[[], Awaitable[Live]]
ReadyProbe: TypeAlias = Callable[[], Awaitable[Ready]]


def create_app(
    settings: Settings, database: Database, resources: Mapping[str, Any], routes: Sequence[Route] = (), *,
    live: LiveProbe | None = None, ready: ReadyProbe | None = None,
) -> web.Application:  # fmt: skip
    """The application: these routes, and those that every sidecar has.

    `live` and `ready` tell what /livez and /readyz answer: by default that the process answers, and the database.
    """
    every = _with_own(settings, tuple(routes), live or _alive, ready or (lambda: _database_answers(database)))
    frame, auth = Frame(settings.sidecar.cors_origins), Auth(settings, database, resources.get("listening"))
    # What a route itself lets in may be more than this, which is for those that read a body in their own way.
    application = web.Application(middlewares=[frame.around], client_max_size=settings.sidecar.body_bytes)
    call = Call(database, settings, resources, "", None)
    for one in every:
        application.router.add_route(one.method, one.path, _Handler(one, auth, call).handle, expect_handler=_expected)

    async def close(_: web.Application) -> None:
        await auth.close()

    application.on_response_prepare.append(frame.dress)
    application.on_cleanup.append(close)
    return application


async def _expected(request: web.Request) -> web.Response | None:
    """Tell a client to go on that waits for it with its body; aiohttp's own refusal quotes what was expected."""
    if request.headers[hdrs.EXPECT].lower() != "100-continue":
        return failed(417, Failure(error="the expectation can't be met"), {})
    if request.version >= HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself is not begun
    return None


class _Handler:
    """Answers the requests of one route."""

    def __init__(self, one: Route, auth: Auth, call: Call) -> None:
        self._route, self._auth, self._call = one, auth, call
        self._body_bytes = one.body_bytes or call.settings.sidecar.body_bytes

    async def handle(self, request: web.Request) -> web.StreamResponse:
        one = self._route
        if one.page:
            request[PAGE] = True
        try:
            given, renewal = await self._call_of(request)
        except Refused as refused:
            if refused.status != 401 or one.signed_out is None:
                raise
            return web.Response(status=303, headers={"Location": one.signed_out})
        return await self._answer(request, await one.function(given, **await self._parts(request)), renewal)

    async def _call_of(self, request: web.Request) -> tuple[Call, Cookie | None]:
        """Who calls, and the session's renewal where that is due; raises Refused."""
        one, id_ = self._route, request[REQUEST_ID]
        call = msgspec.structs.replace(
            self._call, request_id=id_, log=log.get().bind(request_id=id_, route=one.path),
            cookies=request.cookies if one.page or one.access in ("listener", "visitor") else {},
        )  # fmt: skip
        if one.access == "listener":
            session, renewal = await self._auth.listener(request, changes=one.changes)
            request[LISTENER] = session.listener
            return msgspec.structs.replace(call, person=session.listener), renewal
        caller = await self._auth.caller(request, one.access)
        if caller is not None:
            request[CALLER] = caller
        return msgspec.structs.replace(call, caller=caller), None

    async def _parts(self, request: web.Request) -> dict[str, BaseModel]:
        """What was sent, checked; raises Refused."""
        one = self._route
        parts: dict[str, BaseModel] = {}
        if "path" in one.parts:
            parts["path"] = checks.path(one.parts["path"], request.match_info)
        if "query" in one.parts:
            parts["query"] = checks.query(one.parts["query"], request.query.items())
        if "body" in one.parts:
            read = checks.form if issubclass(one.parts["body"], Form) else checks.body
            parts["body"] = read(one.parts["body"], await self._read(request))
        return parts

    async def _answer(
        self, request: web.Request, given: BaseModel | Reply, renewal: Cookie | None
    ) -> web.StreamResponse:
        reply = given if isinstance(given, Reply) else Reply(given, self._route.status)
        value, status, answers = reply.value, reply.status, self._route.answers
        declared = answers.get(status)
        headers = CIMultiDict(pages.HEADERS if declared == HTML else {})
        headers.update(reply.headers)
        # who has just signed out, or in, does not get the old session back
        cookies = {one.name: one for one in (renewal, *reply.cookies) if one is not None}
        headers.extend([("Set-Cookie", one.header) for one in cookies.values()])
        headers["Content-Type"] = declared if isinstance(declared, str) else "application/json"
        if isinstance(declared, str) and isinstance(value, bytes):
            return web.Response(body=value, status=status, headers=headers)
        if isinstance(declared, str) and isinstance(value, AsyncGenerator):
            return await streamed(request, value, status, headers)
        if status in answers and declared is None and value is None:
            del headers["Content-Type"]
            return web.Response(status=status, headers=headers)
        if not isinstance(declared, type) or not isinstance(value, BaseModel) or not isinstance(value, declared):
            raise TypeError(f"{self._route.path} answers {status} with what it does not declare")
        body = value.__pydantic_serializer__.to_json(value, by_alias=True)
        return web.Response(body=body, status=status, headers=headers)

    async def _read(self, request: web.Request) -> bytes:
        """The body, at most so long; raises Refused: 400, 408, 413 or 415.

        Whether it is JSON shows when it is read: what type it is said to be (curl says a form's) does not matter.
        """
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Refused(415, "the body must not be compressed")
        too_large = Refused(413, f"the body is larger than {self._body_bytes} bytes")
        if (request.content_length or 0) > self._body_bytes:
            raise too_large
        raw = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for piece in request.content.iter_any():
                    raw += piece
                    if len(raw) > self._body_bytes:
                        raise too_large
        except TimeoutError:
            raise Refused(408, f"the body did not come within {_BODY_SECONDS:g} seconds") from None
        except (web.RequestPayloadError, ConnectionError):
            raise Refused(400, "the body did not come whole") from None
        return bytes(raw)


# -- the routes that every sidecar has -----------------------------------------------------------------------------


def _with_own(settings: Settings, routes: tuple[Route, ...], live: LiveProbe, ready: ReadyProbe) -> tuple[Route, ...]:
    """The routes with the probes and the description of them all."""

    @route("GET", "/livez", answers={200: Live, 503: Live}, access="none")
    async def livez(call: Call) -> Reply:
        """Whether the process works; 503: start it anew."""
        found = await live()
        return Reply(found, 200 if found.live else 503)

    @route("GET", "/readyz", answers={200: Ready, 503: Ready}, access="none")
    async def readyz(call: Call) -> Reply:
        """Whether the process can do what is asked of it; 503: ask another."""
        found = await ready()
        return Reply(found, 200 if found.ready else 503)

    @route("GET", "/metrics", answers={200: _METRICS}, access="none")
    async def exposition(call: Call) -> Reply:
        """The metrics of this process, for Prometheus."""
        return Reply(metrics.exposition(), 200)

    @route("GET", "/openapi.json", answers={200: "application/json"}, access="none")
    async def description(call: Call) -> Reply:
        """This description."""
        return Reply(document, 200)

    @route("GET", "/docs", answers={200: HTML}, access="none")
    async def docs(call: Call) -> Reply:
        """This description, for people."""
        return Reply(page, 200, {"Content-Security-Policy": _PAGE_POLICY})

    every = (*routes, livez, readyz, exposition, description, docs)
    twice = [name for name, count in Counter(one.function.__name__ for one in every).items() if count > 1]
    if twice:
        raise TypeError(f"two routes have a function called {twice[0]}, and its name is their id in the description")
    document = msgspec.json.encode(openapi.document(every, version(), cookie_name(settings.listening)))
    page = openapi.page(every).encode()
    return every


async def _alive() -> Live:
    return Live(live=True)


async def _database_answers(database: Database) -> Ready:
    try:
        async with asyncio.timeout(_PROBE_SECONDS), database.acquire() as connection:
            await connection.fetchval("select 1")
    except (IndexerError, TimeoutError):
        return Ready(ready=False, reason="no database")
    return Ready(ready=True)


# -- serving -------------------------------------------------------------------------------------------------------


class _Connections(logging.Handler):
    """What aiohttp says of broken connections, without its words: they quote what was sent."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        log.get().debug("connection failed", error=type(error).__name__ if error else None)


def _connection_log() -> logging.Logger:
    """A logger for this alone, of which nobody else hears."""
    logger = logging.Logger("indexer.api")
    logger.addHandler(_Connections())
    return logger


class _Protocol(web.RequestHandler):
    """Answers what is no HTTP like every other error; aiohttp's own answer and log line quote what was sent."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        self.log_debug("bad request", exc_info=exc)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        text = "the request is not valid HTTP" if status < 500 else "internal error"
        response = failed(status, Failure(error=text), {})
        response.force_close()
        return response


@asynccontextmanager
async def serving(
    application: web.Application, settings: SidecarSettings, *, stop_seconds: float = 3.0
) -> AsyncIterator[str]:
    """Serve while the block runs; gives the address. At the end, requests under way get `stop_seconds` to finish.

    Raises ConfigError where the port is taken.
    """
    runner = web.AppRunner(
        application, access_log=None, logger=_connection_log(), shutdown_timeout=stop_seconds,
        keepalive_timeout=_KEEPALIVE_SECONDS, auto_decompress=False,
    )  # fmt: skip
    await runner.setup()
    server: asyncio.Server | None = None

    def connected() -> asyncio.Protocol:
        assert runner.server is not None
        protocol = runner.server()
        protocol.__class__ = _Protocol
        return protocol

    try:
        try:
            server = await asyncio.get_running_loop().create_server(
                connected, settings.host, settings.port, backlog=1024, reuse_address=True
            )
        except (OSError, socket.gaierror) as error:
            reason = error.strerror or error
            raise ConfigError(f"can't listen on {settings.host}:{settings.port} ({reason}): set sidecar.port") from None
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.sockets[0].getsockname()[1]}/"
    finally:
        if server is not None:
            server.close()  # nobody new
        await runner.cleanup()
