"""Blocks and spans made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from indexer.model import Block, BlockRef, Event, Heads, Span

ADDRESS = "0x" + "11" * 20
GENESIS = BlockRef(0, b"")  # the cursor of a chain that starts at block 1
SECONDS = 1_700_000_000


def block_hash(number: int, fork: str = "") -> bytes:
    return hashlib.sha256(f"{fork}{number}".encode()).digest()


def event(index: int, args: Mapping[str, Any], *, name: str = "Played", tx: int = 0) -> Event:
    return Event(index, name, args, ADDRESS, hashlib.sha256(f"tx {tx}".encode()).digest())


def block(number: int, events: Iterable[Event] = (), *, fork: str = "") -> Block:
    parent = block_hash(number - 1, fork)
    return Block(number, block_hash(number, fork), parent, SECONDS + 12 * number, tuple(events))


def span(blocks: Sequence[Block], first: int | None = None, last: int | None = None, *, final: bool = True) -> Span:
    """The blocks as one span; those between `first` and `last` that are not given are empty."""
    first = blocks[0].number if first is None else first
    last = blocks[-1].number if last is None else last
    end = next((one for one in blocks if one.number == last), None) or block(last)
    return Span(first, last, tuple(blocks), end.ref, end.timestamp, final)


def cut(blocks: Sequence[Block], borders: Iterable[int]) -> list[Span]:
    """The blocks in spans that begin at the places in `borders`; whole numbers of blocks, none left out."""
    places = sorted({0, len(blocks), *borders})
    spans, first = [], 1
    for start, end in pairwise(places):
        spans.append(span(blocks[start:end], first))
        first = spans[-1].last + 1
    return spans


def heads(newest: int, final: int | None = None) -> Heads:
    return Heads(newest, newest if final is None else final)
