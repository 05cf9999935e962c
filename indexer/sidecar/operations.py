"""What operators do with jobs: look at them, hold, requeue and cancel them. A job that runs is stopped for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from indexer.db import Connection
from indexer.queue import logged
from indexer.queue import requeue as requeue

STATES = ("waiting", "running", "held", "unfinal")
_STATUS = {"waiting": "queued", "running": "picked", "held": "failed"}


async def list_jobs(connection: Connection, kind: str | None, state: str | None, limit: int) -> list[dict[str, Any]]:
    """Jobs in the order in which they would run, at most `limit`; those that wait for finality last."""
    rows = await connection.fetch(
        """
        select id, entrypoint as kind,
               case status when 'picked' then 'running' when 'failed' then 'held' else 'waiting' end as state,
               priority, substr(dedupe_key, length(entrypoint) + 2) as key, attempts, created, execute_after as due
        from indexer.pgqueuer
        where ($1::text is null or entrypoint = $1) and ($2::text is null or status::text = $2)
        order by status = 'failed' desc, status = 'picked' desc, priority desc, id
        limit $3
        """,
        kind, _STATUS.get(state or "", state), limit,
    )  # fmt: skip
    found = [dict(row) for row in rows]
    if state in (None, "unfinal") and len(found) < limit:
        found += await _unfinal(connection, kind, limit - len(found))
    return found


async def _unfinal(connection: Connection, kind: str | None, limit: int) -> list[dict[str, Any]]:
    rows = await connection.fetch(
        """
        select null::bigint as id, kind, 'unfinal' as state, priority, key, 0 as attempts, null::timestamptz as created,
               execute_after as due, number as block
        from indexer.waiting_job where $1::text is null or kind = $1 order by id limit $2
        """,
        kind, limit,
    )  # fmt: skip
    return [dict(row) for row in rows]


async def find_job(connection: Connection, number: int) -> dict[str, Any] | None:
    """One job with its payload and what the log says of it, oldest first; None where it is gone without a trace."""
    row = await connection.fetchrow(
        """
        select id, entrypoint as kind,
               case status when 'picked' then 'running' when 'failed' then 'held' else 'waiting' end as state,
               priority, substr(dedupe_key, length(entrypoint) + 2) as key, attempts, created, execute_after as due,
               updated, heartbeat, payload
        from indexer.pgqueuer where id = $1
        """,
        number,
    )
    lines = await connection.fetch(
        """
        select created as at, entrypoint, status::text, traceback from indexer.pgqueuer_log
        where job_id = $1 order by id
        """,
        number,
    )  # fmt: skip
    if row is None and not lines:
        return None
    facts = dict(row) if row else {"id": number, "kind": lines[0]["entrypoint"], "state": "ended"}
    facts["payload"] = _payload(facts.get("payload"))
    facts["log"] = [
        {"at": line["at"], "status": line["status"],
         "error": msgspec.json.decode(line["traceback"]) if line["traceback"] else None}
        for line in lines
    ]  # fmt: skip
    return facts


def _payload(stored: bytes | None) -> Any:
    """The payload, or what stands there as text, if another hand has written it."""
    try:
        return None if stored is None else msgspec.json.decode(stored)
    except msgspec.DecodeError:
        return stored and stored.decode("utf-8", "replace")


async def cancel(connection: Connection, numbers: Sequence[int]) -> int:
    """Delete jobs, and stop those that run; returns how many."""
    async with connection.transaction():
        done = await logged(connection, "delete from indexer.pgqueuer where id = any($1)", numbers, "canceled", None)
        await _stop(connection, numbers)
    return done


async def hold(connection: Connection, numbers: Sequence[int], reason: str) -> int:
    """Keep jobs that wait or run from running on; returns how many."""
    async with connection.transaction():
        done = await logged(
            connection,
            """
            update indexer.pgqueuer set status = 'failed', queue_manager_id = null, slot = null, updated = now()
            where id = any($1) and status <> 'failed'
            """,
            numbers, "failed", reason,
        )  # fmt: skip
        await _stop(connection, numbers)
    return done


async def _stop(connection: Connection, numbers: Sequence[int]) -> None:
    """Tell the workers to stop these jobs; who does not hear it finds them gone at the next beat."""
    await connection.execute(
        """
        select pg_notify('ch_pgqueuer', json_build_object('channel', 'ch_pgqueuer', 'sent_at', now(),
            'type', 'cancellation_event', 'ids', $1::bigint[])::text)
        """,
        list(numbers),
    )


async def held(connection: Connection, kind: str | None) -> list[int]:
    """The numbers of all held jobs, or of those of a kind."""
    rows = await connection.fetch(
        "select id from indexer.pgqueuer where status = 'failed' and ($1::text is null or entrypoint = $1) order by id",
        kind,
    )
    return [row["id"] for row in rows]
