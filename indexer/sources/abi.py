"""From ABIs to decoders: event signatures and ABI files are read once, and each event gets a decoder of its own.

A log is decoded some ten thousand times a second, so for the common layouts the decoder is Python source that is
generated from the event's types. It takes only what it has checked completely; a log with any irregularity goes to
eth_abi, whose strict verdict is final.
"""

from __future__ import annotations

import json
import re
from binascii import unhexlify
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from eth_abi import grammar
from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError, ParseError
from eth_utils.address import is_checksum_address
from eth_utils.crypto import keccak

from indexer.config import ContractSettings
from indexer.errors import AbiError
from indexer.sources.abi_codegen import Decode, compile_decode

if TYPE_CHECKING:
    from eth_typing import ABIEvent

_EXAMPLE = "write it like event Played(uint256 indexed trackId, string country)"
_NAME = re.compile(r"[A-Za-z_$][A-Za-z0-9_$]*")
_TOKEN = re.compile(r"\s*([A-Za-z0-9_$]+|\S)")
_ALIAS = re.compile(r"^(uint|int|ufixed|fixed|byte)(?=\[|$)")
_ALIASES = {"uint": "uint256", "int": "int256", "ufixed": "ufixed128x18", "fixed": "fixed128x18", "byte": "bytes1"}
_PLAIN = {"bool", "address", "string", "function"}
_SIZED = {"uint", "int", "bytes", "fixed", "ufixed"}
_TOPICS = 3  # indexed arguments that the EVM has room for beside topic0


class Undecodable(ValueError):
    """A log's topics and data are not what its event's ABI says. The text is the reason, in a few words."""


def parse_signature(text: str) -> ABIEvent:
    """The ABI entry of a human-readable signature: `event Played(uint256 indexed trackId, string country)`.

    The word `event`, argument names and a final `;` may be left out; structs are written `(uint256 a, string b) name`,
    with or without `tuple` before. Raises AbiError, naming the text that can't be read.
    """
    return _checked(_Signature(text).event(), f"event signature {text!r}")


def load_abi(path: Path) -> list[ABIEvent]:
    """The events of an ABI file, in its order: a JSON list, or an artifact (Hardhat, Foundry, solc) with an `abi`.

    Types are made canonical. Raises AbiError for a file that is missing, not JSON, malformed or without events.
    """
    try:
        abi = json.loads(path.read_bytes())
    except OSError as error:
        raise AbiError(f"{path}: {error.strerror or error}; give the path of the contract's ABI file") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise AbiError(f"{path}: not JSON at {where}: {error.msg}; an ABI file is a JSON list") from error
    except UnicodeDecodeError as error:
        raise AbiError(f"{path}: not JSON: byte {error.start} is not UTF-8; an ABI file is a JSON list") from error
    if isinstance(abi, dict):
        if "abi" not in abi:
            raise AbiError(f'{path}: a JSON object without "abi"; give an ABI list or one contract\'s artifact')
        abi = abi["abi"]
    if not isinstance(abi, list):
        raise AbiError(f"{path}: the ABI is {_kind(abi)}; it should be a list of entries")
    for number, entry in enumerate(abi):
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise AbiError(f'{path}: entry {number} is not an object with a "type": {_short(entry)}')
    events = [_checked(e, f"{path}: entry {number}") for number, e in enumerate(abi) if e["type"] == "event"]
    if not events:
        raise AbiError(f"{path}: no events among its {len(abi)} entries; is it the right contract's ABI?")
    return events


