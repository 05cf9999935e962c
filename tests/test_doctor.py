"""`indexer doctor`: what is wrong is found and named, with what to do about it; nothing hangs and nothing changes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from corekit import chain_of as core_chain
from daemon import HOOKS, Commands, Settings, settings, toml
from replaykit import World, chain_of, everything, world

from indexer import completion, doctor, ledger
from indexer.app import migrate_database, open_database
from indexer.db import Connection, try_lead
from indexer.doctor_finding import Checkup, Finding, Verdict
from indexer.errors import ConfigError
from indexer.fakechain import FakeChain, FakeCoreNode, FakeNode, Fault, limit_range, slow, wrong_chain
from indexer.pytest_plugin import with_database
from indexer.record import record
from indexer.registry import load_hooks
from indexer.settings_sources import load_settings
from indexer.sidecar.jobs import load_jobs
from indexer.sources.choose import make_source

SECRET = "s3cr3t-k3y-that-nobody-shows-to-anybody"


async def found(folder: Path, values: Settings | str, seconds: float = 5.0) -> dict[str, Finding]:
    """What the doctor finds, by "group: check"; no secret is in it, and what is wrong comes with advice."""
    file = folder / "doctor.toml"
    file.write_text(values if isinstance(values, str) else toml(values))
    checkup = Checkup(seconds)
    await doctor.examine(checkup, file, None)
    for one in checkup.findings:
        assert one.state == "ok" or one.advice, one
        assert SECRET not in one.reason + one.advice and "\n" not in one.reason, one
    return {f"{one.group}: {one.check}": one for one in checkup.findings}


def states(findings: dict[str, Finding], state: str) -> set[str]:
    return {name for name, one in findings.items() if one.state == state}


def recent(chain: FakeChain, ahead: float = 0.0) -> FakeChain:
    """The chain with blocks up to now (or so many seconds ahead of it)."""
    now = int(time.time() + ahead)
    for seconds in range(60, -1, -2):
        chain.mine(timestamp=now - seconds)
    return chain


@pytest.fixture
async def w(database_url: str, connection: asyncpg.Connection) -> AsyncIterator[World]:
    """A chain whose head is fresh, and a database that has followed it."""
    async with world(database_url, connection, recent(chain_of(3, 24, 4))) as running:
        yield running


def well(w: World, **sections: Any) -> Settings:
    return settings(w.url, w.node.url, **{"hooks": {"enabled": HOOKS}, **sections})


async def test_all_is_well_and_then_it_is_not(w: World, connection: Connection, tmp_path: Path) -> None:
    await w.follow()
    assert await try_lead(connection, w.row.id)
    before = await everything(connection)
    values = well(w)
    values["chain"]["endpoints"][0]["ws"] = w.node.ws_url
    good = await found(tmp_path, values)
    assert states(good, "ok") == set(good), good
    assert {
        "settings: hooks", "database: rights", "database: migrations", "database: journal", "database: clock",
        "daemon: leader", "daemon: gaps", "node node: network", "node node: finality", "node node: websocket",
    } <= set(good)  # fmt: skip
    assert "takes 56 blocks" in good["node node: log ranges"].reason
    assert "51 (4 below the head)" in good["node node: finality"].reason
    assert await everything(connection) == before

    # what an operator meets: a hook that failed, a hole, a trigger that is gone, a leader that is silent, limits
    await connection.execute("drop trigger indexer_journal_update on aggregate_plays")
    await connection.execute("alter table plays disable trigger indexer_journal_insert")
    await connection.execute("update indexer.cursor set seen_at = now() - interval '5 min'")
    await connection.execute("update indexer.coverage set blocks = blocks - '{[3,9)}' where hook = 'plays'")
    failed = """
        insert into indexer.failure (chain, hook, first, last, policy, error, traceback)
        values ($1, $2, 9, 9, $3, 'Bad', '')
    """
    await connection.execute(failed, w.row.id, "plays", "skip")
    w.node.faults.append(limit_range(20, -32602, "range is too large, max is 20 blocks"))
    bad = await found(tmp_path, values)
    assert "aggregate_plays, plays" in bad["database: journal"].reason and bad["database: journal"].state == "fail"
    assert bad["daemon: leader"].state == "fail" and "says nothing" in bad["daemon: leader"].reason
    assert bad["daemon: gaps"].state == "warn" and "plays 6 blocks" in bad["daemon: gaps"].reason
    assert bad["daemon: failures"].state == "warn" and "1 open, of plays" in bad["daemon: failures"].reason
    ranges = bad["node node: log ranges"]
    assert ranges.state == "ok" and "takes 20 blocks" in ranges.reason and "max is 20 blocks" in ranges.reason
    await connection.execute(failed, w.row.id, "aggregates", "halt")
    bad = await found(tmp_path, values)
    halted = bad["daemon: failures"]
    assert halted.state == "fail" and "aggregates halted at block 9: Bad" in halted.reason


class Older(FakeNode):
    """A node that takes no batches."""

    async def _answer(self, body: bytes, socket: Any) -> tuple[bytes, Fault | None]:
        if body.lstrip()[:1] != b"[":
            return await super()._answer(body, socket)
        return b'{"jsonrpc": "2.0", "id": null, "error": {"code": -32600, "message": "no batches here"}}', None


async def test_nodes_that_are_not_well(w: World, tmp_path: Path) -> None:
    """Of another network, hanging, behind, without tags and batches, deaf to subscriptions, with a clock of its own."""
    await w.follow()
    late, old = FakeNode(recent(FakeChain(), ahead=300), ws=False), Older(chain_of(3, 20, 4), supports_finalized=False)
    async with late, old, FakeNode(w.chain) as other, FakeNode(w.chain) as hanging:
        other.faults.append(wrong_chain(5))
        hanging.faults.append(slow(60, None))
        values = well(w)
        values["chain"]["endpoints"] += [
            {"url": f"{other.url}/?key={SECRET}", "name": "other"},
            {"url": f"{hanging.url}/?key={SECRET}", "name": "hanging"},
            {"url": late.url, "name": "late", "ws": f"{late.ws_url}/{SECRET}"}, {"url": old.url, "name": "old"},
        ]  # fmt: skip
        started = time.monotonic()
        bad = await found(tmp_path, values, seconds=1.0)
        assert time.monotonic() - started < 30
        network = bad["node other: network"]
        assert network.state == "fail" and "a node of chain 5" in network.reason
        assert "the database says 31337" in network.reason and "node node says 31337" in network.reason
        assert bad["node hanging: network"].state == "fail"
        assert bad["node hanging: network"].reason == "no answer within 1 s" and "node hanging: head" not in bad
        assert bad["node late: head"].state == "fail" and "s in the future" in bad["node late: head"].reason
        assert "NTP" in bad["node late: head"].advice
        old_head = bad["node old: head"]
        assert old_head.state == "warn" and "at a block each 1 s" in old_head.reason
        finality, batches = bad["node old: finality"], bad["node old: batches"]
        assert finality.state == "warn" and "64 blocks below the head" in finality.reason
        assert batches.state == "warn" and "no batches here" in batches.reason
        assert bad["nodes: heads together"].state == "warn" and "old by" in bad["nodes: heads together"].reason
        assert {name for name in bad if name.startswith("node node")} <= states(bad, "ok")

        # a chain_id that none of them has; a ws that is of another chain, or no ws at all; nothing past a dead node
        endpoint = {"url": w.node.url, "name": "node", "ws": other.ws_url}
        values = well(w, chain={"endpoints": [endpoint], "chain_id": "1"})
        bad = await found(tmp_path, values)
        assert "chain.chain_id says 1" in bad["node node: network"].reason
        del values["chain"]["chain_id"]
        assert (await found(tmp_path, values))["node node: websocket"].state == "fail"
        values["chain"]["endpoints"] = [{"url": old.url, "ws": f"ws://127.0.0.1:1/{SECRET}", "name": "node"}]
        assert (await found(tmp_path, values))["node node: websocket"].state == "warn"
        await connect_refused(values, tmp_path)


async def connect_refused(values: Settings, folder: Path) -> None:
    values["chain"]["endpoints"] = [{"url": f"http://127.0.0.1:1/{SECRET}", "name": "dead"}]
    values["database"] = {"url": f"postgresql://u:{SECRET}@127.0.0.1:1/x", "connect_timeout_seconds": 0.3}
    bad = await found(folder, values)
    assert states(bad, "fail") == {"database: connection", "node dead: network"}
    assert "can't be reached" in bad["database: connection"].reason


@pytest.fixture
async def poor(empty_database_url: str) -> AsyncIterator[tuple[str, Connection]]:
    """An empty database and a role that may only connect: its address there, and the owner's connection."""
    connection = await asyncpg.connect(empty_database_url)
    role = f"poor_{time.monotonic_ns()}"
    await connection.execute(f"create role {role} login; revoke create on schema public from public")
    name = await connection.fetchval("select current_database()")
    await connection.execute(f"revoke temporary on database {name} from public")
    try:
        yield empty_database_url.replace("indexer@", f"{role}@", 1), connection
    finally:
        await connection.execute(f"drop owned by {role}; drop role {role}")
        await connection.close()


