"""Gates: a kind whose gate is closed has no job begun, on any worker, until a moment that the database holds.

Who closes one waits for the workers that are just taking jobs, and they for him: once it is closed, nothing more is
taken.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from indexer.db import Connection
from indexer.queue import wake


async def close(connection: Connection, kind: str, until: datetime | timedelta, reason: str) -> None:
    """Close the kind's gate until then, or for so long; one that is closed for longer stays so."""
    moment, delay = (until, None) if isinstance(until, datetime) else (None, until)
    async with connection.transaction():
        await lock(connection)
        await connection.execute(
            """
            insert into indexer.job_gate as gate (kind, until, reason)
            values ($1, coalesce($2::timestamptz, now() + $3::interval), $4)
            on conflict (kind) do update set reason = excluded.reason, until = greatest(gate.until, excluded.until),
                closed_at = case when gate.until > now() then gate.closed_at else now() end
            """,
            kind, moment, delay, reason,
        )  # fmt: skip


async def open_(connection: Connection, kind: str) -> bool:
    """Open the kind's gate and wake the workers; False where it was not closed."""
    async with connection.transaction():
        status = await connection.execute("delete from indexer.job_gate where kind = $1", kind)
        await wake(connection)
    return bool(status != "DELETE 0")


async def lock(connection: Connection) -> None:
    """Keep all workers from taking jobs until the caller's transaction ends."""
    await connection.execute("select pg_advisory_xact_lock(hashtext('indexer.job_gate'), 0)")


async def closed(connection: Connection, kinds: Collection[str]) -> dict[str, float]:
    """The closed ones among these kinds, with the seconds until they open.

    In the caller's transaction, until whose end no gate is closed.
    """
    await connection.execute("select pg_advisory_xact_lock_shared(hashtext('indexer.job_gate'), 0)")
    rows = await connection.fetch(
        """
        select kind, extract(epoch from until - now())::float8 as seconds from indexer.job_gate
        where kind = any($1) and until > now()
        """,
        list(kinds),
    )
    return {row["kind"]: row["seconds"] for row in rows}


async def standing(connection: Connection) -> list[dict[str, Any]]:
    """The gates that are closed now."""
    rows = await connection.fetch(
        """
        select kind, until, reason, closed_at, extract(epoch from until - now())::float8 as seconds_left
        from indexer.job_gate where until > now() order by kind
        """
    )
    return [dict(row) for row in rows]