class EventDecoder:
    """Decodes the logs of one event.

    `signature` is canonical (`Played(uint256,string)`), `topic0` its 32-byte hash, `args` the arguments' names in order
    of declaration (`arg0`, `arg1`... by position where they have none). Raises AbiError for an event that is malformed,
    anonymous or uses a name twice.

    `decode(topics, data)` takes the 0x texts of a JSON-RPC log and gives the arguments by name: int, bool, str; an
    address as lower-case 0x text; bytes; arrays and structs as tuples. An indexed argument that is not one word
    (string, bytes, array, struct) is its 32-byte hash, as the chain has nothing else. Raises Undecodable.
    """

    __slots__ = ("_indexed", "_plain", "args", "decode", "name", "signature", "topic0")

    def __init__(self, event: Mapping[str, Any]) -> None:
        entry = _checked(event, f"event {event.get('name')!r}")
        inputs = entry.get("inputs", [])
        types = [_type_text(item) for item in inputs]
        self.name: str = entry["name"]
        self.signature: str = f"{self.name}({','.join(types)})"
        self.topic0: bytes = keccak(text=self.signature)
        self.args: tuple[str, ...] = tuple(item.get("name") or f"arg{i}" for i, item in enumerate(inputs))
        if entry.get("anonymous"):
            raise AbiError(f"event {self.signature} is anonymous: its logs carry nothing to find them by")
        twice = sorted({name for name in self.args if self.args.count(name) > 1})
        if twice:
            raise AbiError(f"event {self.signature} has two arguments named {twice[0]!r}; rename one in the ABI")
        flags = [bool(item["indexed"]) for item in inputs]
        self._indexed = tuple((name, _in_topic(t)) for name, t, i in zip(self.args, types, flags, strict=True) if i)
        self._plain = tuple((name, t) for name, t, i in zip(self.args, types, flags, strict=True) if not i)
        self.decode: Decode = compile_decode(self.args, self._indexed, self._plain, self.topic0, self._general)

    def __repr__(self) -> str:
        return f"EventDecoder({self.signature})"

    def _general(self, topics: Sequence[str], data: str) -> dict[str, Any]:
        """Decode with eth_abi, for every layout; the last word on what is decodable."""
        if len(topics) != len(self._indexed) + 1:
            raise Undecodable(f"{len(topics)} topics, {len(self._indexed) + 1} expected")
        words = [_from_hex(topic, f"topic {i}") for i, topic in enumerate(topics)]
        if words[0] != self.topic0:
            raise Undecodable(f"topic 0 is not that of {self.signature}")
        values: dict[str, Any] = {}
        for (name, type_), word in zip(self._indexed, words[1:], strict=True):
            if len(word) != 32:
                raise Undecodable(f"topic of {name!r} has {len(word)} bytes, 32 expected")
            values[name] = _strict([type_], word, f"topic of {name!r}")[0]
        plain = _strict([type_ for _, type_ in self._plain], _from_hex(data, "data"), "data")
        values.update(zip((name for name, _ in self._plain), plain, strict=True))
        return {name: values[name] for name in self.args}


def compile_contract(settings: ContractSettings) -> tuple[EventDecoder, ...]:
    """Decoders for the events that `settings` want, by name or canonical signature; all of the ABI by default.

    Events of one name with other arguments are all taken; anonymous ones can't be found and are left out. Raises
    AbiError for a bad address, ABI or signature and for an event that the ABI doesn't have.
    """
    for address in settings.address:
        _check_address(address)
    where = f"contract {settings.name or settings.address[0]}"
    abi = load_abi(settings.abi) if isinstance(settings.abi, Path) else [parse_signature(t) for t in settings.abi]
    found = [EventDecoder(event) for event in abi if not event.get("anonymous")]
    for wanted in settings.events:
        if not any(wanted in (decoder.name, decoder.signature) for decoder in found):
            available = ", ".join(sorted({decoder.name for decoder in found})) or "none"
            raise AbiError(f"{where}: the ABI has no event {wanted!r}; available: {available}")
    decoders: dict[bytes, EventDecoder] = {}
    for decoder in found:
        if settings.events and not {decoder.name, decoder.signature} & set(settings.events):
            continue
        first = decoders.setdefault(decoder.topic0, decoder)
        if (first.args, first._indexed) != (decoder.args, decoder._indexed):
            raise AbiError(f"{where}: the ABI has {decoder.signature} twice, with other names or indexed; keep one")
    if not decoders:
        raise AbiError(f"{where}: no event to listen to; give its events in abi")
    return tuple(decoders.values())


