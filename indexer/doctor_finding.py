"""What a check of `indexer doctor` finds, and the running of checks, each within its own time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, NamedTuple

import asyncpg
import msgspec

from indexer.errors import IndexerError
from indexer.sources.endpoint import Impossible, RpcTrouble

State = Literal["ok", "warn", "fail"]
# a check that does not even let itself be cancelled is left alone after this long
_GRACE_SECONDS = 0.5


class Verdict(NamedTuple):
    """How a check ended, why, and what to do about it."""

    state: State
    reason: str
    advice: str = ""


def ok(reason: str) -> Verdict:
    return Verdict("ok", reason)


def warn(reason: str, advice: str = "") -> Verdict:
    return Verdict("warn", reason, advice)


def fail(reason: str, advice: str = "") -> Verdict:
    return Verdict("fail", reason, advice)


class Finding(msgspec.Struct, frozen=True):
    """A verdict with what was checked (`group`, and `about` it) and how long that took."""

    group: str
    check: str
    state: State
    reason: str
    advice: str
    seconds: float


class Checkup:
    """Runs checks one after the other and keeps what they find; `tell` hears of each at once."""

    def __init__(self, seconds: float, tell: Callable[[Finding], None] = lambda _: None) -> None:
        self.seconds, self.findings, self._tell = seconds, list[Finding](), tell

    async def run(self, group: str, check: str, work: Coroutine[Any, Any, Verdict], advice: str = "") -> bool:
        """Run one check for at most its time; false where it fails. `advice` is for a verdict that brings none."""
        started, task = time.monotonic(), asyncio.create_task(work)
        try:
            await asyncio.wait({task}, timeout=self.seconds)
            verdict = _verdict(task) if task.done() else fail(f"no answer within {self.seconds:g} s")
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=_GRACE_SECONDS)
        if verdict.state != "ok":
            verdict = verdict._replace(advice=verdict.advice or advice)
        self.add(group, check, verdict, time.monotonic() - started)
        return verdict.state != "fail"

    def add(self, group: str, check: str, verdict: Verdict, seconds: float = 0.0) -> None:
        reason, advice = (" ".join(text.split()) for text in (verdict.reason, verdict.advice))
        self.findings.append(Finding(group, check, verdict.state, reason, advice, round(seconds, 3)))
        self._tell(self.findings[-1])

    @property
    def failed(self) -> bool:
        return any(one.state == "fail" for one in self.findings)


def _verdict(task: asyncio.Task[Verdict]) -> Verdict:
    """What the check says, or its error in words that hold no address and no key."""
    try:
        return task.result()
    except RpcTrouble as failed:
        return fail(f"{failed.method}: {failed.trouble.message}")
    except (IndexerError, Impossible, asyncpg.PostgresError) as error:
        return fail(str(error))
    except (Exception, asyncio.CancelledError) as error:  # whatever it is, the next check goes on
        return fail(f"broke off with {type(error).__name__}")
