"""Snapshots: ordered once however often they are asked for, within the cap, and no run of the actor paid for twice."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from apikit import Told
from measurekit import Stage, impatient, isrcs, measuring, songs_of, stage

from indexer.sidecar import snapshots
from indexer.sidecar.fakes.made import tracks_of
from indexer.sidecar.maintenance import maintain
from indexer.sidecar.snapshots import CHUNK_KIND

__all__ = ["impatient", "stage"]
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("impatient")]


def albums(count: int) -> list[str]:
    return [f"album{n:05}" for n in range(count)]


async def state(stage: Stage, told: Told) -> str:
    found = await stage.api.get(f"/api/tasks/runs?id={told.json['id']}", by=stage.ann)
    return str(found.json["state"])


async def worked(stage: Stage) -> None:
    async with stage.working():
        await stage.settled()


class TestOrder:
    async def test_answer(self, stage: Stage) -> None:
        told = await stage.order("current", album_ids=["b", "a", "b"])
        assert told.status == 202
        snapshot = await stage.value("select id from playcount_snapshots")
        assert told.json == {
            "status": "success", "source": "current", "id": str(snapshot), "state": "queued", "album_count": 2,
            "estimated_cost_usd": 0.006, "reused": False,
        }  # fmt: skip

    async def test_reused_for_an_hour(self, stage: Stage) -> None:
        first = await stage.order("current", album_ids=["a", "b"])
        again = await stage.order("current", album_ids=["b", "a"])
        assert again.json == {**first.json, "estimated_cost_usd": 0, "reused": True}
        others: list[dict[str, Any]] = [
            {"album_ids": ["a"]}, {"album_ids": ["a", "b"], "schedule": "monthly"},
            {"album_ids": ["a", "b"], "platforms": ["spotify", "chain"]}, {"album_ids": ["a", "b"], "by": stage.bob},
        ]  # fmt: skip
        for other in others:
            told = await stage.order("current", **other)
            assert told.json["reused"] is False and told.json["id"] != first.json["id"]
        await stage.run("update playcount_snapshots set created_at = now() - interval '61 minutes'")
        assert (await stage.order("current", album_ids=["a", "b"])).json["reused"] is False

    async def test_a_failed_one_is_not(self, stage: Stage) -> None:
        await stage.order("current", album_ids=["a"])
        await stage.run("update playcount_snapshots set state = 'failed'")
        assert (await stage.order("current", album_ids=["a"])).json["reused"] is False

    async def test_at_the_same_moment(self, stage: Stage) -> None:
        told = await asyncio.gather(*(stage.order("current", album_ids=["a", "b"]) for _ in range(12)))
        assert {one.status for one in told} == {202} and len({one.json["id"] for one in told}) == 1
        assert sorted(one.json["reused"] for one in told) == [False] + [True] * 11
        assert await stage.jobs(CHUNK_KIND) == {"queued": 1}

    async def test_songs_as_albums(self, stage: Stage) -> None:
        """The album that has most of them, and for those that are unknown what Spotify says."""
        stage.release("found")
        songs = [*isrcs(3), *songs_of("found")]
        catalog = str(await stage.catalog(stage.ann, songs))
        known = [(0, "single"), (0, "whole"), (1, "whole"), (2, "whole"), (2, "another")]
        for number, album in known:
            await stage.run("insert into song_identifiers values ($1, 'spotify', 'album_id', $2)", songs[number], album)
        told = await stage.order("current", catalog_id=catalog)
        assert told.json["album_count"] == 2
        assert await stage.value("select album_ids from playcount_snapshots") == ["found", "whole"]
        assert (await stage.order("current", isrcs=songs)).json["id"] == told.json["id"]
        assert stage.spotify.counts("search").total() == 3
        assert await stage.value("select isrcs from playcount_snapshots") == []


class TestCap:
    async def test_over_it(self, database_url: str) -> None:
        async with measuring(database_url, provider={"apify": {"monthly_budget": 0.0105}}) as stage:
            assert (await stage.order("current", album_ids=["a", "b"])).status == 202
            told = await stage.order("current", album_ids=["c", "d"])
            assert told.status == 429 and "USD" in told.error and int(told.headers["Retry-After"]) > 0
            assert (await stage.order("current", album_ids=["c", "d"], by=stage.bob)).status == 202
            assert (await stage.order("current", album_ids=["b", "a"])).json["reused"] is True
            assert (await stage.order("current", album_ids=["c"])).status == 202
            await stage.run("update playcount_snapshots set created_at = created_at - interval '1 month'")
            assert (await stage.order("current", album_ids=["c", "d"])).status == 202

    async def test_orders_at_the_same_moment(self, database_url: str) -> None:
        async with measuring(database_url, provider={"apify": {"monthly_budget": 0.015}}) as stage:
            told = await asyncio.gather(*(stage.order("current", album_ids=[album]) for album in albums(20)))
            assert sorted(one.status for one in told) == [202] * 5 + [429] * 15
            async with stage.api.database.acquire() as connection:
                assert float(await snapshots.spent(connection, stage.ann.account)) == 0.015

    async def test_what_failed_before_it_cost_anything(self, database_url: str) -> None:
        provider = {"apify": {"monthly_budget": 0.003, "token": None}}
        async with measuring(database_url, provider=provider) as stage:
            told = await stage.order("current", album_ids=["a"])
            await worked(stage)
            assert await state(stage, told) == "failed" and await stage.jobs(CHUNK_KIND) == {"failed": 1}
            assert (await stage.order("current", album_ids=["b"])).status == 202


class TestMeasuring:
    async def test_from_order_to_counts(self, stage: Stage) -> None:
        stage.release("one", "two")
        told = await stage.order("current", album_ids=["one", "two"])
        await worked(stage)
        assert await state(stage, told) == "done"
        found = await stage.rows("select song, value, data_source, raw_ref, snapshot::text from song_measurements")
        counts = {**songs_of("one"), **songs_of("two")}
        assert sorted(found) == [
            (song, counts[song], "apify_spotify_playcount", "run1", told.json["id"]) for song in sorted(counts)
        ]
        assert await stage.rows("select provider, status from provider_calls") == [("apify", 201)]

    async def test_spotify_is_asked_once_for_a_track(self, stage: Stage) -> None:
        stage.apify.rows["one"] = [{"albumId": "one", "trackId": track.id, "playCount": 5}
                                   for track in tracks_of("one", 3)]  # fmt: skip
        stage.release("one")
        await stage.order("current", album_ids=["one"])
        await worked(stage)
        await stage.run("update playcount_snapshots set created_at = now() - interval '1 day'")
        await stage.order("current", album_ids=["one"])
        await worked(stage)
        assert stage.spotify.counts("tracks").total() == 1
        assert await stage.value("select count(*) from song_measurements") == 6

    async def test_chunks(self, stage: Stage) -> None:
        stage.apify.tracks = 1
        stage.spotify.made_tracks = 1
        told = await stage.order("current", album_ids=albums(250))
        assert (await stage.api.get(f"/api/tasks/runs?id={told.json['id']}", by=stage.ann)).json["state"] == "queued"
        await worked(stage)
        assert sorted(len(run.albums) for run in stage.apify.runs.values()) == [50, 100, 100]
        assert await state(stage, told) == "done"

    async def test_saturated_before_the_run(self, stage: Stage) -> None:
        fault = stage.apify.fault("status", status=429, match="start", count=None)
        told = await stage.order("current", album_ids=["one"])
        await worked(stage)
        assert await stage.jobs(CHUNK_KIND) == {"queued": 1} and stage.apify.runs == {}
        fault.count = 0
        async with stage.api.database.acquire() as connection:
            await maintain(connection, stage.api.settings)
        await worked(stage)
        assert await state(stage, told) == "done" and len(stage.apify.runs) == 1
        assert await stage.value("select runs from playcount_chunks") == 1

    async def test_no_second_run_where_a_worker_dies_collecting(self, stage: Stage) -> None:
        """The job goes back to wait with the run's id known: the other worker asks for its rows."""
        told = await stage.order("current", album_ids=["one"])
        stage.apify.polls = 10**6
        async with stage.working():
            while not stage.apify.counts("run"):
                await asyncio.sleep(0.01)
        # the worker is gone before the run is over
        assert await stage.jobs(CHUNK_KIND) == {"queued": 1} and await state(stage, told) == "running"
        stage.apify.polls = 1
        await worked(stage)
        assert await state(stage, told) == "done" and len(stage.apify.runs) == 1

    @pytest.mark.parametrize("kind", ["cut", "truncated"])
    async def test_no_second_run_where_the_answer_is_lost(self, stage: Stage, kind: Any) -> None:
        """It may have been started: a person decides, and it counts."""
        stage.apify.fault(kind, match="start")
        told = await stage.order("current", album_ids=["one"])
        await worked(stage)
        assert await state(stage, told) == "failed" and await stage.jobs(CHUNK_KIND) == {"failed": 1}
        assert len(stage.apify.runs) == 1
        async with stage.api.database.acquire() as connection:
            assert float(await snapshots.spent(connection, stage.ann.account)) == 0.003
        await stage.run("update indexer.pgqueuer set status = 'queued'")
        await worked(stage)
        assert await state(stage, told) == "done" and len(stage.apify.runs) == 2

    async def test_no_second_run_where_a_worker_died_asking(self, stage: Stage) -> None:
        told = await stage.order("current", album_ids=["one"])
        await stage.run("update playcount_chunks set asked_at = now(), runs = 1")
        await worked(stage)
        assert await state(stage, told) == "failed" and stage.apify.runs == {}

    async def test_run_that_fails(self, stage: Stage) -> None:
        stage.apify.ends_as = "FAILED"
        told = await stage.order("current", album_ids=["one"])
        await worked(stage)
        assert await state(stage, told) == "failed" and await stage.jobs(CHUNK_KIND) == {"failed": 1}
        stage.apify.ends_as = "SUCCEEDED"
        await stage.run("update indexer.pgqueuer set status = 'queued'")
        await worked(stage)
        assert await state(stage, told) == "done" and len(stage.apify.runs) == 2


