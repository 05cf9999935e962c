"""The commands as an operator meets them: exit codes, one clear line for each mistake, and no secret in any output."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from conftest import HASTY
from daemon import INDEXER, Commands, Daemon, Ended, Settings, command, environment, history, settings, toml, until

from indexer.devchain import find_anvil
from indexer.embedded import EmbeddedPostgres
from indexer.fakechain import FakeChain, FakeNode, http_error

pytestmark = pytest.mark.timeout(120)

SECRET = "s3cr3t-k3y"
Run = Callable[[Settings], Awaitable[Ended]]
COMMANDS = {"run", "migrate", "status", "config", "demo"}


@pytest.fixture
async def node() -> AsyncIterator[FakeNode]:
    """A node with five empty blocks."""
    chain = FakeChain()
    chain.mine_empty(5)
    async with FakeNode(chain) as running:
        yield running


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nobody listens, and nobody else will."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def with_password(url: str) -> str:
    return url.replace("indexer@", f"indexer:{SECRET}@", 1)


@pytest.fixture
def run(commands: Commands, tmp_path: Path) -> Run:
    """`indexer run` with settings that can't work."""

    def to_its_end(values: Settings) -> Awaitable[Ended]:
        (tmp_path / "given.toml").write_text(toml(values))
        return commands("run", "-c", "given.toml", folder=tmp_path)

    return to_its_end


def refused(ended: Ended, code: int, *words: str) -> None:
    """It ended with this code and one clear line, in which are these words."""
    said = ended.out + ended.err
    assert ended.code == code, said
    assert len(ended.errors) == 1, said
    assert ended.errors[0].startswith("indexer: "), said
    assert SECRET not in said
    assert "Traceback" not in said
    for word in words:
        assert word in ended.errors[0], said


