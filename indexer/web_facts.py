"""What the status page and /status.json tell: the process's own state, and what the database knows beside it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

import msgspec

from indexer import ledger, log, queue
from indexer.config import ProvidersSettings, Settings
from indexer.db import Connection, Database, is_led, standbys
from indexer.errors import IndexerError
from indexer.follow import leader_name
from indexer.model import NodeFacts, Panel
from indexer.redact import Redactor
from indexer.registry import Registered
from indexer.state import State
from indexer.version import version

T = TypeVar("T")

# a query that takes longer than this is not worth its load
_QUERY_SECONDS = 2.0
# so long whoever asks waits for the database; then he gets what was read last
_PATIENCE_SECONDS = 1.0
_SOON_SECONDS = 1.0
_SELDOM_SECONDS = 3.0
_FAILURES = 20
_HELD = 20
_LONGEST_TEXT = 600

HISTORY_SECONDS = 5.0
_HISTORY_POINTS = 720


class History:
    """The last hour, a point every five seconds: (seconds since 1970, lag in blocks, blocks/s, events/s)."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int | None, float, float]] = deque(maxlen=_HISTORY_POINTS)

    def sample(self, state: State) -> None:
        lag = state.lag_blocks if state.heads.newest >= 0 else None
        blocks, events = state.rates
        self._points.append((round(time.time(), 1), lag, round(blocks, 1), round(events, 1)))

    def since(self, moment: float) -> list[tuple[float, int | None, float, float]]:
        return [one for one in self._points if one[0] > moment]

    async def keep(self, state: State) -> None:
        """Sample until cancelled."""
        while True:
            self.sample(state)
            await asyncio.sleep(HISTORY_SECONDS)


class Reading:
    """Something of the database, read at most every `seconds` however many people look.

    `value` is what was read last; `trouble` says why it could not be read again since, or is None.
    """

    def __init__(self, seconds: float, read: Callable[[], Awaitable[dict[str, Any]]], value: dict[str, Any]) -> None:
        self._seconds, self._read = seconds, read
        self._read_at = -seconds - 1
        self._task: asyncio.Task[None] | None = None
        self._warned = log.Thinned()
        self.value = value
        self.trouble: str | None = None

    async def get(self) -> dict[str, Any]:
        if self._task is None and time.monotonic() - self._read_at > self._seconds:
            self._task = asyncio.create_task(self._refresh(), name="status page")
        if self._task is not None:
            patience = _PATIENCE_SECONDS if self.trouble is None else _PATIENCE_SECONDS / 10
            _, late = await asyncio.wait({self._task}, timeout=patience)
            if late:
                self.trouble = self.trouble or "the database does not answer in time"
        return self.value

    async def _refresh(self) -> None:
        try:
            self.value = await self._read()
            self.trouble = None
        except IndexerError as error:
            self.trouble = str(error)
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
            self._warned.warning("status page", error=self.trouble)
        finally:
            self._read_at, self._task = time.monotonic(), None

    def expire(self) -> None:
        """Have it read anew when it is asked for next."""
        self._read_at = -self._seconds - 1

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task


