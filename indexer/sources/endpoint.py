"""One endpoint, whatever it speaks: requests within its pace, its health, and no key in any text."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from typing import Any, ClassVar, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import aiohttp
import msgspec

from indexer import metrics
from indexer.config import EndpointSettings
from indexer.sources import trace
from indexer.sources.provider_errors import Kind, Trouble, classify

T = TypeVar("T")

_OUTCOMES = {Kind.RANGE: "range", Kind.ADDRESSES: "range", Kind.RATE_LIMITED: "rate_limited"}
_SHORTEST_KEY = 8


class RpcTrouble(Exception):
    """An endpoint did not give the answer; `trouble` says what to do about it.

    `declined`: the node itself said no, in an error of its protocol (of this `code`, if it is JSON-RPC) or HTTP 4xx; it
    was not just out of reach or out of order.
    """

    def __init__(
        self, endpoint: Endpoint, method: str, trouble: Trouble, outcome: str = "error", *,
        code: int | None = None, declined: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(f"{endpoint.name}: {method}: {trouble.message}")
        self.endpoint, self.method, self.trouble, self.outcome = endpoint, method, trouble, outcome
        self.code, self.declined = code, declined


class Impossible(ValueError):
    """What a node said can't be so. The text says what, in a few words that are ours."""


class Exchange(msgspec.Struct):
    """What a request was about and how its answer came, for the reading of errors."""

    method: str
    span: tuple[int, int] | None = None
    raw: bytes = b""
    status: int = 200
    retry_after: float | None = None


