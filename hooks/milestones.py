"""A track's running total reaches 10, 25, ... 1,000,000 plays: a row, and a notification to its owner."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime

from hooks import beside
from hooks.ownership import Owners
from indexer import Block, Connection, Derived, EventSpec, Panel, Tx, sql_folder

THRESHOLDS = (
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
)  # fmt: skip

# In chain order: a chain that was begun later comes later, and the plays of a block were inserted in their order. Where
# old blocks were filled in later, plays did not come in by this order: a rebuild then moves milestones to those plays
# that reached them on the chain.
DERIVED = Derived(
    "milestones",
    """
    select play_item_id as id, 'LISTEN_COUNT' as name, total as threshold, slot, created_at as timestamp
    from (
        select play_item_id, slot, created_at,
               row_number() over (partition by play_item_id order by chain, slot, id) as total
        from plays where chain is not null and counterpart is distinct from 'adopted'
    ) as counted
    where total in (10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000)
    """,
    base=("plays",),
    only="name = 'LISTEN_COUNT'",
    shared="select exists (select from plays where chain is null or counterpart = 'adopted')",
)

Reached = tuple[int, int, int, datetime]  # track, threshold, slot, time of the play that reached it


class Milestones:
    """The hook `milestones`. Needs the running totals of `aggregates`.

    Told is who owned the track as of the block in which the milestone was reached, where `entities` is enabled; else
    who owns it now.

    A rebuild keeps `notification` as it is: what was said can't be taken back, and who owned a track then is not known.
    """

    name = "milestones"
    listens: tuple[EventSpec, ...] = ()
    tables = ("milestones", "notification")
    after = ("plays", "aggregates")
    also_after = ("entities",)
    migrations = ("plays", sql_folder("plays"))
    derived = (DERIVED,)
    kept = ("notification",)
    panels = (
        Panel(
            "Last milestones",
            "select id as track, threshold as plays, slot as block, timestamp as at from milestones"
            " order by timestamp desc, threshold desc limit 10",
        ),
    )

    async def prepare(self, connection: Connection) -> None:
        await beside.refuse_trigger(connection, self.name)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        plays = tx.inserted("plays")
        if not plays:
            return
        places: dict[int, list[int]] = defaultdict(list)
        for place, track in enumerate(plays["play_item_id"]):
            places[track].append(place)
        totals = await tx.fetch(
            "select play_item_id, count from aggregate_plays where play_item_id = any($1::bigint[])", list(places)
        )
        slots, times = plays["slot"], plays["created_at"]
        reached: list[Reached] = []
        for track, total in totals:
            mine = places[track]
            before = total - len(mine)
            for threshold in THRESHOLDS[bisect_right(THRESHOLDS, before) : bisect_right(THRESHOLDS, total)]:
                place = mine[threshold - before - 1]
                reached.append((track, threshold, slots[place], times[place]))
        if reached:
            await self._announce(tx, sorted(reached, key=lambda one: (one[2], one[0], one[1])))

    async def _announce(self, tx: Tx, reached: Sequence[Reached]) -> None:
        """Write the milestones that are not there yet, and tell the owners of those tracks that have one."""
        owners = Owners(tx)
        await owners.read_tracks(track for track, _, _, _ in reached)
        tracks = [owners.track(track, slot) for track, _, slot, _ in reached]
        columns = [list(column) for column in zip(*reached, strict=True)]
        written = await tx.fetchrow(
            """
            with reached as (
                select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::timestamp[], $5::bigint[])
                    with ordinality as r (track, threshold, slot, at, owner, place)
            ), new as (
                insert into milestones (id, name, threshold, slot, timestamp)
                select track, 'LISTEN_COUNT', threshold, slot, at from reached order by track, threshold
                on conflict do nothing
                returning id, threshold
            ), told as (
                insert into notification (specifier, group_id, type, slot, timestamp, data, user_ids)
                select owner::text, 'milestone:LISTEN_COUNT:id:' || track || ':threshold:' || reached.threshold,
                       'milestone', slot, at,
                       jsonb_build_object('type', 'LISTEN_COUNT', 'track_id', track, 'threshold', reached.threshold),
                       array[owner::int]
                from reached
                join new on new.id = track and new.threshold = reached.threshold
                where owner between -2147483648 and 2147483647 -- else the owner can't be in user_ids
                order by place
                on conflict do nothing
                returning 1
            )
            select (select count(*) from new) as milestones, (select count(*) from told) as notifications
            """,
            *columns,
            [track.owner_id if track is not None and track.is_current else None for track in tracks],
        )
        assert written is not None
        tx.wrote("milestones", "inserted", written["milestones"])
        tx.wrote("notification", "inserted", written["notifications"])


milestones = Milestones
