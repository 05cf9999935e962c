"""API keys and the accounts that they stand for: how a key is made, what of it is stored, and all SQL on both tables.

A key is `ixk_`, its id (public: it is the row's) and a secret of 256 random bits. Only a SHA-256 of it is stored: that
is enough where a secret can't be guessed, and costs microseconds; slow hashes are for passwords, which can be.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from indexer.db import Connection
from indexer.errors import UsageError

_KEY = re.compile(r"ixk_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")


class Key(msgspec.Struct, frozen=True):
    """What is stored of a key. `used_lately`: within the last minute, so that it need not be noted again."""

    id: str
    account: UUID
    key_hash: bytes
    expires_at: datetime | None
    used_lately: bool

    def is_of(self, text: str) -> bool:
        """Whether `text` is this key, compared in constant time."""
        return hmac.compare_digest(self.key_hash, hashed(text))


def make() -> tuple[str, str]:
    """A new key and its id."""
    id_ = secrets.token_hex(8)
    return f"ixk_{id_}_{secrets.token_urlsafe(32)}", id_


def id_of(text: str) -> str | None:
    """The id within a key, or None where it is no key at all."""
    match = _KEY.fullmatch(text)
    return match[1] if match else None


def hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# -- for the API ---------------------------------------------------------------------------------------------------


async def find(connection: Connection, id_: str) -> Key | None:
    row = await connection.fetchrow(
        """
        select id, account, key_hash, expires_at,
               coalesce(last_used > now() - interval '1 minute', false) as used_lately
        from account_api_keys where id = $1
        """,
        id_,
    )
    return Key(**row) if row else None


async def note_use(connection: Connection, id_: str) -> None:
    """Note that a key is used, unless another process just did."""
    await connection.execute(
        """
        update account_api_keys set last_used = now()
        where id = $1 and (last_used is null or last_used <= now() - interval '1 minute')
        """,
        id_,
    )


async def account_exists(connection: Connection, account: UUID) -> bool:
    return bool(await connection.fetchval("select exists (select from accounts where id = $1)", account))


# -- for the command -----------------------------------------------------------------------------------------------


async def find_account(connection: Connection, account: UUID | None, email: str | None) -> UUID:
    """The account with this id, or with this e-mail address; raises UsageError where there is none."""
    with _migrated():
        found: UUID | None = await connection.fetchval(
            "select id from accounts where id = $1 or lower(email) = lower($2)", account, email
        )
    if found is None:
        raise UsageError("there is no such account: keys create --new-account makes it")
    return found


async def add_account(connection: Connection, account: UUID | None, email: str | None) -> UUID:
    """Make an account; raises UsageError where it is there."""
    with _migrated():
        made: UUID | None = await connection.fetchval(
            """
            insert into accounts (id, email) values (coalesce($1, gen_random_uuid()), $2)
            on conflict do nothing returning id
            """,
            account, email,
        )  # fmt: skip
    if made is None:
        raise UsageError("that account is there already: leave out --new-account")
    return made


async def create(connection: Connection, account: UUID, name: str, lasts: timedelta | None) -> tuple[str, str]:
    """Store a new key of the account; returns the key, which nothing can show again, and its id."""
    key, id_ = make()
    await connection.execute(
        "insert into account_api_keys (id, account, name, key_hash, expires_at) values ($1, $2, $3, $4, now() + $5)",
        id_, account, name, hashed(key), lasts,
    )  # fmt: skip
    return key, id_


async def listing(connection: Connection, account: UUID | None) -> list[dict[str, Any]]:
    """The keys of an account, or all, oldest first: everything but what they could be recognised by."""
    with _migrated():
        rows = await connection.fetch(
            """
            select id, account, name, created_at, last_used, expires_at, coalesce(expires_at <= now(), false) as expired
            from account_api_keys where $1::uuid is null or account = $1
            order by created_at, id
            """,
            account,
        )
    return [dict(row) for row in rows]


async def revoke(connection: Connection, id_: str) -> bool:
    """Let a key expire now; False where it has expired already. Raises UsageError where there is none."""
    with _migrated():
        row = await connection.fetchrow(
            """
            with known as (select id, expires_at <= now() as expired from account_api_keys where id = $1 for update)
            update account_api_keys as key set expires_at = least(key.expires_at, now())
            from known where key.id = known.id
            returning coalesce(known.expired, false) as expired
            """,
            id_,
        )
    if row is None:
        raise UsageError("there is no key with this id: see indexer keys list")
    return not row["expired"]


@contextmanager
def _migrated() -> Iterator[None]:
    try:
        yield
    except asyncpg.UndefinedTableError:
        text = "this database has no accounts yet: `indexer sidecar` makes its tables (or migrate, with a [sidecar])"
        raise UsageError(text) from None
