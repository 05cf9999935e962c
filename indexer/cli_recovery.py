"""The commands that find what was left out and put it in: replay, gaps, failures."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from indexer.errors import UsageError

if TYPE_CHECKING:
    from indexer.app import Parts
    from indexer.db import Connection
    from indexer.replay import Rehearsal, Replayer, Segment

app = typer.Typer()

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; indexer.toml by default.")]
SecretsOption = Annotated[Path | None, typer.Option("--secrets", help="Folder with one file a secret.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HookOption = Annotated[list[str] | None, typer.Option("--hook", help="Only this hook; may be given again.")]

Work = Callable[["Parts", "Replayer", "Connection"], Awaitable[int]]


def _beside(config: Path | None, secrets: Path | None, work: Work, *, ask_node: bool) -> None:
    """Run `work` beside a daemon, on a connection of its own, and exit with the code that it returns."""
    from indexer import app as application
    from indexer import follow, log, replay
    from indexer.settings_sources import load_settings

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)

    async def main() -> int:
        async with application.opened(settings, ask_node=ask_node) as parts:
            connection = await parts.database.connect()
            try:
                name = f"{follow.leader_name()} replay"
                replayer = replay.Replayer(connection, parts.chain, parts.hooks, parts.source, name)
                return await work(parts, replayer, connection)
            finally:
                connection.terminate()

    raise typer.Exit(asyncio.run(main()))


@app.command(epilog="Example: indexer replay 19000000 19001000 --hook aggregates --dry-run")
def replay(
    first: Annotated[int, typer.Argument(help="First block.")],
    last: Annotated[int, typer.Argument(help="Last block.")],
    hook: HookOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Roll back, and print what would change.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also blocks that the hook has applied already.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Run blocks through the hooks that have not applied them (beside a running daemon, too)."""

    async def work(parts: Parts, replayer: Replayer, connection: Connection) -> int:
        targets = hook or [one.name for one in parts.hooks]
        plan = await replayer.plan(first, last, targets, force=force)
        if dry_run:
            _print_rehearsal(await replayer.rehearse(plan), as_json)
        else:
            await _carry_out(replayer, plan, as_json)
        return 0

    _beside(config, secrets, work, ask_node=True)