class TestChain:
    async def test_our_own_plays(self, stage: Stage) -> None:
        await stage.run("insert into aggregate_plays values (1, 10), (2, 5), (3, 100)")
        await stage.catalog(stage.ann, isrcs(4))
        for song, track in ((0, "1"), (0, "2"), (1, "7"), (2, "no number")):
            await stage.run("insert into song_identifiers values ($1, 'chain', 'track_id', $2)", isrcs(4)[song], track)
        told = await stage.order("current", isrcs=isrcs(4), platforms=["chain"])
        assert (told.json["album_count"], told.json["estimated_cost_usd"]) == (0, 0)
        assert (await stage.order("current", isrcs=isrcs(3), platforms=["chain"])).json["reused"] is False
        await worked(stage)
        assert await state(stage, told) == "done" and stage.apify.calls == stage.spotify.calls == []
        found = await stage.rows(
            "select song, platform, value, data_source from song_measurements where snapshot = $1", told.json["id"]
        )
        assert sorted(found) == [(isrcs(4)[0], "chain", 15, "chain"), (isrcs(4)[1], "chain", 0, "chain")]

    async def test_both(self, stage: Stage) -> None:
        await stage.run("insert into aggregate_plays values (1, 10)")
        song = next(iter(songs_of("one")))
        await stage.catalog(stage.ann, [song])
        await stage.run("insert into song_identifiers values ($1, 'chain', 'track_id', '1')", song)
        stage.release("one")
        await stage.order("current", album_ids=["one"], platforms=["spotify", "chain"])
        await worked(stage)
        found = await stage.rows("select platform, value from song_measurements where song = $1", song)
        assert sorted(found) == [("chain", 10), ("spotify", songs_of("one")[song])]


