"""For the tests of the listening jobs: people at the stand-in for Spotify who are connected here, and their clock.

    async with listening_stage(database_url, connection) as stage:
        ann, = await stage.people(1)
        ann.at_spotify.play(1, stage.now - MINUTE)
        report = await stage.archive(ann)
"""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import asyncpg

from indexer import log
from indexer.config import DatabaseSettings, ListeningSettings, LogSettings, SpotifySettings
from indexer.db import Database
from indexer.migrations import migrate, sql_folder
from indexer.sidecar.fakes import FakeSpotifyPeople
from indexer.sidecar.fakes.people import Person
from indexer.sidecar.listening.archive import Report, archive_batch
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.listening.vault import Vault
from indexer.sidecar.providers.spotify_user import SpotifyUser

TOKEN_KEY = "a key for people's tokens, thirty-two bytes at least"
START = datetime(2031, 3, 14, 9, 0, tzinfo=UTC)
MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


class Connected(NamedTuple):
    """Somebody who is connected: the row's id, and the person at Spotify."""

    id: UUID
    at_spotify: Person


class Stage:
    """What a test has at hand. `now` is everybody's time: the stand-in's, and that of the jobs."""

    def __init__(
        self, fake: FakeSpotifyPeople, connection: asyncpg.Connection, database: Database, stream: io.StringIO,
        **settings: Any,
    ) -> None:  # fmt: skip
        self.fake, self.connection, self.database, self.stream = fake, connection, database, stream
        self.now = START
        fake.clock = lambda: self.now
        self.spotify = SpotifyUser(spotify_settings(fake.url, **settings.pop("spotify", {})))
        self.settings = ListeningSettings(token_key=TOKEN_KEY, **settings)  # type: ignore[arg-type]
        self.listening = self.another()

    def another(self) -> Listening:
        """What another process would have."""
        return Listening(self.settings, self.database, self.spotify, lambda: self.now)

    async def people(self, count: int, prefix: str = "person") -> list[Connected]:
        """So many more people who are connected, with tokens that hold for an hour."""
        made = [self.fake.person(f"{prefix}{n:04}", name=f"Name-of-{prefix}{n:04}") for n in range(count)]
        return await connect_all(self.connection, self.settings, made, self.now)

    async def archive(self, *people: Connected, by: Listening | None = None) -> Report:
        return await archive_batch(by or self.listening, [one.id for one in people], log.get())

    async def row(self, one: Connected) -> asyncpg.Record:
        row = await self.connection.fetchrow("select * from listeners where id = $1", one.id)
        assert row is not None
        return row

    async def archived(self) -> set[tuple[str, str, int]]:
        return await archived(self.connection)

    @property
    def logs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


def spotify_settings(url: str, **more: Any) -> SpotifySettings:
    given = {
        "base_url": url, "accounts_url": url, "client_id": FakeSpotifyPeople.client_id,
        "client_secret": FakeSpotifyPeople.key, "timeout_seconds": 3, **more,
    }  # fmt: skip
    return SpotifySettings(**given)


async def connect_all(
    connection: asyncpg.Connection, settings: ListeningSettings, people: Iterable[Person], now: datetime
) -> list[Connected]:
    """Rows as the callback leaves them, for many at once."""
    vault, people = Vault(settings), list(people)
    pairs = [(person, person.token_pair()) for person in people]
    rows = await connection.fetch(
        """
        insert into listeners (spotify_id, email, display_name, access_token, refresh_token, token_expires_at,
                               created_at)
        select *, $6::timestamptz, $7::timestamptz
        from unnest($1::text[], $2::text[], $3::text[], $4::bytea[], $5::bytea[])
        returning id, spotify_id
        """,
        [person.id for person in people], [person.email for person in people], [person.name for person in people],
        [vault.encrypt(pair.access_token) for _, pair in pairs],
        [vault.encrypt(pair.refresh_token) for _, pair in pairs], now + timedelta(seconds=3600), now,
    )  # fmt: skip
    await connection.execute("update listener_places set taken = taken + $1", len(people))
    ids = {row["spotify_id"]: row["id"] for row in rows}
    return [Connected(ids[person.id], person) for person in people]


async def archived(connection: asyncpg.Connection) -> set[tuple[str, str, int]]:
    """Person, track and millisecond of every play in the archive, which holds each once by its primary key."""
    rows = await connection.fetch(
        """
        select spotify_id, track, (extract(epoch from played_at) * 1000)::bigint as ms
        from play_events join listeners on listeners.id = listener
        """
    )
    return {(row["spotify_id"], row["track"], row["ms"]) for row in rows}


@asynccontextmanager
async def listening_stage(
    database_url: str, connection: asyncpg.Connection, *, plays_per_hour: float = 0.0, **settings: Any
) -> AsyncIterator[Stage]:
    """The tables, the stand-in, and the service with these settings of [listening] (and `spotify`, of the provider)."""
    stream = io.StringIO()
    log.configure(LogSettings(level="debug", format="json"), stream)
    await migrate(connection, [("sidecar", sql_folder("sidecar"))])
    async with (
        FakeSpotifyPeople(plays_per_hour=plays_per_hour) as fake,
        Database(database_url, DatabaseSettings(connect_timeout_seconds=3)).opened() as database,
    ):
        stage = Stage(fake, connection, database, stream, **settings)
        async with stage.spotify:
            yield stage
