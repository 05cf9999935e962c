"""Jobs, as they are worked off: the decorator that makes a kind of job, what its function may raise, and how it ended.

    @job("songstats.history", concurrency=4, retries=8, timeout_seconds=60)
    async def history(context: JobContext, payload: dict[str, Any]) -> None: ...

A job may run more than once: its worker may die before the end is stored. So its function bears repetition.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from indexer import registry
from indexer.config import Settings
from indexer.db import Database
from indexer.errors import ConfigError, HookLoadError

Fate: TypeAlias = Literal["done", "terminal", "retried", "held", "put_back"]

# What the sidecar always works off, whatever `sidecar.jobs` adds: places of kinds, or of lists of them.
BUILT_IN: tuple[str, ...] = (
    "indexer.sidecar.chores:chores",
    "indexer.sidecar.drain:history",
    "indexer.sidecar.current:JOBS",
    "indexer.sidecar.maintenance:maintenance",
    "indexer.sidecar.listening.schedule:JOBS",
)

_LONGEST_TEXT = 20_000


class Terminal(Exception):
    """Done, though not as hoped, and never to be tried again."""


class Retry(Exception):
    """Again after so many seconds, as a provider asked for. Counts as a try."""

    def __init__(self, after_seconds: float, reason: str) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class Held(Exception):
    """To be kept for an operator, who requeues or cancels it."""


class Saturated(Exception):
    """Put this job back as it was, and begin no other of its kind for so many seconds, on any worker."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class JobContext(msgspec.Struct, frozen=True):
    """What a job's function may use. `attempt` counts from 1; `resources` are the providers' clients by name."""

    id: int
    kind: str
    attempt: int
    database: Database
    settings: Settings
    resources: Mapping[str, Any]
    log: Any


Work: TypeAlias = Callable[[JobContext, dict[str, Any]], Awaitable[object]]


class Schedule(msgspec.Struct, frozen=True):
    """A job at the times of a cron expression (UTC), at a moment of the following `spread_seconds` that its name sets.

    `catch_up`: a tick that was missed while no sidecar ran is made up for at the start, once.
    """

    name: str
    cron: str
    kind: str
    payload: Mapping[str, Any] = {}
    spread_seconds: float = 0.0
    catch_up: bool = False


class JobType(msgspec.Struct, frozen=True):
    """A kind of job with its function and its limits; made by `@job`."""

    kind: str
    function: Work
    concurrency: int
    retries: int
    timeout_seconds: float
    backoff_seconds: float
    longest_backoff_seconds: float
    schedules: tuple[Schedule, ...] = ()

    async def __call__(self, context: JobContext, payload: dict[str, Any]) -> object:
        return await self.function(context, payload)


def job(
    kind: str, *, concurrency: int = 0, retries: int = 5, timeout_seconds: float = 300.0, backoff_seconds: float = 1.0,
    longest_backoff_seconds: float = 900.0,
) -> Callable[[Work], JobType]:  # fmt: skip
    """Make a kind of job of `async def f(context, payload)`.

    `concurrency`: so many at a time over all workers, 0 for no limit. `retries`: tries after the first one, before the
    job is held; each waits twice as long as the one before.
    """
    return lambda function: JobType(
        kind, function, concurrency, retries, timeout_seconds, backoff_seconds, longest_backoff_seconds
    )


class Outcome(msgspec.Struct, frozen=True):
    """How a job ended. `after_seconds`: until it is tried again; `gate_seconds`: until its kind is."""

    fate: Fate
    error: Exception | None = None
    after_seconds: float | None = None
    gate_seconds: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it was one of the job's tries."""
        return self.fate == "retried"

    def details(self) -> dict[str, str] | None:
        """What the log keeps of the error, in the form of PgQueuer's own records."""
        if self.error is None:
            return None
        text = "".join(traceback.format_exception(self.error))
        return {
            "exception_type": type(self.error).__name__,
            "exception_message": storable(str(self.error)[:_LONGEST_TEXT]),
            "traceback": storable(text[-_LONGEST_TEXT:]),
        }


def storable(text: str) -> str:
    """A text as jsonb takes it: without NUL and without halves of surrogate pairs."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def judge(one: JobType, error: Exception, attempt: int) -> Outcome:
    """What becomes of a job whose function raised."""
    if isinstance(error, Terminal):
        return Outcome("terminal", error)
    if isinstance(error, Held):
        return Outcome("held", error)
    if isinstance(error, Saturated):
        return Outcome("put_back", error, gate_seconds=error.seconds)
    if attempt > one.retries:
        return Outcome("held", error)
    if isinstance(error, Retry):
        return Outcome("retried", error, after_seconds=max(0.0, error.after_seconds))
    return Outcome("retried", error, after_seconds=backoff(one, attempt))


def backoff(one: JobType, attempt: int) -> float:
    """Seconds until the next try: twice as long each time, and by chance up to a quarter less."""
    longest = min(one.backoff_seconds * 2.0 ** min(attempt - 1, 60), one.longest_backoff_seconds)
    return longest * random.uniform(0.75, 1.0)  # noqa: S311


# -- which kinds there are -----------------------------------------------------------------------------------------


def load_jobs(places: Sequence[str]) -> dict[str, JobType]:
    """The kinds of job at "module:attribute" (one, or a list of them) beside the built-in ones.

    Raises HookLoadError where a place can't be imported or holds something else, ConfigError where a kind comes twice.
    """
    found: dict[str, JobType] = {}
    for place in dict.fromkeys((*BUILT_IN, *places)):
        thing = registry.locate(place, "job")
        for one in thing if isinstance(thing, (list, tuple)) else [thing]:
            if not isinstance(one, JobType):
                raise HookLoadError(f"{place} is no job: make one with @job(...)")
            if one.kind in found:
                raise ConfigError(f"two jobs are of the kind {one.kind}: {place} is the second")
            found[one.kind] = one
    return found


def limits(jobs: Mapping[str, JobType], configured: Mapping[str, int]) -> dict[str, int]:
    """How many of each kind may run at a time, over all workers; 0 is no limit."""
    unknown = sorted(set(configured) - set(jobs))
    if unknown:
        raise ConfigError(f"sidecar.concurrency names {unknown[0]}, which no enabled job is: {', '.join(jobs)} are")
    return {kind: configured.get(kind, one.concurrency) for kind, one in jobs.items()}
