"""The demo's listeners: a stand-in for Spotify, people who play music there, and their archive in the sidecar.

A month of listening is archived first, a day at a time, by the clock of that month; then plays come by the second, and
an hour of the archive lasts a few seconds, so that there is something to see.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from indexer import app, log
from indexer.config import Settings
from indexer.db import Database

if TYPE_CHECKING:
    import asyncpg

    from indexer.sidecar.fakes import FakeSpotifyPeople, Person
    from indexer.sidecar.listening.service import Listening

# the last one has not connected yet
PEOPLE = {
    "maya": "Maya Lindqvist", "tomas": "Tomás Rivera", "aiko": "Aiko Tanaka", "kwame": "Kwame Mensah",
    "priya": "Priya Nair", "noor": "Noor Haddad",
}  # fmt: skip
_DAYS = 30
# within the reach of one poll a day
_MOST_A_DAY = 48
_LOVED = 150
_HOUR_SECONDS = 3.0
_DRAIN_SECONDS = 1.0
_PORT = 8080
# how much is heard from midnight on, by the hour
_HOURS = (3, 1, 1, 1, 1, 1, 2, 6, 10, 8, 6, 5, 7, 6, 5, 6, 7, 9, 12, 14, 13, 11, 9, 6)


class DemoListeners:
    """`url` is that of the listening page once `ready` is set, which takes a while from `begin` on."""

    def __init__(self, spotify: FakeSpotifyPeople, port: int) -> None:
        self._spotify, self._port = spotify, port
        self._now: datetime | None = None
        self.url = f"http://127.0.0.1:{port}/"
        self.begin, self.ready = asyncio.Event(), asyncio.Event()
        spotify.clock = self._clock
        tastes = random.Random(1)  # noqa: S311
        self._loved = {one: tastes.sample(range(len(spotify.songs)), _LOVED) for one in PEOPLE}
        self._dice = tastes

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """What the settings need for it."""
        spotify = {
            "base_url": self._spotify.url, "accounts_url": self._spotify.url,
            "client_id": self._spotify.client_id, "client_secret": self._spotify.key,
        }  # fmt: skip
        return {
            "providers": {"spotify": spotify},
            "sidecar": {"port": self._port, "drain_seconds": _DRAIN_SECONDS},
            "listening": {"token_key": secrets.token_urlsafe(32), "public_url": self.url.rstrip("/")},
        }

    @property
    def beside(self) -> app.Beside:
        """The sidecar with its listeners, to run beside the daemon."""
        from indexer.sidecar import app as sidecar

        return app.Beside(sidecar.sidecar_lines(), self._work)

    def _clock(self) -> datetime:
        return self._now or datetime.now(UTC)

    async def _work(self, settings: Settings, database: Database, halted: Callable[[], bool]) -> None:
        await self.begin.wait()
        from indexer.sidecar import app as sidecar
        from indexer.sidecar.listening.service import Listening
        from indexer.sidecar.providers.spotify_user import SpotifyUser

        async with SpotifyUser(settings.providers.spotify) as client:
            listening = Listening(settings.listening, database, client, self._clock)
            # before the sidecar looks: whoever was polled today has nothing to tell of last month
            await self._month(listening)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(sidecar.beside(settings, database, halted), name="sidecar")
                    tasks.create_task(self._tell(), name="tell")
                    tasks.create_task(self._live(listening), name="listeners")
            except ExceptionGroup as group:
                first = group.exceptions[0]
                raise first from first.__cause__

    async def _tell(self) -> None:
        """Wait until the page is there."""
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.close()
                self.ready.set()
                return
            await asyncio.sleep(0.1)

    async def _month(self, listening: Listening) -> None:
        """Connect all but the last of the people, and archive what they have heard so far, a day at a time."""
        from indexer.sidecar.listening.archive import archive_batch

        end = datetime.now(UTC)
        made = [self._spotify.person(one, name=name) for one, name in PEOPLE.items()]
        for person in made:
            self._listens(person, end)
        begin, lasts = end - timedelta(days=_DAYS), self._spotify.accounts.expires_in
        self._now, self._spotify.accounts.expires_in = begin, lasts * 24 * (_DAYS + 1)
        people = await self._connected(listening, made[:-1])
        for day in range(1, _DAYS + 1):
            self._now = begin + timedelta(days=day)
            await archive_batch(listening, people, log.get())
        self._now, self._spotify.accounts.expires_in = None, lasts

    def _listens(self, person: Person, end: datetime) -> None:
        """A month of plays: evenings and weekends most, some days hardly any."""
        midnight = end.replace(hour=0, minute=0, second=0, microsecond=0)
        for ago in range(_DAYS):
            day = midnight - timedelta(days=ago)
            count = self._dice.gammavariate(3, 5) * (1.6 if day.weekday() > 4 else 1.0)
            for hour in self._dice.choices(range(24), _HOURS, k=min(int(count), _MOST_A_DAY)):
                at = day + timedelta(hours=hour, seconds=self._dice.uniform(0, 3600))
                if at < end:
                    person.play(self._song(person), at)

    def _song(self, person: Person) -> int:
        """One that the person loves, few of them most."""
        loved = self._loved[person.id]
        return self._dice.choices(loved, [1 / (rank + 2) for rank in range(len(loved))])[0]

    async def _connected(self, listening: Listening, made: list[Person]) -> list[UUID]:
        """As if each had agreed on Spotify's page."""
        from indexer.sidecar.listening import people
        from indexer.sidecar.providers.spotify_user import Profile, Tokens

        cap, found = listening.settings.founding_cap, []
        async with listening.database.acquire() as connection:
            for person in made:
                pair = person.token_pair()
                profile = Profile(person.id, person.email, person.name)
                tokens = Tokens(pair.access_token, pair.expires_in, pair.refresh_token)
                async with connection.transaction():
                    one = await people.connect(connection, listening.vault, profile, tokens, cap, listening.clock())
                if one.listener is not None:
                    found.append(one.listener)
        return found

    async def _live(self, listening: Listening) -> None:
        """Somebody plays something, the hour is over, and the archive has it: again and again."""
        from indexer.sidecar.listening.archive import archive_batch

        while True:
            for one in self._dice.sample(list(PEOPLE), 3):
                self._spotify.people[one].play(self._song(self._spotify.people[one]), self._clock())
            await asyncio.sleep(_HOUR_SECONDS)
            await archive_batch(listening, await _hour_over(listening), log.get())


