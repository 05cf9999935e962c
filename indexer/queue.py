"""Jobs, as they are ordered: in the caller's own transaction, so that they are there if it commits and only then.

The workers' side is in indexer/sidecar; this one needs nothing but a connection. The tables are PgQueuer's, with ours
beside them (sql/0005_queue.sql). A key makes a job the only one of its kind while it waits or runs; with a window it is
used up for that long, even once the job is done.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypeAlias

import asyncpg
import msgspec

from indexer.db import Connection
from indexer.errors import UsageError

After: TypeAlias = datetime | timedelta | None

_KIND = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")
# an index holds no longer ones
_LONGEST_KEY = 500


class NewJob(msgspec.Struct, frozen=True):
    """A job to be queued. Higher priorities go first, equal ones in the order of queueing; `after`: not before."""

    payload: Mapping[str, Any]
    key: str | None = None
    priority: int = 0
    after: After = None


async def enqueue(
    connection: Connection, kind: str, payload: Mapping[str, Any], *, key: str | None = None, priority: int = 0,
    after: After = None, window: timedelta | None = None,
) -> bool:  # fmt: skip
    """Queue a job in the caller's transaction.

    False where a job of that kind and key waits or runs already, or has been queued within its window.
    """
    return await enqueue_many(connection, kind, [NewJob(payload, key, priority, after)], window=window) == 1


async def enqueue_many(
    connection: Connection, kind: str, jobs: Sequence[NewJob], *, window: timedelta | None = None
) -> int:
    """Queue many jobs at once; returns how many were new."""
    _check(kind, jobs)
    return int(
        await connection.fetchval(
            """
            with given as materialized (
                select nextval('indexer.pgqueuer_id_seq') as id, payload, key, priority,
                       coalesce(moment, now()) + coalesce(delay, interval '0') as execute_after
                from unnest($2::bytea[], $3::text[], $4::int[], $5::timestamptz[], $6::interval[])
                    with ordinality as jobs (payload, key, priority, moment, delay, place)
                order by place
            ), taken as (
                insert into indexer.job_window as known (kind, key, until)
                select distinct on (key) $1, key, now() + $7 from given
                where key is not null and $7::interval is not null
                order by key
                on conflict (kind, key) do update set until = excluded.until where known.until <= now()
                returning key
            ), queued as (
                -- in the order of the keys: two transactions with the same ones wait for each other, but in no circle
                insert into indexer.pgqueuer (id, entrypoint, payload, dedupe_key, priority, execute_after, status)
                select id, $1, payload, $1 || ':' || key, priority, execute_after, 'queued' from given
                where $7::interval is null or key is null or key in (select key from taken)
                order by key, id
                on conflict (dedupe_key) where status in ('queued', 'picked') and dedupe_key is not null do nothing
                returning id, priority
            ), logged as (
                insert into indexer.pgqueuer_log (job_id, status, entrypoint, priority)
                select id, 'queued', $1, priority from queued
            )
            select count(*) from queued
            """,
            kind, *_columns(jobs), window,
        )
    )  # fmt: skip


def _check(kind: str, jobs: Sequence[NewJob]) -> None:
    if not _KIND.fullmatch(kind):
        raise ValueError(f"{kind!r} is no kind of job: write it as words of a-z, 0-9 and _, joined by dots")
    for job in jobs:
        if job.key is not None and not 0 < len(job.key) <= _LONGEST_KEY:
            raise ValueError(f"a job's key has 1 to {_LONGEST_KEY} characters, not {len(job.key)}")


def _columns(jobs: Sequence[NewJob]) -> tuple[list[Any], ...]:
    """The jobs as Postgres' arrays: payloads, keys, priorities, moments, delays."""
    encode = msgspec.json.Encoder().encode
    return (
        [encode(job.payload) for job in jobs],
        [job.key for job in jobs],
        [job.priority for job in jobs],
        [job.after if isinstance(job.after, datetime) else None for job in jobs],
        [job.after if isinstance(job.after, timedelta) else None for job in jobs],
    )


def spread(key: str, seconds: float) -> timedelta:
    """A moment within so many seconds that is always the same for the key, and even over many keys."""
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return timedelta(seconds=seconds * digest / 2**64)


class Depth(msgspec.Struct, frozen=True):
    """How many jobs of a kind are waiting, running, held or unfinal (`state`); `seconds`: the oldest is so old."""

    kind: str
    state: str
    jobs: int
    seconds: float


