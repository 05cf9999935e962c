"""A stand-in for Songstats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from indexer.sidecar.fakes.base import Fake, Reply
from indexer.sidecar.fakes.made import history_of


class FakeSongstats(Fake):
    """Answers the `histories` that it was given, 404 for the `missing`, and for other songs one that it makes up.

    The key of its calls is the ISRC, their route "historic_stats".
    """

    name = "songstats"
    key = "songstats-test-key"

    def __init__(self, *, port: int = 0, days: int = 3) -> None:
        super().__init__(port=port)
        self.histories: dict[str, Any] = {}
        self.missing: set[str] = set()
        self.days = days

    def routes(self, router: web.UrlDispatcher) -> None:
        handler = self.answering("historic_stats", self._history, _isrc)
        router.add_get("/enterprise/v1/tracks/historic_stats", handler)

    def authorized(self, request: web.Request) -> bool:
        return request.headers.get("apikey") == self.key

    def error(self, status: int) -> Any:
        return {"result": "error", "message": f"error {status}"}

    async def _history(self, request: web.Request) -> Reply:
        isrc = await _isrc(request)
        if request.query.get("source") != "spotify" or not isrc:
            return Reply(self.error(400), 400)
        if isrc in self.missing:
            return Reply(self.error(404), 404)
        history = self.histories[isrc] if isrc in self.histories else history_of(isrc, self.days)
        return Reply(body_of(history) | {"track_info": {"isrcs": [isrc]}})


def body_of(history: Any, source: str = "spotify") -> dict[str, Any]:
    """A history as Songstats wraps it, with a field that nobody asked for."""
    entry: Mapping[str, Any] = {"source": source, "data": {"history": history}, "visualization": None}
    return {"result": "success", "message": "Data Retrieved.", "stats": [entry]}


async def _isrc(request: web.Request) -> str:
    return request.query.get("isrc", "")
