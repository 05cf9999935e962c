"""Two writers of one table: another program inserts the plays of the chain before, while and after we do.

It is a process of its own (other_writer.py) that inserts in every way that there is. Afterwards `plays` holds each play
of the chain exactly once, our counts are those of the plays that we inserted, and nobody has failed or waited for long.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import FIELDS, HOOKS, Daemon, gaps, played, settings, until

from hooks.beside import old_trigger
from indexer.config import HooksSettings
from indexer.errors import DatabaseUnavailable
from indexer.fakechain import FakeChain, FakeLog, FakeNode
from indexer.model import Block
from indexer.registry import load_hooks
from indexer.testing import Bench, make_blocks, spans_of

pytestmark = pytest.mark.timeout(170)

OTHER = Path(__file__).with_name("other_writer.py")
FIRST = datetime(2024, 5, 1)
ON_PLAY = """
    create function handle_play() returns trigger language plpgsql as $$
    begin
        insert into aggregate_plays (play_item_id, count) values (new.play_item_id, 1)
        on conflict (play_item_id) do update set count = aggregate_plays.count + 1;
        insert into hourly_play_counts (hourly_timestamp, play_count) values (date_trunc('hour', new.created_at), 1)
        on conflict (hourly_timestamp) do update set play_count = hourly_play_counts.play_count + 1;
        return null;
    end $$;
    create trigger on_play after insert on plays for each row execute function handle_play()
"""
_numbers = itertools.count(1)

Content = tuple[int | None, int, datetime, str]  # what a play is known by, beside its place on the chain


def contents(count: int, seed: int, *, repeats: bool = True) -> list[Content]:
    """Plays in the order of the chain, of which every fifth or so repeats one of the last ten."""
    chance, made = random.Random(seed), list[Content]()
    for number in range(count):
        if repeats and made and chance.random() < 0.2:
            made.append(chance.choice(made[-10:]))
            continue
        user = chance.choice([None, None, *range(1, 40)])
        signature = "" if repeats and chance.random() < 0.3 else f"{seed}:{number}"
        made.append((user, chance.randint(1, 30), FIRST + timedelta(seconds=number // 4), signature))
    return made


def args(play: Content) -> dict[str, str]:
    seconds = (play[2] - datetime(1970, 1, 1)) // timedelta(seconds=1)
    user = "" if play[0] is None else str(play[0])
    return {
        "userId": user, "trackId": str(play[1]), "playedAt": str(seconds), "signature": play[3], "city": "Berlin",
        "region": "", "country": "Germany",
    }  # fmt: skip


@asynccontextmanager
async def other_writer(
    folder: Path, url: str, plays: Sequence[Content], seed: int, *, pauses: float = 0.005, open_: float = 0.02
) -> AsyncIterator[asyncio.Task[dict[str, Any]]]:
    """The other writer, started; the task ends with what it says of itself."""
    file = folder / f"plays-{next(_numbers)}.json"
    rows = [
        (*play[:2], play[2].isoformat(), play[3] or None, "Berlin", "", "Germany", "relay", 316_000_000 + place // 10)
        for place, play in enumerate(plays)
    ]
    file.write_text(json.dumps({"url": url, "plays": rows, "seed": seed, "pauses": pauses, "open": open_}))
    process = await asyncio.create_subprocess_exec(
        sys.executable, OTHER, file, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )

    async def ended() -> dict[str, Any]:
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()[-3000:]
        return dict(json.loads(out))

    task = asyncio.create_task(ended())
    try:
        yield task
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Side:
    """Our side: spans of random size, each tried again while the database has troubles; how long each try took."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.chance, self.longest, self.tries, self.given_way = bench, random.Random(seed), 0.0, 0, 0

    async def apply(self, blocks: Sequence[Block]) -> None:
        for span in spans_of(blocks, [self.chance.randint(1, 12) for _ in blocks]):
            while not await self._tried(span):
                self.given_way += 1
            await asyncio.sleep(self.chance.random() * 0.01)

    async def _tried(self, span: Any) -> bool:
        began = time.perf_counter()
        try:
            await self.bench.apply([span])
        except DatabaseUnavailable:
            return False
        finally:
            self.longest, self.tries = max(self.longest, time.perf_counter() - began), self.tries + 1
        return True


async def assert_each_once(connection: asyncpg.Connection, plays: Sequence[Content]) -> None:
    rows = await connection.fetch("select user_id, play_item_id, created_at, coalesce(signature, '') from plays")
    found, wanted = Counter(tuple(row) for row in rows), Counter(plays)
    assert (wanted - found, found - wanted) == (Counter(), Counter())
    assert await connection.fetchval("select count(*) from plays where chain is null") == 0


async def assert_counted(connection: asyncpg.Connection, which: str) -> None:
    """The aggregates against the plays that they must have counted."""
    by_track = f"select play_item_id, count(*) from plays where {which} group by 1"
    by_hour = f"select date_trunc('hour', created_at), count(*) from plays where {which} group by 1"
    for query, table in ((by_track, "aggregate_plays"), (by_hour, "hourly_play_counts")):
        assert await connection.fetch(f"{query} except table {table}") == []
        assert await connection.fetch(f"table {table} except {query}") == []


OURS = "counterpart is distinct from 'adopted'"


@pytest.fixture
async def busy(connection: asyncpg.Connection) -> asyncpg.Connection:
    """As the daemon's writer; a lock that is never given up would end the test and not hang it."""
    await connection.execute("alter table plays alter signature drop not null; set statement_timeout = '10s'")
    return connection


