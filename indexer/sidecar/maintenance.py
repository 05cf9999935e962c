"""What is done once a day, or when a scheduler asks: the dead's jobs back, the drain on, monthly snapshots started."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any, Literal
from uuid import UUID

import msgspec

from indexer import log
from indexer.config import Settings
from indexer.db import Connection
from indexer.sidecar import drain, gates, snapshots
from indexer.sidecar.jobs import JobContext, job
from indexer.sidecar.routes import Answer, Call, route
from indexer.sidecar.schedules import schedule
from indexer.sidecar.store import reclaim


class Done(msgspec.Struct, frozen=True):
    id: UUID
    reclaimed: int
    snapshots_started: int


async def maintain(connection: Connection, settings: Settings) -> Done:
    """Do all of it. Bears repetition, also at the same moment."""
    lost_after = timedelta(seconds=settings.sidecar.heartbeat_timeout_seconds)
    reclaimed = await reclaim(connection, lost_after, settings.sidecar.max_worker_deaths)
    await drain.resume(connection, settings, run=True)
    await gates.open_(connection, snapshots.CHUNK_KIND)
    started, forbidden = await snapshots.start_due(connection, Decimal(str(settings.providers.apify.monthly_budget)))
    if forbidden:
        log.get().warning("monthly snapshots over their accounts' caps", snapshots=forbidden)
    number = await connection.fetchval(
        """
        insert into maintenance_runs (reclaimed, waiting, snapshots_started)
        select $1, count(*), $2 from indexer.pgqueuer where entrypoint = $3 and status = 'queued'
        returning id
        """,
        reclaimed, started, drain.KIND,
    )  # fmt: skip
    log.get().info("maintenance done", reclaimed=reclaimed, snapshots_started=started)
    return Done(number, reclaimed, started)


@schedule("playcount.maintenance", cron="17 3 * * *", spread_seconds=600, catch_up=True)
@job("playcount.maintenance", concurrency=1, retries=5, timeout_seconds=600)
async def maintenance(context: JobContext, payload: dict[str, Any]) -> None:
    async with context.database.acquire() as connection:
        await maintain(connection, context.settings)


class Maintained(Answer):
    """`backfill_run_id` is the run that has set the drain going; `reclaimed` jobs were those of dead workers."""

    status: Literal["success"] = "success"
    reclaimed: int
    backfill_run_id: UUID
    monthly_snapshots_started: int


@route("GET", "/api/internal/playcount-maintenance", answers={202: Maintained}, access="cron")
async def playcount_maintenance(call: Call) -> Maintained:
    """Put back the jobs of dead workers, set the drain going, and start the monthly snapshots that are due."""
    async with call.database.acquire() as connection:
        done = await maintain(connection, call.settings)
    return Maintained(
        reclaimed=done.reclaimed, backfill_run_id=done.id, monthly_snapshots_started=done.snapshots_started
    )


ROUTES = (playcount_maintenance,)