class Endpoint:
    """One node: its connection, what was learnt of it, and how well it does. How it is asked is a subclass' affair."""

    headers: ClassVar[dict[str, str]] = {"Content-Type": "application/json"}
    # light questions, whose answer takes the same time whatever we are busy with; the others would not compare
    measured: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: EndpointSettings, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        self.name = settings.label
        self.ws_url = settings.ws
        self._url = settings.url.get_secret_value()
        self._keys = _keys(self._url, settings.ws.get_secret_value() if settings.ws else "")
        self._session = session
        self._timeout = timeout_seconds
        self._pause = 1 / settings.max_requests_per_second if settings.max_requests_per_second else 0.0
        self._next_slot = 0.0
        self._decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
        # learnt from the node: its network, and the newest and the oldest block that it has shown to have
        self.chain_id: str | None = None
        self.newest = -1
        self.earliest = 0
        self.max_blocks: int | None = None  # of one range, where it named a limit
        # of another network: the id that it named last, and whether it was of ours before
        self.foreign: str | None = None
        self.was_ours = False
        # health; one that is doubted has failed and not done anything since
        self.rested_at = self.rested_until = 0.0
        self.failures = 0
        self.doubted = False
        self.latency = 0.0
        self.last_error = ""

    def _address(self, _method: str) -> str:
        return self._url

    async def _post(self, about: Exchange, body: bytes, calls: int = 1) -> None:
        """Send `body`, and note in `about` what came back; raises RpcTrouble where nothing did."""
        await self._paced(calls)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                url = self._address(about.method)
                async with self._session.post(url, data=body, headers=self.headers) as response:
                    raw = await response.read()
        except TimeoutError:
            trouble = Trouble(Kind.TRANSIENT, f"no answer within {self._timeout:g} s")
            raise self.failed(about.method, trouble, "timeout") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # aiohttp's own text may hold the whole address, and with it a key
            trouble = Trouble(Kind.TRANSIENT, f"not reached ({type(error).__name__})")
            raise self.failed(about.method, trouble) from None
        seconds = time.perf_counter() - started
        if about.method in self.measured and calls == 1:
            self.latency = seconds if not self.latency else 0.8 * self.latency + 0.2 * seconds
        metrics.rpc_seconds.labels(self.name, about.method).observe(seconds)
        if noted := trace.current():
            noted.requests.append(trace.Request(self.name, about.method, seconds, len(raw)))
        about.raw, about.status = raw, response.status
        about.retry_after = _seconds(response.headers.get("Retry-After"))

    def _decoded(self, about: Exchange, type_: Any, lenient: Any = None) -> Any:
        """The answer as `type_`, or as `lenient` where it is JSON of another form."""
        decoder = self._decoders.get(type_)
        if decoder is None:
            decoder = self._decoders[type_] = msgspec.json.Decoder(type_)
        try:
            return decoder.decode(about.raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if lenient is not None and isinstance(error, msgspec.ValidationError):
                return self._decoded(about, lenient)
            if about.status >= 400:
                raise self._refused(about, None, self._body(about), "") from None
            trouble = Trouble(Kind.TRANSIENT, f"not the JSON expected: {error}")
            raise self.failed(about.method, trouble, "invalid") from None

    def _body(self, about: Exchange) -> str:
        """An HTTP error in words, from a body that is not of the protocol."""
        text = self._masked(about.raw[:4000].decode(errors="replace"))
        return f"HTTP {about.status} {' '.join(text.split())}".strip()[:300]

    def _refused(self, about: Exchange, code: int | None, message: str, data: str) -> RpcTrouble:
        """An error that the node named, understood; `code` is that of JSON-RPC."""
        first, last = about.span or (None, None)
        trouble = classify(
            status=about.status, code=code, message=self._masked(message), data=self._masked(data),
            first=first, last=last, retry_after=about.retry_after,
        )  # fmt: skip
        declined = code is not None or 400 <= about.status < 500
        return self.failed(about.method, trouble, code=code, declined=declined)

    def failed(
        self, method: str, trouble: Trouble, outcome: str | None = None, *,
        code: int | None = None, declined: bool = False,
    ) -> RpcTrouble:  # fmt: skip
        """The exception to raise for this trouble, counted."""
        outcome = outcome or _OUTCOMES.get(trouble.kind, "error")
        metrics.rpc_requests_total.labels(self.name, method, outcome).inc()
        trouble = dataclasses.replace(trouble, message=self._masked(trouble.message))
        if noted := trace.current():
            noted.troubles.append(f"{self.name}: {method}: {trouble.message}")
        return RpcTrouble(self, method, trouble, outcome, code=code, declined=declined)

    def _masked(self, text: str) -> str:
        """Gateways like to repeat the address that they were asked at."""
        return self._keys.sub("***", text) if self._keys else text

    async def _paced(self, calls: int) -> None:
        """Keep to max_requests_per_second, by giving each call the next free slot; those of a batch count each."""
        if self._pause:
            now = time.monotonic()
            slot = max(self._next_slot, now)
            self._next_slot = slot + self._pause * calls
            await asyncio.sleep(slot - now)

    # -- health ----------------------------------------------------------------------------------------------------

    @property
    def resting(self) -> float:
        """Seconds until the endpoint is used again; 0 where it is."""
        return max(0.0, self.rested_until - time.monotonic())

    def rest(self, seconds: float, why: str) -> None:
        self.rested_at = time.monotonic()
        self.rested_until = max(self.rested_until, self.rested_at + seconds)
        self.last_error, self.doubted = why, True
        metrics.endpoint_healthy.labels(self.name).set(0)

    def well(self) -> None:
        self.failures, self.rested_until, self.last_error, self.doubted = 0, 0.0, "", False
        metrics.endpoint_healthy.labels(self.name).set(1)


def _keys(*urls: str) -> re.Pattern[str] | None:
    """What could be a key in the addresses: each part of path, query and user that is not too short for one."""
    texts: set[str] = set()
    for parts in map(urlsplit, urls):
        query = [value for pair in parse_qsl(parts.query, keep_blank_values=True) for value in pair]
        user = [parts.username or "", parts.password or ""]
        texts |= {
            parts.path,
            parts.query,
            parts.fragment,
            *parts.path.split("/"),
            *parts.query.split("&"),
            *query,
            *user,
        }
    texts |= {unquote(text) for text in texts}
    found = sorted((text for text in texts if len(text) >= _SHORTEST_KEY), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)), re.IGNORECASE) if found else None


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; its form as a date is rare and left to our own backoff."""
    try:
        return min(max(float(header), 0.0), 300.0) if header is not None else None
    except ValueError:
        return None
