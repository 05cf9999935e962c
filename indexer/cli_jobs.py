"""The sidecar's commands: sidecar itself, and jobs, by which operators look at the queue and act on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from indexer import completion
from indexer.errors import UsageError

if TYPE_CHECKING:
    from indexer.db import Connection

app = typer.Typer()

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; indexer.toml by default.")]
SecretsOption = Annotated[Path | None, typer.Option("--secrets", help="Folder with one file a secret.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_ACTIONS = ("list", "show", "requeue", "cancel", "hold", "gates", "open")

@app.command(epilog="Example: indexer sidecar --config indexer.toml")
def sidecar(config: ConfigOption = None, secrets: SecretsOption = None) -> None:
    """Work off jobs and serve their API until SIGTERM or Ctrl-C; what runs then is given time to end."""
    from indexer import app as application
    from indexer import log
    from indexer.settings_sources import load_settings
    from indexer.sidecar import app as beside

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)
    stop_seconds = application.STOP_SECONDS + settings.sidecar.drain_seconds + beside.CANCEL_SECONDS
    raise typer.Exit(application.serve(lambda: beside.run(settings), stop_seconds))


@app.command(epilog="Example: indexer jobs requeue 17 18, or: indexer jobs list --state held --json")
def jobs(
    action: Annotated[
        str,
        typer.Argument(
            help="list, show, requeue, cancel, hold, gates, or open (a gate).",
            autocompletion=completion.words(*_ACTIONS),
        ),
    ] = "list",
    which: Annotated[list[str] | None, typer.Argument(help="Numbers of jobs; for open: the kind.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="Only jobs of this kind.", autocompletion=completion.kinds)
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="Only waiting, running, held or unfinal ones.",
            autocompletion=completion.words("waiting", "running", "held", "unfinal"),
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="With requeue: all held jobs (of the kind).")] = False,
    reason: Annotated[str, typer.Option(help="With hold: why, for those who come after.")] = "held by an operator",
    limit: Annotated[int, typer.Option(help="Jobs listed.", min=1)] = 50,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Jobs of the sidecar: list them, show one with its errors, hold, requeue or cancel some; gates that are closed.

    Exit code 1 where list finds held jobs, gates a closed one, and where not all that were named could be had.
    """
    from indexer.sidecar import gates, operations

    if action not in _ACTIONS:
        raise UsageError(f'"{action}" is no action: indexer jobs {", ".join(_ACTIONS)}')
    if state is not None and state not in operations.STATES:
        raise UsageError(f'"{state}" is no state: {", ".join(operations.STATES)}')
    given = which or []
    if action in ("list", "gates") and given:
        raise UsageError(f"indexer jobs {action} takes no further words; to see one job: indexer jobs show NUMBER")
    if action == "open" and len(given) != 1:
        raise UsageError("which gate? indexer jobs open KIND (see indexer jobs gates)")
    numbers = _numbers(given, action, every) if action not in ("list", "gates", "open") else []

    async def work(connection: Connection) -> int:
        if action == "list":
            found = await operations.list_jobs(connection, kind, state, limit)
            _print_jobs(found, as_json)
            return 1 if any(one["state"] == "held" for one in found) else 0
        if action == "show":
            return _print_job(await operations.find_job(connection, numbers[0]), numbers[0], as_json)
        if action == "gates":
            closed = await gates.standing(connection)
            _print_gates(closed, as_json)
            return 1 if closed else 0
        if action == "open":
            opened = await gates.open_(connection, given[0])
            _print_done("opened", int(opened), 1, as_json)
            return 0 if opened else 1
        return await _act(connection, action, numbers, every, kind, reason, as_json)

    on_database(config, secrets, work, "jobs")


