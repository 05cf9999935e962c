"""What the listening jobs and routes share: one each process, in the resources under the name "listening"."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from indexer.config import ListeningSettings
from indexer.db import Database
from indexer.sidecar.listening.breaker import Breaker
from indexer.sidecar.listening.vault import Vault
from indexer.sidecar.providers.spotify_user import SpotifyUser

Clock = Callable[[], datetime]

# of a stop's time
_SETTLE_SECONDS = 3.0


def now() -> datetime:
    return datetime.now(UTC)


class Listening:
    """`clock` is the time by which people are polled, cool down and are signed in: a test may give its own."""

    def __init__(
        self, settings: ListeningSettings, database: Database, spotify: SpotifyUser, clock: Clock = now
    ) -> None:
        self.settings, self.database, self.spotify, self.clock = settings, database, spotify, clock
        self.breaker = Breaker(settings.breaker_failures, settings.breaker_seconds)
        self.turns = asyncio.Semaphore(settings.people_at_once)
        self.refreshing: set[asyncio.Task[Any]] = set()

    async def settle(self) -> None:
        """Wait for refreshes of tokens that are under way: what Spotify has answered is stored before we end."""
        if self.refreshing:
            await asyncio.wait(self.refreshing, timeout=_SETTLE_SECONDS)

    @cached_property
    def vault(self) -> Vault:
        """Raises ConfigError where no key is set."""
        return Vault(self.settings)
