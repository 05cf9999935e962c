"""A batch of people, each polled in isolation: whatever goes wrong with one, the others are archived.

Claimed together, polled side by side without a transaction open, and stored as they come, several in one transaction.
"""

from __future__ import annotations

import asyncio
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import msgspec

from indexer import metrics
from indexer.db import Connection
from indexer.errors import ConfigError, DatabaseUnavailable
from indexer.sidecar import calls
from indexer.sidecar.listening import people, plays
from indexer.sidecar.listening.cooldown import FailureType, failure_type
from indexer.sidecar.listening.people import Claim
from indexer.sidecar.listening.plays import Polled
from indexer.sidecar.listening.poll import Misconfigured, Moved, poll
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.listening.vault import Undecipherable
from indexer.sidecar.providers import ProviderError, Saturated
from indexer.sidecar.together import Together

# Beyond a person's own time: to store what was polled, even if the database is away for a moment.
_LEASE_MARGIN = timedelta(seconds=120)
_TOO_MANY = 429
# where Spotify names no time
_RATE_LIMIT_SECONDS = 30.0


class Outcome(msgspec.Struct, frozen=True):
    """What became of one person; `reason` says why where it did not succeed, and `songs` how many plays were new."""

    listener: UUID
    status: Literal["successful", "skipped", "failed"]
    reason: str | None = None
    songs: int = 0


class Report(msgspec.Struct, frozen=True):
    """What became of a batch. `rest_seconds`: Spotify is to be left alone for so long, so that some were left out."""

    outcomes: tuple[Outcome, ...]
    duration_ms: int
    rest_seconds: float | None = None
    rest_reason: str = ""

    def count(self, status: str) -> int:
        return sum(one.status == status for one in self.outcomes)

    @property
    def songs(self) -> int:
        return sum(one.songs for one in self.outcomes)

    @property
    def reasons(self) -> dict[str, int]:
        """How often which reason was given."""
        return dict(Counter(one.reason for one in self.outcomes if one.reason is not None))


async def archive_batch(listening: Listening, listeners: Sequence[UUID], log: Any) -> Report:
    """Archive these people. Raises Misconfigured where it is our settings that are wrong, DatabaseUnavailable."""
    started = time.perf_counter()
    batch = _Batch(listening, log)
    outcomes = await batch.run(listeners)
    took = time.perf_counter() - started
    report = Report(tuple(outcomes), round(took * 1000), batch.rest_seconds, batch.rest_reason)
    log.info(
        "people archived", processed=len(outcomes), successful=report.count("successful"), songs=report.songs,
        skipped=report.count("skipped"), failed=report.count("failed"), reasons=report.reasons, seconds=round(took, 3),
    )  # fmt: skip
    return report


