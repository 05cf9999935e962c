"""What JSON-RPC says about blocks and logs, and the checks that it passes before anything trusts it."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import msgspec

from indexer.sources.endpoint import Impossible

_HASH_LENGTH = 66  # 0x and 32 bytes


class Header(msgspec.Struct, gc=False, rename="camel"):
    """What we need of a block's header, as JSON-RPC gives it."""

    number: str
    hash: str
    parent_hash: str
    timestamp: str
    logs_bloom: str = "0x0"

    @property
    def height(self) -> int:
        return int(self.number, 16)


class Log(msgspec.Struct, gc=False, rename="camel"):
    """A log as JSON-RPC gives it; `block_timestamp` is not given by every node."""

    address: str
    topics: list[str]
    data: str
    block_number: str
    block_hash: str
    transaction_hash: str
    log_index: str
    removed: bool = False
    block_timestamp: str | None = None


# what a node answers for a block that it does not have
MaybeHeader = cast("type[Header | None]", Header | None)


def quantity(text: str) -> int:
    """A JSON-RPC number; raises Impossible."""
    try:
        return int(text, 16)
    except ValueError:
        raise Impossible("no number where one belongs") from None


def to_bytes(text: str) -> bytes:
    return bytes.fromhex(text[2:])


def check_header(header: Header, number: int | None = None) -> None:
    """The header must be readable and of the block asked for; raises Impossible."""
    if number is not None and quantity(header.number) != number:
        raise Impossible(f"block {quantity(header.number)} for block {number}")
    for text in (header.number, header.timestamp, header.logs_bloom, header.hash, header.parent_hash):
        quantity(text)
    _check_hash(header.hash)
    _check_hash(header.parent_hash)


def _check_hash(text: str) -> None:
    if len(text) != _HASH_LENGTH or text[:2] != "0x":
        raise Impossible("no hash where one belongs")


def in_order(logs: list[Log], first: int, last: int) -> list[Log]:
    """The logs in chain order, once they are checked; raises Impossible.

    They must be readable, of the blocks `first` to `last`, one hash a block, none twice and none removed.
    """
    try:
        places = [(int(one.block_number, 16), int(one.log_index, 16)) for one in logs]
    except ValueError:
        raise Impossible("a log's number is no number") from None
    if any(one >= following for one, following in pairwise(places)):
        order = sorted(range(len(logs)), key=places.__getitem__)
        logs, places = [logs[n] for n in order], [places[n] for n in order]
    before, block_hash = (-1, -1), ""
    for one, place in zip(logs, places, strict=True):
        if place[0] != before[0]:
            block_hash = one.block_hash
            _check_hash(block_hash)
            quantity(block_hash)
            quantity(one.block_timestamp or "0x0")
        if not first <= place[0] <= last or one.removed or place == before or one.block_hash != block_hash:
            raise Impossible(f"logs that can't be: block {place[0]}, log {place[1]}")
        before = place
    return logs