class Facts:
    """All facts of one daemon, ready for JSON."""

    def __init__(
        self, settings: Settings, database: Database, nodes: Sequence[NodeFacts], hooks: Sequence[Registered],
        state: State,
    ) -> None:  # fmt: skip
        self._settings, self._database, self._nodes, self._state = settings, database, nodes, state
        self._hooks = [one.name for one in hooks]
        self._panels = [panel for one in hooks for panel in getattr(one.hook, "panels", ())]
        self.redact = Redactor(settings)
        self.history = History()
        self._soon = Reading(_SOON_SECONDS, self._read_soon, _NOTHING_SOON)
        self._seldom = Reading(_SELDOM_SECONDS, self._read_seldom, _NOTHING_SELDOM)

    @property
    def stalled(self) -> bool:
        return self._state.stalled(self._settings.http.stall_seconds)

    async def all(self, since: float = 0.0) -> dict[str, Any]:
        """Everything, with the points of the history after `since` (seconds since 1970)."""
        soon, seldom = await asyncio.gather(self._soon.get(), self._seldom.get())
        trouble = self._soon.trouble or self._seldom.trouble
        return {
            **self._of_the_process(), **soon, **seldom,
            "journal": {"rows": self._state.journal_rows, "bytes": seldom["journal_bytes"]},
            "database": trouble and self.redact(trouble),
            "history": {"seconds": HISTORY_SECONDS, "points": self.history.since(since)},
        }  # fmt: skip

    def expire(self) -> None:
        """Something was done: what the database says now is news."""
        self._soon.expire()
        self._seldom.expire()

    async def close(self) -> None:
        await self._soon.close()
        await self._seldom.close()

    def _of_the_process(self) -> dict[str, Any]:
        state = self._state
        blocks_per_second, events_per_second = state.rates
        return {
            "version": version(), "now": round(time.time(), 3), "chain": state.chain, "role": state.role,
            "reason": self.redact(state.reason), "name": leader_name(),
            "start_block": state.start_block, "head": _known(state.heads.newest), "final": _known(state.heads.final),
            "cursor": state.cursor, "block_time": state.block_time, "lag_blocks": state.lag_blocks,
            "lag_seconds": round(state.lag_seconds, 1), "stalled": self.stalled,
            "stalled_seconds": round(state.stalled_seconds, 1),
            "waiting_on": state.waiting_on, "blocks": state.blocks, "events": state.events,
            "blocks_per_second": round(blocks_per_second, 1), "events_per_second": round(events_per_second, 1),
            "eta_seconds": state.eta_seconds, "hooks": self._hooks,
            "gaps": {hook: [list(one) for one in ranges] for hook, ranges in state.gaps.items()},
            "reorgs": [one._asdict() for one in reversed(state.reorgs)],
            "endpoints": [
                {
                    "name": one.name, "healthy": not one.resting, "resting_seconds": round(one.resting, 1),
                    "latency_ms": round(one.latency * 1000, 1), "error": self.redact(one.last_error)[:200],
                }
                for one in self._nodes
            ],
        }  # fmt: skip

    async def _read_soon(self) -> dict[str, Any]:
        """The open failures (without their tracebacks), and who leads."""
        async with self._database.acquire() as connection:
            row = await ledger.standing(connection, self._state.chain)
            if row is None:
                return _NOTHING_SOON
            count, failures = await _failures(connection, row["id"])
            for one in failures:
                one["error"] = self.redact(one["error"])[:_LONGEST_TEXT]
            leader = {
                "name": row["leader"], "led": await is_led(connection, row["id"]),
                "seen_seconds": round(row["seen_seconds_ago"], 1), "standbys": await standbys(connection, row["id"]),
            }  # fmt: skip
        return {"failures": failures, "failure_count": count, "leader": leader}

    async def _read_seldom(self) -> dict[str, Any]:
        async with self._database.acquire() as connection:
            size = await connection.fetchval("select pg_total_relation_size('indexer.journal')", timeout=_QUERY_SECONDS)
            jobs = await _unless_slow(connection, _jobs(connection))
            for one in jobs["held"] if jobs else ():
                one["error"] = self.redact(one["error"])[:_LONGEST_TEXT]
            budgets = await _unless_slow(connection, _budgets(connection, self._settings.providers))
            panels = [await _panel(connection, panel) for panel in self._panels]
            return {"journal_bytes": size, "jobs": jobs, "budgets": budgets, "panels": panels}

    async def traceback(self, number: int) -> str | None:
        """A failure in words, with its traceback and without secrets; None where there is none of that number."""
        async with self._database.acquire() as connection:
            chain = await ledger.find_chain(connection, self._state.chain)
            one = await ledger.failure(connection, chain.id, number) if chain else None
        if one is None:
            return None
        at = f"block {one['first']}" if one["first"] == one["last"] else f"blocks {one['first']} to {one['last']}"
        state = f"resolved {_instant(one['resolved_at'])}" if one["resolved_at"] else "open"
        head = f"failure {number} ({state}): hook {one['hook']}, {at}, {one['policy']}, {_instant(one['failed_at'])}"
        return f"{head}\n\n{self.redact(one['traceback']).rstrip()}\n"


