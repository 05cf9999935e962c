"""`indexer keys` as an operator meets it: the key comes out once and alone, and never again."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest
from daemon import Commands, Ended, toml

from indexer.migrations import migrate, sql_folder
from indexer.sidecar import keys

pytestmark = pytest.mark.timeout(120)

Run = Callable[..., Awaitable[Ended]]


@pytest.fixture
def run(commands: Commands, tmp_path: Path, database_url: str) -> Run:
    (tmp_path / "indexer.toml").write_text(toml({"database": {"url": database_url}, "sidecar": {"port": 0}}))
    return lambda *arguments: commands("keys", *arguments, folder=tmp_path)


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2 and not ended.out and len(ended.errors) == 1, ended
    for word in words:
        assert word in ended.errors[0], ended
    assert "Traceback" not in ended.err and "example.org" not in ended.err


async def test_a_keys_life(run: Run, connection: asyncpg.Connection) -> None:
    refused(await run("list"), "no accounts yet", "indexer sidecar")
    await migrate(connection, [("sidecar", sql_folder("sidecar"))])
    assert (await run("list")).out == "no keys\n"
    made = await run("create", "--email", "ann@example.org", "--new-account", "--name", "laptop", "--expires-days", "7")
    assert made.code == 0, made
    key, id_ = made.out.strip(), keys.id_of(made.out.strip())
    assert id_ is not None and made.out == f"{key}\n" and key not in made.err and id_ in made.err
    row = await connection.fetchrow("select * from account_api_keys")
    assert row is not None and row["key_hash"] == keys.hashed(key)
    assert (row["expires_at"] - row["created_at"]).days == 7 and row["name"] == "laptop"

    listed = await run("list")
    assert listed.code == 0 and id_ in listed.out and "laptop" in listed.out and "never used" in listed.out
    found = json.loads((await run("list", "--json")).out)
    assert [(one["id"], one["account"], one["expired"]) for one in found] == [(id_, str(row["account"]), False)]
    assert set(found[0]) == {"id", "account", "name", "created_at", "last_used", "expires_at", "expired"}
    assert key[-43:] not in listed.out and row["key_hash"].hex() not in json.dumps(found)

    assert (await run("revoke", id_)).out == f"key {id_} is revoked\n"
    again = await run("revoke", key)
    assert (again.code, again.out) == (0, f"key {id_} had expired before\n")
    assert json.loads((await run("list", "--json")).out)[0]["expired"] is True
    assert await connection.fetchval("select expires_at <= now() from account_api_keys")


async def test_whose_key(run: Run, connection: asyncpg.Connection) -> None:
    await migrate(connection, [("sidecar", sql_folder("sidecar"))])
    mine, other = uuid4(), uuid4()
    assert (await run("create", "--account", str(mine), "--new-account")).code == 0
    assert (await run("create", "--new-account", "--email", "Bob@example.org")).code == 0
    by_email = await run("create", "--email", "bob@EXAMPLE.org")
    assert by_email.code == 0
    assert (await run("create", "--account", str(mine))).code == 0
    found = json.loads((await run("list", "--json", "--account", str(mine))).out)
    assert len(found) == 2 and {UUID(one["account"]) for one in found} == {mine}
    assert await connection.fetchval("select count(*) from account_api_keys") == 4

    refused(await run("create"), "whose key?")
    refused(await run("create", "--account", str(mine), "--email", "bob@example.org"), "whose key?")
    refused(await run("create", "--account", str(other)), "no such account", "--new-account")
    refused(await run("create", "--email", "nobody@example.org"), "no such account")
    refused(await run("create", "--email", "bob@example.org", "--new-account"), "there already")
    refused(await run("create", "--account", str(mine), "--new-account"), "there already")
    refused(await run("create", "--account", "mine"), "--account must be a UUID")
    refused(await run("create", "--account", str(mine), "--name", "a\nb"), "--name")
    refused(await run("create", "--account", str(mine), "--expires-days", "0"), "expires-days")
    refused(await run("revoke", "0" * 16), "no key with this id")
    refused(await run("revoke"), "keys revoke --help")
    assert await connection.fetchval("select count(*) from account_api_keys") == 4
