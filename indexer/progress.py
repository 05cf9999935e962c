"""The progress bar of `indexer run`: on a terminal, while it catches up. Elsewhere the log lines are the progress."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from indexer import log
from indexer.config import LogSettings
from indexer.state import State

if TYPE_CHECKING:
    from indexer.web import Web

Started = Callable[[State, "Web"], None]

# A handful of blocks behind is following, not catching up.
_CATCHING_UP_BLOCKS = 20


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
