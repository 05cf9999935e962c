"""People who sign in: the API with the listening routes, a stand-in for Spotify, and browsers with their cookies.

    async with signing_in(database_url, founding_cap=3) as stage:
        ann = await stage.person("ann")                  # with a session, through Spotify's page and back
        assert (await ann.get("/me/history")).json["plays"] == []
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from http.cookies import Morsel, SimpleCookie
from typing import Any
from urllib.parse import quote, urlsplit
from uuid import UUID

from apikit import Api, Told, serving_api

from indexer.config import Settings
from indexer.db import Database
from indexer.sidecar.app import ROUTES
from indexer.sidecar.fakes.spotify_people import FakeSpotifyPeople
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.providers.spotify_user import SpotifyUser

TOKEN_KEY = "a key of thirty-two bytes for tokens"
START = datetime(2026, 11, 28, 10, 20, tzinfo=UTC)


class Browser:
    """Keeps cookies and sends them to the paths they are for; what it is told to keep to https it sends here too."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.cookies: dict[str, tuple[str, str]] = {}  # by name: value and path
        self.given: list[Morsel[str]] = []  # every one that ever came
        self.listener: UUID

    async def ask(self, method: str, path: str, headers: Mapping[str, str] = {}, **named: Any) -> Told:
        place = path.partition("?")[0]
        held = "; ".join(
            f"{name}={value}" for name, (value, below) in self.cookies.items() if f"{place}/".startswith(below)
        )
        sent = {**({"Cookie": held} if held else {}), **headers}
        told = await self.stage.api.ask(method, path, headers=sent, **named)
        self.take(told)
        return told

    async def get(self, path: str, **named: Any) -> Told:
        return await self.ask("GET", path, **named)

    def take(self, told: Told) -> None:
        for header in told.headers.getall("Set-Cookie", []):  # type: ignore[attr-defined]
            for name, morsel in SimpleCookie(header).items():
                self.given.append(morsel)
                self.cookies.pop(name, None)
                if morsel["max-age"] != "0":
                    self.cookies[name] = (morsel.value, morsel["path"])

    async def agree(self, url: str, person: str) -> str:
        """Open Spotify's page as this person; gives the way back, as a path of ours."""
        async with self.stage.api.session.get(f"{url}&login_hint={quote(person)}", allow_redirects=False) as page:
            assert page.status == 302, await page.text()
            back = urlsplit(page.headers["Location"])
        public = urlsplit(self.stage.api.settings.listening.public_url)
        assert (back.scheme, back.netloc) == (public.scheme, public.netloc)
        return f"{back.path}?{back.query}"

    async def way_back(self, person: str, next_: str | None = None) -> str:
        """Begin a sign-in and agree."""
        told = await self.get("/connect/spotify" + (f"?next={quote(next_)}" if next_ else ""))
        assert told.status == 302, told
        return await self.agree(told.headers["Location"], person)

    async def sign_in(self, person: str, next_: str | None = None) -> Told:
        """The answer to the way back."""
        return await self.get(await self.way_back(person, next_))


class Stage:
    """`clock` is everybody's time: of the sessions, of sign-in, and of the stand-in."""

    def __init__(self, spotify: FakeSpotifyPeople, now: datetime) -> None:
        self.spotify, self.now = spotify, now
        spotify.clock = self.clock
        self.api: Api
        self.listening: Listening

    def clock(self) -> datetime:
        return self.now

    def later(self, **span: float) -> None:
        self.now += timedelta(**span)

    def browser(self) -> Browser:
        return Browser(self)

    def known(self, person: str) -> str:
        """Make a person of Spotify's; the e-mail and the name are easily found wherever they should not be."""
        self.spotify.person(person, email=f"secret-mail-{person}@listeners.example", name=f"Secret Name {person}")
        return person

    async def person(self, name: str) -> Browser:
        """A browser in which a new person of this name is signed in."""
        browser = self.browser()
        told = await browser.sign_in(self.known(name))
        assert told.status == 303, told
        browser.listener = await self.value("select id from listeners where spotify_id = $1", name)
        return browser

    async def value(self, query: str, *args: Any) -> Any:
        async with self.api.database.acquire() as connection:
            return await connection.fetchval(query, *args)

    async def rows(self, query: str, *args: Any) -> list[Any]:
        async with self.api.database.acquire() as connection:
            return await connection.fetch(query, *args)


@asynccontextmanager
async def signing_in(
    database_url: str, *, spotify: Mapping[str, Any] = {}, now: datetime = START, **listening: Any
) -> AsyncIterator[Stage]:
    """The API on the test's database; `listening` and `spotify` are laid over the settings, None leaves one out."""
    async with FakeSpotifyPeople() as fake, AsyncExitStack() as stack:
        stage, clients = Stage(fake, now), []

        def resources(settings: Settings, database: Database) -> Mapping[str, Any]:
            clients.append(SpotifyUser(settings.providers.spotify))
            stage.listening = Listening(settings.listening, database, clients[0], stage.clock)
            return {"listening": stage.listening}

        given = {
            "base_url": fake.url, "accounts_url": fake.url, "client_id": fake.client_id, "client_secret": fake.key,
            **spotify,
        }  # fmt: skip
        stage.api = await stack.enter_async_context(
            serving_api(
                database_url, ROUTES, resources,
                # a hundred people at once, perhaps on a busy machine: who waits for a connection is not to be refused
                database={"connect_timeout_seconds": 30},
                providers={"spotify": {name: value for name, value in given.items() if value is not None}},
                listening={"token_key": TOKEN_KEY, "visits_per_minute": 100_000, **listening},
            )
        )  # fmt: skip
        await stack.enter_async_context(clients[0])
        yield stage
