"""Jobs as they are ordered: keys, windows, the order, and PgQueuer's tables as our migration makes them."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.queries import Queries

from indexer import queue
from indexer.config import DatabaseSettings
from indexer.db import Database
from indexer.queue import NewJob
from indexer.sidecar.store import NAMES, queries_on

# What is in a schema, by the catalogue: everything that an upgrade of PgQueuer could have changed.
CATALOGUE = """
select 'column', relname, attname, format_type(atttypid, atttypmod), attnotnull::text, attidentity::text,
       pg_get_expr(adbin, adrelid)
from pg_attribute join pg_class on pg_class.oid = attrelid
left join pg_attrdef on adrelid = attrelid and adnum = attnum
where relnamespace = 'indexer'::regnamespace and relkind = 'r' and relname like 'pgqueuer%' and attnum > 0
union all
select 'index', tablename, indexname, indexdef, '', '', '' from pg_indexes
where schemaname = 'indexer' and tablename like 'pgqueuer%'
union all
select 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '', '' from pg_constraint
where connamespace = 'indexer'::regnamespace and conrelid::regclass::text like 'indexer.pgqueuer%' and contype <> 'n'
union all
select 'enum', typname, enumlabel, enumsortorder::text, '', '', '' from pg_enum join pg_type on pg_type.oid = enumtypid
union all
select 'trigger', tgrelid::regclass::text, tgname, pg_get_triggerdef(oid), '', '', '' from pg_trigger
where not tgisinternal and tgrelid::regclass::text like 'indexer.pgqueuer%'
union all
select 'function', proname, pg_get_function_identity_arguments(oid), prorettype::regtype::text, prokind::text, '', ''
from pg_proc where pronamespace = 'indexer'::regnamespace and proname like '%pgqueuer%'
union all
select 'table', relname, relpersistence::text, '', '', '', '' from pg_class
where relnamespace = 'indexer'::regnamespace and relkind = 'r' and relname like 'pgqueuer%'
order by 1, 2, 3, 4
"""
SESSION = {"search_path": "public"}
# Each thing that PgQueuer does to its table.
CHANGES = (
    "insert into indexer.pgqueuer (priority, status, entrypoint) values (0, 'queued', 'a'), (0, 'queued', 'b')",
    "update indexer.pgqueuer set status = 'picked'",
    "delete from indexer.pgqueuer where entrypoint = 'a'",
    "delete from indexer.pgqueuer where false",
    "truncate indexer.pgqueuer",
)


class TestTables:
    async def test_are_those_of_the_installed_pgqueuer(
        self, connection: asyncpg.Connection, empty_database_url: str
    ) -> None:
        """What `pgq install` would make here, in every column, type, index, enum value and trigger."""
        other = await asyncpg.connect(empty_database_url, server_settings=SESSION)
        try:
            await Queries(**queries_on(AsyncpgDriver(other))).install()
            theirs, ours = await other.fetch(CATALOGUE), await connection.fetch(CATALOGUE)
        finally:
            await other.close()
        assert len(theirs) > 60
        assert [tuple(row) for row in ours] == [tuple(row) for row in theirs]

    async def test_wake_workers_as_pgqueuer_does(self, connection: asyncpg.Connection, empty_database_url: str) -> None:
        """Our function is another text, so its notices are compared."""
        other = await asyncpg.connect(empty_database_url, server_settings=SESSION)
        try:
            await Queries(**queries_on(AsyncpgDriver(other))).install()
            theirs, ours = await self._notices(other), await self._notices(connection)
        finally:
            await other.close()
        assert ours == theirs
        assert len(ours) == 4

    async def _notices(self, connection: asyncpg.Connection) -> list[dict[str, Any]]:
        heard: list[dict[str, Any]] = []
        await connection.add_listener(NAMES.channel, lambda *notice: heard.append(json.loads(notice[3])))
        for change in CHANGES:
            await connection.execute(change)
        await connection.fetchval("select 1")
        assert all(notice.pop("sent_at") for notice in heard)
        return heard

    async def test_need_no_upgrade(self, connection: asyncpg.Connection) -> None:
        plan = await Queries(**queries_on(AsyncpgDriver(connection))).plan_upgrade()
        # our function wakes nobody for an update that none of its callers can see: it is the one thing that differs
        assert [one for one in plan.statements if "fn_pgqueuer_changed" not in one] == []


@pytest.fixture
async def second(database_url: str) -> Any:
    opened = await Database(database_url, DatabaseSettings()).connect()
    yield opened
    await opened.close(timeout=5)


async def names(connection: asyncpg.Connection) -> list[str]:
    """The jobs in the order in which they would run."""
    rows = await connection.fetch("select payload from indexer.pgqueuer order by priority desc, id")
    return [json.loads(row["payload"])["name"] for row in rows]


class TestEnqueue:
    async def test_is_there_with_the_transaction_and_only_then(self, connection: asyncpg.Connection) -> None:
        given_up = connection.transaction()
        await given_up.start()
        assert await queue.enqueue(connection, "a.b", {"name": "x"})
        await given_up.rollback()
        assert await names(connection) == []
        assert await queue.enqueue(connection, "a.b", {"name": "x"})
        assert await names(connection) == ["x"]

    async def test_keys_are_unique_in_their_kind(self, connection: asyncpg.Connection) -> None:
        assert await queue.enqueue(connection, "a", {"name": 1}, key="k")
        assert not await queue.enqueue(connection, "a", {"name": 2}, key="k")
        assert await queue.enqueue(connection, "b", {"name": 3}, key="k")
        assert await queue.enqueue(connection, "a", {"name": 4})
        assert await queue.enqueue(connection, "a", {"name": 5})
        assert await names(connection) == [1, 3, 4, 5]

    @pytest.mark.parametrize(("status", "new"), [("picked", False), ("failed", True)])
    async def test_a_key_holds_while_its_job_runs_not_while_it_is_held(
        self, connection: asyncpg.Connection, status: str, new: bool
    ) -> None:
        await queue.enqueue(connection, "a", {}, key="k")
        await connection.execute("update indexer.pgqueuer set status = $1::text::indexer.pgqueuer_status", status)
        assert await queue.enqueue(connection, "a", {}, key="k") is new

    async def test_a_conflict_leaves_the_transaction_whole(self, connection: asyncpg.Connection) -> None:
        await queue.enqueue(connection, "a", {"name": 1}, key="k")
        async with connection.transaction():
            assert not await queue.enqueue(connection, "a", {"name": 2}, key="k")
            assert await queue.enqueue(connection, "a", {"name": 3})
        assert await names(connection) == [1, 3]

    async def test_order_is_by_priority_then_as_given(self, connection: asyncpg.Connection) -> None:
        given = [NewJob({"name": f"{n}"}, key=f"{(n * 7) % 10}", priority=n % 3) for n in range(10)]
        assert await queue.enqueue_many(connection, "a", given) == 10
        assert await names(connection) == ["2", "5", "8", "1", "4", "7", "0", "3", "6", "9"]

    async def test_many_with_the_same_key_are_one(self, connection: asyncpg.Connection) -> None:
        given = [NewJob({"name": "first"}, key="k"), NewJob({"name": "second"}, key="k")]
        assert await queue.enqueue_many(connection, "a", given) == 1
        assert await queue.enqueue_many(connection, "a", []) == 0
        assert await names(connection) == ["first"]

    async def test_after(self, connection: asyncpg.Connection) -> None:
        moment = datetime(2040, 1, 2, tzinfo=UTC)
        await queue.enqueue(connection, "a", {}, after=moment)
        await queue.enqueue(connection, "b", {}, after=timedelta(hours=1))
        rows = await connection.fetch(
            "select entrypoint, execute_after, execute_after - now() as later from indexer.pgqueuer order by id"
        )
        assert rows[0]["execute_after"] == moment
        assert timedelta(minutes=59) < rows[1]["later"] <= timedelta(hours=1)

    @pytest.mark.parametrize("kind", ["", "A", "a:b", "a..b", "a b", ".a", "1a"])
    async def test_refuses_kinds_that_could_be_taken_for_another(
        self, connection: asyncpg.Connection, kind: str
    ) -> None:
        with pytest.raises(ValueError, match="no kind of job"):
            await queue.enqueue(connection, kind, {})

    @pytest.mark.parametrize("key", ["", "x" * 501])
    async def test_refuses_keys_that_no_index_holds(self, connection: asyncpg.Connection, key: str) -> None:
        with pytest.raises(ValueError, match="1 to 500"):
            await queue.enqueue(connection, "a", {}, key=key)

    async def test_two_transactions_with_the_same_thousand_keys(
        self, connection: asyncpg.Connection, second: asyncpg.Connection
    ) -> None:
        """In opposite orders at the same moment: a thousand jobs, and neither transaction is a deadlock's victim."""
        given = [NewJob({"name": n}, key=f"key {n}") for n in range(1000)]

        async def all_(on: asyncpg.Connection, jobs: list[NewJob]) -> int:
            async with on.transaction():
                new = await queue.enqueue_many(on, "a", jobs)
                await asyncio.sleep(0.05)
            return new

        new = await asyncio.gather(all_(connection, given), all_(second, given[::-1]))
        assert sorted(new) == [0, 1000]
        assert await connection.fetchval("select count(distinct dedupe_key) from indexer.pgqueuer") == 1000
        assert await connection.fetchval("select count(*) from indexer.pgqueuer") == 1000

    async def test_who_waits_for_a_transaction_that_rolls_back_gets_the_key(
        self, connection: asyncpg.Connection, second: asyncpg.Connection
    ) -> None:
        first = connection.transaction()
        await first.start()
        await queue.enqueue(connection, "a", {}, key="k", window=timedelta(hours=1))
        waiting = asyncio.create_task(queue.enqueue(second, "a", {}, key="k", window=timedelta(hours=1)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await first.rollback()
        assert await waiting


class TestWindow:
    async def test_a_key_holds_although_its_job_is_done(self, connection: asyncpg.Connection) -> None:
        hour = timedelta(hours=1)
        assert await queue.enqueue(connection, "a", {}, key="k", window=hour)
        await connection.execute("delete from indexer.pgqueuer")
        assert not await queue.enqueue(connection, "a", {}, key="k", window=hour)
        assert await queue.enqueue(connection, "b", {}, key="k", window=hour)
        assert await queue.enqueue(connection, "a", {}, key="k")  # who gives no window asks for none
        await connection.execute("delete from indexer.pgqueuer")
        await connection.execute("update indexer.job_window set until = now() - interval '1 second'")
        assert await queue.enqueue(connection, "a", {}, key="k", window=hour)
        await connection.execute("delete from indexer.pgqueuer")
        assert not await queue.enqueue(connection, "a", {}, key="k", window=hour)

    async def test_is_given_back_with_the_transaction(self, connection: asyncpg.Connection) -> None:
        given_up = connection.transaction()
        await given_up.start()
        assert await queue.enqueue(connection, "a", {}, key="k", window=timedelta(hours=1))
        await given_up.rollback()
        assert await queue.enqueue(connection, "a", {}, key="k", window=timedelta(hours=1))

    async def test_of_many_only_the_used_ones_are_left_out(self, connection: asyncpg.Connection) -> None:
        hour = timedelta(hours=1)
        await queue.enqueue(connection, "a", {"name": 0}, key="0", window=hour)
        await connection.execute("delete from indexer.pgqueuer")
        given = [NewJob({"name": n}, key=str(n)) for n in (2, 0, 1)] + [NewJob({"name": 9})]
        assert await queue.enqueue_many(connection, "a", given, window=hour) == 3
        assert await names(connection) == [2, 1, 9]


def test_spread_is_even_and_always_the_same() -> None:
    found = [queue.spread(f"person {n}", 3600).total_seconds() for n in range(6000)]
    assert found == [queue.spread(f"person {n}", 3600).total_seconds() for n in range(6000)]
    assert all(0 <= one < 3600 for one in found)
    by_ten_minutes = [sum(600 * n <= one < 600 * (n + 1) for one in found) for n in range(6)]
    assert min(by_ten_minutes) > 880
    assert max(by_ten_minutes) < 1120
