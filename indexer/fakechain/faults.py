"""What goes wrong with providers, as values to append to a FakeNode's `faults`.

A fault source is a callable of (method, params) that returns a Fault or None; the ready-made ones cover what the
project has met. `times` counts how often it strikes; None is for ever. `methods` limits it to some methods.
The range of an eth_getLogs call is always given to them in numbers, whatever tag was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import cycle
from typing import Any, TypeAlias

import msgspec

from indexer.fakechain.answers import TAGS


class Fault(msgspec.Struct, frozen=True):
    """How one call is answered instead of truly. Where it says nothing about the answer, the true one follows.

    `error` is {"code", "message"} and perhaps "data"; `result` replaces the true result; `body` replaces the whole
    HTTP reply (or WebSocket message). A body, and any `status` but 200, strikes the whole of a batch.
    `delay_seconds` comes before the answer. `behind`: answer as a node whose head is so many blocks behind.
    `after` sees the true result and may return a Fault of its own in its place.
    """

    status: int = 200
    error: Mapping[str, Any] | None = None
    result: Any = msgspec.UNSET
    body: bytes | None = None
    headers: Mapping[str, str] = {}
    delay_seconds: float = 0
    behind: int = 0
    after: Callable[[Any], Fault | None] | None = None

    @property
    def answers(self) -> bool:
        """Whether it replaces the answer, and does not merely delay or judge it."""
        has_answer = self.error is not None or self.result is not msgspec.UNSET or self.body is not None
        return has_answer or self.status != 200

    @property
    def whole_reply(self) -> bool:
        return self.body is not None or self.status != 200


FaultSource: TypeAlias = Callable[[str, list[Any]], Fault | None]
Message: TypeAlias = str | Callable[[int, int], str]
_HTML = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
_TRUNCATED = b'{"jsonrpc":"2.0","id":1,"result":[{"address":"0x5fbdb2315678afecb3'
_BLOCK_METHODS = ("eth_getBlockByNumber", "eth_getBlockByHash")


async def consult(
    faults: Sequence[FaultSource], method: str, params: list[Any]
) -> tuple[Fault | None, int, list[Callable[[Any], Fault | None]]]:
    """The fault that answers in the node's place, how far behind it is, and who judges the true answer."""
    behind, delay_seconds, judges, answering = 0, 0.0, [], None
    for source in tuple(faults):
        fault = source(method, params)
        if fault is None:
            continue
        behind, delay_seconds = max(behind, fault.behind), delay_seconds + fault.delay_seconds
        if fault.after:
            judges.append(fault.after)
        if fault.answers:
            answering = fault
            break
    if delay_seconds:
        await asyncio.sleep(delay_seconds)
    return answering, behind, judges


class Strikes:
    """Counts down, and filters by method."""

    def __init__(self, times: int | None, methods: Collection[str] | None = None) -> None:
        self.left, self.methods = times, methods

    def strike(self, method: str = "") -> bool:
        if self.left == 0 or (self.methods is not None and method not in self.methods):
            return False
        if self.left is not None:
            self.left -= 1
        return True


def _error(code: int, message: str, data: Any = None) -> dict[str, Any]:
    return {"code": code, "message": message} | ({} if data is None else {"data": data})


def _range(method: str, params: Sequence[Any]) -> tuple[int, int] | None:
    """The range of an eth_getLogs call, None for one by block hash (or with a range that is no range)."""
    if method != "eth_getLogs" or not params or not isinstance(params[0], dict):
        return None
    try:
        return int(params[0]["fromBlock"], 16), int(params[0]["toBlock"], 16)
    except (KeyError, TypeError, ValueError):
        return None


def limit_range(max_blocks: int, code: int, message: Message, data: Any = None, status: int = 200) -> FaultSource:
    """Refuse eth_getLogs over more than `max_blocks` blocks. A callable `message` gets the (from, to) asked for."""

    def source(method: str, params: list[Any]) -> Fault | None:
        asked = _range(method, params)
        if asked is None or asked[1] - asked[0] + 1 <= max_blocks:
            return None
        return Fault(status, _error(code, message if isinstance(message, str) else message(*asked), data))

    return source


def limit_results(max_logs: int, code: int, message: Message, data: Any = None, status: int = 200) -> FaultSource:
    """Refuse an eth_getLogs that finds more than `max_logs` logs, unless it is for one block hash.

    A callable `message` gets the `from` asked for and the last block up to which the logs would fit.
    """

    def source(method: str, params: list[Any]) -> Fault | None:
        asked = _range(method, params)
        if asked is None:
            return None

        def judge(logs: Any) -> Fault | None:
            if len(logs) <= max_logs:
                return None
            fits = max(asked[0], int(logs[max_logs]["blockNumber"], 16) - 1)
            return Fault(status, _error(code, message if isinstance(message, str) else message(asked[0], fits), data))

        return Fault(after=judge)

    return source