def bloom_mask(value: bytes) -> int:
    """The three bits (of 2048) that an address (20 bytes) or a topic (32 bytes) sets in a block's logsBloom."""
    digest = keccak(value)
    return sum({1 << (int.from_bytes(digest[i : i + 2], "big") & 2047) for i in (0, 2, 4)})


def may_contain(bloom: int, addresses: Sequence[int], topics: Sequence[int]) -> bool:
    """Whether a logsBloom (as a number) admits a log of one of the addresses with one of the topics (bloom masks).

    False is certain, True is likely. An empty sequence stands for any.
    """
    return (not addresses or any(bloom & mask == mask for mask in addresses)) and (
        not topics or any(bloom & mask == mask for mask in topics)
    )


def _check_address(text: str) -> None:
    """A mixed-case address must carry a right EIP-55 checksum, or it is one with a typing error."""
    if not re.fullmatch(r"0x[0-9a-fA-F]{40}", text):
        raise AbiError(f"address {text!r} is not 20 bytes of hex; write 0x and 40 hex digits")
    digits = text[2:]
    if digits not in (digits.lower(), digits.upper()) and not is_checksum_address(text):
        raise AbiError(f"address {text!r} has a wrong checksum; correct it, or write it in lower case if it is right")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text"}
    return next((name for type_, name in names.items() if isinstance(value, type_)), _short(value))


