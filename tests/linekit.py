"""Lines to Postgres that tests cut: by TCP, whether the server itself listens there or on a socket in a folder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import parse_qs, urlsplit

WRITER = b"indexer writer"  # how the writer calls itself in its first message


class Line:
    """A line to Postgres that can be cut: what is sent then is on its way, as in a network that splits, until it heals.

    No end hears of the cut, and new connections hang. What was on its way arrives after `heal`, if its end still is
    there: the worst that TCP does, which sends again and again.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self._host, self._port = query.get("host", parts.hostname), query.get("port", str(parts.port or 5432))
        self._user, self._path = parts.netloc.rpartition("@")[0], parts.path
        self._there, self._back = asyncio.Event(), asyncio.Event()
        self._snap = b""
        self.snapped = asyncio.Event()
        self.heal()
        self.url = ""

    def cut(self, *, there: bool = True, back: bool = True) -> None:
        """Hold what goes there (to Postgres), what comes back, or both."""
        for way, held in ((self._there, there), (self._back, back)):
            if held:
                way.clear()

    def snap(self, kind: bytes) -> None:
        """Cut the line in the middle of the writer's next message of this kind: its first byte in the protocol."""
        self._snap = kind

    def heal(self) -> None:
        self._there.set()
        self._back.set()

    async def _far(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._host and self._host.startswith("/"):
            return await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._port}")
        return await asyncio.open_connection(self._host, int(self._port))

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, way: asyncio.Event) -> None:
        writes = False
        with suppress(ConnectionError):
            while data := await source.read(65_536):
                writes = writes or (way is self._there and WRITER in data)
                await way.wait()
                if writes and self._snap and data.startswith(self._snap):
                    self._snap, half = b"", len(data) // 2
                    target.write(data[:half])
                    await target.drain()
                    self.cut()
                    self.snapped.set()
                    data = data[half:]
                    await way.wait()
                target.write(data)
                await target.drain()
            await way.wait()
        target.close()

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Line]:
        tasks: set[asyncio.Task[None]] = set()
        ends: list[asyncio.StreamWriter] = []

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._there.wait()
            far_reader, far_writer = await self._far()
            ends.extend((writer, far_writer))
            tasks.add(asyncio.create_task(self._carry(reader, far_writer, self._there)))
            tasks.add(asyncio.create_task(self._carry(far_reader, writer, self._back)))

        server = await asyncio.start_server(connect, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = f"postgresql://{self._user}@127.0.0.1:{port}{self._path}"
        try:
            yield self
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:  # a session that was cut in a message would wait for its rest, and the server for it
                end.transport.abort()
