"""`indexer record`: write final blocks of a chain to a file, from which `chain.source = "recorded"` reads them."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from indexer.errors import UsageError
from indexer.model import Block, BlockSource, Span
from indexer.sources import recording
from indexer.sources.recording import Header


async def record(
    source: BlockSource, kind: str, first: int, last: int, path: Path, *, force: bool, add: Callable[[int, int], None]
) -> None:
    """Write the blocks `first` to `last` of a chain of this kind; `add(blocks, events)` hears of each span.

    The file appears under its name once it is whole. Raises UsageError for blocks that can't be recorded, and for a
    file that is there already (unless `force`) or can't be written.
    """
    if first > last:
        raise UsageError(f"the blocks {first} to {last} run backwards: the first number is the lower one")
    if path.exists() and not force:  # noqa: ASYNC240
        raise UsageError(f"{path} is there already: --force writes it anew")
    identity = await source.identity()
    final = (await source.heads()).final
    if last > final:
        raise UsageError(f"block {last} is not final: only blocks up to {final} can be recorded by now")
    parent = await _parent_hash(source, first)
    with _appearing(path) as file:
        file.write(recording.write_header(Header(identity, kind, first, last, parent, source.events)))
        async with aclosing(source.spans(first, last)) as spans:  # type: ignore[type-var]
            async for span in spans:
                file.writelines(_lines(span, end=span.last == last))
                add(span.last - span.first + 1, span.events)


async def _parent_hash(source: BlockSource, first: int) -> bytes:
    """By it a database at the block before can tell whether the file goes on with the same chain."""
    # a chain with instant finality begins with block 1, another one with block 0: before it there is nothing to ask for
    if first > (1 if source.instant else 0):
        with suppress(UsageError):  # a file that we copy from may not know it
            return (await source.ref(first - 1)).hash
    return b""


def _lines(span: Span, *, end: bool) -> Iterator[bytes]:
    """The blocks of the span with their quarantined logs, in order. `end`: its last one too, if it has no events."""
    blocks: Sequence[Block] = span.blocks
    if end and not (blocks and blocks[-1].number == span.last):
        blocks = [*blocks, Block(span.last, span.end.hash, None, span.end_timestamp)]
    lines = [(block.number, recording.write_block(block)) for block in blocks]
    lines += [(log.number, recording.write_quarantined(log)) for log in span.quarantined]
    return (line for _, line in sorted(lines, key=lambda one: one[0]))


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name at the end, if the block ends well; else nothing is left of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            packed = path.name.endswith(".gz")
            with cast("IO[bytes]", gzip.open(temporary, "wb") if packed else temporary.open("wb")) as file:
                yield file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}") from None
