"""How long POST measurement-jobs takes for a catalogue of 10,000 songs, over HTTP, beside queueing the same jobs alone.

    python -m benchmarks.enqueue --songs 10000

Three orders: by ISRC where no song is known yet, by catalog where half are measured already, and the first once more,
when all of it waits. Each song of the catalog has a hundred captures, as after months.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from indexer import log, queue
from indexer.config import LogSettings, Settings
from indexer.db import Connection, Database
from indexer.embedded import EmbeddedPostgres
from indexer.migrations import SQL, migrate, sql_folder
from indexer.queue import NewJob
from indexer.sidecar import keys
from indexer.sidecar.api import create_app, serving
from indexer.sidecar.app import ROUTES, open_resources
from indexer.sidecar.fakes import FakeStripe

_CAPTURES = 100


def isrcs(songs: int, first: int) -> list[str]:
    return [f"QZABC{n:07}" for n in range(first, first + songs)]


async def fill(connection: Connection, account: Any, songs: list[str]) -> str:
    """A catalog of these songs with captures; every second one has its history already."""
    await connection.execute("insert into songs (isrc) select unnest($1::text[])", songs)
    catalog = await connection.fetchval("insert into catalogs (account) values ($1) returning id", account)
    await connection.execute("insert into catalog_songs select $1, unnest($2::text[])", catalog, songs)
    await connection.execute(
        """
        insert into song_measurements (song, platform, value, captured_at, data_source)
        select song, 'spotify', place * 1000 + day, now() - make_interval(days => day),
               case place % 2 when 0 then 'songstats' else 'apify_spotify_playcount' end
        from unnest($1::text[]) with ordinality as songs (song, place), generate_series(1, $2::int) as day
        """,
        songs, _CAPTURES,
    )  # fmt: skip
    await connection.execute("analyze")
    return str(catalog)


async def ordered(session: aiohttp.ClientSession, url: str, scope: dict[str, Any]) -> tuple[float, Any]:
    """Seconds until the answer, and the answer."""
    started = time.perf_counter()
    body = {"source": "historical", "scope": scope}
    async with session.post(f"{url}api/research/measurement-jobs", json=body) as response:
        told = await response.json()
        assert response.status == 202, told
    return time.perf_counter() - started, told


async def main(songs: int) -> None:
    log.configure(LogSettings(level="error"))
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="indexer-bench-"))
        server = await stack.enter_async_context(EmbeddedPostgres(Path(folder) / "postgres"))
        stripe = await stack.enter_async_context(FakeStripe(everybody_pays=True))
        settings = Settings(
            database={"url": server.dsn},  # type: ignore[arg-type]
            sidecar={"port": 0},  # type: ignore[arg-type]
            providers={"stripe": {"base_url": stripe.url, "api_key": stripe.key}},  # type: ignore[arg-type]
        )
        database = await stack.enter_async_context(Database(server.dsn, settings.database).opened())
        async with database.acquire() as connection:
            await migrate(connection, [("indexer", SQL), ("sidecar", sql_folder("sidecar"))])
            account = await keys.add_account(connection, None, None)
            key, _ = await keys.create(connection, account, "", None)
            catalog = await fill(connection, account, isrcs(songs, 0))
            jobs = [NewJob({"isrc": isrc}, key=isrc) for isrc in isrcs(songs, 0)]
            started = time.perf_counter()
            await queue.enqueue_many(connection, "bench.alone", jobs)
            alone = time.perf_counter() - started
        application = create_app(settings, database, await open_resources(settings, stack), ROUTES)
        url = await stack.enter_async_context(serving(application, settings.sidecar))
        session = await stack.enter_async_context(aiohttp.ClientSession(headers={"x-api-key": key}))
        print(f"{songs:,} songs; Postgres {server.version}, fsync on, all on this machine")
        print(f"queueing as many jobs alone: {alone:.2f} s")
        unknown = {"isrcs": isrcs(songs, songs)}
        for what, scope in (("unknown songs", unknown), ("a catalog", {"catalog_id": catalog}), ("again", unknown)):
            seconds, told = await ordered(session, url, scope)
            print(f"{what}: {seconds:.2f} s, enqueued {told['enqueued']:,}, skipped {told['skipped']:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=10_000)
    asyncio.run(main(parser.parse_args().songs))
