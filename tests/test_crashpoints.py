"""Each statement of a transaction interrupted once, before and after it: the restart ends with the same tables."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import asyncpg
import pytest
from oracle import Oracle, dump

from hooks.aggregates import Aggregates
from hooks.milestones import Milestones
from hooks.plays import Plays
from indexer.errors import DatabaseUnavailable
from indexer.model import Block
from indexer.testing import Bench, crash_point, make_blocks, one_span, one_span_a_block
from indexer.testing.crash import When

HOOKS = (Plays(), Aggregates(), Milestones())
OWNERS = {1: 7, 2: 8}


def plays(*tracks: int) -> list[tuple[str, dict[str, str]]]:
    return [
        ("Played", {"trackId": str(track), "userId": "5", "playedAt": str(1_700_000_000 + 1800 * n), "country": "DE"})
        for n, track in enumerate(tracks)
    ]


# the last block's plays reach a milestone, so that its transaction writes to every table
BLOCKS = make_blocks(plays(1, 2, 1, 3), plays(*[1] * 6), [], plays(1, 1, *[2] * 10))


@pytest.fixture
async def tracks(connection: asyncpg.Connection) -> None:
    await connection.executemany(
        "insert into tracks (track_id, owner_id, created_at) values ($1, $2, now())", list(OWNERS.items())
    )


async def connected(url: str) -> asyncpg.Connection:
    return await asyncpg.connect(url, server_settings={"timezone": "UTC", "search_path": "public"})


async def expect(bench: Bench, blocks: Sequence[Block]) -> None:
    """The tables are those of the oracle, and the engine's own books agree."""
    expected = Oracle(bench.pipeline.chain.id, OWNERS).apply(blocks)
    assert await dump(bench.connection) == expected.dump()
    cursor = await bench.cursor()
    assert cursor.number == (blocks[-1].number if blocks else 0)
    covered = await bench.connection.fetch("select hook, blocks from indexer.coverage")
    assert {hook: [(one.lower, one.upper - 1) for one in ranges] for hook, ranges in covered} == {
        hook.name: [(1, cursor.number)] if blocks else [] for hook in HOOKS
    }


Work = Callable[[Bench], Awaitable[object]]


async def head_block(bench: Bench) -> None:
    await bench.apply(one_span_a_block(BLOCKS[3:]))


async def history(bench: Bench) -> None:
    await bench.apply([one_span(BLOCKS[3:])])


async def undo(bench: Bench) -> None:
    await bench.undo(1)


async def prepared(bench: Bench) -> None:
    await bench.apply(one_span_a_block(BLOCKS[:3]))


async def all_applied(bench: Bench) -> None:
    await bench.apply(one_span_a_block(BLOCKS))


CASES = {
    "a head span": (prepared, head_block, BLOCKS[:3], BLOCKS),
    "a final span": (prepared, history, BLOCKS[:3], BLOCKS),
    "an undo": (all_applied, undo, BLOCKS, BLOCKS[:1]),
}


@pytest.mark.usefixtures("tracks")
@pytest.mark.parametrize("case", CASES)
async def test_each_statement(database_url: str, connection: asyncpg.Connection, case: str) -> None:
    """Interrupted at each place in turn, and done again; then all is as if nothing had happened."""
    prepare, work, before, after = CASES[case]
    bench = await Bench.open(connection, HOOKS)
    await prepare(bench)
    with crash_point(connection) as seen:
        await work(bench)
    await expect(bench, after)
    statements = seen.statements
    assert "BEGIN;" in statements and statements[-1] == "COMMIT;" and len(statements) > 8
    for n in range(statements.index("BEGIN;") + 1, len(statements) + 1):
        for when in ("before", "after"):
            await back_to_the_start(connection)
            await prepare(bench)
            committed = (n, when) == (len(statements), "after")
            await crash(database_url, work, n, when)
            await expect(bench, after if committed else before)
            if not committed:
                await work(bench)
            await expect(bench, after)


async def crash(url: str, work: Work, n: int, when: When) -> None:
    lost = await connected(url)
    bench = await Bench.open(lost, HOOKS)
    with crash_point(lost, n, when) as point, pytest.raises(DatabaseUnavailable):
        await work(bench)
    assert point.struck


async def back_to_the_start(connection: asyncpg.Connection) -> None:
    await connection.execute(
        """
        truncate plays, aggregate_plays, aggregate_monthly_plays, hourly_play_counts, milestones, notification;
        delete from indexer.journal; delete from indexer.block;
        update indexer.coverage set blocks = '{}'; update indexer.cursor set number = 0, hash = '', block_time = null
        """
    )


# A process that dies at the n-th statement of a block's transaction, without a word to anybody.
DIES = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from indexer.testing import Bench, crash_point
from test_crashpoints import HOOKS, connected, head_block

async def main():
    connection = await connected(sys.argv[2])
    bench = await Bench.open(connection, HOOKS)
    with crash_point(connection, int(sys.argv[3]), sys.argv[4], act=lambda _: os._exit(9)):
        await head_block(bench)

asyncio.run(main())
"""


@pytest.mark.usefixtures("tracks")
async def test_a_process_that_dies(database_url: str, connection: asyncpg.Connection) -> None:
    """Really: by os._exit, in the middle of its transaction and right after its COMMIT."""
    bench = await Bench.open(connection, HOOKS)
    await prepared(bench)
    with crash_point(connection) as seen:
        await head_block(bench)
    commit = len(seen.statements)
    for n, when, blocks in ((commit - 9, "after", BLOCKS[:3]), (commit, "after", BLOCKS)):
        await back_to_the_start(connection)
        await prepared(bench)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DIES, str(Path(__file__).parent), database_url, str(n), when, env=dict(os.environ)
        )
        assert await process.wait() == 9
        await expect(bench, blocks)
        if blocks != BLOCKS:
            await head_block(bench)
        await expect(bench, BLOCKS)
