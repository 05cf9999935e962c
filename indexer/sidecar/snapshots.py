"""Snapshots: play counts of albums as they are now, ordered by an account, in parts that are a run of the actor each.

An account's orders go one after the other behind a lock on its row: that is how the same order is placed once however
many ask for it at the same moment, and how the month's cap holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec

from indexer import queue
from indexer.db import Connection
from indexer.sidecar.calls import end_of_month

CHUNK_KIND = "snapshot.chunk"
FINISH_KIND = "snapshot.finish"

_USD_AN_ALBUM = Decimal("0.003")
_ALBUMS_A_CHUNK = 100
_REUSED_FOR = timedelta(minutes=60)
_MONTHLY = timedelta(days=30)


class Order(msgspec.Struct, frozen=True):
    """What an account wants measured. Albums, songs and platforms are sorted, each once."""

    account: UUID
    catalog: UUID | None
    albums: Sequence[str]
    isrcs: Sequence[str]
    platforms: Sequence[str]
    schedule: str = "once"

    @property
    def cost(self) -> Decimal:
        """Our own plays cost nothing."""
        return len(self.albums) * _USD_AN_ALBUM if "spotify" in self.platforms else Decimal(0)


class Placed(msgspec.Struct, frozen=True):
    """A snapshot that was ordered; `reused`: by an earlier order."""

    id: UUID
    state: str
    albums: int
    cost: Decimal
    reused: bool


class OverCap(Exception):
    """The month's spend and this order together are more than the account may spend; `until` is the month's end."""

    def __init__(self, until: datetime) -> None:
        super().__init__(until)
        self.until = until


async def place(connection: Connection, order: Order, cap: Decimal) -> Placed:
    """Start a snapshot, or find the one that the account has ordered of late. Raises OverCap."""
    async with connection.transaction():
        await _lock(connection, order.account)
        earlier = await _earlier(connection, order)
        return earlier or await _start(connection, order, cap)


async def _lock(connection: Connection, account: UUID) -> None:
    await connection.execute("select from accounts where id = $1 for no key update", account)


async def _earlier(connection: Connection, order: Order) -> Placed | None:
    """The same albums, platforms and schedule, and where no album says what is meant, the same songs."""
    row = await connection.fetchrow(
        """
        select id, state, album_count from playcount_snapshots
        where account = $1 and created_at > now() - $2::interval and state <> 'failed'
          and album_ids = $3 and platforms = $4 and schedule = $5 and ('chain' <> all ($4::text[]) or isrcs = $6)
        order by created_at desc limit 1
        """,
        order.account, _REUSED_FOR, list(order.albums), list(order.platforms), order.schedule, list(order.isrcs),
    )  # fmt: skip
    return Placed(row["id"], row["state"], row["album_count"], Decimal(0), True) if row else None


async def _start(connection: Connection, order: Order, cap: Decimal) -> Placed:
    if order.cost and await spent(connection, order.account) + order.cost > cap:
        raise OverCap(await end_of_month(connection))
    snapshot = await connection.fetchval(
        """
        insert into playcount_snapshots
            (account, catalog, album_ids, isrcs, platforms, schedule, album_count, estimated_cost_usd)
        values ($1, $2, $3, $4, $5, $6, $7, $8) returning id
        """,
        order.account, order.catalog, list(order.albums), list(order.isrcs), list(order.platforms), order.schedule,
        len(order.albums), order.cost,
    )  # fmt: skip
    albums = order.albums if "spotify" in order.platforms else []
    for number, first in enumerate(range(0, len(albums), _ALBUMS_A_CHUNK)):
        chunk = await connection.fetchval(
            "insert into playcount_chunks (snapshot, number, album_ids) values ($1, $2, $3) returning id",
            snapshot, number, list(albums[first : first + _ALBUMS_A_CHUNK]),
        )  # fmt: skip
        await queue.enqueue(connection, CHUNK_KIND, {"chunk": str(chunk)}, key=str(chunk))
    if not albums:
        await queue.enqueue(connection, FINISH_KIND, {"snapshot": str(snapshot)}, key=str(snapshot))
    return Placed(snapshot, "queued", len(order.albums), order.cost, False)


async def spent(connection: Connection, account: UUID) -> Decimal:
    """What the account's snapshots of this month cost: of those that failed only the runs that were started."""
    found: Decimal = await connection.fetchval(
        """
        select coalesce(sum(case state when 'failed' then started.cost else estimated_cost_usd end), 0)
        from playcount_snapshots
        left join lateral (
            select coalesce(sum(runs * cardinality(album_ids)), 0) * $2::numeric as cost
            from playcount_chunks where snapshot = playcount_snapshots.id
        ) as started on true
        where account = $1
          and created_at >= date_trunc('month', now() at time zone 'utc') at time zone 'utc'
        """,
        account, _USD_AN_ALBUM,
    )  # fmt: skip
    return found


