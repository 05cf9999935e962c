"""A sidecar as a process that works off listening jobs by a clock that stands in a file, until it is killed.

    python listening_sidecar.py DATABASE_URL SPOTIFY_URL CLOCK_FILE

It prints the name by which its jobs are known.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import datetime
from pathlib import Path

from listenkit import TOKEN_KEY, spotify_settings

from indexer import log
from indexer.config import LogSettings, Settings
from indexer.db import Database
from indexer.sidecar.listening.schedule import JOBS
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.providers.spotify_user import SpotifyUser
from indexer.sidecar.worker import Worker


async def main(database_url: str, spotify_url: str, clock_file: Path) -> None:
    settings = Settings(
        database={"url": database_url}, listening={"token_key": TOKEN_KEY, "founding_cap": 0},  # type: ignore[arg-type]
    )  # fmt: skip
    log.configure(LogSettings(level="warning", format="json"))
    async with (
        Database(database_url, settings.database).opened() as database,
        SpotifyUser(spotify_settings(spotify_url, timeout_seconds=10)) as spotify,
    ):
        listening = Listening(
            settings.listening, database, spotify, lambda: datetime.fromisoformat(clock_file.read_text())
        )
        worker = Worker(settings, database, {one.kind: one for one in JOBS}, {"listening": listening})
        print(worker.name, flush=True)
        await worker.run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
