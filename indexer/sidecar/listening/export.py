"""All that is kept of a person, line by line: from a cursor of Postgres, so that a long history takes no more memory.

The cursor has a connection of its own: a browser that reads slowly keeps nobody else from the pool's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

import asyncpg
import msgspec

from indexer.db import Connection, Database, translated
from indexer.sidecar.routes import Refused

CONTENT_TYPE = "application/x-ndjson"

_FETCHED = 500
# of this process; each has a connection and holds a snapshot of the database
_AT_ONCE = 4
_under_way: set[UUID] = set()
_RETRY = {"Retry-After": "10"}


async def exported(database: Database, listener: UUID) -> AsyncGenerator[bytes, None]:
    """The lines, some hundred at a time. Raises Refused (429, or 401 where the person is gone) before the first."""
    with _turn(listener):
        connection = await database.connect(application_name=f"{database.name} export")
        try:
            with translated():
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    yield await _account(connection, listener)
                    async for piece in _rows(connection, _PLAYS, listener):
                        yield piece
                    async for piece in _rows(connection, _UNREADABLE, listener):
                        yield piece
        finally:
            # Where a client has hung up, nothing more is to be said to the server either.
            with suppress(Exception):
                connection.terminate()


@contextmanager
def _turn(listener: UUID) -> Iterator[None]:
    if listener in _under_way or len(_under_way) >= _AT_ONCE:
        raise Refused(429, "An export is under way: one at a time", _RETRY)
    _under_way.add(listener)
    try:
        yield
    finally:
        _under_way.discard(listener)


async def _account(connection: Connection, listener: UUID) -> bytes:
    """What is kept of the person, but for the tokens: these are nobody's to read."""
    row = await connection.fetchrow(
        """
        select 'account' as type, id, spotify_id, email, display_name, tier, created_at, is_active, last_polled_at,
               consecutive_failures, last_failure_type, last_failed_at, cooling_until, rate_limited_until,
               (select count(*) from play_events where listener = listeners.id) as plays,
               (select count(*) from play_rejects where listener = listeners.id) as unreadable_plays
        from listeners where id = $1
        """,
        listener,
    )
    if row is None:
        raise Refused(401, "Sign in with Spotify to see what is yours")
    return _line(row)


async def _rows(connection: Connection, query: str, listener: UUID) -> AsyncGenerator[bytes, None]:
    cursor = await connection.cursor(query, listener)
    while rows := await cursor.fetch(_FETCHED):
        yield b"".join(map(_line, rows))


_PLAYS = """
    select 'play' as type, played_at, track, song.name, duration_ms, isrc, song.album, albums.name as album_name,
           array(
               select artists.name from track_artists join artists on artists.spotify_id = artist
               where track_artists.track = play_events.track order by position
           ) as artists
    from play_events
    join spotify_tracks as song on song.spotify_id = track
    left join albums on albums.spotify_id = song.album
    where listener = $1
    order by played_at, track
"""
# as they came, in base64: what is no text is among the reasons for which a play can't be read
_UNREADABLE = """
    select 'unreadable_play' as type, at, reason, raw from play_rejects where listener = $1 order by id
"""


def _line(row: asyncpg.Record) -> bytes:
    return msgspec.json.encode(dict(row)) + b"\n"
