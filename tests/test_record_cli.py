"""`indexer record` and `indexer run --from-file` as commands: the same rows by way of a file, and exit codes."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from daemon import (
    INDEXER,
    Commands,
    Daemon,
    Ended,
    cursor,
    dawdle,
    environment,
    expected,
    gaps,
    history,
    settings,
    tables,
    toml,
)
from test_recorded import answer

from indexer.fakechain import FakeNode

Run = Callable[..., Awaitable[Ended]]


@pytest.fixture
def run(commands: Commands, tmp_path: Path, database_url: str) -> Run:
    """A command with a node's settings, or those of no node; `sections` are laid over them."""

    async def with_settings(node: FakeNode | None, *arguments: str, **sections: Any) -> Ended:
        values = settings(database_url, node.url if node else "", **sections)
        if node is None:
            values["chain"] = {"poll_seconds": 0.1, **sections.get("chain", {})}
            del values["contracts"]
        (tmp_path / "indexer.toml").write_text(toml(values))
        return await commands(*arguments, folder=tmp_path)

    return with_settings


def refused(ended: Ended, code: int, *words: str) -> None:
    said = ended.out + ended.err
    assert ended.code == code, said
    assert len(ended.errors) == 1 and ended.errors[0].startswith("indexer: "), said
    assert "Traceback" not in said
    for word in words:
        assert word in ended.errors[0], said


def ended_at(ended: Ended, block: int) -> None:
    """It ended by itself at the end of the file, and said so."""
    assert ended.code == 0, ended.err
    assert ended.errors == []
    (said,) = [line for line in ended.logs if line["event"] == "end of file"]
    assert said["block"] == block
    assert said["level"] == "info"


@pytest.mark.parametrize("name", ["blocks.jsonl", "blocks.jsonl.gz"])
async def test_recorded_and_indexed_from_the_file(
    name: str, run: Run, tmp_path: Path, connection: asyncpg.Connection
) -> None:
    chain, plays = history(120, final_lag=20)
    async with FakeNode(chain) as node:
        done = await run(node, "record", "0", "100", name, span={"max_blocks": 17})
    wanted = [one for one in plays if one.slot <= 100]
    assert (done.code, done.errors) == (0, [])
    assert done.out.startswith(f"recorded 101 blocks with {len(wanted)} events in ")
    assert done.out.endswith(f": {name}, {(tmp_path / name).stat().st_size:,} bytes\n")
    assert sorted(path.name for path in tmp_path.glob("*block*")) + list(tmp_path.glob(".*")) == [name]

    ended_at(await run(None, "run", "--from-file", name, span={"max_events": 50, "max_blocks": 30}), 100)
    found = await tables(connection)
    for table, rows in expected(wanted).items():
        assert found[table] == rows, table
    assert (await cursor(connection), await gaps(connection)) == (100, 0)
    row = await connection.fetchrow("select name, source, identity, start_block from indexer.chain")
    assert tuple(row) == ("main", "recorded", "31337", 0)

    again = await run(None, "run", "--from-file", name)
    ended_at(again, 100)
    assert not [line for line in again.logs if line["event"] == "span committed"]
    assert await tables(connection) == found


async def test_a_second_file_goes_on_where_the_first_ended(
    run: Run, tmp_path: Path, connection: asyncpg.Connection
) -> None:
    chain, plays = history(60, final_lag=0)
    other, _ = history(60, seed=2, final_lag=0)
    async with FakeNode(chain) as node, FakeNode(other) as rival:
        for first, last in ((0, 20), (21, 45), (46, 60)):
            assert (await run(node, "record", str(first), str(last), f"{first}.jsonl")).code == 0
        assert (await run(rival, "record", "21", "45", "rival.jsonl")).code == 0
        assert (await run(rival, "record", "0", "20", "same.jsonl")).code == 0
    ended_at(await run(None, "run", "--from-file", "0.jsonl"), 20)
    refused(await run(None, "run", "--from-file", "46.jsonl"), 2, "46.jsonl does not have the hash of block 20")
    refused(await run(None, "run", "--from-file", "rival.jsonl"), 3, "reorganised below its final block")
    refused(await run(None, "run", "--from-file", "same.jsonl"), 3, "reorganised below its final block")
    assert await cursor(connection) == 20
    ended_at(await run(None, "run", "--from-file", "21.jsonl"), 45)
    ended_at(await run(None, "run", "--from-file", "46.jsonl"), 60)
    ended_at(await run(None, "run", "--from-file", "0.jsonl"), 60)  # it has nothing that is not applied
    found = await tables(connection)
    for table, rows in expected(plays).items():
        assert found[table] == rows, table


async def test_a_replay_from_a_file(run: Run, tmp_path: Path, connection: asyncpg.Connection) -> None:
    chain, plays = history(40, final_lag=0)
    async with FakeNode(chain) as node:
        await run(node, "record", "0", "40", "f.jsonl")
    ended_at(await run(None, "run", "--from-file", "f.jsonl"), 40)
    await connection.execute("delete from plays where slot between 11 and 23")
    recorded = {"source": "recorded", "file": "f.jsonl"}
    done = await run(None, "replay", "11", "23", "--force", "--hook", "plays", "--json", chain=recorded)
    assert (done.code, json.loads(done.out)["blocks"]) == (0, 13)
    found = await connection.fetch("select slot, tx_hash, event_index from plays order by 1, 3")
    played = [(one.slot, one.tx_hash, one.index) for one in plays if one.play[0].isdigit()]
    assert [tuple(row) for row in found] == played