_NOTHING_SOON: dict[str, Any] = {"failures": [], "failure_count": 0, "leader": None}
_NOTHING_SELDOM: dict[str, Any] = {"journal_bytes": None, "jobs": None, "budgets": [], "panels": []}


def _known(number: int) -> int | None:
    return number if number >= 0 else None


def _instant(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


async def _failures(connection: Connection, chain: int) -> tuple[int, list[dict[str, Any]]]:
    """How many are open, and the oldest of them."""
    rows = await connection.fetch(
        """
        select id, hook, first, last, policy, error, failed_at, count(*) over () as open from indexer.failure
        where chain = $1 and resolved_at is null
        order by id limit $2
        """,
        chain, _FAILURES, timeout=_QUERY_SECONDS,
    )  # fmt: skip
    found = [dict(row) for row in rows]
    return (found[0]["open"] if found else 0), [{k: v for k, v in one.items() if k != "open"} for one in found]


async def _jobs(connection: Connection) -> dict[str, Any]:
    """How many jobs there are by kind and state, with the age of the oldest that is due; and those that are held."""
    counts = await queue.depth(connection, timeout=_QUERY_SECONDS)
    held = await connection.fetch(
        """
        select job.id, job.entrypoint as kind, job.attempts, job.updated as since,
               concat_ws(': ', said.traceback ->> 'exception_type', said.traceback ->> 'exception_message') as error
        from indexer.pgqueuer as job
        left join lateral (
            select traceback from indexer.pgqueuer_log
            where job_id = job.id and traceback is not null order by id desc limit 1
        ) as said on true
        where job.status = 'failed' order by job.id limit $1
        """,
        _HELD, timeout=_QUERY_SECONDS,
    )  # fmt: skip
    return {"counts": [msgspec.structs.asdict(one) for one in counts], "held": [dict(row) for row in held]}


async def _budgets(connection: Connection, settings: ProvidersSettings) -> list[dict[str, Any]]:
    """What the providers may be asked a month and what they were; nothing where no sidecar has been here."""
    if not await connection.fetchval("select to_regclass('provider_budgets') is not null"):
        return []
    rows = await connection.fetch(
        "select provider, calls from provider_budgets where month = date_trunc('month', now() at time zone 'utc')::date"
    )
    calls = {"songstats": 0, "apify": 0, **{row["provider"]: row["calls"] for row in rows}}
    found = [
        {"provider": provider, "what": "calls", "used": used,
         "budget": settings.songstats.monthly_budget if provider == "songstats" else None}
        for provider, used in sorted(calls.items())
    ]  # fmt: skip
    most = await connection.fetchval(
        """
        select coalesce(max(spent), 0)::float8 from (
            select sum(estimated_cost_usd) as spent from playcount_snapshots
            where state <> 'failed' and created_at >= date_trunc('month', now() at time zone 'utc') at time zone 'utc'
            group by account
        ) as accounts
        """,
        timeout=_QUERY_SECONDS,
    )
    what, budget = "US dollars, by the account that spent most", settings.apify.monthly_budget
    return [*found, {"provider": "apify", "what": what, "used": most, "budget": budget}]


async def _unless_slow(connection: Connection, work: Awaitable[T]) -> T | None:
    """What `work` reads; None where that takes too long, which is no trouble of all the rest."""
    try:
        return await work
    except TimeoutError:
        if connection.is_closed():
            raise
        return None


async def _panel(connection: Connection, panel: Panel) -> dict[str, Any]:
    """A hook's small table for the page; one that fails shows why, and takes nothing else along."""
    try:
        rows = await connection.fetch(panel.sql, timeout=_QUERY_SECONDS)
    except Exception as error:
        if connection.is_closed():
            raise
        return {"title": panel.title, "columns": [], "rows": [], "error": type(error).__name__}
    columns = list(rows[0].keys()) if rows else []
    return {"title": panel.title, "columns": columns, "rows": [list(row.values()) for row in rows]}
