"""Progress bars, on a terminal. `indexer run` shows one while it catches up, elsewhere its log lines are the progress;
a command on a range of blocks writes a plain line now and then."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from indexer import log
from indexer.config import LogSettings
from indexer.state import State

if TYPE_CHECKING:
    from indexer.web import Web

Started = Callable[[State, "Web"], None]

# A handful of blocks behind is following, not catching up.
_CATCHING_UP_BLOCKS = 20
_PLAIN_SECONDS = 2.0


@contextmanager
def shown(settings: LogSettings) -> Iterator[Started | None]:
    """Give `app.run` its callback `started`, which shows a bar above the log while the daemon catches up.

    Off a terminal, or where JSON was asked for, there is no bar.
    """
    if not sys.stderr.isatty() or settings.format == "json":
        yield None
        return
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console,
        transient=True,
    )
    tasks: list[asyncio.Task[None]] = []

    def started(state: State, _: Web) -> None:
        # log lines must go through the bar's console, or the two overwrite each other
        log.configure(settings, stream=_Through(console))  # type: ignore[arg-type]
        tasks.append(asyncio.get_running_loop().create_task(_keep(bar, state)))

    try:
        yield started
    finally:
        with suppress(Exception):
            bar.stop()
        log.configure(settings)


async def _keep(bar: Progress, state: State) -> None:
    task = bar.add_task("catching up", total=None, rate="")
    while True:
        behind = state.lag_blocks > _CATCHING_UP_BLOCKS
        if behind and not bar.live.is_started:
            bar.start()
        elif not behind and bar.live.is_started:
            bar.stop()
        if behind:
            blocks, events = state.rates
            eta = state.eta_seconds
            rate = f"{blocks:,.0f} blocks/s  {events:,.0f} events/s  ETA {'?' if eta is None else f'{eta:,.0f} s'}"
            total = state.heads.newest - state.start_block + 1
            bar.update(task, total=total, completed=state.cursor - state.start_block + 1, rate=rate)
        await asyncio.sleep(0.2)


class _Through:
    """A text stream that prints above the bar."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> int:
        if text.strip("\n"):
            self._console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def flush(self) -> None:
        return

    def isatty(self) -> bool:
        return True


class Bar:
    """How far a command is with its blocks: a bar on a terminal, a line every other second elsewhere; and the sums.

    `doing` and `done` are what it does with them, as "replaying" and "replayed".
    """

    def __init__(self, doing: str, done: str, total: int) -> None:
        self.done, self.total, self.blocks, self.events = done, total, 0, 0
        self._started = self._said = time.monotonic()
        console = Console(stderr=True)
        self._terminal = console.is_terminal
        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not self._terminal, transient=True)
        self._task = self._bar.add_task("", total=total, rate="")

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._bar.stop()

    def add(self, blocks: int, events: int) -> None:
        self.blocks += blocks
        self.events += events
        rate = f"{self.blocks / self.seconds:,.0f} blocks/s  {self.events / self.seconds:,.0f} events/s"
        self._bar.update(self._task, completed=min(self.blocks, self.total), rate=rate)
        if not self._terminal and time.monotonic() - self._said > _PLAIN_SECONDS:
            self._said = time.monotonic()
            eta = max(self.total - self.blocks, 0) * self.seconds / max(self.blocks, 1)
            text = f"{self.done} {self.blocks:,} of {self.total:,} blocks  {rate}  ETA {eta:,.0f} s"
            print(text, file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 0.001)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "planned": self.total, "blocks": self.blocks, "events": self.events, "seconds": round(self.seconds, 3),
        }  # fmt: skip
