"""Apify: an actor that reads the play counts of albums. A run is started, waited for, and its dataset is read."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from indexer.config import ApifySettings
from indexer.sidecar.providers.errors import Failed, Saturated, unset
from indexer.sidecar.providers.http import Http, with_backoff
from indexer.sidecar.providers.protocols import PlayCount, PlayCounts, Run

T = TypeVar("T")

_PAGE = 1_000
_POLL_SECONDS = 2.0
_LONGEST_WAIT = 60  # of waitForFinish
_MOST = 2**63 - 1
# Actors spell their fields in one of these ways.
_ALBUM = ("album_id", "albumId")
_TRACK = ("track_id", "trackId", "id")
_NAME = ("name", "track_name", "trackName")
_COUNT = ("play_count", "playCount", "playcount")


class _Data(msgspec.Struct, rename="camel"):
    id: str
    status: str
    default_dataset_id: str


class _Run(msgspec.Struct):
    data: _Data


class Apify:
    """An AlbumCounts."""

    def __init__(self, settings: ApifySettings, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
        self._settings, self._sleep = settings, sleep
        token = settings.token
        headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token is not None else {}
        self._http = Http(
            "apify", settings.base_url, timeout_seconds=settings.timeout_seconds,
            headers=headers | {"Accept": "application/json"},
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def start(self, albums: Sequence[str]) -> Run:
        if self._settings.actor is None:
            raise unset("apify", "actor")
        self._check_token()
        url = self._http.path("v2", "acts", self._settings.actor.replace("/", "~"), "runs")
        body = msgspec.json.encode({self._settings.albums_field: list(albums)})
        answer = await self._http.ask(
            "the start of a run", _Run, "POST", url, headers={"Content-Type": "application/json"}, body=body
        )
        return _told(answer.value)

    async def run(self, run_id: str) -> Run:
        return await self._run(run_id, 0)

    async def _run(self, run_id: str, wait_seconds: int) -> Run:
        self._check_token()
        url = self._http.path("v2", "actor-runs", run_id)
        answer = await self._http.ask("a run", _Run, "GET", url, params={"waitForFinish": str(wait_seconds)})
        return _told(answer.value)

    async def collect(self, run_id: str) -> PlayCounts:
        """Each question is repeated while the provider is saturated, since the run goes on without us."""
        until = time.monotonic() + self._settings.run_seconds
        # Shorter than our own patience with one request.
        wait_seconds = min(_LONGEST_WAIT, int(self._settings.timeout_seconds / 2))
        while not (run := await self._patiently(lambda: self._run(run_id, wait_seconds))).over:
            if time.monotonic() > until:
                raise Saturated("apify", f"a run is not over after {self._settings.run_seconds:g} s")
            await self._sleep(_POLL_SECONDS)
        if run.status != "SUCCEEDED":
            raise Failed("apify", f"a run ended as {run.status}")
        return await self._rows(run)

    async def _rows(self, run: Run) -> PlayCounts:
        url = self._http.path("v2", "datasets", run.dataset, "items")
        rows: list[PlayCount] = []
        offset = dropped = 0
        while True:
            params = {"format": "json", "clean": "1", "offset": str(offset), "limit": str(_PAGE)}
            page = await self._patiently(partial(self._http.ask, "rows", list[Any], "GET", url, params=params))
            found = [row for item in page.value if (row := _row(item)) is not None]
            rows += found
            dropped += len(page.value) - len(found)
            offset += _PAGE
            # A page may be short, as empty items are left out of it, so that only the total tells the last one.
            total = page.headers.get("X-Apify-Pagination-Total", "")
            if (offset >= int(total)) if total.isdecimal() else not page.value:
                return PlayCounts(run.id, tuple(rows), dropped)

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        return await with_backoff(call, sleep=self._sleep)

    def _check_token(self) -> None:
        if self._settings.token is None:
            raise unset("apify", "token")


def _told(answer: _Run) -> Run:
    return Run(answer.data.id, answer.data.status, answer.data.default_dataset_id)


def _row(item: Any) -> PlayCount | None:
    """A row that says whose count it is; the name may be missing."""
    if not isinstance(item, dict):
        return None
    album, track, count = _text(item, _ALBUM), _text(item, _TRACK), _count(_first(item, _COUNT))
    if not album or not track or count is None:
        return None
    return PlayCount(album, track, _text(item, _NAME), count)


def _first(item: dict[str, Any], names: Sequence[str]) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), None)


def _text(item: dict[str, Any], names: Sequence[str]) -> str:
    value = _first(item, names)
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    """A count as a number or its digits, perhaps with separators of thousands."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,19}|\d{1,3}(,\d{3}){1,6}", value, re.ASCII):
        value = int(value.replace(",", ""))
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= _MOST else None
