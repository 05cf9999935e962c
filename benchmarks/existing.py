"""Migrating a database that another indexer has filled, while it goes on writing and its readers read.

    python -m benchmarks.existing --plays 1000000
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import asyncpg

from indexer.app import migration_lines
from indexer.config import HooksSettings
from indexer.embedded import EmbeddedPostgres
from indexer.migrations import migrate
from indexer.registry import load_hooks

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import oldschema

HOOKS = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones"]
STORAGE = "select pg_relation_filenode('plays'), pg_size_pretty(pg_table_size('plays'))"


async def main(plays: int) -> None:
    lines = migration_lines(load_hooks(HooksSettings(enabled=HOOKS)))
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as folder:
        async with EmbeddedPostgres(Path(folder) / "postgres") as server:
            connection = await asyncpg.connect(server.dsn, server_settings={"search_path": "public"})
            await oldschema.make(connection, plays)
            before = await connection.fetchrow(STORAGE)
            async with oldschema.in_use(server.dsn) as (writer, reader):
                await asyncio.sleep(1.0)
                idle = writer.longest, reader.longest
                writer.longest = reader.longest = 0.0
                began = time.perf_counter()
                applied = await migrate(connection, lines)
                seconds = time.perf_counter() - began
            after = await connection.fetchrow(STORAGE)
            print(f"{plays:,} plays ({before[1]}); Postgres {server.version}, fsync on; one writer, one reader")
            for one in applied:
                print(f"  {one.line}/{one.number:04d}_{one.name}: {one.seconds:.2f} s")
            print(f"{seconds:.2f} s in all; the table was {'not ' * (before[0] == after[0])}rewritten")
            for name, waits, alone in (("writer", writer, idle[0]), ("reader", reader, idle[1])):
                print(f"{name}: {waits.statements} statements, the longest {waits.longest * 1000:.0f} ms "
                      f"({alone * 1000:.0f} ms before the migration)")
            await connection.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plays", type=int, default=1_000_000)
    asyncio.run(main(parser.parse_args().plays))
