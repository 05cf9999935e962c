"""JSON-RPC endpoints: typed calls and batches, pacing, health, failover. The world's trouble is retried here.

A piece of work that must not mix two nodes' answers is one function of one endpoint, given to `Endpoints.run`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from indexer import log, metrics
from indexer.config import ChainSettings, EndpointSettings
from indexer.errors import RpcUnavailable
from indexer.sources.provider_errors import Kind, Trouble, classify

T = TypeVar("T")

# Rest after the n-th failure in a row: at once somewhere else, then doubling.
_FIRST_REST_SECONDS = 0.1
_LONGEST_REST_SECONDS = 15.0
_BILLING_REST_SECONDS = 600.0
_OUTCOMES = {Kind.RANGE: "range", Kind.ADDRESSES: "range", Kind.RATE_LIMITED: "rate_limited"}


class RpcError(msgspec.Struct):
    code: int = 0
    message: str = ""
    data: msgspec.Raw = msgspec.Raw(b"")


class Reply(msgspec.Struct, Generic[T]):
    """One JSON-RPC answer; `result` is UNSET where the node left it out."""

    id: int | str | None = None
    result: T | msgspec.UnsetType = msgspec.UNSET
    error: RpcError | None = None


class RpcTrouble(Exception):
    """An endpoint did not give the answer; `trouble` says what to do about it."""

    def __init__(self, endpoint: Endpoint, method: str, trouble: Trouble, outcome: str = "error") -> None:
        super().__init__(f"{endpoint.name}: {method}: {trouble.message}")
        self.endpoint, self.method, self.trouble, self.outcome = endpoint, method, trouble, outcome


class Endpoint:
    """One node: its connection, what was learnt of its limits, and how well it does."""

    def __init__(self, settings: EndpointSettings, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        self.name = endpoint_name(settings)
        self.ws_url = settings.ws
        self._url = settings.url.get_secret_value()
        self._session = session
        self._timeout = timeout_seconds
        self._pause = 1 / settings.max_requests_per_second if settings.max_requests_per_second else 0.0
        self._next_slot = 0.0
        self._ids = 0
        self._decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
        # learnt from the provider's refusals
        self.max_blocks: int | None = None
        self.max_addresses: int | None = None
        # health
        self.rested_until = 0.0
        self.failures = 0
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
        raw, status, retry_after = await self._post(method, body)
        reply: Reply[T] = self._decoded(method, raw, status, _reply(type_), retry_after, span)
        return self._result(method, reply, status, retry_after, span)

    async def batch(self, method: str, calls: Sequence[Sequence[Any]], type_: type[T]) -> list[T]:
        """The same method for many parameters in one request, answers in the order of `calls`; raises RpcTrouble."""
        first = self._ids + 1
        self._ids += len(calls)
        body = msgspec.json.encode(
            [{"jsonrpc": "2.0", "id": first + n, "method": method, "params": list(p)} for n, p in enumerate(calls)]
        )
        raw, status, retry_after = await self._post(method, body)
        if raw.lstrip()[:1] != b"[":  # a refusal of the whole batch is a single object
            refusal = self._decoded(method, raw, status, _reply(type_), retry_after, None)
            self._result(method, refusal, status, retry_after, None)
            raise self._failed(method, Trouble(Kind.TRANSIENT, "one answer to a batch"), "invalid")
        replies: list[Reply[T]] = self._decoded(method, raw, status, _replies(type_), retry_after, None)
        by_id = {reply.id: reply for reply in replies}
        if len(by_id) != len(calls):
            trouble = Trouble(Kind.TRANSIENT, f"{len(by_id)} answers to a batch of {len(calls)}")
            raise self._failed(method, trouble, "invalid")
        return [self._result(method, by_id[first + n], status, retry_after, None) for n in range(len(calls))]

    async def _post(self, method: str, body: bytes) -> tuple[bytes, int, float | None]:
        await self._paced()
        started = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(self._timeout):
                async with self._session.post(self._url, data=body, headers=headers) as response:
                    raw = await response.read()
        except TimeoutError:
            trouble = Trouble(Kind.TRANSIENT, f"no answer within {self._timeout:g} s")
            raise self._failed(method, trouble, "timeout") from None
        except (aiohttp.ClientError, OSError) as error:
            # aiohttp's own text may hold the whole address, and with it a key
            trouble = Trouble(Kind.TRANSIENT, f"not reached ({type(error).__name__})")
            raise self._failed(method, trouble) from None
        seconds = time.perf_counter() - started
        self.latency = seconds if not self.latency else 0.8 * self.latency + 0.2 * seconds
        metrics.rpc_seconds.labels(self.name, method).observe(seconds)
        return raw, response.status, _seconds(response.headers.get("Retry-After"))

    def _decoded(
        self, method: str, raw: bytes, status: int, type_: Any, retry_after: float | None, span: tuple[int, int] | None
    ) -> Any:
        decoder = self._decoders.get(type_)
        if decoder is None:
            decoder = self._decoders[type_] = msgspec.json.Decoder(type_)
        try:
            return decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if status >= 400:
                text = raw[:300].decode(errors="replace")
                raise self._refused(method, status, None, text, "", retry_after, span) from None
            raise self._failed(method, Trouble(Kind.TRANSIENT, f"not the JSON expected: {error}"), "invalid") from None

    def _result(
        self, method: str, reply: Reply[T], status: int, retry_after: float | None, span: tuple[int, int] | None
    ) -> T:
        if reply.error is not None:
            error = reply.error
            data = bytes(error.data).decode(errors="replace")
            raise self._refused(method, status, error.code, error.message, data, retry_after, span)
        if status >= 400:
            raise self._refused(method, status, None, f"HTTP {status}", "", retry_after, span)
        if reply.result is msgspec.UNSET:
            raise self._failed(method, Trouble(Kind.TRANSIENT, "neither result nor error"), "invalid")
        metrics.rpc_requests_total.labels(self.name, method, "ok").inc()
        return reply.result

    def _refused(
        self, method: str, status: int, code: int | None, message: str, data: str,
        retry_after: float | None, span: tuple[int, int] | None,
    ) -> RpcTrouble:  # fmt: skip
        first, last = span or (None, None)
        trouble = classify(
            status=status, code=code, message=message, data=data, first=first, last=last, retry_after=retry_after
        )
        return self._failed(method, trouble)

    def _failed(self, method: str, trouble: Trouble, outcome: str | None = None) -> RpcTrouble:
        outcome = outcome or _OUTCOMES.get(trouble.kind, "error")
        metrics.rpc_requests_total.labels(self.name, method, outcome).inc()
        return RpcTrouble(self, method, trouble, outcome)

    async def _paced(self) -> None:
        """Keep to max_requests_per_second, by giving each request the next free slot."""
        if self._pause:
            now = time.monotonic()
            self._next_slot = max(self._next_slot, now) + self._pause
            await asyncio.sleep(self._next_slot - self._pause - now)

    @property
    def resting(self) -> float:
        """Seconds until the endpoint is used again; 0 where it is."""
        return max(0.0, self.rested_until - time.monotonic())

    def rest(self, seconds: float, why: str) -> None:
        self.rested_until = max(self.rested_until, time.monotonic() + seconds)
        self.last_error = why
        metrics.endpoint_healthy.labels(self.name).set(0)

    def well(self) -> None:
        self.failures, self.rested_until, self.last_error = 0, 0.0, ""
        metrics.endpoint_healthy.labels(self.name).set(1)


class Endpoints:
    """The endpoints of a chain: the healthiest is asked, one that fails is rested and another asked."""

    def __init__(self, settings: ChainSettings) -> None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=True)
        self.all = [Endpoint(one, self._session, settings.request_timeout_seconds) for one in settings.endpoints]
        self._patience = settings.connect_timeout_seconds
        self._thinned = log.Thinned()

    async def close(self) -> None:
        await self._session.close()

    def best(self) -> Endpoint:
        """The endpoint to ask next: one that does not rest, with the fewest failures and the quickest answers."""
        return min(self.all, key=lambda one: (one.resting, one.failures, round(one.latency, 2)))

    async def run(self, work: Callable[[Endpoint], Awaitable[T]], *, patience: float | None = None) -> T:
        """Run `work` on the best endpoint, and on the next one if that fails, until one has done it.

        Waits while all of them rest. `patience`: raise RpcUnavailable after so many seconds; None tries for ever (the
        daemon's stall is then plain to see). A RANGE trouble that `work` lets through is raised as RpcUnavailable: the
        provider can't serve what was asked.
        """
        started = time.monotonic()
        while True:
            endpoint = self.best()
            if endpoint.resting:
                await asyncio.sleep(endpoint.resting)
            try:
                result = await work(endpoint)
            except RpcTrouble as failed:
                self._rest(failed)
                if patience is not None and time.monotonic() - started > patience:
                    raise RpcUnavailable(self._unavailable(failed)) from None
            else:
                if endpoint.failures:
                    self._thinned.over("endpoint rested", about=endpoint.name, endpoint=endpoint.name)
                endpoint.well()
                return result

    def _unavailable(self, failed: RpcTrouble) -> str:
        names = ", ".join(one.name for one in self.all)
        return f"no node answers ({names}): {failed.trouble.message}; check chain.endpoints and the node"

    def _rest(self, failed: RpcTrouble) -> None:
        endpoint, trouble = failed.endpoint, failed.trouble
        endpoint.failures += 1
        seconds = min(_FIRST_REST_SECONDS * 2 ** min(endpoint.failures - 1, 10), _LONGEST_REST_SECONDS)
        if trouble.kind is Kind.RATE_LIMITED:
            seconds = trouble.retry_after if trouble.retry_after is not None else max(seconds, 0.5)
        elif trouble.kind is Kind.BILLING:
            seconds = _BILLING_REST_SECONDS
        elif trouble.kind is Kind.BEHIND:
            seconds = min(seconds, 1.0)
        endpoint.rest(seconds, trouble.message)
        if trouble.kind is not Kind.BEHIND or endpoint.failures > 3:
            self._thinned.warning(
                "endpoint rested", about=endpoint.name, endpoint=endpoint.name, method=failed.method,
                error=trouble.message[:300], kind=trouble.kind.name.lower(), seconds=round(seconds, 2),
            )  # fmt: skip


def endpoint_name(settings: EndpointSettings) -> str:
    """How an endpoint is shown: by its name, or the host (never the path or query, which may hold a key)."""
    parts = urlsplit(settings.url.get_secret_value())
    return settings.name or f"{parts.hostname or 'endpoint'}{f':{parts.port}' if parts.port else ''}"


def _reply(type_: Any) -> Any:
    return Reply[type_]


def _replies(type_: Any) -> Any:
    return list[Reply[type_]]


def _seconds(header: str | None) -> float | None:
    """Retry-After in seconds; its form as a date is rare and left to our own backoff."""
    try:
        return min(max(float(header), 0.0), 300.0) if header is not None else None
    except ValueError:
        return None
