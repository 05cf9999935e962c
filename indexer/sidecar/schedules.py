"""Schedules: jobs at the times of cron expressions, each tick once, however many sidecars there are.

A tick becomes a job in the transaction that moves the schedule's row forward; of several sidecars one moves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from croniter import croniter  # type: ignore[import-untyped]

from indexer import log, queue
from indexer.config import ScheduleSettings
from indexer.db import Database
from indexer.errors import ConfigError, DatabaseUnavailable
from indexer.sidecar.jobs import JobType, Schedule

# A clock that is set anew, or a machine that was asleep, is noticed after so long.
_LONGEST_SLEEP_SECONDS = 30.0
_RETRY_SECONDS = 1.0


def schedule(
    name: str, *, cron: str, kind: str | None = None, payload: Mapping[str, Any] | None = None,
    spread_seconds: float = 0.0, catch_up: bool = False,
) -> Callable[[JobType], JobType]:  # fmt: skip
    """Give a kind of job (made by `@job`, which stands below) times of its own; see `Schedule`.

    `kind`: another one's, if not its own.
    """

    def add(one: JobType) -> JobType:
        new = Schedule(name, cron, kind or one.kind, payload or {}, spread_seconds, catch_up)
        return msgspec.structs.replace(one, schedules=(*one.schedules, new))

    return add


def combined(jobs: Mapping[str, JobType], configured: Mapping[str, ScheduleSettings]) -> list[Schedule]:
    """The schedules of the code with what the settings say about them, and those of the settings alone."""
    found: dict[str, Schedule] = {}
    for one in (one for kind in jobs.values() for one in kind.schedules):
        if one.name in found:
            raise ConfigError(f"two schedules are called {one.name}")
        found[one.name] = one
    for name, said in configured.items():
        given = said.model_dump(exclude={"enabled"}, exclude_none=True, exclude_unset=True)
        if not said.enabled:
            found.pop(name, None)
        elif name in found:
            found[name] = msgspec.structs.replace(found[name], **given)
        elif said.cron is None or said.kind is None:
            raise ConfigError(f"sidecar.schedules.{name}: no job brings this schedule, so give its cron and kind")
        else:
            found[name] = Schedule(name, **given)
    for one in found.values():
        if not croniter.is_valid(one.cron):
            raise ConfigError(f"sidecar.schedules.{one.name}: {one.cron!r} is no cron expression (as 17 3 * * *)")
        if one.kind not in jobs:
            raise ConfigError(f"sidecar.schedules.{one.name}: no enabled job is of the kind {one.kind}")
    return list(found.values())


def latest(one: Schedule, now: datetime) -> datetime:
    """The newest tick that is not after `now`."""
    just_after = now.replace(microsecond=0) + timedelta(seconds=1)
    return croniter(one.cron, just_after).get_prev(datetime)  # type: ignore[no-any-return]


def following(one: Schedule, now: datetime) -> datetime:
    """The first tick after `now`."""
    return croniter(one.cron, now).get_next(datetime)  # type: ignore[no-any-return]


class Scheduler:
    """Turns ticks into jobs, until it is cancelled. `clock` and `sleep` are the test's to give."""

    def __init__(
        self, database: Database, schedules: list[Schedule], *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:  # fmt: skip
        self._database, self._schedules, self._clock, self._sleep = database, schedules, clock, sleep
        self._seen: dict[str, datetime] = {}
        self._thinned = log.Thinned()

    async def run(self) -> None:
        """Look at the schedules whenever one is due. What the database does not take is tried again."""
        while True:
            try:
                seconds = await self.step()
            except DatabaseUnavailable as error:
                self._thinned.warning("schedules wait for the database", error=str(error))
                seconds = _RETRY_SECONDS
            else:
                self._thinned.over("schedules wait for the database")
            await self._sleep(seconds)

    async def step(self) -> float:
        """Do what is due; returns the seconds until something may be due again.

        Ticks that passed while nobody looked are one: the newest.
        """
        now = self._clock()
        for one in self._schedules:
            if one.name not in self._seen:
                self._seen[one.name] = await self._first_sight(one, now)
            tick = latest(one, now)
            if tick > self._seen[one.name]:
                await self._fire(one, tick)
                self._seen[one.name] = tick
        next_ = min((following(one, now) for one in self._schedules), default=None)
        until = _LONGEST_SLEEP_SECONDS if next_ is None else (next_ - self._clock()).total_seconds()
        return max(0.0, min(until, _LONGEST_SLEEP_SECONDS))

    async def _first_sight(self, one: Schedule, now: datetime) -> datetime:
        """The tick from which on we look: the newest past one, or where those are made up for, the newest done."""
        tick = latest(one, now)
        async with self._database.acquire() as connection:
            await connection.execute(
                "insert into indexer.job_schedule (name, tick) values ($1, $2) on conflict (name) do nothing",
                one.name, tick,
            )  # fmt: skip
            done = await connection.fetchval("select tick from indexer.job_schedule where name = $1", one.name)
        return min(done, tick) if one.catch_up else tick

    async def _fire(self, one: Schedule, tick: datetime) -> None:
        async with self._database.acquire() as connection, connection.transaction():
            moved = await connection.fetchval(
                """
                insert into indexer.job_schedule as known (name, tick) values ($1, $2)
                on conflict (name) do update set tick = excluded.tick where known.tick < excluded.tick
                returning true
                """,
                one.name, tick,
            )  # fmt: skip
            if moved:
                after = tick + queue.spread(one.name, one.spread_seconds)
                key = f"{one.name}@{tick:%Y-%m-%dT%H:%M:%SZ}"
                await queue.enqueue(connection, one.kind, one.payload, key=key, after=after)
        if moved:
            log.get().info("schedule due", schedule=one.name, kind=one.kind, tick=tick.isoformat())
