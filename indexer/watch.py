"""`indexer status --watch`: the facts again and again. On a terminal a live view, elsewhere a line for each look.

The view is drawn anew with every look, and when the terminal's size changes; what does not fit is left out from below.
A database that is away for a while is said so, and looked for again.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from datetime import datetime
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from indexer.app import open_database
from indexer.config import Settings
from indexer.db import Connection, Database, translated
from indexer.errors import DatabaseUnavailable
from indexer.status import duration, facts, line, number

# A handful of blocks behind is following, not catching up.
_CATCHING_UP_BLOCKS = 20
_KEPT_LOOKS = 600
_LOOK_SECONDS, _LINE_SECONDS = 1.0, 5.0
_NARROWEST = 20
# lines that the view has besides what it lists
_FIXED_LINES = 10

Facts = dict[str, Any]


class View:
    """What is seen: the newest facts and what went before them. Renders itself as large as the terminal is."""

    def __init__(self, chain: str, seconds: float) -> None:
        self.chain, self.seconds = chain, seconds
        self.found: Facts | None = None
        self.looked, self.trouble = False, ""
        self.looks: deque[tuple[float, float, float]] = deque(maxlen=_KEPT_LOOKS)  # lag, blocks/s, events/s

    def saw(self, found: Facts | None) -> None:
        self.found, self.looked, self.trouble = found, True, ""
        if found is not None:
            self.looks.append((found["lag_blocks"], found["blocks_per_second"], found["events_per_second"]))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = not options.encoding.startswith("utf")
        height = options.height or console.height
        lines = list(self._lines(options.max_width, height, plain))
        yield Group(*lines[: max(height - 1, 1)], Text(self._foot(), style="dim", no_wrap=True, overflow="ellipsis"))

    def _foot(self) -> str:
        return f"{datetime.now():%H:%M:%S}  every {self.seconds:g} s  q quits"

    def _lines(self, width: int, height: int, plain: bool) -> Iterator[RenderableType]:
        if self.trouble:
            yield _cut(f"the database is away: {self.trouble}", "red")
        if self.found is None:
            if self.looked and not self.trouble:
                yield _cut(f"nothing of chain {self.chain} here yet: start it with `indexer run`", "yellow")
            return
        found = self.found
        yield _cut(_title(found), "bold")
        yield Text()
        yield from self._progress(found, width, plain)
        yield Text()
        failures = [_cut(text, "red") for text in _failures(found)]
        jobs = [_cut(text, "yellow" if " held" in text else "") for text in _jobs(found)]
        lists = (_hooks(found, width, plain), failures, jobs)
        shares = _shares([len(one) for one in lists], height - _FIXED_LINES - bool(self.trouble))
        for lines, most in zip(lists, shares, strict=True):
            yield from _some(lines, most)

    def _progress(self, found: Facts, width: int, plain: bool) -> Iterator[RenderableType]:
        """Head, cursor, lag and rates, and a bar while it catches up."""
        spark = max(width - 46, 0)
        columns = list(zip(*self.looks, strict=True))
        behind = f"{number(found['lag_blocks'])} blocks, {duration(found['lag_seconds'])}"
        events = f"{found['events_per_second']:,} events/s"
        rows = (
            ("head", f"{number(found['head'])}  final {number(found['final'])}", ()),
            ("cursor", f"{number(found['cursor'])}  from {number(found['start_block'])}", ()),
            ("lag", behind, columns[0]),
            ("rate", f"{found['blocks_per_second']:,} blocks/s", columns[1]),
            ("", events, columns[2]),
        )
        for name, text, values in rows:
            yield Text.assemble(
                (f"{name:<8}", "bold"), f"{text:<36}  " if values and spark else text,
                (sparkline(values, spark, plain=plain), "cyan"), no_wrap=True, overflow="ellipsis",
            )  # fmt: skip
        if found["lag_blocks"] <= _CATCHING_UP_BLOCKS:
            yield _cut("at the head" if not found["lag_blocks"] else "following", "green")
            return
        total = max((found["head"] or 0) - found["start_block"] + 1, 1)
        done = max(found["cursor"] - found["start_block"] + 1, 0)
        row = Table.grid(padding=(0, 1))
        row.add_column(width=max(width - 30, _NARROWEST // 2))
        bar = ProgressBar(total=total, completed=min(done, total))
        row.add_row(bar, Text(f"{100 * done / total:5.1f} %  ETA {duration(found['eta_seconds'])}", no_wrap=True))
        yield row


def _title(found: Facts) -> str:
    parts = [f"{found['chain']}  {found['source']} {found['chain_id']}"]
    if found["running"]:
        seen = f", silent for {duration(found['seen_seconds_ago'])}" if found["seen_seconds_ago"] > 10 else ""
        parts.append(f"led by {found['leader']}{seen}")
    else:
        parts.append(f"no daemon runs (last seen {duration(found['seen_seconds_ago'])} ago)")
    if found["standbys"]:
        parts.append(f"{found['standbys']} standing by")
    if found["sidecars"]:
        parts.append(_many(found["sidecars"], "sidecar"))
    return "  ".join(parts)


def _hooks(found: Facts, width: int, plain: bool) -> list[Text]:
    """A line a hook: how much of the chain it has applied, where its holes are, and the first of them."""
    first, last = found["start_block"], found["cursor"]
    name_width = min(max((len(name) for name in found["hooks"]), default=0), max(width // 4, 8))
    strip_width = max(min(width - name_width - 40, 60), 8)
    total, lines = max(last - first + 1, 1), []
    for name, one in found["hooks"].items():
        share = 100 * (total - one["gap_blocks"]) / total if last >= first else 0.0
        # of a long chain a single hole must not round to a whole
        percent = "100 %" if not one["gap_blocks"] else f"{min(share, 99.99):.2f} %"
        text = Text(f"{name[:name_width]:<{name_width}}  ", no_wrap=True, overflow="ellipsis")
        style = "yellow" if one["gap_blocks"] else "green"
        text.append(strip(one["gaps"], first, last, strip_width, plain=plain), style)
        text.append(f"  {percent:>7}")
        if one["gaps"]:
            holes = ", ".join(f"{low}-{high}" if high > low else str(low) for low, high in one["gaps"][:20])
            text.append(f"  {_many(len(one['gaps']), 'hole')}, {_many(one['gap_blocks'], 'block')}: {holes}", "yellow")
        lines.append(text)
    return lines


def _failures(found: Facts) -> list[str]:
    return [
        f"{'halted' if one['policy'] == 'halt' else 'skipped'} at block {one['first']:,}, hook {one['hook']}: "
        + " ".join(one["error"].split())
        for one in found["failures"]
    ]  # fmt: skip


def _jobs(found: Facts) -> list[str]:
    by_kind: dict[str, list[str]] = {}
    for one in found["jobs"]:
        text = f"{one['jobs']:,} {one['state']}"
        if one["state"] == "waiting" and one["oldest_seconds"] >= 1:
            text += f" (for {duration(one['oldest_seconds'])})"
        by_kind.setdefault(one["kind"], []).append(text)
    return [f"jobs {kind}: {', '.join(states)}" for kind, states in by_kind.items()]


def _shares(wanted: Sequence[int], left: int) -> list[int]:
    """How many of the lines that are left each list gets: one after the other a line, as long as there are any."""
    shares = [0] * len(wanted)
    while left > 0 and shares != list(wanted):
        for n, many in enumerate(wanted):
            if shares[n] < many and left > 0:
                shares[n] += 1
                left -= 1
    return shares


def _some(lines: Sequence[Text], most: int) -> list[Text]:
    """The first of the lines, and how many more there are, in so many lines."""
    if len(lines) <= most or most < 2:
        return list(lines[:most])
    return [*lines[: most - 1], _cut(f"and {len(lines) - most + 1:,} more", "dim")]


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def _cut(text: str, style: str) -> Text:
    """One line: what is too long for the terminal ends in an ellipsis."""
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """The newest `width` values as heights over zero; the highest of them is the whole height."""
    heights = " .:-=+*#" if plain else "▁▂▃▄▅▆▇█"
    shown = list(values)[-width:] if width > 0 else []
    top = max(shown, default=0)
    return "".join(heights[round(max(one, 0) / top * 7) if top > 0 else 0] for one in shown)


def strip(gaps: Sequence[Sequence[int]], first: int, last: int, width: int, *, plain: bool = False) -> str:
    """The blocks `first` to `last` in `width` cells: whole, partly or not at all covered. The least hole shows."""
    whole, part, none = ("#", "-", ".") if plain else ("█", "▒", "░")
    blocks = last - first + 1
    if blocks <= 0:
        return none * width
    cells = []
    for cell in range(width):
        low = first + blocks * cell // width
        high = max(first + blocks * (cell + 1) // width - 1, low)
        missing = sum(max(0, min(high, end) - max(low, begin) + 1) for begin, end in gaps)
        cells.append(whole if not missing else none if missing > high - low else part)
    return "".join(cells)


# -- looking -------------------------------------------------------------------------------------------------------


async def _looks(database: Database, chain: str, seconds: float) -> AsyncIterator[Facts | DatabaseUnavailable | None]:
    """The facts, every so many seconds; the trouble instead where the database has one."""
    connection: Connection | None = None
    try:
        while True:
            started = time.monotonic()
            try:
                if connection is None or connection.is_closed():
                    connection = await database.connect()
                with translated():
                    yield await facts(connection, chain)
            except DatabaseUnavailable as error:
                if connection is not None:
                    connection.terminate()
                    connection = None
                yield error
            await asyncio.sleep(max(seconds - (time.monotonic() - started), 0.05))
    finally:
        if connection is not None:
            connection.terminate()


async def watch(settings: Settings, *, as_json: bool, every: float | None) -> None:
    """Show the facts until q, Ctrl-C or SIGTERM; raises ConfigError and DatabaseUnavailable for the first look only."""
    live = not as_json and sys.stdout.isatty()
    seconds = every or (_LOOK_SECONDS if live or as_json else _LINE_SECONDS)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, stop.set)
    async with AsyncExitStack() as stack:
        work = asyncio.create_task(_live(settings, seconds, stop) if live else _plain(settings, seconds, as_json))
        stack.callback(work.cancel)
        stopped = asyncio.create_task(stop.wait())
        stack.callback(stopped.cancel)
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            await work
        else:
            work.cancel()
            await asyncio.wait({work}, timeout=2.0)  # the terminal is to be as it was


async def _plain(settings: Settings, seconds: float, as_json: bool) -> None:
    chain = settings.chain.name
    async with open_database(settings, pool=False) as database:
        await (await database.connect()).close()  # what can't work at all is an error, and not a line
        async for found in _looks(database, chain, seconds):
            if isinstance(found, DatabaseUnavailable):
                text = json.dumps({"chain": chain, "error": str(found)}) if as_json else f"{chain}: {found}"
            else:
                text = json.dumps(found) if as_json else f"{datetime.now():%H:%M:%S}  {line(found, chain)}"
            try:
                print(text, flush=True)
            except BrokenPipeError:  # whoever read it has seen enough
                with suppress(OSError):
                    sys.stdout.close()
                return


async def _live(settings: Settings, seconds: float, stop: asyncio.Event) -> None:
    view, loop = View(settings.chain.name, seconds), asyncio.get_running_loop()
    async with open_database(settings, pool=False) as database:
        await (await database.connect()).close()
        with _keys(stop), Live(view, console=Console(), screen=True, auto_refresh=False, transient=True) as live:
            loop.add_signal_handler(signal.SIGWINCH, live.refresh)
            try:
                async for found in _looks(database, settings.chain.name, seconds):
                    if isinstance(found, DatabaseUnavailable):
                        view.trouble = str(found)
                    else:
                        view.saw(found)
                    live.refresh()
            finally:
                loop.remove_signal_handler(signal.SIGWINCH)


@contextmanager
def _keys(stop: asyncio.Event) -> Iterator[None]:
    """Hear single keys while the block runs: q ends it. The terminal is left as it was found."""
    if not sys.stdin.isatty():
        yield
        return
    import os
    import termios
    import tty

    terminal, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(terminal)

    def heard() -> None:
        keys = os.read(terminal, 64)
        if not keys or b"q" in keys.lower() or b"\x04" in keys:
            stop.set()

    tty.setcbreak(terminal)
    loop.add_reader(terminal, heard)
    try:
        yield
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
