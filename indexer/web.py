"""HTTP of the daemon: probes, metrics, status.json, the status page and, with a token, what operators do on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from aiohttp import web

from indexer import log, metrics
from indexer.config import Settings
from indexer.db import Database
from indexer.errors import ConfigError, IndexerError
from indexer.model import NodeFacts
from indexer.registry import Registered
from indexer.state import State
from indexer.web_admin import BODY_BYTES, Admin, Replaying, answer
from indexer.web_facts import Facts
from indexer.web_page import Page

_PLAIN = {
    "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}  # fmt: skip


class Web:
    """The HTTP server of one daemon. `url` is known once it serves.

    `replaying` gives a replayer of its own to who fills holes from the page; without it nobody can.
    """

    def __init__(
        self, settings: Settings, database: Database, nodes: Sequence[NodeFacts], hooks: Sequence[Registered],
        state: State, replaying: Replaying | None = None,
    ) -> None:  # fmt: skip
        self._settings, self._state = settings, state
        self._facts = Facts(settings, database, nodes, hooks, state)
        self._admin = Admin(settings.http, database, state, replaying, self._facts.redact, self._facts.expire)
        self._page = Page()
        self.url = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Web]:
        """Serve for as long as the block runs; raises ConfigError where the port is taken."""
        http = self._settings.http
        application = web.Application(client_max_size=BODY_BYTES)
        application.add_routes([
            web.get("/", self.page), web.get("/livez", self.livez), web.get("/readyz", self.readyz),
            web.get("/metrics", self.metrics), web.get("/status.json", self.status),
            web.get("/failures/{id:[0-9]{1,18}}", self.failure), web.get("/favicon.ico", self.nothing),
            *self._admin.routes,
        ])  # fmt: skip
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        history = asyncio.create_task(self._facts.history.keep(self._state), name="history")
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
            history.cancel()
            with suppress(asyncio.CancelledError):
                await history
            await self._admin.close()
            await runner.cleanup()
            await self._facts.close()

    async def livez(self, _: web.Request) -> web.Response:
        """200 while there is progress or nothing to do; 503 where the head moves and nothing is committed."""
        state = self._state
        if self._facts.stalled:
            reason = f"nothing committed for {state.stalled_seconds:.0f} s, waiting on {state.waiting_on}"
            return answer({"live": False, "reason": reason}, 503)
        return answer({"live": True})

    async def readyz(self, _: web.Request) -> web.Response:
        """200 for a leader and for a standby; 503 while starting, halted, stopping or stalled, with the reason."""
        state, stalled = self._state, self._facts.stalled
        silent = state.silent_seconds > self._settings.http.stall_seconds
        ready = state.ready(self._settings.http.stall_seconds)
        reason = "stalled" if stalled else "no node answers" if silent else state.reason
        facts = {"ready": ready, "role": state.role, "reason": reason, "lag_blocks": state.lag_blocks}
        return answer(facts, 200 if ready else 503)

    async def nothing(self, _: web.Request) -> web.Response:
        return web.Response(status=204)

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=metrics.exposition(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def page(self, _: web.Request) -> web.Response:
        body = self._page.render(await self._facts.all())
        headers = {**_PLAIN, "Content-Security-Policy": self._page.policy}
        return web.Response(body=body, content_type="text/html", charset="utf-8", headers=headers)

    async def status(self, request: web.Request) -> web.Response:
        """All facts; with ?since=SECONDS (since 1970) only the history's points after that moment."""
        try:
            since = float(request.query.get("since", 0))
        except ValueError:
            return answer({"error": "must be seconds since 1970", "field": "since"}, 400)
        return answer({**await self._facts.all(since), "admin": self._admin.facts})

    async def failure(self, request: web.Request) -> web.Response:
        """A failure with its traceback, as text."""
        number, status = int(request.match_info["id"]), 200
        try:
            text = await self._facts.traceback(number)
        except IndexerError as error:
            log.get().warning("status page", error=str(error))
            text, status = "The database can't be read now.\n", 503
        if text is None:
            text, status = f"There is no failure {number}.\n", 404
        return web.Response(text=text, status=status, headers=_PLAIN)
