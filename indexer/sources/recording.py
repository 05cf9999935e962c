"""The lines of a recorded file: how blocks are written as JSON, and read back exactly as they were.

First a header: {"chain_id", "source", "first", "last", "parent_hash" of the first block, "events": {name: [argument]}}.
Then, in order, each block with events, and the last one in any case:
{"number", "hash", "parent_hash", "timestamp", "events": [[index, name, args, address, tx_hash], ...]}. A log that could
not be decoded has a line of its own: {"number", "quarantined"}.

Hashes are 0x texts. Among the arguments {"0x": "00ff"} is bytes and {"()": [...]} a tuple: no argument has such a name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from indexer.model import Block, Event, Quarantined

_PLAIN = (str, int, bool)


class Header(msgspec.Struct, frozen=True):
    """What a file holds: the blocks `first` to `last` of a chain, and the events (with arguments) that its source has.

    `source`: the kind of chain. `parent_hash`: of the block before the first, b"" where it is not known.
    """

    chain_id: str
    source: str
    first: int
    last: int
    parent_hash: bytes
    events: Mapping[str, frozenset[str]]


def write_header(header: Header) -> bytes:
    events = {name: sorted(arguments) for name, arguments in header.events.items()}
    return _line({**msgspec.structs.asdict(header), "parent_hash": _hex(header.parent_hash), "events": events})


def read_header(raw: bytes) -> Header | None:
    """The header in a file's first line; None where it is an object of another kind. Raises what json, keys raise."""
    found = json.loads(raw)
    if "chain_id" not in found:
        return None
    first, last = int(found["first"]), int(found["last"])
    events = {str(name): frozenset(arguments) for name, arguments in found["events"].items()}
    return Header(str(found["chain_id"]), str(found["source"]), first, last, _bytes(found["parent_hash"]), events)


def write_block(block: Block) -> bytes:
    events = [
        [event.index, event.name, _tagged_args(event.args), event.address, _hex(event.tx_hash)]
        for event in block.events
    ]
    parent = None if block.parent_hash is None else _hex(block.parent_hash)
    return _line(
        {"number": block.number, "hash": _hex(block.hash), "parent_hash": parent, "timestamp": block.timestamp,
         "events": events}
    )  # fmt: skip


def write_quarantined(log: Quarantined) -> bytes:
    return _line({"number": log.number, "quarantined": _tagged(msgspec.structs.astuple(log))})


def read_line(raw: bytes) -> Block | Quarantined:
    """The block (or the log) of a line after the header. Raises what json, keys and types raise where it is none."""
    found = json.loads(raw, object_hook=_untagged)
    if "quarantined" in found:
        return Quarantined(*found["quarantined"])
    parent = found["parent_hash"]
    events = tuple(
        Event(index, name, args, address, _bytes(tx_hash)) for index, name, args, address, tx_hash in found["events"]
    )
    number, timestamp = int(found["number"]), int(found["timestamp"])
    return Block(number, _bytes(found["hash"]), None if parent is None else _bytes(parent), timestamp, events)


def _line(value: Any) -> bytes:
    # the standard library's json takes halves of surrogate pairs, as an argument may hold them
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))


def _tagged_args(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if type(value) in _PLAIN else _tagged(value) for name, value in args.items()}


def _tagged(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"0x": value.hex()}
    if isinstance(value, tuple):
        return {"()": [_tagged(one) for one in value]}
    if isinstance(value, list):
        return [_tagged(one) for one in value]
    return value


def _untagged(found: dict[str, Any]) -> Any:
    if len(found) == 1:
        ((tag, value),) = found.items()
        if tag == "0x":
            return bytes.fromhex(value)
        if tag == "()":
            return tuple(value)
    return found
