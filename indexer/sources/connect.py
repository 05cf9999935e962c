"""One endpoint that speaks Connect: a call is a POST of JSON, an error an HTTP status with a code and a message."""

from __future__ import annotations

import time
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import msgspec

from indexer import metrics
from indexer.config import EndpointSettings
from indexer.sources.endpoint import Endpoint, Exchange, RpcTrouble
from indexer.sources.provider_errors import Kind, Trouble, classify

T = TypeVar("T")
L = TypeVar("L")

# What Connect's codes mean for us; the others say less than their texts do.
_KINDS = {
    "resource_exhausted": Kind.RATE_LIMITED,
    "unauthenticated": Kind.BILLING,
    "permission_denied": Kind.BILLING,
    "unimplemented": Kind.FATAL,
    "not_found": Kind.BEHIND,
    "out_of_range": Kind.BEHIND,
    "unavailable": Kind.TRANSIENT,
    "deadline_exceeded": Kind.TRANSIENT,
}
# A method that a node does not know is tried again after so long: nodes are brought up to date, and gateways err.
_LACKING_SECONDS = 600.0
# Errors in such words ask for fewer blocks: what a node runs out of may be the length of a message.
_TOO_LONG = {
    "resource_exhausted": ("larger than", "too large", "message size"),
    "invalid_argument": ("too many", "at most", "maximum", "exceed", "limit"),
}


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class ConnectEndpoint(Endpoint):
    """A node that speaks Connect. `service` is the name that its methods go by."""

    service = ""
    headers = {"Content-Type": "application/json", "Connect-Protocol-Version": "1"}  # noqa: RUF012

    def __init__(self, settings: EndpointSettings, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        super().__init__(settings, session, timeout_seconds)
        self._lacks: dict[str, float] = {}

    def _address(self, method: str) -> str:
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{self.service}/{method}"))

    def lacks(self, method: str) -> bool:
        """Whether the node has said that it does not know the method, as an older one may not."""
        return time.monotonic() < self._lacks.get(method, 0.0)

    def forgive(self, *methods: str) -> None:
        """Let these be asked for again, whatever the node has said."""
        for method in methods:
            self._lacks.pop(method, None)

    async def call(self, method: str, message: Any, type_: type[T], lenient: type[L] | None = None) -> T | L:
        """Ask `method` with `message`, and return the answer as `type_` (a msgspec type).

        `lenient`: the type of an answer that is JSON, but does not fit `type_`. Raises RpcTrouble.
        """
        about = Exchange(method)
        await self._post(about, msgspec.json.encode(message))
        if about.status != 200:
            raise self._denied(about)
        answer: T | L = self._decoded(about, type_, lenient)
        metrics.rpc_requests_total.labels(self.name, method, "ok").inc()
        return answer

    def _denied(self, about: Exchange) -> RpcTrouble:
        """The exception for an answer that is none: in Connect's terms, or a gateway's."""
        try:
            error = msgspec.json.decode(about.raw, type=_Error)
        except (msgspec.DecodeError, UnicodeDecodeError):
            error = _Error()
        if error.code == "unimplemented" or (about.status == 404 and not error.code):
            self._lacks[about.method] = time.monotonic() + _LACKING_SECONDS
        if not error.code:
            return self._refused(about, None, self._body(about), "")
        words = self._masked(f"{error.code}: {error.message}"[:300])
        trouble = classify(status=about.status, code=None, message=words, retry_after=about.retry_after)
        kind = _KINDS.get(error.code, trouble.kind)
        if any(one in words for one in _TOO_LONG.get(error.code, ())):
            kind = Kind.RANGE
        outcome = "timeout" if error.code == "deadline_exceeded" else None
        known = Trouble(kind, words, retry_after=about.retry_after)
        return self.failed(about.method, known, outcome, declined=about.status < 500)