# What is laid over settings that work, and words of the line that says what is wrong.
Case = tuple[Callable[[Settings, int], Any], tuple[str, ...]]
WRONG: dict[str, Case] = {
    "other network": (lambda s, _: s["chain"].update(chain_id="1"), ("chain.chain_id is 1", "31337")),
    "start above head": (lambda s, _: s["chain"].update(start_block=6), ("6", "head 5", "chain.start_block")),
    "no endpoints": (lambda s, _: s["chain"].update(endpoints=[]), ("chain.endpoints is empty",)),
    "no contracts": (lambda s, _: s.update(contracts=[]), ("contracts is empty", "[[contracts]]")),
    "unknown setting": (lambda s, _: s["http"].update(prot=1), ("http.prot", "did you mean port?")),
    "unknown section": (lambda s, _: s.update(htpp={"port": 1}), ("htpp", "given.toml")),
    "bad value": (lambda s, _: s["http"].update(port="many"), ("http.port", "many")),
    "bad address": (
        lambda s, _: s["chain"].update(endpoints=[{"url": f"127.0.0.1:8545/{SECRET}"}]), ("endpoints[0].url", "http://")
    ),
    "ABI missing": (lambda s, _: s["contracts"][0].update(abi="nope.json"), ("nope.json", "No such file")),
    "ABI no JSON": (lambda s, _: s["contracts"][0].update(abi="broken.json"), ("broken.json", "not JSON")),
    "ABI no events": (lambda s, _: s["contracts"][0].update(abi="silent.json"), ("silent.json", "no events")),
    "bad signature": (
        lambda s, _: s["contracts"][0].update(abi=["event Played(uint256 indexed"]), ("Played(uint256 indexed",)
    ),
    "bad contract": (lambda s, _: s["contracts"][0].update(address="0x12"), ("0x12",)),
    "unknown event": (lambda s, _: s["contracts"][0].update(events=["Paused"]), ("Paused",)),
    "event not heard": (
        lambda s, _: s["contracts"][0].update(abi=["event Paused()"], events=[]), ("hook plays", "Played", "Paused")
    ),
    "hook without module": (lambda s, _: s["hooks"].update(enabled=["nowhere.to:find"]), ("no module nowhere",)),
    "hook not there": (lambda s, _: s["hooks"].update(enabled=["hooks.plays:pays"]), ("has no pays", "plays")),
    "hook out of order": (
        lambda s, _: s["hooks"].update(enabled=["hooks.aggregates:aggregates"]), ("aggregates needs the hook plays",)
    ),
    "hook without name": (lambda s, _: s["hooks"].update(enabled=["plays"]), ("module:attribute",)),
    "port taken": (lambda s, port: s["http"].update(port=port), ("can't listen on 127.0.0.1:", "http.port")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_settings(name: str, node: FakeNode, database_url: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "silent.json").write_text('[{"type": "function", "name": "f", "inputs": [], "outputs": []}]')
    values = settings(
        with_password(database_url), node.url, chain={"endpoints": [{"url": f"{node.url}/?key={SECRET}"}]}
    )
    change, words = WRONG[name]
    change(values, node.port)
    refused(await run(values), 2, *words)


async def test_the_database_was_started_with_another_chain(
    node: FakeNode, connection: asyncpg.Connection, database_url: str, run: Run
) -> None:
    await connection.execute(
        "insert into indexer.chain (name, source, identity, start_block) values ('main', 'evm', '999', 0)"
    )
    refused(await run(settings(database_url, node.url)), 2, "main", "999", "31337")


async def test_nobody_answers(node: FakeNode, database_url: str, closed_port: int, run: Run) -> None:
    quick = {"connect_timeout_seconds": 0.5}
    no_node = settings(
        with_password(database_url), "", chain={**quick, "endpoints": [{"url": f"http://127.0.0.1:{closed_port}/{SECRET}"}]}
    )  # fmt: skip
    no_database = settings(
        f"postgresql://indexer:{SECRET}@127.0.0.1:{closed_port}/music", node.url, database=quick
    )  # fmt: skip
    ended = [await run(values) for values in (no_node, no_database)]
    refused(ended[0], 75, "no node answers", f"127.0.0.1:{closed_port}", "chain.endpoints")
    refused(ended[1], 75, "the database can't be reached", "database.url")


async def test_a_provider_that_quotes_the_key_in_its_refusal(node: FakeNode, database_url: str, run: Run) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "error": {"code": -32000, "message": f"bad API key {SECRET}"}})
    node.faults.append(http_error(401, None, body.encode()))
    values = settings(
        database_url, "",
        chain={"connect_timeout_seconds": 0.5, "endpoints": [{"url": f"{node.url}/?key={SECRET}", "name": "node"}]},
    )  # fmt: skip
    refused(await run(values), 75, "no node answers", "chain.endpoints")


async def test_the_database_refuses(node: FakeNode, run: Run, tmp_path: Path) -> None:
    """A wrong password and a database that does not exist, at a server that asks for passwords."""
    async with EmbeddedPostgres(tmp_path / "postgres", options=HASTY) as server:
        connection = await asyncpg.connect(server.dsn)
        await connection.execute("create role reader login password 'right'")
        (server.data_dir / "pg_hba.conf").write_text("local all reader scram-sha-256\nlocal all all trust\n")
        await connection.execute("select pg_reload_conf()")
        await connection.close()
        wrong = server.dsn.replace("indexer@/", f"reader:{SECRET}@/", 1)
        absent = with_password(server.dsn).replace("/indexer?", "/absent?", 1)

        async def password_asked() -> bool:
            try:
                await (await asyncpg.connect(wrong)).close()
            except asyncpg.InvalidPasswordError:
                return True
            return False

        await until(password_asked, "the server asks for a password")
        refused(await run(settings(wrong, node.url)), 2, 'user "reader"', "database.url")
        refused(await run(settings(absent, node.url)), 2, 'database "absent"', "database.url")