async def test_answers_of_a_core_node(run: Run, tmp_path: Path, connection: asyncpg.Connection) -> None:
    lines = [answer(n, *(str(100 + n), "7")) if n % 2 else answer(n) for n in range(1, 51)]
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines))
    ended_at(await run(None, "run", "--from-file", "answers.jsonl", span={"max_events": 9}), 50)
    assert await connection.fetchval("select count from aggregate_plays where play_item_id = 7") == 25
    assert await connection.fetchval("select identity from indexer.chain") == "core-test"
    again = {"source": "recorded", "file": "answers.jsonl"}
    assert (await run(None, "record", "10", "40", "some.jsonl.gz", chain=again)).code == 0
    with gzip.open(tmp_path / "some.jsonl.gz") as file:
        header, *blocks = [json.loads(line) for line in file]
    assert (header["chain_id"], header["source"], header["first"], header["last"]) == ("core-test", "core", 10, 40)
    assert header["parent_hash"] == f"0x{1009:064x}"
    assert [block["number"] for block in blocks] == [*range(11, 40, 2), 40]


async def test_a_hole_halts(run: Run, tmp_path: Path, connection: asyncpg.Connection) -> None:
    (tmp_path / "f").write_bytes(b"".join(answer(n, "7") for n in range(1, 40) if n != 30))
    refused(await run(None, "run", "--from-file", "f", span={"max_events": 5}), 3, "f lacks block 30")
    assert await cursor(connection) == 25


# -- what is refused -------------------------------------------------------------------------------------------------


async def test_wrong_uses_of_record(run: Run, tmp_path: Path) -> None:
    chain, _ = history(30, final_lag=10)
    (tmp_path / "there").write_text("mine")
    async with FakeNode(chain) as node:
        refused(await run(node, "record", "9", "3", "f"), 2, "the blocks 9 to 3 run backwards")
        refused(await run(node, "record", "0", "21", "f"), 2, "block 21 is not final: only blocks up to 20")
        refused(await run(node, "record", "0", "20", "there"), 2, "there is there already", "--force")
        refused(await run(node, "record", "0", "20", "no/such/f"), 2, "can't be written: No such file or directory")
        assert (tmp_path / "there").read_text() == "mine"
        assert (await run(node, "record", "0", "20", "there", "--force")).code == 0
        assert json.loads((tmp_path / "there").read_text().splitlines()[0])["last"] == 20
        done = await run(node, "record", "0", "20", "f", "--json")
        assert json.loads(done.out)["blocks"] == 21
    refused(await run(node, "record", "0", "20", "g", chain={"connect_timeout_seconds": 0.3}), 75)
    assert not (tmp_path / "g").exists() and not list(tmp_path.glob(".*"))


async def test_a_recording_that_fails_leaves_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"".join(answer(n, "7") for n in range(1, 40) if n != 30))
    holed = {"source": "recorded", "file": "f"}
    refused(await run(None, "record", "1", "39", "g", chain=holed), 3, "f lacks block 30")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "indexer.toml"]


async def test_files_that_can_not_be_run(run: Run, tmp_path: Path) -> None:
    refused(await run(None, "run", "--from-file", "nowhere"), 2, "chain.file: nowhere can't be read")
    (tmp_path / "f").write_bytes(answer(1, "7")[:-9])
    refused(await run(None, "run", "--from-file", "f"), 2, "f: line 1 is cut off")
    (tmp_path / "f").write_bytes(answer(1, "7"))
    refused(await run(None, "run", "--from-file", "f", chain={"chain_id": "9"}), 2, "chain.chain_id is 9", "core-test")
    refused(await run(None, "run", "--from-file", "f", chain={"start_block": 5}), 2, "start block 5 is above")
    refused(await run(None, "run", "--from-file", "f", chain={"start_block": 0}), 2, "no block before 1")
    refused(await run(None, "run", chain={"source": "recorded"}), 2, "chain.file is empty")


# -- processes -------------------------------------------------------------------------------------------------------


async def test_a_daemon_on_a_file_stays(run: Run, tmp_path: Path, database_url: str) -> None:
    """As `chain.source` says it; with its port, at the end of the file too."""
    (tmp_path / "f").write_bytes(b"".join(answer(n, "7") for n in range(1, 40)))
    chain = {"source": "recorded", "file": "f", "endpoints": [], "start_block": 1}
    values = settings(database_url, "", chain=chain, contracts=[])
    async with Daemon(tmp_path, values) as daemon:
        await daemon.logged("span committed", last=39)
        assert (await daemon.get("readyz"))[0] == 200
        assert await daemon.stop() == 0


async def test_its_port_answers_while_a_file_is_indexed(
    run: Run, tmp_path: Path, database_url: str, connection: asyncpg.Connection
) -> None:
    (tmp_path / "f").write_bytes(b"".join(answer(n, "7") for n in range(1, 40)))
    await dawdle(connection, 0.2)
    await run(None, "config", span={"max_events": 1})  # writes the settings
    process = await asyncio.create_subprocess_exec(
        INDEXER, "run", "--from-file", "f", cwd=tmp_path, env=environment(), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        lines = [json.loads(await process.stderr.readline()) for _ in range(3)]
        started = next(line for line in lines if line["event"] == "started")

        async with aiohttp.ClientSession() as session, session.get(started["status"] + "status.json") as response:
            assert response.status == 200
        await process.stderr.read()
        assert await process.wait() == 0
        assert await cursor(connection) == 39
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
