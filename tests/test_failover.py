"""A drill: a leader that is killed, paused or cut off, and how soon its standby commits. No block is lost or doubled.

Every case has a leader and a standby of its own, with a line to Postgres each; all follow one chain, which grows all
the time. The cases run at once, as they mostly wait, and the faults fall once all processes are up.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, groupby, pairwise
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from daemon import (
    PATIENCE_SECONDS,
    Commands,
    Daemon,
    Placed,
    cursor,
    dawdle,
    expected,
    gaps,
    history,
    in_transaction,
    mine,
    settings,
    tables,
    until,
)
from linekit import Line

from indexer.demochain import Listeners
from indexer.fakechain import FakeChain, FakeNode
from indexer.pytest_plugin import OPTION, SESSION, Databases

pytestmark = pytest.mark.timeout(180)

WITHIN_SECONDS = 10.0  # what we promise: from the fault to the standby's first block
BLOCK_SECONDS = 0.3
# Every change of the cursor that is committed: from which block, to which, and whose it is.
WATCH = """
    create schema drill;
    create table drill.move (id bigint generated always as identity, old bigint, new bigint, leader text);
    create function drill.note() returns trigger language plpgsql as $$
    begin
        insert into drill.move (old, new, leader) values (old.number, new.number, new.leader);
        return null;
    end $$;
    create trigger note after update on indexer.cursor for each row execute function drill.note();
"""


@dataclass
class Scene:
    """What all cases share: `urls` are databases, one for each, `plays` the chain's, `seconds` what they measure."""

    folder: Path
    urls: list[str]
    commands: Commands
    chain: FakeChain
    plays: list[Placed]
    node: FakeNode
    ready: asyncio.Barrier
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    seconds: dict[str, float] = field(default_factory=dict)

    async def grow(self) -> None:
        """Mine blocks with plays, for ever."""
        while True:
            people = Listeners(self.chain.head.number)
            self.plays += mine(self.chain, people.plays(3, 1_700_000_000), people.plays(2, 1_700_000_000))
            await asyncio.sleep(BLOCK_SECONDS)


@dataclass
class Pair:
    """A leader and its hot standby on one database, each with its own line, and our own connection beside them."""

    scene: Scene
    connection: asyncpg.Connection
    leader: Daemon
    standby: Daemon
    line: Line

    async def commits(self, daemon: Daemon) -> bool:
        """Whether the newest block that is committed is this process's."""
        query = "select leader from drill.move where new > old order by id desc limit 1"
        return bool(await self.connection.fetchval(query) == name(daemon))

    async def taken_over(self, what: str, since: float, *, by: Daemon | None = None) -> None:
        """Wait for the first block of the standby (or of `by`) and note the time; its probes are green meanwhile."""
        successor = by or self.standby
        for turn in count():
            if await self.commits(successor):
                break
            assert time.monotonic() - since < 3 * WITHIN_SECONDS, f"{what}: nobody takes over:\n{successor.story}"
            if turn % 20 == 0:
                for probe in ("livez", "readyz"):
                    assert (await successor.get(probe))[0] == 200, f"{what}: {probe} of the standby"
            await asyncio.sleep(0.02)
        self.scene.seconds[what] = time.monotonic() - since
        assert (await successor.get_json("readyz"))[1]["role"] == "leader", what
        # `indexer status` names who leads now
        async with self.scene.asking:
            told = await self.scene.commands(
                "status", "--json", "--config", str(successor.config), folder=self.scene.folder
            )
        facts = msgspec.json.decode(told.out)
        assert (facts["running"], facts["leader"]) == (True, name(successor)), what

    async def assert_right(self, *leaders: Daemon) -> None:
        """Every row is there once, no hole, the cursor never jumped or fell, and these led: one after the other."""
        async with self.connection.transaction(isolation="repeatable_read", readonly=True):
            at = await cursor(self.connection)
            found = await tables(self.connection)
            assert await gaps(self.connection) == 0
            moves = await self.connection.fetch("select old, new, leader from drill.move order by id")
        for table, rows in expected([one for one in self.scene.plays if one.slot <= at]).items():
            assert rows and found[table] == rows, table
        assert moves[0]["old"] == -1 and moves[-1]["new"] == at
        assert all(one["old"] == before["new"] for before, one in pairwise(moves))
        assert all(one["new"] >= one["old"] for one in moves)
        assert [leader for leader, _ in groupby(one["leader"] for one in moves)] == [name(one) for one in leaders]

    async def go_on(self, daemon: Daemon, blocks: int = 3) -> None:
        await daemon.reached(self.connection, self.scene.chain.head.number + blocks)


