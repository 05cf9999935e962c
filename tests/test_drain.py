"""The drain with a real worker: what each answer of Songstats comes to, in which order, and when it stops."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from measurekit import Stage, drained, impatient, isrcs, measuring, stage

from indexer.sidecar import drain
from indexer.sidecar.maintenance import maintain

__all__ = ["impatient", "stage"]
pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("impatient")]

SONG = "QZABC2400000"
LEDGER = "select isrc, status, outcome, final from provider_calls order by id"


async def gate(stage: Stage) -> tuple[float, str] | None:
    """How long the drain's gate is closed still, and why."""
    rows = await stage.rows("select extract(epoch from until - now())::float8, reason from indexer.job_gate")
    return (rows[0][0], rows[0][1]) if rows else None


class TestAnswers:
    async def test_history(self, stage: Stage) -> None:
        stage.songstats.histories[SONG] = [
            {"date": "2024-01-31", "streams_total": 123}, {"date": "2024-02-01", "streams_total": 130, "more": 1},
            {"date": "2024-02-02"}, {"streams_total": 7}, {"date": "2024-02-03", "streams_total": "12"}, None,
        ]  # fmt: skip
        await drained(stage, [SONG])
        found = await stage.rows("select platform, metric, value, captured_at, data_source from song_measurements")
        first = ("spotify", drain.METRIC, 123, datetime(2024, 1, 31, tzinfo=UTC), "songstats")
        assert sorted(found) == [first, ("spotify", drain.METRIC, 130, datetime(2024, 2, 1, tzinfo=UTC), "songstats")]
        assert await stage.rows(LEDGER) == [(SONG, 200, "2xx", True)]
        assert await stage.jobs() == {}
        assert (await stage.order("historical", isrcs=[SONG])).json["skipped"] == 1

    async def test_history_without_a_point_is_an_answer(self, stage: Stage) -> None:
        stage.songstats.histories[SONG] = []
        await drained(stage, [SONG])
        assert (await stage.order("historical", isrcs=[SONG])).json["skipped"] == 1

    async def test_what_is_there_is_not_overwritten(self, stage: Stage) -> None:
        await stage.run("insert into songs (isrc) values ($1)", SONG)
        await stage.run(
            """
            insert into song_measurements (song, platform, value, captured_at, data_source)
            values ($1, 'spotify', 99, '2024-01-31', 'apify_spotify_playcount')
            """,
            SONG,
        )
        stage.songstats.histories[SONG] = [{"date": "2024-01-31", "streams_total": 123}]
        await drained(stage, [SONG])
        assert await stage.rows("select value from song_measurements") == [(99,)]
        with pytest.raises(asyncpg.RaiseError, match="append-only"):
            await stage.run("update song_measurements set value = 1")

    @pytest.mark.parametrize("status", [404, 400, 410, 422])
    async def test_refused_for_good(self, stage: Stage, status: int) -> None:
        stage.songstats.fault("status", status=status, count=None)
        await drained(stage, [SONG])
        assert await stage.jobs() == {} and await gate(stage) is None
        assert await stage.rows(LEDGER) == [(SONG, status, "4xx", True)]
        assert (await stage.order("historical", isrcs=[SONG])).json == {
            "status": "success", "source": "historical", "id": None, "enqueued": 0, "skipped": 1
        }  # fmt: skip

    @pytest.mark.parametrize("status", [401, 403])
    async def test_wrong_key_says_nothing_of_songs(self, stage: Stage, status: int) -> None:
        stage.songstats.fault("status", status=status, count=None)
        await drained(stage, isrcs(5))
        assert await stage.jobs() == {"failed": 1, "queued": 4} and len(stage.songstats.calls) == 1
        closed = await gate(stage)
        assert closed is not None and str(status) in closed[1]
        stage.songstats.faults.clear()
        async with stage.api.database.acquire() as connection:
            assert await drain.resume(connection, stage.api.settings)
        async with stage.working():
            await stage.settled()
        assert await stage.jobs() == {"failed": 1}

    @pytest.mark.parametrize("kind", ["500", "501", "truncated", "html"])
    async def test_held_for_an_operator(self, stage: Stage, kind: Any) -> None:
        if kind.isdecimal():
            stage.songstats.fault("status", status=int(kind))
        else:
            stage.songstats.fault(kind)
        await drained(stage, isrcs(2))
        assert await stage.jobs() == {"failed": 1} and await gate(stage) is None
        assert len(stage.songstats.calls) == 2
        await stage.run("update indexer.pgqueuer set status = 'queued'")  # as `indexer jobs requeue` does
        async with stage.working():
            await stage.settled()
        assert await stage.jobs() == {}

    async def test_no_key_asks_nothing(self, database_url: str) -> None:
        async with measuring(database_url, provider={"songstats": {"api_key": None, "monthly_budget": 10}}) as stage:
            await drained(stage, isrcs(3))
            assert await stage.jobs() == {"failed": 1, "queued": 2} and stage.songstats.calls == []
            assert await stage.rows(LEDGER) == []
            assert await stage.value("select calls from provider_budgets") == 0


