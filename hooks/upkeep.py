"""The chores of the hook `plays`: what trending reads is computed anew, and old plays are pruned if that is wanted."""

from __future__ import annotations

from functools import partial

from indexer import Chore, Connection, note_pruned

# one transaction; what is left is for the next runs
PRUNED_PLAYS = 50_000


def chores(prune_after_days: int | None) -> tuple[Chore, ...]:
    """`prune_after_days`: the age of plays that are pruned; None keeps them all."""
    refresh = Chore("aggregate_interval_plays", refresh_interval_plays)
    if prune_after_days is None:
        return (refresh,)
    return refresh, Chore("prune_plays", partial(prune_plays, days=prune_after_days))


async def refresh_interval_plays(connection: Connection) -> str:
    """Compute the plays of the last 7 and 30 days anew, while readers see the old ones."""
    # the first time there are none, and nobody can read the view: that alone can't be done beside readers
    if await connection.fetchval(
        "select relispopulated from pg_class where oid = 'aggregate_interval_plays'::regclass"
    ):
        await connection.execute("refresh materialized view concurrently aggregate_interval_plays")
    else:
        await connection.execute("refresh materialized view aggregate_interval_plays")
    tracks = await connection.fetchval("select count(*) from aggregate_interval_plays where month_listen_counts > 0")
    return f"{tracks:,} tracks with plays in the last 30 days"


async def prune_plays(connection: Connection, *, days: int) -> str:
    """Delete the oldest plays beyond that age, and keep of them what their listeners heard, in one transaction.

    Nothing waits for it, nor it for others: rows that somebody holds are left for later, and so are those of blocks
    that may still be reorganised.
    """
    async with connection.transaction():
        row = await connection.fetchrow(
            """
            with old as materialized (
                select id from plays
                where created_at < (now() at time zone 'utc') - make_interval(days => $1)
                  and not exists (select from indexer.block where block.chain = plays.chain and number = slot)
                order by created_at, id
                limit $2
                for update skip locked
            ), gone as (
                delete from plays using old where plays.id = old.id
                returning user_id, play_item_id, created_at, chain, slot
            ), heard as (
                insert into pruned_listens as known (user_id, play_item_id, count, latest)
                select user_id, play_item_id, count(*), max(created_at) from gone
                where user_id is not null group by 1, 2 order by 1, 2
                on conflict (user_id, play_item_id) do update
                set count = known.count + excluded.count, latest = greatest(known.latest, excluded.latest)
            )
            select (select count(*) from gone) as plays,
                   -- every play that is gone is from before this moment
                   (select max(created_at) + interval '1 microsecond' from gone) as before,
                   array(select chain from gone where chain is not null group by chain order by chain) as chains,
                   array(select max(slot) from gone where chain is not null group by chain order by chain) as slots
            """,
            days, PRUNED_PLAYS,
        )  # fmt: skip
        assert row is not None
        if not row["plays"]:
            return ""
        blocks = dict(zip(row["chains"], row["slots"], strict=True))
        await note_pruned(connection, "plays", row["before"], row["plays"], blocks=blocks)
    return f"{row['plays']:,} plays from before {row['before']:%Y-%m-%d %H:%M:%S} pruned"
