"""The kit for the authors of hooks, on hooks that are right and on hooks that are wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import pytest
from reference import README

from hooks.aggregates import Aggregates
from hooks.milestones import Milestones
from hooks.plays import Plays
from indexer import Block, Tx, hook
from indexer.config import HookSettings
from indexer.errors import DatabaseUnavailable, HookFailed
from indexer.registry import Registered
from indexer.testing import (
    assert_set_equals_rows,
    assert_undo_restores,
    crash_point,
    make_blocks,
    one_span,
    run_hooks,
    spans_of,
)  # fmt: skip

PLAYS = make_blocks(
    *(
        [("Played", {"trackId": str(n % 3), "playedAt": str(1_700_000_000 + 700 * n), "country": "DE"})] * (n % 5)
        for n in range(1, 25)
    )
)
BUNDLED = [Plays(), Aggregates(), Milestones()]
SOLD = make_blocks([("Sold", {"price": 3})], [], [("Sold", {"price": 4}), ("Sold", {"price": 5})])


@hook("sales", listens=["Sold"], tables=["sale"])
async def sales(tx: Tx, blocks: Sequence[Block]) -> None:
    rows = [(event.tx_hash, event.args["price"], block.number) for block in blocks for event in block.events]
    await tx.insert_new("sale", ["tx_hash", "price", "block"], rows, key=["tx_hash"])


@hook("calls", listens=["Sold"], tables=["sale"])
async def calls(tx: Tx, blocks: Sequence[Block]) -> None:
    """Wrong: a row for each time it is called, though that is not for a hook to know."""
    await tx.execute("insert into sale (tx_hash, price) values (convert_to(clock_timestamp()::text, 'UTF8'), 1)")


@pytest.fixture
async def sale(connection: asyncpg.Connection) -> None:
    await connection.execute(
        """
        create table sale (
            id bigserial, tx_hash bytea primary key, price bigint, block bigint, sold_at timestamptz default now()
        )
        """
    )


async def prices(connection: asyncpg.Connection) -> list[int]:
    return [row[0] for row in await connection.fetch("select price from sale order by price")]


class TestBlocks:
    def test_they_hang_together(self) -> None:
        first, second, third = make_blocks([("A", {"x": 1})], [], [("B", {}), ("C", {})], first=7)
        assert [one.number for one in (first, second, third)] == [7, 8, 9]
        assert (second.parent_hash, third.parent_hash) == (first.hash, second.hash)
        assert [(event.index, event.name) for event in third.events] == [(0, "B"), (1, "C")]
        assert len({event.tx_hash for one in (first, third) for event in one.events}) == 3
        assert first.timestamp < second.timestamp < third.timestamp

    def test_forks_differ(self) -> None:
        ours, theirs = make_blocks([], []), make_blocks([], [], fork="rival")
        assert not {one.hash for one in ours} & {one.hash for one in theirs}

    def test_spans_are_the_whole(self) -> None:
        cut = spans_of(PLAYS, [3, 1, 50])
        assert [(one.first, one.last) for one in cut] == [(1, 3), (4, 4), (5, 24)]
        listed = [block for span in cut for block in span.blocks]
        assert listed == [block for block in PLAYS if block.events] == list(one_span(PLAYS).blocks)


@pytest.mark.usefixtures("sale")
class TestRunHooks:
    async def test_at_the_head_and_back(self, connection: asyncpg.Connection) -> None:
        bench = await run_hooks(connection, [sales], SOLD)
        assert await prices(connection) == [3, 4, 5]
        await bench.undo(2)
        assert await prices(connection) == [3]
        await run_hooks(connection, [sales], SOLD[2:])  # goes on where it was
        assert await prices(connection) == [3, 4, 5]

    @pytest.mark.parametrize("spans", [None, [1], [2, 1]])
    async def test_as_history(self, connection: asyncpg.Connection, spans: list[int] | None) -> None:
        bench = await run_hooks(connection, [sales], SOLD, spans=spans, final=True)
        assert await prices(connection) == [3, 4, 5]
        assert await connection.fetchval("select count(*) from indexer.journal") == 0
        assert (await bench.cursor()).number == 3

    async def test_spans_at_the_head_are_blocks(self, connection: asyncpg.Connection) -> None:
        with pytest.raises(ValueError, match="at the head every block is a span"):
            await run_hooks(connection, [sales], SOLD, spans=[2])

    async def test_a_hook_that_fails(self, connection: asyncpg.Connection) -> None:
        broken = make_blocks([("Sold", {"price": 1})], [("Sold", {})])
        with pytest.raises(HookFailed, match="hook sales failed at block 2: KeyError: 'price'"):
            await run_hooks(connection, [sales], broken)
        assert await prices(connection) == [1]

    async def test_a_hook_with_a_policy(self, connection: asyncpg.Connection) -> None:
        broken = make_blocks([("Sold", {"price": 1})], [("Sold", {})])
        await run_hooks(connection, [Registered(sales, HookSettings(on_error="skip"))], broken)
        assert await prices(connection) == [1]
        assert await connection.fetchval("select count(*) from indexer.failure") == 1


class TestChecks:
    async def test_our_own_hooks(self, connection: asyncpg.Connection) -> None:
        await connection.execute("insert into tracks (track_id, owner_id, created_at) values (1, 5, now())")
        await assert_set_equals_rows(connection, BUNDLED, PLAYS)
        assert await connection.fetchval("select count(*) from plays") == 0
        await assert_undo_restores(connection, BUNDLED, PLAYS)
        assert await connection.fetchval("select count(*) from aggregate_plays") == 0
        await run_hooks(connection, BUNDLED, PLAYS)
        assert await connection.fetchval("select count(*) from notification") > 0

    @pytest.mark.usefixtures("sale")
    async def test_what_varies_by_itself_is_passed_over(self, connection: asyncpg.Connection) -> None:
        await assert_set_equals_rows(connection, [sales], SOLD)
        with pytest.raises(AssertionError, match=r"against one span: the table sale differs in 3 \+ 3 rows"):
            await assert_set_equals_rows(connection, [sales], SOLD, ignore=["sale.sold_at"])
        await assert_set_equals_rows(connection, [sales], SOLD, ignore=["sale.sold_at", "sale.id"])

    @pytest.mark.usefixtures("sale")
    async def test_a_hook_that_counts_its_calls_is_found(self, connection: asyncpg.Connection) -> None:
        with pytest.raises(AssertionError, match="one block at a time, against one span: the table sale differs"):
            await assert_set_equals_rows(connection, [calls], SOLD)
        assert await prices(connection) == []

    @pytest.mark.usefixtures("sale")
    async def test_an_undo_that_leaves_something_is_found(self, connection: asyncpg.Connection) -> None:
        """Here a trigger of the table's writes again what the undo takes away."""
        await connection.execute(
            """
            create function again() returns trigger language plpgsql as $$
            begin insert into sale (tx_hash, price) values ('\\x00', 0) on conflict do nothing; return null; end $$;
            create trigger again after delete on sale for each statement execute function again()
            """
        )
        with pytest.raises(
            AssertionError, match=r"undone from block \d to \d: the table sale differs in 0 \+ 1 rows\n  \+"
        ):
            await assert_undo_restores(connection, [sales], SOLD)


