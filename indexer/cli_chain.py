"""The commands around a chain and its tables: record, chain, maintain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from indexer import completion
from indexer.errors import UsageError

if TYPE_CHECKING:
    from indexer.accept import Accepted
    from indexer.config import Settings
    from indexer.db import Connection

T = TypeVar("T")

app = typer.Typer()
chain = typer.Typer(
    help="The chains of this database, and what to do when one restarts.", no_args_is_help=True,
    epilog="Example: indexer chain list",
)  # fmt: skip
app.add_typer(chain, name="chain")

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; indexer.toml by default.")]
SecretsOption = Annotated[Path | None, typer.Option("--secrets", help="Folder with one file a secret.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# A refresh over a long table is not a query gone wrong.
_CHORE_SECONDS = 86_400.0


def _load(config: Path | None, secrets: Path | None) -> Settings:
    from indexer import log
    from indexer.settings_sources import load_settings

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)
    return settings


@app.command(epilog="Example: indexer record 19000000 19100000 blocks.jsonl.gz")
def record(
    first: Annotated[int, typer.Argument(help="First block.", min=0)],
    last: Annotated[int, typer.Argument(help="Last block.", min=0)],
    file: Annotated[Path, typer.Argument(help="File to write; packed if its name ends in .gz.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Write final blocks with their events to a file, for `run --from-file` and tests without a node."""
    from indexer import record as recorder
    from indexer.progress import Bar
    from indexer.sources.choose import make_source
    from indexer.sources.recorded import RecordedSource

    settings = _load(config, secrets)

    async def main() -> dict[str, Any]:
        source = make_source(settings)
        # a copy of a file is of the same kind of chain
        kind = source.header.source if isinstance(source, RecordedSource) else settings.chain.source
        try:
            with Bar("recording", "recorded", last - first + 1) as bar:
                await recorder.record(source, kind, first, last, file, force=force, add=bar.add)
            return {**bar.facts, "bytes": file.stat().st_size, "file": str(file)}
        finally:
            await source.close()

    done = asyncio.run(main())
    if as_json:
        typer.echo(json.dumps(done))
    else:
        what = f"{done['blocks']:,} blocks with {done['events']:,} events"
        typer.echo(f"recorded {what} in {done['seconds']} s: {done['file']}, {done['bytes']:,} bytes")


@chain.command("list", epilog="Example: indexer chain list --json")
def list_chains(as_json: JsonOption = False, config: ConfigOption = None, secrets: SecretsOption = None) -> None:
    """All chains that this database knows, and how far they are applied."""
    from rich.console import Console
    from rich.table import Table

    from indexer import ledger

    settings = _load(config, secrets)
    found = asyncio.run(_on_engine(settings, ledger.chains))
    if as_json:
        typer.echo(json.dumps(found))
    elif not found:
        typer.echo("no chain yet: start one with `indexer run`")
    else:
        table = Table("name", "chain id", "source", "start block", "cursor", box=None, pad_edge=False)
        for one in found:
            table.add_row(*(str(one[key]) for key in ("name", "identity", "source", "start_block", "cursor")))
        Console(soft_wrap=True).print(table)


@chain.command(epilog="Example: indexer chain accept audius-mainnet-beta --start-block 1")
def accept(
    new_id: Annotated[
        str,
        typer.Argument(help="The chain id that the nodes answer with now.", autocompletion=completion.chain_ids),
    ],
    start_block: Annotated[
        int | None, typer.Option(help="First block of the new chain; chain.start_block by default.", min=0)
    ] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Go on with a chain whose height restarts under a new id; what was indexed of the old one stays."""
    from indexer import accept as acceptance

    settings = _load(config, secrets)

    async def work(connection: Connection) -> Accepted:
        return await acceptance.accept(connection, settings.chain, new_id, start_block)

    done = asyncio.run(_on_engine(settings, work))
    if as_json:
        import msgspec

        typer.echo(msgspec.json.encode(done).decode())
        return
    for line in _accepted(done, settings):
        typer.echo(line)


def _accepted(done: Accepted, settings: Settings) -> Sequence[str]:
    lines = [
        f"chain {done.new.name} is {done.new.identity} from now on, and goes on with block {done.next_block}",
        f"what was indexed of {done.old.identity} stays, as chain {done.old.name}",
    ]
    if settings.chain.chain_id not in (None, done.new.identity):
        lines.append(f'chain.chain_id is {settings.chain.chain_id}: set it to "{done.new.identity}" before the start')
    return lines


async def _on_engine(settings: Settings, work: Callable[[Connection], Awaitable[T]]) -> T:
    """Run `work` on a connection to a database that has our tables; raises UsageError where it has none."""
    import asyncpg

    from indexer import app as application
    from indexer.db import translated

    async with application.open_database(settings, pool=False) as database:
        connection = await database.connect()
        try:
            with translated():
                return await work(connection)
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            raise UsageError("this database knows no chain: start one with `indexer run`") from None
        finally:
            connection.terminate()


@app.command(epilog="Example: indexer maintain --only aggregate_interval_plays")
def maintain(
    only: Annotated[str | None, typer.Option(help="Only this chore.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only print the chores.")] = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """The chores of the enabled hooks, once, beside a daemon or without one: to be run now and then, by a timer.

    Exit code 1 where one fails; the others are carried out all the same.
    """
    from indexer import app as application
    from indexer import maintenance, registry

    settings = _load(config, secrets)
    chores = maintenance.chores_of(registry.load_hooks(settings.hooks), only)
    if list_:
        for hook, chore in chores:
            typer.echo(f"{chore.name} (hook {hook})")
        return
    patient = settings.database.model_copy(update={"command_timeout_seconds": _CHORE_SECONDS})
    settings = settings.model_copy(update={"database": patient})

    async def main() -> bool:
        failed = False
        async with application.open_database(settings, pool=False) as database:
            async for done in maintenance.carry_out(database, chores):
                failed = failed or bool(done.error)
                what = f"failed: {done.error}" if done.error else done.did or "nothing to do"
                typer.echo(f"{done.chore}: {what}")
        return failed

    raise typer.Exit(1 if asyncio.run(main()) else 0)
