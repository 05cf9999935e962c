"""Play counts as they are now: the jobs of a snapshot. A run of the actor is paid for when it starts.

So its id is stored before anything else is done with it, and a job that is repeated goes on from there. Where a worker
died between asking for a run and knowing its id, nobody can say whether it was started: that is for an operator.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any
from uuid import UUID

from indexer.db import Connection
from indexer.sidecar import calls, jobs, providers, snapshots
from indexer.sidecar.jobs import JobContext, job
from indexer.sidecar.providers import PlayCounts, ProviderError, Run, with_backoff
from indexer.sidecar.scope import learn
from indexer.sidecar.snapshots import CHUNK_KIND, FINISH_KIND, Chunk

_PROVIDER = "apify"
_RETRIES = 5
# For a provider that is saturated and names no time itself.
_REST_SECONDS = 300.0
# With these nothing was started; what a gateway says (502, 504) tells nothing of what is behind it.
_NOT_STARTED = frozenset({*range(400, 500), 503})


@job(CHUNK_KIND, concurrency=4, retries=_RETRIES, timeout_seconds=timedelta(hours=2).total_seconds())
async def chunk(context: JobContext, payload: dict[str, Any]) -> None:
    """A part of a snapshot: one run of the actor, and what it has read."""
    async with context.database.acquire() as connection:
        one = await snapshots.begin(connection, UUID(payload["chunk"]))
    if one is None:
        return
    try:
        await _measure(context, one)
    except providers.Saturated as error:
        raise jobs.Saturated(str(error), error.retry_after or _REST_SECONDS) from error
    except ProviderError as error:
        await _fail(context, one.id)
        raise jobs.Held(str(error)) from error
    except jobs.Held:
        await _fail(context, one.id)
        raise
    except Exception:
        if context.attempt > _RETRIES:
            await _fail(context, one.id)
        raise


async def _measure(context: JobContext, one: Chunk) -> None:
    run = one.run or (await _start(context, one)).id
    try:
        counts: PlayCounts = await context.resources[_PROVIDER].collect(run)
    except (providers.Failed, providers.Terminal) as error:
        if await _is_lost(context, run, error):
            async with context.database.acquire() as connection:
                await snapshots.forget_run(connection, one.id)
        raise
    plays = await _by_song(context, counts)

    async def store(connection: Connection) -> None:
        await snapshots.measure(connection, one, plays)

    await calls.kept(context.database, store)
    context.log.info("snapshot measured", songs=len(plays), rows=len(counts.rows), dropped=counts.dropped)


async def _start(context: JobContext, one: Chunk) -> Run:
    if one.asked:
        async with context.database.acquire() as connection:
            await snapshots.note_refused(connection, one.id, started=True)
        raise jobs.Held("a worker died while it asked for a run, which may have been started: requeue to start another")
    # A run that may have been started is not asked for again: only what says clearly that it was not.
    return await with_backoff(lambda: _ask(context, one))


async def _ask(context: JobContext, one: Chunk) -> Run:
    """Ask for a run once. Raises Held where it may have been started though no answer says so."""
    number = await calls.begin(context.database, _PROVIDER, None, None)
    async with context.database.acquire() as connection:
        await snapshots.note_asking(connection, one.id)
    try:
        run: Run = await context.resources[_PROVIDER].start(one.albums)
    except ProviderError as error:
        surely_not = not error.asked or error.status in _NOT_STARTED
        await calls.refused(context.database, number, error, final=False)
        async with context.database.acquire() as connection:
            await snapshots.note_refused(connection, one.id, started=not surely_not)
        if surely_not:
            raise
        raise jobs.Held(f"{error}; a run may have been started: requeue to start another") from error

    async def store(connection: Connection) -> None:
        await snapshots.note_run(connection, one.id, run.id)
        await calls.answered(connection, number, 201, "2xx", final=False)

    await calls.kept(context.database, store)
    return run


async def _is_lost(context: JobContext, run: str, error: ProviderError) -> bool:
    """Whether nothing can come of the run any more: it is not there, or it ended badly."""
    if error.status == 404:
        return True
    try:
        found: Run = await context.resources[_PROVIDER].run(run)
    except ProviderError:
        return False
    return found.over and found.status != "SUCCEEDED"


async def _by_song(context: JobContext, counts: PlayCounts) -> dict[str, int]:
    """The counts by ISRC; of several tracks of a song the highest, which is what its page shows."""
    tracks = {row.track_id: row for row in counts.rows}
    songs = await _songs(context, tracks)
    plays: dict[str, int] = {}
    for row in counts.rows:
        if (song := songs.get(row.track_id)) is not None:
            plays[song] = max(row.play_count, plays.get(song, 0))
    return plays


async def _songs(context: JobContext, tracks: Collection[str]) -> dict[str, str]:
    """The ISRC of each track: what we know, and for the others what Spotify says."""
    async with context.database.acquire() as connection:
        rows = await connection.fetch(
            """
            select value, song from song_identifiers
            where platform = 'spotify' and identifier_type = 'track_id' and value = any($1)
            """,
            list(tracks),
        )
    known = {row["value"]: row["song"] for row in rows}
    unknown = [track for track in tracks if track not in known]
    if unknown:
        found = await with_backoff(lambda: context.resources["spotify"].tracks(unknown))
        async with context.database.acquire() as connection, connection.transaction():
            known |= await learn(connection, list(found.values()))
    return known


async def _fail(context: JobContext, chunk_id: UUID) -> None:
    async with context.database.acquire() as connection, connection.transaction():
        await snapshots.fail(connection, chunk_id)


@job(FINISH_KIND, retries=_RETRIES, timeout_seconds=300)
async def finish(context: JobContext, payload: dict[str, Any]) -> None:
    """The end of a snapshot, with our own plays if they are wanted."""
    snapshot = UUID(payload["snapshot"])
    try:
        async with context.database.acquire() as connection, connection.transaction():
            await snapshots.finish(connection, snapshot)
    except Exception:
        if context.attempt > _RETRIES:
            async with context.database.acquire() as connection:
                await snapshots.give_up(connection, snapshot)
        raise


JOBS = [chunk, finish]
