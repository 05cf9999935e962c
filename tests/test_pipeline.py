"""A span's transaction: all of it or nothing, whoever fails; and what is noted of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
from made import GENESIS, block, block_hash, event, heads, span

from indexer import ledger, metrics
from indexer.config import HookSettings
from indexer.errors import DatabaseUnavailable, HookFailed, LostLeadership
from indexer.ledger import Pace
from indexer.model import Block, BlockRef, EventSpec, Quarantined, Span
from indexer.pipeline import Applied, Pipeline, blockwise, heard
from indexer.registry import Registered
from indexer.transaction import Tx

Act = Callable[[Tx], Awaitable[None]]
MANNERS = ("lets it pass", "raises another", "passes over it")
POLICIES = ({}, {"on_error": "skip"}, {"retries": 2}, {"retries": 1, "on_error": "skip"})


class Recorder:
    """A hook that writes a row for every event, and then does what it was told to do at that block."""

    def __init__(
        self,
        name: str,
        acts: Mapping[int, Act] | None = None,
        *,
        listens: Sequence[str] = (),
        after: Sequence[str] = (),
    ) -> None:
        self.name, self.after, self.tables = name, tuple(after), ("seen",)
        self.listens = tuple(EventSpec(one) for one in listens)
        self.acts = dict(acts or {})
        self.calls: list[list[int]] = []

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        self.calls.append([one.number for one in blocks])
        tx.skip("tried")
        for one in blocks:
            rows = [(self.name, one.number, item.index) for item in one.events]
            await tx.insert_new("seen", ("hook", "block", "event"), rows, key=("hook", "block", "event"))
            if one.number in self.acts:
                await self.acts[one.number](tx)


def raising(error: Exception, times: int = 10**9) -> Act:
    left = iter(range(times))

    async def act(tx: Tx) -> None:
        if next(left, None) is not None:
            raise error

    return act


def sql(statement: str) -> Act:
    async def act(tx: Tx) -> None:
        await tx.execute(statement)

    return act


def in_manner(act: Act, manner: str) -> Act:
    """What hooks do about errors of the database: nothing, something else, or worse."""

    async def wrapped(tx: Tx) -> None:
        try:
            await act(tx)
        except Exception as error:
            if manner == "lets it pass":
                raise
            if manner == "raises another":
                raise RuntimeError("could not write") from error

    return wrapped


class Bench:
    """A chain in the test's own database, with a table for Recorders."""

    def __init__(self, url: str, connection: asyncpg.Connection, chain: ledger.ChainRow) -> None:
        self.url, self.connection, self.chain = url, connection, chain

    def pipeline(self, *hooks: Recorder, **policies: Mapping[str, Any]) -> Pipeline:
        registered = [Registered(one, HookSettings(**policies.get(one.name, {}))) for one in hooks]
        return Pipeline(self.chain, registered, "test")

    async def apply(
        self, pipeline: Pipeline, *spans: Span, final: int = 10**6, connection: asyncpg.Connection | None = None
    ) -> list[Applied]:
        names = [one.name for one in pipeline.hooks]
        await ledger.register_hooks(self.connection, self.chain.id, names)
        at, applied = await self.cursor(), []
        for one in spans:
            async for part in pipeline.apply(connection or self.connection, at, one, Pace(heads(10**6, final))):
                applied.append(part)
                at = part.span.end
        return applied

    async def cursor(self) -> BlockRef:
        return (await ledger.cursor(self.connection, self.chain.id)).ref

    async def seen(self) -> list[tuple[str, int]]:
        return [
            tuple(row) for row in await self.connection.fetch("select distinct hook, block from seen order by 1, 2")
        ]

    async def coverage(self) -> dict[str, list[tuple[int, int]]]:
        rows = await self.connection.fetch("select hook, blocks from indexer.coverage where chain = $1", self.chain.id)
        return {hook: [(one.lower, one.upper - 1) for one in ranges] for hook, ranges in rows}

    async def failures(self) -> list[asyncpg.Record]:
        return await self.connection.fetch("select * from indexer.failure order by id")

    async def nothing_happened(self) -> None:
        assert await self.cursor() == GENESIS
        assert await self.seen() == []
        assert await self.failures() == []
        assert all(ranges == [] for ranges in (await self.coverage()).values())
        for table in ("block", "quarantine"):
            assert await self.connection.fetchval(f"select count(*) from indexer.{table}") == 0