async def start_due(connection: Connection, cap: Decimal) -> tuple[int, int]:
    """Start the monthly snapshots that are due; returns how many, and how many the accounts' caps forbid."""
    started = forbidden = 0
    for last in await _due(connection, None):
        async with connection.transaction():
            await _lock(connection, last["account"])
            # another may have started it while we waited
            if not any(again["id"] == last["id"] for again in await _due(connection, last["account"])):
                continue
            names = ("account", "catalog", "isrcs", "platforms", "schedule")
            order = Order(albums=last["album_ids"], **{name: last[name] for name in names})
            try:
                await _start(connection, order, cap)
                started += 1
            except OverCap:
                forbidden += 1
    return started, forbidden


async def _due(connection: Connection, account: UUID | None) -> list[Any]:
    """The last snapshot of each monthly series (an account and a set of albums) that is old enough."""
    return await connection.fetch(
        """
        with last as (
            select distinct on (account, album_ids, case album_ids when '{}' then isrcs end) *
            from playcount_snapshots where schedule = 'monthly' and ($1::uuid is null or account = $1)
            order by account, album_ids, case album_ids when '{}' then isrcs end, created_at desc
        )
        select id, account, catalog, album_ids, isrcs, platforms, schedule from last
        where created_at <= now() - $2::interval order by created_at
        """,
        account, _MONTHLY,
    )  # fmt: skip


# -- while it is measured ------------------------------------------------------------------------------------------


class Chunk(msgspec.Struct, frozen=True):
    """A part of a snapshot. `asked`: a run was asked for, and what came of it is not known."""

    id: UUID
    snapshot: UUID
    albums: list[str]
    asked: bool
    run: str | None


async def begin(connection: Connection, chunk: UUID) -> Chunk | None:
    """The part to be measured, which is running now; None where it is done, or gone with its account."""
    row = await connection.fetchrow(
        """
        update playcount_chunks set state = 'running' where id = $1 and state <> 'done'
        returning id, snapshot, album_ids as albums, asked_at is not null as asked, run_id as run
        """,
        chunk,
    )
    if row is None:
        return None
    await _turn(connection, row["snapshot"], "running")
    return Chunk(**row)


async def note_asking(connection: Connection, chunk: UUID) -> None:
    """From now on there may be a run of which we don't know."""
    await connection.execute("update playcount_chunks set asked_at = now(), runs = runs + 1 where id = $1", chunk)


async def note_refused(connection: Connection, chunk: UUID, *, started: bool) -> None:
    """No run's id is known, and none is expected any more; `started`: though there may be a run, which was paid for."""
    await connection.execute(
        "update playcount_chunks set asked_at = null, runs = runs - $2 where id = $1", chunk, 0 if started else 1
    )


async def note_run(connection: Connection, chunk: UUID, run: str) -> None:
    """A run was started: whoever repeats the job asks for its rows, and starts none."""
    await connection.execute(
        "update playcount_chunks set asked_at = null, run_id = $2, started_at = now() where id = $1 and run_id is null",
        chunk, run,
    )  # fmt: skip