async def _hour_over(listening: Listening) -> list[UUID]:
    """Forget that anybody was polled in this hour; returns everybody."""
    async with listening.database.acquire() as connection, connection.transaction():
        await connection.execute("delete from listening_keys where starts_with(key, 'archive_')")
        rows = await connection.fetch(
            """
            update listeners set last_polled_at = least(last_polled_at, $1::timestamptz - interval '1 hour')
            returning id
            """,
            listening.clock(),
        )
    return [row["id"] for row in rows]


@asynccontextmanager
async def demo_listeners(*, fixed_port: bool) -> AsyncIterator[DemoListeners]:
    """The stand-in while the block runs; the page is at the sidecar's usual port if that is free and wanted."""
    from indexer.sidecar.fakes import FakeSpotifyPeople

    async with FakeSpotifyPeople() as spotify:
        yield DemoListeners(spotify, _free_port(_PORT if fixed_port else 0))


def _free_port(wanted: int) -> int:
    """This port, or another where it is taken: people's browsers must be told of it before it is served."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", wanted))
        except OSError:
            tried.bind(("127.0.0.1", 0))
        return int(tried.getsockname()[1])


async def archived(connection: asyncpg.Connection[Any]) -> tuple[int, int]:
    """Plays and people."""
    row = await connection.fetchrow(
        "select (select count(*) from play_events) as plays, (select count(*) from listeners) as people"
    )
    assert row is not None
    return row["plays"], row["people"]
