"""For the tests of the queue: kinds of job that do as they are told, workers in this process, sidecars as processes.

What a job does goes into the table `seen`, so that it is known which worker did it, when, and how often.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg
from daemon import PATIENCE_SECONDS, until

from indexer.config import DatabaseSettings, Settings
from indexer.db import Database
from indexer.sidecar.jobs import Held, JobContext, JobType, Retry, Saturated, Terminal, job
from indexer.sidecar.schedules import schedule
from indexer.sidecar.worker import Worker

SEEN = """
create table seen (
    id int generated always as identity, job bigint, kind text, name text, attempt int, worker int,
    at timestamptz not null default clock_timestamp(), ended_at timestamptz
)
"""


async def note(context: JobContext, payload: Mapping[str, Any]) -> int:
    """Write down that the job was begun."""
    async with context.database.acquire() as connection:
        number = await connection.fetchval(
            "insert into public.seen (job, kind, name, attempt, worker) values ($1, $2, $3, $4, $5) returning id",
            context.id, context.kind, str(payload.get("name", "")), context.attempt, os.getpid(),
        )  # fmt: skip
    return int(number)


async def done(context: JobContext, number: int) -> None:
    async with context.database.acquire() as connection:
        await connection.execute("update public.seen set ended_at = clock_timestamp() where id = $1", number)


@job("test.told", retries=3, backoff_seconds=0.05, timeout_seconds=20)
async def told(context: JobContext, payload: dict[str, Any]) -> None:
    """Does what the payload says."""
    number = await note(context, payload)
    if context.attempt <= payload.get("fails", 0):
        raise ValueError(f"attempt {context.attempt} fails\0 as told")
    match payload.get("do"):
        case "sleep":
            await asyncio.sleep(payload["seconds"])
        case "terminal":
            raise Terminal("no such thing")
        case "hold":
            raise Held("look at this")
        case "retry" if context.attempt == 1:
            raise Retry(payload["seconds"], "asked to come again")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    await done(context, number)


@job("test.short", retries=0, timeout_seconds=0.1)
async def short(context: JobContext, payload: dict[str, Any]) -> None:
    await asyncio.sleep(30)


@job("test.one", concurrency=1)
async def one(context: JobContext, payload: dict[str, Any]) -> None:
    """One at a time over all workers; where the table `saturated` has a row, the provider is."""
    number = await note(context, payload)
    async with context.database.acquire() as connection:
        seconds = await connection.fetchval("select max(seconds) from public.saturated")
    if seconds is not None:
        raise Saturated("429", float(seconds))
    await asyncio.sleep(float(payload.get("seconds", 0.0)))
    await done(context, number)


@schedule("test.often", cron="* * * * *")
@job("test.tick")
async def tick(context: JobContext, payload: dict[str, Any]) -> None:
    await note(context, payload)


@job("test.nothing")
async def nothing(context: JobContext, payload: dict[str, Any]) -> None:
    pass


KINDS = [told, short, one, nothing]


def settings(url: str, **sidecar: Any) -> Settings:
    base = {"port": 0, "drain_seconds": 2.0}
    return Settings(database={"url": url, "connect_timeout_seconds": 3}, sidecar={**base, **sidecar})  # type: ignore[arg-type]


@asynccontextmanager
async def working(
    url: str, kinds: Sequence[JobType] = KINDS, *, drain_seconds: float | None = None, **sidecar: Any
) -> AsyncIterator[Worker]:
    """A worker in this process, with a pool of its own, while the block runs."""
    given = settings(url, **sidecar, **({} if drain_seconds is None else {"drain_seconds": drain_seconds}))
    async with Database(url, DatabaseSettings(pool_size=10, connect_timeout_seconds=3)).opened() as database:
        worker = Worker(given, database, {one.kind: one for one in kinds}, {})
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            failed = task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert not failed, "the worker ended by itself"


async def states(connection: asyncpg.Connection) -> dict[str, int]:
    """How many jobs are in which of PgQueuer's states; those of a schedule, which the clock makes, don't count."""
    rows = await connection.fetch(
        "select status::text, count(*) from indexer.pgqueuer where coalesce(dedupe_key, '') not like '%@%' group by 1"
    )
    return dict(map(tuple, rows))


async def emptied(connection: asyncpg.Connection, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until no job waits or runs."""

    async def nothing_left() -> bool:
        return not set(await states(connection)) & {"queued", "picked"}

    await until(nothing_left, "no job waits or runs", seconds)


async def count(connection: asyncpg.Connection, query: str = "select count(*) from seen") -> int:
    return int(await connection.fetchval(query))


def reaches(connection: asyncpg.Connection, number: int, query: str = "select count(*) from seen") -> Callable[[], Any]:
    async def there() -> bool:
        return await count(connection, query) >= number

    return there
