"""A dry run changes nothing, and says what the replay then does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import asyncpg
import pytest
from replaykit import (
    BUNDLED,
    MET,
    ORDERED,
    TALLY,
    Picky,
    Tally,
    World,
    chain_of,
    consume,
    everything,
    world,
)

from indexer import replay
from indexer.errors import UsageError
from indexer.model import Block
from indexer.transaction import Tx

Enter = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def enter(database_url: str, connection: asyncpg.Connection) -> Enter:
    """A world on the test's own database."""
    return partial(world, database_url, connection)


SMALL = {"span": {"max_events": 10, "max_blocks": 5}}


# -- the dry run -----------------------------------------------------------------------------------------------------


def rows_by_key(tables: dict[str, dict[Any, str]], others: dict[str, dict[Any, str]]) -> dict[str, tuple[int, ...]]:
    found = {}
    for table, rows in tables.items():
        after = others[table]
        changed = sum(1 for key, row in rows.items() if key in after and after[key] != row)
        numbers = (len(after.keys() - rows.keys()), changed, len(rows.keys() - after.keys()))
        if any(numbers):
            found[table] = numbers
    return found


async def keyed(connection: asyncpg.Connection) -> dict[str, dict[Any, str]]:
    keys = {
        "plays": "chain, slot, tx_hash, event_index", "aggregate_plays": "play_item_id", "met": "track",
        "aggregate_monthly_plays": "play_item_id, timestamp, country", "hourly_play_counts": "hourly_timestamp",
        "milestones": "id, name, threshold", "notification": "group_id, specifier", "tally": "id",
    }  # fmt: skip
    found = {}
    for table, key in keys.items():
        rows = await connection.fetch(
            f"select row({key})::text, (to_jsonb(indexer_row) - '{{id, updated_at}}'::text[])::text"
            f" from {table} as indexer_row"
        )
        found[table] = dict(map(tuple, rows))
    return found


class Cleaner:
    """Inserts, changes and deletes."""

    name, listens, tables, after = "cleaner", (), ("met",), ("plays",)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        for track in tx.inserted("plays")["play_item_id"]:
            await tx.execute("delete from met where track = $1", f"old {track}")
            await tx.execute("insert into met values ($1) on conflict do nothing", f"new {track}")
            await tx.execute("delete from met where track = 'never there'")


@pytest.mark.parametrize("final_lag", [0, 10], ids=["all final", "some above"])
async def test_a_dry_run_says_what_a_real_one_does(final_lag: int, enter: Enter) -> None:
    bad = [5, 6, 12, 19]
    async with enter(chain_of(7, 30, final_lag, own=[6, 12]), **SMALL) as w:
        await w.connection.execute(TALLY)
        await w.connection.execute(MET)
        await w.connection.execute("insert into met select 'old ' || n from generate_series(1, 2000) as n")
        w.hooks.append(tally := Picky(Tally()))
        w.hooks.append(Cleaner())
        for one in (w.plays, tally):
            one.bad.update(bad)
        await w.follow()
        for one in (w.plays, tally):
            one.bad.clear()
        names = [one.name for one in w.hooks]
        untouched, before = await everything(w.connection), await keyed(w.connection)
        async with w.replayer() as replayer:
            found = await replayer.rehearse(await replayer.plan(0, 20, names))
        assert await everything(w.connection) == untouched
        async with w.replayer() as replayer:
            await consume(replayer, await replayer.plan(0, 20, names))
        real = rows_by_key(before, await keyed(w.connection))
        said = {one.table: (one.inserted, one.changed, one.deleted) for one in found.tables}
        if final_lag:  # what is above is applied anew, and finds other milestones reached already
            assert {table: said[table] for table in said if table not in ORDERED} == {
                table: real[table] for table in real if table not in ORDERED
            }
        else:
            assert said == real
        assert {"plays", "aggregate_plays", "milestones", "notification", "met", "tally"} <= real.keys()
        assert real["met"][0] > 0 and real["met"][2] > 0 and real["aggregate_plays"][1] > 0
        for one in found.tables:
            assert 0 < len(one.samples) <= 3
            for old, new in one.samples:
                assert old != new and (old is None or isinstance(old, dict))
        assert (found.blocks, found.failures) == (sum(bool(w.chain.blocks[number].logs) for number in bad), [])
        assert found.events == sum(len(w.chain.blocks[number].logs) for number in bad)


async def test_a_dry_run_that_finds_a_failure(enter: Enter) -> None:
    async with enter(chain_of(7, 30, 0, own=[5, 11]), span={"max_events": 1000}) as w:
        w.aggregates.bad.update([5, 11])
        await w.follow()
        w.aggregates.bad = {11}
        untouched = await everything(w.connection)
        async with w.replayer() as replayer:
            found = await replayer.rehearse(await replayer.plan(0, 30, BUNDLED))
        assert found.failures == ["hook aggregates failed at block 11: ValueError: aggregates does not like block 11"]
        assert {one.table: (one.inserted, one.changed) for one in found.tables} == {
            "aggregate_plays": (1, 0), "aggregate_monthly_plays": (1, 0), "hourly_play_counts": (1, 0),
            "milestones": (1, 0),
        }  # fmt: skip
        assert await everything(w.connection) == untouched


async def test_what_can_not_be_rehearsed(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    async with enter(chain_of(7, 30, 10), **SMALL) as w:
        await w.follow()
        async with w.replayer() as replayer:
            plan = await replayer.plan(0, 30, BUNDLED, force=True)
            with pytest.raises(UsageError, match="blocks above 20 are not final"):
                await replayer.rehearse(plan)
            monkeypatch.setattr(replay, "_REHEARSED_EVENTS", 5)
            with pytest.raises(UsageError, match="at most 5 events"):
                await replayer.rehearse(await replayer.plan(0, 20, BUNDLED, force=True))