def name(daemon: Daemon) -> str:
    return f"{socket.gethostname()}:{daemon.process.pid}"


async def stands_by(daemon: Daemon) -> bool:
    """Whether one that led has found that it does not any more; or it has ended and wants to be started again."""
    if daemon.process.returncode is not None:
        return daemon.process.returncode == 75
    return bool((await daemon.get_json("readyz"))[1]["role"] == "standby")


@asynccontextmanager
async def pair(
    scene: Scene, *, dawdles: float = 0.0, node: FakeNode | None = None, **sections: Any
) -> AsyncIterator[Pair]:
    """Both processes, up and in their roles. `node`: the leader's own; `dawdles`: how long a transaction takes."""
    async with AsyncExitStack() as stack:
        url = scene.urls.pop()
        connection = await asyncpg.connect(url, timeout=30, server_settings=SESSION)
        stack.push_async_callback(connection.close, timeout=5)
        await connection.execute(WATCH)
        if dawdles:
            await dawdle(connection, dawdles)
        daemons, lines = [], []
        for its_node, event in ((node or scene.node, "leader acquired"), (scene.node, "standing by")):
            line = await stack.enter_async_context(Line(url).laid())
            daemon = Daemon(scene.folder, settings(line.url, its_node.url, **sections))
            await stack.enter_async_context(daemon)
            await daemon.logged(event)
            daemons.append(daemon)
            lines.append(line)
        both = Pair(scene, connection, *daemons, lines[0])
        await both.go_on(both.leader)
        roles = [(await daemon.get_json("readyz"))[1]["role"] for daemon in daemons]
        assert roles == ["leader", "standby"]
        await scene.ready.wait()
        yield both


# -- the cases ---------------------------------------------------------------------------------------------------------


async def killed(scene: Scene) -> None:
    async with pair(scene, dawdles=0.1) as both:
        await in_transaction(both.connection)
        both.leader.send(signal.SIGKILL)
        await both.taken_over("killed in a transaction", time.monotonic())
        await both.go_on(both.standby)
        await both.assert_right(both.leader, both.standby)


async def paused(scene: Scene) -> None:
    """And, as it stands by afterwards, it takes over when the other one stops in good order."""
    async with pair(scene) as both:
        both.leader.send(signal.SIGSTOP)
        await both.taken_over("paused", time.monotonic())
        await wake(both)
        since = time.monotonic()
        both.standby.send(signal.SIGTERM)
        await both.taken_over("stopped in good order", since, by=both.leader)
        assert await both.standby.ended(5) == 0
        await both.go_on(both.leader)
        await both.assert_right(both.leader, both.standby, both.leader)


async def paused_in_a_transaction(scene: Scene) -> None:
    async with pair(scene, dawdles=0.1) as both:
        await in_transaction(both.connection)
        both.leader.send(signal.SIGSTOP)
        await both.taken_over("paused in a transaction", time.monotonic())
        await wake(both)
        await both.assert_right(both.leader, both.standby)


async def wake(both: Pair) -> None:
    """The paused leader goes on where it was, and finds itself replaced."""
    since = len(both.leader.log)
    both.leader.send(signal.SIGCONT)
    await until(lambda: stands_by(both.leader), "the woken leader stands by")
    assert told(both.leader, since)
    await both.go_on(both.standby)


