"""What a source asks its nodes for, and how long it takes: noted where somebody wants to know, as `indexer explain`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import msgspec


class Request(msgspec.Struct, frozen=True):
    """A request that was answered: by which endpoint, in how many seconds, with how many bytes."""

    endpoint: str
    method: str
    seconds: float
    bytes: int


class Trace:
    """What was asked and what came of it. `troubles`: answers that were none, each in one line without a key.

    `records`: logs (on Core, transactions) that were looked at for events, in `decode_seconds`.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.troubles: list[str] = []
        self.records = 0
        self.decode_seconds = 0.0

    def decoded(self, records: int, seconds: float) -> None:
        self.records += records
        self.decode_seconds += seconds


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)


@contextmanager
def traced() -> Iterator[Trace]:
    """Note what is asked in the block, and in tasks that are begun there."""
    trace = Trace()
    token = _current.set(trace)
    try:
        yield trace
    finally:
        _current.reset(token)


def current() -> Trace | None:
    """Where to note it; None where nobody wants to know."""
    return _current.get()
