"""The daemon's HTTP on a real database: a chain with a hole, a failure, held jobs, budgets, and strings that bite.

    async with site(database_url) as shown:
        status, facts = await shown.ask("POST", "admin/gaps/fill", {"hook": "plays"}, token=TOKEN)
"""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp
import asyncpg
from replaykit import SESSION, World, chain_of, world

from indexer import ledger, log, queue
from indexer.config import LogSettings
from indexer.config import Settings as Parsed
from indexer.db import Database
from indexer.migrations import migrate, sql_folder
from indexer.model import Heads, Panel
from indexer.state import Role, State
from indexer.web import Web

TOKEN = "an operator's own token"
HOSTILE = "<img src=x onerror=alert(1)>{{chain}}"
PASSWORD = "hunter2-and-more"
BAD = 12  # the block at which the hook of plays fails
LAST = 60


class Site:
    """A daemon's HTTP, what stands behind it, and its log."""

    def __init__(self, web: Web, state: State, behind: World, session: aiohttp.ClientSession, stream: io.StringIO):
        self.web, self.state, self.world, self.session, self.stream = web, state, behind, session, stream
        self.url, self.connection = web.url, behind.connection
        self.held: int

    async def ask(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, headers: Mapping[str, str] = {},
        data: bytes | None = None,
    ) -> tuple[int, Any]:  # fmt: skip
        """Status and body, as JSON if it is."""
        given = {**({"Authorization": f"Bearer {token}"} if token is not None else {}), **headers}
        sent = json.dumps(body).encode() if body is not None else data
        async with self.session.request(method, self.url + path, data=sent, headers=given) as reply:
            text = await reply.text()
            return reply.status, json.loads(text) if reply.content_type == "application/json" else text

    async def facts(self) -> dict[str, Any]:
        return (await self.ask("GET", "status.json"))[1]  # type: ignore[no-any-return]

    @property
    def failure(self) -> Any:
        return self.connection.fetchval("select min(id) from indexer.failure where resolved_at is null")

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@asynccontextmanager
async def site(
    url: str, *, token: str | None = TOKEN, replaying: Callable[[World], Any] = lambda behind: behind.replayer
) -> AsyncIterator[Site]:
    """A leader at the head of a chain of 60 blocks, in whose block 12 the hook of plays failed and was passed over."""
    stream = io.StringIO()
    log.configure(LogSettings(level="debug", format="json"), stream)
    connection = await asyncpg.connect(url, server_settings=SESSION)
    try:
        await migrate(connection, [("sidecar", sql_folder("sidecar"))])
        async with world(url, connection, chain_of(3, LAST, 20, own=[BAD])) as behind:
            await _history(behind)
            state = await _state(behind)
            settings = Parsed(
                http={"port": 0, "admin_token": token},
                providers={"songstats": {"monthly_budget": 1000, "api_key": PASSWORD}},
            )
            behind.plays.panels = (  # type: ignore[attr-defined]
                Panel(f"Tracks {HOSTILE}", f"select 7654321 as plays, '{HOSTILE}' as title"),
                Panel("Broken", "select nothing"),
            )
            node = SimpleNamespace(name="node.test", resting=3.0, latency=0.0123, last_error=f"too many {HOSTILE}")
            async with Database(url, _database(url)).opened() as database, aiohttp.ClientSession() as session:
                made = Web(settings, database, [node], behind.registered, state, replaying(behind))
                async with made.serving():
                    shown = Site(made, state, behind, session, stream)
                    shown.held = await _held(connection)
                    yield shown
    finally:
        await connection.close()


def _database(url: str) -> Any:
    return Parsed(database={"url": url, "connect_timeout_seconds": 2}).database


async def _history(behind: World) -> None:
    """Follow to the head; at block 12 a hook says something that nobody should see or run."""
    real = behind.plays.apply

    async def failing(tx: Any, blocks: Any) -> None:
        try:
            await real(tx, blocks)
        except ValueError:
            raise ValueError(f"{HOSTILE} at https://user:{PASSWORD}@node.test/v3/key with {PASSWORD}") from None

    behind.plays.bad = {BAD}
    behind.plays.apply = failing  # type: ignore[method-assign]
    await behind.follow()
    behind.plays.bad = set()


async def _state(behind: World) -> State:
    state = State("main", 0)
    state.became(Role.LEADER)
    state.saw(Heads(LAST + 2_998_999, LAST + 2_998_900))
    cursor = await ledger.cursor(behind.connection, behind.row.id)
    state.at(cursor.ref.number, cursor.block_time)
    state.gaps = await ledger.gaps(behind.connection, behind.row.id)
    state.journal_rows = 42
    state.undone(LAST - 1, LAST)
    state.at(LAST, cursor.block_time)
    return state


async def _held(connection: Any) -> int:
    """A job that waits, one that is held with an error, and calls of this month."""
    await queue.enqueue(connection, "songstats.history", {"isrc": "A"})
    await queue.enqueue(connection, "apify.chunk", {}, key="one")
    number = await connection.fetchval("select id from indexer.pgqueuer where entrypoint = 'apify.chunk'")
    await connection.execute("update indexer.pgqueuer set status = 'failed', attempts = 3 where id = $1", number)
    error = json.dumps({"exception_type": "Held", "exception_message": f"{HOSTILE} by ann@example.org"})
    await connection.execute(
        """
        insert into indexer.pgqueuer_log (job_id, status, priority, entrypoint, traceback)
        values ($1, 'failed', 0, 'apify.chunk', $2)
        """,
        number, error,
    )  # fmt: skip
    await connection.execute(
        "insert into provider_budgets values ('songstats', date_trunc('month', now() at time zone 'utc')::date, 250)"
    )
    return int(number)
