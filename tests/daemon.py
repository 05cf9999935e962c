"""The daemon as a real process: made from a TOML file, watched through its log, its port and its database.

Here are also the plays that the tests put on chains, and the rows that they must leave, reckoned one play at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from inspect import isawaitable
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import asyncpg
from privacy import personal

from indexer.demochain import PLAY_REGISTRY, Listeners, Play
from indexer.devchain import load_artifact
from indexer.fakechain import FakeBlock, FakeChain, FakeLog, encode_event, event_abi

INDEXER = Path(sys.executable).with_name("indexer")
HOOKS = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones"]
ABI: list[dict[str, Any]] = load_artifact(PLAY_REGISTRY)["abi"]
CONTRACT = "0x" + "a1" * 20
FIELDS = ("trackId", "userId", "playedAt", "signature", "city", "region", "country")
# Generous: it is only the end of a test that has failed.
PATIENCE_SECONDS = 45.0
_numbers = itertools.count(1)

Settings = dict[str, Any]


def settings(database_url: str, node_url: str, **sections: Mapping[str, Any]) -> Settings:
    """Settings for the bundled hooks on PlayRegistry, with small timeouts; `sections` are laid over them."""
    base: Settings = {
        "database": {"url": database_url, "connect_timeout_seconds": 5},
        "chain": {"endpoints": [{"url": node_url, "name": "node"}], "poll_seconds": 0.1, "start_block": 0},
        "contracts": [{"name": "PlayRegistry", "address": CONTRACT, "abi": str(PLAY_REGISTRY), "events": ["Played"]}],
        "hooks": {"enabled": HOOKS},
        "http": {"port": 0},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values} if isinstance(values, Mapping) else values
    return base


def toml(values: Mapping[str, Any]) -> str:
    """Settings as TOML, a section a line."""
    return "".join(f"{name} = {_inline(value)}\n" for name, value in values.items())


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_inline(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value)


def environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """Ours without any settings of the developer's, and with `extra`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INDEXER_")}
    given = {**kept, "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **extra}
    if "PYTHONPATH" in kept and "PYTHONPATH" in extra:
        given["PYTHONPATH"] = extra["PYTHONPATH"] + os.pathsep + kept["PYTHONPATH"]
    return given


async def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """Wait until `condition` (a function, of coroutines too) gives something true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        found = await found if isawaitable(found) else found
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {seconds:g} seconds: {what}"
        await asyncio.sleep(0.01)


class Ended(NamedTuple):
    """How a command ended. `logs` are the JSON lines of stderr, `errors` its other lines."""

    code: int
    out: str
    err: str

    @property
    def logs(self) -> list[dict[str, Any]]:
        return [line for text in self.err.splitlines() if (line := _json(text)) is not None]

    @property
    def errors(self) -> list[str]:
        return [text for text in self.err.splitlines() if text.strip() and _json(text) is None]


def _json(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


# Runs commands in processes of their own that need not import everything anew: forked, one for each line that it reads.
_FORKS = """
import gc, json, os, signal, sys
import indexer.app, indexer.config_report, indexer.demo, indexer.progress, indexer.sidecar.app, indexer.status
from indexer.cli import main
gc.freeze()  # what is shared with a child stays shared
for line in sys.stdin:
    asked = json.loads(line)
    if (child := os.fork()) == 0:
        signal.alarm(asked["seconds"])
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["env"])
        for number, name in enumerate((os.devnull, *asked["files"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.argv = ["indexer", *asked["arguments"]]
        try:
            main()
        except SystemExit as end:  # a whole interpreter's tidy end takes longer than the command
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(end.code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Runs `indexer ...` to its end, again and again, without the second that its imports take. Killed after 30 s."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def __call__(self, *arguments: str, folder: Path, env: Mapping[str, str] = {}) -> Ended:
        files = [self._folder / f"{next(_numbers)}.{name}" for name in ("out", "err")]
        asked = {
            "arguments": arguments, "folder": str(folder), "env": environment(env), "files": list(map(str, files)),
            "seconds": 30,
        }  # fmt: skip
        code = await asyncio.to_thread(self._ask, json.dumps(asked))
        return Ended(code, *(file.read_text() for file in files))

    def _ask(self, line: str) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


async def command(*arguments: str, folder: Path, env: Mapping[str, str] = {}, seconds: float = 60) -> Ended:
    """Run the console script to its end, as from a shell."""
    process = await asyncio.create_subprocess_exec(
        INDEXER, *arguments, cwd=folder, env=environment(env), stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = await asyncio.wait_for(process.communicate(), seconds)
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise AssertionError(f"indexer {' '.join(arguments)} did not end within {seconds:g} seconds") from None
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


class Daemon:
    """`indexer run` as a process, from `async with` on; killed at its end, if it still runs.

    `log` holds its log's lines, `other` what else it wrote to stderr.
    """

    command = "run"

    def __init__(
        self, folder: Path, values: Settings | str, *, env: Mapping[str, str] = {}, arguments: Sequence[str] = ()
    ) -> None:
        self._arguments = arguments
        self.config = folder / f"daemon-{next(_numbers)}.toml"
        self.config.write_text(values if isinstance(values, str) else toml(values))
        self.log: list[dict[str, Any]] = []
        self.other: list[str] = []
        self.process: asyncio.subprocess.Process
        self._folder, self._env = folder, env
        self._reader: asyncio.Task[None]

    async def __aenter__(self) -> Daemon:
        self.process = await asyncio.create_subprocess_exec(
            INDEXER, self.command, "--config", self.config, *self._arguments,
            cwd=self._folder, env=environment(self._env), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self.kill()
        if kind is not None:
            print(f"{self.config.name} ended with {self.process.returncode}:\n{self.story}")  # pytest shows it
        assert not personal(self.story)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            text = raw.decode()
            line = _json(text)
            if line is None:
                self.other.append(text.rstrip("\n"))
            else:
                self.log.append(line)

    def find(self, event: str, since: int = 0, **fields: Any) -> dict[str, Any] | None:
        """The first line of the log with this event and these fields, from line `since` on."""
        for line in self.log[since:]:
            if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                return line
        return None

    async def logged(
        self, event: str, *, since: int = 0, seconds: float = PATIENCE_SECONDS, **fields: Any
    ) -> dict[str, Any]:
        """Wait for such a line."""
        deadline = time.monotonic() + seconds
        while (line := self.find(event, since, **fields)) is None:
            ended = self._reader.done()
            assert not ended and time.monotonic() < deadline, f"no {event!r} {fields} in the log:\n{self.story}"
            await asyncio.sleep(0.01)
        return line

    @property
    def story(self) -> str:
        """The last it wrote, to be shown with a failure."""
        return "\n".join([*(json.dumps(line) for line in self.log[-30:]), *self.other[-30:]])

    async def url(self) -> str:
        """The address of its HTTP port, once it serves."""
        return str((await self.logged("started"))["status"])

    async def get(self, path: str) -> tuple[int, str]:
        """Status and body of one of its pages."""
        async with aiohttp.ClientSession() as session, session.get((await self.url()) + path) as response:
            return response.status, await response.text()

    async def get_json(self, path: str) -> tuple[int, Any]:
        status, body = await self.get(path)
        return status, json.loads(body)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    async def kill(self) -> None:
        """kill -9, which also ends one that is stopped."""
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()

    async def reached(self, connection: asyncpg.Connection, number: int, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until block `number` is committed, which this daemon is to see to."""

        async def there() -> bool:
            assert self.process.returncode is None, f"it ended:\n{self.story}"
            return await cursor(connection) >= number

        await until(there, f"block {number} committed", seconds)

    async def ended(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for its end; its exit code."""
        try:
            code = await asyncio.wait_for(self.process.wait(), seconds)
        except TimeoutError:
            raise AssertionError(f"it did not end within {seconds:g} seconds:\n{self.story}") from None
        await self._reader
        return code

    async def stop(self, number: int = signal.SIGTERM, seconds: float = 5.0) -> int:
        """Ask it to end; its exit code."""
        self.send(number)
        return await self.ended(seconds)


# -- plays and their rows ------------------------------------------------------------------------------------------


class Placed(NamedTuple):
    """A play and its place on the chain."""

    slot: int
    tx_hash: bytes
    index: int
    play: Play


def mine(chain: FakeChain, *txs: Sequence[Play], timestamp: int | None = None) -> list[Placed]:
    """Mine a block with these plays, a list of them for each transaction; where they are now."""
    block = chain.mine(*([played(play) for play in tx] for tx in txs), timestamp=timestamp)
    return placed(block, [play for tx in txs for play in tx])


def played(play: Play, contract: str = CONTRACT) -> FakeLog:
    return encode_event(event_abi(ABI, "Played"), dict(zip(FIELDS, play, strict=True)), contract)


def placed(block: FakeBlock, plays: Sequence[Play]) -> list[Placed]:
    return [
        Placed(block.number, bytes.fromhex(log["transactionHash"][2:]), int(log["logIndex"], 16), play)
        for log, play in zip(block.logs, plays, strict=True)
    ]


def history(blocks: int, *, seed: int = 1, final_lag: int = 40) -> tuple[FakeChain, list[Placed]]:
    """A chain with several transactions and plays in most of its blocks, a few of them no plays by the rules."""
    chain, people, found = FakeChain(block_seconds=1, final_lag=final_lag), Listeners(seed), []
    for n in range(1, blocks + 1):
        at = chain.head.timestamp + 1
        txs = [people.plays(1 + (n * k) % 4, at - 3600 * (n % 50)) for k in range(1, 1 + n % 4)]
        if n % 17 == 0:
            txs.append([("no track", *play[1:]) for play in people.plays(1, at)])
        found += mine(chain, *txs)
    return chain, found


THRESHOLDS = (10, 25, 50, 100, 250, 500, 1000)
Tables = dict[str, list[tuple[Any, ...]]]


def expected(plays: Sequence[Placed]) -> Tables:
    """The rows that these plays must leave, play by play."""
    rows: list[tuple[Any, ...]] = []
    by_track: Counter[int] = Counter()
    by_month: Counter[tuple[Any, ...]] = Counter()
    by_hour: Counter[datetime] = Counter()
    milestones: list[tuple[Any, ...]] = []
    for one in plays:
        track_id, user_id, played_at, signature, city, region, country = one.play
        if not track_id.isdigit():
            continue
        track, user = int(track_id), int(user_id) if user_id.isdigit() else None
        at = datetime.fromtimestamp(int(played_at), UTC).replace(tzinfo=None)
        rows.append(
            (user, "relay", track, at, one.slot, signature, city, region, country, one.tx_hash, one.index)
        )  # fmt: skip
        by_track[track] += 1
        by_month[track, at.date().replace(day=1), country] += 1
        by_hour[at.replace(minute=0, second=0)] += 1
        if by_track[track] in THRESHOLDS:
            milestones.append((track, "LISTEN_COUNT", by_track[track], one.slot, at))
    return {
        "plays": rows,
        "aggregate_plays": sorted(by_track.items()),
        "aggregate_monthly_plays": sorted((*key, count) for key, count in by_month.items()),
        "hourly_play_counts": sorted(by_hour.items()),
        "milestones": sorted(milestones),
    }


async def tables(connection: asyncpg.Connection) -> Tables:
    """What is in the database, in the form of `expected`; plays in the order in which they were written."""
    queries = {
        "plays": """
            select user_id, source, play_item_id, created_at, slot, signature, city, region, country, tx_hash,
                   event_index
            from plays order by id
        """,
        "aggregate_plays": "select play_item_id, count from aggregate_plays order by 1",
        "aggregate_monthly_plays": """
            select play_item_id, timestamp, country, count from aggregate_monthly_plays
            order by 1, 2, country collate "C"
        """,
        "hourly_play_counts": "select hourly_timestamp, play_count from hourly_play_counts order by 1",
        "milestones": "select id, name, threshold, slot, timestamp from milestones order by 1, 2, 3",
    }
    return {name: [tuple(row) for row in await connection.fetch(query)] for name, query in queries.items()}


async def cursor(connection: asyncpg.Connection) -> int:
    """The newest committed block; -1 before there is any."""
    number = await connection.fetchval("select number from indexer.cursor")
    return -1 if number is None else int(number)


async def gaps(connection: asyncpg.Connection) -> int:
    """How many (hook, range) between start and cursor are not covered."""
    return int(
        await connection.fetchval(
            """
            select count(*) from indexer.coverage join indexer.chain on chain.id = coverage.chain
            join indexer.cursor on cursor.chain = coverage.chain
            where int8multirange(int8range(chain.start_block, cursor.number, '[]')) <> coverage.blocks
            """
        )
    )


async def dawdle(connection: asyncpg.Connection, seconds: float) -> None:
    """Make every span's transaction take so long, after its plays are written: time to strike in the middle of it."""
    await connection.execute(
        f"""
        create function dawdle() returns trigger language plpgsql
        as $$ begin perform pg_sleep({seconds:f}); return null; end $$;
        create trigger dawdle after insert on plays for each statement execute function dawdle()
        """
    )


async def in_transaction(connection: asyncpg.Connection) -> None:
    """Wait until the daemon's writer is in a transaction that has changed rows."""

    async def writing() -> bool:
        return bool(
            await connection.fetchval(
                """
                select exists (
                    select from pg_stat_activity
                    where datname = current_database() and application_name = 'indexer writer'
                        and backend_xid is not null
                )
                """
            )
        )

    await until(writing, "a transaction of the writer")
