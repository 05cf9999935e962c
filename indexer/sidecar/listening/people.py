"""Who is connected: places and the waitlist, leases, tokens, and how polls ended."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal, TypeAlias
from uuid import UUID

import msgspec

from indexer.db import Connection
from indexer.sidecar.listening.cooldown import COOL_DOWNS, DEACTIVATING_FAILURES, FailureType
from indexer.sidecar.listening.vault import Vault
from indexer.sidecar.providers.spotify_user import Profile, Tokens

Standing: TypeAlias = Literal[
    "claimed", "unknown_listener", "already_completed", "disconnected", "cooling_down", "rate_limited", "in_progress"
]


# -- connecting ----------------------------------------------------------------------------------------------------


class Connected(msgspec.Struct, frozen=True):
    """`listener` is None for who is on the waitlist, at `place` (from 1); `new`: connected for the first time."""

    listener: UUID | None
    new: bool = False
    place: int | None = None


async def connect(
    connection: Connection, vault: Vault, profile: Profile, tokens: Tokens, cap: int, now: datetime
) -> Connected:
    """Store who has just agreed on Spotify's page, if there is a place or the person has one already.

    In the caller's transaction, which must be short: whoever connects for the first time takes the place in it, and
    others wait for its end.
    """
    # the same person in two browsers at once would take two places
    await connection.execute("select pg_advisory_xact_lock(hashtext('indexer.listener'), hashtext($1))", profile.id)
    known = await connection.fetchval("select id from listeners where spotify_id = $1", profile.id)
    if known is not None:
        await _reconnect(connection, vault, known, profile, tokens, now)
        return Connected(known)
    listener = await connection.fetchval(
        """
        with place as (
            update listener_places set taken = taken + 1 where tier = 'founding' and taken < $1 returning tier
        ), no_longer_waiting as (
            delete from listener_waitlist using place where spotify_id = $2
        )
        insert into listeners (spotify_id, email, display_name, access_token, refresh_token, token_expires_at, tier,
                               created_at)
        select $2, $3, $4, $5, $6, $7, tier, $8 from place
        returning id
        """,
        cap, profile.id, profile.email, profile.display_name, vault.encrypt(tokens.access_token),
        vault.encrypt(tokens.refresh_token) if tokens.refresh_token else None, _expiry(tokens, now), now,
    )  # fmt: skip
    if listener is not None:
        return Connected(listener, new=True)
    # one after the other: nobody is told a place that another is told as well, or that one who came earlier gets later
    await connection.execute("select pg_advisory_xact_lock(hashtext('indexer.listener_waitlist'), 0)")
    place = await connection.fetchval(
        """
        with waiting as (
            insert into listener_waitlist as known (spotify_id, email, created_at)
            select $1, $2, greatest($3, max(created_at) + interval '1 microsecond') from listener_waitlist
            on conflict (spotify_id) do update set email = excluded.email
            returning known.created_at
        )
        select count(*) + 1 from listener_waitlist as other, waiting
        where spotify_id <> $1 and (other.created_at, other.spotify_id) < (waiting.created_at, $1)
        """,
        profile.id, profile.email, now,
    )  # fmt: skip
    return Connected(None, place=int(place))


async def _reconnect(
    connection: Connection, vault: Vault, listener: UUID, profile: Profile, tokens: Tokens, now: datetime
) -> None:
    """New tokens make a person active again, whatever went wrong before. The cursor stays: no play is lost by it.

    A poll that is under way with the old tokens loses its lease: how it ends says nothing of the new ones.
    """
    await connection.execute(
        """
        update listeners
        set email = $2, display_name = $3, access_token = $4, refresh_token = coalesce($5, refresh_token),
            token_expires_at = $6, token_version = token_version + 1, is_active = true, consecutive_failures = 0,
            last_failure_type = null, cooling_until = null, lease = null, leased_until = null
        where id = $1
        """,
        listener, profile.email, profile.display_name, vault.encrypt(tokens.access_token),
        vault.encrypt(tokens.refresh_token) if tokens.refresh_token else None, _expiry(tokens, now),
    )  # fmt: skip


def _expiry(tokens: Tokens, now: datetime) -> datetime:
    return now + timedelta(seconds=tokens.expires_in)


async def exists(connection: Connection, listener: UUID) -> bool:
    return bool(await connection.fetchval("select exists (select from listeners where id = $1)", listener))


async def remove(connection: Connection, listener: UUID) -> bool:
    """Delete a person with all that was archived, and free the place; False where there is no such person."""
    return bool(
        await connection.fetchval(
            """
            with gone as (
                delete from listeners where id = $1 returning tier
            ), freed as (
                update listener_places as places set taken = taken - 1 from gone where places.tier = gone.tier
            ), forgotten as (
                delete from listening_keys using gone where starts_with(key, 'archive_' || $1::text || '_')
            )
            select count(*) from gone
            """,
            listener,
        )
    )  # fmt: skip


# -- polling -------------------------------------------------------------------------------------------------------


def hour_key(listener: UUID, now: datetime) -> str:
    """What is remembered once the person's hour (UTC) is done."""
    return f"archive_{listener}_{now:%Y_%m_%d_%H}"


