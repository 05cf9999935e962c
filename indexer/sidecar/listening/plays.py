"""Plays as Spotify tells them: each read for itself, and those of many people stored in one transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

import msgspec

from indexer.db import Connection
from indexer.sidecar.jobs import storable
from indexer.sidecar.listening.people import Claim, hour_key

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_MOST_INTEGER = (1 << 31) - 1
_MOST_ARTISTS = 1_000
# A play of the far future would move the cursor past all that is still to come.
_CLOCKS_DIFFER = timedelta(days=1)
# of a song that is archived the key stays known for so long
KEY_LASTS = timedelta(hours=24)


class Artist(msgspec.Struct, frozen=True):
    id: str
    name: str


class Album(msgspec.Struct, frozen=True):
    id: str
    name: str
    image_url: str | None


class Track(msgspec.Struct, frozen=True):
    id: str
    name: str
    duration_ms: int | None
    isrc: str | None
    album: Album | None
    artists: tuple[Artist, ...]


class Play(msgspec.Struct, frozen=True):
    track: Track
    played_at: datetime

    @property
    def ms(self) -> int:
        """When it was played, as Spotify's cursors count: Unix milliseconds."""
        return (self.played_at - _EPOCH) // _MILLISECOND


class Reject(msgspec.Struct, frozen=True):
    """What came as a play and is none that can be read."""

    raw: bytes
    reason: str


# -- reading -------------------------------------------------------------------------------------------------------


class _Image(msgspec.Struct):
    url: str | None = None


class _Album(msgspec.Struct):
    id: str | None = None
    name: str | None = None
    images: list[_Image] | None = None


class _Artist(msgspec.Struct):
    id: str | None = None
    name: str | None = None


class _External(msgspec.Struct):
    isrc: str | None = None


class _Track(msgspec.Struct):
    id: str | None = None
    name: str | None = None
    duration_ms: int | None = None
    album: _Album | None = None
    artists: list[_Artist] | None = None
    external_ids: _External | None = None


class _Item(msgspec.Struct):
    track: _Track
    played_at: Annotated[datetime, msgspec.Meta(tz=True)]


_decode = msgspec.json.Decoder(_Item).decode


def read(raw: msgspec.Raw, now: datetime) -> Play | Reject:
    """A play as it came. A track may lack its album, its artists and its length, but not its id."""
    try:
        item = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # msgspec's own words may quote what was sent
        return Reject(bytes(raw), "cannot be read")
    track = item.track
    if not track.id:
        return Reject(bytes(raw), "its track has no id")
    if item.played_at > now + _CLOCKS_DIFFER:
        return Reject(bytes(raw), "was played in the future")
    length = track.duration_ms
    return Play(
        Track(
            storable(track.id), storable(track.name or ""),
            length if length is not None and 0 <= length <= _MOST_INTEGER else None,
            _kept(track.external_ids.isrc if track.external_ids else None),
            _album(track.album), _artists(track.artists or ()),
        ),
        item.played_at.astimezone(UTC),
    )  # fmt: skip


def _kept(text: str | None) -> str | None:
    return storable(text) if text else None


def _album(given: _Album | None) -> Album | None:
    if given is None or not given.id:
        return None
    image = next((one.url for one in given.images or () if one.url), None)
    return Album(storable(given.id), storable(given.name or ""), _kept(image))


def _artists(given: Iterable[_Artist]) -> tuple[Artist, ...]:
    found = {one.id: Artist(storable(one.id), storable(one.name or "")) for one in given if one.id}
    return tuple(found.values())


# -- storing -------------------------------------------------------------------------------------------------------


class Polled(msgspec.Struct, frozen=True):
    """A person's poll that went well."""

    person: Claim
    plays: Sequence[Play]
    rejects: Sequence[Reject] = ()

    @property
    def cursor_ms(self) -> int | None:
        """Of the newest play."""
        return max((play.ms for play in self.plays), default=None)


async def store(connection: Connection, polled: Sequence[Polled], now: datetime) -> dict[UUID, int]:
    """Store what these people heard, with cursor, key and the end of the lease, in the caller's transaction.

    Returns how many plays were new, by person. Who is not in it is no longer ours: deleted, connected anew, or
    another worker's, since the lease had run out.
    """
    ours = await _finish(connection, polled, now)
    kept = [one for one in polled if one.person.listener in ours]
    await _add_music(connection, {play.track.id: play.track for one in kept for play in one.plays}.values())
    rows = [(one.person.listener, play.played_at, play.track.id) for one in kept for play in one.plays]
    added = await connection.fetch(
        """
        with added as (
            insert into play_events (listener, played_at, track)
            select * from unnest($1::uuid[], $2::timestamptz[], $3::text[]) as given (listener, played_at, track)
            order by listener, played_at, track
            on conflict do nothing
            returning listener
        )
        select listener, count(*) as plays from added group by listener
        """,
        *columns(rows, 3),
    )
    await _add_rejects(connection, kept, now)
    return dict.fromkeys(ours, 0) | {row["listener"]: row["plays"] for row in added}