def _short(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


class _Signature:
    """A recursive-descent reader of one signature; web3 and eth_utils have none."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [(match[1], match.start(1)) for match in _TOKEN.finditer(text)]
        self.at = 0

    def event(self) -> dict[str, Any]:
        if self.peek() in ("function", "error", "constructor", "struct", "modifier"):
            raise self.wrong("only events can be listened to")
        if self.peek() == "event":
            self.at += 1
        name = self.name("the event's name")
        inputs = self.arguments(top=True)
        if self.peek() == "anonymous":
            raise self.wrong("an anonymous event has no topic to find it by")
        if self.peek() == ";":
            self.at += 1
        if self.peek():
            raise self.wrong("nothing more was expected")
        return {"type": "event", "name": name, "inputs": inputs, "anonymous": False}

    def arguments(self, top: bool) -> list[dict[str, Any]]:
        self.take("(")
        found: list[dict[str, Any]] = []
        while self.peek() != ")":
            if found:
                self.take(",", "',' or ')'")
            found.append(self.argument(top))
        self.at += 1
        return found

    def argument(self, top: bool) -> dict[str, Any]:
        argument: dict[str, Any] = {"name": ""}
        if self.peek() == "tuple":
            self.at += 1
            if self.peek() != "(":
                raise self.wrong("'(' with the struct's types was expected")
        if self.peek() == "(":
            argument["components"] = self.arguments(top=False)
            argument["type"] = "tuple"
        else:
            argument["type"] = self.name("a type")
        while self.peek() == "[":
            self.at += 1
            size = self.next() if self.peek().isdecimal() else ""
            self.take("]")
            argument["type"] += f"[{size}]"
        if self.peek() == "payable" and argument["type"] == "address":
            self.at += 1
        if top:
            argument["indexed"] = self.peek() == "indexed"
            self.at += argument["indexed"]
        if self.peek() not in (",", ")"):
            argument["name"] = self.name("a name, ',' or ')'")
        return argument

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][0]

    def take(self, token: str, meant: str = "") -> None:
        if self.peek() != token:
            raise self.wrong(f"{meant or repr(token)} was expected")
        self.at += 1

    def name(self, meant: str) -> str:
        if not _NAME.fullmatch(self.peek()):
            raise self.wrong(f"{meant} was expected")
        return self.next()

    def wrong(self, why: str) -> AbiError:
        rest = repr(self.text[self.tokens[self.at][1] :]) if self.at < len(self.tokens) else "its end"
        return AbiError(f"event signature {self.text!r}: at {rest}: {why}; {_EXAMPLE}")


def _checked(entry: Mapping[str, Any], where: str) -> ABIEvent:
    """The entry with canonical types and nothing beside what an event needs, or AbiError."""
    name, inputs = entry.get("name"), entry.get("inputs", [])
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise AbiError(f"{where}: an event needs a name, not {_short(name)}")
    if not isinstance(inputs, list | tuple):
        raise AbiError(f'{where}: "inputs" of event {name} is {_kind(inputs)}; it should be a list')
    where = f"{where}: event {name}" if name not in where else where
    items = [_checked_input(item, where) for item in inputs]
    for item, source in zip(items, inputs, strict=True):
        item["indexed"] = source.get("indexed", False)
        if not isinstance(item["indexed"], bool):
            raise AbiError(f'{where}: "indexed" is {_short(item["indexed"])}; it should be true or false')
    if sum(item["indexed"] for item in items) > _TOPICS:
        raise AbiError(f"{where}: more than {_TOPICS} arguments are indexed; a log has room for {_TOPICS}")
    event = {"type": "event", "name": name, "inputs": items, "anonymous": bool(entry.get("anonymous", False))}
    return cast("ABIEvent", event)


def _checked_input(item: Any, where: str) -> dict[str, Any]:
    """One argument or struct member with a canonical type."""
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        raise AbiError(f'{where}: an argument is {_short(item)}; it should be an object with a "type"')
    name, type_ = item.get("name") or "", item["type"]
    if not isinstance(name, str):
        raise AbiError(f"{where}: an argument's name is {_short(name)}; it should be a text")
    if not type_.startswith("tuple"):
        type_ = _ALIAS.sub(lambda match: _ALIASES[match[0]], type_)
        _check_type(type_, where)
        return {"name": name, "type": type_}
    components = item.get("components")
    if not isinstance(components, list | tuple) or not components:
        raise AbiError(f'{where}: struct {name!r} has no members; list their types in "components"')
    _check_type("bool" + type_.removeprefix("tuple"), where)  # the array dimensions, by eth_abi's own grammar
    return {"name": name, "type": type_, "components": [_checked_input(part, where) for part in components]}


def _check_type(type_: str, where: str) -> None:
    try:
        parsed = grammar.parse(type_)
        parsed.validate()
        known = (parsed.base in _PLAIN and parsed.sub is None) or parsed.base in _SIZED
    except (ParseError, ValueError, AttributeError):  # AttributeError: a bare tuple, which has no base
        known = False
    if not known:
        hint = "write address for a contract, uint8 for an enum, (type name, ...) for a struct"
        raise AbiError(f"{where}: {type_!r} is not an ABI type; {hint}")


def _type_text(item: Mapping[str, Any]) -> str:
    if "components" not in item:
        return str(item["type"])
    return f"({','.join(map(_type_text, item['components']))}){item['type'].removeprefix('tuple')}"


def _in_topic(type_: str) -> str:
    """What the topic of an indexed argument holds: the value if it is one word, else its hash."""
    return "bytes32" if type_ in ("string", "bytes") or type_[-1] in ")]" else type_


def _from_hex(text: str, what: str) -> bytes:
    if text[:2] != "0x":
        raise Undecodable(f"{what} is not 0x hex: {text[:20]!r}")
    try:
        return unhexlify(text[2:])
    except ValueError as error:
        raise Undecodable(f"{what} is not hex: {error}") from error


def _strict(types: list[str], raw: bytes, what: str) -> tuple[Any, ...]:
    try:
        return decode(types, raw)
    except UnicodeDecodeError as error:
        raise Undecodable(f"{what}: a string is not UTF-8: {error.reason} at byte {error.start}") from error
    except OverflowError as error:  # a length beyond any memory
        raise Undecodable(f"{what}: a length is out of range") from error
    except DecodingError as error:
        raise Undecodable(f"{what}: {type(error).__name__}: {str(error)[:200]}") from error
