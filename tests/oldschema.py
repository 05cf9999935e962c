"""The tables as an older indexer made and filled them: integer ids, timestamps without a zone, no place on a chain.

Also for benchmarks/existing.py: rows by the million, and the sessions that go on using the table meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg

TABLES = """
create table plays (
    id           serial primary key,
    user_id      integer,
    source       varchar,
    play_item_id integer not null,
    created_at   timestamp not null default now(),
    updated_at   timestamp not null default now(),
    slot         integer,
    signature    varchar,
    city         varchar,
    region       varchar,
    country      varchar
);
create index ix_plays_created_at on plays (created_at);
create index ix_plays_user_track_date on plays (play_item_id, user_id, created_at) where user_id is not null;
create table aggregate_plays (play_item_id integer primary key, count bigint);
create table aggregate_monthly_plays (
    play_item_id integer not null, timestamp date not null default now(), country text not null default '',
    count integer not null, primary key (play_item_id, timestamp, country)
);
create table hourly_play_counts (hourly_timestamp timestamp primary key, play_count integer not null);
create table milestones (
    id integer not null, name varchar not null, threshold integer not null, blocknumber integer, slot integer,
    timestamp timestamp not null, primary key (id, name, threshold)
);
create table notification (
    id serial primary key, specifier varchar not null, group_id varchar not null, type varchar not null, slot integer,
    blocknumber integer, timestamp timestamp not null, data jsonb, user_ids integer[],
    constraint uq_notification unique (group_id, specifier)
);
create table user_distinct_play_hours (
    user_id integer primary key, hours_with_play integer not null default 0, updated_at timestamptz not null
);
create table user_distinct_play_tracks (
    user_id integer primary key, track_count integer not null default 0, updated_at timestamptz not null
);
create table user_listening_history (user_id integer primary key, listening_history jsonb not null);
create table challenge_listen_streak (
    user_id serial primary key, last_listen_date timestamp, listen_streak integer not null
);
create type challengetype as enum ('boolean', 'numeric', 'aggregate', 'trending');
create table challenges (
    id varchar primary key, type challengetype not null, amount varchar, active boolean not null, step_count integer,
    starting_block integer, weekly_pool integer, cooldown_days integer
);
insert into challenges values ('e', 'aggregate', '1', true, 7, 100, 25000, 7);
create table user_challenges (
    challenge_id varchar not null references challenges, user_id integer not null, specifier varchar not null,
    is_complete boolean not null, current_step_count integer, completed_blocknumber integer, amount integer not null
    default 0, created_at timestamp not null default now(), completed_at timestamp,
    primary key (challenge_id, specifier)
);
create table tracks (
    track_id integer primary key, owner_id integer not null, title text, genre varchar, created_at timestamp not null,
    is_current boolean not null, is_delete boolean not null, is_unlisted boolean not null default false
);
create table users (
    user_id integer primary key, handle varchar, is_current boolean not null, is_verified boolean not null
    default false, is_deactivated boolean not null default false
);
"""
INSERT = "insert into plays (play_item_id, created_at, slot) values (7, timezone('utc', now()), 316999999)"
SELECT = "select id from plays where created_at > timestamp '2024-01-01 01:00' limit 100"


async def make(connection: asyncpg.Connection, plays: int) -> None:
    """The tables, with so many plays; every 50th comes twice, and half of them are anonymous."""
    await connection.execute(TABLES)
    await connection.execute(
        """
        insert into plays (user_id, source, play_item_id, created_at, slot, signature, city, region, country)
        select case when n % 2 = 0 then n % 20000 + 1 end, 'relay', n % 5000 + 1,
               timestamp '2024-01-01' + n / 3 * interval '1 second', 316000000 + n / 10, md5(n::text),
               nullif('Berlin', case when n % 7 = 0 then 'Berlin' end), 'Berlin', 'Germany'
        from (select n - (n % 50 = 0)::int as n from generate_series(1, $1::int) as n) as numbered
        """,
        plays,
        timeout=300,
    )
    await connection.execute("analyze plays")


class Waits:
    """How often a session's statement ran, and the longest that one took."""

    def __init__(self) -> None:
        self.statements, self.longest = 0, 0.0

    async def measure(self, statement: Callable[[], Awaitable[object]]) -> None:
        began = time.perf_counter()
        await statement()
        self.longest = max(self.longest, time.perf_counter() - began)
        self.statements += 1


@asynccontextmanager
async def in_use(url: str) -> AsyncIterator[tuple[Waits, Waits]]:
    """One session inserts plays and one reads them, each statement a transaction, for as long as the block runs."""
    writer, reader = Waits(), Waits()
    ends = asyncio.Event()

    async def run(waits: Waits, sql: str) -> None:
        session = await asyncpg.connect(url)
        try:
            while not ends.is_set():
                await waits.measure(lambda: session.execute(sql))
                await asyncio.sleep(0.002)
        finally:
            await session.close()

    tasks = [asyncio.create_task(run(writer, INSERT)), asyncio.create_task(run(reader, SELECT))]
    try:
        yield writer, reader
    finally:
        ends.set()
        await asyncio.gather(*tasks)
