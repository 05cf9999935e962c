"""What has been measured, and how far it is. Catalogs and snapshots are their account's alone; counts are anybody's.

A song's count stands on a public page of its platform, so that who has it measured and who reads it need not be the
same account; which account has ordered what is in none of these answers.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field, RootModel

from indexer.sidecar.drain import METRIC
from indexer.sidecar.measurements import NO_CATALOG
from indexer.sidecar.paging import Page, Position, Text, Time, cut, decode
from indexer.sidecar.routes import Answer, Call, Query, Refused, route
from indexer.sidecar.scope import owns

State = Literal["queued", "running", "done", "failed"]
Platform = Literal["spotify", "chain"]
Source = Literal["songstats", "apify_spotify_playcount", "chain"]
Name = Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,64}$")]

_NO_TASK = "There is no such run"
_NONE = "There are no such measurements"


# -- how far a run is ----------------------------------------------------------------------------------------------


class RunQuery(Query):
    id: UUID = Field(description="of a snapshot, or of one of its jobs")


class RunJob(Answer):
    """A part of a snapshot."""

    id: UUID
    state: State
    album_count: int


class RunTold(Answer):
    """A snapshot with its jobs, or one of its jobs, whose `snapshot` is another id than its own."""

    status: Literal["success"] = "success"
    id: UUID
    snapshot: UUID
    source: Literal["current"] = "current"
    state: State
    album_count: int
    estimated_cost_usd: float
    platforms: list[str]
    schedule: str
    created_at: datetime
    updated_at: datetime
    jobs: list[RunJob]


@route("GET", "/api/tasks/runs", answers={200: RunTold}, refuses=(404,))
async def runs(call: Call, query: RunQuery) -> RunTold:
    """How far a snapshot is, or one of its jobs. Another account's is 404, as if it were not there."""
    async with call.database.acquire() as connection:
        rows = await connection.fetch(
            """
            select snapshot.id as snapshot, snapshot.state, snapshot.album_count, snapshot.platforms,
                   snapshot.estimated_cost_usd::float8 as estimated_cost_usd, snapshot.schedule, snapshot.created_at,
                   snapshot.updated_at, chunk.id as job, chunk.state as job_state,
                   cardinality(chunk.album_ids) as job_albums
            from playcount_snapshots as snapshot
            left join playcount_chunks as chunk on chunk.snapshot = snapshot.id
            where snapshot.account = $1
              and snapshot.id in ($2, (select snapshot from playcount_chunks where id = $2))
            order by chunk.number
            """,
            call.account, query.id,
        )  # fmt: skip
    if not rows:
        raise Refused(404, _NO_TASK)
    jobs = [RunJob(id=row["job"], state=row["job_state"], album_count=row["job_albums"]) for row in rows if row["job"]]
    names = ("snapshot", "state", "album_count", "estimated_cost_usd", "platforms", "schedule", "created_at")
    told = {name: rows[0][name] for name in (*names, "updated_at")}
    if query.id != told["snapshot"]:
        jobs = [one for one in jobs if one.id == query.id]
        told |= {"state": jobs[0].state, "album_count": jobs[0].album_count}
    return RunTold(id=query.id, jobs=jobs, **told)


# -- a track -------------------------------------------------------------------------------------------------------


class TrackPath(Query):
    track: Name = Field(description="an ISRC, or Spotify's id of a track")


class TrackQuery(Page):
    platform: Platform = "spotify"
    metric: Annotated[str, Field(max_length=100)] = METRIC
    aggregate: Literal["run_rate"] | None = Field(default=None, description="plays a year instead of captures")
    window: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}d$")] = Field(
        default="365d", description="the last so many days, for run_rate"
    )


class Capture(Answer):
    value: int
    captured_at: datetime
    data_source: Source


class TrackSeries(Answer):
    """The captures of a song, oldest first; `next` is the next page's cursor."""

    status: Literal["success"] = "success"
    isrc: str
    platform: Platform
    metric: str
    measurements: list[Capture]
    next: str | None


class RunRate(Answer):
    """What a song's count has grown by between two captures, and what that is in a year of 365 days."""

    status: Literal["success"] = "success"
    isrc: str
    platform: Platform
    metric: str
    delta: int
    run_rate_annualized: float
    first_captured_at: datetime
    last_captured_at: datetime


class TrackTold(RootModel[TrackSeries | RunRate]):
    pass


class AfterCapture(Position, frozen=True):
    captured_at: Time


