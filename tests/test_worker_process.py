"""Sidecars as real processes: killed, stopped, without their Postgres, and inside the daemon."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import asyncpg
import pytest
from conftest import HASTY
from daemon import Daemon, played, settings, until
from queuekit import SEEN, count, emptied, reaches, states

from indexer import queue
from indexer.demochain import Listeners
from indexer.embedded import EmbeddedPostgres
from indexer.fakechain import FakeChain, FakeNode
from indexer.migrations import SQL, migrate
from indexer.queue import NewJob

SATURATED = "create table saturated (seconds float)"
HERE = {"PYTHONPATH": str(Path(__file__).parent)}
BAD_HOOK = '''
from indexer import hook

@hook("bad", listens=["Played"], tables=[])
async def bad(tx, blocks):
    if blocks[-1].number >= 5:
        raise ValueError("block five")
'''


def configured(url: str, **sidecar: Any) -> dict[str, Any]:
    return {
        "database": {"url": url, "connect_timeout_seconds": 5},
        "sidecar": {"port": 0, "jobs": ["queuekit:KINDS"], **sidecar},
    }


class Sidecar(Daemon):
    """`indexer sidecar` as a process."""

    command = "sidecar"

    async def url(self) -> str:
        return str((await self.logged("sidecar started"))["status"])


def sidecar(folder: Path, url: str, **settings_: Any) -> Sidecar:
    return Sidecar(folder, configured(url, **settings_), env=HERE)


@pytest.fixture
async def seen(connection: asyncpg.Connection) -> None:
    await connection.execute(SEEN + ";" + SATURATED)


@pytest.mark.usefixtures("seen")
class TestDeath:
    async def test_kill_loses_nothing(self, tmp_path: Path, database_url: str, connection: asyncpg.Connection) -> None:
        """What a killed worker held is done by the other one, after its heartbeat has stayed away."""
        jobs = [NewJob({"name": f"{n}", "do": "sleep", "seconds": 0.3}) for n in range(30)]
        await queue.enqueue_many(connection, "test.told", jobs)
        short = {"heartbeat_timeout_seconds": 1.5, "max_running": 4}
        async with sidecar(tmp_path, database_url, **short) as one, sidecar(tmp_path, database_url, **short) as other:
            await one.logged("sidecar started")
            await other.logged("sidecar started")
            await until(
                reaches(connection, 2, "select count(distinct worker) from seen"), "both workers have begun jobs"
            )
            await one.kill()
            await emptied(connection)
        assert await count(connection, "select count(distinct name) from seen where ended_at is not null") == 30
        # only what the killed one held was begun twice
        assert await count(connection) <= 34
        assert await count(connection, "select count(*) from indexer.job_death") == 0

    async def test_a_job_that_kills_its_workers_is_held_and_the_innocent_are_done(
        self, tmp_path: Path, database_url: str, connection: asyncpg.Connection
    ) -> None:
        await queue.enqueue(connection, "test.told", {"name": "poison", "do": "die"}, priority=1)
        jobs = [NewJob({"name": f"{n}", "do": "sleep", "seconds": 0.2}) for n in range(6)]
        await queue.enqueue_many(connection, "test.told", jobs)
        short = {"heartbeat_timeout_seconds": 1.0, "max_worker_deaths": 2}
        for _ in range(2):
            async with sidecar(tmp_path, database_url, **short) as one:
                assert await one.ended() == -signal.SIGKILL
        async with sidecar(tmp_path, database_url, **short) as one:
            await emptied(connection)
            assert one.process.returncode is None
        assert await states(connection) == {"failed": 1}
        assert await count(connection, "select count(*) from seen where name = 'poison'") == 2
        assert await count(connection, "select count(distinct name) from seen where ended_at is not null") == 6
        error = json.loads(
            await connection.fetchval("select traceback from indexer.pgqueuer_log where status = 'failed'")
        )
        assert error["exception_type"] == "WorkerDied" and "2 workers died" in error["exception_message"]


@pytest.mark.usefixtures("seen")
class TestStop:
    async def test_drains(self, tmp_path: Path, database_url: str, connection: asyncpg.Connection) -> None:
        """What ends in time is done, what does not goes back untouched, and nothing new is begun."""
        await queue.enqueue(connection, "test.told", {"name": "quick", "do": "sleep", "seconds": 1.0}, priority=2)
        await queue.enqueue(connection, "test.told", {"name": "slow", "do": "sleep", "seconds": 19}, priority=1)
        await queue.enqueue(connection, "test.told", {"name": "late"}, after=None, priority=-1)
        await connection.execute("update indexer.pgqueuer set execute_after = now() + interval '1 day' where id = 3")
        async with sidecar(tmp_path, database_url, drain_seconds=2.5) as one:
            await until(reaches(connection, 2), "both run")
            one.send(signal.SIGTERM)
            await one.logged("draining")
            await connection.execute("update indexer.pgqueuer set execute_after = now() where id = 3")
            async with aiohttp.ClientSession() as session, session.get((await one.url()) + "readyz") as response:
                assert response.status == 503 and (await response.json())["reason"] == "draining"
            assert await one.ended(10) == 0
        rows = await connection.fetch("select name, ended_at is not null as ended from seen order by name")
        assert [tuple(row) for row in rows] == [("quick", True), ("slow", False)]
        left = await connection.fetch(
            "select id, status::text, attempts, queue_manager_id from indexer.pgqueuer where id < 4 order by id"
        )
        assert [tuple(row) for row in left] == [(2, "queued", 0, None), (3, "queued", 0, None)]

    async def test_probes(self, tmp_path: Path, database_url: str) -> None:
        async with sidecar(tmp_path, database_url) as one:
            await one.logged("sidecar started")

            async def ready() -> bool:
                return (await one.get("readyz"))[0] == 200

            await until(ready, "it is ready")
            assert (await one.get("livez"))[0] == 200
            status, text = await one.get("metrics")
            assert status == 200 and 'indexer_jobs{kind="test.told",state="waiting"} 0.0' in text
            assert await one.stop() == 0


class TestOutage:
    async def test_postgres_away_for_some_seconds(
        self, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """Jobs that run meanwhile are stored afterwards; nothing is lost, nothing begun again, no hand needed."""
        server = EmbeddedPostgres(tmp_path / "postgres", options=HASTY)
        await server.start()
        try:
            connection = await asyncpg.connect(server.dsn, server_settings={"search_path": "public"})
            await migrate(connection, [("indexer", SQL)])
            jobs = [NewJob({"seconds": 2.0 if n < 4 else 0.05}) for n in range(40)]
            await queue.enqueue_many(connection, "outage.sleep", jobs)
            await connection.close()
            (tmp_path / "outage.py").write_text(OUTAGE)
            address = tmp_path_factory.mktemp("pg") / "socket"  # the server's own is another one after each start
            _point(address, server)
            url = f"postgresql://indexer@/indexer?host={address}"
            values = configured(url, jobs=["outage:sleep"], heartbeat_timeout_seconds=30, max_running=4)
            env = {"PYTHONPATH": str(tmp_path), "STARTS": str(tmp_path / "starts")}
            async with Sidecar(tmp_path, values, env=env) as one:
                await until(lambda: _lines(tmp_path / "starts") >= 4, "four run")
                await server.stop()
                await one.logged("database unavailable")
                assert (await one.get("readyz"))[0] == 503
                assert (await one.get("livez"))[0] == 200
                await asyncio.sleep(4)
                await server.start()
                _point(address, server)
                connection = await asyncpg.connect(server.dsn)
                began = time.monotonic()
                await emptied(connection)
                assert time.monotonic() - began < 20
                assert await states(connection) == {}
                assert _lines(tmp_path / "starts") == 40
                await one.logged("database unavailable: over")
                await connection.close()
                assert await one.stop() == 0
        finally:
            await server.stop()


OUTAGE = '''
import asyncio, os
from indexer.sidecar.jobs import job

@job("outage.sleep")
async def sleep(context, payload):
    with open(os.environ["STARTS"], "a") as file:
        file.write(f"{context.id}\\n")
    await asyncio.sleep(payload["seconds"])
'''


def _point(address: Path, server: EmbeddedPostgres) -> None:
    """Have the address lead to the server's socket."""
    address.unlink(missing_ok=True)
    address.symlink_to(parse_qs(urlsplit(server.dsn).query)["host"][0])


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.usefixtures("seen")
class TestWithTheDaemon:
    async def test_a_halted_hook_ends_the_jobs_too(
        self, tmp_path: Path, database_url: str, connection: asyncpg.Connection
    ) -> None:
        (tmp_path / "bad.py").write_text(BAD_HOOK)
        await queue.enqueue(connection, "test.told", {"do": "sleep", "seconds": 19})
        chain, people = FakeChain(block_seconds=1, final_lag=2), Listeners(1)
        for _ in range(4):
            chain.mine([played(play) for play in people.plays(1, chain.head.timestamp + 1)])
        async with FakeNode(chain) as node:
            values = settings(database_url, node.url, hooks={"enabled": ["bad:bad"]})
            values["sidecar"] = configured(database_url)["sidecar"]
            env = {"PYTHONPATH": f"{tmp_path}:{HERE['PYTHONPATH']}"}
            async with Daemon(tmp_path, values, env=env, arguments=["--with-sidecar"]) as daemon:
                await until(reaches(connection, 1), f"the job runs\n{daemon.story}")
                await daemon.reached(connection, 4)
                began = time.monotonic()
                chain.mine([played(play) for play in people.plays(1, chain.head.timestamp + 1)])
                assert await daemon.ended(15) == 3
                assert time.monotonic() - began < 10
        assert await states(connection) == {"queued": 1}
        assert await count(connection, "select count(*) from seen where ended_at is not null") == 0

    async def test_both_work_and_stop(self, tmp_path: Path, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue(connection, "test.told", {})
        chain = FakeChain(block_seconds=1, final_lag=2)
        chain.mine_empty(3)
        async with FakeNode(chain) as node:
            values = settings(database_url, node.url) | {"sidecar": configured(database_url)["sidecar"]}
            async with Daemon(tmp_path, values, env=HERE, arguments=["--with-sidecar"]) as daemon:
                await daemon.reached(connection, 3)
                await emptied(connection)
                assert await daemon.stop() == 0
        assert await count(connection, "select count(*) from seen where ended_at is not null") == 1
