"""`indexer status --watch`: the view at any size, a line for each look elsewhere, and the terminal left as it was."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import HOOKS, INDEXER, environment, settings, toml, until
from rich.console import Console

from indexer import ledger, queue
from indexer.db import Connection
from indexer.status import line
from indexer.watch import View, sparkline, strip

FOUND: dict[str, Any] = {
    "chain": "main", "chain_id": "31337", "source": "evm", "start_block": 1000, "running": True, "leader": "host:1",
    "seen_seconds_ago": 0.4, "standbys": 1, "sidecars": 2, "head": 1_234_567, "final": 1_234_500, "cursor": 700_999,
    "lag_blocks": 533_568, "lag_seconds": 120_345.0, "blocks_per_second": 5230.1, "events_per_second": 12345.6,
    "eta_seconds": 102.0,
    "hooks": {
        "plays": {"gap_blocks": 0, "gaps": []}, "aggregates": {"gap_blocks": 1, "gaps": [[5000, 5000]]},
        "milestones": {"gap_blocks": 350_000, "gaps": [[1000, 350_999]]},
    },
    "failures": [
        {"policy": "halt", "first": 701_000, "hook": "plays", "error": "ValueError: one\ntwo"},
        *({"policy": "skip", "first": n, "hook": "aggregates", "error": "KeyError: 1"} for n in range(20)),
    ],
    "jobs": [
        {"kind": "chores", "state": "waiting", "jobs": 1200, "oldest_seconds": 720.0},
        {"kind": "chores", "state": "held", "jobs": 2, "oldest_seconds": 3.0},
    ],
}  # fmt: skip


def seen(view: View, width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return [text.rstrip() for text in capture.get().splitlines()]


def test_the_view_at_any_size() -> None:
    view = View("main", 1.0)
    assert len(seen(view, 80, 24)) == 1  # before the first look there is nothing to say
    view.saw(None)
    assert seen(view, 80, 24)[0] == "nothing of chain main here yet: start it with `indexer run`"
    for n in range(1, 101):
        view.saw({**FOUND, "lag_blocks": 1_000_000 - 5_000 * n})
    wide = "\n".join(seen(view, 120, 40))
    for words in (
        "led by host:1  1 standing by  2 sidecars", "head    1,234,567  final 1,234,500", "cursor  700,999  from 1,000",
        "500,000 blocks, 33 h 25 min", "5,230.1 blocks/s", "12,345.6 events/s", "56.7 %  ETA 1 min 42 s",
        "99.99 %  1 hole, 1 block: 5000", "50.00 %  1 hole, 350,000 blocks: 1000-350999", "█  100 %",
        "halted at block 701,000, hook plays: ValueError: one two",
        "jobs chores: 1,200 waiting (for 12 min 0 s), 2 held",
        "q quits",
    ):  # fmt: skip
        assert re.search(re.escape(words).replace(r"\ \ 100", r"\s+100"), wide), wide
    assert "▁" not in wide.splitlines()[4] and "▅█" not in wide  # half the lag is half the height, and it falls
    for width, height in ((120, 40), (80, 24), (80, 14), (60, 12), (40, 10), (20, 5), (10, 2)):
        lines = seen(view, width, height)
        assert len(lines) <= height and max(map(len, lines)) <= width, (width, height, lines)
        assert "every" in lines[-1] or width < 20
    small = "\n".join(seen(view, 80, 16))
    assert "and " in small and "halted at block" in small and "jobs chores" in small and "plays" in small
    view.trouble = "connection refused"
    assert seen(view, 80, 24)[0] == "the database is away: connection refused"
    view.saw({**FOUND, "running": False, "lag_blocks": 0, "hooks": {}, "failures": [], "jobs": []})
    idle = "\n".join(seen(view, 80, 24))
    assert "no daemon runs (last seen 0 s ago)" in idle and "at the head" in idle and "ETA" not in idle


def test_sparklines_and_strips() -> None:
    assert sparkline([0, 1, 2, 7], 10) == "▁▂▃█" and sparkline([9, 0, 7], 2, plain=True) == " #"
    assert sparkline([0, 0], 5) == "▁▁" and sparkline([1], 0) == sparkline([], 5) == ""
    assert strip([], 0, 999, 5) == "█████" and strip([[0, 999]], 0, 999, 5) == "░░░░░"
    assert strip([[0, 199], [500, 500]], 0, 999, 5, plain=True) == ".#-##"
    assert strip([[3, 3]], 1, 4, 8) == "████░░██" and strip([], 5, 4, 3) == "░░░"


@pytest.fixture
async def folder(tmp_path: Path, database_url: str, connection: Connection) -> Path:
    """A folder with settings, for a database that a daemon has used."""
    row = await ledger.open_chain(connection, "main", "evm", "31337", 0)
    await ledger.register_hooks(connection, row.id, ["plays"])
    await connection.execute("update indexer.cursor set number = 90, head = 100, final = 80")
    await ledger.cover(connection, row.id, ["plays"], 0, 49)
    await queue.enqueue(connection, "chores", {})
    (tmp_path / "indexer.toml").write_text(toml(settings(database_url, "http://127.0.0.1:1", hooks={"enabled": HOOKS})))
    return tmp_path


async def test_a_line_for_each_look(folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        INDEXER, "status", "--watch", "--every", "0.1", cwd=folder, env=environment(),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    text = (await process.stdout.readline()).decode()
    for words in ("main no daemon runs", "head 100", "cursor 90", "lag 10 blocks", "holes 41", "jobs 1"):
        assert words in text, text
    assert b"cursor 90" in await process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, err) == (0, b""), (out, err)
    assert line(None, "main") == "chain main is not in this database (yet)"


async def test_on_a_terminal(folder: Path) -> None:
    """Alternate screen, drawn anew at another size, and everything as before once q is pressed."""
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = {**environment(), "TERM": "xterm-256color"}
    env.pop("COLUMNS")
    process = subprocess.Popen(
        [INDEXER, "status", "--watch"], cwd=folder, env=env, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    shown = bytearray()
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            shown.extend(os.read(ours, 65536))
        except OSError:
            loop.remove_reader(ours)

    loop.add_reader(ours, read)
    try:
        await until(lambda: b"q quits" in shown and b"cursor" in shown, "the view")
        assert b"\x1b[?1049h" in shown and b"41 blocks: 50-90" in shown
        assert not termios.tcgetattr(theirs)[3] & termios.ECHO
        shown.clear()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 40, 0, 0))
        await until(lambda: b"q quits" in shown and "…".encode() in shown, "the view, cut to another size")
        os.write(ours, b"xq")
        assert await asyncio.to_thread(process.wait, 10) == 0
        await until(lambda: b"\x1b[?1049l" in shown, "the screen as it was")
        assert termios.tcgetattr(theirs) == before
        assert process.stderr is not None and process.stderr.read() == b""
    finally:
        loop.remove_reader(ours)
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)


async def test_machine_lines_go_on_over_an_outage(folder: Path, database_url: str, connection: Connection) -> None:
    process = await asyncio.create_subprocess_exec(
        INDEXER, "status", "--watch", "--json", "--every", "0.1", cwd=folder, env=environment(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    facts = json.loads(await process.stdout.readline())
    assert [(one["kind"], one["state"], one["jobs"]) for one in facts["jobs"]] == [("chores", "waiting", 1)]
    assert facts["standbys"] == facts["sidecars"] == 0
    blocker = await asyncpg.connect(database_url)
    try:
        # its next look waits for a lock, in which its session is ended
        await connection.execute("begin; lock table indexer.cursor in access exclusive mode")

        async def ended() -> bool:
            return bool(
                await blocker.fetchval(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = current_database() and application_name = 'indexer' and wait_event_type = 'Lock'"
                )
            )

        await until(ended, "a look that waits")
        await connection.execute("rollback")
    finally:
        await blocker.close()
    while "error" not in facts:
        facts = json.loads(await process.stdout.readline())
    assert facts["chain"] == "main" and facts["error"]
    while "error" in facts:
        facts = json.loads(await process.stdout.readline())
    assert facts["cursor"] == 90
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, err) == (0, b"")
