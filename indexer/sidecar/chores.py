"""The hooks' chores (what trending reads, pruning) as a job of the sidecar, every quarter of an hour."""

from __future__ import annotations

from typing import Any

from indexer import maintenance, registry
from indexer.sidecar.jobs import JobContext, job
from indexer.sidecar.schedules import schedule


class ChoresFailed(Exception):
    """Some chores failed; the others are done."""


@schedule("chores", cron="*/15 * * * *", spread_seconds=60)
@job("chores", concurrency=1, retries=3, timeout_seconds=3600.0)
async def chores(context: JobContext, payload: dict[str, Any]) -> None:
    """Carry out what `indexer maintain` does. One that fails is tried again, and does not stop the others."""
    hooks = registry.load_hooks(context.settings.hooks)
    failed: list[str] = []
    async for done in maintenance.carry_out(context.database, maintenance.chores_of(hooks)):
        context.log.info("chore", chore=done.chore, hook=done.hook, did=done.did, error=done.error)
        if done.error:
            failed.append(f"{done.chore}: {done.error}")
    if failed:
        raise ChoresFailed("; ".join(failed))
