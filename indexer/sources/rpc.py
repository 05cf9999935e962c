"""One JSON-RPC endpoint: typed calls and batches, and what was learnt of its limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import aiohttp
import msgspec

from indexer import metrics
from indexer.config import EndpointSettings
from indexer.sources.endpoint import Endpoint, Exchange
from indexer.sources.provider_errors import Kind, Trouble
from indexer.sources.wire import Header, quantity

T = TypeVar("T")

MOST_CALLS_A_BATCH = 100  # what providers commonly take
_KEPT_HEADERS = 16
_FRESH_SECONDS = 5.0


class RpcError(msgspec.Struct):
    code: int | float | str | None = None
    message: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")


class Reply(msgspec.Struct, Generic[T]):
    """One JSON-RPC answer; `result` is UNSET where the node left it out."""

    id: int | str | None = None
    result: T | msgspec.UnsetType = msgspec.UNSET
    error: RpcError | str | None = None


class RpcEndpoint(Endpoint):
    """A node that speaks JSON-RPC."""

    measured = frozenset({"eth_chainId", "eth_blockNumber", "eth_getBlockByNumber"})

    def __init__(self, settings: EndpointSettings, session: aiohttp.ClientSession, timeout_seconds: float) -> None:
        super().__init__(settings, session, timeout_seconds)
        self._ids = 0
        self._announced: dict[int, tuple[float, Header]] = {}
        # the limits that the node named
        self.max_addresses: int | None = None
        self.max_batch = float(MOST_CALLS_A_BATCH)

    async def call(
        self, method: str, params: Sequence[Any], type_: type[T], *, span: tuple[int, int] | None = None
    ) -> T:
        """Ask `method`, and return its result as `type_` (a msgspec type; None only where it allows it).

        `span`: the block range asked for, which tells a provider's range hints apart. Raises RpcTrouble.
        """
        self._ids += 1
        body = msgspec.json.encode({"jsonrpc": "2.0", "id": self._ids, "method": method, "params": list(params)})
        about = Exchange(method, span)
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
        about = Exchange(method)
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

    def _result(self, about: Exchange, reply: Reply[T]) -> T:
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


def _code(given: float | str | None) -> int | None:
    try:
        return None if given is None else int(given)
    except ValueError:
        return None