@pytest.fixture
async def bench(database_url: str, connection: asyncpg.Connection) -> Bench:
    await connection.execute(
        """
        create table seen (hook text, block bigint, event bigint, primary key (hook, block, event));
        create table locks (id int primary key);
        insert into locks values (1), (2);
        """
    )
    return Bench(database_url, connection, await ledger.open_chain(connection, "main", "test", "1", 1))


def numbered(*numbers: int) -> list[Block]:
    return [block(number, [event(0, {}), event(1, {}, name="Other")]) for number in numbers]


def counted() -> dict[tuple[Any, ...], float]:
    """All counters and gauges of ours; a histogram of times says nothing of what was committed."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if family.name.startswith("indexer_") and family.type != "histogram" and not sample.name.endswith("_created")
    }


def moved(before: Mapping[tuple[Any, ...], float]) -> dict[str, float]:
    """By how much counters have moved since, by name and labels."""
    changes = {key: value - before.get(key, 0) for key, value in counted().items()}
    names = {
        key: " ".join([key[0].removeprefix("indexer_"), *(value for _, value in key[1:] if value != "main")])
        for key in changes
    }
    return {names[key]: change for key, change in changes.items() if change}


async def once(pipeline: Pipeline, connection: asyncpg.Connection, at: BlockRef = GENESIS) -> None:
    async for _ in pipeline.apply(connection, at, span(numbered(1)), Pace(heads(10**6))):
        pass


class TestAllOrNothing:
    async def test_a_hook_that_raises_leaves_nothing_of_the_others(self, bench: Bench) -> None:
        first, second = Recorder("first"), Recorder("second", {1: raising(ValueError("no"))})
        before = counted()
        bad = span(numbered(1), final=False)
        log = Quarantined(1, b"h", 9, "Played", "0x", b"t", (), b"", "truncated")
        bad = Span(1, 1, bad.blocks, bad.end, bad.end_timestamp, False, (log,))
        with pytest.raises(HookFailed, match="hook second failed at block 1: ValueError: no") as failed:
            await bench.apply(bench.pipeline(first, second, Recorder("third")), bad)
        assert (failed.value.hook, failed.value.first, failed.value.last) == ("second", 1, 1)
        assert isinstance(failed.value.__cause__, ValueError)
        await bench.nothing_happened()
        assert moved(before) == {}

    async def test_a_span_that_is_applied(self, bench: Bench) -> None:
        before = counted()
        pipeline = bench.pipeline(Recorder("first"), Recorder("second", listens=["Played"]))
        [applied] = await bench.apply(pipeline, span(numbered(3, 5), 1, 8))
        assert applied.written == {("seen", "inserted"): 6}
        assert await bench.cursor() == BlockRef(8, block_hash(8))
        assert await bench.coverage() == {"first": [(1, 8)], "second": [(1, 8)]}
        assert await bench.seen() == [("first", 3), ("first", 5), ("second", 3), ("second", 5)]
        assert moved(before) == {
            "blocks_total": 8, "events_total": 4, "spans_total": 1, "rows_total inserted seen": 6,
            "skipped_total first tried": 1, "skipped_total second tried": 1,
        }  # fmt: skip

    async def test_no_metric_moves_where_the_commit_fails(self, bench: Bench) -> None:
        await bench.connection.execute(
            """
            create function hang_up() returns trigger language plpgsql as
                $$ begin perform pg_terminate_backend(pg_backend_pid()); return null; end $$;
            create constraint trigger late after insert on seen deferrable initially deferred
                for each row execute function hang_up();
            """
        )
        writer, before = await asyncpg.connect(bench.url), counted()
        with pytest.raises(DatabaseUnavailable):
            await bench.apply(bench.pipeline(Recorder("first")), span(numbered(1)), connection=writer)
        await bench.nothing_happened()
        assert moved(before) == {}
        await bench.connection.execute("drop trigger late on seen")
        await bench.apply(bench.pipeline(Recorder("first")), span(numbered(1)))
        assert await bench.seen() == [("first", 1)]

    async def test_two_writers_at_one_cursor(self, bench: Bench) -> None:
        """The second waits for the first one's commit, and loses; what its hook would write never shows."""
        waits, other = asyncio.Event(), await asyncpg.connect(bench.url)

        async def until_the_other_waits(tx: Tx) -> None:
            waits.set()
            blocked = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and pid = $1"
            while not await tx.fetchval(blocked, other.get_server_pid()):
                await asyncio.sleep(0.005)
                await tx.execute("select pg_stat_clear_snapshot()")

        winner, loser = Recorder("winner", {1: until_the_other_waits}), Recorder("loser")

        async def late() -> None:
            await waits.wait()
            await once(bench.pipeline(loser), other)

        await ledger.register_hooks(bench.connection, bench.chain.id, ["winner", "loser"])
        async with asyncio.timeout(20):
            work = asyncio.gather(late(), return_exceptions=True)
            await once(bench.pipeline(winner), bench.connection)
            [lost] = await work
        assert isinstance(lost, LostLeadership), lost
        assert loser.calls == []
        assert await bench.seen() == [("winner", 1)]
        assert await bench.coverage() == {"winner": [(1, 1)], "loser": []}
        await other.close()

    @pytest.mark.parametrize("at", [BlockRef(1, b""), BlockRef(0, block_hash(0))])
    async def test_the_cursor_is_compared_by_number_and_hash(self, bench: Bench, at: BlockRef) -> None:
        hook = Recorder("first")
        with pytest.raises(LostLeadership, match=f"no longer at block {at.number}"):
            await once(bench.pipeline(hook), bench.connection, at)
        assert hook.calls == []
        await bench.nothing_happened()


