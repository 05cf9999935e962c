"""What is to be measured: a catalog, albums or songs by their ISRC, made into songs or albums.

What our own tables don't know Spotify is asked for, as it comes, and what it says is kept. All SQL on songs and their
identifiers is here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from uuid import UUID

import msgspec

from indexer.db import Connection, Database
from indexer.sidecar.providers import Catalogue, Track

# One request has Spotify asked about so many songs at most, and so many at a time.
_MOST_SEARCHES = 100
_AT_A_TIME = 8


class Scope(msgspec.Struct, frozen=True):
    """One of the three. ISRCs are in capitals, without hyphens."""

    catalog: UUID | None = None
    albums: tuple[str, ...] | None = None
    isrcs: tuple[str, ...] | None = None


class NoCatalog(Exception):
    """The account has no such catalog."""


class Unfinished(Exception):
    """So many songs are still to be looked up: the next request goes on."""

    def __init__(self, left: int) -> None:
        super().__init__(left)
        self.left = left


async def isrcs_of(database: Database, spotify: Catalogue, account: UUID, scope: Scope) -> list[str]:
    """The songs of a scope, in order. Raises NoCatalog, ProviderError."""
    if scope.albums is None:
        return await _listed(database, account, scope)
    async with database.acquire() as connection:
        known = await _songs_on(connection, scope.albums)
    unknown = [album for album in scope.albums if album not in known]
    songs = {song for some in known.values() for song in some}
    if unknown:
        albums = await spotify.albums(unknown)
        on_album = {track.id: album.id for album in albums.values() for track in album.tracks}
        tracks = await spotify.tracks(on_album)
        # a track may call another album its own than the one that has led to it
        found = [msgspec.structs.replace(track, album_id=on_album[track.id]) for track in tracks.values()]
        async with database.acquire() as connection, connection.transaction():
            songs |= set((await learn(connection, found)).values())
    return sorted(songs)


async def albums_of(database: Database, spotify: Catalogue, account: UUID, scope: Scope) -> list[str]:
    """The albums on which a scope's songs are, few for many songs, in order.

    Raises NoCatalog, ProviderError, Unfinished.
    """
    if scope.albums is not None:
        return sorted(set(scope.albums))
    isrcs = await _listed(database, account, scope)
    async with database.acquire() as connection:
        await add_songs(connection, isrcs)
        unknown = await _without_album(connection, isrcs)
    if unknown:
        await _search(database, spotify, unknown[:_MOST_SEARCHES])
        if len(unknown) > _MOST_SEARCHES:
            raise Unfinished(len(unknown) - _MOST_SEARCHES)
    async with database.acquire() as connection:
        return await _fewest_albums(connection, isrcs)


async def _listed(database: Database, account: UUID, scope: Scope) -> list[str]:
    if scope.catalog is None:
        return sorted(set(scope.isrcs or ()))
    async with database.acquire() as connection:
        if not await owns(connection, account, scope.catalog):
            raise NoCatalog
        rows = await connection.fetch("select song from catalog_songs where catalog = $1 order by song", scope.catalog)
    return [row["song"] for row in rows]


async def owns(connection: Connection, account: UUID, catalog: UUID) -> bool:
    return bool(
        await connection.fetchval(
            "select exists (select from catalogs where id = $1 and account = $2)", catalog, account
        )
    )


async def add_songs(connection: Connection, isrcs: Collection[str]) -> None:
    """Make the songs known. In order, so that two that do so wait for each other, but in no circle."""
    await connection.execute("insert into songs (isrc) select unnest($1::text[]) on conflict do nothing", sorted(isrcs))


async def learn(connection: Connection, tracks: Sequence[Track]) -> dict[str, str]:
    """Keep what Spotify says of tracks, in the caller's transaction; returns the ISRC of each that has one."""
    isrcs = {track.id: track.isrc for track in tracks if track.isrc is not None}
    names = {track.isrc: track.name for track in tracks if track.isrc is not None}
    await connection.execute(
        """
        insert into songs (isrc, name) select * from unnest($1::text[], $2::text[])
        on conflict (isrc) do update set name = excluded.name where songs.name is null
        """,
        sorted(names), [names[isrc] for isrc in sorted(names)],
    )  # fmt: skip
    identifiers = {(isrc, "track_id", track) for track, isrc in isrcs.items()}
    identifiers |= {(track.isrc, "album_id", track.album_id) for track in tracks if track.isrc and track.album_id}
    given = sorted(identifiers)
    await connection.execute(
        """
        insert into song_identifiers (song, platform, identifier_type, value)
        select song, 'spotify', type, value from unnest($1::text[], $2::text[], $3::text[]) as given (song, type, value)
        on conflict do nothing
        """,
        [one[0] for one in given], [one[1] for one in given], [one[2] for one in given],
    )  # fmt: skip
    return isrcs


async def _songs_on(connection: Connection, albums: Sequence[str]) -> dict[str, set[str]]:
    rows = await connection.fetch(
        """
        select value, song from song_identifiers
        where platform = 'spotify' and identifier_type = 'album_id' and value = any($1)
        """,
        list(albums),
    )
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["value"], set()).add(row["song"])
    return found


async def _without_album(connection: Connection, isrcs: Sequence[str]) -> list[str]:
    """Those of which no album is known, and that were not looked for in vain of late."""
    rows = await connection.fetch(
        """
        select isrc from songs
        where isrc = any($1) and coalesce(searched_at < now() - interval '30 days', true) and not exists (
            select from song_identifiers
            where song = isrc and platform = 'spotify' and identifier_type = 'album_id'
        )
        order by isrc
        """,
        list(isrcs),
    )
    return [row["isrc"] for row in rows]


async def _search(database: Database, spotify: Catalogue, isrcs: Sequence[str]) -> None:
    some = asyncio.Semaphore(_AT_A_TIME)

    async def search(isrc: str) -> tuple[Track, ...]:
        async with some:
            return await spotify.search_isrc(isrc)

    found = await asyncio.gather(*map(search, isrcs))
    async with database.acquire() as connection, connection.transaction():
        await learn(connection, [track for tracks in found for track in tracks])
        await connection.execute("update songs set searched_at = now() where isrc = any($1)", list(isrcs))


async def _fewest_albums(connection: Connection, isrcs: Sequence[str]) -> list[str]:
    """For each song the one of its albums that has the most songs of the scope."""
    rows = await connection.fetch(
        """
        with known as (
            select song, value as album from song_identifiers
            where platform = 'spotify' and identifier_type = 'album_id' and song = any($1)
        ), covering as (
            select album, count(*) as songs from known group by album
        ), chosen as (
            select distinct on (song) album from known join covering using (album) order by song, songs desc, album
        )
        select distinct album from chosen order by album
        """,
        list(isrcs),
    )
    return [row["album"] for row in rows]
