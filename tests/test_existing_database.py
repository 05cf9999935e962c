"""The daemon's tables in a database that an older indexer has made, filled, and still uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import oldschema
import pytest
import structlog
from oracle import Oracle, dump

from indexer.app import migration_lines
from indexer.config import HooksSettings
from indexer.errors import HookFailed
from indexer.migrations import Applied, migrate
from indexer.model import Block
from indexer.registry import Registered, load_hooks
from indexer.testing import assert_set_equals_rows, assert_undo_restores, make_blocks, run_hooks

pytestmark = pytest.mark.timeout(120)

HOOKS = [
    "hooks.entities:entities", "hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones",
    "hooks.listeners:listeners", "hooks.challenges:challenges",
]  # fmt: skip
SECONDS = 1_700_000_000
INDEXES = """
    select relname::text from pg_index join pg_class on pg_class.oid = indexrelid
    where indrelid = 'plays'::regclass and indisvalid order by relname
"""


def hooks(**settings: dict[str, Any]) -> tuple[Registered, ...]:
    return load_hooks(HooksSettings(enabled=HOOKS, **settings))


@pytest.fixture
async def old(empty_database_url: str) -> AsyncIterator[asyncpg.Connection]:
    """A session as the daemon's on a database without any table of ours."""
    session = await asyncpg.connect(
        empty_database_url, timeout=30, server_settings={"search_path": "public", "timezone": "UTC"}
    )
    yield session
    await session.close(timeout=5)


async def migrated(connection: asyncpg.Connection) -> list[Applied]:
    return await migrate(connection, migration_lines(hooks()))


