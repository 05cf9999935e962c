"""Play counts by track, by track, month and country, and by hour: each newly inserted play counts once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import date
from typing import TypeVar

from hooks import beside
from indexer import Block, Connection, Derived, EventSpec, Panel, Tx, sql_folder

K = TypeVar("K")

# The country is part of a key, and a btree refuses keys of more than 2,700 bytes; the play itself keeps it whole.
COUNTRY_CHARACTERS = 200

# Another writer's plays (chain is null, or adopted) are not ours to count. But its counts may be in the same tables.
_SHARED = "select exists (select from plays where chain is null or counterpart = 'adopted')"

DERIVED = (
    Derived(
        "aggregate_plays",
        """
        select play_item_id, count(*) as count
        from plays where chain is not null and counterpart is distinct from 'adopted' group by play_item_id
        """,
        base=("plays",),
        shared=_SHARED,
    ),
    Derived(
        "aggregate_monthly_plays",
        """
        select play_item_id, date_trunc('month', created_at)::date as timestamp, left(country, 200) as country,
               count(*) as count
        from plays where chain is not null and counterpart is distinct from 'adopted' group by 1, 2, 3
        """,
        base=("plays",),
        shared=_SHARED,
    ),
    Derived(
        "hourly_play_counts",
        """
        select date_trunc('hour', created_at) as hourly_timestamp, count(*) as play_count
        from plays where chain is not null and counterpart is distinct from 'adopted' group by 1
        """,
        base=("plays",),
        shared=_SHARED,
    ),
)


class Aggregates:
    """The hook `aggregates`. Reads the plays that `plays` inserted in this span, never the table."""

    name = "aggregates"
    listens: tuple[EventSpec, ...] = ()
    tables = ("aggregate_plays", "aggregate_monthly_plays", "hourly_play_counts")
    after = ("plays",)
    migrations = ("plays", sql_folder("plays"))
    derived = DERIVED
    panels = (
        Panel(
            "Top tracks",
            "select play_item_id as track, count as plays from aggregate_plays order by count desc, track limit 10",
        ),
    )

    async def prepare(self, connection: Connection) -> None:
        await beside.refuse_trigger(connection, self.name)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        plays = tx.inserted("plays")
        if not plays:
            return
        tracks, times, countries = plays["play_item_id"], plays["created_at"], plays["country"]
        await self._by_track(tx, Counter(tracks))
        months = Counter(
            (track, (time.year, time.month), country[:COUNTRY_CHARACTERS])
            for track, time, country in zip(tracks, times, countries, strict=True)
        )
        await self._by_month(tx, months)
        await tx.execute(
            """
            insert into hourly_play_counts (hourly_timestamp, play_count)
            select * from unnest($1::timestamp[], $2::bigint[])
            on conflict (hourly_timestamp) do update
            set play_count = hourly_play_counts.play_count + excluded.play_count
            """,
            *_columns(Counter(time.replace(minute=0, second=0, microsecond=0) for time in times)),
        )

    async def _by_track(self, tx: Tx, counts: Counter[int]) -> None:
        await tx.execute(
            """
            insert into aggregate_plays (play_item_id, count)
            select * from unnest($1::bigint[], $2::bigint[])
            on conflict (play_item_id) do update set count = aggregate_plays.count + excluded.count
            """,
            *_columns(counts),
        )

    async def _by_month(self, tx: Tx, counts: Counter[tuple[int, tuple[int, int], str]]) -> None:
        keys, numbers = _columns(counts)
        await tx.execute(
            """
            insert into aggregate_monthly_plays (play_item_id, timestamp, country, count)
            select * from unnest($1::bigint[], $2::date[], $3::text[], $4::bigint[])
            on conflict (play_item_id, timestamp, country) do update
            set count = aggregate_monthly_plays.count + excluded.count
            """,
            [track for track, _, _ in keys],
            [date(year, month, 1) for _, (year, month), _ in keys],
            [country for _, _, country in keys],
            numbers,
        )


def _columns(counts: Counter[K]) -> tuple[list[K], list[int]]:
    """Keys and counts in the keys' order: two writers that lock rows in one order can't deadlock."""
    keys = sorted(counts)  # type: ignore[type-var]
    return keys, [counts[key] for key in keys]


aggregates = Aggregates
