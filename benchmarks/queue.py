"""How fast jobs are queued, and how fast jobs that do nothing are worked off, beside bare inserts of the same rows.

    python -m benchmarks.queue --jobs 10000
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from indexer import log, queue
from indexer.config import DatabaseSettings, LogSettings, Settings
from indexer.db import Connection, Database
from indexer.embedded import EmbeddedPostgres
from indexer.migrations import SQL, migrate
from indexer.queue import NewJob
from indexer.sidecar.jobs import JobContext, job
from indexer.sidecar.worker import Worker


@job("bench.nothing")
async def nothing(context: JobContext, payload: dict[str, Any]) -> None:
    pass


@job("bench.four", concurrency=4)
async def four(context: JobContext, payload: dict[str, Any]) -> None:
    pass


async def queued(connection: Connection, kind: str, jobs: int) -> float:
    """Seconds that one transaction takes to queue them."""
    given = [NewJob({"isrc": f"QZ{n:010d}"}, key=f"QZ{n:010d}", priority=n % 1000) for n in range(jobs)]
    started = time.perf_counter()
    assert await queue.enqueue_many(connection, kind, given) == jobs
    return time.perf_counter() - started


async def inserted(connection: Connection, jobs: int) -> float:
    """Seconds of the floor: the same texts by COPY into a table with one unique index."""
    await connection.execute("create table bare (id bigserial primary key, payload text, key text unique)")
    rows = [(f'{{"isrc":"QZ{n:010d}"}}', f"QZ{n:010d}") for n in range(jobs)]
    started = time.perf_counter()
    await connection.copy_records_to_table("bare", records=rows, columns=["payload", "key"])
    return time.perf_counter() - started


async def worked_off(settings: Settings, database: Database, connection: Connection, workers: int) -> float:
    """Seconds until nothing waits or runs."""
    kinds = {one.kind: one for one in (nothing, four)}
    started = time.perf_counter()
    tasks = [asyncio.create_task(Worker(settings, database, kinds, {}).run()) for _ in range(workers)]
    while await connection.fetchval("select exists (select from indexer.pgqueuer)"):
        await asyncio.sleep(0.01)
    seconds = time.perf_counter() - started
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return seconds


async def main(jobs: int) -> None:
    log.configure(LogSettings(level="warning"))
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as folder:
        async with EmbeddedPostgres(Path(folder) / "postgres") as server:
            settings = Settings(database=DatabaseSettings.model_validate({"url": server.dsn}))
            async with Database(server.dsn, settings.database).opened() as database:
                connection = await database.connect()
                await migrate(connection, [("indexer", SQL)])
                floor = await inserted(connection, jobs)
                seconds = await queued(connection, "bench.nothing", jobs)
                again = time.perf_counter()
                given = [NewJob({}, key=f"QZ{n:010d}") for n in range(jobs)]
                assert await queue.enqueue_many(connection, "bench.nothing", given) == 0
                again = time.perf_counter() - again
                print(f"{jobs:,} jobs with keys; Postgres {server.version}, fsync on, all on this machine")
                ratio = seconds / floor
                print(f"queued in {seconds:.2f} s, {ratio:.1f} times a bare COPY; all there already: {again:.2f} s")
                for kind, workers in (("bench.nothing", 1), ("bench.nothing", 2), ("bench.four", 1)):
                    if not await connection.fetchval("select exists (select from indexer.pgqueuer)"):
                        await queued(connection, kind, jobs)
                    seconds = await worked_off(settings, database, connection, workers)
                    print(f"{kind}, {workers} worker(s): {jobs / seconds:,.0f} jobs/s")
                await connection.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    asyncio.run(main(parser.parse_args().jobs))