async def test_rights_and_migrations(poor: tuple[str, Connection], empty_database_url: str, tmp_path: Path) -> None:
    url, owner = poor
    async with FakeNode(recent(FakeChain())) as node:
        bad = await found(tmp_path, settings(url, node.url, hooks={"enabled": HOOKS}))
        rights = bad["database: rights"]
        assert rights.state == "fail" and rights.advice.startswith("grant it to poor_")
        for words in ("create the schema indexer", "create tables in the schema public", "make temporary tables"):
            assert words in rights.reason
        pending = bad["database: migrations"]
        assert pending.state == "warn" and "indexer/0001_engine" in pending.reason and "indexer run" in pending.advice
        assert bad["database: chain"].state == "warn" and "daemon: leader" not in bad
        assert await owner.fetchval("select to_regnamespace('indexer')") is None

        # the owner lacks nothing; once all is made, others may still be kept from the tables
        values = settings(empty_database_url, node.url, hooks={"enabled": HOOKS})
        assert (await found(tmp_path, values))["database: rights"].state == "ok"
        parsed = load_settings(tmp_path / "doctor.toml").settings
        async with open_database(parsed, pool=False) as database:
            await migrate_database(database, load_hooks(parsed.hooks))
        role = url.partition("//")[2].partition("@")[0]
        await owner.execute(f"grant usage on schema indexer to {role}")
        await owner.execute(f"grant select on all tables in schema indexer to {role}")
        bad = await found(tmp_path, settings(url, node.url, hooks={"enabled": HOOKS}))
        assert bad["database: migrations"].state == "ok"
        rights = bad["database: rights"]
        assert "trigger" in rights.reason and "on plays" in rights.reason and "on indexer.cursor" in rights.reason
        # one migration less than there are files
        await owner.execute("delete from indexer.migration where line = 'plays' and number > 5")
        assert "plays/0006" in (await found(tmp_path, values))["database: migrations"].reason
        await owner.execute("insert into indexer.migration values ('indexer', 99, 'x', 'x', now(), 0)")
        newer = (await found(tmp_path, values))["database: migrations"]
        assert newer.state == "fail" and "newer than this indexer" in newer.reason
    missing = settings(with_database(empty_database_url, "nowhere"), "http://127.0.0.1:1")
    assert "refuses us" in (await found(tmp_path, missing))["database: connection"].reason


