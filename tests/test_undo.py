"""What a reorganisation takes back: every row and column of the declared tables, whatever hooks did to them."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from nasty import FILLED, NAMES, STATEMENTS, TABLES, histories, made, nasty

from indexer import Block, Tx, hook
from indexer.errors import HookFailed, UndeclaredTable
from indexer.model import Hook
from indexer.testing import Bench, assert_undo_restores, make_blocks, one_span, one_span_a_block

EXAMPLES = settings(
    deadline=None,
    max_examples=25,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
async def nasty_tables(connection: asyncpg.Connection) -> None:
    await connection.execute(TABLES)


async def emptied(connection: asyncpg.Connection) -> None:
    """As it was before a history, even where that failed."""
    await connection.execute(
        f"""
        truncate {", ".join(NAMES)}, indexer.journal, indexer.block, indexer.cursor, indexer.coverage;
        select setval(pg_get_serial_sequence('pet', 'id'), 1)
        """
    )


@pytest.mark.usefixtures("nasty_tables")
class TestWhateverHooksDo:
    @EXAMPLES
    @given(histories)
    async def test_random_histories(
        self, connection: asyncpg.Connection, history: list[list[tuple[str, int, int]]]
    ) -> None:
        await emptied(connection)
        await assert_undo_restores(connection, [nasty], made([FILLED, *history]))

    async def test_each_statement(self, connection: asyncpg.Connection) -> None:
        """On tables with rows, in a block of its own."""
        history = [[(sql, 1, 2)] for sql in STATEMENTS]
        for n in range(0, len(history), 20):
            await emptied(connection)
            await assert_undo_restores(connection, [nasty], made([FILLED, *history[n : n + 20]]), jumps=1)


def doing(*statements: str, tables: Sequence[str], name: str = "doing") -> Hook:
    """A hook that runs one of the statements at each block, in turn."""

    @hook(name, listens=["Do"], tables=tables)
    async def run(tx: Tx, blocks: Sequence[Block]) -> None:
        for block in blocks:
            await tx.execute(statements[block.number - 1])

    return run


def blocks(many: int) -> list[Block]:
    return make_blocks(*([("Do", {})] for _ in range(many)))


async def journalled(connection: asyncpg.Connection) -> list[int]:
    return [row[0] for row in await connection.fetch("select number from indexer.journal order by number, id")]


@pytest.fixture
async def note(connection: asyncpg.Connection) -> None:
    await connection.execute("create table note (id int primary key, text text, data jsonb)")


@pytest.mark.usefixtures("note")
class TestWhatIsJournalled:
    async def test_only_blocks_that_may_be_reorganised(self, connection: asyncpg.Connection) -> None:
        bench = await Bench.open(connection, [doing(*["insert into note values (1) on conflict (id) do nothing",
            *["update note set text = 'again'"] * 4], tables=["note"])])  # fmt: skip
        one = blocks(5)
        await bench.apply([one_span(one[:2])])
        await connection.execute("insert into note values (7); update note set text = 'by hand' where id = 7")
        assert await journalled(connection) == []
        await bench.apply(one_span_a_block(one[2:4]), final=2)
        assert await journalled(connection) == [3, 3, 4, 4]
        await bench.apply(one_span_a_block(one[4:]), final=3)
        assert await journalled(connection) == [4, 4, 5, 5]
        await bench.undo(3)
        assert await journalled(connection) == []
        assert await connection.fetchval("select max(number) from indexer.block") == 3

    async def test_the_two_nulls_of_json(self, connection: asyncpg.Connection) -> None:
        await connection.execute("insert into note values (1, null, 'null'), (2, 'null', null)")
        hooks = [doing("update note set text = 'x', data = '1'", "delete from note", tables=["note"])]
        await assert_undo_restores(connection, hooks, blocks(2))
        rows = await connection.fetch("select id, data is null, text is null from note order by id")
        assert rows == [(1, False, True), (2, True, False)]

    async def test_columns_that_came_meanwhile(self, connection: asyncpg.Connection) -> None:
        """A migration between a block and the fork that takes it back: what is known of the row comes back."""
        await connection.execute("insert into note values (1, 'before', '[1]')")
        bench = await Bench.open(connection, [doing("update note set text = 'after', data = '2'", tables=["note"])])
        await bench.apply(one_span_a_block(blocks(1)))
        await connection.execute("alter table note add column more int; alter table note drop column data")
        await bench.undo(0)
        assert await connection.fetch("select * from note") == [(1, "before", None)]

    async def test_truncate_is_refused(self, connection: asyncpg.Connection) -> None:
        bench = await Bench.open(connection, [doing("truncate note", tables=["note"])])
        with pytest.raises(HookFailed, match="truncate of note can't be undone by a reorganisation: use delete"):
            await bench.apply(one_span_a_block(blocks(1)))
        await bench.apply([one_span(blocks(1))])  # what is final is not undone

    async def test_a_table_without_a_primary_key(self, connection: asyncpg.Connection) -> None:
        await connection.execute("create table loose (id int unique)")
        with pytest.raises(asyncpg.RaiseError, match=r"table loose has no primary key.*give it one"):
            await Bench.open(connection, [doing(tables=["loose"])])


@pytest.mark.usefixtures("note")
class TestUndeclaredTables:
    @pytest.mark.parametrize("final", [False, True])
    async def test_it_is_told_the_first_time(self, connection: asyncpg.Connection, final: bool) -> None:
        await connection.execute("create table secret (id int primary key)")
        good = doing(*["insert into note select coalesce(max(id), 0) + 1 from note"] * 3, tables=["note"])
        bad = doing("select 1", "select 1", "insert into secret values (1)", tables=["note"], name="bad")
        bench = await Bench.open(connection, [good, bad])
        spans = [one_span(blocks(3))] if final else one_span_a_block(blocks(3))
        with pytest.raises(HookFailed, match="hook bad failed at block 3: UndeclaredTable: it wrote the table secret"):
            await bench.apply(spans)
        assert (await bench.cursor()).number == 2
        assert await connection.fetchval("select count(*) from note") == 2

    async def test_also_where_a_trigger_does_it(self, connection: asyncpg.Connection) -> None:
        await connection.execute(
            """
            create table secret (id int primary key);
            create function tell() returns trigger language plpgsql
                as $$ begin insert into secret values (new.id); return null; end $$;
            create trigger tell after insert on note for each row execute function tell()
            """
        )
        bench = await Bench.open(connection, [doing("insert into note values (1)", tables=["note"])])
        with pytest.raises(HookFailed) as failed:
            await bench.apply(one_span_a_block(blocks(1)))
        assert isinstance(failed.value.__cause__, UndeclaredTable)

    async def test_what_others_write_is_theirs(self, connection: asyncpg.Connection) -> None:
        await connection.execute("create table theirs (id int primary key); insert into theirs values (1)")
        bench = await Bench.open(connection, [doing("insert into note values (1)", tables=["note"])])
        await connection.execute("insert into theirs values (2)")  # the same session, another transaction
        await bench.apply(one_span_a_block(blocks(1)))
        await connection.execute("insert into note values (2)")
        await bench.undo(0)
        assert await connection.fetch("select id from note") == [(2,)]