async def forget_run(connection: Connection, chunk: UUID) -> None:
    """The run has failed: whoever repeats the job starts another."""
    await connection.execute("update playcount_chunks set run_id = null, started_at = null where id = $1", chunk)


async def fail(connection: Connection, chunk: UUID) -> None:
    snapshot = await connection.fetchval(
        "update playcount_chunks set state = 'failed' where id = $1 and state <> 'done' returning snapshot", chunk
    )
    if snapshot is not None:
        await _turn(connection, snapshot, "failed")


async def measure(connection: Connection, chunk: Chunk, plays: dict[str, int]) -> None:
    """Store the counts of songs by ISRC, in the caller's transaction. The last part orders the snapshot's end."""
    await connection.execute("select from playcount_snapshots where id = $1 for no key update", chunk.snapshot)
    await connection.execute(
        """
        insert into song_measurements
            (song, platform, metric, value, captured_at, data_source, raw_ref, snapshot)
        select song, 'spotify', 'platform_displayed_play_count', plays, started_at, 'apify_spotify_playcount',
               run_id, snapshot
        from unnest($2::text[], $3::bigint[]) as counts (song, plays), playcount_chunks
        where playcount_chunks.id = $1
        on conflict (song, platform, metric, captured_at) do nothing
        """,
        chunk.id, sorted(plays), [plays[song] for song in sorted(plays)],
    )  # fmt: skip
    await connection.execute("update playcount_chunks set state = 'done' where id = $1", chunk.id)
    left = await connection.fetch(
        "select state from playcount_chunks where snapshot = $1 and state <> 'done'", chunk.snapshot
    )
    if not left:
        key = str(chunk.snapshot)
        await queue.enqueue(connection, FINISH_KIND, {"snapshot": key}, key=key)
    elif all(row["state"] != "failed" for row in left):
        await _turn(connection, chunk.snapshot, "running")


async def _turn(connection: Connection, snapshot: UUID, state: str) -> None:
    await connection.execute(
        """
        update playcount_snapshots set state = $2, updated_at = now()
        where id = $1 and state <> $2 and ($2 <> 'running' or not exists (
            select from playcount_chunks where snapshot = $1 and playcount_chunks.state = 'failed'
        ))
        """,
        snapshot, state,
    )  # fmt: skip


async def finish(connection: Connection, snapshot: UUID) -> None:
    """Measure our own plays, if that is wanted, and call the snapshot done; all in the caller's transaction."""
    wanted = await connection.fetchval(
        "select 'chain' = any(platforms) from playcount_snapshots where id = $1 for no key update", snapshot
    )
    if wanted:
        await _measure_plays(connection, snapshot)
    await _turn(connection, snapshot, "done")


async def give_up(connection: Connection, snapshot: UUID) -> None:
    """The snapshot's end can't be reached."""
    await _turn(connection, snapshot, "failed")


async def _measure_plays(connection: Connection, snapshot: UUID) -> None:
    """The plays of each song are those of the tracks that are mapped to it; stamped with the order's own time."""
    await connection.execute(
        """
        with ordered as (
            select id, created_at, album_ids, isrcs from playcount_snapshots where id = $1
        ), wanted as (
            select unnest(isrcs) as song from ordered
            union
            select song from song_identifiers, ordered
            where platform = 'spotify' and identifier_type = 'album_id' and value = any(album_ids)
        ), mapped as (
            select song, value::bigint as track from wanted join song_identifiers using (song)
            where platform = 'chain' and identifier_type = 'track_id' and value ~ '^[0-9]{1,18}$'
        )
        insert into song_measurements (song, platform, metric, value, captured_at, data_source, raw_ref, snapshot)
        select song, 'chain', 'platform_displayed_play_count', coalesce(sum(count), 0), min(created_at), 'chain',
               'aggregate_plays', $1
        from mapped cross join ordered left join aggregate_plays on play_item_id = track
        group by song
        on conflict (song, platform, metric, captured_at) do nothing
        """,
        snapshot,
    )
