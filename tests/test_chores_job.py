"""The hooks' chores as a job of the sidecar."""

from __future__ import annotations

import asyncpg
import pytest
import structlog

from indexer.config import DatabaseSettings, Settings
from indexer.db import Database
from indexer.sidecar.chores import ChoresFailed, chores
from indexer.sidecar.jobs import JobContext, load_jobs


def context(database: Database, *hooks: str) -> JobContext:
    settings = Settings(database={"url": database.dsn}, hooks={"enabled": list(hooks)})
    return JobContext(1, chores.kind, 1, database, settings, {}, structlog.get_logger())


async def test_the_chores_are_done_and_one_that_fails_is_told(
    database_url: str, connection: asyncpg.Connection
) -> None:
    await connection.execute("insert into tracks (track_id, owner_id, created_at) values (1, 7, now())")
    async with Database(database_url, DatabaseSettings()).opened() as database:
        await chores(context(database, "hooks.plays:plays"), {})
        assert await connection.fetchval("select count(*) from aggregate_interval_plays") == 1
        await chores(context(database), {})  # no hooks, no chores
        await connection.execute("drop materialized view aggregate_interval_plays")
        with pytest.raises(ChoresFailed, match=r"aggregate_interval_plays: "):
            await chores(context(database, "hooks.plays:plays"), {})


def test_the_sidecar_does_them_every_quarter_of_an_hour() -> None:
    (schedule,) = load_jobs(()).get("chores", chores).schedules
    assert (schedule.cron, schedule.kind) == ("*/15 * * * *", "chores")
    assert "chores" in load_jobs(())
