"""`indexer explain`: one block from bytes to rows, and nothing is changed by looking."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from corekit import chain_of as core_chain
from corekit import plays as core_plays
from corekit import source_of
from daemon import HOOKS, Commands, Ended, played, settings, toml
from replaykit import SESSION, World, chain_of, everything, mine, own_plays, some_plays, world

from hooks.aggregates import Aggregates
from hooks.plays import Plays
from indexer import explain, explain_report, journal, ledger
from indexer.app import Parts
from indexer.config import ChainSettings, HookSettings
from indexer.fakechain import FakeCoreNode, http_error
from indexer.follow import Follower, Outcome
from indexer.pipeline import Pipeline
from indexer.registry import Registered
from indexer.replay import Replayer
from indexer.state import State

BAD = [6, 14]


async def explained(w: World, number: int, *only: str, limit: int = 20, patience: float = 5.0) -> dict[str, Any]:
    """The facts of a block, gathered on a connection of their own; printing them must work as well."""
    parts = Parts(w.registered, w.source, None, w.row)  # type: ignore[arg-type]
    chain = ChainSettings(connect_timeout_seconds=patience, request_timeout_seconds=patience)
    connection = await asyncpg.connect(w.url, server_settings=SESSION)
    try:
        facts = await explain.gather(parts, connection, chain, number, only, limit)
    finally:
        await connection.close()
    explain_report.render(facts)
    assert json.loads(explain_report.as_json(facts))["block"] == number
    return facts


def of(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in facts["hooks"] if one["name"] == name)


def counts(hook: dict[str, Any]) -> dict[str, tuple[int, int, int]]:
    tables = hook["dry_run"]["tables"]
    return {one["table"]: (one["inserted"], one["changed"], one["deleted"]) for one in tables}


async def test_a_block_at_every_place_of_the_chain(database_url: str, connection: asyncpg.Connection) -> None:
    async with world(database_url, connection, chain_of(3, 24, 4, own=[*BAD, 16, 23])) as w:
        w.aggregates.bad.update(BAD)
        await w.follow()
        w.aggregates.bad.clear()
        before = await everything(connection)

        # one that may still be reorganised is undone first, so that its very rows show
        facts = await explained(w, 23)
        assert (facts["state"], facts["dry_run"]["how"]) == ("can be undone", "undone")
        head = w.chain.blocks[23]
        assert (facts["hash"], facts["parent_hash"]) == (head.hash, head.parent_hash)
        assert facts["time"].startswith("2023-11-14T22:13:43") and facts["cursor"] == facts["head"] == 24
        assert facts["journal"]["rows"]["plays"] == 12
        assert counts(of(facts, "plays")) == {"plays": (12, 0, 0)}
        assert counts(of(facts, "aggregates")) == {
            "aggregate_plays": (1, 0, 0), "aggregate_monthly_plays": (1, 0, 0), "hourly_play_counts": (0, 1, 0),
        }  # fmt: skip
        assert counts(of(facts, "milestones"))["milestones"] == (1, 0, 0)
        assert all(one["covered"] and one["dry_run"]["seconds"] > 0 for one in facts["hooks"])
        fetched = facts["fetched"]
        assert (fetched["by"], fetched["records"], fetched["events"], fetched["troubles"]) == ("node", 12, 12, [])
        assert {one["method"] for one in fetched["requests"]} == {"eth_getBlockByNumber", "eth_getLogs"}
        assert fetched["bytes"] > 1000 and fetched["fetch_seconds"] > 0 and fetched["decode_seconds"] > 0
        event = facts["events"][3]
        assert (event["index"], event["name"], event["hooks"]) == (3, "Played", ["plays"])
        assert event["args"]["trackId"] == "1023" and not facts["events_left_out"]

        # below finality what is there is not written again, but found
        facts = await explained(w, 16, limit=1)
        events = facts["fetched"]["events"]
        assert (facts["state"], facts["dry_run"]["how"], facts["parent_hash"]) == (
            "final", "again", w.chain.blocks[15].hash,
        )  # fmt: skip
        assert counts(of(facts, "plays")) == {} and of(facts, "plays")["dry_run"]["found"] == {"plays": events}
        assert len(facts["events"]) == 1 and facts["events_left_out"] == events - 1 > 0

        # a hole: what its filling would write, and why it is one
        facts = await explained(w, 6, "aggregates")
        aggregates = of(facts, "aggregates")
        assert [one["name"] for one in facts["hooks"]] == ["aggregates"] and facts["events"] == []
        assert not aggregates["covered"] and counts(aggregates)["aggregate_plays"] == (1, 0, 0)
        assert "does not like block 6" in aggregates["failures"][0]["error"]

        # a hook that fails again, and those that build on it; the node's refusal and who answered after it
        w.plays.bad.add(23)
        w.node.faults.append(http_error(503, 1))
        facts = await explained(w, 23)
        assert "does not like block 23" in of(facts, "plays")["dry_run"]["error"]
        assert of(facts, "milestones")["dry_run"]["error"].startswith("left out, since plays")
        w.node.faults.append(http_error(503, 1, methods=["eth_getLogs"]))
        assert any("HTTP 503" in one for one in (await explained(w, 22))["fetched"]["troubles"])
        w.plays.bad.clear()
        assert await everything(connection) == before

        # the next one, with a log that no one can read; the one after that has to wait
        broken = msgspec.structs.replace(played(own_plays(25, 1)[0]), data="0x1234")
        w.chain.mine([played(play) for play in own_plays(25)], [broken])
        mine(w.chain, own_plays(26))
        facts = await explained(w, 25)
        assert (facts["state"], facts["dry_run"]["how"]) == ("not applied yet", "next")
        assert counts(of(facts, "plays")) == {"plays": (12, 0, 0)} and not of(facts, "plays")["covered"]
        assert [(one["index"], one["event"]) for one in facts["fetched"]["quarantined"]] == [(12, "Played")]
        assert facts["fetched"]["quarantined"][0]["error"]
        facts = await explained(w, 26)
        assert facts["dry_run"]["how"] == "none" and "the daemon is at block 24" in facts["dry_run"]["why"]

        # another block at its place by now
        w.chain.fork(3, [[[played(play) for play in own_plays(24)]], []])
        facts = await explained(w, 24)
        assert facts["state"] == "reorganised" and facts["applied_hash"] != facts["hash"]
        assert facts["dry_run"]["how"] == "none" and "about to undo" in facts["dry_run"]["why"]
        assert "follows on another block" in (await explained(w, 25))["dry_run"]["why"]
        assert await everything(connection) == before
        assert await w.follow() and (await explained(w, 24))["state"] == "can be undone"


async def test_on_a_core_chain_tables_are_watched_for_the_dry_run_alone(
    database_url: str, connection: asyncpg.Connection
) -> None:
    chain, hooks = core_chain([2, 0, 3]), (Plays(), Aggregates())
    registered = tuple(Registered(one, HookSettings()) for one in hooks)
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        row = await ledger.open_chain(connection, "main", "core", await source.identity(), 1)
        await ledger.register_hooks(connection, row.id, ["plays", "aggregates"])
        cursor = await ledger.cursor(connection, row.id)
        follower = Follower(connection, source, Pipeline(row, registered, "test"), State("main", 1), cursor)
        while await follower.step() is not Outcome.IDLE:
            pass
        await follower.close()
        before = await everything(connection)
        chain.mine(core_plays(77, 78))
        facts = await explain.gather(Parts(registered, source, None, row), connection, ChainSettings(), 4, (), 20)  # type: ignore[arg-type]
        assert (facts["fetched"]["by"], facts["fetched"]["records"], facts["fetched"]["events"]) == ("n0", 1, 2)
        assert counts(of(facts, "plays")) == {"plays": (2, 0, 0)}
        assert counts(of(facts, "aggregates"))["aggregate_plays"] == (2, 0, 0)
        facts = await explain.gather(Parts(registered, source, None, row), connection, ChainSettings(), 3, (), 20)  # type: ignore[arg-type]
        assert of(facts, "plays")["dry_run"]["found"] == {"plays": 3} and facts["dry_run"]["how"] == "again"
        assert await connection.fetchval("select count(*) from pg_trigger where tgname ~ '^indexer_journal'") == 0
        assert await everything(connection) == before

        # a dry run of replay shows what changes there, too
        await connection.execute("update indexer.coverage set blocks = '{}' where hook = 'aggregates'")
        replayer = Replayer(connection, row, registered, source, "replay")
        rehearsed = await replayer.rehearse(await replayer.plan(1, 3, ["aggregates"]))
        assert {one.table: one.changed for one in rehearsed.tables}["aggregate_plays"] == 5

        # a table that somebody else holds is not waited for: the hook's own count stands in
        other = await asyncpg.connect(database_url)
        try:
            held = other.transaction()
            await held.start()
            await other.execute("lock table plays in row exclusive mode")
            async with connection.transaction():
                assert await journal.watch_meanwhile(connection, ["plays", "aggregate_plays"]) == ["plays"]
            chain.mine(core_plays(79))
            facts = await explain.gather(Parts(registered, source, None, row), connection, ChainSettings(), 4, (), 20)  # type: ignore[arg-type]
            assert of(facts, "plays")["dry_run"]["counted"] == {"plays inserted": 2}
            await held.rollback()
        finally:
            await other.close()


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    running = Commands(tmp_path)
    try:
        yield running
    finally:
        running.close()


def refused(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code and len(ended.errors) == 1 and ended.errors[0].startswith("indexer: "), ended
    assert all(word in ended.errors[0] for word in words), ended


async def test_the_command(
    database_url: str, connection: asyncpg.Connection, commands: Commands, tmp_path: Path
) -> None:
    fake = chain_of(5, 12, 4)
    mine(fake, some_plays(random.Random(1), 3))
    async with world(database_url, connection, fake) as w:
        w.policy = {}
        values = settings(w.url, w.node.url, hooks={"enabled": HOOKS}, chain={"connect_timeout_seconds": 0.5})
        (tmp_path / "indexer.toml").write_text(toml(values))

        async def run(*arguments: str) -> Ended:
            return await commands("explain", *arguments, folder=tmp_path)

        refused(await run("13"), 2, "knows no chain main", "indexer run")
        await w.follow()
        shown = await run("13")
        assert (shown.code, shown.errors) == (0, []), shown
        for words in ("can still be undone", "node gave 3 events", "plays: 3 inserted", "it was undone first"):
            assert words in shown.out, shown.out
        facts = json.loads((await run("13", "--hook", "plays", "--json")).out)
        assert [one["name"] for one in facts["hooks"]] == ["plays"] and facts["hash"].startswith("0x")
        refused(await run("99"), 2, "block 99 is above the chain's head", "13")
        refused(await run("9", "--hook", "pays"), 2, "no enabled hook is called pays")
        await connection.execute("update indexer.chain set start_block = 5")
        refused(await run("4"), 2, "block 4 is before", "5")
        await w.node.stop()
        refused(await run("9"), 75, "no node answers", "node")
        with socket.socket() as hanging:  # accepts, and never says a word
            hanging.bind(("127.0.0.1", 0))
            hanging.listen()
            values["chain"]["endpoints"][0]["url"] = f"http://127.0.0.1:{hanging.getsockname()[1]}"
            (tmp_path / "indexer.toml").write_text(toml(values))
            refused(await run("9"), 75, "no node answers")
