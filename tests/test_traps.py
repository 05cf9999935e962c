"""The numbered traps that cost the predecessors data, as far as they are not told where their subject is.

1 (a bad play), 2 (many in one statement) and 3 (timezones) are in test_hooks.py and test_listeners.py, 6 (the old
trigger) is in test_beside.py; test_each_trap_has_its_test looks that none is missing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import HOOKS, Daemon, mine, settings, until

from hooks.aggregates import Aggregates
from hooks.plays import Plays, PlaysSettings
from hooks.upkeep import prune_plays
from indexer import Block, Tx, hook, ledger
from indexer.config import HooksSettings
from indexer.demochain import Listeners
from indexer.errors import DatabaseUnavailable, UsageError
from indexer.fakechain import FakeChain, FakeNode
from indexer.rebuild import rebuild, verify
from indexer.registry import Registered, load_hooks
from indexer.testing import Bench, crash_point, make_blocks, one_span, run_hooks

pytestmark = pytest.mark.timeout(120)

SECONDS = 1_700_000_000
THEIRS = "insert into plays (user_id, play_item_id, created_at, signature, slot) values (7, $1, $2, '', $3)"


def play(track: int = 1, at: int = SECONDS, user: str = "7") -> tuple[str, dict[str, Any]]:
    return "Played", {"trackId": str(track), "userId": user, "playedAt": str(at), "signature": ""}


def bundled() -> tuple[Registered, ...]:
    return load_hooks(HooksSettings(enabled=HOOKS))


async def counts(connection: asyncpg.Connection) -> dict[int, int]:
    return dict(await connection.fetch("select play_item_id, count from aggregate_plays"))  # type: ignore[arg-type]


def test_each_trap_has_its_test() -> None:
    told = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert {int(number) for number in re.findall(r"def test_trap_(\d+)_", told)} == set(range(1, 11))


# -- 4: two writers that commit out of order ---------------------------------------------------------------------------


async def test_trap_4_who_commits_later_with_lower_ids_is_counted(
    connection: asyncpg.Connection, database_url: str
) -> None:
    """Two chains of ours and another program: each has its ids before the next, and commits after it."""
    written, go_on = asyncio.Event(), asyncio.Event()

    @hook("dawdles", listens=["Played"], tables=[], after=["aggregates"])
    async def dawdles(tx: Tx, blocks: Sequence[Block]) -> None:
        written.set()
        await go_on.wait()

    slow = await Bench.open(connection, [Plays(), Aggregates(), dawdles])
    third = await asyncpg.connect(database_url)
    transaction = third.transaction()
    await transaction.start()
    await third.execute(THEIRS, 9, datetime(2024, 1, 1), 316_000_000)
    other = await asyncpg.connect(database_url, server_settings={"timezone": "UTC", "search_path": "public"})
    chain = await ledger.open_chain(other, "another", "testing", "0", 1)
    first = asyncio.create_task(slow.apply([one_span(make_blocks([play(1), play(1)]))]))
    await written.wait()
    async with other.transaction():  # another track, month and hour: its rows meet none of the first chain's
        tx = Tx(other, chain.id)
        for one in (Plays(), Aggregates()):
            await one.apply(tx, make_blocks([play(2, SECONDS - 90 * 86_400)]))
    go_on.set()
    await first
    await transaction.commit()
    ids = dict(await other.fetch("select play_item_id, max(id) from plays group by 1"))  # type: ignore[arg-type]
    assert ids[9] < ids[1] < ids[2]
    assert await counts(other) == {1: 2, 2: 1}
    assert (await verify(other, bundled(), "aggregates")).equal
    await other.close()
    await third.close()


# -- 5: counts and checkpoint in two commits ---------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
async def test_trap_5_a_crash_at_commit_counts_nothing_twice(
    connection: asyncpg.Connection, database_url: str, when: Any
) -> None:
    """Every other statement of the transaction is interrupted in test_crashpoints.py."""
    recording = await Bench.open(connection, bundled())
    with crash_point(connection) as seen:
        await recording.apply([one_span(make_blocks([play(3)]))])
    spans = [one_span(make_blocks([play(), play(2)], first=2))]
    lost = await asyncpg.connect(database_url, server_settings={"timezone": "UTC", "search_path": "public"})
    bench = await Bench.open(lost, bundled())
    with crash_point(lost, len(seen.statements), when) as point, pytest.raises(DatabaseUnavailable):
        await bench.apply(spans)
    assert point.struck and point.statements[-1] == "COMMIT;"
    again = await Bench.open(connection, bundled())
    committed = (await again.cursor()).number == 2
    assert committed == (when == "after")
    if not committed:
        await again.apply(spans)
    assert await counts(connection) == {1: 1, 2: 1, 3: 1}


# -- 7: a height that another writer moves -----------------------------------------------------------------------------


async def test_trap_7_the_lag_is_that_of_our_own_cursor(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    """Our daemon stands still, and another program's rows go on as if all were well."""
    chain, people = FakeChain(block_seconds=1), Listeners()
    mine(chain, people.plays(2, SECONDS))
    async with FakeNode(chain) as node, Daemon(tmp_path, settings(database_url, node.url)) as daemon:
        await daemon.reached(connection, 1)
        await connection.execute(
            "create function fails() returns trigger language plpgsql as $$ begin raise deadlock_detected; end $$;"
            "create trigger fails before insert on plays for each row when (new.chain is not null)"
            " execute function fails()"
        )
        mine(chain, people.plays(2, SECONDS))
        chain.mine_empty(6)
        for number in range(2, 9):
            await connection.execute(THEIRS, 1, datetime(2024, 1, 1), number)

        async def behind() -> bool:
            return bool((await daemon.get_json("status.json"))[1]["lag_blocks"] == 7)

        await until(behind, "7 blocks behind")
        status = (await daemon.get_json("status.json"))[1]
        assert (status["cursor"], await connection.fetchval("select max(slot) from plays")) == (1, 8)
        assert 'indexer_lag_blocks{chain="main"} 7.0' in (await daemon.get("metrics"))[1]
        await connection.execute("drop trigger fails on plays")
        await daemon.reached(connection, 8)
        assert await connection.fetchval("select sum(count) from aggregate_plays") == 4