class TestNarrowing:
    async def test_everything_before_the_bad_block_is_committed(self, bench: Bench) -> None:
        hook = Recorder("first", {7: raising(KeyError("city"))})
        pipeline, before = bench.pipeline(hook, Recorder("second")), counted()
        with pytest.raises(HookFailed, match="hook first failed at block 7: KeyError") as failed:
            await bench.apply(pipeline, span(numbered(2, 4, 7, 9), 1, 10))
        assert (failed.value.first, failed.value.last) == (7, 7)
        assert hook.calls == [[2, 4, 7, 9], [2], [4], [7]]
        assert await bench.cursor() == BlockRef(4, block_hash(4))
        assert await bench.seen() == [("first", 2), ("first", 4), ("second", 2), ("second", 4)]
        assert await bench.coverage() == {"first": [(1, 4)], "second": [(1, 4)]}
        changes = moved(before)
        assert (changes["blocks_total"], changes["spans_total"], changes["rows_total inserted seen"]) == (4, 2, 8)

    async def test_a_failure_that_does_not_come_again(self, bench: Bench) -> None:
        hook = Recorder("first", {4: raising(ValueError("flaky"), times=1)})
        parts = await bench.apply(bench.pipeline(hook), span(numbered(2, 4), 1, 10))
        assert [(one.span.first, one.span.last) for one in parts] == [(1, 2), (3, 4), (5, 10)]
        assert await bench.coverage() == {"first": [(1, 10)]}
        assert await bench.cursor() == BlockRef(10, block_hash(10))

    def test_the_parts_are_the_whole(self) -> None:
        logs = tuple(Quarantined(n, b"h", 0, "Played", "0x", b"t", (), b"", "bad") for n in (1, 3, 4, 10))
        whole = span(numbered(2, 3, 7), 1, 10)
        whole = Span(1, 10, whole.blocks, whole.end, whole.end_timestamp, True, logs)
        parts = blockwise(whole)
        assert [(one.first, one.last) for one in parts] == [(1, 2), (3, 3), (4, 7), (8, 10)]
        assert [one.end for one in parts] == [BlockRef(number, block_hash(number)) for number in (2, 3, 7, 10)]
        assert tuple(one for part in parts for one in part.blocks) == whole.blocks
        assert [[log.number for log in part.quarantined] for part in parts] == [[1], [3], [4], [10]]
        assert parts[-1].end_timestamp == whole.end_timestamp