class TestMonthly:
    async def test_due_once_a_series(self, stage: Stage) -> None:
        """Thirty days after the last one, once however many ask at the same moment."""
        for given in ({"album_ids": ["a", "b"]}, {"album_ids": ["c"]}, {"album_ids": ["a"], "by": stage.bob}):
            assert (await stage.order("current", schedule="monthly", **given)).status == 202
        await stage.order("current", album_ids=["d"])

        async def started() -> int:
            async with stage.api.database.acquire() as connection:
                return (await maintain(connection, stage.api.settings)).snapshots_started

        assert await started() == 0
        age = "update playcount_snapshots set created_at = created_at - $1::interval"
        await stage.run(age, timedelta(days=29))
        assert await started() == 0
        await stage.run(age, timedelta(days=1, minutes=1))
        assert sum(await asyncio.gather(*(started() for _ in range(4)))) == 3
        series = await stage.rows(
            """
            select account, album_ids from playcount_snapshots where schedule = 'monthly'
            group by account, album_ids having count(*) = 2
            """
        )
        assert len(series) == 3 and await started() == 0

    async def test_who_waits_sees_what_the_other_has_started(self, stage: Stage) -> None:
        await stage.order("current", schedule="monthly", album_ids=["a"])
        await stage.run("update playcount_snapshots set created_at = created_at - interval '31 days'")
        async with stage.api.database.acquire() as other, stage.api.database.acquire() as connection:
            async with other.transaction():
                await other.execute("select from accounts where id = $1 for no key update", stage.ann.account)
                task = asyncio.create_task(snapshots.start_due(connection, Decimal(25)))
                await asyncio.sleep(0.1)
                await other.execute(
                    """
                    insert into playcount_snapshots
                        (account, album_ids, isrcs, platforms, schedule, album_count, estimated_cost_usd)
                    select account, album_ids, isrcs, platforms, schedule, album_count, 0 from playcount_snapshots
                    """
                )
            assert await task == (0, 0)

    async def test_not_over_the_cap(self, database_url: str) -> None:
        async with measuring(database_url, provider={"apify": {"monthly_budget": 0.003}}) as stage:
            await stage.order("current", album_ids=["a"], schedule="monthly")
            await stage.run("update playcount_snapshots set created_at = created_at - interval '31 days'")
            await stage.order("current", album_ids=["b"])
            async with stage.api.database.acquire() as connection:
                assert (await maintain(connection, stage.api.settings)).snapshots_started == 0


async def test_unknown_run(stage: Stage) -> None:
    assert (await stage.api.get(f"/api/tasks/runs?id={uuid4()}", by=stage.ann)).status == 404