# -- 8: a chain that begins anew ---------------------------------------------------------------------------------------


async def test_trap_8_another_chain_id_stops_the_daemon(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    """Heights restart under a new id: no silent stall, nothing written (how it is accepted: test_chain_cli.py)."""
    old, new, people = FakeChain(), FakeChain(chain_id=4242), Listeners()
    for _ in range(5):
        mine(old, people.plays(2, SECONDS))
        mine(new, people.plays(3, SECONDS))
    new.mine_empty(5)
    async with FakeNode(old) as node, Daemon(tmp_path, settings(database_url, node.url)) as daemon:
        await daemon.reached(connection, 5)
    async with FakeNode(new) as node, Daemon(tmp_path, settings(database_url, node.url)) as daemon:
        assert await daemon.ended() == 2
        assert daemon.find("leader acquired") is None
        assert "chain main in this database is 31337, the node answers for 4242" in " ".join(daemon.other)
    assert await connection.fetchval("select count(*) from plays") == 10


# -- 9: counts whose plays are gone ------------------------------------------------------------------------------------


async def test_trap_9_what_was_pruned_is_not_rebuilt(connection: asyncpg.Connection) -> None:
    await run_hooks(connection, bundled(), make_blocks([play(), play()], [play(2, 1_790_000_000)]), final=True)
    before = await counts(connection)
    assert await prune_plays(connection, days=400) != ""
    assert await connection.fetchval("select count(*) from plays") == 1
    for name in ("aggregates", "milestones"):
        with pytest.raises(UsageError, match="plays was pruned: 2 rows from before 2023-11-14 are gone"):
            await rebuild(connection, bundled(), name)
    assert await counts(connection) == before == {1: 2, 2: 1}


# -- 10: slots of two counters -----------------------------------------------------------------------------------------


async def test_trap_10_slots_of_another_writer_mean_nothing(connection: asyncpg.Connection) -> None:
    """Neither where we begin, nor which play is which, nor what is newest: old slots are far above our heights."""
    at = datetime(2023, 11, 14, 22, 13, 20)
    await connection.execute(THEIRS, 1, at, 316_000_123)  # the play of our block 1, under the other counter
    await connection.execute(THEIRS, 2, at, 1)  # our height, but none of our plays
    hooks = [Plays(PlaysSettings(beside_writer=True)), Aggregates()]
    bench = await run_hooks(connection, hooks, make_blocks([play()], [play(), play(3)]))
    assert (await bench.cursor()).number == 2
    rows = await connection.fetch("select play_item_id, slot, chain is not null, counterpart from plays order by id")
    assert rows == [(1, 1, True, "adopted"), (2, 1, False, None), (1, 2, True, None), (3, 2, True, None)]
    await bench.undo(0)
    rows = await connection.fetch("select play_item_id, slot, chain is not null from plays order by id")
    assert rows == [(1, 316_000_123, False), (2, 1, False)]