class TestPolicies:
    async def test_skip_leaves_a_hole_and_says_why(self, bench: Bench) -> None:
        """Rows of siblings land, those of hooks that build on the failed one do not."""
        bad = Recorder("bad", {5: raising(ValueError("half a \ud83c and a \0"))})
        follows = Recorder("follows", after=["bad"])
        last = Recorder("last", after=["follows"])
        pipeline = bench.pipeline(Recorder("before"), bad, follows, last, Recorder("sibling"), bad={"on_error": "skip"})
        before = counted()
        await bench.apply(pipeline, span(numbered(3, 5, 8), 1, 9))
        holed = [(1, 4), (6, 9)]
        assert await bench.coverage() == {
            "before": [(1, 9)], "bad": holed, "follows": holed, "last": holed, "sibling": [(1, 9)]
        }  # fmt: skip
        assert await ledger.gaps(bench.connection, bench.chain.id) == {
            "bad": [(5, 5)], "before": [], "follows": [(5, 5)], "last": [(5, 5)], "sibling": []
        }  # fmt: skip
        everywhere = [(name, number) for name in ("before", "sibling") for number in (3, 5, 8)]
        holes = [(name, number) for name in ("bad", "follows", "last") for number in (3, 8)]
        assert await bench.seen() == sorted(everywhere + holes)
        [failure] = await bench.failures()
        found = {key: failure[key] for key in ("hook", "first", "last", "policy", "error", "resolved_at")}
        assert found == {
            "hook": "bad", "first": 5, "last": 5, "policy": "skip", "error": "ValueError: half a ? and a ",
            "resolved_at": None,
        }  # fmt: skip
        assert "in act\n    raise error\nValueError" in failure["traceback"]
        changes = moved(before)
        assert changes["hook_failures_total bad skip"] == 1
        assert changes["skipped_total bad tried"] == 2  # what the skipped block counted is not counted
        assert changes["rows_total inserted seen"] == 2 * len(everywhere + holes)

    async def test_a_skipped_block_alone_in_its_span(self, bench: Bench) -> None:
        bad = Recorder("bad", {5: raising(ValueError("no"))})
        await bench.apply(bench.pipeline(bad, bad={"on_error": "skip"}), span(numbered(5), 1, 9))
        assert await ledger.gaps(bench.connection, bench.chain.id) == {"bad": [(5, 5)]}
        assert bad.calls == [[5]]

    async def test_two_hooks_skip_one_block(self, bench: Bench) -> None:
        hooks = [Recorder(name, {1: raising(ValueError(name))}) for name in ("a", "b")]
        policies: dict[str, Any] = {name: {"on_error": "skip"} for name in ("a", "b")}
        await bench.apply(bench.pipeline(*hooks, Recorder("c"), **policies), span(numbered(1)), span(numbered(2)))
        assert [(row["hook"], row["error"]) for row in await bench.failures()] == [
            ("a", "ValueError: a"), ("b", "ValueError: b")
        ]  # fmt: skip
        assert await bench.seen() == [("a", 2), ("b", 2), ("c", 1), ("c", 2)]

    async def test_a_halt_takes_another_hooks_skip_along(self, bench: Bench) -> None:
        pipeline = bench.pipeline(
            Recorder("skips", {1: raising(ValueError("no"))}), Recorder("halts", {1: raising(ValueError("never"))}),
            skips={"on_error": "skip"},
        )  # fmt: skip
        with pytest.raises(HookFailed, match="hook halts"):
            await bench.apply(pipeline, span(numbered(1)))
        await bench.nothing_happened()

    @pytest.mark.parametrize("on_error", ["halt", "skip"])
    async def test_retries(self, bench: Bench, on_error: str) -> None:
        """Each try begins where the first one did: rows, and what later hooks are told of them, are there once."""
        told: list[list[int]] = []

        class Listener(Recorder):
            async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
                told.append(tx.inserted("seen")["block"])

        hook = Recorder("first", {1: raising(ValueError("flaky"), times=2)})
        before = counted()
        pipeline = bench.pipeline(hook, Listener("second"), first={"retries": 2, "on_error": on_error})
        [applied] = await bench.apply(pipeline, span(numbered(1)))
        assert hook.calls == [[1], [1], [1]]
        assert told == [[1, 1]]
        assert applied.written == {("seen", "inserted"): 2}
        assert moved(before)["skipped_total first tried"] == 1
        assert await bench.failures() == []

    async def test_retries_that_are_not_enough(self, bench: Bench) -> None:
        hook = Recorder("first", {1: raising(ValueError("flaky"), times=3)})
        with pytest.raises(HookFailed):
            await bench.apply(bench.pipeline(hook, first={"retries": 2}), span(numbered(1)))
        assert len(hook.calls) == 3
        await bench.nothing_happened()

    async def test_a_halt_that_is_passed_is_resolved(self, bench: Bench) -> None:
        cause = ValueError("no")
        failed = HookFailed("first", 2, 2, cause)
        for _ in range(2):  # the same halt again replaces its row
            await ledger.record_failure(bench.connection, bench.chain.id, failed, "halt")
        pipeline = bench.pipeline(Recorder("first"))
        pipeline.halted_at = 2
        await bench.apply(pipeline, span(numbered(1)))
        assert pipeline.halted_at == 2
        assert [row["resolved_at"] for row in await bench.failures()] == [None]
        await bench.apply(pipeline, span(numbered(2, 3)))
        assert pipeline.halted_at is None
        assert [row["resolved_at"] is None for row in await bench.failures()] == [False]


