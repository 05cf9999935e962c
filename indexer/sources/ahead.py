"""Several ranges of final blocks fetched ahead, and what is ready joined into one span."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from indexer.model import Span
from indexer.sources.ranges import EventTarget


async def spans_ahead(
    read: Callable[[int, int], Coroutine[Any, Any, Span]],
    size: Callable[[], int],
    first: int,
    last: int,
    in_flight: int,
    target: EventTarget,
) -> AsyncGenerator[Span, None]:
    """The blocks `first` to `last` in order, `in_flight` ranges of `size()` blocks at a time, each by `read`.

    What is ready when the last span is committed goes into the next together.
    """
    ahead: deque[asyncio.Task[Span]] = deque()
    position = first

    def fetch_ahead() -> None:
        nonlocal position
        while len(ahead) < in_flight and position <= last:
            end = min(position + size() - 1, last)
            ahead.append(asyncio.create_task(read(position, end)))
            position = end + 1

    try:
        fetch_ahead()
        while ahead:
            span = await ahead.popleft()
            ready = _ready(ahead, span.last, target.events - span.events)
            fetch_ahead()
            yield _joined(span, ready) if ready else span
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


def _ready(ahead: deque[asyncio.Task[Span]], last: int, events: int) -> list[Span]:
    """Take from `ahead` what has come already and follows on `last`, up to so many events. A failure stays, until it is
    its turn."""
    ready: list[Span] = []
    while ahead and ahead[0].done() and not ahead[0].exception():
        span = ahead[0].result()
        events -= span.events
        if events < 0 or span.first != last + 1:
            break
        ahead.popleft()
        ready.append(span)
        last = span.last
    return ready


def _joined(span: Span, ready: Sequence[Span]) -> Span:
    parts, end = (span, *ready), ready[-1]
    return Span(
        span.first, end.last, tuple(block for part in parts for block in part.blocks), end.end, end.end_timestamp,
        True, tuple(one for part in parts for one in part.quarantined),
    )  # fmt: skip
