"""What all clients share: one session each, time limits, Retry-After, typed answers, and errors that tell nothing."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Generic, Self, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from indexer import metrics
from indexer.sidecar.providers.errors import Failed, ProviderError, Saturated, refused

T = TypeVar("T")

DELAYS = (1.0, 2.0, 4.0, 8.0)
_CONNECTIONS = 16
_OAUTH_ERRORS = frozenset({
    "invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type",
    "invalid_scope",
})  # fmt: skip
_CONNECT_SECONDS = 10.0
_MOST_BYTES = 64 << 20
_LONGEST_RETRY_AFTER = 86_400.0


class Answer(msgspec.Struct, Generic[T], frozen=True):
    """A 2xx answer whose body was what was expected."""

    value: T
    status: int
    headers: Mapping[str, str]


class Http:
    """Requests to one provider over connections that are kept. Use as a context, or call `close`."""

    def __init__(
        self, provider: str, base_url: str, *, timeout_seconds: float, headers: Mapping[str, str] | None = None,
        connections: int = _CONNECTIONS,
    ) -> None:  # fmt: skip
        self.provider, self._connections = provider, connections
        self._base = base_url.rstrip("/")
        self._timeout, self._headers = timeout_seconds, dict(headers or {})
        self._session: aiohttp.ClientSession | None = None
        self._decoders: dict[object, msgspec.json.Decoder[object]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def path(self, *segments: str) -> str:
        """The address below the base; a segment stays one whatever it holds."""
        if any(segment in ("", ".", "..") for segment in segments):
            raise ValueError("no part of an address may be empty or dots alone")
        return "/".join((self._base, *(quote(segment, safe="~") for segment in segments)))

    async def ask(
        self, what: str, answer: type[T], method: str, url: str, *,
        params: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None, body: bytes | None = None,
    ) -> Answer[T]:  # fmt: skip
        """Send one request, once, and decode its answer as the msgspec type `answer`; raises ProviderError.

        `what` names the question in errors, in words that are ours.
        """
        with self._counted():
            status, answered, raw = await self._exchange(what, method, url, params, headers, body)
            if not 200 <= status < 300:
                wait, code = retry_after(answered.get("Retry-After")), oauth_error(raw) if status < 500 else None
                raise refused(self.provider, what, status, wait, code)
            return Answer(self._decoded(what, answer, raw, status), status, answered)

    async def _exchange(
        self, what: str, method: str, url: str, params: Mapping[str, str] | None, headers: Mapping[str, str] | None,
        body: bytes | None,
    ) -> tuple[int, Mapping[str, str], bytes]:  # fmt: skip
        try:
            async with (
                asyncio.timeout(self._timeout),
                # A redirect would carry the key to whatever host it names.
                self._open().request(
                    method, url, params=params, headers=headers, data=body, allow_redirects=False
                ) as response,
            ):
                return response.status, response.headers, await self._read(what, response)
        except TimeoutError:
            text = f"no answer to {what} within {self._timeout:g} s"
            raise Saturated(self.provider, text, outcome="timeout") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # aiohttp's own text may hold the whole address.
            raise Saturated(self.provider, f"no answer to {what} ({type(error).__name__})") from None

    async def _read(self, what: str, response: aiohttp.ClientResponse) -> bytes:
        raw = bytearray()
        async for piece in response.content.iter_chunked(1 << 16):
            raw += piece
            if len(raw) > _MOST_BYTES:
                text = f"the answer to {what} is larger than {_MOST_BYTES >> 20} MB"
                raise Failed(self.provider, text, status=response.status, outcome="invalid")
        return bytes(raw)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                headers=self._headers,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            # Else a GET whose connection breaks is sent a second time unseen, and every call costs quota.
            self._session._retry_connection = False
        return self._session

    def _decoded(self, what: str, answer: type[T], raw: bytes, status: int) -> T:
        decoder = self._decoders.get(answer)
        if decoder is None:
            decoder = self._decoders[answer] = msgspec.json.Decoder(answer)
        try:
            return decoder.decode(raw)  # type: ignore[return-value]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            # msgspec's own text names the field, and a field's name may be anything in a map.
            raise self.unreadable(what, status) from None

    def unreadable(self, what: str, status: int | None = None) -> Failed:
        """The exception for an answer that is not what it should be."""
        return Failed(self.provider, f"the answer to {what} can't be read", status=status, outcome="invalid")

    @contextmanager
    def _counted(self) -> Iterator[None]:
        started, outcome = time.perf_counter(), "cancelled"
        try:
            yield
            outcome = "2xx"
        except ProviderError as error:
            outcome = error.outcome
            raise
        finally:
            metrics.provider_requests_total.labels(self.provider, outcome).inc()
            metrics.provider_seconds.labels(self.provider).observe(time.perf_counter() - started)


def retry_after(header: str | None, now: datetime | None = None) -> float | None:
    """Retry-After in seconds from now, at most a day: it comes as a number or as a date. None where it is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
        except (ValueError, OverflowError):
            return None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        seconds = (at - (now or datetime.now(UTC))).total_seconds()
    return None if math.isnan(seconds) else min(max(seconds, 0.0), _LONGEST_RETRY_AFTER)


class _OAuthError(msgspec.Struct):
    error: str


def oauth_error(raw: bytes) -> str | None:
    """The error's name in the words of OAuth, or None: nothing else of an answer gets into errors."""
    try:
        said = msgspec.json.decode(raw, type=_OAuthError).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return said if said in _OAUTH_ERRORS else None


async def with_backoff(
    call: Callable[[], Awaitable[T]], delays: Sequence[float] = DELAYS, *,
    longest_seconds: float = 60.0, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:  # fmt: skip
    """`call` until it is not Saturated: once, and after each of `delays`; what Retry-After says goes before a delay.

    A wait of more than `longest_seconds` is not sat out here: the Saturated is raised at once, with its `retry_after`.
    """
    for delay in delays:
        try:
            return await call()
        except Saturated as error:
            seconds = delay if error.retry_after is None else error.retry_after
            if seconds > longest_seconds:
                raise
        await sleep(seconds)
    return await call()
