"""What a person is told: the own history, what was heard most, the state of the archive, all of it as a file; and its
end. Every query has the session's person in it, and no route takes anybody's name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import asyncpg
from pydantic import Field

from indexer.db import Connection
from indexer.sidecar.listening import people, session
from indexer.sidecar.listening.export import CONTENT_TYPE, exported
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.paging import Page, Position, Text, Time, cut, decode
from indexer.sidecar.routes import Answer, Call, Query, Refused, Reply, route

State = Literal["active", "cooling_down", "rate_limited", "disconnected"]
_GONE = "Sign in with Spotify to see what is yours"


# -- history -------------------------------------------------------------------------------------------------------


class ArtistTold(Answer):
    id: str
    name: str


class AlbumTold(Answer):
    id: str
    name: str
    image_url: str | None


class TrackTold(Answer):
    """A track, its artists as Spotify names them, the first one first."""

    id: str
    name: str
    duration_ms: int | None
    isrc: str | None
    artists: list[ArtistTold]
    album: AlbumTold | None


class PlayTold(Answer):
    played_at: datetime
    track: TrackTold


class History(Answer):
    """Plays, the newest first; `next` is the next page's cursor."""

    status: Literal["success"] = "success"
    plays: list[PlayTold]
    next: str | None


class Older(Position, frozen=True):
    """Where a page of the history ended."""

    played_at: Time
    track: Text


@route("GET", "/me/history", answers={200: History}, access="listener")
async def me_history(call: Call, query: Page) -> History:
    """What I have heard, the newest first."""
    place = decode(Older, query.cursor)
    async with call.database.acquire() as connection:
        rows = await history(connection, call.listener, place, query.limit)
    page, cursor = cut(rows, query.limit, lambda row: Older(row["played_at"], row["track"]))
    return History(plays=[PlayTold(played_at=row["played_at"], track=_track(row)) for row in page], next=cursor)


async def history(connection: Connection, listener: UUID, place: Older | None, limit: int) -> Sequence[asyncpg.Record]:
    """Plays before `place`, the newest first, and one more than `limit`."""
    return await connection.fetch(
        """
        with page as (
            select played_at, track from play_events
            where listener = $1 and (played_at, track) < (coalesce($2, 'infinity'::timestamptz), coalesce($3, ''))
            order by played_at desc, track desc limit $4 + 1
        )
        select played_at, page.track, song.name, duration_ms, isrc, albums.spotify_id as album,
               albums.name as album_name, image_url, artist_ids, artist_names
        from page
        join spotify_tracks as song on song.spotify_id = page.track
        left join albums on albums.spotify_id = song.album
        left join lateral (
            select array_agg(artists.spotify_id order by position) as artist_ids,
                   array_agg(artists.name order by position) as artist_names
            from track_artists join artists on artists.spotify_id = artist where track_artists.track = page.track
        ) as theirs on true
        order by played_at desc, page.track desc
        """,
        listener, place and place.played_at, place and place.track, limit,
    )  # fmt: skip


def _track(row: asyncpg.Record) -> TrackTold:
    album = AlbumTold(id=row["album"], name=row["album_name"], image_url=row["image_url"]) if row["album"] else None
    return TrackTold(
        id=row["track"], name=row["name"], duration_ms=row["duration_ms"], isrc=row["isrc"], artists=_artists(row),
        album=album,
    )  # fmt: skip


def _artists(row: asyncpg.Record) -> list[ArtistTold]:
    ids, names = row["artist_ids"] or (), row["artist_names"] or ()
    return [ArtistTold(id=id_, name=name) for id_, name in zip(ids, names, strict=True)]


# -- what was heard most -------------------------------------------------------------------------------------------


class TopQuery(Query):
    kind: Literal["tracks", "artists"] = "tracks"
    window: Literal["7d", "30d", "90d", "365d", "all"] = Field(default="7d", description="the last so many days")
    limit: Annotated[int, Field(ge=1, le=200)] = 20


class Ranked(Answer):
    """`minutes`, if every play was heard to its end. `artists` are a track's, and empty for an artist."""

    id: str
    name: str
    plays: int
    minutes: float
    artists: list[ArtistTold]


class Top(Answer):
    """What was heard most, by the number of plays. A play of a track counts for each of its artists."""

    status: Literal["success"] = "success"
    kind: Literal["tracks", "artists"]
    window: str
    items: list[Ranked]


@route("GET", "/me/top", answers={200: Top}, access="listener")
async def me_top(call: Call, query: TopQuery) -> Top:
    """What I have heard most."""
    listening: Listening = call.resources["listening"]
    since = None
    if query.window != "all":
        since = listening.clock() - timedelta(days=int(query.window.removesuffix("d")))
    async with call.database.acquire() as connection:
        find = top_tracks if query.kind == "tracks" else top_artists
        rows = await find(connection, call.listener, since, query.limit)
    items = [
        Ranked(id=row["id"], name=row["name"], plays=row["plays"], minutes=row["minutes"], artists=_artists(row))
        for row in rows
    ]
    return Top(kind=query.kind, window=query.window, items=items)


