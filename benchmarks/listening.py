"""How many people a worker archives a second, against a stand-in for Spotify in a process of its own, beside the floor.

    python -m benchmarks.listening --people 5000
    python -m benchmarks.listening --people 5000 --latency-ms 200

The floor is the same answers fetched with the same number of requests at a time, with nothing read and nothing stored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from indexer import log
from indexer.config import LogSettings, Settings
from indexer.db import Connection, Database
from indexer.embedded import EmbeddedPostgres
from indexer.migrations import SQL, migrate, sql_folder
from indexer.sidecar.fakes import FakeSpotifyPeople
from indexer.sidecar.listening import schedule
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.listening.vault import Vault
from indexer.sidecar.providers.spotify_user import SpotifyUser
from indexer.sidecar.worker import Worker


async def add_people(connection: Connection, vault: Vault, url: str, count: int, refresh: bool) -> list[str]:
    """Make people at the stand-in and here; returns their access tokens. `refresh`: those have run out."""
    names = [{"id": f"person{n:05}"} for n in range(count)]
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/_people", data=json.dumps({"people": names})) as answer,
    ):
        made = (await answer.json())["people"]
    expires = datetime.now(UTC) + timedelta(hours=0 if refresh else 1)
    await connection.executemany(
        """
        insert into listeners (spotify_id, access_token, refresh_token, token_expires_at, cursor_ms)
        values ($1, $2, $3, $4, (extract(epoch from now() - interval '1 hour') * 1000)::bigint)
        """,
        [(one["id"], vault.encrypt(one["access_token"]), vault.encrypt(one["refresh_token"]), expires) for one in made],
    )
    return [one["access_token"] for one in made]


async def fetched(url: str, tokens: list[str], at_once: int) -> float:
    """Seconds of the floor."""
    after, turns = int((time.time() - 3600) * 1000), asyncio.Semaphore(at_once)

    async def one(session: aiohttp.ClientSession, token: str) -> None:
        headers = {"Authorization": f"Bearer {token}"}
        address = f"{url}/v1/me/player/recently-played?limit=50&after={after}"
        async with turns, session.get(address, headers=headers) as answer:
            await answer.read()

    started = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=at_once)) as session:
        await asyncio.gather(*(one(session, token) for token in tokens))
    return time.perf_counter() - started


async def archived(settings: Settings, database: Database, connection: Connection, listening: Listening) -> float:
    """Seconds from the order of the hour's batches, all due at once, to the last row."""
    started = time.perf_counter()
    await schedule.order(connection, datetime.now(UTC), settings.listening.batch_size)
    await connection.execute("update indexer.pgqueuer set execute_after = now()")
    worker = Worker(settings, database, {one.kind: one for one in schedule.JOBS}, {"listening": listening})
    task = asyncio.create_task(worker.run())
    while await connection.fetchval("select exists (select from indexer.pgqueuer)"):
        await asyncio.sleep(0.02)
    seconds = time.perf_counter() - started
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return seconds


async def main(given: argparse.Namespace) -> None:
    log.configure(LogSettings(level="warning"))
    fake = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "indexer.sidecar.fakes", "spotify", "--people", "0", "--latency-ms",
        str(given.latency_ms), "--plays-per-hour", str(given.plays_per_hour), stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert fake.stdout is not None
    url = (await fake.stdout.readline()).decode().strip()
    try:
        with tempfile.TemporaryDirectory(prefix="indexer-bench-") as folder:
            async with EmbeddedPostgres(Path(folder) / "postgres") as server:
                await measured(given, url, server.dsn, server.version)
    finally:
        fake.terminate()
        await fake.wait()


async def measured(given: argparse.Namespace, url: str, dsn: str, version: str) -> None:
    spotify: dict[str, Any] = {
        "base_url": url, "accounts_url": url,
        "client_id": FakeSpotifyPeople.client_id, "client_secret": FakeSpotifyPeople.key,
    }  # fmt: skip
    settings = Settings.model_validate({
        "database": {"url": dsn}, "providers": {"spotify": spotify}, "listening": {"token_key": "k" * 32},
    })  # fmt: skip
    async with (
        Database(dsn, settings.database).opened() as database,
        SpotifyUser(settings.providers.spotify) as client,
        database.acquire() as connection,
    ):
        await migrate(connection, [("indexer", SQL), ("sidecar", sql_folder("sidecar"))])
        listening = Listening(settings.listening, database, client)
        tokens = await add_people(connection, listening.vault, url, given.people, given.refresh)
        floor = 0.0 if given.refresh else await fetched(url, tokens, 4 * settings.listening.people_at_once)
        seconds = await archived(settings, database, connection, listening)
        people, plays = await connection.fetchrow(  # type: ignore[misc]
            """
            select (select count(*) from listeners where last_polled_at is not null), (select count(*) from play_events)
            """
        )
        print(f"{people:,} of {given.people:,} people, {plays:,} plays; latency {given.latency_ms:g} ms; "
              f"Postgres {version}, fsync on, all on this machine")  # fmt: skip
        print(f"archived in {seconds:.1f} s: {people / seconds:,.0f} people/s, {plays / seconds:,.0f} plays/s")
        if floor:
            print(f"the same answers only fetched: {floor:.1f} s; ratio {seconds / floor:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=5_000)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="of each answer of the stand-in")
    parser.add_argument("--plays-per-hour", type=float, default=10.0, help="of each person, on the mean")
    parser.add_argument("--refresh", action="store_true", help="everybody's access token has run out")
    asyncio.run(main(parser.parse_args()))