class TestSaturation:
    async def test_retried_in_place(self, stage: Stage, impatient: list[float]) -> None:
        for status in (429, 503, 408, 504):
            stage.songstats.fault("status", status=status, retry_after=3 if status == 503 else None)
        await drained(stage, [SONG])
        assert impatient == [1, 3, 4, 8]
        found = await stage.rows(LEDGER)
        assert [row[1] for row in found] == [429, 503, 408, 504, 200]
        assert await stage.value("select count(*) from song_measurements") == 3

    @pytest.mark.parametrize("kind", ["status", "drop", "cut"])
    async def test_stops_within_one_job(self, stage: Stage, kind: Any) -> None:
        stage.songstats.fault(kind, status=429, count=None, skip=3)
        await drained(stage, isrcs(20))
        assert set(stage.songstats.keys()) == set(isrcs(4))
        assert stage.songstats.counts()[isrcs(4)[3]] == 5
        assert await stage.jobs() == {"queued": 17}
        assert await stage.value("select max(attempts) from indexer.pgqueuer") == 0
        closed = await gate(stage)
        assert closed is not None and 3500 < closed[0] <= 3600

    async def test_next_run_goes_on(self, stage: Stage) -> None:
        fault = stage.songstats.fault("status", status=429, count=None, skip=3)
        await drained(stage, isrcs(20))
        fault.count = 0
        async with stage.api.database.acquire() as connection:
            await maintain(connection, stage.api.settings)
        async with stage.working():
            await stage.settled()
        assert await stage.jobs() == {} and stage.songstats.keys() == [*isrcs(4), *[isrcs(4)[3]] * 4, *isrcs(20)[3:]]

    async def test_what_the_provider_asks_for_wins(self, stage: Stage) -> None:
        stage.songstats.fault("status", status=429, count=None, retry_after=7200)
        await drained(stage, isrcs(2))
        closed = await gate(stage)
        assert closed is not None and 7100 < closed[0] <= 7200
        assert len(stage.songstats.calls) == 1

    async def test_rank_order(self, stage: Stage) -> None:
        plays = dict(zip(isrcs(12), [5, 3, 11, 1, 9, 7, 2, 12, 10, 4, 8, 6], strict=True))
        for song, count in plays.items():
            await stage.measured(song, count * 10**8, timedelta(days=count))
        # in two orders: what is ranked is all that waits
        assert (await stage.order("historical", isrcs=isrcs(7))).json["enqueued"] == 7
        await drained(stage, isrcs(8, 7))
        ranked = sorted(plays, key=lambda song: -plays[song])
        assert stage.songstats.keys() == [*ranked, *isrcs(3, 12)]