class Claim(msgspec.Struct, frozen=True):
    """How a person stands; the rest is there for who is `claimed`, whose `lease` is ours alone for a while."""

    listener: UUID
    standing: Standing
    lease: UUID | None = None
    cursor_ms: int | None = None
    access_token: bytes | None = None
    refresh_token: bytes | None = None
    token_expires_at: datetime | None = None
    token_version: int = 0


async def claim(
    connection: Connection, listeners: Sequence[UUID], lease: UUID, now: datetime, lasts: timedelta
) -> list[Claim]:
    """Take all of these who may be polled now, so that no other worker does; one answer for each that was asked for.

    Whoever was polled this hour, has no tokens, cools down, must wait for Spotify or is another worker's, is left.
    """
    keys = [hour_key(listener, now) for listener in listeners]
    rows = await connection.fetch(
        """
        with asked as (
            select person.*, key from unnest($1::uuid[], $2::text[]) as wanted (id, key)
            join listeners as person using (id)
            order by id
            for update of person
        ), judged as (
            select *, case
                when exists (select from listening_keys as done where done.key = asked.key and until > $4)
                    or last_polled_at >= date_trunc('hour', $4, 'UTC') then 'already_completed'
                when not is_active or refresh_token is null then 'disconnected'
                when leased_until > $4 then 'in_progress'
                when cooling_until > $4 then 'cooling_down'
                when rate_limited_until > $4 then 'rate_limited'
                else 'claimed' end as standing
            from asked
        ), taken as (
            update listeners as person set lease = $3, leased_until = $4 + $5::interval
            from judged where person.id = judged.id and standing = 'claimed'
        )
        select id, standing, cursor_ms, access_token, refresh_token, token_expires_at, token_version from judged
        """,
        list(listeners), keys, lease, now, lasts,
    )  # fmt: skip
    found = {row["id"]: row for row in rows}
    return [_claim(one, found.get(one), lease) for one in dict.fromkeys(listeners)]


def _claim(listener: UUID, row: object, lease: UUID) -> Claim:
    if row is None:
        return Claim(listener, "unknown_listener")
    told = dict(row)  # type: ignore[call-overload]
    if told.pop("standing") != "claimed":
        return Claim(listener, dict(row)["standing"])  # type: ignore[call-overload]
    return Claim(listener, "claimed", lease, **{name: value for name, value in told.items() if name != "id"})


async def keep_tokens(
    connection: Connection, vault: Vault, person: Claim, tokens: Tokens, now: datetime
) -> Claim | None:
    """Store refreshed tokens, a rotated refresh token in the same statement as the access token.

    None where the tokens that they came from are no longer those of the person: whoever connected anew meanwhile has
    better ones. That they were encrypted by another key meanwhile does not matter.
    """
    access = vault.encrypt(tokens.access_token)
    refresh = vault.encrypt(tokens.refresh_token) if tokens.refresh_token else None
    row = await connection.fetchrow(
        """
        update listeners set access_token = $3, refresh_token = coalesce($4, refresh_token), token_expires_at = $5,
            token_version = token_version + 1
        where id = $1 and token_version = $2
        returning access_token, refresh_token, token_expires_at, token_version
        """,
        person.listener, person.token_version, access, refresh, _expiry(tokens, now),
    )  # fmt: skip
    return msgspec.structs.replace(person, **dict(row)) if row is not None else None


async def failed(connection: Connection, person: Claim, kind: FailureType, now: datetime, *, revoked: bool) -> int:
    """Note a failed poll and end the lease; returns the failures in a row, 0 where the lease was no longer ours.

    `revoked`: Spotify says that the person has taken the permission back; the second time in a row deactivates.
    """
    first, longest = COOL_DOWNS[kind]
    return int(
        await connection.fetchval(
            """
            update listeners
            set consecutive_failures = consecutive_failures + 1, last_failure_type = $3, last_failed_at = $4,
                cooling_until = $4::timestamptz
                    + least($7::interval * power(2, least(consecutive_failures, 16)), $8::interval),
                is_active = is_active
                    and not ($5 and consecutive_failures + 1 >= $6 and last_failure_type is not distinct from 'AUTH'),
                lease = null, leased_until = null
            where id = $1 and lease = $2
            returning consecutive_failures
            """,
            person.listener, person.lease, kind, now, revoked, DEACTIVATING_FAILURES, first, longest,
        )
        or 0
    )  # fmt: skip


async def rate_limited(connection: Connection, person: Claim, until: datetime) -> None:
    """Note that Spotify wants us to wait, which is no failure of the person's, and end the lease."""
    await connection.execute(
        """
        update listeners set rate_limited_until = $3, lease = null, leased_until = null
        where id = $1 and lease = $2
        """,
        person.listener, person.lease, until,
    )  # fmt: skip


async def let_go(connection: Connection, listeners: Sequence[UUID], lease: UUID) -> None:
    """End leases under which nothing was done."""
    await connection.execute(
        "update listeners set lease = null, leased_until = null where id = any($1) and lease = $2",
        list(listeners), lease,
    )  # fmt: skip