def plays(*args: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    whole = {"trackId": "1", "userId": "7", "playedAt": str(SECONDS), "signature": "s", "country": "Germany"}
    return [("Played", {**whole, **one}) for one in args]


async def test_the_table_is_migrated_while_others_use_it(old: asyncpg.Connection, empty_database_url: str) -> None:
    """Neither rewritten nor locked for long; the figures for a million plays are benchmarks/existing.py's."""
    await oldschema.make(old, 200_000)
    storage = "select pg_relation_filenode('plays'), (select count(*) from plays where slot < 316999999)"
    before = await old.fetchrow(storage)
    async with oldschema.in_use(empty_database_url) as (writer, reader):
        applied = await migrated(old)
    assert writer.statements > 10 and reader.statements > 10
    assert max(writer.longest, reader.longest) < 1.0
    assert await old.fetchrow(storage) == before
    assert applied[[one.line for one in applied].index("plays")].name == "plays.existing"
    assert await migrated(old) == []
    # theirs on created_at serves; the other one of theirs has its columns in another order
    assert [row[0] for row in await old.fetch(INDEXES)] == [
        "ix_plays_created_at", "ix_plays_user_track_date", "plays_listener", "plays_pkey", "plays_place",
        "plays_signature", "plays_slot",
    ]  # fmt: skip
    types = "select attname, format_type(atttypid, atttypmod) from pg_attribute where attrelid = 'plays'::regclass"
    columns = dict(await old.fetch(types))
    assert columns["user_id"] == columns["slot"] == "integer"
    assert (columns["chain"], columns["tx_hash"], columns["event_index"]) == ("smallint", "bytea", "bigint")


async def test_a_long_query_keeps_us_waiting_and_nobody_else(old: asyncpg.Connection, empty_database_url: str) -> None:
    await oldschema.make(old, 1_000)
    holder = await asyncpg.connect(empty_database_url)
    transaction = holder.transaction()
    await transaction.start()
    await holder.fetch("select from plays limit 1")
    async with oldschema.in_use(empty_database_url) as (writer, reader):
        with structlog.testing.capture_logs() as logs:
            migrating = asyncio.create_task(migrated(old))
            while not any(line["event"] == "migration waits for a lock" for line in logs):
                await asyncio.sleep(0.05)
            await asyncio.sleep(1.5)
            assert not migrating.done()
            await transaction.commit()
            await migrating
    assert max(writer.longest, reader.longest) < 1.0
    assert {line["file"] for line in logs} == {"0001_plays.existing.sql"}
    await holder.close()


async def test_an_index_that_was_left_unfinished_is_built_anew(old: asyncpg.Connection) -> None:
    await oldschema.make(old, 1_000)
    with pytest.raises(asyncpg.UniqueViolationError):
        await old.execute("create unique index concurrently plays_slot on plays (slot)")
    assert "plays_slot" not in [row[0] for row in await old.fetch(INDEXES)]
    await migrated(old)
    assert "plays_slot" in [row[0] for row in await old.fetch(INDEXES)]
    assert not await old.fetchval("select indisunique from pg_index where indexrelid = 'plays_slot'::regclass")


async def test_a_fresh_database_gets_each_index_once(connection: asyncpg.Connection) -> None:
    assert [row[0] for row in await connection.fetch(INDEXES)] == [
        "plays_created_at", "plays_listener", "plays_pkey", "plays_place", "plays_signature", "plays_slot",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("index", "columns", "predicate", "found"),
    [
        ("(a)", "{a}", None, True),
        ("(a, b)", "{a}", None, True),
        ("(b, a)", "{a}", None, False),
        ("(b) include (a)", "{b,a}", None, False),
        ("((a + 1))", "{a}", None, False),
        ("using hash (a)", "{a}", None, True),
        ("(a) where b > 0", "{a}", None, False),
        ("(a) where b is not null", "{a}", "(b IS NOT NULL)", True),
        ("(a)", "{a}", "(b IS NOT NULL)", True),
    ],
)
async def test_which_index_serves(
    connection: asyncpg.Connection, index: str, columns: str, predicate: str | None, found: bool
) -> None:
    await connection.execute(f"create table made (a int, b int); create index on made {index}")
    sql = "select indexer.indexed('made', $1::text::text[], $2)"
    assert await connection.fetchval(sql, columns, predicate) is found


async def test_the_bundled_hooks_run_on_the_old_types(old: asyncpg.Connection) -> None:
    await oldschema.make(old, 0)
    await migrated(old)
    owned = [(1, 100), (2, 2**31 - 1)]
    await old.executemany("insert into tracks values ($1, $2, 't', 'g', 'now', true, false)", owned)
    edges = [str(sign * 2**31 + step) for sign in (1, -1) for step in (-1, 0, 1)]
    odd = [*({"userId": n} for n in edges), *({"trackId": n} for n in edges), {"userId": ""}]
    said = plays(*odd, *[{"trackId": "2"}] * 10)
    blocks = make_blocks(said, [], plays(*[{"playedAt": str(SECONDS + 20 * 3600)}] * 20))
    bench = await run_hooks(old, hooks(), blocks)
    expected = Oracle(bench.pipeline.chain.id, dict(owned), bits=32).apply(blocks).dump()
    assert await dump(old) == expected
    assert await old.fetchval("select sum(hours_with_play) from user_distinct_play_hours") > 0
    await bench.undo(0)
    assert not any((await dump(old)).values())
    await assert_undo_restores(old, hooks(), blocks)
    await old.execute("delete from indexer.coverage; delete from indexer.cursor; delete from indexer.chain")
    await assert_set_equals_rows(old, hooks(), blocks)


async def test_beside_the_rows_that_it_has(old: asyncpg.Connection) -> None:
    """Its plays are adopted, with their missing texts, and the counts that it made stay as they are."""
    await oldschema.make(old, 500)
    await old.execute("insert into aggregate_plays select play_item_id, count(*) from plays group by 1")
    await migrated(old)
    counts = await old.fetch("select * from aggregate_plays order by 1")
    rows = await old.fetch("select id, user_id, play_item_id, created_at, signature from plays order by id")
    said = [plays(_said(row))[0] for row in rows]
    blocks: list[Block] = make_blocks(said[:200], said[200:])
    await run_hooks(old, hooks(plays={"beside_writer": True}), blocks, final=True)
    kinds = await old.fetch("select id, counterpart from plays order by id")
    assert [tuple(row) for row in kinds] == [(row["id"], "adopted") for row in rows]
    assert await old.fetch("select * from aggregate_plays order by 1") == counts


def _said(row: asyncpg.Record) -> dict[str, str]:
    seconds = (row["created_at"] - datetime(1970, 1, 1)) // timedelta(seconds=1)
    return {
        "userId": str(row["user_id"] or ""), "trackId": str(row["play_item_id"]), "playedAt": str(seconds),
        "signature": row["signature"],
    }  # fmt: skip


async def test_a_height_beyond_its_slot_is_named(old: asyncpg.Connection) -> None:
    await oldschema.make(old, 0)
    await migrated(old)
    with pytest.raises(HookFailed, match=r"int32|integer"):
        await run_hooks(old, hooks(), make_blocks(plays({}), first=2**31), final=True)
