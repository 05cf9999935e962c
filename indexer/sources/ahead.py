"""Several ranges of final blocks fetched ahead, and what is ready joined into one span."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

from indexer.model import Span
from indexer.sources.ranges import EventTarget

# Ranges kept ahead for each one in flight, where they hold next to nothing.
_MOST_AHEAD = 8


async def spans_ahead(
    read: Callable[[int, int], Coroutine[Any, Any, Span]],
    size: Callable[[], int],
    first: int,
    last: int,
    in_flight: int,
    target: EventTarget,
    max_blocks: int,
) -> AsyncGenerator[Span, None]:
    """The blocks `first` to `last` in order, `in_flight` ranges of `size()` blocks at a time, each by `read`.

    What is ready when the last span is committed goes into the next together, up to the target and `max_blocks`. Until
    there is enough for that, fetching goes on.
    """
    ahead: deque[asyncio.Task[Span]] = deque()
    position = first

    def fetch_ahead(_: object = None) -> None:
        nonlocal position
        while position <= last and _wants_more(ahead, in_flight, target.events):
            end = min(position + size() - 1, last)
            task = asyncio.create_task(read(position, end))
            task.add_done_callback(fetch_ahead)
            ahead.append(task)
            position = end + 1

    try:
        fetch_ahead()
        while ahead:
            span = await ahead.popleft()
            ready = _ready(ahead, span, target.events, max_blocks)
            fetch_ahead()
            yield _joined(span, ready) if ready else span
    finally:
        position = last + 1  # whoever is cancelled now calls for nothing more
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


def _wants_more(ahead: deque[asyncio.Task[Span]], in_flight: int, events: int) -> bool:
    """Whether another range is to be asked for: too little is ready, and not too many are under way."""
    running = ready = 0
    for task in ahead:
        if not task.done():
            running += 1
        elif task.cancelled() or task.exception() is not None:
            return False
        else:
            ready += task.result().events
    return running < in_flight and ready < events and len(ahead) < in_flight * _MOST_AHEAD


def _ready(ahead: deque[asyncio.Task[Span]], span: Span, events: int, max_blocks: int) -> list[Span]:
    """Take from `ahead` what has come already and follows on `span`, up to so many events and blocks together.

    A failure stays, until it is its turn.
    """
    ready: list[Span] = []
    first, last, events = span.first, span.last, events - span.events
    while ahead and ahead[0].done() and not ahead[0].exception():
        span = ahead[0].result()
        events -= span.events
        if events < 0 or span.first != last + 1 or span.last - first >= max_blocks:
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
