"""Decoders against eth_abi as the oracle."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any, cast

import pytest
from eth_abi.abi import decode, encode
from eth_utils.abi import event_abi_to_log_topic
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.errors import AbiError
from indexer.sources.abi import (
    EventDecoder,
    Undecodable,
    parse_signature,
)
from indexer.sources.abi_codegen import compile_decode

PLAYED = "event Played(uint256 indexed trackId, uint256 indexed userId, uint64 playedAt, string country)"
STRINGS = "Played(string trackId, string userId, string playedAt, string signature, string city, string country)"
FAST = (
    *("uint8", "uint16", "uint24", "uint32", "uint64", "uint72", "uint256", "int8", "int64", "int96", "int256"),
    *("bool", "address", "bytes1", "bytes20", "bytes32", "string", "bytes"),
)
SLOW = ("uint256[]", "string[]", "bytes32[2]", "(uint256,string)", "(address,bool)[]", "fixed128x18", "function")
ADDRESS = "0x" + "ab" * 20
few = settings(max_examples=70, deadline=None, derandomize=True)


def values_of(type_: str) -> st.SearchStrategy[Any]:
    if type_.startswith("uint") and type_[-1] != "]":
        return st.integers(0, 2 ** int(type_[4:]) - 1) | st.just(0)
    if type_.startswith("int"):
        half = 2 ** (int(type_[3:]) - 1)
        return st.integers(-half, half - 1) | st.sampled_from([-half, -1, 0, half - 1])
    if type_ == "string":
        edge = st.sampled_from(["", "\0", "a\0", "\0a", "ü", "日本", "x" * 31, "x" * 32, "x" * 33, "é" * 66])
        return edge | st.text(st.characters(exclude_categories=["Cs"]), max_size=70)
    if type_ == "bytes":
        return st.binary(max_size=70) | st.sampled_from([b"\0", bytes(32), b"a" + bytes(40)])
    if type_.startswith("bytes") and type_[-1] != "]":
        return st.binary(min_size=int(type_[5:]), max_size=int(type_[5:]))
    word = st.integers(0, 2**256 - 1)
    address = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
    return {
        "bool": st.booleans(),
        "address": address,
        "uint256[]": st.lists(word, max_size=3),
        "string[]": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=3),
        "bytes32[2]": st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=2),
        "(uint256,string)": st.tuples(word, st.sampled_from(["", "abc", "ü" * 20])),
        "(address,bool)[]": st.lists(st.tuples(address, st.booleans()), max_size=3),
        "fixed128x18": st.decimals(min_value=-100, max_value=100, places=2),
        "function": st.binary(min_size=24, max_size=24),
    }[type_]


def in_topic(type_: str) -> str:
    return "bytes32" if type_ in ("string", "bytes") or type_[-1] in ")]" else type_


def hexed(raw: bytes) -> str:
    return "0x" + raw.hex()


class Case:
    """An event with a log of it; `plain` and `indexed` are types."""

    def __init__(self, inputs: Sequence[tuple[str, bool]], values: Sequence[Any]) -> None:
        self.indexed = [in_topic(type_) for type_, is_in_topic in inputs if is_in_topic]
        self.plain = [type_ for type_, is_in_topic in inputs if not is_in_topic]
        body = ", ".join(f"{t}{' indexed' if i else ''} a{n}" for n, (t, i) in enumerate(inputs))
        self.decoder = EventDecoder(parse_signature(f"event E({body})"))
        self.order = [n for n, (_, i) in enumerate(inputs) if i] + [n for n, (_, i) in enumerate(inputs) if not i]
        topics, data = [v for v, (_, i) in zip(values, inputs, strict=True) if i], []
        data = [v for v, (_, i) in zip(values, inputs, strict=True) if not i]
        words = [encode([t], [v]) for t, v in zip(self.indexed, topics, strict=True)]
        self.topics = [hexed(self.decoder.topic0), *map(hexed, words)]
        self.data = encode(self.plain, data)

    def oracle(self, data: bytes) -> dict[str, Any] | None:
        """What eth_abi says; None for a refusal."""
        try:
            words = [decode([t], bytes.fromhex(w[2:]))[0] for t, w in zip(self.indexed, self.topics[1:], strict=True)]
            values = [*words, *decode(self.plain, data)]
        except Exception:
            return None
        by_number = dict(zip(self.order, values, strict=True))
        return {f"a{n}": by_number[n] for n in sorted(by_number)}

    def ours(self, data: bytes) -> dict[str, Any] | None:
        try:
            return self.decoder.decode(self.topics, hexed(data))
        except Undecodable:
            return None

    def check(self, data: bytes) -> None:
        ours, oracle = self.ours(data), self.oracle(data)
        assert ours == oracle
        if ours is not None and oracle is not None:
            assert [(name, type(value)) for name, value in ours.items()] == [(n, type(v)) for n, v in oracle.items()]


@st.composite
def cases(draw: st.DrawFn, types: Sequence[str] = FAST + SLOW) -> Case:
    kinds = draw(st.lists(st.sampled_from(types), max_size=6))
    flags = draw(st.lists(st.booleans(), min_size=len(kinds), max_size=len(kinds)))
    inputs = [(kind, flag and sum(flags[:n]) < 3) for n, (kind, flag) in enumerate(zip(kinds, flags, strict=True))]
    return Case(inputs, [draw(values_of(in_topic(kind) if flag else kind)) for kind, flag in inputs])


@st.composite
def corruptions(draw: st.DrawFn, data: bytes) -> bytes:
    """Data with a few things wrong, at bits, in length, in offsets and lengths, in the padding."""
    for _ in range(draw(st.integers(1, 2))):
        how = draw(st.sampled_from(["bit", "cut", "more", "word", "shift", "swap"]))
        raw, words = bytearray(data), len(data) // 32
        word = 32 * draw(st.integers(0, max(words - 1, 0)))
        if how == "bit" and raw:
            raw[draw(st.integers(0, len(raw) - 1))] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del raw[draw(st.integers(0, len(raw))) :]
        elif how == "more":
            raw += draw(st.sampled_from([bytes(32), b"\1", bytes(31) + b"\1", bytes(64)]))
        elif how == "word" and words:
            number = draw(st.sampled_from([0, 1, 31, 32, 33, 64, 96, 2**31, 2**63, 2**64, 2**255, 2**256 - 1]))
            raw[word : word + 32] = number.to_bytes(32, "big")
        elif how == "shift" and words:
            number = int.from_bytes(raw[word : word + 32], "big") + draw(st.sampled_from([-32, -1, 1, 32]))
            raw[word : word + 32] = (number % 2**256).to_bytes(32, "big")
        elif how == "swap" and words:
            other = 32 * draw(st.integers(0, words - 1))
            raw[word : word + 32], raw[other : other + 32] = raw[other : other + 32], raw[word : word + 32]
        data = bytes(raw)
    return data


@few
@given(cases())
def test_every_layout_decodes_as_eth_abi_says(case: Case) -> None:
    assert case.oracle(case.data) is not None
    case.check(case.data)


@settings(few, max_examples=150)
@given(st.data())
def test_a_damaged_log_gets_eth_abis_verdict(data: st.DataObject) -> None:
    case = data.draw(cases(FAST))
    for _ in range(3):
        case.check(data.draw(corruptions(case.data)))


@few
@given(st.data())
def test_a_damaged_log_of_any_type_decodes_or_is_undecodable(data: st.DataObject) -> None:
    case = data.draw(cases(SLOW))
    case.check(data.draw(corruptions(case.data)))


def test_every_single_bit_of_a_log() -> None:
    for text, values in (
        (PLAYED, [1, 2, 3, "DE"]),
        ("E(int64 a, bytes b, bool c, address d)", [-5, b"ab\0", True, ADDRESS]),
    ):
        inputs = [(item["type"], item["indexed"]) for item in cast(Any, parse_signature(text))["inputs"]]
        case = Case(inputs, values)
        for bit in range(8 * len(case.data)):
            raw = bytearray(case.data)
            raw[bit // 8] ^= 1 << bit % 8
            case.check(bytes(raw))


@few
@given(cases(FAST), st.integers(0, 3), st.integers(0, 65), st.sampled_from("0fzx_ ü٣"))
def test_damaged_topics(case: Case, which: int, at: int, letter: str) -> None:
    topics = list(case.topics)
    number = which % len(topics)
    topics[number] = topics[number][:at] + letter + topics[number][at + 1 :]
    try:
        ours: Any = case.decoder.decode(topics, hexed(case.data))
    except Undecodable:
        ours = None
    try:
        general: Any = case.decoder._general(topics, hexed(case.data))
    except Undecodable:
        general = None
    assert ours == general
    if letter in "zx_ ü٣" and at > 1:
        assert ours is None


@pytest.mark.parametrize(
    ("event", "values"),
    [
        (PLAYED, [1, 2**255, 1_700_000_000, "Deutschland"]),
        (STRINGS, ["1", "2", "3", "0x" + "ab" * 65, "Zürich", ""]),
        ("E(" + ", ".join(f"{t} a{n}" for n, t in enumerate(FAST)) + ")", None),
        ("E(uint64 a, string b, bool c, bytes d, string e)", [1, "x", True, b"\0\1\0", "y" * 40]),
        ("Nothing()", []),
    ],
    ids=["played", "strings", "every-type", "mixed", "nothing"],
)
def test_regular_logs_take_the_fast_path(event: str, values: list[Any] | None) -> None:
    entry = cast(Any, parse_signature(event))
    given_values = values or [b"\1" * int(t[5:] or 3) if t[:5] == "bytes" else _one(t) for t in FAST]
    if values is not None:
        given_values = values
    case = Case([(item["type"], item["indexed"]) for item in entry["inputs"]], given_values)
    decoder = EventDecoder(entry)

    def unwanted(topics: Sequence[str], data: str) -> dict[str, Any]:
        raise AssertionError("the general path was taken")

    fast = compile_decode(decoder.args, decoder._indexed, decoder._plain, decoder.topic0, unwanted)
    topics = [hexed(decoder.topic0), *case.topics[1:]]
    for _ in range(2):
        assert list(fast(topics, hexed(case.data)).values()) == given_values


def _one(type_: str) -> Any:
    return {"bool": True, "address": ADDRESS, "string": "ü"}.get(type_, 1)


def test_many_layouts_are_forgotten_in_time() -> None:
    case = Case([("string", False), ("string", False)], ["", ""])
    for length in range(0, 32 * 1100, 32):
        data = encode(["string", "string"], ["x" * length, "y"])
        assert case.ours(data) == {"a0": "x" * length, "a1": "y"}
    layouts = cast(Any, case.decoder.decode).__globals__["layouts"]
    assert 0 < len(layouts) <= 1024


def word(number: int) -> bytes:
    return number.to_bytes(32, "big")


@pytest.mark.parametrize("kind", ["string", "bytes"])
@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 40, 64, 65, 2**64, 2**255])
@pytest.mark.parametrize("gap", [-32, -31, -1, 0, 1, 8, 31, 32, 64])
@pytest.mark.parametrize("follower", [3, 300])
def test_tails_that_overlap_or_leave_gaps(kind: str, length: int, gap: int, follower: int) -> None:
    case = Case([(kind, False), (kind, False)], [b"" if kind == "bytes" else ""] * 2)
    text = b"x" * min(length, 65)
    second = 64 + 32 + len(text) + gap
    tails = word(length) + text + bytes(max(gap, 0))
    for end in (b"", bytes(1), bytes(31), bytes(-(second + 32 + follower) % 32), b"\1"):
        data = (word(64) + word(second) + tails)[:second] + word(follower) + b"y" * follower + end
        case.check(data)


@pytest.mark.parametrize("plain", ["uint256", "string", "bytes"])
def test_words_stay_in_their_topics(plain: str) -> None:
    decoder = EventDecoder(parse_signature(f"E(uint256 indexed a, uint256 indexed b, {plain} c)"))
    topic, words = hexed(decoder.topic0), [word(1), word(2)]
    data = encode([plain], [{"uint256": 3, "string": "x", "bytes": b"x"}[plain]])
    for first, second, rest in (
        (b"", b"", words[0] + words[1] + data),
        (words[0] + words[1], b"", data),
        (words[0][:31], words[0][31:] + words[1], data),
        (words[0] + words[1][:1], words[1][1:], data),
        (words[0][:16], words[0][:16], words[0] + data),
    ):
        with pytest.raises(Undecodable, match="bytes, 32 expected"):
            decoder.decode([topic, hexed(first), hexed(second)], hexed(rest))


@pytest.mark.parametrize("text", ["a\0b", "\0", "tail\0", "naïve", "日本語" * 20, "🎵", ""])
def test_strings_come_back_whole(text: str) -> None:
    case = Case([("string", False), ("uint8", False)], [text, 7])
    assert case.ours(case.data) == {"a0": text, "a1": 7}


def test_reasons_of_refusal() -> None:
    case = Case([("uint64", True), ("string", False)], [1, "abc"])
    decoder, topics, data = case.decoder, case.topics, hexed(case.data)
    bad_utf8 = data.replace("616263", "61ff63")
    big = "0x" + data[2:66] + "f" * 64
    for arguments, reason in (
        ((topics[:1], data), "1 topics, 2 expected"),
        (([], data), "0 topics, 2 expected"),
        (([*topics, topics[1]], data), "3 topics, 2 expected"),
        (([topics[1], topics[1]], data), "topic 0 is not that of E"),
        (([topics[0], topics[1][:-2]], data), "topic of 'a0' has 31 bytes"),
        (([topics[0], "0x" + "f" * 64], data), "topic of 'a0': NonEmptyPaddingBytes"),
        ((topics, data[2:]), "data is not 0x hex"),
        ((topics, data[:-1]), "data is not hex"),
        ((topics, data[:-1] + " "), "data is not hex"),
        ((topics, ""), "data is not 0x hex"),
        ((topics, "0x"), "data: InsufficientDataBytes"),
        ((topics, bad_utf8), "data: a string is not UTF-8"),
        ((topics, big), "data: a length is out of range"),
    ):
        with pytest.raises(Undecodable, match=reason) as caught:
            decoder.decode(*cast(Any, arguments))
        assert isinstance(caught.value, ValueError)
    assert decoder.decode([text.upper().replace("0X", "0x") for text in topics], data) == {"a0": 1, "a1": "abc"}


HOSTILE = [
    "'}; __import__('builtins').hacked = 1; {'",
    '"""\n    import builtins; builtins.hacked = 1\n"""',
    "{raw}",
    "\\",
    "\\'",
    "\n",
    "\0",
    "\udc80",
    "__class__",
    "topics",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_never_becomes_code(name: str) -> None:
    inputs = [{"name": name, "type": "uint256", "indexed": True}, {"name": "b", "type": "string", "indexed": False}]
    decoder = EventDecoder({"type": "event", "name": "E", "inputs": inputs})
    case = Case([("uint256", True), ("string", False)], [7, "x"])
    assert decoder.decode([hexed(decoder.topic0), case.topics[1]], hexed(case.data)) == {name: 7, "b": "x"}
    assert not hasattr(builtins, "hacked")


@pytest.mark.parametrize("type_", ["uint256){import os}", "uint256 a", "uint256;", "bool8", "uint", "hash32"])
def test_a_type_never_becomes_code(type_: str) -> None:
    event = {"type": "event", "name": "E", "inputs": [{"name": "a", "type": type_, "indexed": False}]}
    if type_ == "uint":
        assert EventDecoder(event).signature == "E(uint256)"
    else:
        with pytest.raises(AbiError, match="is not an ABI type"):
            EventDecoder(event)


def test_decoder_tells_about_its_event() -> None:
    decoder = EventDecoder(parse_signature("Transfer(address indexed, address indexed to, uint)"))
    assert (decoder.name, decoder.signature) == ("Transfer", "Transfer(address,address,uint256)")
    assert decoder.args == ("arg0", "to", "arg2")
    assert decoder.topic0.hex() == "ddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"


def test_indexed_text_is_a_hash() -> None:
    decoder = EventDecoder(parse_signature("E(string indexed a, uint8[2] indexed b, (bool x) indexed c)"))
    words = [bytes([n]) * 32 for n in (1, 2, 3)]
    log = [hexed(decoder.topic0), *map(hexed, words)]
    assert decoder.decode(log, "0x") == dict(zip("abc", words, strict=True))


@few
@given(cases())
def test_signatures_agree_with_eth_utils(case: Case) -> None:
    kinds = [f"{t} indexed" for t in case.indexed] + case.plain
    event = parse_signature(f"event Some_Name({', '.join(kinds)})")
    assert EventDecoder(event).topic0 == event_abi_to_log_topic(event)
    assert parse_signature(f"Some_Name({','.join(kinds)});") == event
