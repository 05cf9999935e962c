"""A stand-in for Apify: one actor, its runs, and their datasets."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from indexer.sidecar.fakes.base import Fake, Reply
from indexer.sidecar.fakes.made import tracks_of


class _FakeRun(msgspec.Struct):
    albums: list[str]
    polls: int = 0


class FakeApify(Fake):
    """A run is over after `polls` questions, as `ends_as`. Its rows are the given `rows` of an album, else made up.

    Routes: "start" (key: the albums with commas), "run" and "items" (key: the run's id).
    """

    name = "apify"
    key = "apify-test-token"
    actor = "somebody~album-play-counts"

    def __init__(self, *, port: int = 0, tracks: int = 3) -> None:
        super().__init__(port=port)
        self.rows: dict[str, list[Any]] = {}
        self.runs: dict[str, _FakeRun] = {}
        self.polls = 2
        self.ends_as = "SUCCEEDED"
        self.tracks = tracks
        self.gives_total = True

    def routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/v2/acts/{actor}/runs", self.answering("start", self._start, self._albums))
        router.add_get("/v2/actor-runs/{id}", self.answering("run", self._run, _id))
        router.add_get("/v2/datasets/{id}/items", self.answering("items", self._items, _id))

    def error(self, status: int) -> Any:
        return {"error": {"type": "some-error", "message": f"error {status}"}}

    async def _albums(self, request: web.Request) -> str:
        asked = msgspec.json.decode(await request.read()).get("albumIds")
        return ",".join(asked) if isinstance(asked, list) else ""

    async def _start(self, request: web.Request) -> Reply:
        if request.match_info["actor"] != self.actor:
            return Reply(self.error(404), 404)
        run_id = f"run{len(self.runs) + 1}"
        self.runs[run_id] = _FakeRun((await self._albums(request)).split(","))
        return Reply(self._told(run_id, "READY"), 201)

    async def _run(self, request: web.Request) -> Reply:
        run_id = request.match_info["id"]
        run = self.runs.get(run_id)
        if run is None:
            return Reply(self.error(404), 404)
        run.polls += 1
        return Reply(self._told(run_id, self.ends_as if run.polls >= self.polls else "RUNNING"))

    def _told(self, run_id: str, status: str) -> Any:
        # A dataset has an id of its own.
        return {"data": {"id": run_id, "status": status, "defaultDatasetId": f"of-{run_id}", "usageTotalUsd": 0.01}}

    async def _items(self, request: web.Request) -> Reply:
        run = self.runs.get(await _id(request))
        if run is None:
            return Reply(self.error(404), 404)
        rows = [row for album in run.albums for row in self.rows.get(album, self._made(album))]
        offset, limit = int(request.query.get("offset", 0)), int(request.query.get("limit", 250_000))
        headers = {"X-Apify-Pagination-Total": str(len(rows))} if self.gives_total else {}
        # clean=1 leaves out the empty ones of a page
        return Reply([row for row in rows[offset : offset + limit] if row != {}], headers=headers)

    def _made(self, album: str) -> list[Any]:
        return [
            {"albumId": album, "trackId": track.id, "name": track.name, "playCount": str(track.play_count)}
            for track in tracks_of(album, self.tracks)
        ]


async def _id(request: web.Request) -> str:
    return request.match_info["id"].removeprefix("of-")