async def _deadlock(url: str, tx: Tx) -> None:
    """We hold row 1 and want row 2, another session the other way round; ours is the one that looks and loses."""
    other = await asyncpg.connect(url, server_settings={"deadlock_timeout": "1h"})
    try:
        await other.execute("begin; update locks set id = id where id = 2")
        await tx.execute("set local deadlock_timeout = '50ms'")
        await tx.execute("update locks set id = id where id = 1")
        waiting = asyncio.ensure_future(other.execute("update locks set id = id where id = 1"))
        # it has to wait before we do: whoever looks, looks once
        blocked = "select exists (select from pg_locks where pid = $1 and not granted)"
        while not await tx.fetchval(blocked, other.get_server_pid()):
            await asyncio.sleep(0.002)
        await tx.execute("update locks set id = id where id = 2")
    finally:
        other.terminate()
        await asyncio.gather(waiting, return_exceptions=True)


async def _lock_timeout(url: str, tx: Tx) -> None:
    other = await asyncpg.connect(url)
    try:
        await other.execute("begin; lock table locks")
        await tx.execute("set local lock_timeout = '20ms'")
        await tx.fetch("select * from locks")
    finally:
        await other.close()


async def _statement_timeout(url: str, tx: Tx) -> None:
    await tx.execute("set local statement_timeout = '20ms'")
    await tx.fetchval("select pg_sleep(60)")


async def _client_timeout(url: str, tx: Tx) -> None:
    tx._connection._config = tx._connection._config._replace(command_timeout=0.05)
    await tx.fetchrow("select pg_sleep(60)")


async def _killed(url: str, tx: Tx) -> None:
    pid = await tx.fetchval("select pg_backend_pid()")
    other = await asyncpg.connect(url)
    await other.fetchval("select pg_terminate_backend($1, 5000)", pid)
    await other.close()
    await tx.insert_new("seen", ("hook", "block", "event"), [("killed", 1, 1)], key=("hook", "block", "event"))


