"""A simulated day of people who listen: two sidecars as processes, of which one is killed now and then, and a clock.

    python tests/listening_day.py --people 5000 --hours 24 --seed 7

The schedule, the queue, the workers and the HTTP are the real ones; what is simulated is the time, and Spotify. A batch
that is due in half an hour is made due when the clock is there. At the end everything is compared: with what Spotify
has served, and with what everybody played.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from daemon import environment
from listenkit import HOUR, START, TOKEN_KEY, Connected, archived, connect_all

from indexer import queue
from indexer.config import ListeningSettings
from indexer.migrations import migrate, sql_folder
from indexer.sidecar import gates
from indexer.sidecar.fakes import FakeSpotifyPeople, Fault
from indexer.sidecar.fakes.plays import ms_of
from indexer.sidecar.listening.cooldown import FailureType, cool_down
from indexer.sidecar.listening.schedule import KIND, PLAN_KIND
from indexer.sidecar.listening.vault import Vault
from indexer.sidecar.store import reclaim

HERE = Path(__file__).parent
FAULTS: dict[str, Callable[[], Any]] = {
    "NETWORK": lambda: Fault("status", None, "recently_played", status=503),
    "AUTH": lambda: Fault("status", None, "recently_played", status=403),
    "UNKNOWN": lambda: "not_json",
}


class Day:
    def __init__(self, connection: asyncpg.Connection, url: str, folder: Path, people: int, seed: int) -> None:
        self.connection, self.url, self.random, self.count = connection, url, random.Random(seed), people
        self.clock_file, self.now = folder / "clock", START
        self.fake = FakeSpotifyPeople(plays_per_hour=8, rotate="always", clock=lambda: self.now)
        self.people: list[Connected] = []
        self.broken: dict[UUID, str] = {}
        self.cooling: list[tuple[str, datetime, datetime]] = []  # who, and from when until when nobody may ask
        self.starts: dict[datetime, list[datetime]] = {}
        self.harmed: set[tuple[str, datetime]] = set()  # whom a killed worker had in hand, and in which hour
        self.sidecars: dict[str, asyncio.subprocess.Process] = {}
        self.kills = self.steps = 0

    def set_clock(self, now: datetime) -> None:
        self.now = now
        new = self.clock_file.with_suffix(".new")
        new.write_text(now.isoformat())
        os.replace(new, self.clock_file)

    async def start(self) -> None:
        self.set_clock(START)
        await migrate(self.connection, [("sidecar", sql_folder("sidecar"))])
        people = [self.fake.person(f"person{n:05}") for n in range(self.count)]
        settings = ListeningSettings(token_key=TOKEN_KEY)
        self.people = await connect_all(self.connection, settings, people, START)
        await asyncio.gather(self.sidecar(), self.sidecar())

    async def sidecar(self) -> None:
        """One more of them, which works already."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(HERE / "listening_sidecar.py"), self.url, self.fake.url, str(self.clock_file),
            env=environment({"PYTHONPATH": str(HERE)}), stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        self.sidecars[(await process.stdout.readline()).decode().strip()] = process

    # -- an hour ---------------------------------------------------------------------------------------------------

    async def hour(self, number: int, kill_chance: float) -> None:
        start = START + number * HOUR
        self.set_clock(start)
        self.change_faults()
        await queue.enqueue(self.connection, PLAN_KIND, {})
        await self.settled()
        rows = await self.connection.fetch(
            "select distinct execute_after from indexer.pgqueuer where entrypoint = $1 order by 1", KIND
        )
        self.starts[start] = [row["execute_after"] for row in rows]
        for moment in self.starts[start]:
            await self.step(moment, kill_chance)
        await self.bury(start + HOUR - timedelta(seconds=1))

    async def step(self, moment: datetime, kill_chance: float) -> None:
        """The batch of this moment, and perhaps the end of a sidecar in the middle of it."""
        self.set_clock(moment)
        self.steps += 1
        await self.due(moment)
        if self.random.random() < kill_chance:
            await self.kill()
        await self.settled()
        await self.check_cool_downs()

    async def due(self, moment: datetime) -> None:
        await self.connection.execute(
            "update indexer.pgqueuer set execute_after = now() where execute_after = $1 and status = 'queued'", moment
        )
        await gates.wake(self.connection)

    async def settled(self) -> None:
        """Wait until nothing is due and nothing runs but on the dead."""
        until = time.monotonic() + 120
        while await self.connection.fetchval(
            """
            select exists (
                select from indexer.pgqueuer where status = 'queued' and execute_after <= now()
                    or status = 'picked' and queue_manager_id::text = any($1::text[])
            )
            """,
            list(self.sidecars),
        ):
            assert time.monotonic() < until, await self.trouble()
            await asyncio.sleep(0.005)

    async def trouble(self) -> str:
        """What there is to be seen where jobs don't end."""
        jobs = await self.connection.fetch(
            """
            select id, entrypoint, status, attempts, execute_after, queue_manager_id, heartbeat, now() as now
            from indexer.pgqueuer where status <> 'queued' or execute_after <= now()
            """
        )
        errors = await self.connection.fetch(
            "select * from indexer.pgqueuer_log where traceback is not null order by created desc limit 5"
        )
        told = [*jobs, *errors, *await gates.standing(self.connection)]
        return "\n".join(["the jobs don't end", str(list(self.sidecars)), *(str(dict(one)) for one in told)])

    async def kill(self) -> None:
        """kill -9 of who has the batch in hand, somewhere in the middle of it, and another in its place."""
        until = time.monotonic() + 1
        name = None
        while name is None and time.monotonic() < until:
            name = await self.connection.fetchval(
                """
                select queue_manager_id::text from indexer.pgqueuer
                where status = 'picked' and entrypoint = $1 and queue_manager_id::text = any($2::text[])
                """,
                KIND, list(self.sidecars),
            )  # fmt: skip
            await asyncio.sleep(0.002)
        if name is None:
            return
        await asyncio.sleep(self.random.random() * 0.1)
        victim = self.sidecars.pop(name)
        victim.kill()
        await victim.wait()
        self.kills += 1
        await self.sidecar()

    async def bury(self, moment: datetime) -> None:
        """An hour without a heartbeat later (the hour is simulated, too) the dead ones' jobs wait again."""
        self.set_clock(moment)
        rows = await self.connection.fetch(
            """
            update indexer.pgqueuer set heartbeat = now() - interval '2 hours'
            where status = 'picked' and queue_manager_id::text <> all($1::text[])
            returning payload
            """,
            list(self.sidecars),
        )
        hour, names = self.now.replace(minute=0, second=0), {one.id: one.at_spotify.id for one in self.people}
        for row in rows:
            self.harmed |= {(names[UUID(one)], hour) for one in msgspec.json.decode(row["payload"])["userIds"]}
        await reclaim(self.connection, timedelta(hours=1), 3)
        await gates.wake(self.connection)
        await self.settled()
        await self.check_cool_downs()

    # -- faults ----------------------------------------------------------------------------------------------------

    def change_faults(self) -> None:
        """Some break, some get well."""
        for one in self.people:
            if one.id in self.broken:
                if self.random.random() < 0.25:
                    del self.broken[one.id]
                    one.at_spotify.broken = None
            elif self.random.random() < 0.01:
                kind = self.random.choice(list(FAULTS))
                self.broken[one.id] = kind
                one.at_spotify.broken = FAULTS[kind]()

    async def check_cool_downs(self) -> None:
        """Who has failed at this very moment cools down for as long as the table says."""
        rows = await self.connection.fetch(
            """
            select spotify_id, last_failure_type, consecutive_failures, last_failed_at, cooling_until from listeners
            where last_failed_at = $1
            """,
            self.now,
        )
        for row in rows:
            wait = cool_down(FailureType(row["last_failure_type"]), row["consecutive_failures"])
            assert row["cooling_until"] - row["last_failed_at"] == wait, dict(row)
            self.cooling.append((row["spotify_id"], row["last_failed_at"], row["cooling_until"]))

    # -- at the end ------------------------------------------------------------------------------------------------

    async def compare(self) -> dict[str, int]:
        """Raises AssertionError for the first thing that is not as it must be; returns what there was to compare."""
        kept, served = await archived(self.connection), self.fake.served
        failing = {who for who, _, _ in self.cooling}
        assert kept <= served
        unexplained = [play for play in served - kept if not self.out_of_reach(play, failing)]
        assert not unexplained, (len(unexplained), unexplained[:5], [
            (hour, self.fake.polls[unexplained[0][0]]) for who, hour in self.harmed if who == unexplained[0][0]
        ])  # fmt: skip
        self.check_spread()
        twice = [
            (who, hour)
            for who, times in self.fake.polls.items()
            for hour, count in Counter(time.replace(minute=0, second=0, microsecond=0) for time in times).items()
            if count > 1 and (who, hour) not in self.harmed
        ]
        assert not twice, twice[:3]
        for who, since, until in self.cooling:
            early = [time for time in self.fake.polls[who] if since < time < until]
            assert not early, (who, since, until, early)
        # nobody plays more than 50 in two hours, so that a poll that came late is no loss
        whole = await self.check_whole([one for one in self.people if one.at_spotify.id not in failing], kept)
        return {
            "people": self.count, "plays": len(kept), "polls": sum(map(len, self.fake.polls.values())),
            "failures": len(self.cooling), "plays that only a killed worker was told of in time": len(served - kept),
            "kills": self.kills, "people polled again after a kill": len(self.harmed),
            "people without failures whose every play is there": whole,
        }  # fmt: skip

    def out_of_reach(self, play: tuple[str, str, int], failing: set[str]) -> bool:
        """Whether only a killed worker was told of the play, and Spotify no longer at the next poll."""
        who, times = play[0], sorted(self.fake.polls[play[0]])
        for hour in (hour for name, hour in self.harmed if name == who):
            inside = [time for time in times if hour <= time < hour + HOUR]
            following = inside[-1] if len(inside) > 1 else min((t for t in times if t >= hour + HOUR), default=None)
            if following is None or who in failing:
                return True
            reach = self.fake.people[who].plays_within_reach(following)
            if all((one.track, one.ms) != play[1:] for one in reach):
                return True
        return False

    def check_spread(self) -> None:
        for start, moments in self.starts.items():
            gap = HOUR / len(moments)
            for number, moment in enumerate(moments):
                assert abs(moment - (start + number * gap)) < timedelta(seconds=1), (start, moments)

    async def check_whole(self, people: list[Connected], kept: set[tuple[str, str, int]]) -> int:
        """Who never failed has all plays of the day, up to the last poll, and a refresh token that holds."""
        vault = Vault(ListeningSettings(token_key=TOKEN_KEY))
        rows = await self.connection.fetch("select id, refresh_token, is_active, last_polled_at from listeners")
        by_id = {row["id"]: row for row in rows}
        mine: dict[str, set[tuple[str, str, int]]] = {}
        for play in kept:
            mine.setdefault(play[0], set()).add(play)
        for one in people:
            row, who = by_id[one.id], one.at_spotify.id
            played = self.fake.made_plays(who, START, row["last_polled_at"] + timedelta(milliseconds=1))
            missing = {(who, play.track, play.ms) for play in played if play.ms <= ms_of(row["last_polled_at"])}
            missing -= mine.get(who, set())
            assert not missing, (who, len(missing))
            assert row["is_active"] and self.fake.accounts.refreshes[vault.decrypt(row["refresh_token"])].holds
        return len(people)

    async def stop(self) -> None:
        for one in self.sidecars.values():
            if one.returncode is None:
                one.kill()
                await one.wait()


