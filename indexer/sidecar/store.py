"""The queue as a worker sees it: PgQueuer's taking of jobs behind our gates, and our own ends of jobs.

PgQueuer knows three ends (gone, failed, again). Ours are more, and are stored at once and many at a time, only as long
as the job is still this worker's. A job whose worker has died waits again; how many died of it is counted, and of such
jobs a worker runs one at a time, so that the innocent are found out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import msgspec
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment, QueryQueueBuilder, QuerySchedulerBuilder
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.domain import models, types
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.ports.repository import EntrypointExecutionParameter

from indexer.db import Connection
from indexer.sidecar import gates
from indexer.sidecar.connection import Lasting
from indexer.sidecar.jobs import Outcome, storable
from indexer.sidecar.together import Together

# None of PGQUEUER_*: the names are those of our migration.
NAMES = DBSettings(
    prefix="", db_schema="indexer", channel=types.Channel("ch_pgqueuer"), function="fn_pgqueuer_changed",
    statistics_table="pgqueuer_statistics", queue_status_type="pgqueuer_status", queue_table="pgqueuer",
    queue_table_log="pgqueuer_log", trigger="tg_pgqueuer_changed", schedules_table="pgqueuer_schedules",
    durability=Durability.durable,
)  # fmt: skip

_MOST_SECONDS_BETWEEN_RECLAIMS = 30.0
# What PgQueuer takes from the dead does not count their deaths: it leaves that to us.
_NEVER = timedelta(days=3650)


def queries_on(driver: Any) -> dict[str, Any]:
    """What every Queries of ours is made with."""
    return {
        "driver": driver, "qbe": QueryBuilderEnvironment(NAMES), "qbq": QueryQueueBuilder(NAMES),
        "qbs": QuerySchedulerBuilder(NAMES),
    }  # fmt: skip


class Ending(msgspec.Struct, frozen=True):
    """A job that has ended and is to be stored."""

    job: models.Job
    outcome: Outcome


class Store(Queries):
    """PgQueuer's queries for one worker, named `worker` in the database."""

    def __init__(self, driver: Lasting, worker: types.QueueManagerId, lost_after: timedelta, most_deaths: int) -> None:
        super().__init__(**queries_on(driver))
        self._lasting, self.worker, self._lost_after, self._most_deaths = driver, worker, lost_after, most_deaths
        self.taken: set[int] = set()  # from when they are taken until their end is stored
        self.suspects: set[int] = set()
        self._closed: Mapping[str, float] = {}
        self._reclaimed_at = -1e9
        self.looked_at: float | None = None  # time.monotonic() of the last look for jobs
        self._lost = 0
        self._storing = Together(self._store_all)

    # -- taking ----------------------------------------------------------------------------------------------------

    async def dequeue(
        self, batch_size: int, entrypoints: dict[types.QueueEntrypoint, EntrypointExecutionParameter],
        queue_manager_id: types.QueueManagerId, global_concurrency_limit: int | None, heartbeat_timeout: timedelta,
    ) -> list[models.Job]:  # fmt: skip
        """Take jobs of the kinds whose gates are open, in one transaction: no gate closes meanwhile."""

        async def take(connection: Connection) -> list[models.Job]:
            await self._tidy(connection)
            async with connection.transaction():
                self._closed = await gates.closed(connection, entrypoints)
                open_ = {kind: limit for kind, limit in entrypoints.items() if kind not in self._closed}
                if not open_:
                    return []
                return await Queries(**queries_on(AsyncpgDriver(connection))).dequeue(
                    batch_size, open_, queue_manager_id, global_concurrency_limit, _NEVER
                )

        jobs = await self._lasting.run(take)
        self.looked_at = time.monotonic()
        self.taken.update(job.id for job in jobs)
        if jobs:
            rows = await self._lasting.fetch(
                "select job from indexer.job_death where job = any($1::bigint[])", [job.id for job in jobs]
            )
            self.suspects.update(int(str(row["job"])) for row in rows)
        return jobs

    async def _tidy(self, connection: Connection) -> None:
        """Put back what dead workers have left, and what we were given by an answer that never came."""
        if self._lasting.lost != self._lost:
            await connection.execute(
                """
                update indexer.pgqueuer set status = 'queued', queue_manager_id = null, slot = null
                where queue_manager_id = $1 and status = 'picked' and id <> all($2::bigint[])
                """,
                self.worker, list(self.taken),
            )  # fmt: skip
            self._lost = self._lasting.lost
        between = min(self._lost_after.total_seconds() / 4, _MOST_SECONDS_BETWEEN_RECLAIMS)
        if time.monotonic() - self._reclaimed_at > between:
            await reclaim(connection, self._lost_after, self._most_deaths)
            self._reclaimed_at = time.monotonic()

    async def eligible_queued_work(self, entrypoints: list[types.QueueEntrypoint]) -> int:
        return await super().eligible_queued_work(self._open(entrypoints))

    async def queued_work(self, entrypoints: list[types.QueueEntrypoint]) -> int:
        return await super().queued_work(self._open(entrypoints))

    async def next_deferred_eta(self, entrypoints: list[types.QueueEntrypoint]) -> timedelta | None:
        """Also until the first gate opens."""
        eta = await super().next_deferred_eta(self._open(entrypoints))
        opens = [timedelta(seconds=seconds) for seconds in self._closed.values()]
        return min([*opens, *([] if eta is None else [eta])], default=None)

    def _open(self, entrypoints: list[types.QueueEntrypoint]) -> list[types.QueueEntrypoint]:
        return [kind for kind in entrypoints if kind not in self._closed]

    # -- while they run --------------------------------------------------------------------------------------------

    async def begin_suspect(self, job: int) -> None:
        """Note that a job of which a worker died is really begun, so that another death counts."""
        await self._lasting.execute("update indexer.job_death set started = true where job = $1", job)

    async def beat(self) -> set[int]:
        """Say that this worker lives; returns the jobs that are still its own."""
        rows = await self._lasting.fetch(
            """
            update indexer.pgqueuer set heartbeat = now() where queue_manager_id = $1 and status = 'picked'
            returning id
            """,
            self.worker,
        )
        return {int(str(row["id"])) for row in rows}

    async def update_heartbeat(self, job_ids: list[types.JobId]) -> None:
        """Nothing: the worker beats for all of its jobs at once."""

    # -- their ends ------------------------------------------------------------------------------------------------

    async def log_jobs(
        self, job_status: list[tuple[models.Job, types.JOB_STATUS, models.TracebackRecord | None]]
    ) -> None:
        """Nothing: what PgQueuer takes for the end has been stored before."""

    async def end(self, job: models.Job, outcome: Outcome) -> None:
        """Store how a job ended; those that end in the meantime go together with the next ones."""
        await self._storing.do(Ending(job, outcome))

    async def _store_all(self, endings: list[Ending]) -> list[None]:
        await self._lasting.run(lambda connection: self._store(connection, endings))
        for ending in endings:
            self.taken.discard(ending.job.id)
            self.suspects.discard(ending.job.id)
        return [None] * len(endings)

    async def _store(self, connection: Connection, endings: list[Ending]) -> None:
        async with connection.transaction():
            closing = [one for one in endings if one.outcome.gate_seconds is not None]
            if closing:
                await gates.lock(connection)
            await connection.execute(
                """
                with ended as (
                    select * from unnest($2::bigint[], $3::text[], $4::float8[], $5::boolean[], $6::jsonb[])
                        as ends (id, fate, seconds, counts, details)
                ), gone as (
                    delete from indexer.pgqueuer as job using ended
                    where job.id = ended.id and queue_manager_id = $1 and status = 'picked'
                      and fate in ('done', 'terminal')
                    returning job.id, entrypoint, priority, fate, details
                ), kept as (
                    update indexer.pgqueuer as job
                    set status = case fate when 'held' then 'failed' else 'queued' end::indexer.pgqueuer_status,
                        queue_manager_id = null, slot = null, updated = now(), attempts = attempts + counts::int,
                        execute_after = coalesce(now() + seconds * interval '1 second', execute_after)
                    from ended
                    where job.id = ended.id and queue_manager_id = $1 and status = 'picked'
                      and fate not in ('done', 'terminal')
                    returning job.id, entrypoint, priority, fate, details
                ), forgiven as (
                    delete from indexer.job_death using ended
                    where job = ended.id and fate <> 'put_back'
                )
                insert into indexer.pgqueuer_log (job_id, status, entrypoint, priority, traceback)
                select id, case fate when 'done' then 'successful' when 'terminal' then 'exception'
                                     when 'held' then 'failed' else 'queued' end::indexer.pgqueuer_status,
                       entrypoint, priority, details
                from (select * from gone union all select * from kept) as ends
                """,
                self.worker, [one.job.id for one in endings], [one.outcome.fate for one in endings],
                [one.outcome.after_seconds for one in endings], [one.outcome.counts for one in endings],
                [_record(one) for one in endings],
            )  # fmt: skip
            for one in closing:
                seconds = timedelta(seconds=one.outcome.gate_seconds or 0.0)
                await gates.close(connection, one.job.entrypoint, seconds, storable(str(one.outcome.error)))


