"""How jobs end: tries, backoff, terminal and held ones, time limits; the order; gates; what operators do to them."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from daemon import until
from prometheus_client import CollectorRegistry, Gauge
from queuekit import KINDS, SEEN, count, emptied, reaches, states, told, working

from indexer import ledger, metrics, queue
from indexer.errors import ConfigError, HookFailed, HookLoadError, UsageError
from indexer.migrations import migrate, sql_folder
from indexer.queue import NewJob
from indexer.sidecar import gates, operations, upkeep
from indexer.sidecar.jobs import Held, Outcome, Retry, Saturated, Terminal, backoff, job, judge, limits, load_jobs

SATURATED = "create table saturated (seconds float)"


@pytest.fixture(autouse=True)
async def tables(connection: asyncpg.Connection) -> None:
    await connection.execute(SEEN + ";" + SATURATED)


async def logged(connection: asyncpg.Connection, number: int) -> list[tuple[str, str | None]]:
    """Status and kind of error of each line that the log has of a job."""
    facts = await operations.find_job(connection, number)
    assert facts is not None
    return [(line["status"], line["error"] and line["error"]["exception_type"]) for line in facts["log"]]


class TestJudgement:
    @pytest.mark.parametrize(
        ("error", "attempt", "fate"),
        [
            (ValueError("x"), 1, "retried"), (ValueError("x"), 3, "retried"), (ValueError("x"), 4, "held"),
            (TimeoutError(), 1, "retried"), (Terminal("x"), 1, "terminal"), (Terminal("x"), 9, "terminal"),
            (Held("x"), 1, "held"), (Retry(5, "x"), 1, "retried"), (Retry(5, "x"), 4, "held"),
            (Saturated("x", 5), 99, "put_back"),
        ],
    )  # fmt: skip
    def test_of_an_error(self, error: Exception, attempt: int, fate: str) -> None:
        assert judge(told, error, attempt).fate == fate

    def test_retry_after_wins_over_the_backoff(self) -> None:
        assert judge(told, Retry(77, "x"), 1).after_seconds == 77

    def test_backoff_doubles_up_to_a_limit_with_some_chance(self) -> None:
        kind = job("a", backoff_seconds=1, longest_backoff_seconds=60)(told.function)
        for attempt, longest in ((1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (2000, 60)):
            found = [backoff(kind, attempt) for _ in range(200)]
            assert 0.75 * longest <= min(found) < max(found) <= longest

    def test_only_a_retry_counts_as_a_try(self) -> None:
        assert [Outcome(fate).counts for fate in ("done", "terminal", "retried", "held", "put_back")] == [
            False, False, True, False, False
        ]  # fmt: skip


class TestLoading:
    def test_lists_and_single_kinds(self) -> None:
        own = list(load_jobs([]))
        assert list(load_jobs(["queuekit:KINDS"])) == [*own, *(one.kind for one in KINDS)]
        assert list(load_jobs(["queuekit:told", "queuekit:told"])) == [*own, "test.told"]

    def test_refuses_what_is_none(self) -> None:
        with pytest.raises(HookLoadError, match="no job"):
            load_jobs(["queuekit:SEEN"])
        with pytest.raises(HookLoadError, match="job nowhere:x: there is no module"):
            load_jobs(["nowhere:x"])

    def test_refuses_two_of_a_kind(self) -> None:
        with pytest.raises(ConfigError, match=r"two jobs are of the kind test\.told"):
            load_jobs(["queuekit:KINDS", "queuekit:told"])

    def test_limits_are_the_codes_unless_configured(self) -> None:
        kinds = load_jobs(["queuekit:KINDS"])
        assert limits(kinds, {"test.told": 7})["test.told"] == 7
        assert limits(kinds, {})["test.one"] == 1
        with pytest.raises(ConfigError, match=r"names test\.tolt"):
            limits(kinds, {"test.tolt": 7})


class TestEnds:
    async def test_done_is_gone_and_logged(self, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue(connection, "test.told", {"name": "x"})
        async with working(database_url):
            await emptied(connection)
        assert await count(connection, "select count(*) from seen where ended_at is not null") == 1
        assert [one for one, _ in await logged(connection, 1)] == ["queued", "picked", "successful"]

    async def test_failures_are_retried_and_then_held_with_the_error(
        self, database_url: str, connection: asyncpg.Connection
    ) -> None:
        await queue.enqueue_many(connection, "test.told", [NewJob({"name": f"{n}", "fails": n}) for n in (2, 9)])
        async with working(database_url):
            await emptied(connection)
        rows = await connection.fetch("select name, array_agg(attempt order by id) as tries from seen group by 1")
        assert dict(map(tuple, rows)) == {"2": [1, 2, 3], "9": [1, 2, 3, 4]}
        assert await states(connection) == {"failed": 1}
        held = await operations.find_job(connection, 2)
        assert held is not None and held["state"] == "held" and held["attempts"] == 3
        error = held["log"][-1]["error"]
        assert error["exception_type"] == "ValueError" and error["exception_message"] == "attempt 4 fails as told"
        assert "queuekit.py" in error["traceback"]

    async def test_terminal_held_and_asked_to_come_again(
        self, database_url: str, connection: asyncpg.Connection
    ) -> None:
        jobs = [NewJob({"do": "terminal"}), NewJob({"do": "hold"}), NewJob({"do": "retry", "seconds": 0.3})]
        await queue.enqueue_many(connection, "test.told", jobs)
        async with working(database_url):
            await emptied(connection)
        assert await count(connection) == 4
        assert await states(connection) == {"failed": 1}
        assert (await logged(connection, 1))[-1] == ("exception", "Terminal")
        assert (await logged(connection, 2))[-1] == ("failed", "Held")
        assert [one for one, _ in await logged(connection, 3)] == [
            "queued", "picked", "queued", "picked", "successful",
        ]  # fmt: skip
        first, second = await connection.fetch("select at from seen where job = 3 order by id")
        assert second["at"] - first["at"] >= timedelta(seconds=0.3)

    async def test_a_job_that_takes_too_long_is_stopped(
        self, database_url: str, connection: asyncpg.Connection
    ) -> None:
        await queue.enqueue(connection, "test.short", {})
        async with working(database_url):
            await emptied(connection)
        assert (await logged(connection, 1))[-1] == ("failed", "TimeoutError")

    async def test_what_is_no_json_is_held_not_lost(self, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue(connection, "test.told", {})
        await connection.execute("update indexer.pgqueuer set payload = '{', attempts = 3")
        async with working(database_url):
            await emptied(connection)
        assert (await logged(connection, 1))[-1] == ("failed", "DecodeError")

    async def test_priority_is_the_order(self, database_url: str, connection: asyncpg.Connection) -> None:
        jobs = [NewJob({"name": f"{n}"}, priority=(n * 7) % 20) for n in range(20)]
        await queue.enqueue_many(connection, "test.one", jobs)
        async with working(database_url):
            await emptied(connection)
        ranked = sorted(range(20), key=lambda n: -((n * 7) % 20))
        assert [row["name"] for row in await connection.fetch("select name from seen order by id")] == [
            f"{n}" for n in ranked
        ]

    async def test_later_jobs_wait_for_their_time(self, database_url: str, connection: asyncpg.Connection) -> None:
        async with working(database_url):
            await queue.enqueue(connection, "test.told", {"name": "later"}, after=timedelta(seconds=0.7))
            await queue.enqueue(connection, "test.told", {"name": "now"}, priority=-5)
            await emptied(connection)
        rows = await connection.fetch("select name, at from seen order by id")
        assert [row["name"] for row in rows] == ["now", "later"]
        created = await connection.fetchval("select created from indexer.pgqueuer_log order by id limit 1")
        assert rows[1]["at"] - created >= timedelta(seconds=0.7)


class TestConcurrency:
    async def test_one_at_a_time_over_two_workers(self, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue_many(connection, "test.one", [NewJob({"seconds": 0.02}) for _ in range(20)])
        async with working(database_url), working(database_url):
            await emptied(connection)
        assert await count(connection) == 20
        overlaps = await count(
            connection,
            "select count(*) from seen as a join seen as b on a.id < b.id and a.ended_at > b.at and b.ended_at > a.at",
        )
        assert overlaps == 0

    async def test_settings_win(self, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue_many(connection, "test.one", [NewJob({"seconds": 0.5}) for _ in range(3)])
        async with working(database_url, concurrency={"test.one": 3}):
            running = "select count(*) from indexer.pgqueuer where status = 'picked'"
            await until(reaches(connection, 3, running), "three at a time")

    async def test_no_job_runs_twice(self, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue_many(connection, "test.told", [NewJob({}) for _ in range(300)])
        async with working(database_url), working(database_url), working(database_url):
            await emptied(connection)
        assert await count(connection) == 300
        assert await count(connection, "select count(distinct job) from seen") == 300


class TestGates:
    async def test_saturation_stops_the_kind_within_one_job(
        self, database_url: str, connection: asyncpg.Connection
    ) -> None:
        """On both workers; the rest waits as it was, and goes on when the gate opens."""
        jobs = [NewJob({"name": f"{n}"}, key=f"{n}", priority=-n) for n in range(10)]
        await queue.enqueue_many(connection, "test.one", jobs)
        rows = "select id, priority, attempts, execute_after from indexer.pgqueuer order by id"
        before = await connection.fetch(rows)
        await connection.execute("insert into saturated values (3600)")
        async with working(database_url), working(database_url):
            await until(reaches(connection, 1, "select count(*) from indexer.job_gate"), "the gate is closed")
            await queue.enqueue(connection, "test.told", {"name": "other"})  # other kinds go on
            await until(reaches(connection, 1, "select count(*) from seen where name = 'other'"), "the other kind")
            await asyncio.sleep(0.5)
            assert await count(connection, "select count(*) from seen where kind = 'test.one'") == 1
            assert await states(connection) == {"queued": 10}
            assert await connection.fetch(rows) == before
            await connection.execute("truncate saturated")
            assert await gates.open_(connection, "test.one")
            await emptied(connection)
        names = await connection.fetch("select name from seen where kind = 'test.one' order by id")
        assert [row["name"] for row in names] == ["0", *(f"{n}" for n in range(10))]

    async def test_opens_by_itself(self, database_url: str, connection: asyncpg.Connection) -> None:
        await gates.close(connection, "test.told", timedelta(seconds=1.0), "closed by the test")
        await queue.enqueue(connection, "test.told", {})
        closed_at = await connection.fetchval("select closed_at from indexer.job_gate")
        async with working(database_url):
            await emptied(connection)
        assert await connection.fetchval("select min(at) from seen") - closed_at >= timedelta(seconds=1)

    async def test_the_later_moment_wins(self, connection: asyncpg.Connection) -> None:
        await gates.close(connection, "a", timedelta(hours=2), "long")
        await gates.close(connection, "a", timedelta(hours=1), "short")
        (standing,) = await gates.standing(connection)
        assert 7100 < standing["seconds_left"] <= 7200
        assert not await gates.open_(connection, "b")
        assert await gates.open_(connection, "a")
        assert await gates.standing(connection) == []


class TestLoss:
    async def test_a_job_that_another_worker_has_by_now_is_stopped_and_its_end_not_stored(
        self, database_url: str, connection: asyncpg.Connection
    ) -> None:
        await queue.enqueue(connection, "test.told", {"do": "sleep", "seconds": 19})
        async with working(database_url, heartbeat_timeout_seconds=2) as worker:
            await until(lambda: worker.running, "it runs")
            await connection.execute("update indexer.pgqueuer set queue_manager_id = gen_random_uuid()")
            await until(lambda: not worker.running, "it was stopped", 10)
        row = await connection.fetchrow("select status::text, attempts, queue_manager_id from indexer.pgqueuer")
        assert (row["status"], row["attempts"]) == ("picked", 0) and row["queue_manager_id"] is not None

    async def test_a_job_that_runs_longer_than_the_timeout_keeps_its_heartbeat(
        self, database_url: str, connection: asyncpg.Connection
    ) -> None:
        await queue.enqueue(connection, "test.told", {"do": "sleep", "seconds": 5})
        async with working(database_url, heartbeat_timeout_seconds=2), working(
            database_url, heartbeat_timeout_seconds=2
        ):
            await emptied(connection)
        assert await count(connection) == 1


class TestOperators:
    async def test_cancel_and_hold_stop_what_runs(self, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue_many(connection, "test.told", [NewJob({"do": "sleep", "seconds": 19})] * 2)
        async with working(database_url) as worker:
            await until(lambda: len(worker.running) == 2, "both run")
            assert await operations.cancel(connection, [1]) == 1
            assert await operations.hold(connection, [2], "not now") == 1
            await until(lambda: not worker.running, "both were stopped", 10)
        assert await states(connection) == {"failed": 1}
        assert (await logged(connection, 1))[-1][0] == "canceled"
        assert (await logged(connection, 2))[-1] == ("failed", "Held")
        assert await count(connection, "select count(*) from seen where ended_at is not null") == 0

    async def test_requeue_gives_all_tries_again(self, database_url: str, connection: asyncpg.Connection) -> None:
        await queue.enqueue(connection, "test.told", {"fails": 9})
        async with working(database_url):
            await emptied(connection)
            assert await count(connection) == 4
            assert await operations.requeue(connection, [1]) == 1
            await emptied(connection)
            await until(reaches(connection, 8), "four tries more")

    async def test_requeue_beside_another_job_of_the_key(self, connection: asyncpg.Connection) -> None:
        await queue.enqueue(connection, "a", {}, key="k")
        await operations.hold(connection, [1], "x")
        await queue.enqueue(connection, "a", {}, key="k")
        with pytest.raises(UsageError, match="same key"):
            await operations.requeue(connection, [1])
        assert await states(connection) == {"failed": 1, "queued": 1}


class TestUpkeep:
    async def test_metrics(
        self, database_url: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry = CollectorRegistry()
        for name in ("jobs", "job_oldest_seconds", "job_seconds", "job_outcomes_total"):
            one = getattr(metrics, name)
            monkeypatch.setattr(metrics, name, type(one)(f"indexer_{name}", "x", one._labelnames, registry=registry))
        await queue.enqueue(connection, "test.told", {"do": "terminal"})
        await queue.enqueue(connection, "a", {}, after=timedelta(hours=1))
        await queue.enqueue(connection, "b", {})
        await connection.execute("update indexer.pgqueuer set execute_after = now() - interval '1 hour' where id = 3")
        await upkeep.publish(connection, ["test.told", "a"])

        def value(name: str, **labels: Any) -> float | None:
            return registry.get_sample_value(f"indexer_{name}", labels)

        assert value("jobs", kind="test.told", state="waiting") == 1
        assert value("jobs", kind="a", state="waiting") == 1
        assert value("jobs", kind="other", state="waiting") == 1
        assert value("jobs", kind="b", state="waiting") is None
        assert value("job_oldest_seconds", kind="a", state="waiting") == 0
        assert 3600 <= (value("job_oldest_seconds", kind="other", state="waiting") or 0) < 3700
        async with working(database_url):
            await until(lambda: value("job_outcomes_total", kind="test.told", outcome="terminal") == 1, "it is counted")
        await upkeep.publish(connection, ["test.told", "a"])
        assert value("jobs", kind="test.told", state="waiting") == 0

    async def test_halts_of_the_chains(self, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those that nothing has resolved, and not of a chain that was put aside."""
        shown = Gauge("indexer_halted", "x", ["chain", "hook"], registry=None)
        monkeypatch.setattr(metrics, "halted", shown)
        for name in ("main", "other", "main@1"):
            chain = await ledger.open_chain(connection, name, "evm", "1", 0)
            for policy, hook in (("halt", "plays"), ("skip", "counts")):
                failed = HookFailed(hook, 5, 5, ValueError("x"))
                await ledger.record_failure(connection, chain.id, failed, policy)

        async def halts() -> set[tuple[str, str]]:
            await upkeep.publish_halts(connection)
            return {(one.labels["chain"], one.labels["hook"]) for one in next(iter(shown.collect())).samples}

        assert await halts() == {("main", "plays"), ("other", "plays")}
        await connection.execute("update indexer.failure set resolved_at = now()")
        assert await halts() == set()

    async def test_prune_keeps_what_is_young_or_held(self, connection: asyncpg.Connection) -> None:
        await migrate(connection, [("sidecar", sql_folder("sidecar"))])
        await queue.enqueue_many(connection, "a", [NewJob({})] * 3, window=timedelta(hours=1))
        await queue.enqueue(connection, "a", {}, key="k", window=timedelta(hours=1))
        await operations.hold(connection, [2], "x")
        await connection.execute("update indexer.pgqueuer_log set created = now() - interval '8 days' where job_id < 3")
        await connection.execute("insert into indexer.job_death values (1, 1), (99, 1)")
        await upkeep.prune(connection, timedelta(days=7))
        rows = await connection.fetch("select distinct job_id from indexer.pgqueuer_log order by 1")
        assert [row["job_id"] for row in rows] == [2, 3, 4]
        assert await count(connection, "select count(*) from indexer.job_window") == 1
        assert await count(connection, "select count(*) from indexer.job_death") == 1
        await connection.execute("update indexer.job_window set until = now()")
        await upkeep.prune(connection, timedelta(days=7))
        assert await count(connection, "select count(*) from indexer.job_window") == 0


