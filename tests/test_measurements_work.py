"""What POST measurement-jobs orders of the past, what a broken database makes of it, and the daily maintenance."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from apikit import CRON_SECRET
from measurekit import Stage, isrcs, measuring, stage

from indexer.sidecar import drain

__all__ = ["stage"]
pytestmark = pytest.mark.timeout(120)


class TestHistorical:
    async def test_one_job_a_song(self, stage: Stage) -> None:
        told = await stage.order("historical", isrcs=["qz-abc-24-00001", "QZABC2400001", "QZABC2400002"])
        assert told.status == 202
        assert told.json == {"status": "success", "source": "historical", "id": None, "enqueued": 2, "skipped": 0}

    async def test_same_order_twice_at_the_same_moment(self, stage: Stage) -> None:
        catalog = str(await stage.catalog(stage.ann, isrcs(1000)))
        told = await asyncio.gather(*(stage.order("historical", catalog_id=catalog) for _ in range(2)))
        assert [one.status for one in told] == [202, 202]
        assert sum(one.json["enqueued"] for one in told) == 1000
        assert sum(one.json["skipped"] for one in told) == 1000
        assert await stage.jobs() == {"queued": 1000}

    async def test_skips_what_is_known(self, stage: Stage) -> None:
        await stage.measured("QZABC2400000", 5, data_source="songstats")
        insert = "insert into provider_calls (provider, isrc, status, final) values ('songstats', $1, $2, $3)"
        await stage.run(insert, "QZABC2400001", 404, True)
        await stage.run(insert, "QZABC2400002", 503, False)
        told = await stage.order("historical", isrcs=isrcs(4))
        assert (told.json["enqueued"], told.json["skipped"]) == (2, 2)

    async def test_rank_is_the_latest_count(self, stage: Stage) -> None:
        counts = [7, 5_000_000_000, 0, 1 << 30, (1 << 30) + 8, 9_000_000_000_000_000_000, 5_000_000_001]
        for song, count in zip(isrcs(7), counts, strict=True):
            await stage.measured(song, count)
            await stage.measured(song, 10**6, timedelta(days=1))
        await stage.order("historical", isrcs=isrcs(8))
        found = await stage.rows("select payload from indexer.pgqueuer order by priority desc, id")
        order = [int(row[0][-4:-2]) for row in found]
        assert order == [5, 6, 1, 4, 3, 0, 2, 7]
        assert drain.rank(5_000_000_000) > drain.rank(4_999_999_000) > drain.rank(1 << 30) == 1 << 30

    async def test_platforms_and_a_known_album(self, stage: Stage) -> None:
        await stage.run("insert into songs (isrc) values ('QZABC2400001')")
        await stage.run("insert into song_identifiers values ('QZABC2400001', 'spotify', 'album_id', 'mine')")
        assert (await stage.order("historical", album_ids=["mine"])).json["enqueued"] == 1
        assert stage.spotify.calls == []


class TestDatabase:
    async def test_its_error_is_a_500(self, stage: Stage) -> None:
        """Of every kind of order: neither not found nor success."""
        catalog = str(await stage.catalog(stage.ann, isrcs(1)))
        await stage.run("alter table catalogs rename to elsewhere")
        await stage.run("alter table songs rename to gone")
        await stage.run("alter table playcount_snapshots rename to lost")
        for source, scope in (
            ("historical", {"catalog_id": catalog}), ("historical", {"isrcs": isrcs(1)}),
            ("current", {"album_ids": ["a"]}), ("current", {"catalog_id": catalog}),
        ):  # fmt: skip
            told = await stage.order(source, **scope)
            assert (told.status, told.error) == (500, "internal error"), scope
        assert await stage.jobs() == {}


class TestMaintenance:
    async def test_only_with_the_secret(self, stage: Stage) -> None:
        path = "/api/internal/playcount-maintenance"
        assert (await stage.api.get(path)).status == 401
        assert (await stage.api.get(path, by=stage.ann)).status == 401
        assert (await stage.api.get(path, headers=stage.ann.bearer())).status == 401
        told = await stage.api.get(path, headers={"Authorization": f"Bearer {CRON_SECRET}"})
        assert told.status == 202
        run = await stage.value("select id from maintenance_runs")
        assert told.json == {
            "status": "success", "reclaimed": 0, "backfill_run_id": str(run), "monthly_snapshots_started": 0
        }  # fmt: skip

    async def test_no_secret_is_no_open_door(self, database_url: str) -> None:
        async with measuring(database_url, auth={"cron_secret": None}) as stage:
            for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
                told = await stage.api.get("/api/internal/playcount-maintenance", headers=headers)
                assert told.status == 500

    async def test_reclaims_and_drains(self, stage: Stage) -> None:
        await stage.order("historical", isrcs=isrcs(3))
        await stage.run(
            """
            update indexer.pgqueuer set status = 'picked', queue_manager_id = gen_random_uuid(),
                heartbeat = now() - interval '61 minutes' where id = (select min(id) from indexer.pgqueuer)
            """
        )
        await stage.run("insert into indexer.job_gate values ($1, now() + interval '1 hour', '503')", drain.KIND)
        told = await stage.api.get(
            "/api/internal/playcount-maintenance", headers={"Authorization": f"Bearer {CRON_SECRET}"}
        )
        assert told.json["reclaimed"] == 1 and await stage.jobs() == {"queued": 3}
        async with stage.working():
            await stage.settled()
        assert sorted(stage.songstats.keys()) == isrcs(3)
