"""The reads over HTTP: a run's state, a track's series and run rate, an album's and a catalog's latest counts."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from measurekit import Stage, isrcs, stage

__all__ = ["stage"]
pytestmark = pytest.mark.timeout(120)

SONG = isrcs(1)[0]
TRACK = f"/api/research/tracks/{SONG}/measurements"


async def get(stage: Stage, path: str, status: int = 200) -> Any:
    told = await stage.api.get(path, by=stage.ann)
    assert told.status == status, told
    return told.json


async def pages(stage: Stage, path: str, name: str, limit: int) -> list[Any]:
    """All entries of a list, a page at a time."""
    found, cursor = [], ""
    while True:
        page = await get(stage, f"{path}?limit={limit}{cursor}")
        assert len(page[name]) <= limit
        found += page[name]
        if page["next"] is None:
            return found
        cursor = f"&cursor={page['next']}"


class TestRuns:
    async def test_snapshot_and_its_jobs(self, stage: Stage) -> None:
        told = await stage.order("current", album_ids=[f"album{n}" for n in range(150)])
        run = await get(stage, f"/api/tasks/runs?id={told.json['id']}")
        assert (run["state"], run["album_count"], run["estimated_cost_usd"]) == ("queued", 150, 0.45)
        assert [(job["state"], job["album_count"]) for job in run["jobs"]] == [("queued", 100), ("queued", 50)]
        part = await get(stage, f"/api/tasks/runs?id={run['jobs'][1]['id']}")
        assert (part["state"], part["album_count"], part["snapshot"]) == ("queued", 50, run["id"])
        assert len(part["jobs"]) == 1

    async def test_id(self, stage: Stage) -> None:
        await get(stage, "/api/tasks/runs", 400)
        await get(stage, "/api/tasks/runs?id=1", 400)


class TestTrack:
    async def test_series_oldest_first_in_pages(self, stage: Stage) -> None:
        for days in range(7):
            await stage.measured(SONG, 100 - days, timedelta(days=days))
        await stage.measured(SONG, 5, platform="chain", data_source="chain")
        found = await pages(stage, TRACK, "measurements", 3)
        assert [one["value"] for one in found] == list(range(94, 101))
        times = [datetime.fromisoformat(one["captured_at"]) for one in found]
        assert times == sorted(times) and found[0]["data_source"] == "apify_spotify_playcount"
        assert set(found[0]) == {"value", "captured_at", "data_source"}
        assert [one["value"] for one in (await get(stage, f"{TRACK}?platform=chain"))["measurements"]] == [5]

    async def test_by_spotify_id(self, stage: Stage) -> None:
        await stage.measured(SONG, 7)
        await stage.run("insert into song_identifiers values ($1, 'spotify', 'track_id', 'sometrack')", SONG)
        found = await get(stage, "/api/research/tracks/sometrack/measurements")
        assert found["isrc"] == SONG and len(found["measurements"]) == 1
        lower = f"/api/research/tracks/{SONG.lower()[:2]}-{SONG[2:]}/measurements"
        assert (await get(stage, lower))["measurements"] == found["measurements"]

    async def test_nothing(self, stage: Stage) -> None:
        await get(stage, TRACK, 404)
        await stage.measured(SONG, 7)
        for query in ("?metric=other", "?platform=chain", "?aggregate=run_rate"):
            await get(stage, TRACK + query, 404)
        for query in ("?platform=tape", "?aggregate=sum", "?window=1y", "?window=0d", "?limit=0", "?cursor=x"):
            await get(stage, TRACK + query, 400)

    async def test_run_rate(self, stage: Stage) -> None:
        """Between the captures nearest to the ends of the window, whatever lies before it or between them."""
        for days, count in ((400, 1), (100, 1_000), (60, 50_000), (27, 8_300)):
            await stage.measured(SONG, count, timedelta(days=days))
        found = await get(stage, f"{TRACK}?aggregate=run_rate")
        assert found["delta"] == 7_300 and found["run_rate_annualized"] == pytest.approx(36_500, rel=1e-4)
        assert "measurements" not in found
        wide = await get(stage, f"{TRACK}?aggregate=run_rate&window=500d")
        assert wide["delta"] == 8_299
        falling = await get(stage, f"{TRACK}?aggregate=run_rate&window=70d")
        assert falling["delta"] == -41_700
        await get(stage, f"{TRACK}?aggregate=run_rate&window=30d", 404)


class TestLists:
    async def test_album(self, stage: Stage) -> None:
        for number, song in enumerate(isrcs(5)):
            await stage.measured(song, 1, timedelta(days=2))
            await stage.measured(song, number)
            await stage.run("insert into song_identifiers values ($1, 'spotify', 'album_id', 'lp')", song)
        await stage.catalog(stage.ann, isrcs(1, 5))
        await stage.run("insert into song_identifiers values ($1, 'spotify', 'album_id', 'lp')", isrcs(1, 5)[0])
        found = await pages(stage, "/api/research/albums/lp/measurements", "tracks", 2)
        assert [(one["isrc"], one["value"]) for one in found] == list(zip(isrcs(5), range(5), strict=True))
        await get(stage, "/api/research/albums/ep/measurements", 404)
        await get(stage, "/api/research/albums/lp/measurements?platform=chain", 404)

    async def test_catalog(self, stage: Stage) -> None:
        catalog = await stage.catalog(stage.ann, isrcs(5))
        await stage.measured(isrcs(5)[1], 1, timedelta(days=2))
        await stage.measured(isrcs(5)[1], 8)
        found = await pages(stage, f"/api/catalogs/{catalog}/measurements", "tracks", 2)
        assert [(one["isrc"], one["value"]) for one in found] == [
            (song, 8 if song == isrcs(5)[1] else None) for song in isrcs(5)
        ]
        empty = await stage.catalog(stage.ann, [])
        assert (await get(stage, f"/api/catalogs/{empty}/measurements"))["tracks"] == []

    async def test_a_cursor_fits_its_own_list_alone(self, stage: Stage) -> None:
        catalog = await stage.catalog(stage.ann, isrcs(3))
        page = await get(stage, f"/api/catalogs/{catalog}/measurements?limit=1")
        await stage.measured(SONG, 1)
        await get(stage, f"{TRACK}?cursor={page['next']}", 400)