class TestTheDatabasesTroubles:
    """They are never a hook's failure, whatever the hook makes of them and whatever its policy says."""

    @pytest.mark.parametrize("trouble", [_deadlock, _lock_timeout, _statement_timeout, _client_timeout, _killed])
    async def test_they_are_nobodys_failure(self, bench: Bench, trouble: Callable[[str, Tx], Awaitable[None]]) -> None:
        for manner in MANNERS:
            for policy in POLICIES:
                hook = Recorder("first", {1: in_manner(lambda tx: trouble(bench.url, tx), manner)})
                writer, before = await asyncpg.connect(bench.url), counted()
                pipeline = bench.pipeline(hook, Recorder("second"), first=policy)
                with pytest.raises(DatabaseUnavailable):
                    await bench.apply(pipeline, span(numbered(1, 2)), connection=writer)
                assert hook.calls == [[1, 2]], (manner, policy)  # not again, and not block by block
                await bench.nothing_happened()
                assert moved(before) == {}
                writer.terminate()

    @pytest.mark.parametrize(
        "error", [TimeoutError("a service"), FileNotFoundError("a file"), ConnectionResetError("a service")]
    )
    async def test_a_hooks_own_troubles_are_its_failure(self, bench: Bench, error: Exception) -> None:
        with pytest.raises(HookFailed, match="hook first failed at block 1"):
            await bench.apply(bench.pipeline(Recorder("first", {1: raising(error)})), span(numbered(1)))

    @pytest.mark.parametrize("policy", POLICIES)
    async def test_an_error_of_sql_that_a_hook_passes_over_is_its_failure(
        self, bench: Bench, policy: dict[str, Any]
    ) -> None:
        """Not the next hook's, which would be told that the transaction is aborted."""
        hook = Recorder("first", {1: in_manner(sql("select 1 / 0"), "passes over it")})
        pipeline = bench.pipeline(hook, Recorder("second"), first=policy)
        if policy.get("on_error") == "skip":
            await bench.apply(pipeline, span(numbered(1)))
            assert [row["hook"] for row in await bench.failures()] == ["first"]
            assert await bench.seen() == [("second", 1)]
        else:
            with pytest.raises(HookFailed, match="hook first failed at block 1: DivisionByZeroError"):
                await bench.apply(pipeline, span(numbered(1)))
            await bench.nothing_happened()

    async def test_an_argument_that_is_refused_before_it_is_sent_breaks_nothing(self, bench: Bench) -> None:
        async def careless(tx: Tx) -> None:
            with pytest.raises(asyncpg.DataError):
                await tx.execute("insert into locks values ($1)", "three")

        await bench.apply(bench.pipeline(Recorder("first", {1: careless})), span(numbered(1)))
        assert await bench.seen() == [("first", 1)]

    @pytest.mark.parametrize("statement", ["select 'three'::int", "insert into locks values (1)"])
    async def test_one_that_the_server_refuses_does(self, bench: Bench, statement: str) -> None:
        hook = Recorder("first", {1: in_manner(sql(statement), "passes over it")})
        with pytest.raises(HookFailed, match="hook first failed at block 1"):
            await bench.apply(bench.pipeline(hook, Recorder("second")), span(numbered(1)))

    async def test_a_hook_may_come_back_to_its_own_savepoint(self, bench: Bench) -> None:
        async def careful(tx: Tx) -> None:
            await tx.execute("savepoint mine")
            await in_manner(sql("select 1 / 0"), "passes over it")(tx)
            await tx.execute("rollback to mine")

        await bench.apply(bench.pipeline(Recorder("first", {1: careful})), span(numbered(1)))
        assert await bench.seen() == [("first", 1)]


class TestHeard:
    async def test_a_hook_gets_the_events_that_it_listens_to(self, bench: Bench) -> None:
        got: dict[str, list[tuple[int, list[str]]]] = {}

        class Listener(Recorder):
            async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
                got[self.name] = [(one.number, [item.name for item in one.events]) for one in blocks]

        hooks = [
            Listener("played", listens=["Played"]), Listener("both", listens=["Other", "Played"]), Listener("all"),
            Listener("none", listens=["Never"]),
        ]  # fmt: skip
        blocks = [*numbered(1), block(2, [event(0, {}, name="Other")]), block(3)]
        await bench.apply(bench.pipeline(*hooks), span(blocks))
        assert got == {
            "played": [(1, ["Played"])],
            "both": [(1, ["Played", "Other"]), (2, ["Other"])],
            "all": [(1, ["Played", "Other"]), (2, ["Other"]), (3, [])],
        }
        assert (await bench.coverage())["none"] == [(1, 3)]  # it has missed nothing

    def test_where_every_event_is_wanted_nothing_is_copied(self) -> None:
        blocks = tuple(numbered(1, 2))
        assert heard(blocks, {"Played", "Other"}) is blocks
        assert [one.number for one in heard((*blocks, block(3)), {"Played", "Other"})] == [1, 2]
        [first, second] = heard(blocks, {"Other"})
        assert (first.ref, first.timestamp) == (blocks[0].ref, blocks[0].timestamp)
        assert [item.index for item in second.events] == [1]


