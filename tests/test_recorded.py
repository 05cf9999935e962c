"""Blocks in a file: what is written comes back exactly, in spans, from any place; and what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ADDRESS, block, block_hash, event

from indexer.config import SpanSettings
from indexer.errors import ConfigError, MissingBlock, UsageError, WrongNetwork
from indexer.model import Block, BlockRef, Event, Heads, Quarantined, Span
from indexer.sources.recorded import EndOfFile, RecordedSource
from indexer.sources.recording import Header, read_line, write_block, write_header, write_quarantined

PLAYED = {"Played": frozenset({"trackId", "userId"})}
LIMITS = SpanSettings(max_events=3, max_blocks=10)


def recorded(path: Path, first: int, last: int, blocks: Sequence[Block | Quarantined]) -> Path:
    """A file of these blocks, with the last one in any case."""
    lines = [write_header(Header("31337", "evm", first, last, block_hash(first - 1), PLAYED))]
    for one in blocks:
        lines.append(write_block(one) if isinstance(one, Block) else write_quarantined(one))
    if not (blocks and blocks[-1].number == last):
        lines.append(write_block(block(last)))
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(b"".join(lines))
    return path


def some_blocks(first: int, last: int) -> list[Block]:
    """Every third block has events, more of them as the numbers grow."""
    return [block(n, [event(k, {"trackId": f"{n}"}) for k in range(n % 4 + 1)]) for n in range(first, last, 3)]


async def spans(source: RecordedSource, first: int, last: int) -> list[Span]:
    return [span async for span in source.spans(first, last)]


VALUES = st.recursive(
    st.one_of(st.integers(), st.integers(-(2**256), 2**256), st.text(), st.booleans(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8).filter(lambda name: name not in ("0x", "()")), VALUES, max_size=5))
@settings(max_examples=200, deadline=None)
def test_arguments_come_back_as_they_were(args: dict[str, Any]) -> None:
    one = Block(7, b"\xaa" * 32, None, 17, (Event(3, "Played", args, ADDRESS, b"\xbb" * 32),))
    raw = write_block(one)
    assert read_line(raw) == one
    assert raw.count(b"\n") == 1
    (back,) = read_line(raw).events  # type: ignore[union-attr]
    assert repr(back.args) == repr(args)  # 1 and True, [] and () are equal or alike, but not the same


def test_lone_surrogates_and_quarantined_logs_come_back() -> None:
    one = block(5, [event(0, {"city": "K\ud800ln \0 \u2028", "names": ("0x", {"": 1}, [b""])})])
    assert read_line(write_block(one)) == one
    log = Quarantined(5, b"\1" * 32, 2, "Played", ADDRESS, b"\2" * 32, (b"\3", b""), b"\4", "no: text")
    assert read_line(write_quarantined(log)) == log


@pytest.mark.parametrize("name", ["blocks.jsonl", "blocks.jsonl.gz"])
async def test_spans_from_any_place_to_any_place(name: str, tmp_path: Path) -> None:
    blocks = some_blocks(10, 100)
    source = RecordedSource(recorded(tmp_path / name, 5, 120, blocks), LIMITS)
    assert (await source.identity(), source.first_block, source.instant) == ("31337", 5, True)
    assert await source.heads() == Heads(120, 120, block_hash(120))
    assert source.events == PLAYED
    for first, last in [(5, 120), (5, 5), (10, 10), (11, 99), (50, 120), (97, 97), (98, 119), (120, 120)]:
        found = await spans(source, first, last)
        assert [one for span in found for one in span.blocks] == [b for b in blocks if first <= b.number <= last]
        assert [found[0].first, found[-1].last] == [first, last]
        assert [span.first for span in found[1:]] == [span.last + 1 for span in found[:-1]]
        for span in found:
            assert span.final
            assert span.events < LIMITS.max_events + 4
            known = span.end.number % 3 == 1 or span.end.number == 120
            assert span.end == BlockRef(span.last, block_hash(span.last) if known else b"")
        assert all(span.end.hash for span in found[:-1])
    assert len(await spans(source, 5, 120)) > 15


async def test_blocks_without_events_are_cut_as_well(tmp_path: Path) -> None:
    blocks = [block(n) for n in range(1, 36)]
    found = await spans(RecordedSource(recorded(tmp_path / "f", 1, 35, blocks), LIMITS), 1, 35)
    assert [(span.first, span.last, span.blocks) for span in found] == [
        (1, 11, ()), (12, 22, ()), (23, 33, ()), (34, 35, ()),
    ]  # fmt: skip


async def test_quarantined_logs_stay_with_their_blocks(tmp_path: Path) -> None:
    def log(number: int) -> Quarantined:
        return Quarantined(number, block_hash(number), 9, "Played", ADDRESS, b"\2" * 32, (), b"", "no")

    full = [event(k, {"trackId": "1"}) for k in range(3)]
    lines = [block(3, full), log(3), log(5), block(8, full), log(8), log(9)]
    source = RecordedSource(recorded(tmp_path / "f", 1, 12, lines), LIMITS)
    assert [[one.number for one in span.quarantined] for span in await spans(source, 1, 12)] == [[3], [5, 8], [9]]
    assert [[one.number for one in span.quarantined] for span in await spans(source, 4, 8)] == [[5, 8]]
    path = recorded(tmp_path / "f", 1, 8, lines[:5])  # it ends with a log
    assert (await RecordedSource(path, LIMITS).heads()).hash == block_hash(8)


async def test_refs(tmp_path: Path) -> None:
    source = RecordedSource(recorded(tmp_path / "f", 5, 120, some_blocks(10, 100)), LIMITS)
    for number in (4, 10, 13, 97, 120):
        assert await source.ref(number) == BlockRef(number, block_hash(number))
    for number in (3, 5, 11, 119, 121):
        with pytest.raises(UsageError, match=f"f does not have the hash of block {number}, so"):
            await source.ref(number)


async def test_what_is_not_in_the_file_is_refused(tmp_path: Path) -> None:
    source = RecordedSource(recorded(tmp_path / "f", 5, 120, []), LIMITS)
    for first, last in ((4, 20), (100, 121)):
        with pytest.raises(UsageError, match=f"holds the blocks 5 to 120, but those from {first} to {last}"):
            await spans(source, first, last)


async def test_the_end(tmp_path: Path) -> None:
    path = recorded(tmp_path / "f", 5, 120, [])
    await RecordedSource(path, LIMITS).wait(0.001)
    with pytest.raises(EndOfFile):
        await RecordedSource(path, LIMITS, to_end=True).wait(60)


async def test_a_reader_that_stops_early_leaves_nothing_behind(tmp_path: Path) -> None:
    source = RecordedSource(recorded(tmp_path / "f", 5, 120, some_blocks(10, 100)), LIMITS)
    reader = source.spans(5, 120)
    assert (await anext(reader)).first == 5
    await reader.aclose()
    assert (await spans(source, 5, 120))[0].first == 5


# -- files that are no good ------------------------------------------------------------------------------------------


def opened(path: Path) -> RecordedSource:
    return RecordedSource(path, LIMITS)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chain.file: .*nowhere can't be read: No such file"):
        opened(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"can't be read: Is a directory"):
        opened(tmp_path)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_files_that_end_too_early(ending: str, tmp_path: Path) -> None:
    """Cut anywhere: said at once for a plain file, which is read at its end."""
    whole = recorded(tmp_path / f"whole{ending}", 5, 50, some_blocks(10, 40)).read_bytes()
    path = tmp_path / f"f{ending}"
    for size in range(0, len(whole) - 1, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=f"{path.name}.*(cut off|is empty|does not end with block 50)") as caught:
            opened(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[:-1])
    if not ending:
        assert opened(path).header.last == 50  # only the last newline is missing


async def test_a_line_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = recorded(tmp_path / "f", 5, 120, some_blocks(10, 100))
    lines = path.read_bytes().splitlines(keepends=True)
    for text, what in (
        (b"{\n", "JSONDecodeError"), (b"[]\n", "TypeError"), (b'{"number": 31}\n', "KeyError"),
        (lines[8].replace(b'"hash":"0x', b'"hash":"0xzz'), "ValueError"), (b"\n", "JSONDecodeError"),
    ):  # fmt: skip
        path.write_bytes(b"".join([*lines[:8], text, *lines[9:]]))
        for first in (5, 30):
            with pytest.raises(ConfigError, match=f"/f: line 9 is no block .{what}"):
                await spans(opened(path), first, 120)
    path.write_bytes(b"no header\n")
    with pytest.raises(ConfigError, match="/f: line 1 is no block"):
        opened(path)
    path.write_bytes(b"".join([*lines[:5], lines[9], *lines[5:]]))
    with pytest.raises(ConfigError, match="is not in order: block 22 comes after 34"):
        await spans(opened(path), 5, 120)


# -- a Core node's answers -------------------------------------------------------------------------------------------


def answer(number: int, *plays: str, chain: str = "core-test") -> bytes:
    """A GetBlock answer with one transaction, which holds plays of these tracks."""
    played = [
        {"userId": "7", "trackId": track, "timestamp": "2025-03-14T22:02:39Z", "signature": "0x1"} for track in plays
    ]
    transactions = [{"hash": f"{number:064X}", "transaction": {"plays": {"plays": played}}}] if plays else []
    found = {
        "height": str(number), "hash": f"{number + 1000:064X}", "chainId": chain,
        "timestamp": f"2025-03-14T22:{number // 60:02}:{number % 60:02}.123456789Z", "transactions": transactions,
    }  # fmt: skip
    if not transactions:
        del found["transactions"]  # as a node leaves out what is empty
    return json.dumps({"block": found, "currentHeight": "999"}).encode() + b"\n"


async def test_a_transaction_of_an_answer_that_can_not_be_decoded_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(
        answer(1, "1") + answer(2, "2", "3").replace(b'[{"userId": "7", "trackId": "2"', b'[7, {"userId": "7"')
    )
    (span,) = await spans(opened(path), 1, 2)
    assert ([b.number for b in span.blocks], [log.number for log in span.quarantined]) == ([1], [2])
    (log,) = span.quarantined
    assert log.block_hash == span.end.hash
    assert b'"trackId": "3"' in log.data


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b"".join(answer(n, *(["11", "12"] if n % 3 == 0 else [])) for n in range(3, 60)))
    return path


async def test_answers_of_a_core_node(answers: Path) -> None:
    source = opened(answers)
    assert (await source.identity(), source.first_block) == ("core-test", 3)
    assert await source.heads() == Heads(59, 59, bytes.fromhex(f"{1059:064x}"))
    assert {"trackId", "playedAt"} <= source.events["Played"]
    assert {"entityType", "metadata"} <= source.events["ManageEntity"]
    found = await spans(source, 3, 59)
    assert [one.number for span in found for one in span.blocks] == list(range(3, 60, 3))
    assert all(span.end.hash == bytes.fromhex(f"{1000 + span.last:064x}") for span in found)
    first, second = found[0].blocks[0].events
    assert (first.index, second.index, second.args["trackId"], second.args["country"]) == (0, 1, "12", "")
    assert first.tx_hash == bytes.fromhex(f"{3:064x}")
    assert await source.ref(31) == BlockRef(31, bytes.fromhex(f"{1031:064x}"))
    (last,) = await spans(source, 58, 59)
    assert (last.first, last.last, last.blocks) == (58, 59, ())
    packed = answers.with_name("answers.jsonl.gz")
    with answers.open("rb") as plain, gzip.open(packed, "wb") as file:
        shutil.copyfileobj(plain, file)
    assert await spans(opened(packed), 3, 59) == found


async def test_one_answer_is_a_file(tmp_path: Path) -> None:
    for name in ("f", "f.gz"):
        path = tmp_path / name
        with gzip.open(path, "wb") if name.endswith("gz") else path.open("wb") as file:
            file.write(answer(8, "1"))
        (span,) = await spans(opened(path), 8, 8)
        assert span.events == 1


async def test_a_hole_halts(answers: Path) -> None:
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join([*lines[:20], *lines[21:]]))
    for first in (3, 20, 23):
        with pytest.raises(MissingBlock, match=r"answers.jsonl lacks block 23: after block 22 comes 24"):
            await spans(opened(answers), first, 59)
    assert (await spans(opened(answers), 24, 59))[0].first == 24


async def test_another_chain_is_refused(answers: Path) -> None:
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join([*lines[:20], answer(23, chain="other"), *lines[21:]]))
    with pytest.raises(WrongNetwork, match="chain core-test, but block 23 is of other"):
        await spans(opened(answers), 3, 59)
    answers.write_bytes(b"".join([*lines[:-1], answer(59, chain="other")]))
    with pytest.raises(WrongNetwork, match="chain core-test, but block 59 is of other"):
        opened(answers)
