"""Another writer of the same plays in the same table, as during a migration: adoption, the guard, its own trigger.

A play has one row, whoever was first. What the other writer has committed before us is adopted: its row gets our place
on the chain. What it inserts after us is dropped by the guard, two triggers on `plays`. One lock (indexer.plays_lock)
has both take turns: they hold it shared from their first insert to their COMMIT, we alone from before we look for their
rows to ours. Each side reads, with the lock in hand, all that the other one has committed. A writer whose transactions
are REPEATABLE READ or SERIALIZABLE reads what was there before it had the lock: the guard can't help it.

A row of the other writer that is dropped is no row of its INSERT either: "INSERT 0 0", and nothing by RETURNING.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from indexer import ConfigError, Connection, Row, Tx

_PLACE = ("slot", "tx_hash", "event_index")
_PAUSE_SECONDS = 0.2
_PATIENCE_SECONDS = 30.0

# What the old trigger writes. Its rows are written in our transaction too, so the hook `plays` must declare them.
TRIGGER_TABLES = (
    "aggregate_plays", "aggregate_monthly_plays", "hourly_play_counts", "milestones", "notification",
    "user_distinct_play_hours", "user_distinct_play_tracks", "user_listening_history",
)  # fmt: skip


async def adopt(tx: Tx, rows: Sequence[Row], columns: Sequence[str]) -> Sequence[Row]:
    """Take over the other writer's rows of these plays, one for one; returns the plays that are still to be inserted.

    A play that has its row already, as in a replay, adopts none. Where there are more of ours than of theirs, the first
    ones on the chain adopt, the oldest rows first.
    """
    known = await _places(tx, rows, columns)
    new = [row for place, row in enumerate(rows) if place not in known]
    if not new:
        return new
    await tx.execute("select indexer.plays_lock('plays')")
    # The keys one by one, each by the index on created_at, whatever the planner thinks of the table's size: num_nulls
    # keeps it off the index that begins with the chain, of whose contents its statistics know nothing.
    adopted = await tx.fetch(
        """
        with ours as (
            select *, dense_rank() over (order by play_item_id, created_at, signature, user_id) as kind,
                   row_number() over (
                       partition by play_item_id, created_at, signature, user_id order by place
                   ) as turn
            from unnest($1::bigint[], $2::bigint[], $3::timestamp[], $4::text[], $5::bigint[], $6::bytea[],
                        $7::bigint[])
                with ordinality as u (user_id, play_item_id, created_at, signature, slot, tx_hash, event_index, place)
        ), pairs as (
            select theirs.id, ours.slot, ours.tx_hash, ours.event_index, ours.place
            from (select distinct on (kind) * from ours) as wanted
            cross join lateral (
                select id, row_number() over (order by id) as turn
                from plays
                where plays.created_at = wanted.created_at and plays.play_item_id = wanted.play_item_id
                  and plays.user_id is not distinct from wanted.user_id
                  and coalesce(plays.signature, '') = wanted.signature and num_nulls(plays.chain) = 1
            ) as theirs
            join ours on ours.kind = wanted.kind and ours.turn = theirs.turn
        )
        update plays
        set chain = $8, slot = pairs.slot, tx_hash = pairs.tx_hash, event_index = pairs.event_index,
            counterpart = 'adopted'
        from pairs where plays.id = pairs.id and plays.chain is null
        returning pairs.place
        """,
        *_columns(new, columns, ("user_id", "play_item_id", "created_at", "signature", *_PLACE)),
        tx.chain,
    )
    tx.wrote("plays", "adopted", len(adopted))
    taken = {record["place"] - 1 for record in adopted}
    return [row for place, row in enumerate(new) if place not in taken]


async def without_adopted(tx: Tx, rows: Sequence[Row], columns: Sequence[str]) -> Sequence[Row]:
    """The plays but those whose rows were adopted at the time: no hook has counted these."""
    known = await _places(tx, rows, columns)
    return [row for place, row in enumerate(rows) if known.get(place) != "adopted"]


async def _places(tx: Tx, rows: Sequence[Row], columns: Sequence[str]) -> dict[int, str | None]:
    """Of those plays that have a row already: their places in `rows`, and what is known of the other writer's row."""
    if not rows:
        return {}
    found = await tx.fetch(
        """
        select place, counterpart
        from unnest($1::bigint[], $2::bytea[], $3::bigint[]) with ordinality as u (slot, tx_hash, event_index, place)
        join plays using (slot, tx_hash, event_index)
        where plays.chain = $4
        """,
        *_columns(rows, columns, _PLACE),
        tx.chain,
    )
    return {record["place"] - 1: record["counterpart"] for record in found}


def _columns(rows: Sequence[Row], columns: Sequence[str], wanted: Sequence[str]) -> list[list[object]]:
    places = [list(columns).index(name) for name in wanted]
    return [[row[place] for row in rows] for place in places]


async def guard(connection: Connection, wanted: bool) -> None:
    """Put the guard on `plays`, or take it off: both wait for those who write the table, in short turns."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while (outcome := await connection.fetchval("select indexer.guard_plays('plays', $1)", wanted)) == "busy":
        if time.monotonic() > deadline:
            raise TimeoutError("the table plays is never free for the guard against another writer: try again later")
        await asyncio.sleep(_PAUSE_SECONDS)
    if outcome == "denied":
        change = "put on" if wanted else "taken off"
        raise ConfigError(
            f"hook plays: the guard against another writer can't be {change} the table plays, which is another role's: "
            f"connect as its owner, or leave hooks.plays.beside_writer as it was"
        )


async def old_trigger(connection: Connection) -> str | None:
    """The name of the trigger on `plays` that does the work of our counting hooks, if it is there and enabled."""
    name: str | None = await connection.fetchval(
        """
        select tgname from pg_trigger join pg_proc on pg_proc.oid = tgfoid
        where tgrelid = to_regclass('plays') and not tgisinternal and tgenabled in ('O', 'A')
          and (tgname = 'on_play' or proname = 'handle_play')
        order by tgname limit 1
        """
    )
    return name


async def refuse_trigger(connection: Connection, hook: str) -> None:
    """Raise ConfigError where that trigger is there: beside it, the hook would count every play twice."""
    name = await old_trigger(connection)
    if name is not None:
        raise ConfigError(
            f"the trigger {name} on the table plays does the work of the hook {hook}: both would count every play. "
            f"Drop the trigger (drop trigger {name} on plays), or take the hook {hook} out of hooks.enabled"
        )