class TestWhatIsNoted:
    async def test_quarantined_logs(self, bench: Bench) -> None:
        def log(number: int) -> Quarantined:
            return Quarantined(number, b"h", 7, "Played", "0xab", b"t", (b"1", b"2"), b"\0\xff", "truncated: 3 bytes")

        one = span(numbered(2, 5), 1, 6)
        one = Span(1, 6, one.blocks, one.end, one.end_timestamp, True, (log(1), log(4), log(6)))
        before, hook = counted(), Recorder("first", {5: raising(ValueError("no"))})
        with pytest.raises(HookFailed):
            await bench.apply(bench.pipeline(hook), one)
        stored = "select number, block_hash, log_index, event, address, tx_hash, topics, data, error"
        rows = await bench.connection.fetch(f"{stored} from indexer.quarantine order by number")
        assert rows == [(1, b"h", 7, "Played", "0xab", b"t", [b"1", b"2"], b"\0\xff", "truncated: 3 bytes")]
        assert moved(before)["quarantined_total source truncated"] == 1
        rest = Span(3, 6, one.blocks[1:], one.end, one.end_timestamp, True, one.quarantined[1:])
        await bench.apply(bench.pipeline(Recorder("first")), rest)
        rows = await bench.connection.fetch("select number from indexer.quarantine order by number")
        assert [row["number"] for row in rows] == [1, 4, 6]

    async def test_the_window_of_blocks_that_may_be_reorganised(self, bench: Bench) -> None:
        async def window() -> list[int]:
            rows = await bench.connection.fetch("select number from indexer.block order by number")
            return [row["number"] for row in rows]

        pipeline = bench.pipeline(Recorder("first"))
        await bench.apply(pipeline, span(numbered(1), final=True), final=2)
        assert await window() == []  # below finality nothing is kept
        await bench.apply(pipeline, span(numbered(2), final=True), final=2)
        assert await window() == [2]  # a fork may begin at the final block
        for number, final, kept in [(3, 2, [2, 3]), (4, 2, [2, 3, 4]), (5, 3, [3, 4, 5]), (6, 5, [5, 6])]:
            await bench.apply(pipeline, span(numbered(number), final=False), final=final)
            assert await window() == kept
        [row] = await bench.connection.fetch("select hash, parent_hash, block_time from indexer.block where number = 6")
        at = datetime.fromtimestamp(block(6).timestamp, UTC)
        assert row == (block_hash(6), block_hash(5), at)

    async def test_coverage_is_what_was_committed(self, bench: Bench) -> None:
        """A hook that comes late starts with a hole, one that is gone keeps what it had."""
        old, late = Recorder("old"), Recorder("late", {12: raising(ValueError("no"))})
        await bench.apply(bench.pipeline(old), span(numbered(2), 1, 4), span([], 5, 6))
        both = bench.pipeline(old, late)
        await bench.apply(both, span(numbered(7, 9), 7, 10))
        with pytest.raises(HookFailed):
            await bench.apply(both, span(numbered(11, 12, 13)))
        assert await bench.coverage() == {"old": [(1, 11)], "late": [(7, 11)]}
        assert await ledger.gaps(bench.connection, bench.chain.id) == {"late": [(1, 6)], "old": []}
        await bench.apply(bench.pipeline(late), span(numbered(13), 12, 14))
        assert await bench.coverage() == {"old": [(1, 11)], "late": [(7, 14)]}

    async def test_chains_do_not_meet(self, bench: Bench) -> None:
        other = await ledger.open_chain(bench.connection, "other", "test", "2", 100)
        await ledger.register_hooks(bench.connection, other.id, ["first"])
        await bench.apply(bench.pipeline(Recorder("first")), span(numbered(1), final=False), final=0)
        pipeline = Pipeline(other, [Registered(Recorder("first"), HookSettings())], "test")
        at = BlockRef(99, b"")
        async for applied in pipeline.apply(
            bench.connection, at, span(numbered(100), final=False), Pace(heads(200, 99))
        ):
            at = applied.span.end
        assert await bench.cursor() == BlockRef(1, block_hash(1))
        assert at == (await ledger.cursor(bench.connection, other.id)).ref
        assert await bench.coverage() == {"first": [(1, 1)]}
        rows = await bench.connection.fetch("select chain, number from indexer.block order by number")
        assert rows == [(bench.chain.id, 1), (other.id, 100)]
