"""The command line. Every error is one line on stderr that says what to do, and an exit code that means something."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from indexer import cli_chain, cli_jobs, cli_keys, cli_listeners, cli_operate, cli_recovery, completion
from indexer.errors import HookLoadError, IndexerError

if TYPE_CHECKING:
    from indexer.config import Settings
    from indexer.db import Connection
    from indexer.registry import Registered
    from indexer.settings_sources import Loaded

T = TypeVar("T")

app = typer.Typer(
    name="indexer",
    help="Follows a chain's blocks and runs your hooks on them inside one Postgres transaction.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done or stopped as asked, 1 found what it looks for, 2 usage or settings, "
    "3 halted by a hook, 75 temporary: try again.",
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; indexer.toml in this folder if it is there.")
]
SecretsOption = Annotated[Path | None, typer.Option("--secrets", help="Folder with one file a secret: database__url.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from indexer.version import version as number

        typer.echo(number())
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.Exit(2)


def _load(config: Path | None, secrets: Path | None) -> Loaded:
    from indexer import log
    from indexer.settings_sources import load_settings

    loaded = load_settings(config, secrets)
    log.configure(loaded.settings.log)
    return loaded


@app.command(epilog="Example: indexer run --config indexer.toml")
def run(
    config: ConfigOption = None,
    secrets: SecretsOption = None,
    from_file: Annotated[
        Path | None, typer.Option("--from-file", help="Index a recorded file to its end instead, and stop there.")
    ] = None,
    with_sidecar: Annotated[
        bool, typer.Option("--with-sidecar", help="Work off jobs and serve their API in the same process.")
    ] = False,
) -> None:
    """Follow the chain until SIGTERM or Ctrl-C."""
    from indexer import app as application
    from indexer import progress

    settings = _load(config, secrets).settings
    if from_file is not None:
        chain = settings.chain.model_copy(update={"source": "recorded", "file": from_file})
        settings = settings.model_copy(update={"chain": chain})
    beside, stop_seconds = None, application.STOP_SECONDS
    if with_sidecar:
        from indexer.sidecar import app as sidecar

        beside = application.Beside(sidecar.sidecar_lines(), sidecar.beside)
        stop_seconds += settings.sidecar.drain_seconds + sidecar.CANCEL_SECONDS
    to_end = from_file is not None
    with progress.shown(settings.log) as started:
        code = application.serve(
            lambda: application.run(settings, started=started, to_end=to_end, beside=beside), stop_seconds
        )
    raise typer.Exit(code)


@app.command(epilog="Example: indexer migrate --dry-run")
def migrate(
    config: ConfigOption = None,
    secrets: SecretsOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be applied.")] = False,
) -> None:
    """Bring the database's schema up to date (run does it too, at its start)."""
    from indexer import app as application
    from indexer import registry

    settings = _load(config, secrets).settings
    more: list[tuple[str, Path]] = []
    if "sidecar" in settings.model_fields_set:
        from indexer.sidecar import app as sidecar

        more = sidecar.sidecar_lines()

    async def main() -> list[str]:
        hooks = registry.load_hooks(settings.hooks)
        async with application.open_database(settings, pool=False) as database:
            return await application.migrate_database(database, hooks, more, dry_run=dry_run)

    names = asyncio.run(main())
    for name in names:
        typer.echo(f"{'would apply' if dry_run else 'applied'} {name}")
    if not names:
        typer.echo("nothing to apply: the schema is up to date")


@app.command("config", epilog="Example: indexer config --json")
def show_config(config: ConfigOption = None, secrets: SecretsOption = None, as_json: JsonOption = False) -> None:
    """The effective settings, secrets masked, and where each came from."""
    from rich.console import Console

    from indexer import config_report

    loaded = _load(config, secrets)
    if as_json:
        typer.echo(json.dumps(config_report.as_json(loaded), indent=2))
    else:
        Console(soft_wrap=not sys.stdout.isatty()).print(config_report.render(loaded))