@pytest.mark.parametrize(
    ("count", "seed", "variant"),
    [
        (10_000, 1, "plain"),
        (1_000, 2, "plain"),
        (1_000, 3, "on_play"),
        (1_000, 4, "on_play"),
        (1_000, 5, "unique"),
        (1_000, 6, "unique"),
    ],
)
async def test_each_play_once_whoever_is_first(
    busy: asyncpg.Connection, database_url: str, tmp_path: Path, count: int, seed: int, variant: str
) -> None:
    chance = random.Random(seed)
    plays = contents(count, seed, repeats=variant != "unique")
    enabled = HOOKS[:1] if variant == "on_play" else HOOKS
    if variant == "on_play":
        await busy.execute(ON_PLAY)
        assert await old_trigger(busy) == "on_play"
    if variant == "unique":
        await busy.execute(
            "create unique index one on plays (signature); create unique index two on plays (play_item_id, signature)"
        )
    bench = await Bench.open(busy, load_hooks(HooksSettings(enabled=enabled, plays={"beside_writer": True})))
    blocks = _blocks(plays, chance)
    # what the other writer has written before we begin, and what we have before it does; then both at once, to the end
    theirs, ours = chance.randint(1, count // 6), chance.randint(len(blocks) // 4, len(blocks) // 3)
    async with other_writer(tmp_path, database_url, plays[:theirs], seed) as early:
        await early
    side = Side(bench, seed)
    await side.apply(blocks[:ours])
    async with other_writer(tmp_path, database_url, plays[theirs:], seed) as late:
        first = count // 2 if chance.random() < 0.5 else 0  # we go on before or after they have come so far
        await until(lambda: _written(busy, first, late), "the other writer is at work")
        await side.apply(blocks[ours:])
        said = await late
    await assert_each_once(busy, plays)
    await assert_counted(busy, "true" if variant == "on_play" else OURS)
    kinds = dict(await busy.fetch("select coalesce(counterpart, ''), count(*) from plays group by 1"))
    print(
        f"{variant} {count}: {kinds}, ours {side.longest:.3f} s in {side.tries} tries ({side.given_way} given up), "
        f"theirs {max(said['longest'], early.result()['longest']):.3f} s in {said['statements']} statements"
    )
    assert kinds.get("adopted", 0) > 0 and kinds.get("dropped", 0) > 0
    assert set(kinds) <= {"adopted", "dropped"}  # each of ours has its copy
    assert max(said["longest"], early.result()["longest"]) < 1.0
    assert side.longest < 1.0


async def _written(connection: asyncpg.Connection, count: int, writer: asyncio.Task[Any]) -> bool:
    return writer.done() or bool(await connection.fetchval("select count(*) >= $1 from plays", count))


def _blocks(plays: Sequence[Content], chance: random.Random) -> list[Block]:
    return make_blocks(*([("Played", args(play)) for play in some] for some in _cut(plays, chance)))


def _cut(plays: Sequence[Content], chance: random.Random) -> list[list[Content]]:
    """The plays of each block, which may have none."""
    listed, left = list[list[Content]](), list(plays)
    while left:
        size = chance.randint(0, 12)
        listed.append(left[:size])
        left = left[size:]
    return listed


def _txs(plays: Sequence[Content]) -> list[list[FakeLog]]:
    """A block's transactions, of three plays each."""
    logs = [played(tuple(args(play)[name] for name in FIELDS)) for play in plays]  # type: ignore[arg-type]
    return [logs[place : place + 3] for place in range(0, len(logs), 3)]


async def test_the_daemon_beside_another_program(busy: asyncpg.Connection, database_url: str, tmp_path: Path) -> None:
    """Through history and at the head, where the chain is reorganised, and killed once in between."""
    chance = random.Random(7)
    plays = contents(2_000, 7)
    chain, parts = FakeChain(block_seconds=1, final_lag=12), _cut(plays, chance)
    head = len(parts) // 2
    for part in parts[:head]:
        chain.mine(*_txs(part))
    hooks = {"enabled": HOOKS, "plays": {"beside_writer": True}}
    async with FakeNode(chain) as node, other_writer(tmp_path, database_url, plays, 7, pauses=0.02) as writer:
        values = settings(database_url, node.url, hooks=hooks)
        async with Daemon(tmp_path, values) as daemon:
            await daemon.reached(busy, head // 2)
            await daemon.kill()
        async with Daemon(tmp_path, values) as daemon:
            for place, part in enumerate(parts[head:], head):
                chain.mine(*_txs(part))
                if place % 40 == 0:
                    await daemon.reached(busy, chain.head.number)
                    chain.fork(5, [_txs(old) for old in parts[place - 4 : place + 1]])
                await asyncio.sleep(0.01)
            said = await writer
            await daemon.reached(busy, len(parts))
            await until(lambda: _all_there(busy, len(plays)), "every play is in the table")
            assert daemon.find("reorg undone")
            assert await daemon.stop() == 0
    await assert_each_once(busy, plays)
    await assert_counted(busy, OURS)
    assert await gaps(busy) == 0
    assert said["longest"] < 1.0


async def _all_there(connection: asyncpg.Connection, count: int) -> bool:
    return bool(await connection.fetchval("select count(*) = $1 from plays where chain is not null", count))
