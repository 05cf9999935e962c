"""The measurement work as a whole: the API over HTTP, workers in this process, and stand-ins for the four providers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from apikit import Api, Person, Told, serving_api
from daemon import until

from indexer.config import ProvidersSettings
from indexer.sidecar import current, drain
from indexer.sidecar.app import ROUTES
from indexer.sidecar.fakes import Fake, FakeApify, FakeSongstats, FakeSpotify, FakeStripe
from indexer.sidecar.fakes.made import tracks_of
from indexer.sidecar.jobs import load_jobs
from indexer.sidecar.providers import open_providers, with_backoff
from indexer.sidecar.worker import Worker

PATH = "/api/research/measurement-jobs"
ACTOR = "somebody/album-play-counts"


def isrcs(count: int, first: int = 0) -> list[str]:
    return [f"QZABC24{n:05}" for n in range(first, first + count)]


def providers_at(songstats: str, apify: str, spotify: str, stripe: str) -> dict[str, dict[str, Any]]:
    """Settings that lead to the stand-ins."""
    return {
        "songstats": {"base_url": songstats, "api_key": FakeSongstats.key},
        "apify": {"base_url": apify, "token": FakeApify.key, "actor": ACTOR},
        "spotify": {
            "base_url": spotify, "accounts_url": spotify,
            "client_id": FakeSpotify.client_id, "client_secret": FakeSpotify.key,
        },
        "stripe": {"base_url": stripe, "api_key": FakeStripe.key, "success_url": "https://app.example/done"},
    }  # fmt: skip


class Stage:
    """What a test has at hand. Ann has a card on file, Bob has none."""

    def __init__(self, api: Api, resources: Mapping[str, Any], fakes: Sequence[Fake]) -> None:
        self.api, self.resources, self.ann, self.bob = api, resources, api.ann, api.bob
        songstats, apify, spotify, stripe = fakes
        assert isinstance(songstats, FakeSongstats) and isinstance(apify, FakeApify)
        assert isinstance(spotify, FakeSpotify) and isinstance(stripe, FakeStripe)
        self.songstats, self.apify, self.spotify, self.stripe = songstats, apify, spotify, stripe
        stripe.add_customer(str(self.ann.account))
        apify.polls = 1  # a run is over when it is first asked for

    def release(self, *albums: str) -> None:
        """Have Spotify know these albums, with the tracks that the actor finds on them."""
        for album in albums:
            self.spotify.albums[album] = tracks_of(album, 3)

    async def order(self, source: str, by: Person | None = None, **body: Any) -> Told:
        """POST measurement-jobs; `catalog_id`, `album_ids` and `isrcs` are the scope."""
        names = ("catalog_id", "album_ids", "isrcs")
        scope = {name: body.pop(name) for name in names if name in body}
        return await self.api.post(PATH, {"source": source, "scope": scope, **body}, by=by or self.ann)

    async def value(self, query: str, *values: Any) -> Any:
        async with self.api.database.acquire() as connection:
            return await connection.fetchval(query, *values)

    async def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        async with self.api.database.acquire() as connection:
            return [tuple(row) for row in await connection.fetch(query, *values)]

    async def run(self, query: str, *values: Any) -> None:
        async with self.api.database.acquire() as connection:
            await connection.execute(query, *values)

    async def catalog(self, owner: Person, songs: Sequence[str]) -> UUID:
        """A catalog with these songs."""
        await self.run("insert into songs (isrc) select unnest($1::text[]) on conflict do nothing", list(songs))
        catalog: UUID = await self.value("insert into catalogs (account) values ($1) returning id", owner.account)
        await self.run("insert into catalog_songs select $1, unnest($2::text[])", catalog, list(songs))
        return catalog

    async def measured(self, song: str, value: int, age: timedelta = timedelta(), **columns: Any) -> None:
        """A measurement from `age` ago."""
        given = {"platform": "spotify", "data_source": "apify_spotify_playcount", **columns}
        await self.run("insert into songs (isrc) values ($1) on conflict do nothing", song)
        await self.run(
            """
            insert into song_measurements (song, platform, value, captured_at, data_source)
            values ($1, $2, $3, now() - $4::interval, $5)
            """,
            song, given["platform"], value, age, given["data_source"],
        )  # fmt: skip

    async def jobs(self, kind: str = drain.KIND) -> dict[str, int]:
        """How many jobs of a kind are in which of PgQueuer's states."""
        query = "select status::text, count(*) from indexer.pgqueuer where entrypoint = $1 group by 1"
        return {str(state): int(count) for state, count in await self.rows(query, kind)}

    @asynccontextmanager
    async def working(self, **concurrency: int) -> AsyncIterator[Worker]:
        """A worker, while the block runs."""
        sidecar = self.api.settings.sidecar.model_copy(
            update={"drain_seconds": 0.2, "concurrency": {name.replace("_", "."): n for name, n in concurrency.items()}}
        )
        settings = self.api.settings.model_copy(update={"sidecar": sidecar})
        worker = Worker(settings, self.api.database, load_jobs([]), self.resources)
        task = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def settled(self, *kinds: str) -> None:
        """Wait until no job runs, and none waits that may begin."""

        async def still() -> bool:
            return not await self.value(
                """
                select count(*) from indexer.pgqueuer
                where status = 'picked' or (status = 'queued' and not exists (
                    select from indexer.job_gate where kind = entrypoint and until > now()
                ))
                """
            )

        await until(still, "nothing runs")


@asynccontextmanager
async def measuring(
    database_url: str, *, provider: Mapping[str, Mapping[str, Any]] = {}, **sections: Any
) -> AsyncIterator[Stage]:
    """The stage; `provider` is laid over the providers' settings, `sections` over all."""
    async with AsyncExitStack() as stack:
        kinds = (FakeSongstats, FakeApify, FakeSpotify, FakeStripe)
        fakes: list[Fake] = [await stack.enter_async_context(kind()) for kind in kinds]
        settings = providers_at(*(fake.url for fake in fakes))
        settings = {name: {**given, **provider.get(name, {})} for name, given in settings.items()}
        clients = await stack.enter_async_context(open_providers(ProvidersSettings(**settings)))
        resources = {name: getattr(clients, name) for name in settings}
        database = {"pool_size": 20, **sections.pop("database", {})}
        api = await stack.enter_async_context(
            serving_api(database_url, ROUTES, resources, providers=settings, database=database, **sections)
        )
        yield Stage(api, resources, fakes)


@pytest.fixture
async def stage(database_url: str) -> AsyncIterator[Stage]:
    async with measuring(database_url) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits within a job take no time; gives what they would have been."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def at_once(call: Any, **given: Any) -> Any:
        return await with_backoff(call, sleep=sleep)

    monkeypatch.setattr(drain, "with_backoff", at_once)
    monkeypatch.setattr(current, "with_backoff", at_once)
    return slept


def songs_of(album: str) -> dict[str, int]:
    """The songs of an album that the stand-ins have made up, with their counts."""
    return {track.isrc: track.play_count for track in tracks_of(album, 3)}


async def drained(stage: Stage, songs: list[str], **concurrency: int) -> None:
    """Order these, and let a worker run until there is nothing that it may do."""
    assert (await stage.order("historical", isrcs=songs)).json["enqueued"] == len(songs)
    async with stage.working(**concurrency):
        await stage.settled()