@route("GET", "/api/research/tracks/{track}/measurements", answers={200: TrackTold}, refuses=(404,))
async def track_measurements(call: Call, path: TrackPath, query: TrackQuery) -> TrackTold:
    """What was measured of a song: its captures, oldest first, or how many plays a year they come to.

    With aggregate=run_rate the captures nearest to both ends of the window are compared; one alone is 404.
    """
    place = decode(AfterCapture, query.cursor)
    async with call.database.acquire() as connection:
        isrc = await connection.fetchval(
            """
            select isrc from songs where isrc = upper(replace($1, '-', ''))
            union all
            select song from song_identifiers
            where platform = 'spotify' and identifier_type = 'track_id' and value = $1
            limit 1
            """,
            path.track,
        )
        if isrc is None:
            raise Refused(404, _NONE)
        same = {"isrc": isrc, "platform": query.platform, "metric": query.metric}
        if query.aggregate is not None:
            days = int(query.window.removesuffix("d"))
            return TrackTold(RunRate(**same, **await _run_rate(connection, isrc, query.platform, query.metric, days)))
        rows = await connection.fetch(
            """
            select value, captured_at, data_source from song_measurements
            where song = $1 and platform = $2 and metric = $3 and captured_at > coalesce($4::timestamptz, '-infinity')
            order by captured_at limit $5 + 1
            """,
            isrc, query.platform, query.metric, place and place.captured_at, query.limit,
        )  # fmt: skip
    if not rows and place is None:
        raise Refused(404, _NONE)
    page, cursor = cut(rows, query.limit, lambda row: AfterCapture(row["captured_at"]))
    return TrackTold(TrackSeries(**same, measurements=[Capture(**row) for row in page], next=cursor))


async def _run_rate(connection: Any, isrc: str, platform: str, metric: str, days: int) -> dict[str, Any]:
    row = await connection.fetchrow(
        """
        with ends as (
            select min(captured_at) as first, max(captured_at) as last from song_measurements
            where song = $1 and platform = $2 and metric = $3
              and captured_at between now() - make_interval(days => $4) and now()
        )
        select first as first_captured_at, last as last_captured_at, late.value - early.value as delta,
               extract(epoch from last - first)::float8 as seconds
        from ends
        join song_measurements as early on early.captured_at = first
        join song_measurements as late on late.captured_at = last
        where first < last and early.song = $1 and early.platform = $2 and early.metric = $3
          and late.song = $1 and late.platform = $2 and late.metric = $3
        """,
        isrc, platform, metric, days,
    )  # fmt: skip
    if row is None:
        raise Refused(404, _NONE)
    found = dict(row)
    return {**found, "run_rate_annualized": round(found["delta"] * 365 * 86_400 / found.pop("seconds"), 2)}


# -- an album, a catalog -------------------------------------------------------------------------------------------


class ListQuery(Page):
    platform: Platform = "spotify"
    metric: Annotated[str, Field(max_length=100)] = METRIC


class AlbumPath(Query):
    album: Name = Field(description="Spotify's id of an album")


class CatalogPath(Query):
    catalog: UUID


class SongLatest(Answer):
    """A song with the latest count that is known; null where there is none."""

    isrc: str
    name: str | None
    value: int | None
    captured_at: datetime | None
    data_source: Source | None


class SongList(Answer):
    """Songs by their ISRC; `next` is the next page's cursor."""

    status: Literal["success"] = "success"
    platform: Platform
    metric: str
    tracks: list[SongLatest]
    next: str | None


class AfterSong(Position, frozen=True):
    isrc: Text


@route("GET", "/api/research/albums/{album}/measurements", answers={200: SongList}, refuses=(404,))
async def album_measurements(call: Call, path: AlbumPath, query: ListQuery) -> SongList:
    """The latest count of each song of an album that has one."""
    place = decode(AfterSong, query.cursor)
    async with call.database.acquire() as connection:
        rows = await connection.fetch(
            """
            select isrc, name, latest.* from song_identifiers
            join songs on isrc = song
            join lateral (
                select value, captured_at, data_source from song_measurements as measured
                where measured.song = isrc and measured.platform = $2 and metric = $3
                order by captured_at desc limit 1
            ) as latest on true
            where song_identifiers.platform = 'spotify' and identifier_type = 'album_id'
              and song_identifiers.value = $1 and song > coalesce($4, '')
            order by song limit $5 + 1
            """,
            path.album, query.platform, query.metric, place and place.isrc, query.limit,
        )  # fmt: skip
    if not rows and place is None:
        raise Refused(404, _NONE)
    return _list(query, rows)


@route("GET", "/api/catalogs/{catalog}/measurements", answers={200: SongList}, refuses=(404,))
async def catalog_measurements(call: Call, path: CatalogPath, query: ListQuery) -> SongList:
    """Each song of a catalog with its latest count. Another account's catalog is 404, as if it were not there."""
    place = decode(AfterSong, query.cursor)
    async with call.database.acquire() as connection:
        if not await owns(connection, call.account, path.catalog):
            raise Refused(404, NO_CATALOG)
        rows = await connection.fetch(
            """
            select isrc, name, latest.* from catalog_songs
            join songs on isrc = song
            left join lateral (
                select value, captured_at, data_source from song_measurements as measured
                where measured.song = isrc and platform = $2 and metric = $3
                order by captured_at desc limit 1
            ) as latest on true
            where catalog = $1 and song > coalesce($4, '')
            order by song limit $5 + 1
            """,
            path.catalog, query.platform, query.metric, place and place.isrc, query.limit,
        )  # fmt: skip
    return _list(query, rows)


def _list(query: ListQuery, rows: Any) -> SongList:
    page, cursor = cut(rows, query.limit, lambda row: AfterSong(row["isrc"]))
    tracks = [SongLatest(**row) for row in page]
    return SongList(platform=query.platform, metric=query.metric, tracks=tracks, next=cursor)


ROUTES = (runs, track_measurements, album_measurements, catalog_measurements)