def rate_limited(
    times: int | None,
    status: int = 429,
    retry_after: float | None = None,
    code: int = -32005,
    message: str = "rate limit exceeded: too many requests",
    methods: Collection[str] | None = None,
) -> FaultSource:
    """The next `times` calls are too many: HTTP `status` (200: the error alone), Retry-After in seconds if given."""
    strikes = Strikes(times, methods)
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}

    def source(method: str, _params: list[Any]) -> Fault | None:
        return Fault(status, _error(code, message), headers=headers) if strikes.strike(method) else None

    return source


def garbage(times: int | None, methods: Collection[str] | None = None) -> FaultSource:
    """Status 200 with what is not JSON-RPC: in turn a JSON text that breaks off and a proxy's HTML page."""
    strikes = Strikes(times, methods)
    bodies = cycle([(_TRUNCATED, "application/json"), (_HTML, "text/html")])

    def source(method: str, _params: list[Any]) -> Fault | None:
        if not strikes.strike(method):
            return None
        body, kind = next(bodies)
        return Fault(body=body, headers={"Content-Type": kind})

    return source


def null_blocks(times: int | None, number: int | None = None) -> FaultSource:
    """eth_getBlockByNumber for a number (this one, or any; no tag) answers null, as a node that lags its balancer."""
    strikes = Strikes(times, ("eth_getBlockByNumber",))

    def source(method: str, params: list[Any]) -> Fault | None:
        if method != "eth_getBlockByNumber" or not params or params[0] in TAGS:
            return None
        if number is not None and params[0] != hex(number):
            return None
        return Fault(result=None) if strikes.strike(method) else None

    return source


def empty_logs(times: int | None, number: int | None = None) -> FaultSource:
    """eth_getLogs answers [] for blocks that the node has not indexed yet; with `number`, where that block has logs."""
    strikes = Strikes(times, ("eth_getLogs",))

    def judge(logs: Any) -> Fault | None:
        if number is not None and not any(log["blockNumber"] == hex(number) for log in logs):
            return None
        return Fault(result=[]) if strikes.strike("eth_getLogs") else None

    return lambda method, _params: Fault(after=judge) if method == "eth_getLogs" else None


def missing_block(
    number: int, times: int | None = None, code: int = -32000, message: str = "header not found"
) -> FaultSource:
    """A node that has lost one block: null where the block is asked for, an error where its logs are."""
    strikes = Strikes(times)

    def judge(answer: Any) -> Fault | None:
        if isinstance(answer, dict) and answer.get("number") == hex(number) and strikes.strike():
            return Fault(result=None)
        if isinstance(answer, list) and any(item["blockNumber"] == hex(number) for item in answer) and strikes.strike():
            return Fault(error=_error(code, message))
        return None

    def source(method: str, params: list[Any]) -> Fault | None:
        asked = _range(method, params)
        if asked is not None and asked[0] <= number <= asked[1]:
            return Fault(error=_error(code, message)) if strikes.strike() else None
        judged = method in _BLOCK_METHODS or method in ("eth_getLogs", "eth_getBlockReceipts")
        return Fault(after=judge) if judged else None

    return source


def http_error(
    status: int, times: int | None, body: bytes = b"", methods: Collection[str] | None = None
) -> FaultSource:
    """The next `times` calls fail with this HTTP status and body."""
    strikes = Strikes(times, methods)

    def source(method: str, _params: list[Any]) -> Fault | None:
        return Fault(status, body=body) if strikes.strike(method) else None

    return source


def slow(seconds: float, times: int | None, methods: Collection[str] | None = None) -> FaultSource:
    """The next `times` calls are answered truly, but so much later."""
    strikes = Strikes(times, methods)
    return lambda method, _params: Fault(delay_seconds=seconds) if strikes.strike(method) else None


def old_head(blocks: int, times: int | None = None) -> FaultSource:
    """A node that is `blocks` behind, in all that it answers; `times` counts the calls that ask for its head."""
    strikes = Strikes(times)

    def source(method: str, params: list[Any]) -> Fault | None:
        asks_head = method == "eth_blockNumber" or (
            method == "eth_getBlockByNumber" and params[:1] != [] and params[0] in TAGS
        )
        hit = strikes.strike() if asks_head else strikes.left != 0
        return Fault(behind=blocks) if hit else None

    return source


def wrong_chain(chain_id: int) -> FaultSource:
    """A node of another network."""
    answers = {"eth_chainId": hex(chain_id), "net_version": str(chain_id)}
    return lambda method, _params: Fault(result=answers[method]) if method in answers else None
