"""Every hour everybody is polled: batches of people as jobs, spread over the hour, and the routes of a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from pydantic import Field

from indexer import queue
from indexer.db import Connection, Database
from indexer.queue import NewJob
from indexer.sidecar import gates
from indexer.sidecar.jobs import Held, JobContext, Saturated, job
from indexer.sidecar.listening.archive import Report, archive_batch
from indexer.sidecar.listening.poll import Misconfigured
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.routes import Answer, Body, Call, Refused, route
from indexer.sidecar.schedules import schedule

KIND = "listening.archive"
PLAN_KIND = "listening.schedule"

_HOUR = timedelta(hours=1)
_MOST_PEOPLE = 50


class Batch(msgspec.Struct, frozen=True):
    """People to be polled together, not before `after`."""

    listeners: tuple[UUID, ...]
    after: datetime


async def plan(connection: Connection, now: datetime, size: int) -> list[Batch]:
    """Who is due this hour, in batches that start spread evenly over what is left of it.

    In the order of the ids, so that a person's turn comes at about the same minute each hour. Who cools down or must
    wait until after the batch's start is left out; whose wait ends before it is not.
    """
    start = now.replace(minute=0, second=0, microsecond=0)
    rows = await connection.fetch(
        """
        select id, greatest(cooling_until, rate_limited_until) as waits_until from listeners
        where is_active and refresh_token is not null
          and (last_polled_at is null or last_polled_at < $1)
          and (cooling_until is null or cooling_until < $2)
          and (rate_limited_until is null or rate_limited_until < $2)
        order by id
        """,
        start, start + _HOUR,
    )  # fmt: skip
    parts = [rows[n : n + size] for n in range(0, len(rows), size)]
    batches = []
    for number, part in enumerate(parts):
        after = now + (start + _HOUR - now) * number / len(parts)
        due = tuple(row["id"] for row in part if row["waits_until"] is None or row["waits_until"] <= after)
        if due:
            batches.append(Batch(due, after))
    return batches


async def order(connection: Connection, now: datetime, size: int) -> tuple[int, int]:
    """Queue the hour's batches; returns how many are new, and how many people are due. Bears repetition."""
    batches = await plan(connection, now, size)
    jobs = [
        NewJob(
            {"userIds": [str(one) for one in batch.listeners]}, key=f"{now:%Y-%m-%dT%H}:{batch.listeners[0]}",
            after=batch.after,
        )
        for batch in batches
    ]  # fmt: skip
    return await queue.enqueue_many(connection, KIND, jobs), sum(len(batch.listeners) for batch in batches)


# -- jobs ----------------------------------------------------------------------------------------------------------


@schedule("listening", cron="0 * * * *", catch_up=True)
@job(PLAN_KIND, concurrency=1, retries=5, timeout_seconds=120)
async def hourly(context: JobContext, payload: dict[str, Any]) -> None:
    """Order the hour's batches."""
    listening: Listening = context.resources["listening"]
    async with context.database.acquire() as connection, connection.transaction():
        batches, people = await order(connection, listening.clock(), listening.settings.batch_size)
    context.log.info("people due", people=people, batches=batches)


# No limit over all workers: one that has died would count until its heartbeat is lost, and the hour be over. How many
# people are polled at the same time is each process's own limit.
@job(KIND, retries=5, timeout_seconds=900)
async def archive(context: JobContext, payload: dict[str, Any]) -> None:
    """Archive a batch. Where Spotify wants a rest, the batch waits for its end and goes on with who is left."""
    try:
        report = await archive_batch(context.resources["listening"], _ids(payload), context.log)
    except Misconfigured as error:
        raise Held(str(error)) from error
    if report.rest_seconds is not None:
        raise Saturated(report.rest_reason, report.rest_seconds)


def _ids(payload: dict[str, Any]) -> list[UUID]:
    return [UUID(one) for one in payload["userIds"]]


JOBS = (hourly, archive)


# -- routes --------------------------------------------------------------------------------------------------------


class Ordered(Answer):
    """Jobs that are new, and the people who are due in this hour."""

    status: Literal["success"] = "success"
    batches: int
    listeners: int


@route("POST", "/api/cron/archive", answers={202: Ordered}, access="cron")
async def cron_archive(call: Call) -> Ordered:
    """Order the hour's batches, as the sidecar's own schedule does each hour."""
    listening: Listening = call.resources["listening"]
    async with call.database.acquire() as connection, connection.transaction():
        batches, people = await order(connection, listening.clock(), listening.settings.batch_size)
    return Ordered(batches=batches, listeners=people)


class ArchiveOrder(Body):
    user_ids: Annotated[list[Annotated[UUID, Field(strict=False)]], Field(min_length=1, max_length=_MOST_PEOPLE)] = (
        Field(alias="userIds", description="ids of listeners")
    )


class PersonArchived(Answer):
    user_id: UUID = Field(alias="userId")
    status: Literal["successful", "skipped", "failed"]
    reason: str | None = Field(description="why it did not succeed")
    songs_archived: int = Field(alias="songsArchived")


class BatchArchived(Answer):
    processed: int
    successful: int
    skipped: int
    failed: int
    total_songs_archived: int = Field(alias="totalSongsArchived")
    duration_ms: int = Field(alias="durationMs")
    results: list[PersonArchived]


@route("POST", "/api/queue/archive-batch", answers={200: BatchArchived}, refuses=(503,), access="cron")
async def queue_archive_batch(call: Call, body: ArchiveOrder) -> BatchArchived:
    """Archive these people now, each in isolation, and tell what became of each.

    503 while Spotify wants a rest, or while a setting is missing.
    """
    await _check_gate(call.database)
    try:
        report = await archive_batch(call.resources["listening"], body.user_ids, call.log)
    except Misconfigured:
        raise Refused(503, "the listening jobs are not set up") from None
    if report.rest_seconds is not None:
        async with call.database.acquire() as connection:
            await gates.close(connection, KIND, timedelta(seconds=report.rest_seconds), report.rest_reason)
    return _told(report)


async def _check_gate(database: Database) -> None:
    async with database.acquire() as connection, connection.transaction():
        closed = await gates.closed(connection, [KIND])
    if KIND in closed:
        raise Refused(503, "Spotify is given a rest", {"Retry-After": str(int(closed[KIND]) + 1)})


def _told(report: Report) -> BatchArchived:
    outcomes: Sequence[Any] = report.outcomes
    return BatchArchived(
        processed=len(outcomes), successful=report.count("successful"), skipped=report.count("skipped"),
        failed=report.count("failed"), total_songs_archived=report.songs, duration_ms=report.duration_ms,
        results=[
            PersonArchived(user_id=one.listener, status=one.status, reason=one.reason, songs_archived=one.songs)
            for one in outcomes
        ],
    )  # fmt: skip


ROUTES = (cron_archive, queue_archive_batch)
