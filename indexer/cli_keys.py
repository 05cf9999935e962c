"""The command for the keys of the sidecar's API: create, list, revoke."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import UUID

import typer

from indexer.errors import UsageError

if TYPE_CHECKING:
    from indexer.db import Connection

T = TypeVar("T")

app = typer.Typer(
    name="keys", help="Keys of the sidecar's API.", no_args_is_help=True,
    epilog="Example: indexer keys create --email ann@example.org --new-account",
)  # fmt: skip

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file; indexer.toml by default.")]
SecretsOption = Annotated[Path | None, typer.Option("--secrets", help="Folder with one file a secret.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_LONGEST_NAME = 200


@app.command(epilog="Example: indexer keys create --email ann@example.org --new-account --name laptop > key")
def create(
    account: Annotated[str | None, typer.Option("--account", help="Id of the account.")] = None,
    email: Annotated[str | None, typer.Option("--email", help="Or its e-mail address.")] = None,
    new_account: Annotated[bool, typer.Option("--new-account", help="Make the account first.")] = False,
    name: Annotated[str, typer.Option("--name", help="What the key is for, for people.")] = "",
    expires_days: Annotated[
        int | None, typer.Option("--expires-days", min=1, max=36_500, help="Days until it expires; never by default.")
    ] = None,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Make a key of an account and print it, this once: only its hash is stored."""
    from indexer.sidecar import keys

    id_ = _uuid(account) if account is not None else None
    if not new_account and (account is None) == (email is None):
        raise UsageError("whose key? indexer keys create --account ID or --email ADDRESS (or --new-account)")
    if email is not None and ("@" not in email or not email.isprintable()):
        raise UsageError("--email is no e-mail address")
    if len(name) > _LONGEST_NAME or not (name.isprintable()):
        raise UsageError(f"--name must be {_LONGEST_NAME} characters at most, on one line")

    async def work(connection: Connection) -> tuple[str, str, UUID]:
        async with connection.transaction():
            find = keys.add_account if new_account else keys.find_account
            owner = await find(connection, id_, email)
            lasts = timedelta(days=expires_days) if expires_days is not None else None
            return (*await keys.create(connection, owner, name, lasts), owner)

    key, made, owner = _on_database(config, secrets, work)
    typer.echo(f"key {made} of account {owner}; it is shown this once:", err=True)
    typer.echo(key)


@app.command("list", epilog="Example: indexer keys list --json")
def list_(
    account: Annotated[str | None, typer.Option("--account", help="Only the keys of this account.")] = None,
    as_json: JsonOption = False,
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """The keys there are, without what is secret in them."""
    from indexer.sidecar import keys

    id_ = _uuid(account) if account is not None else None
    found = _on_database(config, secrets, lambda connection: keys.listing(connection, id_))
    if as_json:
        typer.echo(json.dumps(found, default=_plain))
    elif not found:
        typer.echo("no keys")
    else:
        _print(found)


@app.command(epilog="Example: indexer keys revoke 3f29c1d804b7a6e5")
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="Id of the key, as keys list shows it.")],
    config: ConfigOption = None,
    secrets: SecretsOption = None,
) -> None:
    """Take a key back: every sidecar refuses it within five seconds."""
    from indexer.sidecar import keys

    # who has the whole key at hand need not cut the id out of it
    id_ = keys.id_of(key) or key
    if "\0" in id_ or not id_.isprintable():
        raise UsageError("that is no id of a key: see indexer keys list")
    revoked = _on_database(config, secrets, lambda connection: keys.revoke(connection, id_))
    typer.echo(f"key {id_} is revoked" if revoked else f"key {id_} had expired before")


@app.command("rotate-tokens", epilog="Example: indexer keys rotate-tokens --config indexer.toml")
def rotate_tokens(config: ConfigOption = None, secrets: SecretsOption = None) -> None:
    """Encrypt people's Spotify tokens by the newest listening.token_key, beside running sidecars.

    It may be run as often as wished. Once it is done, the old keys may be dropped from listening.old_token_keys.
    """
    from indexer.settings_sources import load_settings
    from indexer.sidecar.listening import operators
    from indexer.sidecar.listening.vault import Vault

    vault = Vault(load_settings(config, secrets).settings.listening)

    def say(seen: int, total: int) -> None:
        typer.echo(f"{seen:,} of {total:,} people", err=True)

    changed, lost = _on_database(config, secrets, lambda connection: operators.rotate_tokens(connection, vault, say))
    typer.echo(f"encrypted the tokens of {changed:,} people anew")
    if lost:
        raise UsageError(
            f"the tokens of {lost:,} people were encrypted by a key that is not in the settings: "
            "put it into listening.old_token_keys and run this again"
        )


def _on_database(
    config: Path | None, secrets: Path | None, work: Callable[[Connection], Coroutine[Any, Any, T]]
) -> T:  # fmt: skip
    """Run `work` on a connection of its own."""
    from indexer import app as application
    from indexer import db, log
    from indexer.settings_sources import load_settings

    settings = load_settings(config, secrets).settings
    log.configure(settings.log)

    async def main() -> T:
        async with application.open_database(settings, pool=False) as database:
            connection = await database.connect()
            try:
                with db.translated():
                    return await work(connection)
            finally:
                connection.terminate()

    return asyncio.run(main())


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise UsageError("--account must be a UUID") from None


def _print(found: Sequence[dict[str, Any]]) -> None:
    for one in found:
        state = "expired" if one["expired"] else f"until {_plain(one['expires_at'])}" if one["expires_at"] else "valid"
        used = f"used {_plain(one['last_used'])}" if one["last_used"] else "never used"
        name = f"  {one['name']}" if one["name"] else ""
        made = _plain(one["created_at"])
        typer.echo(f"{one['id']}  account {one['account']}  made {made}  {used}  {state}{name}")


def _plain(value: Any) -> str:
    return value.isoformat(timespec="seconds") if isinstance(value, datetime) else str(value)