def _record(one: Ending) -> str | None:
    """The error as PgQueuer's own tools read it, too."""
    details = one.outcome.details()
    if details is None:
        return None
    facts = {"outcome": one.outcome.fate, "attempt": one.job.attempts + 1}
    at = models.utc_now().isoformat()
    return msgspec.json.encode(
        {"job_id": one.job.id, "timestamp": at, **details, "additional_context": facts}
    ).decode()  # fmt: skip


async def reclaim(connection: Connection, lost_after: timedelta, most_deaths: int) -> int:
    """Have the jobs wait again whose worker has said nothing for so long; returns how many.

    One of which `most_deaths` workers have died is held instead.
    """
    return int(
        await connection.fetchval(
            """
            with dead as (
                select id from indexer.pgqueuer where status = 'picked' and heartbeat < now() - $1::interval
                order by id
                for update skip locked
            ), counted as (
                insert into indexer.job_death as known (job, deaths) select id, 1 from dead
                on conflict (job) do update set deaths = known.deaths + known.started::int, started = false
                returning job, deaths
            ), back as (
                update indexer.pgqueuer
                set status = case when deaths >= $2 then 'failed' else 'queued' end::indexer.pgqueuer_status,
                    queue_manager_id = null, slot = null, updated = now()
                from counted where id = job
                returning id, status, entrypoint, priority, deaths
            ), logged as (
                insert into indexer.pgqueuer_log (job_id, status, entrypoint, priority, traceback)
                select id, status, entrypoint, priority, jsonb_build_object(
                    'job_id', id, 'timestamp', now(), 'exception_type', 'WorkerDied',
                    'exception_message', format('%s workers died while they ran it', deaths),
                    'traceback', '', 'additional_context', jsonb_build_object('deaths', deaths))
                from back
            )
            select count(*) from back
            """,
            lost_after, most_deaths,
        )
    )  # fmt: skip