async def test_settings_and_what_the_sidecar_needs(database_url: str, tmp_path: Path) -> None:
    bad = await found(tmp_path, "[database\n")
    assert set(bad) == {"settings: file"} and "line 1" in bad["settings: file"].reason
    values = settings(database_url, "http://127.0.0.1:1", hooks={"enabled": ["hooks.plays:pays"]}, contracts=[])
    bad = await found(tmp_path, values)
    assert bad["settings: hooks"].state == bad["settings: source"].state == "fail"
    assert "has no pays" in bad["settings: hooks"].reason and "contracts is empty" in bad["settings: source"].reason
    assert "database: connection" in bad
    values = settings(
        database_url, "http://127.0.0.1:1", sidecar={"port": 0}, listening={"token_key": SECRET},
        auth={"jwks_url": "https://keys.invalid"},
        providers={"songstats": {"api_key": SECRET}, "apify": {"token": SECRET, "base_url": "http://127.0.0.1:9"},
                   "spotify": {"client_id": "x"}, "stripe": {"api_key": SECRET}},
    )  # fmt: skip
    values["providers"]["songstats"]["base_url"] = "https://songstats.invalid"
    values["providers"]["stripe"]["base_url"] = "http://127.0.0.1:9"
    bad = await found(tmp_path, values)
    assert bad["sidecar: bearer tokens"].state == "ok" and bad["sidecar: cron secret"].state == "warn"
    assert "apify needs token and actor; providers.spotify needs" in bad["sidecar: providers"].reason
    assert bad["sidecar: listening"].state == "fail" and bad["sidecar: cards"].state == "warn"
    assert bad["sidecar: address of songstats"].state == bad["sidecar: address of the public keys"].state == "fail"
    assert bad["sidecar: address of apify"].state == "ok" and "sidecar: address of spotify" not in bad
    assert bad["database: migrations"].state == "warn" and "sidecar/0001" in bad["database: migrations"].reason
    no_data = settings("", "http://127.0.0.1:1", database={"data_dir": str(tmp_path / "none")})
    del no_data["database"]["url"]
    assert (await found(tmp_path, no_data))["database: connection"].state == "warn"
    assert not (tmp_path / "none").exists()