async def depth(connection: Connection, *, timeout: float | None = None) -> list[Depth]:
    """The whole queue, by kind and state; `timeout` in seconds, by default the connection's."""
    rows = await connection.fetch(
        """
        with jobs as (
            select entrypoint as kind,
                   case status when 'picked' then 'running' when 'failed' then 'held' else 'waiting' end as state,
                   case status when 'queued' then execute_after else updated end as since
            from indexer.pgqueuer
            union all
            select kind, 'unfinal', now() from indexer.waiting_job
        )
        select kind, state, count(*) as jobs, greatest(extract(epoch from now() - min(since)), 0)::float8 as seconds
        from jobs group by kind, state order by kind, state
        """,
        timeout=timeout,
    )
    return [Depth(**dict(row)) for row in rows]


# -- jobs of blocks that may still be reorganised ------------------------------------------------------------------


async def keep_waiting(
    connection: Connection, chain: int, number: int, kind: str, jobs: Sequence[NewJob], *,
    window: timedelta | None = None,
) -> None:  # fmt: skip
    """Keep what the block `number` orders until the block is final."""
    _check(kind, jobs)
    await connection.execute(
        """
        insert into indexer.waiting_job (chain, number, kind, payload, key, priority, execute_after, window_length)
        select $1, $2, $3, payload, key, priority, coalesce(moment, now()) + coalesce(delay, interval '0'), $9
        from unnest($4::bytea[], $5::text[], $6::int[], $7::timestamptz[], $8::interval[])
            with ordinality as jobs (payload, key, priority, moment, delay, place)
        order by place
        """,
        chain, number, kind, *_columns(jobs), window,
    )  # fmt: skip


async def release(connection: Connection, chain: int, final: int) -> None:
    """Queue, in the caller's transaction, what has waited for the blocks up to `final`, which can't change any more."""
    rows = await connection.fetch(
        """
        with freed as (
            delete from indexer.waiting_job where chain = $1 and number <= $2
            returning id, kind, payload, key, priority, execute_after, window_length
        )
        select * from freed order by id
        """,
        chain, final,
    )  # fmt: skip
    together: dict[tuple[str, timedelta | None], list[NewJob]] = defaultdict(list)
    for row in rows:
        job = NewJob(msgspec.json.decode(row["payload"]), row["key"], row["priority"], row["execute_after"])
        together[row["kind"], row["window_length"]].append(job)
    for (kind, window), jobs in together.items():
        await enqueue_many(connection, kind, jobs, window=window)


async def forget(connection: Connection, chain: int, number: int) -> None:
    """Drop what the blocks after `number` have ordered: they are undone."""
    await connection.execute("delete from indexer.waiting_job where chain = $1 and number > $2", chain, number)


# -- jobs that operators act on ------------------------------------------------------------------------------------


async def requeue(connection: Connection, numbers: Sequence[int]) -> int:
    """Have held jobs wait again, with all their tries; returns how many.

    Raises UsageError, and changes nothing, where another job of the same key waits or runs by now.
    """
    try:
        async with connection.transaction():
            done = await logged(
                connection,
                """
                update indexer.pgqueuer set status = 'queued', attempts = 0, execute_after = now(), updated = now()
                where id = any($1) and status = 'failed'
                """,
                numbers, "queued", None,
            )  # fmt: skip
            await connection.execute("delete from indexer.job_death where job = any($1)", list(numbers))
            await wake(connection)
    except asyncpg.UniqueViolationError:
        raise UsageError("another job of the same key waits or runs by now: cancel one of the two") from None
    return done


async def logged(
    connection: Connection, change: str, numbers: Sequence[int], status: str, reason: str | None
) -> int:
    """Carry out the change, and log it for the jobs that it met."""
    rows = await connection.fetch(change + " returning id, entrypoint, priority", list(numbers))
    details = reason and msgspec.json.encode(
        {"exception_type": "Held", "exception_message": reason, "traceback": "", "additional_context": None}
    ).decode()
    await connection.execute(
        """
        insert into indexer.pgqueuer_log (job_id, entrypoint, priority, status, traceback)
        select id, entrypoint, priority, $4::text::indexer.pgqueuer_status, $5::jsonb
        from unnest($1::bigint[], $2::text[], $3::int[]) as jobs (id, entrypoint, priority)
        """,
        [row["id"] for row in rows], [row["entrypoint"] for row in rows], [row["priority"] for row in rows],
        status, details,
    )  # fmt: skip
    return len(rows)


async def wake(connection: Connection) -> None:
    """Have the workers look for jobs at once."""
    await connection.execute(
        """
        select pg_notify('ch_pgqueuer', json_build_object('channel', 'ch_pgqueuer', 'operation', 'update',
            'sent_at', now(), 'table', 'pgqueuer', 'type', 'table_changed_event')::text)
        """
    )
