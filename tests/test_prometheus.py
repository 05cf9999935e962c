"""Alerts, runbooks, dashboard: that they name what the code exports, and that a real Prometheus fires every alert."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
import typer
import yaml
from aiohttp import web
from daemon import CONTRACT, HOOKS, Daemon, mine, played, settings, until
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from test_worker_process import Sidecar

from indexer import metrics, queue
from indexer.cli import app
from indexer.demochain import Listeners
from indexer.fakechain import FakeChain, FakeLog, FakeNode, http_error
from indexer.sidecar import gates

DEPLOY = Path(__file__).parent.parent / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RUNBOOKS = PROMETHEUS / "runbooks.md"
# what Prometheus adds of its own: to every series, to `up`, and to its alerts
TARGET_LABELS = {"job", "instance"}
OF_PROMETHEUS = {"up": set[str](), "ALERTS": {"alertname", "alertstate", "severity"}}


def tool(name: str) -> str:
    """The path of Prometheus' program; skips (in CI: fails) where it is not installed."""
    found = shutil.which(name)
    if found is None:
        message = f"no {name} is at hand: install Prometheus (on Debian: apt install prometheus)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    return found


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@cache
def rules() -> dict[str, dict[str, Any]]:
    """The alerts by name."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    every = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in every}) == len(every)
    return {rule["alert"]: rule for rule in every}


@cache
def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    return found


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_promtool_takes_the_configuration_and_every_alert_fires_where_it_should() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("test", "rules", PROMETHEUS / "alerts.test.yml")


def test_every_alert_is_tested_both_ways() -> None:
    tests = {one["name"]: one for one in yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]}
    healthy = tests.pop("healthy")
    assert [(one["expr"], one["exp_samples"]) for one in healthy["promql_expr_test"]] == [("ALERTS", [])]
    assert tests.keys() == rules().keys()
    for name, one in tests.items():
        expected = {bool(case["exp_samples"]) for case in one["promql_expr_test"]}
        assert expected == {True, False}, name
        assert all(f'alertname="{name}"' in case["expr"] for case in one["promql_expr_test"]), name


def test_every_alert_says_what_it_is() -> None:
    for name, rule in rules().items():
        assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("critical", "warning"), name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"] == f"deploy/prometheus/runbooks.md#{name.lower()}"


# -- the runbooks ------------------------------------------------------------------------------------------------------


def test_every_alert_has_a_runbook_and_no_other_is_there() -> None:
    text = RUNBOOKS.read_text()
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in sections] == list(rules())
    for name, body in sections:
        assert "\n- Look: " in body and "\n- Do: " in body, name
    linked = set(re.findall(r"\]\(#(\w+)\)", text))
    assert linked and linked <= {name.lower() for name in rules()}


def test_runbooks_name_commands_that_there_are() -> None:
    root: Any = typer.main.get_command(app)
    named = set(re.findall(r"`(indexer [^`]+)`", RUNBOOKS.read_text().replace("\n  ", " ")))
    assert len(named) > 15
    for line in named:
        words = shlex.split(line)[1:]
        command: Any = root
        while words and hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command = command.commands[words.pop(0)]
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, line
        action = next((one for one in command.params if one.name == "action"), None)
        if action is not None and words and not words[0].startswith("-"):
            help_text = next(one.help for one in command.params if one.name == "action")
            assert re.search(rf"\b{re.escape(words[0])}\b", help_text), line


# -- what queries name -------------------------------------------------------------------------------------------------


@cache
def exported() -> dict[str, set[str]]:
    """The labels of every series that the processes export, by its name."""
    found: dict[str, set[str]] = {}
    for one in vars(metrics).values():
        if not hasattr(one, "_labelnames"):
            continue
        labels, (family,) = set(one._labelnames), one.describe()
        match family.type:
            case "counter":
                found[family.name + "_total"] = labels
            case "histogram":
                found |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
                found[family.name + "_bucket"] = labels | {"le"}
            case "info":
                found[family.name + "_info"] = {"version", "chain", "source"}
            case _:
                found[family.name] = labels
    for family in metrics.registry.collect():  # those of the process itself
        for sample in family.samples:
            found.setdefault(sample.name, set(sample.labels))
    return found | OF_PROMETHEUS


_SELECTOR = re.compile(r"\b((?:indexer|process|python)_\w+|up|ALERTS)\b(?:\{([^}]*)\})?")


def check_names(where: str, query: str, more: str = "") -> None:
    """Whether every metric, matcher and grouping of the query, and every {{label}} of `more`, is exported."""
    known: set[str] = set(TARGET_LABELS) | set(re.findall(r'label_replace\(.*?, "(\w+)", "\$1"', query))
    selectors = _SELECTOR.findall(re.sub(r'"[^"]*"', '""', query))
    assert selectors, f"{where}: {query}"
    for name, matchers in selectors:
        if name.startswith("process_") and sys.platform != "linux":
            continue  # only there has the process such facts of itself
        assert name in exported(), f"{where}: nothing exports {name}"
        labels = exported()[name] | TARGET_LABELS
        known |= labels
        named = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert named <= labels, f"{where}: {name} has no label {named - labels}"
    for group in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", query):
        named = {label.strip() for label in group.split(",")} - {""}
        assert named <= known, f"{where}: no metric in it has a label {named - known}"
    shown = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", more))
    assert shown <= known, f"{where}: shows {shown - known}"


def test_alerts_name_what_is_exported() -> None:
    for name, rule in rules().items():
        annotations = rule["annotations"]
        check_names(name, rule["expr"], annotations["summary"] + annotations["description"])


def queries() -> Iterator[tuple[str, str, str]]:
    """Panel, query and legend of everything that the dashboard asks."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"], target["legendFormat"]


