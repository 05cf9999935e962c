"""`indexer jobs`, as operators type it."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import Commands, Ended, toml

from indexer import ledger, queue
from indexer.queue import NewJob
from indexer.sidecar import gates, operations


@pytest.fixture
async def jobs(commands: Commands, tmp_path: Path, database_url: str) -> Any:
    (tmp_path / "indexer.toml").write_text(toml({"database": {"url": database_url}}))

    async def run(*arguments: str) -> Ended:
        return await commands("jobs", *arguments, folder=tmp_path)

    return run


async def some(connection: asyncpg.Connection) -> None:
    """Jobs 1 to 3: one waits, one runs, one is held; and one that waits for its block."""
    await queue.enqueue_many(connection, "a.b", [NewJob({"name": "x"}, key="first"), NewJob({}), NewJob({})])
    await connection.execute("update indexer.pgqueuer set status = 'picked' where id = 2")
    await operations.hold(connection, [3], "look at this")
    chain = await ledger.open_chain(connection, "main", "evm", "1", 0)
    await queue.keep_waiting(connection, chain.id, 17, "c", [NewJob({}, key="later")])


async def status(connection: asyncpg.Connection) -> dict[int, str]:
    rows = await connection.fetch("select id, status::text from indexer.pgqueuer")
    return dict(map(tuple, rows))


class TestLooking:
    async def test_list(self, jobs: Any, connection: asyncpg.Connection) -> None:
        ended = await jobs("list")
        assert (ended.code, ended.out) == (0, "no jobs\n")
        await some(connection)
        ended = await jobs("list")
        lines = ended.out.splitlines()
        assert ended.code == 1  # one is held
        assert [line.split("  ")[:3] for line in lines] == [
            ["3", "held", "a.b"], ["2", "running", "a.b"], ["1", "waiting", "a.b"], ["-", "unfinal", "c"],
        ]  # fmt: skip
        assert "key first" in lines[2] and "block 17" in lines[3]

    async def test_list_filtered_as_json(self, jobs: Any, connection: asyncpg.Connection) -> None:
        await some(connection)
        for arguments, numbers, code in (
            (["--state", "waiting"], [1], 0), (["--state", "held"], [3], 1), (["--state", "unfinal"], [None], 0),
            (["--kind", "c"], [None], 0), (["--kind", "a.b", "--limit", "2"], [3, 2], 1), (["--kind", "x"], [], 0),
        ):  # fmt: skip
            ended = await jobs("list", "--json", *arguments)
            assert ([one["id"] for one in json.loads(ended.out)], ended.code) == (numbers, code), arguments

    async def test_show(self, jobs: Any, connection: asyncpg.Connection) -> None:
        await some(connection)
        ended = await jobs("show", "3")
        assert ended.code == 0 and "job 3 (held): a.b" in ended.out and "look at this" in ended.out
        shown = json.loads((await jobs("show", "1", "--json")).out)
        assert (shown["key"], shown["payload"], shown["state"]) == ("first", {"name": "x"}, "waiting")
        await operations.cancel(connection, [1])
        assert "job 1 (ended)" in (await jobs("show", "1")).out

    async def test_gates(self, jobs: Any, connection: asyncpg.Connection) -> None:
        assert (await jobs("gates")).code == 0
        await gates.close(connection, "a.b", timedelta(hours=1), "429 from songstats")
        ended = await jobs("gates")
        assert ended.code == 1 and ended.out.startswith("a.b  closed for 3") and "429 from songstats" in ended.out
        assert json.loads((await jobs("gates", "--json")).out)[0]["kind"] == "a.b"
        assert (await jobs("open", "a.b")).code == 0
        assert (await jobs("open", "a.b")).code == 1
        assert (await jobs("gates")).code == 0


class TestActing:
    async def test_requeue(self, jobs: Any, connection: asyncpg.Connection) -> None:
        await some(connection)
        ended = await jobs("requeue", "3", "1")
        assert (ended.code, ended.out) == (1, "requeued 1 of 2\n")  # 1 is not held
        assert await status(connection) == {1: "queued", 2: "picked", 3: "queued"}

    async def test_requeue_all_of_a_kind(self, jobs: Any, connection: asyncpg.Connection) -> None:
        await some(connection)
        assert (await jobs("requeue", "--all", "--kind", "other")).out == "requeued 0 of 0\n"
        ended = await jobs("requeue", "--all", "--json")
        assert (ended.code, json.loads(ended.out)) == (0, {"requeued": 1, "of": 1})

    async def test_cancel(self, jobs: Any, connection: asyncpg.Connection) -> None:
        await some(connection)
        assert (await jobs("cancel", "1", "2", "3")).code == 0
        assert await status(connection) == {}

    async def test_hold(self, jobs: Any, connection: asyncpg.Connection) -> None:
        await some(connection)
        assert (await jobs("hold", "1", "2", "--reason", "provider is down")).code == 0
        assert set((await status(connection)).values()) == {"failed"}
        assert "provider is down" in (await jobs("show", "2")).out


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["juggle"], "is no action"), (["list", "7"], "takes no further words"), (["show"], "which job?"),
            (["show", "x"], "named by number"), (["show", "999"], "there is no job 999"),
            (["requeue"], "which jobs?"), (["requeue", "1", "--all"], "which jobs?"),
            (["cancel", "--all"], "which jobs?"),
            (["list", "--state", "odd"], "is no state"), (["open"], "which gate?"),
        ],
    )  # fmt: skip
    async def test_usage(self, jobs: Any, arguments: list[str], text: str) -> None:
        ended = await jobs(*arguments)
        assert ended.code == 2 and len(ended.errors) == 1 and text in ended.errors[0]

    async def test_a_database_without_our_tables(
        self, commands: Commands, tmp_path: Path, empty_database_url: str
    ) -> None:
        (tmp_path / "indexer.toml").write_text(toml({"database": {"url": empty_database_url}}))
        ended = await commands("jobs", "list", folder=tmp_path)
        assert ended.code == 2 and "indexer migrate" in ended.errors[0]
