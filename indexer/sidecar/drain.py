"""The past of songs, from Songstats, whose quota is small: each song is asked for once, the most played ones first.

What may happen, and what comes of it: an answer is stored together with the ledger's word that it is final; so is a
refusal that would be the same tomorrow. A saturated provider and a used up budget put the job back and close the gate.
A key that is refused or missing and what nobody can read is held for an operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time
from typing import Any

from indexer import queue
from indexer.config import Settings
from indexer.db import Connection, Database
from indexer.queue import NewJob
from indexer.sidecar import calls, gates, jobs, providers
from indexer.sidecar.calls import UsedUp
from indexer.sidecar.jobs import JobContext, job
from indexer.sidecar.providers import History, ProviderError, with_backoff

KIND = "songstats.history"
METRIC = "platform_displayed_play_count"

_PROVIDER = "songstats"
# It is our key that is wrong and not the song: nothing is known of any song by that.
_KEY_STATUSES = (401, 403)
# Ranks are 32 bits wide, and some songs have more plays.
_EXACT = 1 << 30
_MOST = (1 << 31) - 1


async def order(connection: Connection, isrcs: Sequence[str]) -> int:
    """Queue a job for each of these songs of which nothing is known, in the caller's transaction; returns how many."""
    rows = await connection.fetch(
        """
        select isrc, coalesce(latest.value, 0) as plays from unnest($1::text[]) as wanted (isrc)
        left join lateral (
            select value from song_measurements
            where song = isrc and platform = 'spotify' and metric = $2 order by captured_at desc limit 1
        ) as latest on true
        where not exists (select from song_measurements where song = isrc and data_source = 'songstats')
          and not exists (
              select from provider_calls as made where provider = $3 and made.isrc = wanted.isrc and final
          )
        order by plays desc, isrc
        """,
        list(isrcs), METRIC, _PROVIDER,
    )  # fmt: skip
    given = [NewJob({"isrc": row["isrc"]}, key=row["isrc"], priority=rank(row["plays"])) for row in rows]
    return await queue.enqueue_many(connection, KIND, given)


def rank(plays: int) -> int:
    """A count as a rank: exact up to a billion, above in steps of eight."""
    return min(plays if plays <= _EXACT else _EXACT + (plays - _EXACT) // 8, _MOST)


@job(KIND, concurrency=1, retries=8, timeout_seconds=900)
async def history(context: JobContext, payload: dict[str, Any]) -> None:
    """One song's history."""
    isrc: str = payload["isrc"]
    async with context.database.acquire() as connection:
        if await _known(connection, isrc):
            return
    try:
        await with_backoff(lambda: _ask(context, isrc))
    except UsedUp as error:
        await _close(context.database, str(error))
        # closed to the minute already
        raise jobs.Saturated(str(error), 0.0) from error
    except providers.Saturated as error:
        seconds = error.retry_after or context.settings.providers.songstats.rest_seconds
        raise jobs.Saturated(str(error), seconds) from error
    except ProviderError as error:
        if _is_final(error):
            raise jobs.Terminal(str(error)) from error
        if not error.asked or error.status in _KEY_STATUSES:
            await _close(context.database, str(error))
        raise jobs.Held(str(error)) from error


async def _ask(context: JobContext, isrc: str) -> None:
    """One call, in the ledger before it is made, and its answer stored in the transaction that calls it final."""
    number = await calls.begin(context.database, _PROVIDER, isrc, context.settings.providers.songstats.monthly_budget)
    try:
        found: History = await context.resources[_PROVIDER].history(isrc)
    except ProviderError as error:
        await calls.refused(context.database, number, error, final=_is_final(error))
        raise

    async def store(connection: Connection) -> None:
        await _store(connection, isrc, found, number)
        await calls.answered(connection, number, 200, "2xx", final=True)

    await calls.kept(context.database, store)
    context.log.info("history stored", points=len(found.points), dropped=found.dropped)


def _is_final(error: ProviderError) -> bool:
    return isinstance(error, providers.Terminal) and error.status not in _KEY_STATUSES


async def _store(connection: Connection, isrc: str, found: History, number: int) -> None:
    await connection.execute("insert into songs (isrc) values ($1) on conflict do nothing", isrc)
    await connection.execute(
        """
        insert into song_measurements (song, platform, metric, value, captured_at, data_source, raw_ref)
        select $1, 'spotify', $2, value, captured_at, 'songstats', $5
        from unnest($3::timestamptz[], $4::bigint[]) as points (captured_at, value)
        on conflict (song, platform, metric, captured_at) do nothing
        """,
        isrc, METRIC, [datetime.combine(point.day, time(), UTC) for point in found.points],
        [point.streams for point in found.points], f"{_PROVIDER}:{number}",
    )  # fmt: skip


async def _known(connection: Connection, isrc: str) -> bool:
    """Whether the song was asked for already: a job may run twice."""
    return bool(
        await connection.fetchval(
            """
            select exists (select from song_measurements where song = $1 and data_source = 'songstats')
                or exists (select from provider_calls where provider = $2 and isrc = $1 and final)
            """,
            isrc, _PROVIDER,
        )
    )  # fmt: skip


# -- what an operator's settings have stopped ----------------------------------------------------------------------


async def _close(database: Database, reason: str) -> None:
    """Close the gate until the month ends, or until the settings are others (see `resume`)."""
    async with database.acquire() as connection, connection.transaction():
        await gates.close(connection, KIND, await calls.end_of_month(connection), reason)


async def resume(connection: Connection, settings: Settings, *, run: bool = False) -> bool:
    """Open the gate if the budget has calls left and the gate was closed by settings; `run`: whatever closed it.

    The first is for the start of a process, which may have a new key or a higher budget.
    """
    if await calls.left(connection, _PROVIDER, settings.providers.songstats.monthly_budget) == 0:
        return False
    if not run:
        until = await calls.end_of_month(connection)
        if not await connection.fetchval(
            "select exists (select from indexer.job_gate where kind = $1 and until = $2)", KIND, until
        ):
            return False
    return await gates.open_(connection, KIND)