def test_dashboard_asks_what_is_exported() -> None:
    for title, query, legend in queries():
        check_names(title, query, legend)
    shown = {name for _, query, _ in queries() for name, _ in _SELECTOR.findall(query)}
    parts = re.compile(r"_(total|bucket|sum|count)$")
    ours = {parts.sub("", name) for name in exported() if name.startswith("indexer_")} - {"indexer_info"}
    assert ours <= {parts.sub("", name) for name in shown}, "a metric that nobody would see"


def test_dashboard_asks_what_prometheus_reads(tmp_path: Path) -> None:
    """Each query as a rule of its own, with what Grafana puts in place of its variables."""
    filled = [re.sub(r"\$\w+", ".*", query.replace("$__rate_interval", "5m")) for _, query, _ in queries()]
    recorded = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(filled)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    promtool("check", "rules", tmp_path / "queries.yml")


def test_dashboard_is_one_that_grafana_takes_in() -> None:
    board = dashboard()
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert board["uid"] == "indexer" and variables["datasource"]["type"] == "datasource"
    for one in (variables["chain"], variables["instance"]):
        check_names(one["name"], one["definition"])
    panels = board["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    assert {"Head and lag", "Hooks", "RPC", "Jobs", "Listening"} <= {p["title"] for p in panels if p["type"] == "row"}
    taken = set[tuple[int, int]]()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        asked = set(re.findall(r"\$(\w+)", json.dumps(panel.get("targets", ()))))
        assert asked <= {*variables, "__rate_interval"}, panel["title"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/indexer.yml").read_text())["providers"]
    assert (source["type"], provider["type"]) == ("prometheus", "file")


# -- how much there is of it -------------------------------------------------------------------------------------------


def series(text: str) -> int:
    return sum(1 for line in text.splitlines() if line and not line.startswith("#"))


async def test_there_are_few_series(database_url: str, connection: asyncpg.Connection, tmp_path: Path) -> None:
    """Of a daemon with the usual hooks on two endpoints, and of a sidecar each of whose routes was asked."""
    chain, people = FakeChain(block_seconds=1, final_lag=5), Listeners(1)
    for n in range(30):
        mine(chain, people.plays(3, 1_700_000_000 + n))
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(FakeNode(chain)) for _ in range(2)]
        values = settings(
            database_url, nodes[0].url, span={"max_blocks": 5},
            chain={"endpoints": [{"url": one.url, "name": name} for one, name in zip(nodes, "ab", strict=True)]},
        )  # fmt: skip
        daemon = await stack.enter_async_context(Daemon(tmp_path, values))
        quiet = {"database": {"url": database_url}, "sidecar": {"port": 0}}
        sidecar = await stack.enter_async_context(Sidecar(tmp_path, quiet))
        await daemon.reached(connection, 30)
        chain.fork(2, [[] for _ in range(3)])
        await daemon.reached(connection, 31)
        text = (await daemon.get("metrics"))[1]
        assert 'indexer_cursor_block{chain="main"} 31.0' in text and f'hook="{HOOKS[-1].split(":")[1]}"' in text
        assert 50 < series(text) < 300
        await sidecar.logged("sidecar started")
        _, described = await sidecar.get_json("openapi.json")
        async with aiohttp.ClientSession(await sidecar.url()) as session:
            for path, methods in described["paths"].items():
                for method in methods.keys() & {"get", "post", "put", "patch", "delete"}:
                    async with session.request(method, re.sub(r"\{\w+\}", "1", path)):
                        pass
        text = (await sidecar.get("metrics"))[1]
        routes = set(re.findall(r'indexer_http_seconds_count\{route="([^"]+)"\}', text))
        assert len(routes) >= 10 and "indexer_jobs{" in text
        assert 'indexer_db_pool_connections{state="limit"} 6.0' in text
        assert 50 < series(text) < 300


# -- a real Prometheus -------------------------------------------------------------------------------------------------

# Hooks and jobs that fail when told to. Where they are loaded, clocks run fast.
TROUBLE = """
import asyncio
from contextlib import AsyncExitStack
import indexer.app, indexer.sidecar.upkeep
from indexer import hook
from indexer.sidecar.jobs import Held, job

indexer.app._MONITOR_SECONDS = indexer.sidecar.upkeep._LOOK_SECONDS = 0.2

@hook("picky", listens=["Played"], tables=[])
async def picky(tx, blocks):
    if any(event.args["trackId"] == "666" for block in blocks for event in block.events):
        raise RuntimeError("a play of the beast")

@job("trouble.held")
async def held(context, payload):
    raise Held("look at this")

@job("trouble.closed")
async def closed(context, payload):
    pass

@job("trouble.hog", timeout_seconds=60)
async def hog(context, payload):
    async with AsyncExitStack() as stack:
        for _ in range(payload["connections"]):
            await stack.enter_async_context(context.database.acquire())
        await asyncio.sleep(50)

KINDS = [held, closed, hog]
"""


class Told:
    """A target that exports the processes' metrics by the same names, well first and then not.

    For what no process can be brought to in seconds: providers and routes that fail for long, starts again and again.
    """

    names = ("provider_requests_total", "http_requests_total")

    def __init__(self) -> None:
        self.registry, self.ill, self.scrapes = CollectorRegistry(), False, 0
        self.started = Gauge("process_start_time_seconds", "x", registry=self.registry)
        for name in self.names:
            one = getattr(metrics, name)
            setattr(self, name, type(one)(f"indexer_{name}", "x", one._labelnames, registry=self.registry))

    async def answer(self, _: web.Request) -> web.Response:
        one: Any = self
        self.scrapes += 1
        self.started.set(self.scrapes if self.ill else 0)
        one.provider_requests_total.labels("apify", "timeout" if self.ill else "2xx").inc()
        one.http_requests_total.labels("/api/songs", "5xx" if self.ill else "2xx").inc()
        form = {"Content-Type": "text/plain; version=0.0.4"}
        return web.Response(body=generate_latest(self.registry), headers=form)


@asynccontextmanager
async def served(handler: Any, port: int) -> AsyncIterator[None]:
    application = web.Application()
    application.router.add_get("/metrics", handler)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield
    finally:
        await runner.cleanup()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def hastened(text: str) -> str:
    """The rules with windows and patience of moments; only the day in which a leader was seen stays one."""
    text = re.sub(r"\bfor: \w+", "for: 500ms", text)
    text = re.sub(r"\[\d+[mh]\]", "[3s]", text)
    text = re.sub(r"offset \w+", "offset 3s", text)
    text, count = re.subn(r"(indexer_stalled_seconds\[3s\]\)\)) > 60", r"\1 > 0.7", text)
    assert count == 1
    return text


class Watching:
    """A Prometheus with our configuration, over the given targets by job, and what it says of the alerts."""

    def __init__(self, folder: Path, port: int, targets: dict[str, list[int]]) -> None:
        self.url, self.targets = f"http://127.0.0.1:{port}", targets
        self.fired: dict[str, dict[str, Any]] = {}
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "400ms", "scrape_timeout": "400ms", "evaluation_interval": "200ms"}
        assert [one["job_name"] for one in config["scrape_configs"]] == list(targets)
        for one in config["scrape_configs"]:
            one["static_configs"] = [{"targets": [f"127.0.0.1:{at}" for at in targets[one["job_name"]]]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "alerts.yml").write_text(hastened((PROMETHEUS / "alerts.yml").read_text()))
        self._command = [
            tool("prometheus"), f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'storage'}", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
        ]  # fmt: skip

    async def __aenter__(self) -> Watching:
        quiet = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(*self._command, stdin=quiet, stdout=quiet, stderr=quiet)
        self._session = aiohttp.ClientSession(self.url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        self._process.kill()
        await self._process.wait()

    async def ask(self, what: str) -> Any:
        """An answer of the API, None while it does not serve."""
        assert self._process.returncode is None, "it ended"
        try:
            async with self._session.get(f"/api/v1/{what}") as response:
                return (await response.json())["data"] if response.status == 200 else None
        except aiohttp.ClientError:
            return None

    async def all_well(self) -> bool:
        """Every target answers, its rules were evaluated, and no alert is pending or fires."""
        targets, alerts, groups = [await self.ask(what) for what in ("targets", "alerts", "rules")]
        up = [one["health"] for one in targets["activeTargets"]] if targets else []
        evaluated = groups and all(one["lastEvaluation"][:4] > "0001" for one in groups["groups"])
        return (
            len(up) == sum(map(len, self.targets.values())) and {*up} == {"up"} and evaluated and not alerts["alerts"]
        )

    async def fires(self, names: set[str]) -> bool:
        """Whether all of these have fired by now."""
        for one in (await self.ask("alerts") or {"alerts": []})["alerts"]:
            if one["state"] == "firing":
                self.fired[one["labels"]["alertname"]] = one
        return self.fired.keys() >= names


async def keep_mining(chains: list[FakeChain]) -> None:
    people = Listeners(5)
    while True:
        for chain in chains:
            mine(chain, people.plays(1, 1_700_000_000))
        await asyncio.sleep(0.2)


async def test_a_real_prometheus_fires_every_alert(
    database_url: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    """Two daemons and a sidecar that are well, and no alert; then everything goes wrong, and each of them fires."""
    (tmp_path / "trouble.py").write_text(TROUBLE)
    env = {"PYTHONPATH": str(tmp_path)}
    ports = free_ports(5)
    first_port, second_port, sidecar_port, told_port, own_port = ports
    first_chain, second_chain = [FakeChain(block_seconds=1, final_lag=400) for _ in range(2)]
    told = Told()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        targets = {"indexer": [first_port, second_port], "indexer-sidecar": [sidecar_port, told_port]}
        prometheus = await enter(Watching(tmp_path, own_port, targets))
        await enter(served(told.answer, told_port))
        first_node, second_node = await enter(FakeNode(first_chain)), await enter(FakeNode(second_chain))

        async def followed() -> None:
            """Wait until the first chain is applied to its head."""
            query = "select cursor.hash from indexer.cursor join indexer.chain on chain = id where name = 'first'"
            head = first_chain.head.hash

            async def there() -> bool:
                return bool(await connection.fetchval(query) == head)

            await until(there, "the first chain's head")

        def of(node: FakeNode, port: int, name: str, on_error: str) -> dict[str, Any]:
            hooks = {"enabled": ["hooks.plays:plays", "trouble:picky"], "picky": {"on_error": on_error}}
            return settings(database_url, node.url, chain={"name": name}, http={"port": port}, hooks=hooks)

        first = await enter(Daemon(tmp_path, of(first_node, first_port, "first", "skip"), env=env))
        second = await enter(Daemon(tmp_path, of(second_node, second_port, "second", "halt"), env=env))
        sidecar = await enter(Sidecar(tmp_path, {
            "database": {"url": database_url, "pool_size": 3, "connect_timeout_seconds": 30},
            "sidecar": {"port": sidecar_port, "jobs": ["trouble:KINDS"]},
            "providers": {"songstats": {"monthly_budget": 7}},
        }, env=env))  # fmt: skip
        mining = asyncio.create_task(keep_mining([first_chain, second_chain]))
        stack.callback(mining.cancel)
        for one, event in ((first, "leader acquired"), (second, "leader acquired"), (sidecar, "sidecar started")):
            await one.logged(event)
        await until(prometheus.all_well, "no alert while all is well")
        mining.cancel()

        told.ill = True
        beast = played(("666", *Listeners(6).plays(1, 1_700_000_000)[0][1:]))
        second_chain.mine([beast])
        await followed()
        first_chain.fork(10, [[]] * 10 + [[[beast], [FakeLog(CONTRACT, beast.topics, "0x01")]]])
        await queue.enqueue(connection, "trouble.held", {})
        await queue.enqueue(connection, "nobody.knows", {})
        await connection.execute(
            "update indexer.pgqueuer set execute_after = now() - interval '2 hours' where entrypoint = 'nobody.knows'"
        )
        await gates.close(connection, "trouble.closed", timedelta(hours=1), "a test")
        await connection.execute(
            """
            insert into provider_budgets (provider, month, calls)
            values ('songstats', date_trunc('month', now() at time zone 'utc')::date, 7)
            """
        )
        await connection.execute(
            """
            insert into listeners (spotify_id, refresh_token, last_polled_at, cooling_until)
            values ('a', 'x', now() - interval '2 hours', null), ('b', 'x', now(), now() + interval '1 hour')
            """
        )
        await followed()
        # the head moves once more, but what is in the block is not to be had, and soon nothing is
        first_node.faults.append(http_error(500, None, methods=["eth_getLogs"]))
        mine(first_chain, Listeners(7).plays(1, 1_700_000_000))

        async def behind() -> bool:
            return 'indexer_lag_blocks{chain="first"} 1.0' in (await first.get("metrics"))[1]

        await until(behind, "the first daemon knows of the block")
        first_node.faults.append(http_error(500, None))

        async def fire(*names: str) -> None:
            try:
                await until(lambda: prometheus.fires(set(names)), "the alerts", 20)
            except AssertionError:
                raise AssertionError(f"never fired: {sorted(set(names) - prometheus.fired.keys())}") from None

        await fire("IndexerJobsHeld", "IndexerJobsOld", "IndexerGateClosed", "IndexerHalted")
        await queue.enqueue(connection, "trouble.hog", {"connections": 3})
        await fire(*rules())
        assert await second.ended() == 3

        for name, one in prometheus.fired.items():
            shown = " ".join(one["annotations"].values())
            assert "<error" not in shown and "<no value>" not in shown, shown
            assert one["labels"]["severity"] == rules()[name]["labels"]["severity"]
        labels = {name: one["labels"] for name, one in prometheus.fired.items()}
        assert (labels["IndexerHalted"]["chain"], labels["IndexerHalted"]["hook"]) == ("second", "picky")
        assert labels["IndexerLeaderMissing"]["chain"] == "second"
        assert labels["IndexerTargetDown"]["instance"] == f"127.0.0.1:{second_port}"
        assert labels["IndexerGaps"]["hook"] == "picky" and labels["IndexerLagging"]["chain"] == "first"
        assert labels["IndexerJobsOld"]["kind"] == "other"
        assert labels["IndexerPoolUsedUp"]["instance"] == f"127.0.0.1:{sidecar_port}"
