"""What a person's page shows, read for that person alone, in one snapshot of the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Literal, TypeAlias
from uuid import UUID

import msgspec
from asyncpg import Record

from indexer.db import Connection
from indexer.sidecar.listening.reads import Older, State, history, top_artists, top_tracks
from indexer.sidecar.paging import cut

WindowName: TypeAlias = Literal["7d", "30d", "90d", "365d", "all"]
WINDOWS: Mapping[WindowName, tuple[str, timedelta | None]] = {
    "7d": ("7 days", timedelta(days=7)),
    "30d": ("30 days", timedelta(days=30)),
    "90d": ("90 days", timedelta(days=90)),
    "365d": ("A year", timedelta(days=365)),
    "all": ("All time", None),
}
DAYS = 30
TOP = 10
PLAYS = 25

class Standing(msgspec.Struct, frozen=True):
    """How it goes with a person's archive; `until` of a cool-down or a wait for Spotify."""

    display_name: str | None
    member_since: datetime
    state: State
    until: datetime | None
    failure: str | None
    last_polled_at: datetime | None
    next_from: datetime | None
    plays: int
    first_play: datetime | None


class Ranked(msgspec.Struct, frozen=True):
    """A track (with its artists) or an artist (without), and how often it was played; `cover`: whose colour it has."""

    id: str
    name: str
    plays: int
    cover: str
    artists: str


class Totals(msgspec.Struct, frozen=True):
    """Of a window; `hours` if every play had been heard to its end."""

    plays: int
    tracks: int
    artists: int
    hours: float


class Play(msgspec.Struct, frozen=True):
    """A line of the timeline."""

    played_at: datetime
    track: str
    name: str
    artists: str
    album: str | None
    cover: str


class Facts(msgspec.Struct, frozen=True):
    """Of one page; `older` is the cursor of the next one of its timeline."""

    standing: Standing
    days: Sequence[tuple[date, int]]
    totals: Totals
    week: Mapping[tuple[int, int], int]
    tracks: Sequence[Ranked]
    artists: Sequence[Ranked]
    plays: Sequence[Play]
    older: str | None


async def facts(
    connection: Connection, listener: UUID, window: WindowName, place: Older | None, now: datetime
) -> Facts | None:
    """Everything on the page; None where there is no such person."""
    span = WINDOWS[window][1]
    since = now - span if span else None
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        found = await standing(connection, listener, now)
        if found is None:
            return None
        rows = await history(connection, listener, place, PLAYS)
        plays, older = cut(rows, PLAYS, lambda row: Older(row["played_at"], row["track"]))
        return Facts(
            standing=found,
            days=await days(connection, listener, now),
            totals=await totals(connection, listener, since),
            week=await week(connection, listener, since),
            tracks=[_ranked(row) for row in await top_tracks(connection, listener, since, TOP)],
            artists=[_ranked(row) for row in await top_artists(connection, listener, since, TOP)],
            plays=[_play(row) for row in plays],
            older=older,
        )


async def standing(connection: Connection, listener: UUID, now: datetime) -> Standing | None:
    """How it goes with the archive. The next poll is within the hour that begins at `next_from`."""
    row = await connection.fetchrow(
        """
        select display_name, created_at as member_since, last_polled_at, last_failure_type as failure,
            case
                when not is_active or refresh_token is null then 'disconnected'
                when cooling_until > $2 then 'cooling_down'
                when rate_limited_until > $2 then 'rate_limited'
                else 'active' end as state,
            case
                when cooling_until > $2 then cooling_until
                when rate_limited_until > $2 then rate_limited_until end as until,
            greatest(
                $2, date_trunc('hour', last_polled_at, 'UTC') + interval '1 hour', cooling_until, rate_limited_until
            ) as next_from,
            (select count(*) from play_events where listener = id) as plays,
            (select min(played_at) from play_events where listener = id) as first_play
        from listeners where id = $1
        """,
        listener, now,
    )  # fmt: skip
    if row is None:
        return None
    told = dict(row)
    if told["state"] == "disconnected":
        told.update(until=None, next_from=None)
    return Standing(**told)


async def places_left(connection: Connection, cap: int) -> int:
    """How many more may connect."""
    taken = await connection.fetchval("select taken from listener_places where tier = 'founding'")
    return max(0, cap - int(taken or 0))


async def days(connection: Connection, listener: UUID, now: datetime) -> list[tuple[date, int]]:
    """Plays of each of the last days in UTC, today the last one, those without any included."""
    rows = await connection.fetch(
        """
        with span as (
            select ($2::timestamptz at time zone 'UTC')::date - ago as date from generate_series(0, $3 - 1) as ago
        )
        select date, (
            select count(*) from play_events
            where listener = $1 and played_at >= date::timestamp at time zone 'UTC'
              and played_at < (date + 1)::timestamp at time zone 'UTC'
        ) as plays
        from span order by date
        """,
        listener, now, DAYS,
    )  # fmt: skip
    return [(row["date"], row["plays"]) for row in rows]


async def totals(connection: Connection, listener: UUID, since: datetime | None) -> Totals:
    """Of the plays since then."""
    row = await connection.fetchrow(
        """
        with heard as (
            select track, count(*) as plays from play_events
            where listener = $1 and ($2::timestamptz is null or played_at >= $2) group by track
        )
        select coalesce(sum(plays), 0)::bigint as plays, count(*) as tracks,
            (select count(distinct artist) from track_artists join heard using (track)) as artists,
            coalesce(sum(plays * duration_ms), 0)::float8 / 3600000 as hours
        from heard join spotify_tracks on spotify_id = track
        """,
        listener, since,
    )  # fmt: skip
    assert row is not None
    return Totals(**dict(row))


async def week(connection: Connection, listener: UUID, since: datetime | None) -> dict[tuple[int, int], int]:
    """Plays by weekday (0: Monday) and hour, both in UTC."""
    rows = await connection.fetch(
        """
        select extract(isodow from at)::int - 1 as weekday, extract(hour from at)::int as hour, count(*) as plays
        from play_events, lateral (select played_at at time zone 'UTC' as at) as there
        where listener = $1 and ($2::timestamptz is null or played_at >= $2)
        group by 1, 2
        """,
        listener, since,
    )  # fmt: skip
    return {(row["weekday"], row["hour"]): row["plays"] for row in rows}


def _ranked(row: Record) -> Ranked:
    ids = row["artist_ids"] or (row["id"],)
    return Ranked(row["id"], row["name"], row["plays"], ids[0], ", ".join(row["artist_names"] or ()))


def _play(row: Record) -> Play:
    ids = row["artist_ids"] or (row["track"],)
    artists = ", ".join(row["artist_names"] or ())
    return Play(row["played_at"], row["track"], row["name"], artists, row["album_name"], ids[0])