async def run(
    url: str, *, people: int, hours: int, seed: int, kill_chance: float, say: Callable[[str], None] = lambda _: None
) -> dict[str, int]:
    """Live through it on an empty database with the engine's tables; returns what was compared."""
    connection = await asyncpg.connect(url, server_settings={"search_path": "public", "timezone": "UTC"})
    with tempfile.TemporaryDirectory() as folder:
        day = Day(connection, url, Path(folder), people, seed)
        async with day.fake:
            try:
                await day.start()
                for number in range(hours):
                    begun = time.monotonic()
                    await day.hour(number, kill_chance)
                    say(f"hour {number + 1} of {hours}: {time.monotonic() - begun:.1f} s, {day.kills} kills so far")
                return await day.compare()
            finally:
                await day.stop()
                await connection.close()


def main() -> None:
    from indexer.pytest_plugin import Databases, server

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=5_000)
    parser.add_argument("--hours", type=int, default=24)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kill-chance", type=float, default=0.02, help="of each batch")
    given = parser.parse_args()
    with server() as address, Databases(address).migrated([]) as url:
        found = asyncio.run(
            run(url, people=given.people, hours=given.hours, seed=given.seed, kill_chance=given.kill_chance, say=print)
        )
    for name, number in found.items():
        print(f"{name}: {number:,}")


if __name__ == "__main__":
    main()
