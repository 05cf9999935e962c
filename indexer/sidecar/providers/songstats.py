"""Songstats: the daily history of a song's streams on Spotify. Its quota is small: nothing here asks twice."""

from __future__ import annotations

import math
from datetime import date
from types import TracebackType
from typing import Any, Self

import msgspec

from indexer.config import SongstatsSettings
from indexer.sidecar.providers.errors import unset
from indexer.sidecar.providers.http import Http
from indexer.sidecar.providers.protocols import History, Point

_SOURCE = "spotify"
_MOST = 2**63 - 1  # what the database's bigint holds


class _Data(msgspec.Struct):
    history: list[Any] | None = None


class _Entry(msgspec.Struct):
    source: str | None = None
    data: _Data | None = None


class _Body(msgspec.Struct):
    stats: list[_Entry]


class Songstats:
    """A PlayHistory."""

    def __init__(self, settings: SongstatsSettings) -> None:
        key = settings.api_key
        self._has_key = key is not None
        headers = {"apikey": key.get_secret_value()} if key is not None else {}
        self._http = Http(
            "songstats", settings.base_url, timeout_seconds=settings.timeout_seconds,
            headers=headers | {"Accept": "application/json"},
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def history(self, isrc: str) -> History:
        if not self._has_key:
            raise unset("songstats", "api_key")
        url = self._http.path("enterprise", "v1", "tracks", "historic_stats")
        answer = await self._http.ask("historic_stats", _Body, "GET", url, params={"isrc": isrc, "source": _SOURCE})
        entries = [entry for entry in answer.value.stats if entry.source == _SOURCE and entry.data is not None]
        found = [item for entry in entries for item in (entry.data.history if entry.data else None) or ()]
        points = [point for item in found if (point := _point(item)) is not None]
        days = {point.day: point for point in points}
        return History(tuple(days[day] for day in sorted(days)), len(found) - len(points))


def _point(item: Any) -> Point | None:
    if not isinstance(item, dict):
        return None
    day, streams = _day(item.get("date")), _whole(item.get("streams_total"))
    return None if day is None or streams is None else Point(day, streams)


def _day(text: Any) -> date | None:
    """A day as YYYY-MM-DD, perhaps with a time behind it."""
    if not isinstance(text, str) or text[10:11] not in ("", "T", " "):
        return None
    try:
        return date.fromisoformat(text[:10]) if text[4:5] == text[7:8] == "-" else None
    except ValueError:
        return None


def _whole(number: Any) -> int | None:
    """A JSON number as a count that the database can hold."""
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        return None
    return int(number) if 0 <= number <= _MOST else None
