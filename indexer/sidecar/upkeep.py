"""What is done beside the jobs every now and then: the queue's metrics, and old rows away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from indexer import log, metrics, queue
from indexer.config import Settings
from indexer.db import Connection, Database
from indexer.errors import DatabaseUnavailable
from indexer.sidecar import calls, gates
from indexer.sidecar.listening import operators

STATES = ("waiting", "running", "held", "unfinal")

_LOOK_SECONDS = 5.0
_PRUNE_SECONDS = 600.0
_ROWS = 10_000


async def keep_up(database: Database, settings: Settings, kinds: Collection[str]) -> None:
    """Look at the queue every few seconds, and prune now and then, until cancelled."""
    pruned_at = -_PRUNE_SECONDS
    while True:
        database.publish()
        try:
            async with database.acquire() as connection:
                await publish(connection, kinds)
                await operators.publish(connection, datetime.now(UTC))
                await publish_halts(connection)
                # every sidecar's figure is that of all: who asks the provider is chance
                await calls.left(connection, "songstats", settings.providers.songstats.monthly_budget)
                if time.monotonic() - pruned_at >= _PRUNE_SECONDS:
                    pruned_at = time.monotonic()
                    await prune(connection, timedelta(days=settings.sidecar.log_days))
        except DatabaseUnavailable:
            pass  # the worker says what is wrong with it
        await asyncio.sleep(_LOOK_SECONDS)


async def publish(connection: Connection, kinds: Collection[str]) -> None:
    """The queue's depth and age as metrics. A kind that we don't work off is `other`."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for one in await queue.depth(connection):
        key = (one.kind if one.kind in kinds else "other", one.state)
        number, seconds = found.get(key, (0, 0.0))
        found[key] = (number + one.jobs, max(seconds, one.seconds))
    for kind in (*kinds, "other"):
        for state in STATES:
            number, seconds = found.get((kind, state), (0, 0.0))
            metrics.jobs.labels(kind, state).set(number)
            if state != "unfinal":  # when that is due says the chain
                metrics.job_oldest_seconds.labels(kind, state).set(seconds)
    closed = {one["kind"] for one in await gates.standing(connection)}
    for kind in kinds:
        metrics.gate_closed.labels(kind).set(kind in closed)


async def publish_halts(connection: Connection) -> None:
    """The halts of the database's chains: the daemon that a hook has halted ends before anybody could ask it.

    An old chain, put aside by `chain accept`, goes on no more and needs nobody.
    """
    rows = await connection.fetch(
        """
        select distinct chain.name, failure.hook from indexer.failure join indexer.chain on chain.id = failure.chain
        where failure.resolved_at is null and failure.policy = 'halt' and strpos(chain.name, '@') = 0
        """
    )
    metrics.halted.clear()
    for row in rows:
        metrics.halted.labels(row["name"], row["hook"]).set(1)


async def prune(connection: Connection, keep: timedelta) -> None:
    """Take away the log's old rows (a held job keeps its own), keys that hold no longer, and notes on what is gone."""
    if not await connection.fetchval("select pg_try_advisory_lock(hashtext('indexer.prune'), 0)"):
        return  # another worker is at it
    try:
        rows = deleted = await _prune_log(connection, keep)
        while deleted == _ROWS:
            deleted = await _prune_log(connection, keep)
            rows += deleted
        await connection.execute("delete from indexer.job_window where until < now()")
        await connection.execute(
            "delete from indexer.job_death where not exists (select from indexer.pgqueuer where id = job)"
        )
        await connection.execute("delete from indexer.job_gate where until < now()")
        await connection.execute("delete from listening_keys where until < now()")
    finally:
        await connection.execute("select pg_advisory_unlock(hashtext('indexer.prune'), 0)")
    if rows:
        log.get().info("job log pruned", rows=rows)


async def _prune_log(connection: Connection, keep: timedelta) -> int:
    return int(
        await connection.fetchval(
            """
            with gone as (
                delete from indexer.pgqueuer_log where id in (
                    select old.id from indexer.pgqueuer_log as old
                    where created < now() - $1::interval and not exists (
                        select from indexer.pgqueuer as job where job.id = old.job_id and job.status = 'failed'
                    )
                    order by created limit $2
                )
                returning id
            )
            select count(*) from gone
            """,
            keep, _ROWS,
        )
    )  # fmt: skip
