"""Wiring: the sidecar as a process of its own, or beside the daemon in its process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from indexer import log, notify, registry
from indexer.app import migrate_database, open_database
from indexer.config import Settings
from indexer.db import Database, shown
from indexer.migrations import sql_folder
from indexer.sidecar import drain, maintenance, measurements, reads
from indexer.sidecar.api import Live, LiveProbe, Ready, ReadyProbe, create_app, serving
from indexer.sidecar.jobs import load_jobs
from indexer.sidecar.listening import connect, page
from indexer.sidecar.listening import reads as listening_reads
from indexer.sidecar.listening import schedule as listening
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.providers import open_providers
from indexer.sidecar.providers.spotify_user import SpotifyUser
from indexer.sidecar.routes import Route
from indexer.sidecar.schedules import Scheduler, combined
from indexer.sidecar.upkeep import keep_up
from indexer.sidecar.worker import CANCEL_SECONDS, Worker
from indexer.version import version

__all__ = ["CANCEL_SECONDS", "beside", "run", "sidecar_lines"]

# What the API answers, beside the probes and what describes it.
ROUTES: tuple[Route, ...] = (
    *measurements.ROUTES, *reads.ROUTES, *maintenance.ROUTES, *listening.ROUTES, *connect.ROUTES,
    *listening_reads.ROUTES, *page.ROUTES,
)  # fmt: skip
# Beside a daemon that a hook has halted nothing is waited for.
_HALTED_DRAIN_SECONDS = 1.0


def sidecar_lines() -> list[tuple[str, Path]]:
    """The sidecar's own migrations, beside the engine's and the hooks'."""
    folder = sql_folder("sidecar")
    return [("sidecar", folder)] if folder.is_dir() else []


async def run(settings: Settings) -> None:
    """Work off jobs and answer the API until cancelled.

    Raises UsageError (2) for settings that can't work, Temporary (75) where the database is not to be had at start.
    """
    hooks = registry.load_hooks(settings.hooks)
    async with open_database(settings) as database:
        for name in await migrate_database(database, hooks, sidecar_lines()):
            log.get().info("migration applied", file=name)
        await beside(settings, database, alone=True)


async def beside(
    settings: Settings, database: Database, halted: Callable[[], bool] = lambda: False, *, alone: bool = False
) -> None:
    """The sidecar on a database that is open and migrated, until cancelled.

    `halted` says whether there is no time left; `alone`: systemd's process is ours, and no daemon's that tells it.
    """
    jobs = load_jobs(settings.sidecar.jobs)
    schedules = combined(jobs, settings.sidecar.schedules)
    async with AsyncExitStack() as stack:
        resources = await open_resources(settings, database, stack)
        async with database.acquire() as connection:
            await drain.resume(connection, settings)

        def drain_seconds() -> float:
            seconds = settings.sidecar.drain_seconds
            return min(_HALTED_DRAIN_SECONDS, seconds) if halted() else seconds

        worker = Worker(settings, database, jobs, resources, drain_seconds=drain_seconds)
        live, ready = probes(settings, worker)
        application = create_app(settings, database, resources, ROUTES, live=live, ready=ready)
        url = await stack.enter_async_context(serving(application, settings.sidecar))
        log.get().info(
            "sidecar started", version=version(), jobs=sorted(jobs), schedules=sorted(one.name for one in schedules),
            database=shown(database.dsn), status=url,
        )  # fmt: skip
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(worker.run(), name="jobs")
                tasks.create_task(Scheduler(database, schedules).run(), name="schedules")
                tasks.create_task(keep_up(database, settings, jobs), name="upkeep")
                if alone:
                    told = notify.keep_told(lambda: _standing(settings, worker))
                    tasks.create_task(told, name="notify")
        except ExceptionGroup as group:
            first = group.exceptions[0]
            raise first from first.__cause__


async def open_resources(settings: Settings, database: Database, stack: AsyncExitStack) -> dict[str, Any]:
    """What jobs and routes share, by name; closed with the stack."""
    providers = await stack.enter_async_context(open_providers(settings.providers))
    spotify = await stack.enter_async_context(SpotifyUser(settings.providers.spotify))
    people = Listening(settings.listening, database, spotify)
    stack.push_async_callback(people.settle)
    named = {name: getattr(providers, name) for name in ("songstats", "apify", "spotify", "stripe")}
    return {**named, "listening": people}


def probes(settings: Settings, worker: Worker) -> tuple[LiveProbe, ReadyProbe]:
    """What /livez and /readyz say of the worker."""

    async def live() -> Live:
        reason = _stuck(settings, worker)
        return Live(live=reason is None, reason=reason)

    async def ready() -> Ready:
        reason = _unready(worker)
        return Ready(ready=reason is None, reason=reason, running=len(worker.running))

    return live, ready


def _stuck(settings: Settings, worker: Worker) -> str | None:
    """Why a restart is the remedy: the worker has not looked for jobs for long although the database is there."""
    silent = worker.silent_seconds > settings.http.stall_seconds and worker.driver.trouble is None
    return "the worker does not look for jobs" if silent else None


def _unready(worker: Worker) -> str | None:
    """Why no jobs are begun: draining, without a database, or starting."""
    if worker.draining:
        return "draining"
    if worker.driver.trouble is not None:
        return "the database is away"
    return None if worker.begun else "starting"


def _standing(settings: Settings, worker: Worker) -> notify.Standing:
    """For systemd: what the probes answer, and how many jobs run."""
    stuck, unready = _stuck(settings, worker), _unready(worker)
    status = f"{stuck or unready or 'working'}, {len(worker.running)} jobs running"
    return notify.Standing(stuck is None and unready is None, stuck is None, status)