@app.command(epilog="Example: indexer gaps --fill")
def gaps(
    fill: Annotated[bool, typer.Option("--fill", help="Replay the blocks that are missing.")] = False,
    hook: HookOption = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Blocks that a hook has not applied, per hook. Exit code 1 where there are some (left)."""

    async def work(parts: Parts, replayer: Replayer, connection: Connection) -> int:
        from indexer import ledger

        targets = hook or [one.name for one in parts.hooks]
        found = await ledger.gaps(connection, parts.chain.id)
        missing = [one for name in targets for one in found.get(name, [])]
        if fill and missing:
            low, high = min(first for first, _ in missing), max(last for _, last in missing)
            await _carry_out(replayer, await replayer.plan(low, high, targets, force=False), as_json)
            found = await ledger.gaps(connection, parts.chain.id)
        _print_gaps({name: found.get(name, []) for name in targets}, as_json)
        return 1 if any(found.get(name) for name in targets) else 0

    _beside(config, secrets, work, ask_node=fill)


@app.command(epilog="Example: indexer failures show 7")
def failures(
    action: Annotated[str, typer.Argument(help="list, show or retry.")] = "list",
    number: Annotated[int | None, typer.Argument(help="Number of the failure, for show and retry.")] = None,
    every: Annotated[bool, typer.Option("--all", help="With retry: all that are open.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Failures of hooks that nothing has put right yet: list them, show one with its traceback, or try again."""
    if action not in ("list", "show", "retry"):
        raise UsageError(f'"{action}" is no action: indexer failures list, show NUMBER, retry NUMBER or retry --all')
    if action != "list" and number is None and not every:
        raise UsageError(f"which failure? indexer failures {action} NUMBER (or retry --all)")

    async def work(parts: Parts, replayer: Replayer, connection: Connection) -> int:
        from indexer import ledger

        open_ = await ledger.open_failures(connection, parts.chain.id)
        if action == "list":
            _print_failures(open_, as_json)
            return 1 if open_ else 0
        if number is not None:
            one = await ledger.failure(connection, parts.chain.id, number)
            if one is None:
                raise UsageError(f"there is no failure {number}: see indexer failures list")
            if action == "show":
                _print_failure(one, as_json)
                return 0
            open_ = [one]
        return await _retry(parts, replayer, connection, open_, as_json)

    _beside(config, secrets, work, ask_node=action == "retry")


async def _retry(
    parts: Parts, replayer: Replayer, connection: Connection, wanted: Sequence[dict[str, Any]], as_json: bool
) -> int:
    """Replay the failed blocks for the failed hook and for those that come after it; 1 where something is left."""
    from indexer import ledger

    for one in wanted:
        if one["policy"] == "halt":
            what = f"failure {one['id']} halted the daemon"
            typer.echo(f"{what}: the daemon itself tries block {one['first']} again", err=True)
            continue
        targets = [one["hook"], *(later.name for later in parts.hooks if one["hook"] in later.hook.after)]
        await _carry_out(replayer, await replayer.plan(one["first"], one["last"], targets, force=False), as_json)
    left = {one["id"] for one in await ledger.open_failures(connection, parts.chain.id)}
    return 1 if left & {one["id"] for one in wanted} else 0


async def _carry_out(replayer: Replayer, plan: Sequence[Segment], as_json: bool) -> None:
    """Replay with a bar on a terminal, and a line every other second elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(one.last - one.first + 1 for one in plan)
    started = said = time.monotonic()
    blocks = events = rows = 0
    console = Console(stderr=True)
    rate_column = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), rate_column, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=total, rate="")
        async for applied in replayer.replay(plan):
            blocks += applied.span.last - applied.span.first + 1
            events += applied.span.events
            rows += sum(applied.written.values())
            seconds = max(time.monotonic() - started, 0.001)
            rate = f"{blocks / seconds:,.0f} blocks/s  {events / seconds:,.0f} events/s"
            bar.update(task, completed=blocks, rate=rate)
            if not console.is_terminal and time.monotonic() - said > 2:
                said = time.monotonic()
                eta = (total - blocks) * seconds / blocks
                print(f"replayed {blocks:,} of {total:,} blocks  {rate}  ETA {eta:,.0f} s", file=sys.stderr, flush=True)
    facts = {"blocks": blocks, "events": events, "rows": rows, "seconds": round(time.monotonic() - started, 3)}
    if as_json:
        typer.echo(json.dumps(facts))
    elif total == 0:
        typer.echo("nothing to do: every block of the range is applied (--force applies it again)")
    else:
        typer.echo(f"replayed {blocks:,} blocks with {events:,} events: {rows:,} rows in {facts['seconds']} s")


def _print_rehearsal(found: Sequence[Rehearsal], as_json: bool) -> None:
    import msgspec

    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    if not found:
        typer.echo("nothing would change")
    for one in found:
        typer.echo(f"{one.table}: {one.inserted:,} inserted, {one.changed:,} changed, {one.deleted:,} deleted")
        for before, after in one.samples:
            if before is not None:
                typer.echo(f"  - {_row(before)}")
            if after is not None:
                typer.echo(f"  + {_row(after)}")


def _row(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in row.items() if value not in (None, ""))


def _print_gaps(found: dict[str, list[tuple[int, int]]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({name: [list(one) for one in ranges] for name, ranges in found.items()}))
        return
    for name, ranges in found.items():
        blocks = sum(last - first + 1 for first, last in ranges)
        typer.echo(f"{name}: {f'{blocks:,} blocks missing' if blocks else 'nothing missing'}")
        for first, last in ranges:
            typer.echo(f"  {first} to {last} ({last - first + 1:,} blocks)" if last > first else f"  {first}")


def _print_failures(found: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, default=str))
    elif not found:
        typer.echo("no open failures")
    else:
        for one in found:
            what = "halted" if one["policy"] == "halt" else "skipped"
            typer.echo(f"{one['id']}  {what} at block {one['first']}, hook {one['hook']}: {one['error']}")


def _print_failure(one: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(one, default=str))
        return
    state = f"resolved {one['resolved_at']:%Y-%m-%d %H:%M:%S}" if one["resolved_at"] else "open"
    blocks = f"blocks {one['first']} to {one['last']}"
    typer.echo(f"failure {one['id']} ({state}): hook {one['hook']}, {blocks}, {one['policy']}")
    typer.echo(one["traceback"])