async def _finish(connection: Connection, polled: Sequence[Polled], now: datetime) -> set[UUID]:
    """The people's rows and keys; returns whose lease is still ours."""
    given = [
        (one.person.listener, one.person.lease, one.cursor_ms, hour_key(one.person.listener, now)) for one in polled
    ]
    rows = await connection.fetch(
        """
        with polled as (
            select * from unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::text[]) as given (id, lease, cursor_ms, key)
        ), ours as (
            select id from listeners join polled using (id, lease) order by id for update of listeners
        ), done as (
            update listeners as person
            set cursor_ms = greatest(person.cursor_ms, polled.cursor_ms), last_polled_at = $5,
                consecutive_failures = 0, last_failure_type = null, cooling_until = null, rate_limited_until = null,
                lease = null, leased_until = null
            from polled join ours using (id) where person.id = polled.id
            returning person.id
        ), noted as (
            insert into listening_keys (key, until) select key, $5 + $6::interval from polled join done using (id)
            on conflict (key) do update set until = excluded.until
        )
        select id from done
        """,
        *columns(given, 4), now, KEY_LASTS,
    )  # fmt: skip
    return {row["id"] for row in rows}


async def _add_music(connection: Connection, tracks: Iterable[Track]) -> None:
    """Artists, albums and tracks, each once. Most are known already: only what is new or has changed is written.

    In the order of their ids, so that two workers with the same ones wait for each other, but in no circle.
    """
    tracks = list(tracks)
    artists = {artist.id: artist.name for track in tracks for artist in track.artists}
    albums = {track.album.id: track.album for track in tracks if track.album is not None}
    await connection.execute(
        """
        insert into artists (spotify_id, name)
        select id, name from unnest($1::text[], $2::text[]) as given (id, name)
        where not exists (select from artists where spotify_id = given.id and artists.name = given.name)
        order by id
        on conflict (spotify_id) do update set name = excluded.name
        """,
        list(artists), list(artists.values()),
    )  # fmt: skip
    await connection.execute(
        """
        insert into albums (spotify_id, name, image_url)
        select id, name, image_url from unnest($1::text[], $2::text[], $3::text[]) as given (id, name, image_url)
        where not exists (
            select from albums as known
            where spotify_id = given.id and known.name = given.name
              and known.image_url is not distinct from coalesce(given.image_url, known.image_url)
        )
        order by id
        on conflict (spotify_id) do update
        set name = excluded.name, image_url = coalesce(excluded.image_url, albums.image_url)
        """,
        *columns([(one.id, one.name, one.image_url) for one in albums.values()], 3),
    )
    rows = [(one.id, one.name, one.duration_ms, one.isrc, one.album.id if one.album else None) for one in tracks]
    await connection.execute(
        """
        insert into spotify_tracks (spotify_id, name, duration_ms, isrc, album)
        select * from unnest($1::text[], $2::text[], $3::integer[], $4::text[], $5::text[])
            as given (id, name, duration_ms, isrc, album)
        where not exists (
            select from spotify_tracks as known
            where spotify_id = given.id and known.name = given.name
              and known.duration_ms is not distinct from coalesce(given.duration_ms, known.duration_ms)
              and known.isrc is not distinct from coalesce(given.isrc, known.isrc)
              and known.album is not distinct from coalesce(given.album, known.album)
        )
        order by id
        on conflict (spotify_id) do update
        set name = excluded.name, duration_ms = coalesce(excluded.duration_ms, spotify_tracks.duration_ms),
            isrc = coalesce(excluded.isrc, spotify_tracks.isrc), album = coalesce(excluded.album, spotify_tracks.album)
        """,
        *columns(rows, 5),
    )
    credits = [(one.id, artist.id, place) for one in tracks for place, artist in enumerate(one.artists[:_MOST_ARTISTS])]
    await connection.execute(
        """
        insert into track_artists (track, artist, position)
        select * from unnest($1::text[], $2::text[], $3::smallint[]) as given (track, artist, position)
        where not exists (
            select from track_artists as known where known.track = given.track and known.artist = given.artist
        )
        order by track, artist
        on conflict do nothing
        """,
        *columns(credits, 3),
    )


async def _add_rejects(connection: Connection, polled: Sequence[Polled], now: datetime) -> None:
    rows = [
        (one.person.listener, reject.raw, reject.reason, hashlib.sha256(reject.raw).digest())
        for one in polled
        for reject in one.rejects
    ]
    if rows:
        await connection.execute(
            """
            insert into play_rejects (listener, raw, reason, digest, at)
            select *, $5::timestamptz from unnest($1::uuid[], $2::bytea[], $3::text[], $4::bytea[])
            on conflict do nothing
            """,
            *columns(rows, 4), now,
        )  # fmt: skip


def columns(rows: Sequence[tuple[object, ...]], width: int) -> list[list[object]]:
    """Rows as the arrays that `unnest` takes."""
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(width)]
