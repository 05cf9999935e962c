"""What systemd is told: a datagram socket stands for it, and real processes send."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import Daemon, history, mine, settings, until

from indexer import notify
from indexer.config import DatabaseSettings, HttpSettings, Settings
from indexer.db import Database
from indexer.demochain import Listeners
from indexer.fakechain import FakeNode
from indexer.notify import Standing
from indexer.sidecar.app import _standing
from indexer.sidecar.worker import Worker

# Systemd would kill after so long; half of it is the pace.
SILENCE_SECONDS = 0.4


class Systemd:
    """The manager's end of the socket: what it was told, and when."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind("\0" + address[1:] if address[0] == "@" else address)
        self.environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(int(SILENCE_SECONDS * 1e6))}
        self._told: list[tuple[float, list[str]]] = []

    @property
    def told(self) -> list[tuple[float, list[str]]]:
        """Its messages up to now."""
        with suppress(BlockingIOError):
            while True:
                self._told.append((time.monotonic(), self._socket.recv(4096).decode().split("\n")))
        return self._told

    @property
    def lines(self) -> list[str]:
        return [line for _, lines in self.told for line in lines]

    @property
    def statuses(self) -> list[str]:
        return [line.removeprefix("STATUS=") for line in self.lines if line.startswith("STATUS=")]

    @property
    def beats(self) -> list[float]:
        """The times at which it was fed."""
        return [at for at, lines in self.told if "WATCHDOG=1" in lines]

    async def status(self, pattern: str) -> int:
        """Wait for a status like this; how many messages there were by then."""
        await until(lambda: any(re.search(pattern, one) for one in self.statuses), f"a status like {pattern!r}")
        return len(self.told)

    async def beaten(self, times: int) -> list[float]:
        """Wait until it was fed so often from now on; when."""
        before = len(self.beats)
        await until(lambda: len(self.beats) >= before + times, f"{times} times WATCHDOG=1")
        return self.beats[before:]

    def close(self) -> None:
        self._socket.close()


@contextmanager
def systemd(address: str | Path) -> Iterator[Systemd]:
    manager = Systemd(str(address))
    try:
        yield manager
    finally:
        manager.close()


def abstract() -> str:
    return f"@indexer-test-{uuid.uuid4()}"


async def test_a_daemon_is_ready_tells_its_block_and_is_silent_while_stalled(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    chain, _ = history(20)
    async with FakeNode(chain) as node:
        values = settings(database_url, node.url, http={"stall_seconds": 0.5})
        with systemd(abstract()) as leading, systemd(tmp_path / "standby") as waiting:
            async with Daemon(tmp_path, values, env=leading.environment) as leader:
                await until(lambda: "READY=1" in leading.lines, "READY=1")
                assert (await leader.get("readyz"))[0] == 200
                await leading.status(r"^leader at block 20, lag 0 blocks, 0 s$")
                # there is nothing to do, and that is no stall
                beats = await leading.beaten(6)
                assert SILENCE_SECONDS / 2 * 0.8 < (beats[-1] - beats[0]) / 5 < SILENCE_SECONDS

                async with Daemon(tmp_path, values, env=waiting.environment) as standby:
                    await waiting.status("^standby at block")
                    await waiting.beaten(3)
                    assert await standby.stop() == 0
                assert waiting.lines.count("READY=1") == 1

                async with connection.transaction():
                    await connection.execute("lock table plays")
                    mine(chain, Listeners(1).plays(2, 1_700_000_000))
                    since = await leading.status(r"^leader at block 20, lag 1 blocks, \d+ s: stalled for 1 s")
                    await leading.status("stalled for 2 s, waiting on write$")
                    assert (await leader.get("livez"))[0] == 503
                    stalled = [line for _, lines in leading.told[since:] for line in lines]
                    assert stalled and all(line.startswith("STATUS=") for line in stalled)
                await leading.status("^leader at block 21, lag 0 blocks, 0 s$")
                await leading.beaten(2)

                leader.send(signal.SIGTERM)
                assert await leader.ended() == 0
            assert leading.lines.count("READY=1") == leading.lines.count("STOPPING=1") == 1
            assert leading.told[-1][1] == ["STOPPING=1", "STATUS=leader at block 21, lag 0 blocks, 0 s"]


async def test_a_halt_is_the_last_status(connection: asyncpg.Connection, database_url: str, tmp_path: Path) -> None:
    await connection.execute("alter table plays add check (slot < 15)")
    chain, _ = history(20)
    async with FakeNode(chain) as node:
        with systemd(tmp_path / "socket") as manager:
            async with Daemon(tmp_path, settings(database_url, node.url), env=manager.environment) as daemon:
                assert await daemon.ended() == 3
            assert manager.told[-1][1][0] == "STOPPING=1"
            assert re.match(r"halted at block 1\d, lag .*: hook plays failed at block 1\d", manager.statuses[-1])


async def test_a_sidecar_feeds_it_while_its_worker_looks_for_jobs(database_url: str, tmp_path: Path) -> None:
    class Sidecar(Daemon):
        command = "sidecar"

    values = {"database": {"url": database_url}, "sidecar": {"port": 0}}
    with systemd(tmp_path / "socket") as manager:
        async with Sidecar(tmp_path, values, env=manager.environment) as sidecar:
            await until(lambda: "READY=1" in manager.lines, "READY=1")
            await manager.beaten(3)
            assert manager.statuses[-1] == "working, 0 jobs running"
            assert await sidecar.stop() == 0
        assert manager.told[-1][1][0] == "STOPPING=1"


async def test_a_worker_that_does_not_look_is_not_live(database_url: str) -> None:
    database = Database(database_url, DatabaseSettings())
    quick = Settings(http=HttpSettings(stall_seconds=0.001))
    worker = Worker(quick, database, {}, {})  # made, and never run
    await until(lambda: worker.silent_seconds > 0.001, "a silence")
    assert _standing(quick, worker) == Standing(False, False, "the worker does not look for jobs, 0 jobs running")
    worker.driver.trouble = "connection refused"
    assert _standing(quick, worker) == Standing(False, True, "the database is away, 0 jobs running")
    assert _standing(Settings(), Worker(Settings(), database, {}, {})).status == "starting, 0 jobs running"


async def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify.notify("READY=1")
    await asyncio.wait_for(notify.keep_told(lambda: pytest.fail("asked")), 5)


async def test_what_is_lost_is_sent_again_and_an_errors_text_is_no_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = tmp_path / "socket"
    monkeypatch.setenv("NOTIFY_SOCKET", str(address))
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    asked: list[Any] = []

    def standing() -> Standing:
        asked.append(None)
        return Standing(True, False, "failed:\nWATCHDOG=1 " + "x" * 9_000)

    task = asyncio.create_task(notify.keep_told(standing))
    try:
        await until(lambda: len(asked) > 1, "nobody hears it")
        with systemd(address) as manager:
            await until(lambda: "READY=1" in manager.lines, "READY=1")
            task.cancel()
            await asyncio.wait({task})
            assert len(manager.statuses) == 2 and manager.lines.count("STOPPING=1") == 1
            assert "WATCHDOG=1" not in manager.lines and all(len(one) == 300 for one in manager.statuses)
    finally:
        task.cancel()
    assert "systemd not told" in capsys.readouterr().out
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert notify.watchdog_seconds() is None  # meant for another process
    monkeypatch.delenv("WATCHDOG_PID")
    assert notify.watchdog_seconds() == 0.1
    monkeypatch.delenv("WATCHDOG_USEC")
    assert notify.watchdog_seconds() is None
