"""The clients of the providers, each pointed at its stand-in, with one question that each answers."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple

from indexer.config import ApifySettings, SongstatsSettings, SpotifySettings, StripeSettings
from indexer.sidecar.fakes import Fake, FakeApify, FakeSongstats, FakeSpotify, FakeStripe
from indexer.sidecar.providers import AlbumCounts, Catalogue, Payments, PlayHistory
from indexer.sidecar.providers.apify import Apify
from indexer.sidecar.providers.songstats import Songstats
from indexer.sidecar.providers.spotify import Spotify
from indexer.sidecar.providers.stripe import Stripe

ISRC = "QZABC2400001"
ACCOUNT = "5e0f2f0a-8f5e-4c43-9d9e-0c6f7d0b8a11"


def songstats_at(fake: Fake, **settings: Any) -> Songstats:
    return Songstats(SongstatsSettings(**{"base_url": fake.url, "api_key": fake.key, **settings}))


def apify_at(fake: Fake, slept: list[float] | None = None, **settings: Any) -> Apify:
    async def sleep(seconds: float) -> None:
        if slept is not None:
            slept.append(seconds)

    given = {"base_url": fake.url, "token": fake.key, "actor": "somebody/album-play-counts", **settings}
    return Apify(ApifySettings(**given), sleep)


def spotify_at(fake: Fake, clock: Callable[[], float] = lambda: 0.0, **settings: Any) -> Spotify:
    given = {
        "base_url": fake.url, "accounts_url": fake.url,
        "client_id": FakeSpotify.client_id, "client_secret": fake.key, **settings,
    }  # fmt: skip
    return Spotify(SpotifySettings(**given), clock)


def stripe_at(fake: Fake, **settings: Any) -> Stripe:
    pages = {"success_url": "https://app.example/done?secret=page-secret", "cancel_url": "https://app.example/no"}
    return Stripe(StripeSettings(**{"base_url": fake.url, "api_key": fake.key, **pages, **settings}))


Client = PlayHistory | AlbumCounts | Catalogue | Payments


class Case(NamedTuple):
    """A question of a client: `route` is what the stand-in calls it."""

    fake: type[Fake]
    client: Callable[..., Any]
    route: str
    ask: Callable[[Any], Awaitable[Any]]


CASES = {
    "songstats": Case(FakeSongstats, songstats_at, "historic_stats", lambda it: it.history(ISRC)),
    "apify start": Case(FakeApify, apify_at, "start", lambda it: it.start(["a", "b"])),
    "apify run": Case(FakeApify, apify_at, "run", lambda it: it.run("run1")),
    "spotify token": Case(FakeSpotify, spotify_at, "token", lambda it: it.albums(["a"])),
    "spotify albums": Case(FakeSpotify, spotify_at, "albums", lambda it: it.albums(["a"])),
    "spotify tracks": Case(FakeSpotify, spotify_at, "tracks", lambda it: it.tracks(["a"])),
    "spotify search": Case(FakeSpotify, spotify_at, "search", lambda it: it.search_isrc(ISRC)),
    "stripe search": Case(FakeStripe, stripe_at, "search", lambda it: it.card_on_file(ACCOUNT)),
    "stripe customer": Case(FakeStripe, stripe_at, "customer", lambda it: it.card_on_file(ACCOUNT, "cus_0001")),
    "stripe cards": Case(FakeStripe, stripe_at, "cards", lambda it: it.card_on_file(ACCOUNT, "cus_0001")),
    "stripe create": Case(FakeStripe, stripe_at, "create", lambda it: it.setup_url("another")),
    "stripe session": Case(FakeStripe, stripe_at, "session", lambda it: it.setup_url(ACCOUNT, "cus_0001")),
}


@asynccontextmanager
async def pair(case: Case, **settings: Any) -> AsyncIterator[tuple[Any, Any]]:
    """The stand-in with something in it, and a client of it."""
    async with case.fake() as fake, case.client(fake, **settings) as client:
        if isinstance(fake, FakeStripe):
            fake.add_customer(ACCOUNT)
        if isinstance(fake, FakeApify):
            async with apify_at(fake) as other:
                await other.start(["a"])
            fake.calls.clear()
        yield fake, client


def everything_said(error: BaseException) -> str:
    """All that a log or a table could get to hold of an exception."""
    parts = [str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)]
    return "".join(part for part in parts if not part.lstrip().startswith("File"))


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A stand-in as a process, and its address."""
    command = (sys.executable, "-m", "indexer.sidecar.fakes", *arguments)
    running = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert running.stdout is not None
        yield running, (await asyncio.wait_for(running.stdout.readline(), 60)).decode().strip()
    finally:
        with suppress(ProcessLookupError):
            running.kill()
        await running.wait()
