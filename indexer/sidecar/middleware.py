"""Around every request: its id, CORS, errors as JSON, the metrics, and one line in the log."""

from __future__ import annotations

import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from aiohttp import hdrs, web

from indexer import log, metrics
from indexer.errors import Temporary
from indexer.sidecar import ids, pages
from indexer.sidecar.routes import HTML, Caller, Failure, Refused
from indexer.sidecar.streams import BrokenOff

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = web.RequestKey("request_id", str)
CALLER = web.RequestKey("caller", Caller)
LISTENER = web.RequestKey("listener", UUID)
# a browser opens the route itself: whoever sits before it reads the errors
PAGE = web.RequestKey("page", bool)

# Probes and scrapes come every few seconds: they are for a debug log.
_QUIET = frozenset({"/livez", "/readyz", "/metrics"})
_UNMATCHED = "unmatched"
_RETRY_SECONDS = "1"
_PREFLIGHT_SECONDS = "600"
_MASK = "********"
# in log and metrics alone: the client did not take the answer
_HUNG_UP = 499
# of the way back from a sign-in
_SECRET_PARAMETERS = ("code", "state")

_TEXTS = {
    404: "there is no such route",
    405: "this route does not take this method",
}
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Server": "indexer",  # and not which versions of what
}


class InternalFailure(Failure):
    """What we did wrong is in the log, under this id."""

    request_id: str


class Frame:
    """The middleware; `origins` are those whose pages may call."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)
        self._warned = log.Thinned()

    @web.middleware
    async def around(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        started = time.perf_counter()
        request[REQUEST_ID] = ids.request_id(request.headers.get(ids.HEADER))
        try:
            response = self._preflight(request) or await self._answer(request, handler)
            status = response.status
        except BrokenOff as broken:
            response, status = broken.response, _HUNG_UP if broken.by_client else 500
        _note(request, status, time.perf_counter() - started)
        return response

    async def dress(self, request: web.Request, response: web.StreamResponse) -> None:
        """Before an answer begins to be sent: what is in the head of each."""
        response.headers.update(_HEADERS)
        if REQUEST_ID in request:
            response.headers[ids.HEADER] = request[REQUEST_ID]
        self._allow_origin(request, response)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The route's answer, or the one to what it raised: nobody ever sees another kind of error."""
        try:
            response = await handler(request)
            # a probe or a page without any query says nothing of the database
            if CALLER in request or LISTENER in request:
                self._warned.over("database unavailable")
        except Refused as refused:
            return _refused(request, refused.status, refused.failure, refused.headers)
        except BrokenOff as broken:
            if not broken.by_client:
                text = _without_secrets(request, _traceback(broken.__cause__))
                id_ = request[REQUEST_ID]
                log.get().error("answer broken off", route=template(request), request_id=id_, traceback=text)
            raise
        except web.HTTPException as error:
            kept = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return failed(error.status, Failure(error=_TEXTS.get(error.status, error.reason)), kept)
        except Temporary as error:
            # Our trouble, which passes: a 500, so that it never looks like "not found", and worth asking again.
            self._warned.warning("database unavailable", error=_without_secrets(request, str(error)))
            return _internal(request, {"Retry-After": _RETRY_SECONDS})
        except Exception as error:
            text = _without_secrets(request, _traceback(error))
            log.get().error("request failed", route=template(request), request_id=request[REQUEST_ID], traceback=text)
            return _internal(request, {})
        return response

    def _preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks whether its page may call."""
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_METHOD)
        error = request.match_info.http_exception
        if request.method != hdrs.METH_OPTIONS or asked is None or not isinstance(error, web.HTTPMethodNotAllowed):
            return None
        if not self._allowed(request.headers.get(hdrs.ORIGIN)):
            return failed(403, Failure(error="this origin may not call"), {})
        headers = {
            hdrs.ACCESS_CONTROL_ALLOW_METHODS: ", ".join(sorted(error.allowed_methods)),
            hdrs.ACCESS_CONTROL_ALLOW_HEADERS: f"Authorization, Content-Type, x-api-key, {ids.HEADER}",
            hdrs.ACCESS_CONTROL_MAX_AGE: _PREFLIGHT_SECONDS,
        }
        return web.Response(status=204, headers=headers)

    def _allow_origin(self, request: web.Request, response: web.StreamResponse) -> None:
        if not self._origins:
            return
        response.headers[hdrs.VARY] = hdrs.ORIGIN
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and self._allowed(origin):
            # No cookies and no credentials of the browser's: a page has to hold the key or token itself.
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = "*" if "*" in self._origins else origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = f"{ids.HEADER}, Retry-After"

    def _allowed(self, origin: str | None) -> bool:
        return "*" in self._origins or origin in self._origins


def failed(status: int, failure: Failure, headers: Any) -> web.Response:
    """An error as every error is answered."""
    body = failure.__pydantic_serializer__.to_json(failure, by_alias=True)
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


def _refused(request: web.Request, status: int, failure: Failure, headers: Mapping[str, str]) -> web.Response:
    """An error as the route's callers read it: a page where it is opened by a browser."""
    if PAGE not in request:
        return failed(status, failure, headers)
    body = pages.failure(status, failure.error, request[REQUEST_ID])
    return web.Response(body=body, status=status, headers={**headers, **pages.HEADERS, "Content-Type": HTML})


def _internal(request: web.Request, headers: dict[str, str]) -> web.Response:
    failure = InternalFailure(error="internal error", request_id=request[REQUEST_ID])
    return _refused(request, 500, failure, headers)


def template(request: web.Request) -> str:
    """The route as it was declared: a path may hold what must be in no log, and there are too many of them."""
    if request.match_info.http_exception is not None:
        return _UNMATCHED
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else _UNMATCHED


def _note(request: web.Request, status: int, seconds: float) -> None:
    route, caller = template(request), request.get(CALLER)
    metrics.http_requests_total.labels(route, f"{status // 100}xx").inc()
    if route not in _QUIET:
        metrics.http_seconds.labels(route).observe(seconds)
    say = log.get().debug if route in _QUIET else log.get().info
    say(
        "request", method=request.method if route != _UNMATCHED else None, route=route, status=status,
        seconds=round(seconds, 4), request_id=request[REQUEST_ID],
        account=str(caller.account) if caller else None, key=caller.key if caller else None,
        **({"listener": str(request[LISTENER])} if LISTENER in request else {}),
    )  # fmt: skip


def _traceback(error: BaseException | None) -> str:
    """An error with what it came from, but for Postgres' details: they quote the row, with whoever is in it."""
    text = "".join(traceback.format_exception(error))
    while error is not None:
        detail = getattr(error, "detail", None)
        if isinstance(detail, str) and detail:
            text = text.replace(detail, _MASK)
        error = error.__cause__ or error.__context__
    return text


def _without_secrets(request: web.Request, text: str) -> str:
    """A traceback's text without what the caller proved itself with, which an exception may quote."""
    secrets = {*request.cookies.values(), *(request.query.get(name, "") for name in _SECRET_PARAMETERS)}
    for name in ("x-api-key", "Authorization"):
        for value in request.headers.getall(name, []):
            secrets |= {value, value.partition(" ")[2].strip()}
    for secret in secrets:
        if len(secret) >= 8:
            text = text.replace(secret, _MASK)
    return text
