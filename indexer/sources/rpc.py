"""One JSON-RPC endpoint: typed calls and batches, pacing, what was learnt of it, and no key in any text."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import aiohttp
import msgspec

from indexer import metrics
from indexer.config import EndpointSettings
from indexer.sources.provider_errors import Kind, Trouble, classify
from indexer.sources.wire import Header, quantity

T = TypeVar("T")

_OUTCOMES = {Kind.RANGE: "range", Kind.ADDRESSES: "range", Kind.RATE_LIMITED: "rate_limited"}
# Light questions, whose answer takes the same time whatever we are busy with; the others would not compare.
_MEASURED = frozenset({"eth_chainId", "eth_blockNumber", "eth_getBlockByNumber"})
MOST_CALLS_A_BATCH = 100  # what providers commonly take
_KEPT_HEADERS = 16
_FRESH_SECONDS = 5.0
_SHORTEST_KEY = 8


class RpcError(msgspec.Struct):
    code: int | float | str | None = None
    message: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class Reply(msgspec.Struct, Generic[T]):
    """One JSON-RPC answer; `result` is UNSET where the node left it out."""

    id: int | str | None = None
    result: T | msgspec.UnsetType = msgspec.UNSET
    error: RpcError | str | None = None


class RpcTrouble(Exception):
    """An endpoint did not give the answer; `trouble` says what to do about it.

    `declined`: the node itself said no, in an error of JSON-RPC (of this `code`) or HTTP 4xx; it was not just out of
    reach or out of order.
    """

    def __init__(
        self, endpoint: Endpoint, method: str, trouble: Trouble, outcome: str = "error", *,
        code: int | None = None, declined: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(f"{endpoint.name}: {method}: {trouble.message}")
        self.endpoint, self.method, self.trouble, self.outcome = endpoint, method, trouble, outcome
        self.code, self.declined = code, declined


class _Context(msgspec.Struct):
    """What a request was about and how its answer came, for the reading of errors."""

    method: str
    span: tuple[int, int] | None = None
    raw: bytes = b""
    status: int = 200
    retry_after: float | None = None


class Endpoint:
    """One node: its connection, what was learnt of its limits, and how well it does."""

    def __init__(self, settings: EndpointSettings, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        self.name = settings.label
        self.ws_url = settings.ws
        self._url = settings.url.get_secret_value()
        self._keys = _keys(self._url, settings.ws.get_secret_value() if settings.ws else "")
        self._session = session
        self._timeout = timeout_seconds
        self._pause = 1 / settings.max_requests_per_second if settings.max_requests_per_second else 0.0
        self._next_slot = 0.0
        self._ids = 0
        self._decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
        self._announced: dict[int, tuple[float, Header]] = {}
        # learnt from the node: its network, its newest block, and the limits that it named
        self.chain_id: str | None = None
        self.newest = -1
        self.max_blocks: int | None = None
        self.max_addresses: int | None = None
        self.max_batch = float(MOST_CALLS_A_BATCH)
        # health; one that is doubted has failed and not done anything since
        self.rested_at = self.rested_until = 0.0
        self.failures = 0
        self.doubted = False
        self.latency = 0.0
        self.last_error = ""

    async def call(
        self, method: str, params: Sequence[Any], type_: type[T], *, span: tuple[int, int] | None = None
    ) -> T:
        """Ask `method`, and return its result as `type_` (a msgspec type; None only where it allows it).

        `span`: the block range asked for, which tells a provider's range hints apart. Raises RpcTrouble.
        """
        self._ids += 1
        body = msgspec.json.encode({"jsonrpc": "2.0", "id": self._ids, "method": method, "params": list(params)})
        about = _Context(method, span)
        await self._post(about, body)
        reply: Reply[T] = self._decoded(about, Reply[type_])  # type: ignore[valid-type]
        return self._result(about, reply)

    async def batch(self, method: str, calls: Sequence[Sequence[Any]], type_: type[T]) -> list[T]:
        """The same method for many parameters in one request, answers in the order of `calls`; raises RpcTrouble."""
        first = self._ids + 1
        self._ids += len(calls)
        body = msgspec.json.encode(
            [{"jsonrpc": "2.0", "id": first + n, "method": method, "params": list(p)} for n, p in enumerate(calls)]
        )
        about = _Context(method)
        await self._post(about, body, len(calls))
        if about.raw.lstrip()[:1] != b"[":  # a refusal of the whole batch is a single object
            self._result(about, self._decoded(about, Reply[Any]))
            raise self.failed(method, Trouble(Kind.TRANSIENT, "one answer to a batch"), "invalid", declined=True)
        replies: list[Reply[T]] = self._decoded(about, list[Reply[type_]])  # type: ignore[valid-type]
        by_id = {reply.id: reply for reply in replies}
        if by_id.keys() != set(range(first, first + len(calls))):
            # an error of no id is the refusal of all of them
            for reply in replies:
                self._result(about, reply)
            trouble = Trouble(Kind.TRANSIENT, f"{len(by_id)} answers to a batch of {len(calls)}")
            raise self.failed(method, trouble, "invalid", declined=True)
        return [self._result(about, by_id[first + n]) for n in range(len(calls))]

    async def _post(self, about: _Context, body: bytes, calls: int = 1) -> None:
        await self._paced(calls)
        started = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(self._timeout):
                async with self._session.post(self._url, data=body, headers=headers) as response:
                    raw = await response.read()
        except TimeoutError:
            trouble = Trouble(Kind.TRANSIENT, f"no answer within {self._timeout:g} s")
            raise self.failed(about.method, trouble, "timeout") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # aiohttp's own text may hold the whole address, and with it a key
            trouble = Trouble(Kind.TRANSIENT, f"not reached ({type(error).__name__})")
            raise self.failed(about.method, trouble) from None
        seconds = time.perf_counter() - started
        if about.method in _MEASURED and calls == 1:
            self.latency = seconds if not self.latency else 0.8 * self.latency + 0.2 * seconds
        metrics.rpc_seconds.labels(self.name, about.method).observe(seconds)
        about.raw, about.status = raw, response.status
        about.retry_after = _seconds(response.headers.get("Retry-After"))

    def _decoded(self, about: _Context, type_: Any) -> Any:
        decoder = self._decoders.get(type_)
        if decoder is None:
            decoder = self._decoders[type_] = msgspec.json.Decoder(type_)
        try:
            return decoder.decode(about.raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if about.status >= 400:
                raise self._refused(about, None, self._body(about), "") from None
            trouble = Trouble(Kind.TRANSIENT, f"not the JSON expected: {error}")
            raise self.failed(about.method, trouble, "invalid") from None

    def _result(self, about: _Context, reply: Reply[T]) -> T:
        if reply.error is not None:
            error = reply.error if isinstance(reply.error, RpcError) else RpcError(message=reply.error)
            data = bytes(error.data).decode(errors="replace")
            raise self._refused(about, _code(error.code), error.message or "an error without words", data)
        if about.status >= 400:
            raise self._refused(about, None, self._body(about), "")
        if reply.result is msgspec.UNSET:
            raise self.failed(about.method, Trouble(Kind.TRANSIENT, "neither result nor error"), "invalid")
        metrics.rpc_requests_total.labels(self.name, about.method, "ok").inc()
        return reply.result

    def _body(self, about: _Context) -> str:
        """An HTTP error in words, from a body that is not JSON-RPC."""
        text = self._masked(about.raw[:4000].decode(errors="replace"))
        return f"HTTP {about.status} {' '.join(text.split())}".strip()[:300]

    def _refused(self, about: _Context, code: int | None, message: str, data: str) -> RpcTrouble:
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

    # -- what it announced -----------------------------------------------------------------------------------------

    def announce(self, header: Header) -> None:
        """Note a header that the node showed of its own accord, or as its newest."""
        number = quantity(header.number)
        self.newest = max(self.newest, number)
        self._announced[number] = (time.monotonic(), header)
        while len(self._announced) > _KEPT_HEADERS:
            del self._announced[next(iter(self._announced))]

    def announced(self, number: int) -> Header | None:
        """The header that was announced just now for `number`, given once: if it proves stale, the node is asked."""
        at, header = self._announced.pop(number, (0.0, None))
        return header if time.monotonic() - at < _FRESH_SECONDS else None

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


def _code(given: float | str | None) -> int | None:
    try:
        return None if given is None else int(given)
    except ValueError:
        return None


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; its form as a date is rare and left to our own backoff."""
    try:
        return min(max(float(header), 0.0), 300.0) if header is not None else None
    except ValueError:
        return None
