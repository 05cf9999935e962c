"""Schedules: each tick is a job once, however many sidecars there are, and whenever they were away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from queuekit import KINDS, one, tick

from indexer import queue
from indexer.config import DatabaseSettings, ScheduleSettings
from indexer.db import Database
from indexer.errors import ConfigError
from indexer.sidecar.jobs import Schedule
from indexer.sidecar.schedules import Scheduler, combined, following, latest, schedule

START = datetime(2026, 3, 1, 0, 0, 30, tzinfo=UTC)
KINDS_BY_NAME = {kind.kind: kind for kind in (*KINDS, tick)}


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database(database_url, DatabaseSettings(pool_size=8)).opened() as opened:
        yield opened


async def ticks(connection: asyncpg.Connection) -> list[str]:
    rows = await connection.fetch("select dedupe_key from indexer.pgqueuer order by id")
    return [row["dedupe_key"].partition("@")[2] for row in rows]


EVERY_MINUTE = Schedule("often", "* * * * *", "test.tick")


class TestTicks:
    @pytest.mark.parametrize(
        ("cron", "now", "last", "next_"),
        [
            ("17 3 * * *", "2026-03-01T03:16:59", "2026-02-28T03:17:00", "2026-03-01T03:17:00"),
            ("17 3 * * *", "2026-03-01T03:17:00", "2026-03-01T03:17:00", "2026-03-02T03:17:00"),
            ("17 3 * * *", "2026-03-01T03:17:00.5", "2026-03-01T03:17:00", "2026-03-02T03:17:00"),
            ("0 * * * *", "2026-12-31T23:59:59.9", "2026-12-31T23:00:00", "2027-01-01T00:00:00"),
        ],
    )
    def test_before_and_after(self, cron: str, now: str, last: str, next_: str) -> None:
        one_, at = Schedule("x", cron, "a"), datetime.fromisoformat(now).replace(tzinfo=UTC)
        assert latest(one_, at) == datetime.fromisoformat(last).replace(tzinfo=UTC)
        assert following(one_, at) == datetime.fromisoformat(next_).replace(tzinfo=UTC)


class TestScheduler:
    async def test_each_tick_once_with_two_sidecars(self, database: Database, connection: asyncpg.Connection) -> None:
        """Two clocks that go a little apart, two sidecars that look in any order: each minute is one job."""
        clocks = [Clock(), Clock()]
        both = [Scheduler(database, [EVERY_MINUTE], clock=clock) for clock in clocks]
        chance = random.Random(7)
        for second in range(0, 20 * 60, 15):
            for clock in clocks:
                clock.now = START + timedelta(seconds=second + chance.uniform(0, 10))
            await asyncio.gather(*(one_.step() for one_ in both))
        minutes = [START.replace(second=0) + timedelta(minutes=n) for n in range(1, 21)]
        found = await ticks(connection)
        assert found == [f"{minute:%Y-%m-%dT%H:%M:%SZ}" for minute in minutes][: len(found)]
        assert len(found) >= 19

    async def test_says_how_long_nothing_is_due(self, database: Database) -> None:
        clock = Clock()
        scheduler = Scheduler(database, [EVERY_MINUTE], clock=clock)
        assert await scheduler.step() == 30.0
        clock.now += timedelta(seconds=28)
        assert await scheduler.step() == 2.0
        assert await Scheduler(database, [Schedule("y", "0 0 1 1 *", "a")], clock=clock).step() == 30.0

    async def test_a_new_schedule_makes_up_for_nothing(
        self, database: Database, connection: asyncpg.Connection
    ) -> None:
        await Scheduler(database, [Schedule("x", "0 0 * * *", "a", catch_up=True)], clock=Clock()).step()
        assert await ticks(connection) == []

    @pytest.mark.parametrize(("catch_up", "made_up"), [(True, ["2026-03-05T00:00:00Z"]), (False, [])])
    async def test_a_missed_tick(
        self, database: Database, connection: asyncpg.Connection, catch_up: bool, made_up: list[str]
    ) -> None:
        """Four days away: the last tick is made up for, once, by one of two sidecars, where that is wanted."""
        daily = [Schedule("x", "0 0 * * *", "a", catch_up=catch_up)]
        await Scheduler(database, daily, clock=Clock()).step()
        later = Clock(START + timedelta(days=4))
        again = [Scheduler(database, daily, clock=later) for _ in range(2)]
        for _ in range(2):
            await asyncio.gather(*(one_.step() for one_ in again))
        assert await ticks(connection) == made_up
        later.now += timedelta(days=1)
        await asyncio.gather(*(one_.step() for one_ in again))
        assert await ticks(connection) == [*made_up, "2026-03-06T00:00:00Z"]

    async def test_spread_over_a_window(self, database: Database, connection: asyncpg.Connection) -> None:
        schedules = [Schedule(f"x{n}", "0 1 * * *", "a", {"n": n}, spread_seconds=600) for n in range(12)]
        clock = Clock()
        scheduler = Scheduler(database, schedules, clock=clock)
        await scheduler.step()
        clock.now = START.replace(hour=1)
        await scheduler.step()
        rows = await connection.fetch("select execute_after from indexer.pgqueuer order by id")
        assert [row["execute_after"] for row in rows] == [
            START.replace(hour=1, second=0) + queue.spread(f"x{n}", 600) for n in range(12)
        ]
        assert len({row["execute_after"] for row in rows}) == 12

    async def test_run_looks_when_it_is_due(self, database: Database, connection: asyncpg.Connection) -> None:
        clock = Clock()

        async def sleep(seconds: float) -> None:
            clock.now += timedelta(seconds=seconds)
            if clock.now > START + timedelta(minutes=5):
                raise KeyError("enough")

        with pytest.raises(KeyError):
            await Scheduler(database, [EVERY_MINUTE], clock=clock, sleep=sleep).run()
        assert await ticks(connection) == [f"2026-03-01T00:0{n}:00Z" for n in range(1, 6)]


class TestSettings:
    def test_are_laid_over_the_code(self) -> None:
        said = {"test.often": ScheduleSettings(cron="5 * * * *", catch_up=True)}
        assert combined(KINDS_BY_NAME, said) == [Schedule("test.often", "5 * * * *", "test.tick", catch_up=True)]
        assert combined(KINDS_BY_NAME, {}) == [Schedule("test.often", "* * * * *", "test.tick")]
        assert combined(KINDS_BY_NAME, {"test.often": ScheduleSettings(enabled=False)}) == []

    def test_add_their_own(self) -> None:
        said = {"mine": ScheduleSettings(cron="5 * * * *", kind="test.one", payload={"a": 1}, spread_seconds=60)}
        assert combined({"test.one": one}, said) == [Schedule("mine", "5 * * * *", "test.one", {"a": 1}, 60)]

    @pytest.mark.parametrize(
        ("said", "text"),
        [
            ({"mine": ScheduleSettings(cron="5 * * * *")}, "give its cron and kind"),
            ({"mine": ScheduleSettings(cron="noon", kind="test.one")}, "no cron expression"),
            ({"mine": ScheduleSettings(cron="5 * * * *", kind="test.two")}, "no enabled job"),
        ],
    )
    def test_refuses(self, said: dict[str, ScheduleSettings], text: str) -> None:
        with pytest.raises(ConfigError, match=text):
            combined({"test.one": one}, said)

    def test_refuses_two_of_a_name(self) -> None:
        twice = schedule("test.often", cron="1 1 * * *")(one)
        with pytest.raises(ConfigError, match="two schedules"):
            combined({"test.tick": tick, "test.one": twice}, {})
