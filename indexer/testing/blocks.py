"""Blocks made by hand, and spans of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from indexer.model import Block, Event, Span

_ADDRESS = "0x" + "11" * 20
_GENESIS_SECONDS = 1_700_000_000
_BLOCK_SECONDS = 12


def make_blocks(
    *contents: Iterable[Event | tuple[str, Mapping[str, Any]]], first: int = 1, fork: str = ""
) -> list[Block]:
    """Consecutive blocks from number `first` on, each with the events of one argument, as (name, arguments).

    Every event is a transaction of its own. Another `fork` gives the same blocks other hashes.
    """
    return [_block(number, events, first, fork) for number, events in enumerate(contents, first)]


def _block(number: int, events: Iterable[Event | tuple[str, Mapping[str, Any]]], first: int, fork: str) -> Block:
    made = tuple(
        event if isinstance(event, Event) else Event(index, event[0], event[1], _ADDRESS, _digest(f"{number} {index}"))
        for index, event in enumerate(events)
    )
    # nothing is known of what lies before the first block: like a chain's first span, it hangs on any cursor
    parent = _digest(f"block {fork} {number - 1}") if number > first else None
    timestamp = _GENESIS_SECONDS + _BLOCK_SECONDS * number
    return Block(number, _digest(f"block {fork} {number}"), parent, timestamp, made)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def one_span(blocks: Sequence[Block], *, first: int | None = None, final: bool = True) -> Span:
    """All the blocks as one span, from number `first` on (by default the first one's)."""
    first, end = blocks[0].number if first is None else first, blocks[-1]
    # below finality a source lists only the blocks with events
    listed = tuple(block for block in blocks if block.events) if final else tuple(blocks)
    return Span(first, end.number, listed, end.ref, end.timestamp, final)


def one_span_a_block(blocks: Sequence[Block], *, final: bool = False) -> list[Span]:
    """Each block as a span, as they come at the head."""
    return [one_span([block], final=final) for block in blocks]


def spans_of(blocks: Sequence[Block], sizes: Iterable[int], *, final: bool = True) -> list[Span]:
    """The blocks in spans of so many blocks each; what is left over is the last one."""
    borders = [0]
    for size in sizes:
        borders.append(min(borders[-1] + max(size, 1), len(blocks)))
    borders.append(len(blocks))
    return [one_span(blocks[start:end], final=final) for start, end in pairwise(borders) if start < end]