def _numbers(given: Sequence[str], action: str, every: bool) -> list[int]:
    """The jobs that are named; raises UsageError where none is, or what is no number."""
    if not all(text.isdecimal() for text in given):
        raise UsageError(f"jobs are named by number: indexer jobs {action} NUMBER (see indexer jobs list)")
    if action == "show" and len(given) != 1:
        raise UsageError("which job? indexer jobs show NUMBER")
    if bool(given) == (every and action == "requeue"):
        raise UsageError(f"which jobs? indexer jobs {action} NUMBER ... (or requeue --all)")
    return [int(text) for text in given]


async def _act(
    connection: Connection, action: str, numbers: list[int], every: bool, kind: str | None, reason: str, as_json: bool
) -> int:
    from indexer.sidecar import operations

    if every:
        numbers = await operations.held(connection, kind)
    if action == "requeue":
        done, word = await operations.requeue(connection, numbers), "requeued"
    elif action == "cancel":
        done, word = await operations.cancel(connection, numbers), "cancelled"
    else:
        done, word = await operations.hold(connection, numbers, reason), "held"
    _print_done(word, done, len(numbers), as_json)
    return 0 if done == len(set(numbers)) else 1


def on_database(
    config: Path | None, secrets: Path | None, work: Callable[[Connection], Awaitable[int]], what: str,
    made_by: str = "indexer migrate",
) -> NoReturn:  # fmt: skip
    """Run `work` on a connection of its own, and exit with the code that it returns.

    `what` its tables hold, and which command makes them, are said where there are none.
    """
    import asyncpg

    from indexer import app as application
    from indexer import db, log
    from indexer.settings_sources import load_settings

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)

    async def main() -> int:
        async with application.open_database(settings, pool=False) as database:
            connection = await database.connect()
            try:
                with db.translated():
                    return await work(connection)
            except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                raise UsageError(f"this database has no {what} yet: {made_by} makes its tables") from None
            finally:
                connection.terminate()

    raise typer.Exit(asyncio.run(main()))


# -- what is printed -----------------------------------------------------------------------------------------------


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, default=lambda one: one.isoformat()))


def _print_jobs(found: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        return _json(found)
    if not found:
        typer.echo("no jobs")
    for one in found:
        key = f"  key {one['key']}" if one["key"] else ""
        where = f"  block {one['block']}" if one.get("block") is not None else ""
        tries = f"  tried {one['attempts']} times" if one["attempts"] else ""
        number = one["id"] if one["id"] is not None else "-"
        due = f"{one['due']:%Y-%m-%d %H:%M:%S}"
        typer.echo(f"{number}  {one['state']}  {one['kind']}  priority {one['priority']}  due {due}{key}{tries}{where}")
    return None


def _print_job(one: dict[str, Any] | None, number: int, as_json: bool) -> int:
    if one is None:
        raise UsageError(f"there is no job {number}: see indexer jobs list")
    if as_json:
        _json(one)
        return 0
    typer.echo(f"job {one['id']} ({one['state']}): {one['kind']}")
    for name in ("key", "priority", "attempts", "created", "due", "heartbeat", "payload"):
        if one.get(name) is not None:
            typer.echo(f"  {name}: {json.dumps(one[name]) if name == 'payload' else one[name]}")
    for line in one["log"]:
        error = line["error"]
        said = f": {error['exception_type']}: {error['exception_message']}" if error else ""
        typer.echo(f"{line['at']:%Y-%m-%d %H:%M:%S}  {line['status']}{said}")
        if error and error.get("traceback"):
            typer.echo(error["traceback"].rstrip())
    return 0


def _print_gates(closed: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        return _json(closed)
    if not closed:
        typer.echo("no gate is closed")
    for one in closed:
        typer.echo(f"{one['kind']}  closed for {one['seconds_left']:.0f} s more: {one['reason']}")
    return None


def _print_done(word: str, done: int, wanted: int, as_json: bool) -> None:
    if as_json:
        return _json({word: done, "of": wanted})
    typer.echo(f"{word} {done} of {wanted}")
    return None
