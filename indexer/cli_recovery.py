"""The commands that find what was left out and put it in: replay, gaps, failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from indexer import completion
from indexer.errors import Temporary, UsageError

if TYPE_CHECKING:
    from indexer.app import Parts
    from indexer.replay import Rehearsal, Replayer
    from indexer.segments import Segment

app = typer.Typer()

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; indexer.toml by default.")]
SecretsOption = Annotated[Path | None, typer.Option("--secrets", help="Folder with one file a secret.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HookOption = Annotated[
    list[str] | None,
    typer.Option("--hook", help="Only this hook; may be given again.", autocompletion=completion.hooks),
]

Work = Callable[["Parts", "Replayer"], Awaitable[int]]

_SHOW_SECONDS = 15.0


def _beside(config: Path | None, secrets: Path | None, work: Work, *, ask_node: bool) -> None:
    """Run `work` beside a daemon, on a connection of its own, and exit with the code that it returns."""
    from indexer import app as application
    from indexer import db, follow, log, replay
    from indexer.settings_sources import load_settings

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)

    async def main() -> int:
        async with application.opened(settings, ask_node=ask_node) as parts:
            connection = await parts.database.connect()
            try:
                name = f"{follow.leader_name()} replay"
                replayer = replay.Replayer(connection, parts.chain, parts.hooks, parts.source, name)
                with db.translated():
                    return await work(parts, replayer)
            finally:
                # the right to replay ends with the session: the next command is to find it free
                with suppress(Exception):
                    await connection.close(timeout=2)

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
    """Run blocks through the hooks that have not applied them (beside a running daemon, too).

    Exit code 1 where a hook fails again.
    """

    async def work(parts: Parts, replayer: Replayer) -> int:
        plan = await replayer.plan(first, last, hook or [one.name for one in parts.hooks], force=force)
        if dry_run:
            _print_rehearsal(await replayer.rehearse(plan), as_json)
        else:
            facts = await _carry_out(replayer, plan)
            typer.echo(json.dumps(facts) if as_json else _described(facts))
        return 1 if replayer.failures else 0

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

    async def work(parts: Parts, replayer: Replayer) -> int:
        targets = hook or [one.name for one in parts.hooks]
        replayer.check_names(targets)
        found = await replayer.gaps()
        if fill and any(found[name] for name in targets):
            facts = await _carry_out(replayer, await replayer.plan(None, None, targets))
            if not as_json:
                typer.echo(_described(facts))
            found = await replayer.gaps()
        _print_gaps({name: found[name] for name in targets}, as_json)
        return 1 if any(found[name] for name in targets) else 0

    _beside(config, secrets, work, ask_node=fill)


@app.command(epilog="Example: indexer failures show 7")
def failures(
    action: Annotated[
        str, typer.Argument(help="list, show or retry.", autocompletion=completion.words("list", "show", "retry"))
    ] = "list",
    number: Annotated[int | None, typer.Argument(help="Number of the failure, for show and retry.")] = None,
    every: Annotated[bool, typer.Option("--all", help="With retry: all that are open.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Failures of hooks that nothing has put right yet: list them, show one with its traceback, or try again.

    Exit code 1 where some are (left) open.
    """
    if action not in ("list", "show", "retry"):
        raise UsageError(f'"{action}" is no action: indexer failures list, show NUMBER, retry NUMBER or retry --all')
    if action == "list" and number is not None:
        raise UsageError(f"to see failure {number}: indexer failures show {number}")
    if action != "list" and (number is None) != (action == "retry" and every):
        raise UsageError(f"which failure? indexer failures {action} NUMBER (or retry --all)")

    async def work(parts: Parts, replayer: Replayer) -> int:
        from indexer import ledger

        open_ = await ledger.open_failures(replayer.connection, parts.chain.id)
        if action == "list":
            _print_failures(open_, as_json)
            return 1 if open_ else 0
        if number is not None:
            one = await ledger.failure(replayer.connection, parts.chain.id, number)
            if one is None:
                raise UsageError(f"there is no failure {number}: see indexer failures list")
            if action == "show":
                _print_failure(one, await _events(parts, one), as_json)
                return 0
            open_ = [one]
        return await _retry(replayer, open_, as_json)

    _beside(config, secrets, work, ask_node=action == "retry")


async def _retry(replayer: Replayer, wanted: Sequence[dict[str, Any]], as_json: bool) -> int:
    """Replay the failed blocks for the failed hooks and for those that come after; 1 where something is left."""
    from indexer import ledger

    wanted = [one for one in wanted if one["resolved_at"] is None]
    for one in wanted:
        if one["policy"] == "halt":
            what = f"failure {one['id']} halted the daemon"
            typer.echo(f"{what}: start it, and it tries block {one['first']} again", err=True)
    skips = [one for one in wanted if one["policy"] == "skip"]
    facts = await _carry_out(replayer, await replayer.plan_retry(skips))
    open_ = await ledger.open_failures(replayer.connection, replayer.chain.id)
    left = [one for one in open_ if one["id"] in {one["id"] for one in wanted}]
    if as_json:
        typer.echo(json.dumps({**facts, "open": [one["id"] for one in left]}))
    else:
        typer.echo(_described(facts))
        _print_failures(left, as_json)
    return 1 if left else 0