async def top_tracks(
    connection: Connection, listener: UUID, since: datetime | None, limit: int
) -> Sequence[asyncpg.Record]:
    return await connection.fetch(
        """
        with heard as (
            select track, count(*) as plays from play_events
            where listener = $1 and played_at >= coalesce($2, '-infinity'::timestamptz)
            group by track
        ), top as (
            select track, name, plays, round(plays * coalesce(duration_ms, 0) / 60000.0, 1)::float8 as minutes
            from heard join spotify_tracks on spotify_id = track
            order by plays desc, minutes desc, track limit $3
        )
        select track as id, name, plays, minutes, artist_ids, artist_names
        from top left join lateral (
            select array_agg(artists.spotify_id order by position) as artist_ids,
                   array_agg(artists.name order by position) as artist_names
            from track_artists join artists on artists.spotify_id = artist where track_artists.track = top.track
        ) as theirs on true
        order by plays desc, minutes desc, track
        """,
        listener, since, limit,
    )  # fmt: skip


async def top_artists(
    connection: Connection, listener: UUID, since: datetime | None, limit: int
) -> Sequence[asyncpg.Record]:
    return await connection.fetch(
        """
        with heard as (
            select track, count(*) as plays from play_events
            where listener = $1 and played_at >= coalesce($2, '-infinity'::timestamptz)
            group by track
        )
        select artist as id, artists.name, sum(plays)::bigint as plays,
               round(sum(plays * coalesce(duration_ms, 0)) / 60000.0, 1)::float8 as minutes,
               null::text[] as artist_ids, null::text[] as artist_names
        from heard
        join spotify_tracks on spotify_tracks.spotify_id = track
        join track_artists using (track)
        join artists on artists.spotify_id = artist
        group by artist, artists.name
        order by plays desc, minutes desc, artist limit $3
        """,
        listener, since, limit,
    )  # fmt: skip


# -- the state of the archive --------------------------------------------------------------------------------------


class StateTold(Answer):
    """`minutes_left` of a cool-down or a wait for Spotify; the next poll is within the hour from `next_poll_from` on.

    disconnected: Spotify no longer lets us see the person's plays; signing in again mends it.
    """

    status: Literal["success"] = "success"
    state: State
    minutes_left: int | None
    last_polled_at: datetime | None
    next_poll_from: datetime | None
    plays_archived: int
    connected_at: datetime


@route("GET", "/me/state", answers={200: StateTold}, access="listener")
async def me_state(call: Call) -> StateTold:
    """How it goes with my archive."""
    listening: Listening = call.resources["listening"]
    async with call.database.acquire() as connection:
        row = await connection.fetchrow(
            """
            with person as (
                select *, case
                    when not is_active or refresh_token is null then 'disconnected'
                    when cooling_until > $2 then 'cooling_down'
                    when rate_limited_until > $2 then 'rate_limited'
                    else 'active' end as state
                from listeners where id = $1
            )
            select state, last_polled_at, created_at as connected_at,
                   case state
                       when 'cooling_down' then ceil(extract(epoch from cooling_until - $2) / 60)::int
                       when 'rate_limited' then ceil(extract(epoch from rate_limited_until - $2) / 60)::int
                       end as minutes_left,
                   case when state <> 'disconnected' then greatest(
                       date_trunc('hour', $2, 'UTC'), date_trunc('hour', last_polled_at, 'UTC') + interval '1 hour',
                       cooling_until, rate_limited_until) end as next_poll_from,
                   (select count(*) from play_events where listener = person.id) as plays_archived
            from person
            """,
            call.listener, listening.clock(),
        )  # fmt: skip
    if row is None:
        raise Refused(401, _GONE)
    return StateTold(**row)


# -- all of it -----------------------------------------------------------------------------------------------------


@route("GET", "/me/export.ndjson", answers={200: CONTENT_TYPE}, access="listener")
async def me_export(call: Call) -> Reply:
    """All that is kept of me: a line of JSON about me, then one for each play, the oldest first."""
    listening: Listening = call.resources["listening"]
    headers = {"Content-Disposition": f'attachment; filename="spotify-history-{listening.clock():%Y-%m-%d}.ndjson"'}
    pieces: AsyncGenerator[bytes, None] = exported(call.database, call.listener)
    return Reply(pieces, 200, headers)


class Deleted(Answer):
    """What is no longer there: plays, and what came as a play and could not be read. The place is another's now."""

    status: Literal["success"] = "success"
    plays: int
    unreadable_plays: int


@route("DELETE", "/me", answers={200: Deleted}, access="listener")
async def me_delete(call: Call) -> Reply:
    """Delete all that is kept of me, and sign out. Nobody can bring it back."""
    async with call.database.acquire() as connection, connection.transaction():
        deleted = await delete(connection, call.listener)
    if deleted is None:
        raise Refused(401, _GONE)
    return Reply(deleted, 200, cookies=[session.end(call.resources["listening"])])


async def delete(connection: Connection, listener: UUID) -> Deleted | None:
    """Delete a person in the caller's transaction; None where there is no such person."""
    row: Any = await connection.fetchrow(
        """
        with person as (
            select id, spotify_id from listeners where id = $1 for update
        ), no_longer_waiting as (
            delete from listener_waitlist using person where listener_waitlist.spotify_id = person.spotify_id
        )
        select (select count(*) from play_events where listener = person.id) as plays,
               (select count(*) from play_rejects where listener = person.id) as unreadable_plays
        from person
        """,
        listener,
    )
    if row is None or not await people.remove(connection, listener):
        return None
    return Deleted(**row)


ROUTES = (me_history, me_top, me_state, me_export, me_delete)
