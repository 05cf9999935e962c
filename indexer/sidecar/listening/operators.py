"""What operators see of people: numbers and ids, never a name or an e-mail. Also the metrics that say the same."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

from indexer import metrics
from indexer.db import Connection
from indexer.sidecar.listening.vault import Undecipherable, Vault

STATES = ("active", "cooling_down", "rate_limited", "disconnected")

_ROWS = 200


async def standing(connection: Connection, now: datetime) -> dict[str, Any]:
    """People by state, the places, who waits longest for a poll, and the newest play."""
    row = await connection.fetchrow(
        """
        with people as (
            select case when not is_active or refresh_token is null then 'disconnected'
                        when cooling_until > $1 then 'cooling_down'
                        when rate_limited_until > $1 then 'rate_limited' else 'active' end as state,
                   coalesce(last_polled_at, created_at) as polled
            from listeners
        )
        select count(*) filter (where state = 'active') as active,
               count(*) filter (where state = 'cooling_down') as cooling_down,
               count(*) filter (where state = 'rate_limited') as rate_limited,
               count(*) filter (where state = 'disconnected') as disconnected,
               min(polled) filter (where state = 'active') as oldest_poll,
               (select taken from listener_places where tier = 'founding') as places_taken,
               (select count(*) from listener_waitlist) as waitlist,
               (select max(last_polled_at) from listeners) as newest_poll
        from people
        """,
        now,
    )
    assert row is not None
    return dict(row)


async def cooling(connection: Connection, now: datetime, limit: int) -> list[dict[str, Any]]:
    """Who cools down or must connect anew, with failures in a row and what is left."""
    rows = await connection.fetch(
        """
        select id, is_active and refresh_token is not null as is_active, consecutive_failures, last_failure_type,
               last_failed_at, greatest(extract(epoch from cooling_until - $1) / 60, 0)::float8 as minutes_left
        from listeners
        where cooling_until > $1 or not is_active or refresh_token is null
        order by is_active desc, cooling_until desc, id limit $2
        """,
        now, limit,
    )  # fmt: skip
    return [dict(row) for row in rows]


async def latest_plays(connection: Connection, limit: int) -> list[dict[str, Any]]:
    """The newest plays of who was polled last."""
    rows = await connection.fetch(
        """
        select play.listener, play.played_at, play.track
        from (select id from listeners where last_polled_at is not null order by last_polled_at desc limit 50) as polled
        cross join lateral (
            select * from play_events where listener = polled.id order by played_at desc limit $1
        ) as play
        order by play.played_at desc, play.listener, play.track limit $1
        """,
        limit,
    )
    return [dict(row) for row in rows]


async def reset(connection: Connection, listener: UUID) -> bool:
    """End a person's cool-down and count of failures, so that the next batch polls; False where there is no such one.

    Who has taken the permission back must connect anew all the same: that shows again after the next poll.
    """
    status = await connection.execute(
        """
        update listeners
        set is_active = true, consecutive_failures = 0, last_failure_type = null, cooling_until = null,
            rate_limited_until = null, lease = null, leased_until = null
        where id = $1
        """,
        listener,
    )
    return bool(status == "UPDATE 1")


async def publish(connection: Connection, now: datetime) -> None:
    """The metrics of people, from the database."""
    found = await standing(connection, now)
    for state in STATES:
        metrics.listeners.labels(state).set(found[state])
    oldest = found["oldest_poll"]
    metrics.listener_oldest_poll_seconds.set(max(0.0, (now - oldest).total_seconds()) if oldest else 0.0)


async def rotate_tokens(connection: Connection, vault: Vault, say: Callable[[int, int], None]) -> tuple[int, int]:
    """Encrypt everybody's tokens by the newest key; returns how many people were changed, and how many can't be read.

    Beside workers that refresh tokens, and again after a kill. `say`: people looked at, and people there are.
    """
    total = await connection.fetchval("select count(*) from listeners")
    place, seen, changed, lost = UUID(int=0), 0, 0, 0
    while True:
        async with connection.transaction():
            rows = await connection.fetch(
                """
                select id, access_token, refresh_token from listeners where id > $1 order by id limit $2 for update
                """,
                place, _ROWS,
            )  # fmt: skip
            if not rows:
                return changed, lost
            for row in map(tuple, rows):
                try:
                    new = [vault.renewed(token) if token else None for token in row[1:]]
                except Undecipherable:
                    lost += 1
                    continue
                if new != [None, None]:
                    await connection.execute(
                        """
                        update listeners set access_token = coalesce($2, access_token),
                            refresh_token = coalesce($3, refresh_token)
                        where id = $1
                        """,
                        row[0], *new,
                    )  # fmt: skip
                    changed += 1
        place, seen = rows[-1]["id"], seen + len(rows)
        say(seen, total)