@pytest.mark.usefixtures("sale")
class TestCrashPoints:
    async def test_statements_are_recorded(self, connection: asyncpg.Connection) -> None:
        kind = type(connection)
        with crash_point(connection) as point:
            await run_hooks(connection, [sales], SOLD, final=True)
        assert not point.struck and "copy sale" in point.statements
        assert point.statements.count("COMMIT;") >= 1
        assert type(connection) is kind and await connection.fetchval("select 1") == 1

    async def test_a_lost_connection_is_the_databases_trouble(
        self, connection: asyncpg.Connection, database_url: str
    ) -> None:
        with crash_point(connection) as point:
            await run_hooks(connection, [sales], SOLD[:1])
        copies = point.statements.index("copy sale") + 1
        lost = await asyncpg.connect(database_url)
        await (await run_hooks(connection, [sales], [])).undo(0)
        with crash_point(lost, copies, "after") as point, pytest.raises(DatabaseUnavailable):
            await run_hooks(lost, [sales], SOLD[:1])
        assert point.struck and lost.is_closed()
        assert await prices(connection) == []

    async def test_another_kind_of_crash(self, connection: asyncpg.Connection) -> None:
        def crash(_: object) -> None:
            raise ZeroDivisionError

        with crash_point(connection, 2, act=crash):
            await connection.execute("select 1")
            with pytest.raises(ZeroDivisionError):
                await connection.execute("create table never (id int)")
        assert await connection.fetchval("select to_regclass('never')") is None


def blocks_of(section: str, language: str) -> list[str]:
    text = README.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0].split("\n### ")
    return re.findall(rf"```{language}\n(.*?)```", "".join(text), re.DOTALL)


def pytest_in(folder: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TEST_DATABASE_URL": url, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments], cwd=folder, env=environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_readmes_test_of_its_hook(tmp_path: Path, database_url: str) -> None:
    """As a user would have them: the README's hook, its test and its settings of pytest, in a folder of their own."""
    [a_hook] = blocks_of("A hook of your own", "python")
    [a_test] = blocks_of("Testing a hook", "python")
    [options] = blocks_of("Testing a hook", "toml")
    assert len(a_test.strip().splitlines()) <= 20
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "hooks.py").write_text(a_hook)
    (tmp_path / "shop" / "__init__.py").touch()
    (tmp_path / "test_sales.py").write_text(a_test)
    (tmp_path / "pyproject.toml").write_text(options)
    passed = pytest_in(tmp_path, database_url)
    assert passed.returncode == 0 and "2 passed" in passed.stdout, passed.stdout + passed.stderr
    wrong = a_hook.replace('event.args["price"]', "0")
    assert wrong != a_hook
    (tmp_path / "shop" / "hooks.py").write_text(wrong)
    failed = pytest_in(tmp_path, database_url)
    assert failed.returncode == 1 and "1 failed, 1 passed" in failed.stdout, failed.stdout + failed.stderr


def test_the_marker_names_a_tests_own_hooks(tmp_path: Path, database_url: str) -> None:
    (tmp_path / "test_marked.py").write_text(
        """
import pytest

def tables(connection):
    return connection.fetchval("select to_regclass('plays') is not null and to_regclass('indexer.chain') is not null")

@pytest.mark.indexer_hooks("hooks.plays:plays")
async def test_with(indexer_connection):
    assert await tables(indexer_connection)
    await indexer_connection.execute("insert into plays (play_item_id, created_at) values (1, now())")

@pytest.mark.indexer_hooks("hooks.plays:plays")
async def test_a_copy_of_its_own(indexer_connection):
    assert await indexer_connection.fetchval("select count(*) from plays") == 0

async def test_without(indexer_connection):
    assert not await tables(indexer_connection)
    assert await indexer_connection.fetchval("select to_regclass('indexer.chain') is not null")
"""
    )
    passed = pytest_in(tmp_path, database_url, "-o", "asyncio_mode=auto")
    assert passed.returncode == 0 and "3 passed" in passed.stdout, passed.stdout + passed.stderr
