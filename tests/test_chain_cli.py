"""`indexer chain`: the height of a chain restarts under a new chain id, and an operator accepts that."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import Commands, Daemon, Ended, settings, toml, until
from test_record_cli import ended_at, refused
from test_recorded import answer

from indexer.config import ChainSettings

Run = Callable[..., Awaitable[Ended]]
CHAINS = {"chain-a": 12, "chain-b": 8}


def values(database_url: str, **chain: Any) -> dict[str, Any]:
    found = settings(database_url, "", contracts=[])
    return {**found, "chain": {"source": "recorded", "file": "chain-a", "poll_seconds": 0.1, **chain}}


@pytest.fixture
def run(commands: Commands, tmp_path: Path, database_url: str) -> Run:
    """A command; `chain` is laid over its settings. Both chains have plays of the tracks 7 and 100 + height."""
    for name, blocks in CHAINS.items():
        lines = [answer(n, "7", str(100 + n), chain=name) for n in range(1, blocks + 1)]
        (tmp_path / name).write_bytes(b"".join(lines))

    async def with_settings(*arguments: str, **chain: Any) -> Ended:
        (tmp_path / "indexer.toml").write_text(toml(values(database_url, **chain)))
        return await commands(*arguments, folder=tmp_path)

    return with_settings


async def chains(connection: asyncpg.Connection) -> list[tuple[Any, ...]]:
    rows = await connection.fetch(
        """
        select name, identity, start_block, number from indexer.chain
        join indexer.cursor on cursor.chain = chain.id order by chain.id
        """
    )
    return [tuple(row) for row in rows]


async def test_a_chain_restarts_under_a_new_id(run: Run, connection: asyncpg.Connection) -> None:
    ended_at(await run("run", "--from-file", "chain-a"), 12)
    before = await connection.fetch("select * from plays order by id")
    coverage = await connection.fetch("select * from indexer.coverage order by hook")
    assert await connection.fetch("select threshold, slot from milestones where id = 7") == [(10, 10)]

    refused(await run("run", "--from-file", "chain-b"), 2, "main in this database is chain-a", "chain accept chain-b`")
    accepted = await run("chain", "accept", "chain-b")
    assert (accepted.code, accepted.errors) == (0, [])
    assert accepted.out.splitlines() == [
        "chain main is chain-b from now on, and goes on with block 1",
        "what was indexed of chain-a stays, as chain main@chain-a",
    ]
    assert await chains(connection) == [("main@chain-a", "chain-a", 1, 12), ("main", "chain-b", 1, 0)]
    assert await connection.fetch("select * from plays order by id") == before
    assert await connection.fetch("select * from indexer.coverage order by hook") == coverage

    ended_at(await run("run", "--from-file", "chain-b"), 8)
    assert await connection.fetch("select * from plays where chain = 1 order by id") == before
    assert await connection.fetchval("select count(*) from plays where chain <> 1") == 16
    counts = await connection.fetch("select * from aggregate_plays order by play_item_id")
    assert [tuple(row) for row in counts] == [(7, 20), *((100 + n, 2 if n < 9 else 1) for n in range(1, 13))]
    refused(await run("run", "--from-file", "chain-a"), 2, "chain-a", "chain-b")
    for hook in ("aggregates", "milestones"):
        assert (await run("verify", hook)).code == 0
        assert "0 inserted, 0 changed, 0 deleted" in (await run("rebuild", hook)).out


async def test_milestones_go_on(run: Run, tmp_path: Path, connection: asyncpg.Connection) -> None:
    ended_at(await run("run", "--from-file", "chain-a"), 12)
    assert (await run("chain", "accept", "chain-b")).code == 0
    lines = [answer(n, *["7"] * 5, chain="chain-b") for n in range(1, 4)]
    (tmp_path / "chain-b").write_bytes(b"".join(lines))
    ended_at(await run("run", "--from-file", "chain-b"), 3)
    found = await connection.fetch("select threshold, slot from milestones where id = 7 order by 1")
    assert found == [(10, 10), (25, 3)]


async def test_it_goes_there_and_back(run: Run, connection: asyncpg.Connection) -> None:
    """A chain that was there before goes on where it stopped: nothing of it is counted twice."""
    ended_at(await run("run", "--from-file", "chain-a"), 12)
    assert (await run("chain", "accept", "chain-b")).code == 0
    refused(await run("chain", "accept", "chain-a", "--start-block", "1"), 2, "from block 1 on", "leave out")
    done = json.loads((await run("chain", "accept", "chain-a", "--json", start_block=5)).out)
    assert (done["next_block"], done["new"]["id"], done["old"]["name"]) == (13, 1, "main@chain-b")
    assert await chains(connection) == [("main", "chain-a", 1, 12), ("main@chain-b", "chain-b", 1, 0)]
    ended_at(await run("run", "--from-file", "chain-a"), 12)


async def test_start_blocks(run: Run, connection: asyncpg.Connection) -> None:
    ended_at(await run("run", "--from-file", "chain-a"), 12)
    assert (await run("chain", "accept", "b", "--start-block", "3", start_block=5)).code == 0
    assert (await run("chain", "accept", "c", start_block=5)).code == 0
    assert (await run("chain", "accept", "d", source="core")).code == 0
    await connection.execute("update indexer.chain set start_block = 4 where identity = 'd'")
    assert (await run("chain", "accept", "e")).code == 0
    assert [row[1:3] for row in await chains(connection)] == [
        ("chain-a", 1), ("b", 3), ("c", 5), ("d", 4), ("e", 4),
    ]  # fmt: skip
    assert [row[3] for row in await chains(connection)] == [12, 2, 4, 0, 3]


async def test_what_is_not_accepted(
    run: Run, tmp_path: Path, database_url: str, connection: asyncpg.Connection
) -> None:
    refused(await run("chain", "accept", "chain-b"), 2, "knows no chain main")
    ended_at(await run("run", "--from-file", "chain-a"), 12)
    refused(await run("chain", "accept", "chain-a"), 2, "chain main is chain-a already")
    refused(await run("chain", "accept", "chain-b", name="other"), 2, "knows no chain other")
    async with Daemon(tmp_path, values(database_url)) as daemon:
        await daemon.logged("leader acquired")
        refused(await run("chain", "accept", "chain-b"), 75, "a daemon leads chain main: stop it")
        assert await daemon.stop() == 0
    assert await chains(connection) == [("main", "chain-a", 1, 12)]

    async def free() -> bool:
        return (await run("chain", "accept", "chain-b")).code == 0

    await until(free, "the lead ends with the daemon's session")


async def test_a_configured_chain_id_is_to_be_changed(run: Run) -> None:
    ended_at(await run("run", "--from-file", "chain-a", chain_id="chain-a"), 12)
    accepted = await run("chain", "accept", "chain-b", chain_id="chain-a")
    assert accepted.out.splitlines()[2] == 'chain.chain_id is chain-a: set it to "chain-b" before the start'
    refused(await run("run", "--from-file", "chain-b", chain_id="chain-a"), 2, "chain.chain_id is chain-a")
    ended_at(await run("run", "--from-file", "chain-b", chain_id="chain-b"), 8)


async def test_list(run: Run, empty_database_url: str, tmp_path: Path, commands: Commands) -> None:
    (tmp_path / "empty.toml").write_text(toml(values(empty_database_url)))
    refused(await commands("chain", "list", "-c", "empty.toml", folder=tmp_path), 2, "knows no chain", "indexer run")
    assert (await run("chain", "list")).out == "no chain yet: start one with `indexer run`\n"
    assert (await run("chain", "list", "--json")).out == "[]\n"
    ended_at(await run("run", "--from-file", "chain-a"), 12)
    assert (await run("chain", "accept", "chain-b")).code == 0
    shown = [line.split() for line in (await run("chain", "list")).out.splitlines()]
    assert shown == [
        ["name", "chain", "id", "source", "start", "block", "cursor"],
        ["main@chain-a", "chain-a", "recorded", "1", "12"],
        ["main", "chain-b", "recorded", "1", "0"],
    ]
    first, second = json.loads((await run("chain", "list", "--json")).out)
    assert (first["identity"], first["cursor"], second["name"]) == ("chain-a", 12, "main")


def test_no_chain_can_be_configured_by_the_name_of_an_old_one() -> None:
    with pytest.raises(ValueError, match="name"):
        ChainSettings(name="main@chain-a")
