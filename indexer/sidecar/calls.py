"""Calls that cost: a ledger of each, and a monthly budget that no number of workers overruns.

A call is reserved and written down in a transaction of its own before it is made. So a worker that dies in the middle
of one has used up what it had reserved, and the ledger shows the call without a status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TypeVar

from indexer import metrics
from indexer.db import Connection, Database
from indexer.errors import DatabaseUnavailable
from indexer.sidecar.providers import ProviderError

T = TypeVar("T")

# How long an answer that was paid for is held on to while the database is away.
_KEPT_SECONDS = 180.0
_RETRY_SECONDS = 1.0


class UsedUp(Exception):
    """The month's budget is; `until` is its end."""

    def __init__(self, provider: str, until: datetime) -> None:
        super().__init__(f"{provider}: the month's budget of calls is used up")
        self.until = until


async def begin(database: Database, provider: str, isrc: str | None, budget: int | None) -> int:
    """Reserve a call and write it down; returns its number in the ledger. Raises UsedUp."""
    async with database.acquire() as connection, connection.transaction():
        made = await connection.fetchval(
            """
            insert into provider_budgets as known (provider, month, calls)
            select $1, date_trunc('month', now() at time zone 'utc')::date, 1 where coalesce($2::bigint > 0, true)
            on conflict (provider, month) do update set calls = known.calls + 1
            where $2::bigint is null or known.calls < $2
            returning calls
            """,
            provider, budget,
        )  # fmt: skip
        if made is None:
            metrics.provider_budget_remaining.labels(provider).set(0)
            raise UsedUp(provider, await end_of_month(connection))
        number = await connection.fetchval(
            "insert into provider_calls (provider, isrc) values ($1, $2) returning id", provider, isrc
        )
    if budget is not None:
        metrics.provider_budget_remaining.labels(provider).set(budget - made)
    return int(number)


async def answered(connection: Connection, number: int, status: int | None, outcome: str, *, final: bool) -> None:
    """Write down, in the caller's transaction, how a call was answered; `final`: not to be asked again."""
    await connection.execute(
        "update provider_calls set status = $2, outcome = $3, final = $4 where id = $1", number, status, outcome, final
    )


async def refused(database: Database, number: int, error: ProviderError, *, final: bool) -> None:
    """Write down that a call was answered by an error. One that was never sent is no call, and costs nothing."""

    async def write(connection: Connection) -> None:
        if error.asked:
            await answered(connection, number, error.status, error.outcome, final=final)
            return
        await connection.execute(
            """
            with never as (delete from provider_calls where id = $1 returning provider, at)
            update provider_budgets as known set calls = calls - 1 from never
            where known.provider = never.provider and month = date_trunc('month', never.at at time zone 'utc')::date
            """,
            number,
        )

    await kept(database, write)


async def left(connection: Connection, provider: str, budget: int | None) -> int | None:
    """How many calls the month still has; None where there is no limit."""
    if budget is None:
        return None
    made = await connection.fetchval(
        """
        select calls from provider_budgets
        where provider = $1 and month = date_trunc('month', now() at time zone 'utc')::date
        """,
        provider,
    )
    found = max(0, budget - (made or 0))
    metrics.provider_budget_remaining.labels(provider).set(found)
    return found


async def end_of_month(connection: Connection) -> datetime:
    """The first moment of the next month, UTC, as the database's clock has it."""
    found: datetime = await connection.fetchval(
        "select (date_trunc('month', now() at time zone 'utc') + interval '1 month') at time zone 'utc'"
    )
    return found


async def kept(database: Database, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Do `work`, which bears repetition, in a transaction; while the database is away, again and again.

    For what must not be lost since it was paid for.
    """
    until = time.monotonic() + _KEPT_SECONDS
    while True:
        try:
            async with database.acquire() as connection, connection.transaction():
                return await work(connection)
        except DatabaseUnavailable:
            if time.monotonic() > until:
                raise
            await asyncio.sleep(_RETRY_SECONDS)
