"""`indexer status`: what the database knows of the daemon's progress, whether one runs or not."""

from __future__ import annotations

import json
import time
from typing import Any

import asyncpg
from rich.console import Console
from rich.table import Table

from indexer import ledger, queue
from indexer.app import open_database
from indexer.config import Settings
from indexer.db import Connection, is_led, sidecars, standbys, translated


async def facts(connection: Connection, chain_name: str) -> dict[str, Any] | None:
    """The facts of one chain, ready for JSON; None where the database does not know it (yet).

    `sidecars` and `jobs` are those of the whole database.
    """
    try:
        row = await ledger.standing(connection, chain_name)
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return None
    if row is None:
        return None
    try:
        jobs = await queue.depth(connection)
    except asyncpg.UndefinedTableError:  # not migrated so far
        jobs = []
    gaps = await ledger.gaps(connection, row["id"])
    failures = await ledger.open_failures(connection, row["id"])
    head = row["head"] if row["head"] is not None else row["cursor"]
    lag_blocks = max(0, head - row["cursor"])
    block_time = row["block_time"].timestamp() if row["block_time"] else None
    speed = row["blocks_per_second"]
    running = await is_led(connection, row["id"])
    return {
        "chain": row["name"], "chain_id": row["identity"], "source": row["source"], "start_block": row["start_block"],
        "running": running, "leader": row["leader"], "seen_seconds_ago": round(row["seen_seconds_ago"], 1),
        "standbys": await standbys(connection, row["id"]), "sidecars": await sidecars(connection),
        "head": row["head"], "final": row["final"], "cursor": row["cursor"],
        "lag_blocks": lag_blocks,
        "lag_seconds": round(max(0.0, time.time() - block_time), 1) if lag_blocks and block_time else 0.0,
        "blocks_per_second": round(speed, 1) if running else 0.0,
        "events_per_second": round(row["events_per_second"], 1) if running else 0.0,
        "eta_seconds": 0.0 if not lag_blocks else round(lag_blocks / speed, 1) if running and speed > 0 else None,
        "hooks": {
            hook: {"gap_blocks": sum(last - first + 1 for first, last in ranges), "gaps": [list(r) for r in ranges]}
            for hook, ranges in gaps.items()
        },
        "failures": [
            {**one, "failed_at": one["failed_at"].isoformat(timespec="seconds")} for one in failures
        ],
        "jobs": [
            {"kind": one.kind, "state": one.state, "jobs": one.jobs, "oldest_seconds": round(one.seconds, 1)}
            for one in jobs
        ],
    }  # fmt: skip


def render(found: dict[str, Any] | None, chain_name: str) -> Table:
    """The facts as a table for people."""
    table = Table.grid(padding=(0, 2))
    if found is None:
        table.add_row(f"nothing of chain {chain_name} here yet: start it with `indexer run`")
        return table
    state = f"led by {found['leader']}" if found["running"] else "no daemon runs"
    if found["standbys"]:
        state += f", {found['standbys']} standing by"
    table.add_row("chain", f"{found['chain']} ({found['source']} {found['chain_id']}), {state}")
    table.add_row("head", f"{number(found['head'])}, final {number(found['final'])}")
    table.add_row("cursor", f"{number(found['cursor'])}, started at {number(found['start_block'])}")
    table.add_row("lag", f"{number(found['lag_blocks'])} blocks, {duration(found['lag_seconds'])}")
    table.add_row("rate", f"{found['blocks_per_second']:,} blocks/s, {found['events_per_second']:,} events/s")
    table.add_row("ETA", "at the head" if not found["lag_blocks"] else duration(found["eta_seconds"]))
    for hook, gaps in found["hooks"].items():
        shown = ", ".join(f"{first}-{last}" for first, last in gaps["gaps"][:5])
        more = f" and {len(gaps['gaps']) - 5} more" if len(gaps["gaps"]) > 5 else ""
        table.add_row(f"gaps of {hook}", f"{gaps['gap_blocks']:,} blocks: {shown}{more}" if shown else "none")
    if found["jobs"]:
        table.add_row("jobs", ", ".join(f"{one['jobs']:,} {one['kind']} {one['state']}" for one in found["jobs"]))
    for one in found["failures"]:
        what = "halted" if one["policy"] == "halt" else "skipped"
        table.add_row(what, f"block {one['first']}, hook {one['hook']}: {one['error']}")
    return table


def number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def line(found: dict[str, Any] | None, chain_name: str) -> str:
    """The facts in one line, for logs and pipes."""
    if found is None:
        return f"chain {chain_name} is not in this database (yet)"
    parts = [
        f"{found['chain']} {'led by ' + found['leader'] if found['running'] else 'no daemon runs'}",
        f"head {number(found['head'])}", f"cursor {number(found['cursor'])}",
        f"lag {number(found['lag_blocks'])} blocks {duration(found['lag_seconds'])}",
        f"{found['blocks_per_second']:,} blocks/s", f"{found['events_per_second']:,} events/s",
        "at the head" if not found["lag_blocks"] else f"ETA {duration(found['eta_seconds'])}",
        f"holes {sum(one['gap_blocks'] for one in found['hooks'].values()):,}",
        f"failures {len(found['failures']):,}",
        f"jobs {sum(one['jobs'] for one in found['jobs']):,}",
    ]  # fmt: skip
    return "  ".join(parts)


async def show(settings: Settings, console: Console, *, as_json: bool) -> bool:
    """Print the facts; False where there are none."""
    async with open_database(settings, pool=False) as database:
        connection = await database.connect()
        try:
            with translated():
                found = await facts(connection, settings.chain.name)
        finally:
            connection.terminate()
    if as_json:
        print(json.dumps(found))
    else:
        console.print(render(found, settings.chain.name))
    return found is not None