@app.command(epilog="Example: indexer demo --seconds 30")
def demo(
    seconds: Annotated[float | None, typer.Option(help="End by itself after so long; Ctrl-C by default.")] = None,
    chain: Annotated[
        str,
        typer.Option(
            help="anvil, simulated, or auto: anvil where it is at hand.",
            autocompletion=completion.words("anvil", "simulated", "auto"),
        ),
    ] = "auto",
    network: Annotated[
        str | None,
        typer.Option(
            help="audius: follow the public Open Audio chain.", autocompletion=completion.words("audius")
        ),
    ] = None,
    rpc: Annotated[str | None, typer.Option(help="Follow this node instead of a local chain.")] = None,
    contract: Annotated[str | None, typer.Option(help="With --rpc: address of a PlayRegistry contract.")] = None,
    start_block: Annotated[
        int | None, typer.Option(help="Of a real chain: first block; a recent one by default.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Keep the database here; a temporary one by default.")] = None,
    port: Annotated[int, typer.Option(help="Port of the status page; 0 takes a free one.")] = 9464,
) -> None:
    """The whole thing on this machine: an embedded Postgres, a local chain, plays arriving, a page to look at."""
    from indexer import demo as demonstration

    options = demonstration.Options(seconds, chain, rpc, contract, start_block, data_dir, port, network)
    raise typer.Exit(demonstration.main(options))


@app.command(epilog="Example: indexer verify aggregates --json")
def verify(
    hook: Annotated[
        str, typer.Argument(help="The hook whose derived tables are compared.", autocompletion=completion.hooks)
    ],
    samples: Annotated[int, typer.Option(help="Rows shown of each kind of difference.", min=0)] = 5,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Compare a hook's derived tables with what their base tables say. Exit code 1 where they differ."""
    from indexer import rebuild as derivation

    found = _on_database(
        _load(config, secrets).settings,
        lambda connection, hooks: derivation.verify(connection, hooks, hook, samples=samples, say=_progress),
    )
    typer.echo(derivation.as_json(found) if as_json else derivation.describe(found))
    raise typer.Exit(0 if found.equal else 1)


@app.command(epilog="Example: indexer rebuild aggregates --dry-run")
def rebuild(
    hook: Annotated[
        str, typer.Argument(help="The hook whose derived tables are put right.", autocompletion=completion.hooks)
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do all of it, and roll back.")] = False,
    only_ours: Annotated[
        bool, typer.Option("--only-ours", help="Although another writer's rows may count in the tables: drop those.")
    ] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Recompute a hook's derived tables from their base tables (beside a running daemon, which waits meanwhile)."""
    from indexer import rebuild as derivation

    done = _on_database(
        _load(config, secrets).settings,
        lambda connection, hooks: derivation.rebuild(
            connection, hooks, hook, dry_run=dry_run, only_ours=only_ours, say=_progress
        ),
    )
    typer.echo(derivation.as_json(done) if as_json else derivation.describe(done))


def _progress(text: str) -> None:
    typer.echo(text, err=True)


def _on_database(settings: Settings, work: Callable[[Connection, tuple[Registered, ...]], Coroutine[Any, Any, T]]) -> T:
    """Run `work` on a connection of its own, with the enabled hooks."""
    from indexer import app as application
    from indexer import registry

    async def main() -> T:
        hooks = registry.load_hooks(settings.hooks)
        async with application.open_database(settings, pool=False) as database:
            connection = await database.connect()
            try:
                return await work(connection, hooks)
            finally:
                connection.terminate()

    return asyncio.run(main())


# Typer shows its usage errors in a box of several lines; their class is public only as the base of this one.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


app.add_typer(cli_operate.app)
app.add_typer(cli_recovery.app)
app.add_typer(cli_chain.app)
app.add_typer(cli_jobs.app)
app.add_typer(cli_listeners.app)
app.add_typer(cli_keys.app)


def main() -> None:
    """The console script."""
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "indexer")
        text = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        print(f"indexer: {text.rstrip('.')}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except IndexerError as error:
        if isinstance(error, HookLoadError) and error.details:
            print(error.details.rstrip(), file=sys.stderr)
        print("indexer: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
