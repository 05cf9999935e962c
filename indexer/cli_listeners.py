"""The command for people whose listening is archived: how they stand, and reset."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from indexer.cli_jobs import ConfigOption, JsonOption, SecretsOption, on_database
from indexer.errors import UsageError

if TYPE_CHECKING:
    from indexer.db import Connection

app = typer.Typer()

_MADE_BY = "indexer sidecar"


@app.command(epilog="Example: indexer listeners, or: indexer listeners reset 3f6c1f0a-8f5e-4c43-9d9e-0c6f7d0b8a11")
def listeners(
    action: Annotated[str, typer.Argument(help="show, or reset (one person's failures and cool-down).")] = "show",
    which: Annotated[str | None, typer.Argument(metavar="ID", help="For reset: whose.")] = None,
    limit: Annotated[int, typer.Option(help="People in cool-down and plays that are listed.", min=1)] = 20,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """People by state, who cools down, the oldest poll and the latest plays; no names and no e-mails.

    Exit code 1 where somebody must connect anew.
    """
    if action not in ("show", "reset"):
        raise UsageError(f'"{action}" is no action: indexer listeners, or indexer listeners reset ID')
    if (action == "reset") != (which is not None):
        raise UsageError("whose? indexer listeners reset ID" if action == "reset" else "show takes no further words")
    if which is not None:
        _reset(which, as_json, config, secrets)
    on_database(config, secrets, lambda connection: _show(connection, limit, as_json), "people", _MADE_BY)


def _reset(which: str, as_json: bool, config: Path | None, secrets: Path | None) -> None:
    try:
        listener = UUID(which)
    except ValueError:
        raise UsageError("ID must be a UUID, as indexer listeners shows it") from None

    async def work(connection: Connection) -> int:
        from indexer.sidecar.listening import operators

        if not await operators.reset(connection, listener):
            raise UsageError(f"there is nobody with the id {listener}: see indexer listeners")
        typer.echo(json.dumps({"reset": str(listener)}) if as_json else f"reset {listener}: the next batch polls")
        return 0

    on_database(config, secrets, work, "people", _MADE_BY)


async def _show(connection: Connection, limit: int, as_json: bool) -> int:
    from indexer.sidecar.listening import operators
    from indexer.sidecar.listening.service import now

    moment = now()
    found = {
        **await operators.standing(connection, moment),
        "cooling": await operators.cooling(connection, moment, limit),
        "latest_plays": await operators.latest_plays(connection, limit),
    }
    if as_json:
        typer.echo(json.dumps(found, default=_plain))
    else:
        _print(found, moment)
    return 1 if found["disconnected"] else 0


def _print(found: dict[str, Any], moment: datetime) -> None:
    states = ", ".join(f"{found[state]:,} {state.replace('_', ' ')}" for state in
                       ("active", "cooling_down", "rate_limited", "disconnected"))  # fmt: skip
    typer.echo(f"people: {states}")
    typer.echo(f"founding places taken: {found['places_taken']:,}; on the waitlist: {found['waitlist']:,}")
    oldest = found["oldest_poll"]
    typer.echo(f"oldest poll of who is active: {_ago(oldest, moment) if oldest else 'nobody is active'}")
    for one in found["cooling"]:
        wait = f"{one['minutes_left']:.0f} min left" if one["is_active"] else "must connect anew"
        typer.echo(f"  {one['id']}  {one['last_failure_type'] or '-'}  {one['consecutive_failures']} in a row  {wait}")
    if found["latest_plays"]:
        typer.echo("latest plays:")
    for one in found["latest_plays"]:
        typer.echo(f"  {one['played_at']:%Y-%m-%d %H:%M:%S}  {one['listener']}  track {one['track']}")


def _ago(then: datetime, moment: datetime) -> str:
    return f"{max(0.0, (moment - then).total_seconds()) / 60:.0f} min ago"


def _plain(value: Any) -> str:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)
