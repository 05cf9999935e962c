"""What operators do on the status page: retry a failure, fill holes, requeue a job. Only with http.admin_token.

The token comes as a bearer token in a header that no other site's page can make a browser send; there are no cookies.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from indexer import ledger, log, queue
from indexer.config import HttpSettings
from indexer.db import Database, translated
from indexer.errors import IndexerError, Temporary, UsageError
from indexer.limits import Buckets
from indexer.redact import Redactor
from indexer.replay import Replayer
from indexer.segments import Segment
from indexer.state import State

Replaying = Callable[[], AbstractAsyncContextManager[Replayer]]
Handler = Callable[[web.Request], Awaitable[web.Response]]
Plan = Callable[[Replayer], Awaitable[Sequence[Segment]]]

# wrong tokens from one address
_FAILURES_PER_MINUTE = 12
_FAILURES_AT_ONCE = 8
BODY_BYTES = 4096
_LARGEST = 2**63 - 1


class Refused(Exception):
    """An answer that is an error: its status, its text, and the field that is wrong."""

    def __init__(self, status: int, text: str, field: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.field, self.headers = status, field, headers


class Work(msgspec.Struct):
    """A replay in the background, as the page shows it. `state`: running, done, failed or stopped.

    `verify`: hooks with rows that depend on the order of blocks, which may differ now from a run without holes.
    """

    what: str
    started: float
    state: str = "running"
    planned: int = 0
    blocks: int = 0
    events: int = 0
    rows: int = 0
    seconds: float = 0.0
    failures: list[str] = []
    verify: list[str] = []
    error: str = ""


class Admin:
    """The actions, and the one replay that runs in the background. It ends with `close`."""

    def __init__(
        self, settings: HttpSettings, database: Database, state: State, replaying: Replaying | None,
        redact: Redactor, done: Callable[[], None],
    ) -> None:  # fmt: skip
        token = settings.admin_token
        self._digest = _digest(token.get_secret_value()) if token is not None else None
        self._database, self._state, self._replaying = database, state, replaying
        self._redact, self._done = redact, done
        self._failures: Buckets[str] = Buckets(_FAILURES_PER_MINUTE, _FAILURES_AT_ONCE)
        self._warned = log.Thinned()
        self._task: asyncio.Task[None] | None = None
        self._work: Work | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {"enabled": self._digest is not None, "work": self._work}

    @property
    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/admin/check", self._guarded(self.check)),
            web.post("/admin/failures/{id}/retry", self._guarded(self.retry)),
            web.post("/admin/gaps/fill", self._guarded(self.fill)),
            web.post("/admin/jobs/{id}/requeue", self._guarded(self.requeue)),
        ]

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    # -- who may -------------------------------------------------------------------------------------------------

    def _guarded(self, action: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.Response:
            try:
                self._check(request)
                return await action(request)
            except Refused as refused:
                return answer({"error": str(refused), "field": refused.field}, refused.status, refused.headers)
            except Temporary as error:
                text = self._redact(str(error))
                return answer({"error": text, "field": None}, 503, {"Retry-After": "1"})
            except Exception as error:
                text = self._redact(f"{type(error).__name__}: {error}")
                log.get().error("admin action failed", action=request.path, error=text)
                return answer({"error": text, "field": None}, 500)

        return guarded

    def _check(self, request: web.Request) -> None:
        """Raises Refused for who may not."""
        if self._digest is None:
            raise Refused(404, "there are no admin actions here: set http.admin_token to have them", "http.admin_token")
        if _is_foreign(request):
            raise Refused(403, "another site's page may not do this", "Origin")
        address = request.remote or ""
        if wait := self._failures.wait(address):
            seconds = str(math.ceil(wait))
            raise Refused(429, f"too many wrong tokens: try again in {seconds} s", None, {"Retry-After": seconds})
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(_digest(token.strip()), self._digest):
            return
        if token:
            self._failures.take(address)
            self._warned.warning("admin token refused", about=address, address=address)
        text = "this is not http.admin_token" if token else "send http.admin_token as a bearer token"
        raise Refused(401, text, "Authorization", {"WWW-Authenticate": "Bearer"})

    # -- actions -------------------------------------------------------------------------------------------------

    async def check(self, _: web.Request) -> web.Response:
        """Whether the token is right."""
        return answer({"admin": True})

    async def retry(self, request: web.Request) -> web.Response:
        """Replay the blocks of a failure for its hook and those that come after it, as `indexer failures retry`."""
        number = _number(request)

        async def plan(replayer: Replayer) -> Sequence[Segment]:
            one = await ledger.failure(replayer.connection, replayer.chain.id, number)
            if one is None:
                raise Refused(404, f"there is no failure {number}", "id")
            if one["resolved_at"] is not None:
                raise Refused(409, f"failure {number} is resolved already", "id")
            if one["policy"] == "halt":
                text = f"failure {number} halted the daemon: its start tries block {one['first']} again"
                raise Refused(409, text, "id")
            return await replayer.plan_retry([one])

        return await self._begin(f"retry of failure {number}", plan)

    async def fill(self, request: web.Request) -> web.Response:
        """Replay what a hook has not applied (or all of them), as `indexer gaps --fill`."""
        hook = await _hook(request)

        async def plan(replayer: Replayer) -> Sequence[Segment]:
            try:
                return await replayer.plan(None, None, [hook] if hook else [one.name for one in replayer.hooks])
            except UsageError as error:
                raise Refused(409, str(error), "hook") from None

        return await self._begin(f"fill of {hook or 'all hooks'}", plan)

    async def requeue(self, request: web.Request) -> web.Response:
        """Have a held job wait again, as `indexer jobs requeue`."""
        number = _number(request)
        async with self._database.acquire() as connection:
            status = await connection.fetchval("select status::text from indexer.pgqueuer where id = $1", number)
            if status is None:
                raise Refused(404, f"there is no job {number}", "id")
            try:
                done = status == "failed" and await queue.requeue(connection, [number])
            except UsageError as error:
                raise Refused(409, str(error), "id") from None
        if not done:
            raise Refused(409, f"job {number} is not held", "id")
        log.get().info("admin action", action="requeue", job=number)
        self._done()
        return answer({"done": f"job {number} waits again"})

    # -- the replay in the background ----------------------------------------------------------------------------

    async def _begin(self, what: str, plan: Plan) -> web.Response:
        """Start a replay once it is planned; the page shows how it goes. Only one at a time."""
        if self._replaying is None:
            raise Refused(409, "this process has no source of blocks to replay from")
        if self._task is not None and not self._task.done():
            raise Refused(409, f"one thing at a time: {self._work.what if self._work else 'another replay'} runs")
        planned: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        work = Work(what, time.time())
        self._task = asyncio.create_task(self._run(work, self._replaying, plan, planned), name="admin")
        try:
            await asyncio.shield(planned)
        except UsageError as error:
            raise Refused(409, self._redact(str(error))) from None
        if not work.planned:
            return answer({"done": f"{what}: nothing to do, all of these blocks are applied"})
        blocks = "1 block is" if work.planned == 1 else f"{work.planned:,} blocks are"
        return answer({"done": f"{what}: {blocks} replayed", "work": work}, 202)

    async def _run(self, work: Work, replaying: Replaying, plan: Plan, planned: asyncio.Future[None]) -> None:
        try:
            async with replaying() as replayer:
                with translated():
                    segments = await plan(replayer)
                    work.planned = sum(one.last - one.first + 1 for one in segments)
                    if segments:
                        self._work = work
                        log.get().info("admin action", action=work.what, blocks=work.planned)
                    planned.set_result(None)
                    await self._replay(work, replayer, segments)
            work.state = "done"
        except asyncio.CancelledError:
            work.state = "stopped"
            planned.cancel()
            raise
        except Exception as error:
            if not planned.done():
                planned.set_exception(error)
                return
            text = str(error) if isinstance(error, IndexerError) else f"{type(error).__name__}: {error}"
            work.state, work.error = "failed", self._redact(text)
            log.get().error("admin action failed", action=work.what, error=work.error)
        finally:
            work.seconds = round(time.time() - work.started, 1)
            self._done()
        if work.planned and work.state == "done":
            log.get().info("admin action done", action=work.what, blocks=work.blocks, seconds=work.seconds)

    async def _replay(self, work: Work, replayer: Replayer, segments: Sequence[Segment]) -> None:
        try:
            async for applied in replayer.replay(segments):
                work.blocks += applied.span.last - applied.span.first + 1
                work.events += applied.span.events
                work.rows += sum(applied.written.values())
                work.seconds = round(time.time() - work.started, 1)
        finally:
            work.failures = [self._redact(str(one)) for one in replayer.failures]
        filled = {name for one in segments for name in one.fill}
        derived = [one.name for one in replayer.hooks if getattr(one.hook, "derived", None)]
        work.verify = [name for name in derived if name in filled]
        self._state.gaps = await ledger.gaps(replayer.connection, replayer.chain.id)


def answer(facts: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """JSON that nobody keeps."""
    body = msgspec.json.encode(facts, enc_hook=str)
    kept = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(headers or {})}
    return web.Response(body=body, status=status, content_type="application/json", headers=kept)


def _digest(token: str) -> bytes:
    """What is compared: of one length, however long the token is."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _is_foreign(request: web.Request) -> bool:
    """Whether a browser says that another site's page asks. Who is no browser says nothing, and needs the token."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != request.host.lower()


def _number(request: web.Request) -> int:
    text = request.match_info["id"]
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) <= _LARGEST):
        raise Refused(400, "this is no number", "id")
    return int(text)


async def _hook(request: web.Request) -> str | None:
    """The hook that the body names; None for all of them."""
    try:
        body = msgspec.json.decode(await request.read())
    except web.HTTPRequestEntityTooLarge:
        raise Refused(413, f"a body has at most {BODY_BYTES} bytes", "body") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise Refused(400, 'this is not JSON: send {"hook": "name"}, or {"hook": null} for all', "body") from None
    if not isinstance(body, dict) or "hook" not in body:
        raise Refused(400, 'name the hook: {"hook": "name"}, or {"hook": null} for all', "hook")
    if not (body["hook"] is None or isinstance(body["hook"], str)):
        raise Refused(400, "must be a text or null", "hook")
    hook: str | None = body["hook"]
    return hook