async def test_core_and_recorded_chains(database_url: str, connection: Connection, tmp_path: Path) -> None:
    async with FakeCoreNode(core_chain([1] * 30)) as node:
        values = {
            "database": {"url": database_url}, "hooks": {"enabled": HOOKS},
            "chain": {"source": "core", "endpoints": [{"url": node.url, "name": "core"}]},
        }  # fmt: skip
        good = await found(tmp_path, values)
        assert good["node core: network"].reason == "chain core-test" and "database: journal" not in good
        assert good["node core: history"].state == "ok" and "block 30" in good["node core: head"].reason
        row = await ledger.open_chain(connection, "main", "core", "old", 1)
        await connection.execute("update indexer.cursor set number = 5 where chain = $1", row.id)
        node.earliest = 20
        bad = await found(tmp_path, values)
        assert "the database says old" in bad["node core: network"].reason
        await connection.execute("update indexer.chain set identity = 'core-test'")
        bad = await found(tmp_path, values)
        pruned = bad["node core: history"]
        assert pruned.state == "fail" and "has block 20 and later" in pruned.reason
        node.earliest = 0
        source = make_source(load_settings(tmp_path / "doctor.toml").settings)
        try:
            await record(source, "core", 10, 20, tmp_path / "blocks.jsonl", force=False, add=lambda *_: None)
        finally:
            await source.close()
    values["chain"] = {"source": "recorded", "file": "blocks.jsonl"}
    bad = await found(tmp_path, values)
    assert bad["file: network"].state == "ok" and bad["file: history"].state == "fail"
    assert "was begun from core" in bad["database: chain"].reason


async def test_a_check_that_hangs_or_breaks_off_keeps_nobody_from_the_next() -> None:
    async def stubborn() -> Verdict:
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if released:
                    raise

    async def broken(error: BaseException) -> Verdict:
        raise error

    released, told = list[bool](), list[Finding]()
    checkup, started = Checkup(0.05, told.append), time.monotonic()
    assert not await checkup.run("a", "hangs", stubborn(), "wait")
    assert not await checkup.run("a", "breaks", broken(aiohttp.ClientError(SECRET)))
    assert not await checkup.run("a", "says", broken(ConfigError("two\nlines")))
    assert time.monotonic() - started < 5 and checkup.failed
    assert [one.reason for one in told] == ["no answer within 0.05 s", "broke off with ClientError", "two lines"]
    released.append(True)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


# -- the command, and what TAB offers --------------------------------------------------------------------------------


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    running = Commands(tmp_path)
    try:
        yield running
    finally:
        running.close()


async def test_the_command_and_completion(w: World, commands: Commands, tmp_path: Path) -> None:
    await w.follow()
    values = well(w, sidecar={"concurrency": {"mykind": 2}}, chain={"chain_id": "31337"})
    (tmp_path / "indexer.toml").write_text(toml(values))
    shown = await commands("doctor", folder=tmp_path)
    assert (shown.code, shown.errors) == (0, []), shown
    assert "warn daemon: leader" in shown.out and "-> start one: indexer run" in shown.out
    assert shown.out.splitlines()[-1].endswith("warnings, 0 failed")
    w.node.faults.append(wrong_chain(5))
    listed = await commands("doctor", "--json", folder=tmp_path)
    facts = json.loads(listed.out)
    assert (listed.code, facts["well"], facts["fail"]) == (1, False, 1), listed
    assert set(facts["checks"][0]) == {"group", "check", "state", "reason", "advice", "seconds"}

    async def offered(line: str, folder: Path = tmp_path) -> set[str]:
        words = line.split(" ")
        env = {"_INDEXER_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        one = await commands(folder=folder, env=env)
        assert (one.code, one.err) == (0, "")
        return set(one.out.split())

    assert await offered("indexer ex") == {"explain"}
    assert await offered("indexer explain 7 --hook ") == {"plays", "aggregates", "milestones"}
    assert await offered("indexer replay 1 2 --hook a") == {"aggregates"}
    assert await offered("indexer jobs list --kind my") == {"mykind"}
    assert await offered("indexer jobs list --state h") == {"held"}
    assert await offered("indexer chain accept 3") == {"31337"}
    (tmp_path / "empty").mkdir()
    assert await offered("indexer verify ", tmp_path / "empty") == set()
    (tmp_path / "empty" / "indexer.toml").write_text("[hooks\n")
    assert await offered("indexer verify ", tmp_path / "empty") == set()
    assert await offered("indexer jobs list --kind s", tmp_path / "empty") >= {"snapshot.chunk", "songstats.history"}
    assert set(completion.KINDS) == set(load_jobs([])), "completion.KINDS must be the kinds that every sidecar has"
    for shell in ("zsh", "fish"):
        env = {"_TYPER_COMPLETE_ARGS": "indexer explain 7 --hook pl", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        one = await commands(folder=tmp_path, env={**env, "_INDEXER_COMPLETE": f"complete_{shell}"})
        assert (one.code, one.err) == (0, "") and "plays" in one.out and "milestones" not in one.out
    listed = await commands("--help", folder=tmp_path)
    assert "--install-completion" in listed.out and "--show-completion" in listed.out
