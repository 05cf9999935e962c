"""The hour's batches, the jobs that work them off, the scheduler's routes, and what operators see and do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from apikit import CRON_SECRET, Api, serving_api
from daemon import Commands, toml, until
from listenkit import HOUR, MINUTE, START, TOKEN_KEY, Stage, listening_stage

from indexer import metrics, queue
from indexer.config import ListeningSettings, Settings
from indexer.sidecar import gates
from indexer.sidecar.fakes import Fault
from indexer.sidecar.listening import operators, schedule
from indexer.sidecar.listening.schedule import KIND, plan
from indexer.sidecar.listening.vault import Undecipherable, Vault
from indexer.sidecar.worker import Worker

CRON = {"Authorization": f"Bearer {CRON_SECRET}"}
NEW_KEY = "a newer key for people's tokens, as long as the old one"


@pytest.fixture
async def stage(database_url: str, connection: asyncpg.Connection) -> AsyncIterator[Stage]:
    async with listening_stage(database_url, connection) as stage:
        yield stage


# -- the plan ------------------------------------------------------------------------------------------------------


async def add_people(connection: asyncpg.Connection, count: int) -> None:
    await connection.execute(
        "insert into listeners (spotify_id, refresh_token) select 'p' || n, 'x' from generate_series(1, $1) as n", count
    )


async def test_batches_start_spread_over_the_hour(stage: Stage) -> None:
    await add_people(stage.connection, 100)
    found = await plan(stage.connection, START, 50)
    assert [(len(one.listeners), (one.after - START).total_seconds()) for one in found] == [(50, 0), (50, 1800)]
    await add_people(stage.connection, 0)
    await stage.connection.execute(
        "insert into listeners (spotify_id, refresh_token) select 'q' || n, 'x' from generate_series(1, 4900) as n"
    )
    found = await plan(stage.connection, START, 50)
    assert [(one.after - START).total_seconds() for one in found] == [36 * n for n in range(100)]
    everybody = [listener for one in found for listener in one.listeners]
    assert len(everybody) == len(set(everybody)) == 5_000 and everybody == sorted(everybody)
    # a plan that comes late uses what is left of the hour
    late = await plan(stage.connection, START + 50 * MINUTE, 50)
    assert late[0].after == START + 50 * MINUTE and late[99].after == START + 59 * MINUTE + timedelta(seconds=54)


async def test_who_is_left_out_of_the_plan(stage: Stage) -> None:
    everybody = await stage.people(8)
    say = stage.connection.execute
    changes = {
        1: "is_active = false", 2: "refresh_token = null", 3: f"last_polled_at = '{START + MINUTE}'",
        4: f"cooling_until = '{START + 2 * HOUR}'", 5: f"rate_limited_until = '{START + 90 * MINUTE}'",
        6: f"cooling_until = '{START}'", 7: f"last_polled_at = '{START - MINUTE}'",
    }  # fmt: skip
    for number, change in changes.items():
        await say(f"update listeners set {change} where id = $1", everybody[number].id)
    found = await plan(stage.connection, START, 50)
    assert {listener for one in found for listener in one.listeners} == {everybody[n].id for n in (0, 6, 7)}
    # whose wait ends before the turn comes is in it
    waiting = max(one.id for one in everybody)
    await say("update listeners set cooling_until = null, is_active = true, refresh_token = 'x', last_polled_at = null,"
              "rate_limited_until = null")  # fmt: skip
    for minutes, there in ((29, True), (31, False)):
        await say("update listeners set cooling_until = $2 where id = $1", waiting, START + minutes * MINUTE)
        second = (await plan(stage.connection, START, 4))[1]
        assert (waiting in second.listeners, second.after) == (there, START + 30 * MINUTE)


async def test_the_hours_jobs_are_ordered_once(stage: Stage) -> None:
    stage.now = datetime.now(UTC) + 24 * HOUR
    await add_people(stage.connection, 120)
    assert await schedule.order(stage.connection, stage.now, 50) == (3, 120)
    assert await schedule.order(stage.connection, stage.now, 50) == (0, 120)
    rows = await stage.connection.fetch("select execute_after, payload from indexer.pgqueuer order by execute_after")
    assert rows[0]["execute_after"] == stage.now and [len(json.loads(row["payload"])["userIds"]) for row in rows] == [
        50, 50, 20
    ]  # fmt: skip


# -- the jobs ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def working(stage: Stage, url: str) -> AsyncIterator[Worker]:
    settings = Settings(database={"url": url}, sidecar={"port": 0})  # type: ignore[arg-type]
    worker = Worker(settings, stage.database, {one.kind: one for one in schedule.JOBS}, {"listening": stage.listening})
    task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def jobs_left(stage: Stage) -> Any:
    async def none_left() -> bool:
        return not await stage.connection.fetchval("select count(*) from indexer.pgqueuer where status <> 'failed'")

    return none_left


async def test_from_the_tick_to_the_rows(stage: Stage, database_url: str) -> None:
    stage.now = datetime.now(UTC)
    people = await stage.people(20)
    for one in people:
        one.at_spotify.play(1, stage.now - MINUTE)
    await queue.enqueue(stage.connection, schedule.PLAN_KIND, {})
    async with working(stage, database_url):
        await until(jobs_left(stage), "all jobs are done")
    assert len(await stage.archived()) == 20
    assert any(line["event"] == "people archived" and line["successful"] == 20 for line in stage.logs)


async def test_a_429_closes_the_gate_and_the_batch_goes_on_when_it_opens(stage: Stage, database_url: str) -> None:
    stage.settings = stage.settings.model_copy(update={"people_at_once": 1})
    stage.listening = stage.another()
    people = await stage.people(5)
    people[2].at_spotify.broken = Fault("status", 1, status=429, retry_after=3_000)
    await queue.enqueue(stage.connection, KIND, {"userIds": [str(one.id) for one in people]})

    async def gate_closed() -> bool:
        return bool(await gates.standing(stage.connection))

    async with working(stage, database_url):
        await until(gate_closed, "the gate is closed")
        assert await stage.connection.fetchval("select count(*) from indexer.pgqueuer where attempts = 0") == 1
        assert len(stage.fake.polls) == 3
        stage.now += timedelta(seconds=3_000)
        await gates.open_(stage.connection, KIND)
        await until(jobs_left(stage), "the batch is done")
    assert await stage.connection.fetchval("select count(*) from listeners where last_polled_at is not null") == 5
    assert [len(times) for times in stage.fake.polls.values()] == [1, 1, 2, 1, 1]


async def test_wrong_settings_hold_the_batch(stage: Stage, database_url: str) -> None:
    (ann,) = await stage.people(1)
    stage.listening.settings = ListeningSettings()
    await queue.enqueue(stage.connection, KIND, {"userIds": [str(ann.id)]})

    async def held() -> bool:
        return bool(await stage.connection.fetchval("select count(*) from indexer.pgqueuer where status = 'failed'"))

    async with working(stage, database_url):
        await until(held, "the job is held")
    assert (await stage.row(ann))["consecutive_failures"] == 0


# -- the routes ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def api(stage: Stage, database_url: str) -> AsyncIterator[Api]:
    async with serving_api(database_url, schedule.ROUTES, {"listening": stage.listening}) as served:
        yield served


async def test_the_schedulers_routes(stage: Stage, database_url: str) -> None:
    people = await stage.people(4)
    people[0].at_spotify.play(1, START - MINUTE)
    people[1].at_spotify.broken = Fault("status", None, status=500)
    async with api(stage, database_url) as served:
        for path, body in (("/api/cron/archive", None), ("/api/queue/archive-batch", {"userIds": [str(uuid4())]})):
            assert (await served.post(path, body)).status == 401
            assert (await served.post(path, body, by=served.ann)).status == 401
        for wrong in ({}, {"userIds": []}, {"userIds": ["x"]}, {"userIds": [str(uuid4())] * 51}, {"userIds": 7}):
            told = await served.post("/api/queue/archive-batch", wrong, headers=CRON)
            assert told.status == 400 and "userIds" in told.error, wrong
        told = await served.post("/api/cron/archive", headers=CRON)
        assert (told.status, told.json) == (202, {"status": "success", "batches": 1, "listeners": 4})
        ids = [str(one.id) for one in people[:2]] + [str(uuid4())]
        told = await served.post("/api/queue/archive-batch", {"userIds": ids}, headers=CRON)
        facts = told.json
        assert told.status == 200 and facts.pop("durationMs") >= 0
        results = {one["userId"]: (one["status"], one["reason"], one["songsArchived"]) for one in facts.pop("results")}
        assert facts == {"processed": 3, "successful": 1, "skipped": 1, "failed": 1, "totalSongsArchived": 1}
        assert list(map(results.get, ids)) == [
            ("successful", None, 1), ("failed", "NETWORK: spotify: HTTP 500 to recent plays", 0),
            ("skipped", "unknown_listener", 0),
        ]  # fmt: skip
        people[2].at_spotify.broken = Fault("status", 1, status=429, retry_after=77)
        told = await served.post("/api/queue/archive-batch", {"userIds": [str(people[2].id)]}, headers=CRON)
        assert told.json["results"][0]["reason"] == "rate_limited"
        told = await served.post("/api/queue/archive-batch", {"userIds": [str(people[3].id)]}, headers=CRON)
        assert told.status == 503 and 70 < int(told.headers["Retry-After"]) <= 78


# -- operators -----------------------------------------------------------------------------------------------------


async def test_what_operators_see_and_reset(
    stage: Stage, commands: Commands, database_url: str, tmp_path: Path
) -> None:
    stage.now = datetime.now(UTC)
    people = await stage.people(4)
    people[0].at_spotify.play(1, stage.now - MINUTE)
    people[1].at_spotify.broken = "not_json"
    await stage.archive(people[0], people[1])
    await stage.connection.execute("update listeners set is_active = false where id = $1", people[2].id)
    (tmp_path / "indexer.toml").write_text(toml({"database": {"url": database_url}}))
    told = await commands("listeners", folder=tmp_path)
    assert told.code == 1  # somebody must connect anew
    assert "people: 2 active, 1 cooling down, 0 rate limited, 1 disconnected" in told.out
    assert f"{people[1].id}  UNKNOWN  1 in a row  20 min left" in told.out
    assert f"{people[2].id}  -  0 in a row  must connect anew" in told.out and "track " in told.out
    facts = json.loads((await commands("listeners", "--json", folder=tmp_path)).out)
    assert facts["cooling_down"] == 1 and facts["places_taken"] == 4 and len(facts["latest_plays"]) == 1
    for text in (told.out, json.dumps(facts)):
        assert "Name-of" not in text and "@" not in text and "person0000" not in text
    told = await commands("listeners", "reset", str(people[1].id), folder=tmp_path)
    assert told.code == 0 and (await stage.row(people[1]))["cooling_until"] is None
    for wrong, text in ((["reset"], "whose?"), (["reset", "x"], "UUID"), (["reset", str(uuid4())], "nobody"),
                        (["poke"], "no action")):  # fmt: skip
        told = await commands("listeners", *wrong, folder=tmp_path)
        assert told.code == 2 and text in told.err and told.err.count("\n") == 1
    await operators.publish(stage.connection, stage.now)
    states = {state: metrics.registry.get_sample_value("indexer_listeners", {"state": state})
              for state in operators.STATES}  # fmt: skip
    assert states == {"active": 3, "cooling_down": 0, "rate_limited": 0, "disconnected": 1}


async def test_the_key_of_tokens_is_rotated_beside_workers(
    stage: Stage, commands: Commands, database_url: str, tmp_path: Path
) -> None:
    people = await stage.people(250)
    stage.fake.rotate, stage.fake.grace = "always", False
    stage.now += HOUR
    (tmp_path / "indexer.toml").write_text(toml({
        "database": {"url": database_url}, "listening": {"token_key": NEW_KEY, "old_token_keys": [TOKEN_KEY]},
    }))  # fmt: skip
    # a worker works on meanwhile, and the refresh token of everybody whom it polls changes
    rotating = asyncio.create_task(commands("keys", "rotate-tokens", folder=tmp_path))
    both = ListeningSettings(token_key=NEW_KEY, old_token_keys=[TOKEN_KEY])  # type: ignore[arg-type,list-item]
    newer = stage.another()
    newer.settings = both
    report = await stage.archive(*people[:100], by=newer)
    told = await rotating
    assert report.count("successful") == 100 and told.code == 0, told.err
    assert "encrypted the tokens of" in told.out and "250 of 250 people" in told.err
    new = Vault(ListeningSettings(token_key=NEW_KEY))  # type: ignore[arg-type]
    for row in await stage.connection.fetch("select access_token, refresh_token from listeners"):
        assert new.decrypt(row["access_token"]) and new.decrypt(row["refresh_token"])
    assert "encrypted the tokens of 0 people" in (await commands("keys", "rotate-tokens", folder=tmp_path)).out
    with pytest.raises(Undecipherable):
        stage.listening.vault.decrypt((await stage.row(people[0]))["refresh_token"])
    stage.now += HOUR
    newer = stage.another()
    newer.settings = ListeningSettings(token_key=NEW_KEY)  # type: ignore[arg-type]
    assert (await stage.archive(*people, by=newer)).count("successful") == 250
    # a key that is lost is said in one line
    (tmp_path / "indexer.toml").write_text(toml({
        "database": {"url": database_url}, "listening": {"token_key": "a third key that has encrypted nothing"},
    }))  # fmt: skip
    told = await commands("keys", "rotate-tokens", folder=tmp_path)
    assert told.code == 2 and "the tokens of 250 people were encrypted by a key" in told.err
    (tmp_path / "indexer.toml").write_text(toml({"database": {"url": database_url}}))
    told = await commands("keys", "rotate-tokens", folder=tmp_path)
    assert told.code == 2 and "listening.token_key" in told.err