async def _events(parts: Parts, failure: dict[str, Any]) -> list[dict[str, Any]] | str:
    """What the hook was given in the failed blocks, or why that can't be said."""
    from indexer.pipeline import heard

    hook = next((one.hook for one in parts.hooks if one.name == failure["hook"]), None)
    names = {spec.name for spec in hook.listens} if hook else set()
    found: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(_SHOW_SECONDS):
            if await parts.source.identity() != parts.chain.identity:
                return "the node answers for another chain"
            async for span in parts.source.spans(failure["first"], failure["last"]):
                for block in heard(span.blocks, names) if names else span.blocks:
                    for one in block.events:
                        found.append(
                            {"block": block.number, "index": one.index, "name": one.name, "args": dict(one.args),
                             "address": one.address, "tx_hash": one.tx_hash}
                        )  # fmt: skip
    except (Temporary, TimeoutError):
        return "the node does not answer, so its events can't be shown"
    return found


async def _carry_out(replayer: Replayer, plan: Sequence[Segment]) -> dict[str, Any]:
    """Replay, showing how it goes; returns the sums."""
    from indexer.progress import Bar

    rows = 0
    with Bar("replaying", "replayed", sum(one.last - one.first + 1 for one in plan)) as bar:
        async for applied in replayer.replay(plan):
            rows += sum(applied.written.values())
            bar.add(applied.span.last - applied.span.first + 1, applied.span.events)
    filled = {name for one in plan for name in one.fill}
    derived = [one.name for one in replayer.hooks if one.name in filled and getattr(one.hook, "derived", None)]
    return {**bar.facts, "rows": rows, "failures": [str(one) for one in replayer.failures], "verify": derived}


# -- what is printed -----------------------------------------------------------------------------------------------


def _described(facts: dict[str, Any]) -> str:
    if not facts["planned"]:
        return "nothing to do: all of these blocks are applied (replay --force applies them again)"
    done = f"replayed {facts['blocks']:,} blocks with {facts['events']:,} events: {facts['rows']:,} rows"
    lines = [f"{done} in {facts['seconds']} s", *(f"left out: {one}" for one in facts["failures"])]
    if facts["verify"]:
        # which play was the tenth was said without those that were missing then: that is for a rebuild to mend
        commands = ", ".join(f"indexer verify {name}" for name in facts["verify"])
        lines.append(f"rows that depend on the order of blocks may differ from a run without holes: {commands}")
    return "\n".join(lines)


def _print_rehearsal(found: Rehearsal, as_json: bool) -> None:
    import msgspec

    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
        return
    typer.echo(f"a dry run of {found.blocks:,} blocks with {found.events:,} events; nothing was written")
    for one in found.tables:
        typer.echo(f"{one.table}: {one.inserted:,} inserted, {one.changed:,} changed, {one.deleted:,} deleted")
        for before, after in one.samples:
            if before is not None:
                typer.echo(f"  - {_row(before)}")
            if after is not None:
                typer.echo(f"  + {_row(after)}")
    for text in found.failures:
        typer.echo(f"left out: {text}")
    if not found.tables:
        typer.echo("no row would change")


def _row(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in row.items() if value not in (None, ""))


def _print_gaps(found: dict[str, list[tuple[int, int]]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({name: [list(one) for one in ranges] for name, ranges in found.items()}))
        return
    for name, ranges in found.items():
        blocks = sum(last - first + 1 for first, last in ranges)
        typer.echo(f"{name}: {f'{blocks:,} missing' if blocks else 'nothing missing'}")
        for first, last in ranges:
            typer.echo(f"  {first} to {last} ({last - first + 1:,})" if last > first else f"  {first}")


def _print_failures(found: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found, default=str))
    elif not found:
        typer.echo("no open failures")
    else:
        for one in found:
            what = "halted" if one["policy"] == "halt" else "skipped"
            typer.echo(f"{one['id']}  {what} at block {one['first']}, hook {one['hook']}: {one['error']}")


def _print_failure(one: dict[str, Any], events: list[dict[str, Any]] | str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**one, "events": events if isinstance(events, list) else None}, default=_plain))
        return
    state = f"resolved {one['resolved_at']:%Y-%m-%d %H:%M:%S}" if one["resolved_at"] else "open"
    at = f"block {one['first']}" if one["first"] == one["last"] else f"blocks {one['first']} to {one['last']}"
    typer.echo(f"failure {one['id']} ({state}): hook {one['hook']}, {at}, {one['policy']}, {one['failed_at']}")
    if isinstance(events, str):
        typer.echo(events)
    else:
        typer.echo(f"{len(events)} events")
        for event in events:
            typer.echo(f"  {event['block']}/{event['index']} {event['name']}: {_row(event['args'])}")
    typer.echo(one["traceback"].rstrip())


def _plain(value: Any) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)
