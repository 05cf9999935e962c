"""The cutover of the migration guide, by the statements that stand in it: no play is counted twice, none is lost."""

from __future__ import annotations

from datetime import UTC

import asyncpg
import pytest
from test_beside_writers import FIRST, ON_PLAY
from test_docs_commands import ROOT, blocks

from hooks import beside
from indexer import ledger
from indexer.config import HookSettings, HooksSettings
from indexer.registry import Registered, load_hooks
from indexer.testing import Bench, make_blocks, one_span, spans_of

GUIDE = ROOT / "deploy" / "docs" / "migrating.md"
HOOKS = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones", "hooks.listeners:listeners"]
SECONDS = int(FIRST.replace(tzinfo=UTC).timestamp())


def statement(beginning: str) -> str:
    [found] = [text for text in blocks(GUIDE, "sql") if text.startswith(beginning)]
    return found


def hooks(count: int, *, beside_writer: bool) -> list[Registered]:
    own = HookSettings.model_validate({"beside_writer": beside_writer})
    return list(load_hooks(HooksSettings(enabled=HOOKS[:count], plays=own)))  # type: ignore[call-arg]


async def other_writes(connection: asyncpg.Connection, *signatures: str) -> None:
    for signature in signatures:
        await connection.execute(
            """
            insert into plays (user_id, source, play_item_id, created_at, slot, signature)
            values (7, 'relay', 1, $1, 316999999, $2)
            """,
            FIRST, signature,
        )  # fmt: skip


async def total(connection: asyncpg.Connection) -> int:
    return int(await connection.fetchval("select count from aggregate_plays where play_item_id = 1"))


async def test_the_cutover(connection: asyncpg.Connection) -> None:
    await connection.execute(ON_PLAY)
    triggers = await connection.fetch(statement("select tgname"))
    assert [tuple(row) for row in triggers] == [("on_play", b"O")]
    plays = [("Played", {"trackId": 1, "userId": 7, "playedAt": SECONDS, "signature": name}) for name in "abcdefghijkl"]
    before = make_blocks([plays[0]], [plays[1]], [plays[2]], [plays[3]])
    after = make_blocks(*([one] for one in plays[4:]), first=5)

    await other_writes(connection, "a", "c")
    bench = await Bench.open(connection, hooks(1, beside_writer=True))
    await bench.apply(spans_of(before, [2, 2]))
    await other_writes(connection, "b", "d", "x")  # of which two are there; x is in no block
    assert await total(connection) == 5
    # as the guide has people compare
    compare = statement("select date_trunc").replace("now() at time zone 'utc'", "timestamp '2024-05-01 12:00'")
    sums = await connection.fetch(compare)
    assert [tuple(row)[1:] for row in sums] == [(1, 2, 2, 0)]

    assert await beside.old_trigger(connection) == "on_play"
    await connection.execute(statement("begin;"))
    assert await beside.old_trigger(connection) is None
    bench = await Bench.open(connection, hooks(4, beside_writer=False))
    assert not any((await ledger.gaps(connection, bench.pipeline.chain.id)).values())
    await bench.apply([one_span(after)])
    assert not any((await ledger.gaps(connection, bench.pipeline.chain.id)).values())
    assert await total(connection) == 13 and await connection.fetchval("select count(*) from plays") == 13
    # "x" counts for the trigger's total, so the tenth play is the fifth of ours after the cutover
    assert await connection.fetchval("select slot from milestones where threshold = 10") == 9


async def test_the_handbooks_statements(connection: asyncpg.Connection) -> None:
    handbook = GUIDE.with_name("operations.md")
    assert blocks(handbook, "sql")
    for text in blocks(handbook, "sql"):
        await connection.fetch(text)


async def test_the_way_back(connection: asyncpg.Connection) -> None:
    await Bench.open(connection, hooks(1, beside_writer=True))
    [taken_off] = [line for line in statement("select indexer.guard").splitlines() if line]
    assert await connection.fetchval(taken_off) == "done"
    await other_writes(connection, "a", "a")
    assert await connection.fetchval("select count(*) from plays") == 2
    with pytest.raises(asyncpg.RaiseError, match="the guard on plays is gone"):
        await connection.execute("select indexer.plays_lock('plays')")