async def test_a_hook_that_does_not_import_shows_its_own_traceback(
    node: FakeNode, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "broken_hooks.py").write_text("def prepare():\n    return 1 / 0\n\n\nprepare()\n")
    values = settings(with_password(database_url), node.url, hooks={"enabled": ["broken_hooks:plays"]})
    (tmp_path / "indexer.toml").write_text(toml(values))
    ended = await command("run", folder=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert ended.code == 2
    assert ended.errors[0] == "Traceback (most recent call last):"
    assert any("broken_hooks.py" in line and "line 2, in prepare" in line for line in ended.errors)
    assert not any("importlib" in line or "registry.py" in line for line in ended.errors)
    assert ended.errors[-1].startswith("indexer: hook broken_hooks:plays does not import: ZeroDivisionError")
    assert SECRET not in ended.err


async def test_bad_usage(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "no.toml").write_text("[database\n")
    wrong: list[tuple[list[str], dict[str, str], tuple[str, ...]]] = [
        (["run", "--conifg", "x"], {}, ("--conifg", "indexer run --help")),
        (["rum"], {}, ("rum", "indexer --help")),
        (["run", "-c", "absent.toml"], {}, ("absent.toml",)),
        (["run", "-c", "no.toml"], {}, ("no.toml",)),
        (["run"], {"INDEXER_HTTP__PORT": "many"}, ("http.port", "many", "INDEXER_HTTP__PORT")),
        (["run"], {"INDEXER_HTTP__PROT": "1"}, ("INDEXER_HTTP__PROT",)),
        (["run"], {"INDEXER_DATABASE__URL": f"mysql://root:{SECRET}@host/x"}, ("database.url", "postgresql://")),
        (["demo", "--chain", "bitcoin"], {}, ("bitcoin", "anvil")),
        (["demo", "--seconds", "soon"], {}, ("--seconds", "indexer demo --help")),
        (["demo", "--rpc", "http://127.0.0.1:1"], {}, ("--rpc", "--contract")),
    ]
    for arguments, env, words in wrong:
        one = await commands(*arguments, folder=tmp_path, env=env)
        refused(one, 2, *words)
        assert one.out == ""


async def test_help_and_version(commands: Commands, tmp_path: Path) -> None:
    number = await command("--version", folder=tmp_path)
    listed = await commands("--help", folder=tmp_path)
    assert (number.code, number.out, number.err) == (0, f"{version('indexer')}\n", "")
    assert listed.code == 0 and "Exit codes" in listed.out
    names = re.findall(r"^│ ([a-z]+) ", listed.out, re.MULTILINE)
    assert set(names) >= COMMANDS
    for name in names:
        shown = await commands(name, "--help", folder=tmp_path)
        assert shown.code == 0 and shown.err == ""
        assert re.search(rf"Example: indexer {name}\b", shown.out), shown.out


async def test_config_shows_every_setting_and_no_secret(commands: Commands, tmp_path: Path) -> None:
    values = settings(f"postgresql://u:{SECRET}@db.example/music", f"https://node.example/v2/{SECRET}")
    values["chain"]["endpoints"].append(
        {"url": f"https://{SECRET}@other.example", "ws": f"wss://other.example/{SECRET}"}
    )
    (tmp_path / "indexer.toml").write_text(toml(values))
    env = {"INDEXER_HTTP__ADMIN_TOKEN": SECRET, "INDEXER_HTTP__PORT": "9999"}
    table = await commands("config", folder=tmp_path, env=env)
    listed = await commands("config", "--json", folder=tmp_path, env=env)
    for shown in (table, listed):
        assert (shown.code, shown.err) == (0, "")
        assert SECRET not in shown.out
    found = {one["setting"]: (one["value"], one["origin"]) for one in json.loads(listed.out)}
    assert found["http.port"] == (9999, "environment INDEXER_HTTP__PORT")
    assert found["chain.endpoints[0].url"][0] == "https://node.example"
    assert found["database.pool_size"] == (6, "default")
    assert found["database.url"][0] == found["http.admin_token"][0] != ""
    for path in found:
        assert path in table.out


async def test_migrate_dry_run_then_twice(commands: Commands, empty_database_url: str, tmp_path: Path) -> None:
    (tmp_path / "indexer.toml").write_text(toml(settings(empty_database_url, "http://127.0.0.1:1")))
    planned = await commands("migrate", "--dry-run", folder=tmp_path)
    connection = await asyncpg.connect(empty_database_url)
    try:
        assert planned.code == 0 and await connection.fetchval("select to_regclass('indexer.migration')") is None
        first = await commands("migrate", folder=tmp_path)
        assert first.code == 0
        assert first.out.splitlines() == [one.replace("would apply ", "applied ") for one in planned.out.splitlines()]
        lines = {one.split()[1].split("/")[0] for one in first.out.splitlines()}
        assert lines == {"indexer", "plays"}
        assert await connection.fetchval("select to_regclass('public.plays')") is not None
    finally:
        await connection.close()
    again = await commands("migrate", folder=tmp_path)
    assert (again.code, again.out) == (0, "nothing to apply: the schema is up to date\n")


async def test_status_before_while_and_after(commands: Commands, empty_database_url: str, tmp_path: Path) -> None:
    chain, _ = history(60)
    async with FakeNode(chain) as node:
        values = settings(empty_database_url, node.url)
        (tmp_path / "indexer.toml").write_text(toml(values))

        async def status() -> tuple[Ended, Any]:
            table = await commands("status", folder=tmp_path)
            facts = await commands("status", "--json", folder=tmp_path)
            assert table.code == facts.code and table.err == facts.err == ""
            return table, json.loads(facts.out)

        table, facts = await status()
        assert (table.code, facts) == (1, None)
        assert "nothing of chain main here yet" in table.out
        async with Daemon(tmp_path, values) as daemon:
            await daemon.logged("span committed", last=60)
            table, facts = await status()
            assert table.code == 0
            assert (facts["running"], facts["cursor"], facts["head"], facts["lag_blocks"]) == (True, 60, 60, 0)
            assert facts["final"] == 20 and facts["eta_seconds"] == 0 and facts["failures"] == []
            assert {name: one["gap_blocks"] for name, one in facts["hooks"].items()} == {
                "plays": 0, "aggregates": 0, "milestones": 0,
            }  # fmt: skip
            assert f"led by {socket.gethostname()}:{daemon.process.pid}" in table.out
            assert "at the head" in table.out
            await watched(tmp_path)
            assert await daemon.stop() == 0
        table, facts = await status()
        assert (table.code, facts["cursor"]) == (0, 60)
        assert facts["running"] is False
        assert "no daemon runs" in table.out


async def watched(folder: Path) -> None:
    """`status --watch --json` shows the facts again and again until Ctrl-C, which is no failure."""
    process = await asyncio.create_subprocess_exec(
        INDEXER, "status", "--watch", "--json", cwd=folder, env=environment(),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    for _ in range(2):
        assert json.loads(await process.stdout.readline())["cursor"] == 60
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), 10)
    assert (process.returncode, err) == (0, b"")


SUMMARY = re.compile(r"Indexed ([\d,]+) blocks: ([\d,]+) plays of ([\d,]+) tracks, ([\d,]+) milest")


async def test_demo(tmp_path: Path) -> None:
    """Rows from nothing, on a simulated chain and (where there is one) on a real anvil."""
    kinds = ["simulated", *(["anvil"] if find_anvil() else [])]
    ended = await asyncio.gather(
        *(command("demo", "--seconds", "10", "--chain", kind, "--port", "0", folder=tmp_path) for kind in kinds)
    )
    for one in ended:
        assert one.code == 0, one
        found = SUMMARY.search(one.out.splitlines()[-1])
        assert found, one.out
        blocks, plays, tracks, milestones = (int(number.replace(",", "")) for number in found.groups())
        assert blocks > 120 and plays > blocks and 100 < tracks <= 400 and milestones > 20
        assert "Status page: http://127.0.0.1:" in one.out and "Listening page: http://127.0.0.1:" in one.out
        archived = re.search(r"Archived ([\d,]+) plays of 5 listeners", one.out)
        assert archived and int(archived[1].replace(",", "")) > 1_000, one.out
        assert one.errors == [], one.err
