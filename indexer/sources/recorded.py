"""A file of blocks as a source, for replays and tests without a node: what `indexer record` wrote, or a Core node's
answers to GetBlock, one a line.

The file is read as it is needed and may be of any size. A place in it is found by halving; in a .gz file, which can
only be read from its beginning, by passing over what is before it.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import time
import zlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar, cast

import msgspec

from indexer import metrics
from indexer.config import SpanSettings
from indexer.errors import ConfigError, MissingBlock, UsageError, WrongNetwork
from indexer.model import Block, BlockRef, Heads, NodeFacts, Quarantined, Span
from indexer.sources import core_wire, recording
from indexer.sources.recording import Header

T = TypeVar("T")

# what json, a missing key and a value of another kind raise
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, msgspec.MsgspecError)
_CHUNK_BYTES = 1 << 16


class EndOfFile(Exception):
    """All of the file is applied: not an error, but the end of `indexer run --from-file`."""


class RecordedSource:
    """A BlockSource on a file. `to_end`: once all of it is applied, `wait` raises EndOfFile instead of waiting.

    Raises ConfigError for a file that can't be read, UsageError for blocks that are not in it, MissingBlock for a hole.
    """

    instant = True
    nodes: Sequence[NodeFacts] = ()

    def __init__(self, path: Path, span: SpanSettings, *, to_end: bool = False) -> None:
        self._path, self._span, self._to_end = path, span, to_end
        self._packed = path.name.endswith(".gz")
        with self._opened() as file:
            first = file.readline()
            header = self._parsed(recording.read_header, first, 0)
            # a file without a header begins with its first block, as a Core node answered
            self._core = header is None
            self._start = 0 if header is None else file.tell()
            last = _last_line(file, packed=self._packed) or (first if self._core else b"")
        self.header = header or self._core_header(first)
        newest = self._line(last, None)[0]
        self._end = newest.ref if isinstance(newest, Block) else BlockRef(newest.number, newest.block_hash)
        if self._core:
            self.header = msgspec.structs.replace(self.header, last=self._end.number)
        elif self._end.number != self.header.last:
            raise ConfigError(f"{path} does not end with block {self.header.last}, as its header says: record it again")

    def _core_header(self, first: bytes) -> Header:
        chain_id, oldest, _ = self._parsed(core_wire.answered, first, 0)
        return Header(chain_id, "core", oldest.number, oldest.number, b"", core_wire.EVENTS)

    # -- what a source answers ---------------------------------------------------------------------------------------

    @property
    def events(self) -> Mapping[str, frozenset[str]]:
        return self.header.events

    @property
    def first_block(self) -> int:
        return self.header.first

    async def identity(self) -> str:
        return self.header.chain_id

    async def heads(self) -> Heads:
        """The file's last block: whatever was recorded is final."""
        return Heads(self._end.number, self._end.number, self._end.hash)

    async def ref(self, number: int) -> BlockRef:
        return await asyncio.to_thread(self._ref, number)

    async def spans(self, first: int, last: int) -> AsyncGenerator[Span, None]:
        """The blocks `first` to `last`, each span read while the one before is committed.

        A span ends with a block that is in the file. Only where the last one does not, as a replay may ask for, its
        hash is not known (b"").
        """
        if first < self.header.first or last > self.header.last:
            raise UsageError(
                f"{self._path} holds the blocks {self.header.first} to {self.header.last}, but those from {first} to "
                f"{last} are wanted"
            )
        reader = self._spans(first, last)
        ahead = asyncio.create_task(asyncio.to_thread(_next, reader))
        try:
            while (span := await ahead) is not None:
                ahead = asyncio.create_task(asyncio.to_thread(_next, reader))
                yield span
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def wait(self, seconds: float) -> None:
        if self._to_end:
            raise EndOfFile
        await asyncio.sleep(seconds)

    def took(self, seconds: float) -> None:
        """Spans are as large as the settings say."""

    async def close(self) -> None:
        """No file is open between two reads."""

    # -- reading ---------------------------------------------------------------------------------------------------

    def _spans(self, first: int, last: int) -> Iterator[Span]:
        blocks, logs, events, newest = list[Block](), list[Quarantined](), 0, Block(first - 1, b"", None, 0)
        for one in self._lines(first, last):
            if isinstance(one, Quarantined):
                logs.append(one)
                continue
            if newest.hash and (events >= self._span.max_events or newest.number - first >= self._span.max_blocks):
                now = tuple(log for log in logs if log.number <= newest.number)
                yield Span(first, newest.number, tuple(blocks), newest.ref, newest.timestamp, True, now)
                first, blocks, events, logs = newest.number + 1, [], 0, logs[len(now) :]
            newest = one
            if one.events:
                blocks.append(one)
                events += len(one.events)
        end = newest.ref if newest.number == last else BlockRef(last, b"")
        yield Span(first, last, tuple(blocks), end, newest.timestamp, True, tuple(logs))

    def _ref(self, number: int) -> BlockRef:
        header = self.header
        if number == header.first - 1 and header.parent_hash:
            return BlockRef(number, header.parent_hash)
        if header.first <= number <= header.last:
            for one in self._lines(number, number):
                if isinstance(one, Block):
                    return one.ref
        raise UsageError(
            f"{self._path} does not have the hash of block {number}, so nothing says whether it goes on from there: "
            f"take a file that begins with block {number} or the one after it"
        )

    def _lines(self, first: int, last: int) -> Iterator[Block | Quarantined]:
        """The blocks `first` to `last` as far as they have lines, in order; raises MissingBlock where one should."""
        at = first - 1
        with self._opened() as file:
            place = self._start if self._packed else self._place(file, first)
            file.seek(place)
            for raw in file:
                found, place = self._line(raw, place), place + len(raw)
                one = found[0]
                if one.number < first:
                    continue
                if self._core and one.number > at + 1:
                    why = f"{self._path} lacks block {at + 1}: after block {at} comes {one.number}"
                    raise MissingBlock(at + 1, why)
                if one.number > last:
                    return
                if one.number < at + isinstance(one, Block):
                    raise ConfigError(f"{self._path} is not in order: block {one.number} comes after {at}")
                at = one.number
                yield from found

    def _place(self, file: IO[bytes], number: int) -> int:
        """Where the first line with this block or a later one begins."""
        low, high = self._start, file.seek(0, os.SEEK_END)
        while low < high:
            middle = (low + high) // 2
            place = self._next_line(file, middle)
            raw = file.readline()
            if not raw or self._line(raw, place)[0].number >= number:
                high = middle
            else:
                low = middle + 1
        return self._next_line(file, low)

    def _next_line(self, file: IO[bytes], place: int) -> int:
        """Go to the line that begins at `place` or next after it."""
        file.seek(max(place - 1, self._start))
        if place > self._start:
            file.readline()
        return file.tell()

    def _line(self, raw: bytes, place: int | None) -> Sequence[Block | Quarantined]:
        """What is in a line: a block, a quarantined log, or in a node's answer a block with several of these."""
        if not self._core:
            return (self._parsed(recording.read_line, raw, place),)
        chain_id, block, logs = self._parsed(core_wire.answered, raw, place)
        if chain_id != self.header.chain_id:
            raise WrongNetwork(
                f"{self._path} begins with chain {self.header.chain_id}, but block {block.number} is of {chain_id}"
            )
        return block, *logs

    def _parsed(self, parse: Callable[[bytes], T], raw: bytes, place: int | None) -> T:
        """The line parsed; `place` is where it begins, None for the last one."""
        try:
            return parse(raw)
        except _MALFORMED as error:
            where = "the last line" if place is None else f"line {self._line_number(place)}"
            why = f"is no block ({type(error).__name__}: {error})" if raw.endswith(b"\n") else "is cut off"
            raise ConfigError(f"{self._path}: {where} {why if raw else 'is empty'}") from None

    def _line_number(self, place: int) -> int:
        with self._opened() as file:
            found, left = 1, place
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                found, left = found + chunk.count(b"\n"), left - len(chunk)
        return found

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            with cast("IO[bytes]", gzip.open(self._path) if self._packed else self._path.open("rb")) as file:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ConfigError(f"{self._path} is cut off or damaged: {error}") from None
        except OSError as error:
            raise ConfigError(f"chain.file: {self._path} can't be read: {error.strerror}") from None


def _next(reader: Iterator[Span]) -> Span | None:
    started = time.perf_counter()
    span = next(reader, None)
    metrics.span_seconds.labels("fetch").observe(time.perf_counter() - started)
    return span


def _last_line(file: IO[bytes], *, packed: bool) -> bytes:
    """The last line with its end, if it has one; b"" where there is none after the present place."""
    if packed:
        last = b""
        for raw in file:
            last = raw
        return last
    start, end = file.tell(), file.seek(0, os.SEEK_END)
    tail, place = b"", end
    while place > start and b"\n" not in tail[:-1]:
        size = min(_CHUNK_BYTES, place - start)
        place -= size
        file.seek(place)
        tail = file.read(size) + tail
    return tail[tail.rfind(b"\n", 0, -1) + 1 :]