def told(daemon: Daemon, since: int) -> bool:
    events = {line["event"] for line in daemon.log[since:] if line["level"] == "warning"}
    return not events.isdisjoint({"database unavailable", "leadership lost"})


def cut_off(what: str, cut: Callable[[Line], Awaitable[None] | None]) -> Callable[[Scene], Awaitable[None]]:
    """A leader whose line to Postgres is cut so, and healed once it is replaced: then what was on its way arrives."""

    async def case(scene: Scene) -> None:
        async with pair(scene) as both:
            waiting = cut(both.line)
            if waiting is not None:
                await waiting
            await both.taken_over(what, time.monotonic())
            since = max(0, len(both.leader.log) - 5)
            both.line.heal()
            await until(lambda: stands_by(both.leader), "the one that was cut off stands by")
            assert told(both.leader, since)
            await both.go_on(both.standby)
            await both.assert_right(both.leader, both.standby)

    return case


def in_the_middle(kind: bytes) -> Callable[[Line], Awaitable[None]]:
    async def cut(line: Line) -> None:
        line.snap(kind)
        await asyncio.wait_for(line.snapped.wait(), PATIENCE_SECONDS)

    return cut


async def cut_off_from_its_node(scene: Scene) -> None:
    """It keeps the lead, for its standby can't know better; it says so, and hands over when it is ended."""
    async with FakeNode(scene.chain) as lonely, pair(scene, node=lonely, http={"port": 0, "stall_seconds": 3}) as both:
        await lonely.stop()
        since = time.monotonic()

        async def unready() -> Any:
            status, facts = await both.leader.get_json("readyz")
            return status == 503 and facts

        facts = await until(unready, "the leader says that it is not ready")
        scene.seconds["cut off from its node: not ready"] = time.monotonic() - since
        # where it had heard of one more block than it could fetch, it counts as stalled, and /livez fails as well
        assert facts["role"] == "leader" and facts["reason"] in ("no node answers", "stalled")
        assert 'indexer_endpoint_healthy{endpoint="node"} 0.0' in (await both.leader.get("metrics"))[1]
        status, facts = await both.standby.get_json("readyz")
        assert (status, facts["role"]) == (200, "standby")
        since = time.monotonic()
        both.leader.send(signal.SIGTERM)
        await both.taken_over("cut off from its node: stopped", since)
        assert await both.leader.ended(5) == 0
        await both.go_on(both.standby)
        await both.assert_right(both.leader, both.standby)


CASES = (
    killed,
    paused,
    paused_in_a_transaction,
    cut_off("cut off from Postgres", Line.cut),
    cut_off("cut off from Postgres' answers", lambda line: line.cut(there=False)),
    cut_off("cut off in a statement", in_the_middle(b"B")),
    cut_off("cut off in a COPY", in_the_middle(b"d")),
    cut_off_from_its_node,
)


@pytest.fixture
def urls(indexer_databases: Databases, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """A database for each case."""
    hooks = request.config.getini(OPTION)
    with ExitStack() as stack:
        yield [stack.enter_context(indexer_databases.migrated(hooks)) for _ in CASES]


async def test_a_standby_leads_within_ten_seconds(urls: list[str], commands: Commands, tmp_path: Path) -> None:
    chain, plays = history(20)
    async with FakeNode(chain) as node:
        scene = Scene(tmp_path, urls, commands, chain, plays, node, asyncio.Barrier(len(CASES)))
        growing = asyncio.create_task(scene.grow())
        try:
            async with asyncio.TaskGroup() as tasks:
                for case in CASES:
                    tasks.create_task(case(scene))
        finally:
            growing.cancel()
            print(*(f"{seconds:6.2f} s  {what}" for what, seconds in scene.seconds.items()), sep="\n")
    assert len(scene.seconds) == len(CASES) + 2
    assert max(scene.seconds.values()) < WITHIN_SECONDS, scene.seconds