class _Batch:
    def __init__(self, listening: Listening, log: Any) -> None:
        try:
            self.vault = listening.vault
        except ConfigError as error:
            raise Misconfigured(str(error)) from None
        self.listening, self.settings, self.database, self.log = listening, listening.settings, listening.database, log
        self.lease = uuid.uuid4()
        self.rest_seconds: float | None = None
        self.rest_reason = ""
        self._trouble: Exception | None = None
        # one person's rows that Postgres does not take are that person's failure alone
        self._storing = Together(self._store, alone=lambda error: not isinstance(error, DatabaseUnavailable))

    @property
    def _stopped(self) -> bool:
        return self.rest_seconds is not None or self._trouble is not None

    async def run(self, listeners: Sequence[UUID]) -> list[Outcome]:
        """An outcome for each of them. Raises what makes it useless to go on."""
        lasts = timedelta(seconds=self.settings.person_seconds) + _LEASE_MARGIN
        async with self.database.acquire() as connection:
            claims = await people.claim(connection, listeners, self.lease, self.listening.clock(), lasts)
        mine = [one for one in claims if one.standing == "claimed"]
        ended = await asyncio.gather(*(self._in_turn(one) for one in mine))
        if self._stopped:
            async with self.database.acquire() as connection:
                await people.let_go(connection, [one.listener for one in mine], self.lease)
        if self._trouble is not None:
            raise self._trouble
        skipped = [Outcome(one.listener, "skipped", one.standing) for one in claims if one.standing != "claimed"]
        return [*ended, *skipped]

    async def _in_turn(self, person: Claim) -> Outcome:
        async with self.listening.turns:
            if self._stopped:
                return Outcome(person.listener, "skipped", "spotify_rests")
            try:
                return await self._one(person)
            except Exception as error:  # ours, our settings' or the database's, and nobody's whom we poll
                self._trouble = error
                return Outcome(person.listener, "skipped", "trouble")

    async def _one(self, person: Claim) -> Outcome:
        try:
            async with asyncio.timeout(self.settings.person_seconds):
                polled = await poll(self.listening, self.vault, person)
            self.listening.breaker.succeeded()
            return await self._stored(polled)
        except (Misconfigured, DatabaseUnavailable):
            raise
        except Moved:
            return Outcome(person.listener, "skipped", "connected_anew")
        except Saturated as error:
            if error.status == _TOO_MANY:
                return await self._rate_limited(person, error)
            return await self._failed(person, error)
        except Exception as error:
            return await self._failed(person, error)

    # -- how it ended ----------------------------------------------------------------------------------------------

    async def _stored(self, polled: Polled) -> Outcome:
        listener = polled.person.listener
        songs = await self._storing.do(polled)
        if songs is None:
            return Outcome(listener, "skipped", "connected_anew")
        metrics.play_events_total.inc(songs)
        if polled.rejects:
            self.log.warning("plays not readable", listener=str(listener), plays=len(polled.rejects))
        return Outcome(listener, "successful", songs=songs)

    async def _store(self, polled: list[Polled]) -> list[int | None]:
        async def work(connection: Connection) -> dict[UUID, int]:
            return await plays.store(connection, polled, self.listening.clock())

        stored = await calls.kept(self.database, work)
        return [stored.get(one.person.listener) for one in polled]

    async def _rate_limited(self, person: Claim, error: Saturated) -> Outcome:
        """Spotify limits the application as a whole: the person waits, and so does everybody else."""
        seconds = _RATE_LIMIT_SECONDS if error.retry_after is None else error.retry_after
        async with self.database.acquire() as connection:
            until = self.listening.clock() + timedelta(seconds=seconds)
            await people.rate_limited(connection, person, until)
        self._rest(seconds, "Spotify asks to wait (429)")
        return Outcome(person.listener, "skipped", "rate_limited")

    async def _failed(self, person: Claim, error: Exception) -> Outcome:
        kind, reason = _told(error)
        revoked = isinstance(error, ProviderError) and error.code == "invalid_grant"
        async with self.database.acquire() as connection:
            failures = await people.failed(connection, person, kind, self.listening.clock(), revoked=revoked)
        metrics.listener_failures_total.labels(kind).inc()
        self.log.warning(
            "poll failed", listener=str(person.listener), type=kind.value, failures=failures, reason=reason,
            at=_place(error) if kind is FailureType.UNKNOWN else None,
        )  # fmt: skip
        if kind is FailureType.NETWORK:
            seconds = self.listening.breaker.failed()
            if seconds is not None:
                self._rest(seconds, f"Spotify can't be reached: {reason}")
        return Outcome(person.listener, "failed", f"{kind}: {reason}")

    def _rest(self, seconds: float, reason: str) -> None:
        if self.rest_seconds is None or seconds > self.rest_seconds:
            self.rest_seconds, self.rest_reason = seconds, reason


def _told(error: Exception) -> tuple[FailureType, str]:
    """What kind of failure it is, and a reason in words of ours: others may quote a name, an e-mail or a token."""
    if isinstance(error, ProviderError):
        return failure_type(error), str(error)
    if isinstance(error, TimeoutError):
        return FailureType.NETWORK, "the poll took too long"
    if isinstance(error, Undecipherable):
        return FailureType.UNKNOWN, str(error)
    return FailureType.UNKNOWN, type(error).__name__


def _place(error: Exception) -> str | None:
    """Where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None
