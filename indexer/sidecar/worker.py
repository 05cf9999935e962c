"""The worker: PgQueuer's queue manager in our loop, and what happens around each job.

SIGTERM just cancels here, too: nothing new is begun, what runs gets `drain_seconds` to end, and the rest goes back to
wait as it was.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
from pgqueuer.core.executors import AbstractEntrypointExecutor, EntrypointExecutorParameters
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain import models, types

from indexer import log, metrics
from indexer.config import Settings
from indexer.db import Database
from indexer.errors import DatabaseUnavailable
from indexer.sidecar.connection import Lasting
from indexer.sidecar.jobs import JobContext, JobType, Outcome, judge, limits
from indexer.sidecar.store import NAMES, Store

# A notice that was not heard costs no more than this.
_POLL_SECONDS = 5.0
_MOST_BATCH = 50
_MOST_SECONDS_BETWEEN_BEATS = 15.0
# Of jobs that were told to stop, until they have and that is stored.
CANCEL_SECONDS = 3.0


class Worker:
    """Works off the jobs of the given kinds, until it is cancelled. Made inside the loop that runs it."""

    def __init__(
        self, settings: Settings, database: Database, jobs: Mapping[str, JobType], resources: Mapping[str, Any], *,
        drain_seconds: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        self.settings, self.database, self.jobs, self.resources = settings, database, dict(jobs), resources
        self._sidecar = settings.sidecar
        self._drain_seconds = drain_seconds or (lambda: settings.sidecar.drain_seconds)
        self._lost_after = timedelta(seconds=settings.sidecar.heartbeat_timeout_seconds)
        self.driver = Lasting(database)
        self._made_at = time.monotonic()
        self.draining = False
        self.running: dict[int, str] = {}  # the kinds of the jobs that run, by the job's number
        self._alone = asyncio.Lock()
        name = types.QueueManagerId(uuid.uuid4())
        self._store = Store(self.driver, name, self._lost_after, settings.sidecar.max_worker_deaths)
        self._manager = QueueManager(self._store, channel=NAMES.channel)
        self._manager.queue_manager_id = name
        for kind, limit in limits(jobs, settings.sidecar.concurrency).items():
            parameters = EntrypointExecutorParameters(concurrency_limit=limit, func=_never)
            self._manager.register_executor(kind, _Runner(parameters, self))

    @property
    def name(self) -> str:
        """By which the database knows whose jobs run."""
        return str(self._store.worker)

    @property
    def begun(self) -> bool:
        """Whether it has looked for jobs already."""
        return self._store.looked_at is not None

    @property
    def silent_seconds(self) -> float:
        """How long it has not looked for jobs."""
        return time.monotonic() - (self._store.looked_at or self._made_at)

    async def run(self) -> None:
        """Take jobs and run them. Ends by cancellation alone, after the drain."""
        most = self._sidecar.max_running
        working = asyncio.create_task(
            self._manager.run(
                dequeue_timeout=timedelta(seconds=_POLL_SECONDS), batch_size=max(1, min(_MOST_BATCH, most // 2)),
                max_concurrent_tasks=most, heartbeat_timeout=self._lost_after, log_aggregation_interval=timedelta(0),
            ),
            name="worker",
        )  # fmt: skip
        beating = asyncio.create_task(self._beat(), name="beat")
        try:
            await asyncio.wait({working, beating}, return_when=asyncio.FIRST_COMPLETED)
            for task in (working, beating):
                if task.done():
                    task.result()  # neither ends by itself: what it died of is to be seen
        except asyncio.CancelledError:
            await self._drain(working)
            raise
        finally:
            working.cancel()
            beating.cancel()
            await asyncio.wait({working, beating})
            await self.driver.close()

    async def _drain(self, working: asyncio.Task[None]) -> None:
        """Begin nothing more, let what runs end, and put back what does not end in time."""
        self.draining = True
        self._manager.shutdown.set()
        seconds = self._drain_seconds()
        self.driver.ends_at = time.monotonic() + seconds + CANCEL_SECONDS
        log.get().info("draining", jobs=len(self.running), seconds=seconds)
        await asyncio.wait({working}, timeout=seconds)
        if not working.done():
            for context in list(self._manager.job_context.values()):
                context.cancellation.cancel()
            await asyncio.wait({working}, timeout=CANCEL_SECONDS)
        left = len(self._store.taken)
        log.get().info("drained", **({"left_to_the_heartbeat": left} if left else {}))

    async def _beat(self) -> None:
        """Say all the time that the worker lives, and stop the jobs that are its own no longer.

        An operator has cancelled or held them, or another worker has them since we have been silent for too long.
        """
        heard = time.monotonic()
        between = min(self._lost_after.total_seconds() / 4, _MOST_SECONDS_BETWEEN_BEATS)
        while True:
            await asyncio.sleep(between)
            before = set(self.running)
            with suppress(TimeoutError):
                # the lock on the connection may be held by whoever waits for the database to come back
                async with asyncio.timeout(between):
                    ours = await self._store.beat()
                    heard = time.monotonic()
                    self._stop(before - ours, "no longer this worker's")
            if time.monotonic() - heard > self._lost_after.total_seconds():
                self._stop(before, "the database has not heard of this worker for too long")

    def _stop(self, jobs: set[int], reason: str) -> None:
        for number in jobs & self.running.keys():
            context = self._manager.job_context.get(types.JobId(number))
            if context is not None and not context.cancellation.cancel_called:
                log.get().warning("job stopped", kind=self.running[number], job=number, reason=reason)
                context.cancellation.cancel()

    # -- one job ---------------------------------------------------------------------------------------------------

    async def perform(self, job: models.Job, context: models.Context) -> None:
        """Run a job and store how it ended. Raises nothing, so that PgQueuer thinks no end of its own."""
        one, started = self.jobs[job.entrypoint], time.perf_counter()
        outcome = Outcome("put_back")  # what becomes of it if it is stopped
        with context.cancellation:
            if not self.draining:
                outcome = await self._judged(one, job)
        seconds = time.perf_counter() - started
        self.running.pop(job.id, None)
        try:
            await self._store.end(job, outcome)
        except DatabaseUnavailable as error:
            log.get().warning("end of a job not stored", kind=one.kind, job=job.id, error=str(error))
            return
        metrics.job_seconds.labels(one.kind, outcome.fate).observe(seconds)
        metrics.job_outcomes_total.labels(one.kind, outcome.fate).inc()
        _say(one, job, outcome, seconds)

    async def _judged(self, one: JobType, job: models.Job) -> Outcome:
        if job.id not in self._store.suspects:
            return await self._run(one, job)
        async with self._alone:
            await self._store.begin_suspect(job.id)
            return await self._run(one, job)

    async def _run(self, one: JobType, job: models.Job) -> Outcome:
        """Run the function within its time."""
        attempt = job.attempts + 1
        self.running[job.id] = one.kind
        context = JobContext(
            job.id, one.kind, attempt, self.database, self.settings, self.resources,
            log.get().bind(kind=one.kind, job=job.id),
        )  # fmt: skip
        try:
            payload = msgspec.json.decode(job.payload or b"{}")
            async with asyncio.timeout(one.timeout_seconds):
                await one.function(context, payload)
        except Exception as error:
            return judge(one, error, attempt)
        return Outcome("done")


class _Runner(AbstractEntrypointExecutor):
    """Hands PgQueuer's jobs of one kind to the worker."""

    def __init__(self, parameters: EntrypointExecutorParameters, worker: Worker) -> None:
        super().__init__(parameters)
        self._worker = worker

    async def execute(self, job: models.Job, context: models.Context) -> None:
        await self._worker.perform(job, context)


async def _never(_: models.Job) -> None:
    """Stands where PgQueuer keeps a function: the runner has its own."""


def _say(one: JobType, job: models.Job, outcome: Outcome, seconds: float) -> None:
    """One line a job that is not simply done."""
    facts = {"kind": one.kind, "job": job.id, "attempt": job.attempts + 1, "seconds": round(seconds, 4)}
    if outcome.error is not None:
        facts["error"] = f"{type(outcome.error).__name__}: {outcome.error}"
    if outcome.fate == "held":
        log.get().error("job held", **facts)
    elif outcome.fate == "retried":
        log.get().warning("job retried", **facts, after_seconds=round(outcome.after_seconds or 0.0, 2))
    elif outcome.gate_seconds is not None:
        log.get().warning("gate closed", **facts, gate_seconds=outcome.gate_seconds)
    else:
        log.get().debug("job ended", **facts, outcome=outcome.fate)
