"""The worker's own connections, as PgQueuer wants them: one to work with, one to listen on, and both come back.

What the database does not take is tried again until it does, so that nothing above here ever hears of an outage: a
job's end is stored once the database is there again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Self, TypeVar

from pgqueuer.core.tm import TaskManager
from pgqueuer.ports.driver import NotifyCallback

from indexer import log
from indexer.db import Connection, Database, translated
from indexer.errors import DatabaseUnavailable

T = TypeVar("T")

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 2.0
# A listener hears nothing of a peer that has vanished: it asks.
_PING_SECONDS = 5.0


class Lasting:
    """A driver of PgQueuer's whose statements outlast the database's absence.

    `lost` counts the connections that broke: what was asked last may have been done all the same.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None
        self._lock = asyncio.Lock()
        self._heard: list[tuple[str, NotifyCallback]] = []
        self._listener: asyncio.Task[None] | None = None
        self._shutdown = asyncio.Event()
        self._tasks = TaskManager()
        self._thinned = log.Thinned()
        self.lost = 0
        self.trouble: str | None = None
        self.ends_at: float | None = None  # time.monotonic() after which nothing is tried again

    async def run(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` on the connection, all of it again where the database did not take it."""
        async with self._lock:
            pause = _FIRST_PAUSE_SECONDS
            while True:
                try:
                    with translated():
                        if self._connection is None or self._connection.is_closed():
                            self._connection = await self._database.connect(application_name="indexer sidecar")
                        done = await work(self._connection)
                except DatabaseUnavailable as error:
                    self._broken(error)
                    if self.ends_at is not None and time.monotonic() + pause > self.ends_at:
                        raise
                else:
                    self._well()
                    return done
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    def _broken(self, error: Exception) -> None:
        self.lost += 1
        self.trouble = str(error)
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None
        self._thinned.warning("database unavailable", error=str(error))

    def _well(self) -> None:
        if self.trouble is not None:
            self.trouble = None
            self._thinned.over("database unavailable")

    async def close(self) -> None:
        """Give up both connections."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait({self._listener})
        if self._connection is not None:
            with suppress(Exception):
                await self._connection.close(timeout=1)

    async def _listen(self) -> None:
        """Listen for ever, on one connection after the other."""
        while True:
            connection: Connection | None = None
            try:
                with translated():
                    connection = await self._database.connect(application_name="indexer sidecar listener")
                    for channel, callback in self._heard:
                        await connection.add_listener(channel, _passing(callback))
                    while True:
                        await asyncio.sleep(_PING_SECONDS)
                        await connection.execute("select 1", timeout=_PING_SECONDS)
            except DatabaseUnavailable:
                await asyncio.sleep(_LONGEST_PAUSE_SECONDS / 2)
            finally:
                if connection is not None:
                    connection.terminate()

    # -- what PgQueuer asks of a driver ----------------------------------------------------------------------------

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        rows = await self.run(lambda connection: connection.fetch(query, *args))
        return [dict(row) for row in rows]

    async def execute(self, query: str, *args: object) -> str:
        return await self.run(lambda connection: connection.execute(query, *args))

    async def notify(self, channel: str, payload: str) -> None:
        await self.execute("select pg_notify($1, $2)", channel, payload)

    async def add_listener(self, channel: str, callback: NotifyCallback) -> None:
        self._heard.append((channel, callback))
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen(), name="listener")

    @property
    def shutdown(self) -> asyncio.Event:
        return self._shutdown

    @property
    def tm(self) -> TaskManager:
        return self._tasks

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # the ends of the last jobs are stored after PgQueuer is through with it: `close` ends it


def _passing(callback: NotifyCallback) -> Callable[..., None]:
    def heard(_connection: Any, _process: int, _channel: str, payload: Any) -> None:
        callback(payload)

    return heard
