"""From an event's ABI and arguments to a log, and from logs to a bloom, as the EVM does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import msgspec
from eth_abi.abi import encode
from eth_typing import ABIEvent
from eth_utils.abi import collapse_if_tuple, event_abi_to_log_topic
from eth_utils.crypto import keccak

EMPTY_BLOOM = "0x" + "00" * 256


class FakeLog(msgspec.Struct, frozen=True, gc=False):
    """What one LOG instruction emits. All three are lower-case 0x hex: address (20 bytes), topics (32 each), data.

    Nothing is checked, so that a test can also emit what no compiler would.
    """

    address: str
    topics: tuple[str, ...]
    data: str


def event_abi(abi: Iterable[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The entry of the event `name` in a contract's ABI; LookupError where there is none."""
    for entry in abi:
        if entry.get("type") == "event" and entry.get("name") == name:
            return dict(entry)
    raise LookupError(f"no event {name} in this ABI")


def encode_event(abi_event: Mapping[str, Any], args: Mapping[str, Any], address: str) -> FakeLog:
    """The log that a contract at `address` emits for the event with these arguments (by name, plain Python values).

    An indexed string, bytes, array or struct becomes its keccak, as Solidity does it. Raises KeyError for an argument
    that is missing and eth_abi's EncodingError for one that does not fit its type.
    """
    topics = [] if abi_event.get("anonymous") else [_topic0(msgspec.json.encode(abi_event))]
    kinds, values = [], []
    for argument in abi_event["inputs"]:
        kind, value = collapse_if_tuple(argument), args[argument["name"]]
        if argument.get("indexed"):
            topics.append("0x" + _topic(kind, argument, value).hex())
        else:
            kinds.append(kind)
            values.append(value)
    return FakeLog(address.lower(), tuple(topics), "0x" + encode(kinds, values).hex())


@lru_cache(maxsize=256)
def _topic0(abi_event: bytes) -> str:
    return "0x" + event_abi_to_log_topic(cast(ABIEvent, msgspec.json.decode(abi_event))).hex()


def _topic(kind: str, argument: Mapping[str, Any], value: Any) -> bytes:
    if kind == "string":
        return keccak(text=value)
    if kind == "bytes":
        return keccak(value)
    if kind.endswith("]") or kind.startswith("("):
        return keccak(_in_place(argument, value))
    return encode([kind], [value])


def _in_place(argument: Mapping[str, Any], value: Any) -> bytes:
    """Elements padded to 32 bytes, one after another, without lengths and offsets: so is an indexed array hashed."""
    kind: str = argument["type"]
    if kind.endswith("]"):
        element = {**argument, "type": kind[: kind.rindex("[")]}
        return b"".join(_in_place(element, item) for item in value)
    if kind == "tuple":
        return b"".join(_in_place(part, item) for part, item in zip(argument["components"], value, strict=True))
    if kind in ("string", "bytes"):
        raw: bytes = value.encode() if isinstance(value, str) else value
        return raw + bytes(-len(raw) % 32)
    return encode([kind], [value])


def logs_bloom(logs: Iterable[Mapping[str, Any]]) -> str:
    """The 2048-bit filter of a block's or a transaction's logs (JSON-ready dicts), as 0x hex."""
    bits = 0
    for log in logs:
        bits |= _bloom_bits(log["address"])
        for topic in log["topics"]:
            bits |= _bloom_bits(topic)
    return f"0x{bits:0512x}" if bits else EMPTY_BLOOM


@lru_cache(maxsize=1 << 17)
def _bloom_bits(item: str) -> int:
    digest = keccak(bytes.fromhex(item[2:]))
    return sum({1 << (int.from_bytes(digest[i : i + 2], "big") & 2047) for i in (0, 2, 4)})


def as_texts(logs: Sequence[FakeLog]) -> str:
    """The content of a transaction as one text, to be hashed."""
    return "\n".join(f"{log.address} {' '.join(log.topics)} {log.data}" for log in logs)
