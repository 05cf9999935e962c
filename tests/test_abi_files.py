"""Signatures, ABI files and contract settings as people write them, and the errors that help to mend them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from eth_utils.abi import event_abi_to_log_topic
from eth_utils.crypto import keccak

from indexer.config import ContractSettings
from indexer.errors import AbiError
from indexer.sources.abi import EventDecoder, bloom_mask, compile_contract, load_abi, may_contain, parse_signature

PLAYED = "event Played(uint256 indexed trackId, uint256 indexed userId, uint64 playedAt, string country)"
ADDRESS = "0x" + "ab" * 20

SIGNATURES = [
    (PLAYED, "Played(uint256,uint256,uint64,string)"),
    ("Played(uint,int,byte,fixed,ufixed)", "Played(uint256,int256,bytes1,fixed128x18,ufixed128x18)"),
    ("  event\tE ( )  ;", "E()"),
    ("E(uint[] a, uint [2][] b)", "E(uint256[],uint256[2][])"),
    ("E((uint a, string b)[] indexed c, tuple(bool, (address x)[3] y) d)", "E((uint256,string)[],(bool,(address)[3]))"),
    ("event $_1(address payable indexed to, function)", "$_1(address,function)"),
    ("event event(uint256 indexed)", "event(uint256)"),
    ("event E(uint256 event, uint8 tuple, bool payable)", "E(uint256,uint8,bool)"),
]


@pytest.mark.parametrize(("text", "canonical"), SIGNATURES)
def test_signatures(text: str, canonical: str) -> None:
    event = parse_signature(text)
    decoder = EventDecoder(event)
    assert decoder.signature == canonical
    assert decoder.topic0 == event_abi_to_log_topic(event) == keccak(text=canonical)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "at its end: the event's name was expected"),
        ("event", "at its end: the event's name was expected"),
        ("event Played", r"at its end: '\(' was expected"),
        ("Played(uint256", r"at its end: a name, ',' or '\)' was expected"),
        ("Played(uint256 a b)", r"at 'b\)': ',' or '\)' was expected"),
        ("Played(uint256,)", r"at '\)': a type was expected"),
        ("Played(uint256 a) x", "at 'x': nothing more was expected"),
        ("event Played(uint256 a) anonymous", "at 'anonymous': an anonymous event has no topic"),
        ("function play(uint256 a)", r"at 'function play\(uint256 a\)': only events"),
        ("Played(uint7 a)", "'uint7' is not an ABI type; write address for a contract"),
        ("Played(IERC20 token)", "'IERC20' is not an ABI type"),
        ("Played(uint256[x] a)", r"at 'x\] a\)': '\]' was expected"),
        ("Played(uint256[0] a)", r"'uint256\[0\]' is not an ABI type"),
        ("Played(() a)", "struct 'a' has no members"),
        ("Played((uint a)[0] a)", r"is not an ABI type"),
        ("Played((uint indexed a) b)", r"at 'a\) b\)': ',' or '\)' was expected"),
        ("Played(tuple a)", r"at 'a\)': '\(' with the struct's types was expected"),
        ("E(bool indexed, bool indexed, bool indexed, bool indexed)", "more than 3 arguments are indexed"),
        ('{"type": "event"}', "at '{.*}': the event's name was expected"),
    ],
)
def test_signature_errors(text: str, error: str) -> None:
    with pytest.raises(AbiError, match=error) as caught:
        parse_signature(text)
    assert repr(text) in str(caught.value)


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


EVENT = {
    "type": "event",
    "name": "E",
    "inputs": [{"name": "a", "type": "uint", "indexed": True, "internalType": "uint"}],
}


@pytest.mark.parametrize("wrap", [lambda abi: abi, lambda abi: {"contractName": "C", "abi": abi, "bytecode": "0x"}])
def test_abi_files(tmp_path: Path, wrap: Any) -> None:
    abi = [
        {"type": "constructor", "inputs": []},
        {"type": "fallback"},
        EVENT,
        {**EVENT, "name": "F", "anonymous": True},
    ]
    events = load_abi(write(tmp_path / "abi.json", wrap(abi)))
    assert [event["name"] for event in events] == ["E", "F"]
    assert cast(Any, events[0])["inputs"] == [{"name": "a", "type": "uint256", "indexed": True}]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("[\n  {]", "not JSON at line 2 column 4"),
        ("", "not JSON at line 1 column 1"),
        ({"bytecode": "0x"}, 'a JSON object without "abi"'),
        ({"abi": "[]"}, "the ABI is a text; it should be a list"),
        ("7", "the ABI is 7; it should be a list"),
        ([], "no events among its 0 entries"),
        ([{"type": "function", "name": "f"}], "no events among its 1 entries"),
        (["event E()"], 'entry 0 is not an object with a "type": "event E'),
        ([EVENT, {"type": "event"}], "entry 1: an event needs a name, not null"),
        ([{**EVENT, "name": "E(uint256)"}], "an event needs a name"),
        ([{**EVENT, "inputs": {}}], '"inputs" of event E is an object'),
        ([{**EVENT, "inputs": ["uint256"]}], 'event E: an argument is "uint256"'),
        ([{**EVENT, "inputs": [{"name": "a"}]}], "event E: an argument is"),
        ([{**EVENT, "inputs": [{"name": 1, "type": "bool"}]}], "event E: an argument's name is 1"),
        ([{**EVENT, "inputs": [{"type": "bool", "indexed": "yes"}]}], '"indexed" is "yes"'),
        ([{**EVENT, "inputs": [{"name": "a", "type": "tuple"}]}], "struct 'a' has no members"),
        ([{**EVENT, "inputs": [{"name": "a", "type": "tuplex", "components": [{"type": "bool"}]}]}], "not an ABI type"),
    ],
)
def test_abi_file_errors(tmp_path: Path, content: object, error: str) -> None:
    path = write(tmp_path / "abi.json", content)
    with pytest.raises(AbiError, match=error) as caught:
        load_abi(path)
    assert str(caught.value).startswith(str(path))


def test_abi_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(AbiError, match="No such file or directory; give the path"):
        load_abi(tmp_path / "none.json")
    with pytest.raises(AbiError, match="Is a directory"):
        load_abi(tmp_path)
    (tmp_path / "bad.json").write_bytes(b'["\xff"]')
    with pytest.raises(AbiError, match="byte 2 is not UTF-8"):
        load_abi(tmp_path / "bad.json")


def contract(abi: Any, events: Sequence[str] = (), address: Any = ADDRESS) -> tuple[EventDecoder, ...]:
    return compile_contract(ContractSettings(name="tracks", address=address, abi=abi, events=list(events)))


def test_contract(tmp_path: Path) -> None:
    abi = [PLAYED, "Played(uint256 a)", "Stopped()"]
    assert [d.signature for d in contract(abi)] == [
        "Played(uint256,uint256,uint64,string)",
        "Played(uint256)",
        "Stopped()",
    ]
    assert [d.name for d in contract(abi, ["Played"])] == ["Played", "Played"]
    assert [d.signature for d in contract(abi, ["Played(uint256)"])] == ["Played(uint256)"]
    assert len(contract(["Stopped()", "Stopped()"])) == 1
    assert contract(
        ["Stopped()"], address=["0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed", ADDRESS.upper().replace("X", "x")]
    )
    path = write(tmp_path / "abi.json", [EVENT, {**EVENT, "name": "Hidden", "anonymous": True}])
    assert [d.signature for d in contract(path)] == ["E(uint256)"]


@pytest.mark.parametrize(
    ("abi", "events", "address", "error"),
    [
        ([PLAYED, "Stopped()"], ["Plaid"], ADDRESS, "contract tracks: .* no event 'Plaid'; available: Played, Stopped"),
        ([PLAYED], [], ADDRESS[:-1], f"address '{ADDRESS[:-1]}' is not 20 bytes of hex"),
        ([PLAYED], [], [ADDRESS, "tracks.eth"], "address 'tracks.eth' is not 20 bytes of hex"),
        ([PLAYED], [], ADDRESS + "\n", "is not 20 bytes of hex"),
        ([PLAYED], [], "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1Beaed", "has a wrong checksum"),
        (["E(uint a)", "E(uint indexed a)"], [], ADDRESS, r"has E\(uint256\) twice"),
        (["E(uint a, uint a)"], [], ADDRESS, "two arguments named 'a'"),
        (["E(uint arg1, uint)"], [], ADDRESS, "two arguments named 'arg1'"),
        ([], [], ADDRESS, "no event to listen to"),
    ],
)
def test_contract_errors(abi: list[str], events: list[str], address: Any, error: str) -> None:
    with pytest.raises(AbiError, match=error):
        contract(abi, events, address)


def test_anonymous_events_are_refused() -> None:
    with pytest.raises(AbiError, match="is anonymous"):
        EventDecoder({**EVENT, "anonymous": True})


def test_bloom() -> None:
    # keccak("") begins c5d2 4601 86f7, so the bits are 0x5d2, 0x601 and 0x6f7
    assert bloom_mask(b"") == 1 << 0x5D2 | 1 << 0x601 | 1 << 0x6F7
    ours, other, topic = bloom_mask(b"\1" * 20), bloom_mask(b"\2" * 20), bloom_mask(b"\3" * 32)
    assert may_contain(ours | topic, [other, ours], [topic])
    assert may_contain(ours | topic, [], [topic])
    assert may_contain(0, [], [])
    assert not may_contain(ours, [ours], [topic])
    assert not may_contain(topic, [ours, other], [topic])
    assert not may_contain(0, [ours], [])
