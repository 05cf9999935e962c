"""The commands that look at how it goes: status, explain, doctor."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from indexer import completion

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer()

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; indexer.toml by default.")]
SecretsOption = Annotated[Path | None, typer.Option("--secrets", help="Folder with one file a secret.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HookOption = Annotated[
    list[str] | None,
    typer.Option("--hook", help="Only this hook; may be given again.", autocompletion=completion.hooks),
]


def _console() -> Console:
    """Standard output: as wide as the terminal, and without breaks in its lines where it is none."""
    from rich.console import Console

    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


@app.command(epilog="Example: indexer status --watch")
def status(
    config: ConfigOption = None,
    secrets: SecretsOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing it until q or Ctrl-C; off a terminal, a line now and then.")
    ] = False,
    every: Annotated[
        float | None,
        typer.Option(
            "--every", min=0.1, max=86_400, help="With --watch: seconds between two looks; 1, and 5 for plain lines."
        ),
    ] = None,
) -> None:
    """Head, cursor, lag, rates, ETA, jobs and gaps per hook, from the database. Exit code 1 where it has no such chain.

    With --watch and --json: a line of JSON for each look.
    """
    from indexer import log
    from indexer.settings_sources import load_settings

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)
    if watch:
        from indexer import watch as watching

        asyncio.run(watching.watch(settings, as_json=as_json, every=every))
        return
    from indexer import status as facts

    raise typer.Exit(0 if asyncio.run(facts.show(settings, _console(), as_json=as_json)) else 1)


@app.command(epilog="Example: indexer explain 19000123 --hook plays --json")
def explain(
    block: Annotated[int, typer.Argument(help="Number of the block.", min=0)],
    hook: HookOption = None,
    limit: Annotated[int, typer.Option(help="Events shown.", min=0)] = 20,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """One block: what was fetched and decoded, which hooks take it, what they do with it, and how long that takes.

    The hooks run in a transaction that is rolled back; a running daemon waits that long.
    """
    from indexer import app as application
    from indexer import db, log
    from indexer import explain as explaining
    from indexer import explain_report as report
    from indexer.settings_sources import load_settings

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)

    async def main() -> dict[str, Any]:
        async with application.opened(settings, ask_node=True) as parts:
            connection = await parts.database.connect()
            try:
                with db.translated():
                    return await explaining.gather(parts, connection, settings.chain, block, hook or (), limit)
            finally:
                with suppress(Exception):
                    await connection.close(timeout=2)

    facts = asyncio.run(main())
    if as_json:
        typer.echo(report.as_json(facts))
    else:
        _console().print(report.render(facts))


@app.command(epilog="Example: indexer doctor --json")
def doctor(
    as_json: JsonOption = False,
    seconds: Annotated[float, typer.Option(help="Time that one check may take.", min=0.1, max=600)] = 10.0,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Check settings, nodes, database and what runs, one by one, and say what to do. It changes nothing.

    Exit code 1 where something fails; warnings are none.
    """
    from indexer import doctor as doctoring

    raise typer.Exit(doctoring.main(config, secrets, seconds, None if as_json else _console()))
