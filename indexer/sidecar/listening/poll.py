"""One person's poll: a fresh token, and all plays since the last one. Nothing is stored but refreshed tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta

from indexer import metrics
from indexer.sidecar import calls
from indexer.sidecar.listening import people
from indexer.sidecar.listening.people import Claim
from indexer.sidecar.listening.plays import Play, Polled, Reject, read
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.listening.vault import Vault
from indexer.sidecar.providers import ProviderError, Terminal

_EARLY = timedelta(minutes=5)
# Spotify has no more than 50 plays, so that this is an answer that leads in circles
_MOST_PAGES = 100
# what says that the application itself is not let in
_OURS = frozenset({"invalid_client", "unauthorized_client"})


class Misconfigured(Exception):
    """Our own settings are wrong: nobody can be polled, and nobody's fault it is."""


class EndlessPages(Exception):
    """There are more pages of plays than there can be."""


class Moved(Exception):
    """The person has connected anew meanwhile: what we hold is of no use any more."""


async def poll(listening: Listening, vault: Vault, person: Claim) -> Polled:
    """Ask for what was played since the person's cursor.

    Raises ProviderError for what is wrong with this person or with Spotify, Misconfigured, Moved, Undecipherable.
    """
    refreshed = person.token_expires_at is None or person.token_expires_at <= listening.clock() + _EARLY
    if refreshed or person.access_token is None:
        person = await _refresh(listening, vault, person)
    try:
        return await _recent(listening, vault, person)
    except Terminal as error:
        if error.status != 401 or refreshed:
            raise
    # Withdrawn before its time: a new one, once.
    return await _recent(listening, vault, await _refresh(listening, vault, person))


async def _recent(listening: Listening, vault: Vault, person: Claim) -> Polled:
    """Page by page, until the cursor is reached or nothing is left."""
    assert person.access_token is not None
    access, cursor, now = vault.decrypt(person.access_token), person.cursor_ms, listening.clock()
    params: Mapping[str, str] = {} if cursor is None else {"after": str(cursor)}
    plays: list[Play] = []
    rejects: list[Reject] = []
    for _ in range(_MOST_PAGES):
        page = await listening.spotify.recently_played(access, params)
        found = [read(raw, now) for raw in page.items]
        rejects += [one for one in found if isinstance(one, Reject)]
        heard = [one for one in found if isinstance(one, Play)]
        plays += [play for play in heard if cursor is None or play.ms > cursor]
        reached = cursor is not None and any(play.ms <= cursor for play in heard)
        if not found or reached or page.next is None:
            return Polled(person, plays, rejects)
        params = page.next
    # the cursor must not pass what was not seen
    raise EndlessPages


# -- tokens --------------------------------------------------------------------------------------------------------


async def _refresh(listening: Listening, vault: Vault, person: Claim) -> Claim:
    """The person with a new access token, which is stored.

    Once it is asked for, it is carried through to the commit even if the caller is cancelled: the old refresh token may
    be void already, and the new one is in the answer alone.
    """
    task = asyncio.create_task(_refresh_and_keep(listening, vault, person), name="refresh")
    listening.refreshing.add(task)
    task.add_done_callback(listening.refreshing.discard)
    return await asyncio.shield(task)


async def _refresh_and_keep(listening: Listening, vault: Vault, person: Claim) -> Claim:
    assert person.refresh_token is not None
    try:
        tokens = await listening.spotify.refresh(vault.decrypt(person.refresh_token))
    except ProviderError as error:
        metrics.token_refreshes_total.labels("refused" if error.code == "invalid_grant" else "failed").inc()
        if not error.asked or error.code in _OURS or error.status == 401:  # of the token address: the client's secret
            raise Misconfigured(str(error)) from None
        raise
    metrics.token_refreshes_total.labels("refreshed" if tokens.refresh_token else "kept").inc()
    # kept through an absence of the database, too
    kept = await calls.kept(
        listening.database,
        lambda connection: people.keep_tokens(connection, vault, person, tokens, listening.clock()),
    )
    if kept is None:
        raise Moved
    return kept
