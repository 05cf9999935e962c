"""HTTP of the daemon: probes, metrics, status.json and the status page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from indexer import ledger, metrics
from indexer.config import Settings
from indexer.db import Database
from indexer.errors import ConfigError, IndexerError
from indexer.model import NodeFacts, Panel
from indexer.registry import Registered
from indexer.state import State
from indexer.version import version

_PAGE = Path(__file__).parent / "page.html"
# a panel's query that takes longer than this is not worth its load
_PANEL_SECONDS = 2.0
_KEPT_SECONDS = 1.5


class Web:
    """The HTTP server of one daemon. `url` is known once it serves."""

    def __init__(
        self, settings: Settings, database: Database, nodes: Sequence[NodeFacts], hooks: Sequence[Registered],
        state: State,
    ) -> None:  # fmt: skip
        self._settings, self._database, self._nodes, self._state = settings, database, nodes, state
        self._panels = [panel for one in hooks for panel in getattr(one.hook, "panels", ())]
        self._page = _PAGE.read_bytes()
        self._reading = asyncio.Lock()
        self._read_at = -_KEPT_SECONDS - 1
        self._kept: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Web]:
        """Serve for as long as the block runs; raises ConfigError where the port is taken."""
        http = self._settings.http
        application = web.Application()
        application.add_routes([
            web.get("/", self.page), web.get("/livez", self.livez), web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics), web.get("/status.json", self.status),
            web.get("/favicon.ico", self.nothing),
        ])  # fmt: skip
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, http.host, http.port).start()
            except OSError as error:
                reason = error.strerror or error
                raise ConfigError(f"can't listen on {http.host}:{http.port} ({reason}): set http.port") from None
            host = "127.0.0.1" if http.host in ("0.0.0.0", "::") else http.host  # noqa: S104
            self.url = f"http://{host}:{runner.addresses[0][1]}/"
            yield self
        finally:
            await runner.cleanup()

    @property
    def _stalled(self) -> bool:
        return self._state.stalled(self._settings.http.stall_seconds)

    async def livez(self, _: web.Request) -> web.Response:
        """200 while there is progress or nothing to do; 503 where the head moves and nothing is committed."""
        state = self._state
        if self._stalled:
            reason = f"nothing committed for {state.stalled_seconds:.0f} s, waiting on {state.waiting_on}"
            return _json({"live": False, "reason": reason}, 503)
        return _json({"live": True})

    async def readyz(self, _: web.Request) -> web.Response:
        """200 for a leader and for a standby; 503 while starting, halted, stopping or stalled, with the reason."""
        state = self._state
        ready = state.ready(self._settings.http.stall_seconds)
        silent = state.silent_seconds > self._settings.http.stall_seconds
        reason = "stalled" if self._stalled else "no node answers" if silent else state.reason
        facts = {"ready": ready, "role": state.role, "reason": reason, "lag_blocks": state.lag_blocks}
        return _json(facts, 200 if ready else 503)

    async def nothing(self, _: web.Request) -> web.Response:
        return web.Response(status=204)

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def page(self, _: web.Request) -> web.Response:
        policy = (
            "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return web.Response(body=self._page, content_type="text/html", charset="utf-8", headers=headers)

    async def status(self, _: web.Request) -> web.Response:
        state = self._state
        blocks_per_second, events_per_second = state.rates
        facts: dict[str, Any] = {
            "version": version(), "chain": state.chain, "role": state.role, "reason": state.reason,
            "start_block": state.start_block, "head": _known(state.heads.newest), "final": _known(state.heads.final),
            "cursor": state.cursor, "block_time": state.block_time, "lag_blocks": state.lag_blocks,
            "lag_seconds": round(state.lag_seconds, 1), "stalled": self._stalled,
            "stalled_seconds": round(state.stalled_seconds, 1),
            "waiting_on": state.waiting_on, "blocks": state.blocks, "events": state.events,
            "blocks_per_second": round(blocks_per_second, 1), "events_per_second": round(events_per_second, 1),
            "eta_seconds": state.eta_seconds,
            "gaps": {hook: [list(one) for one in ranges] for hook, ranges in state.gaps.items()},
            "endpoints": [
                {
                    "name": one.name, "healthy": not one.resting, "latency_ms": round(one.latency * 1000, 1),
                    "error": one.last_error[:200],
                }
                for one in self._nodes
            ],
        }  # fmt: skip
        try:
            facts["failures"], facts["panels"] = await self._from_database()
        except IndexerError as error:
            facts["failures"], facts["panels"], facts["database"] = [], [], str(error)
        return _json(facts)

    async def _from_database(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Failures and panels, read at most once a while however many people look at the page."""
        async with self._reading:
            if time.monotonic() - self._read_at > _KEPT_SECONDS:
                async with self._database.acquire() as connection:
                    chain = await ledger.find_chain(connection, self._state.chain)
                    failures = await ledger.open_failures(connection, chain.id) if chain else []
                    panels = [await _panel(connection, panel) for panel in self._panels]
                self._kept, self._read_at = (failures, panels), time.monotonic()
            return self._kept


async def _panel(connection: Any, panel: Panel) -> dict[str, Any]:
    """A hook's small table for the page; one that fails shows why, and takes nothing else along."""
    try:
        rows = await connection.fetch(panel.sql, timeout=_PANEL_SECONDS)
    except Exception as error:
        return {"title": panel.title, "columns": [], "rows": [], "error": type(error).__name__}
    columns = list(rows[0].keys()) if rows else []
    return {"title": panel.title, "columns": columns, "rows": [list(row.values()) for row in rows]}


def _known(number: int) -> int | None:
    return number if number >= 0 else None


def _json(facts: Any, status: int = 200) -> web.Response:
    body, headers = msgspec.json.encode(facts, enc_hook=str), {"Cache-Control": "no-store"}
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)
