"""The APIs that the sidecar asks: small protocols, and one client of the real API for each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from indexer.config import ProvidersSettings
from indexer.sidecar.providers.apify import Apify
from indexer.sidecar.providers.errors import Failed, ProviderError, Saturated, Terminal
from indexer.sidecar.providers.http import with_backoff
from indexer.sidecar.providers.protocols import (
    Album,
    AlbumCounts,
    AlbumTrack,
    CardOnFile,
    Catalogue,
    History,
    Payments,
    PlayCount,
    PlayCounts,
    PlayHistory,
    Point,
    Run,
    Track,
)
from indexer.sidecar.providers.songstats import Songstats
from indexer.sidecar.providers.spotify import Spotify

__all__ = [
    "Album",
    "AlbumCounts",
    "AlbumTrack",
    "CardOnFile",
    "Catalogue",
    "Failed",
    "History",
    "Payments",
    "PlayCount",
    "PlayCounts",
    "PlayHistory",
    "Point",
    "ProviderError",
    "Providers",
    "Run",
    "Saturated",
    "Terminal",
    "Track",
    "open_providers",
    "with_backoff",
]


@dataclass(frozen=True)
class Providers:
    """One client of each, whether it has a key or not: without one its questions fail, the others' don't."""

    songstats: PlayHistory
    apify: AlbumCounts
    spotify: Catalogue
    stripe: Payments


@asynccontextmanager
async def open_providers(settings: ProvidersSettings) -> AsyncIterator[Providers]:
    """The clients, whose connections are closed at the end. Nothing is asked yet."""
    # The package takes most of a second to import: only whoever needs its client waits for it.
    from indexer.sidecar.providers.stripe import Stripe

    async with AsyncExitStack() as stack:
        yield Providers(
            songstats=await stack.enter_async_context(Songstats(settings.songstats)),
            apify=await stack.enter_async_context(Apify(settings.apify)),
            spotify=await stack.enter_async_context(Spotify(settings.spotify)),
            stripe=await stack.enter_async_context(Stripe(settings.stripe)),
        )
