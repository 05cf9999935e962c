"""The monthly budget: never overrun, whoever dies; and that no song is asked for again once its answer is stored."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from daemon import Daemon, until
from measurekit import PATH, Stage, drained, impatient, isrcs, measuring, providers_at, stage

from indexer.config import Settings
from indexer.sidecar import calls, drain, keys
from indexer.sidecar.fakes import FakeSongstats, FakeStripe

__all__ = ["impatient", "stage"]
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("impatient")]

SONG = "QZABC2400000"
LEDGER = "select isrc, status, outcome, final from provider_calls order by id"


class Sidecar(Daemon):
    """`indexer sidecar` as a process."""

    command = "sidecar"


def sidecar(folder: Path, url: str, songstats: str, stripe: str, budget: int) -> Sidecar:
    providers = providers_at(songstats, songstats, songstats, stripe)
    providers["songstats"]["monthly_budget"] = budget
    return Sidecar(
        folder,
        {
            "database": {"url": url, "connect_timeout_seconds": 5},
            "providers": providers,
            "sidecar": {
                "port": 0, "heartbeat_timeout_seconds": 1.5, "drain_seconds": 1.0,
                "concurrency": {f'"{drain.KIND}"': 24},
            },
        },
    )  # fmt: skip


class TestThreeWorkers:
    async def test_one_is_killed(self, tmp_path: Path, database_url: str, connection: asyncpg.Connection) -> None:
        """1,000 songs, 700 calls: not one call more, and nothing lost."""
        states = "select status::text, count(*) from indexer.pgqueuer where entrypoint = $1 group by 1"

        async def waiting() -> dict[str, int]:
            return dict(map(tuple, await connection.fetch(states, drain.KIND)))

        async with FakeSongstats(days=1) as fake, FakeStripe(everybody_pays=True) as stripe:
            fake.fault("slow", count=None, seconds=0.1)
            processes = [sidecar(tmp_path, database_url, fake.url, stripe.url, 700) for _ in range(3)]
            async with processes[0] as victim, processes[1] as second, processes[2] as third:
                for one in (victim, second, third):
                    await one.logged("sidecar started")
                account = await keys.add_account(connection, None, None)
                key, _ = await keys.create(connection, account, "", None)
                url = (await second.logged("sidecar started"))["status"] + PATH.removeprefix("/")
                body = {"source": "historical", "scope": {"isrcs": isrcs(1000)}}
                async with (
                    aiohttp.ClientSession(headers={"x-api-key": key}) as session,
                    session.post(url, json=body) as answer,
                ):
                    assert (answer.status, (await answer.json())["enqueued"]) == (202, 1000)
                await until(lambda: len(fake.calls) >= 150, "the drain is in the middle")
                await victim.kill()

                async def over() -> bool:
                    used = await connection.fetchval("select calls from provider_budgets")
                    return used == 700 and set(await waiting()) == {"queued"}

                await until(over, "the budget is used up and nothing runs")
            # what the killed one had reserved and not yet sent is used up, too
            assert 700 - 24 <= len(fake.calls) <= 700
            stored = await connection.fetch("select isrc from provider_calls where final")
            assert len({row["isrc"] for row in stored}) == len(stored)
            again = {song for song, count in fake.counts().items() if count > 1}
            lost = await connection.fetch("select isrc from provider_calls where status is null")
            # asked for twice was only what the killed one had in flight, and it counts
            assert again <= {row["isrc"] for row in lost} and len(lost) == 700 - len(stored) <= 24
            assert await waiting() == {"queued": 1000 - len(stored)}
            assert await connection.fetchval("select max(attempts) from indexer.pgqueuer") == 0
            async with sidecar(tmp_path, database_url, fake.url, stripe.url, 2000) as more:
                await more.logged("sidecar started")

                async def drained_now() -> bool:
                    return not await waiting()

                await until(drained_now, "the rest is drained")
            assert set(fake.counts()) == set(isrcs(1000)) and 1000 <= len(fake.calls) <= 1000 + len(lost)
            assert await connection.fetchval("select count(distinct song) from song_measurements") == 1000


class TestBudget:
    async def test_never_overrun_by_calls_at_once(self, stage: Stage) -> None:
        async def reserve() -> bool:
            try:
                await calls.begin(stage.api.database, "songstats", SONG, 7)
            except calls.UsedUp:
                return False
            return True

        made = await asyncio.gather(*(reserve() for _ in range(40)))
        assert sum(made) == 7 and len(await stage.rows(LEDGER)) == 7

    @pytest.mark.parametrize("budget", [0, 4])
    async def test_used_up(self, database_url: str, budget: int) -> None:
        """The rest waits intact until the month ends, or until there is more."""
        async with measuring(database_url, provider={"songstats": {"monthly_budget": budget}}) as stage:
            await drained(stage, isrcs(10), songstats_history=4)
            assert len(stage.songstats.calls) == budget
            assert await stage.jobs() == {"queued": 10 - budget}
            async with stage.api.database.acquire() as connection:
                month = await calls.end_of_month(connection)
                assert not await drain.resume(connection, stage.api.settings, run=True)
            assert await stage.value("select until from indexer.job_gate") == month
            # another month: what was used up was used up in the last one
            await stage.run("update provider_budgets set month = month - interval '1 month'")
            async with stage.api.database.acquire() as connection:
                assert await drain.resume(connection, stage.api.settings) == (budget > 0)
            async with stage.working(songstats_history=4):
                await stage.settled()
            assert await stage.jobs() == ({"queued": 10 - 2 * budget} if budget else {"queued": 10})

    async def test_raised(self, database_url: str) -> None:
        async with measuring(database_url, provider={"songstats": {"monthly_budget": 4}}) as stage:
            await drained(stage, isrcs(10))
            higher = stage.api.settings.model_dump(exclude_unset=True)
            higher["providers"]["songstats"]["monthly_budget"] = 100
            stage.api.settings = Settings(**higher)
            async with stage.api.database.acquire() as connection:
                assert await drain.resume(connection, stage.api.settings)
            async with stage.working():
                await stage.settled()
            assert sorted(stage.songstats.keys()) == isrcs(10)

    async def test_every_attempt_counts(self, database_url: str) -> None:
        async with measuring(database_url, provider={"songstats": {"monthly_budget": 3}}) as stage:
            stage.songstats.fault("status", status=429, count=None)
            await drained(stage, isrcs(2))
            assert len(stage.songstats.calls) == 3 and await stage.jobs() == {"queued": 2}


class TestTwice:
    async def test_a_job_that_runs_again_asks_nothing(self, stage: Stage) -> None:
        """As after a worker's death between the answer's storing and the job's end."""
        await stage.order("historical", isrcs=[SONG])
        await stage.run("create table kept as select * from indexer.pgqueuer")
        async with stage.working():
            await stage.settled()
        await stage.run("insert into indexer.pgqueuer select * from kept")
        async with stage.working():
            await stage.settled()
        assert await stage.jobs() == {} and len(stage.songstats.calls) == 1

    async def test_an_answer_outlives_the_database(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was paid for is stored once the database is back, without another call."""
        monkeypatch.setattr(calls, "_RETRY_SECONDS", 0.01)
        lost, real = [], drain._store

        async def store(*given: Any) -> None:
            if len(lost) < 3:
                lost.append(given)
                raise ConnectionResetError("the database is away")
            await real(*given)

        monkeypatch.setattr(drain, "_store", store)
        await drained(stage, [SONG])
        assert len(lost) == 3 and len(stage.songstats.calls) == 1
        assert await stage.value("select count(*) from song_measurements") == 3

    async def test_kicked_at_once(self, stage: Stage) -> None:
        async with stage.working() as worker:
            await until(lambda: worker.begun, "the worker has looked for jobs")
            await stage.order("historical", isrcs=isrcs(3))
            await until(lambda: len(stage.songstats.calls) == 3, "the drain has begun", 4)
