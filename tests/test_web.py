"""Probes, metrics, status.json and page of a daemon that runs: over HTTP, from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import Daemon, history, mine, settings, until
from prometheus_client.parser import text_string_to_metric_families

from indexer.demochain import Listeners
from indexer.fakechain import FakeNode, slow

pytestmark = pytest.mark.timeout(90)

# What operators rely on; names are fixed, labels bounded: never a contract, a track or a person.
ENGINE = {
    "info", "head_block", "final_block", "cursor_block", "lag_blocks", "lag_seconds", "leader", "halted",
    "blocks_total", "events_total", "spans_total", "rows_total", "span_seconds", "hook_seconds",
    "hook_failures_total", "gap_blocks", "quarantined_total", "skipped_total", "stalled_seconds",
    "rpc_requests_total", "rpc_seconds", "rpc_range_blocks", "endpoint_healthy", "db_pool_connections",
}  # fmt: skip
LATER = {
    "reorgs_total", "reorg_depth", "journal_rows", "jobs", "job_oldest_seconds", "job_seconds", "job_outcomes_total",
    "provider_requests_total", "provider_seconds", "provider_budget_remaining", "listeners",
    "listener_oldest_poll_seconds", "play_events_total", "listener_failures_total", "token_refreshes_total",
    "gate_closed", "http_requests_total", "http_seconds",
}  # fmt: skip
LABELS = {
    "chain", "hook", "stage", "table", "op", "policy", "reason", "on", "endpoint", "method", "outcome", "state", "kind",
    "provider", "status", "route", "version", "source", "le", "type",
    "implementation", "major", "minor", "patchlevel",  # of Python itself
}  # fmt: skip


async def samples(daemon: Daemon) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All of /metrics, by name and labels."""
    status, body = await daemon.get("metrics")
    assert status == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
    }


async def test_pages_of_a_daemon_at_the_head(connection: asyncpg.Connection, database_url: str, tmp_path: Path) -> None:
    chain, plays = history(100)
    async with FakeNode(chain) as node, Daemon(tmp_path, settings(database_url, node.url)) as daemon:
        await daemon.reached(connection, 100)
        assert await daemon.get_json("livez") == (200, {"live": True})
        status, ready = await daemon.get_json("readyz")
        assert (status, ready["ready"], ready["role"], ready["lag_blocks"]) == (200, True, "leader", 0)
        await check_status(daemon, len(plays))
        await check_page(daemon)
        await check_metrics(daemon, connection)
        assert (await daemon.get("nothing"))[0] == 404


async def check_status(daemon: Daemon, plays: int) -> None:
    async def gaps_known() -> Any:
        return (await daemon.get_json("status.json"))[1]["gaps"]

    await until(gaps_known, "the first look at the gaps")
    status, facts = await daemon.get_json("status.json")
    assert status == 200
    wanted = {
        "chain": "main", "role": "leader", "start_block": 0, "head": 100, "final": 60, "cursor": 100, "lag_blocks": 0,
        "lag_seconds": 0, "stalled_seconds": 0, "blocks": 101, "events": plays, "eta_seconds": 0, "failures": [],
    }  # fmt: skip
    assert {name: facts[name] for name in wanted} == wanted
    assert facts["gaps"] == {"plays": [], "aggregates": [], "milestones": []}
    assert [(one["name"], one["healthy"]) for one in facts["endpoints"]] == [("node", True)]
    panels = {one["title"]: one for one in facts["panels"]}
    assert set(panels) == {"Top tracks", "Last milestones"}
    assert panels["Top tracks"]["columns"] == ["track", "plays"] and len(panels["Top tracks"]["rows"]) == 10


async def check_page(daemon: Daemon) -> None:
    status, page = await daemon.get("")
    assert status == 200 and page.lower().startswith("<!doctype html>")
    assert "status.json" in page and "://" not in page.replace("http://www.w3.org/2000/svg", "")


async def check_metrics(daemon: Daemon, connection: asyncpg.Connection) -> None:
    _, body = await daemon.get("metrics")
    names = {
        line.split()[2].removeprefix("indexer_") for line in body.splitlines() if line.startswith("# TYPE indexer_")
    }
    assert names >= ENGINE, ENGINE - names
    assert names <= ENGINE | LATER | {f"{name.removesuffix('_total')}_created" for name in ENGINE | LATER}
    found = await samples(daemon)
    assert len(found) < 300
    assert {name for _, labels in found for name, _ in labels} <= LABELS | {
        "implementation",
        "major",
        "minor",
        "patchlevel",
    }
    main = ("chain", "main")
    rows = await connection.fetchval("select count(*) from plays")
    for name, value, *labels in (
        ("head_block", 100, main), ("final_block", 60, main), ("cursor_block", 100, main), ("lag_blocks", 0, main),
        ("leader", 1, main), ("blocks_total", 101, main), ("endpoint_healthy", 1, ("endpoint", "node")),
        ("rows_total", rows, ("table", "plays"), ("op", "inserted")), ("gap_blocks", 0, ("hook", "plays")),
        ("skipped_total", 5, ("hook", "plays"), ("reason", "track_id")),
    ):  # fmt: skip
        assert found[f"indexer_{name}", frozenset(labels)] == value, name


async def test_a_stalled_daemon_fails_its_liveness_until_it_moves(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    """The head moves, but the node hangs where the logs are asked for."""
    chain, _ = history(30)
    async with FakeNode(chain) as node:
        values = settings(
            database_url, node.url, http={"stall_seconds": 1.5}, chain={"request_timeout_seconds": 1.0}
        )  # fmt: skip
        async with Daemon(tmp_path, values) as daemon:
            await daemon.reached(connection, 30)
            node.faults.append(slow(60, None, methods=["eth_getLogs"]))
            mine(chain, Listeners(1).plays(3, 1_700_000_000))

            async def stalled() -> bool:
                return (await daemon.get("livez"))[0] == 503

            await until(stalled, "/livez fails")
            told = await daemon.logged("stalled")
            assert told["on"] == "fetch" and "follow.py" in told["tasks"]["follow"]
            live = (await daemon.get_json("livez"))[1]
            assert live["live"] is False and live["reason"].endswith("waiting on fetch")
            status, ready = await daemon.get_json("readyz")
            assert (status, ready["ready"], ready["reason"], ready["lag_blocks"]) == (503, False, "stalled", 1)
            facts = (await daemon.get_json("status.json"))[1]
            assert facts["stalled_seconds"] >= 1.5 and facts["head"] == 31
            node.faults.clear()
            await daemon.reached(connection, 31)
            assert (await daemon.get("livez"))[0] == (await daemon.get("readyz"))[0] == 200
            assert await daemon.stop() == 0
