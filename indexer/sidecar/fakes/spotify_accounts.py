"""The accounts service of the stand-in for Spotify: people who agree on a page, codes, and tokens that change."""

from __future__ import annotations

import re
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from html import escape
from typing import Literal, TypeAlias
from urllib.parse import urlencode, urlsplit

import msgspec

from indexer.sidecar.fakes.base import Reply
from indexer.sidecar.fakes.made import number
from indexer.sidecar.fakes.people import Pair, Person

Rotate: TypeAlias = Literal["never", "always"] | float
Clock: TypeAlias = Callable[[], datetime]

SCOPES = "user-read-email user-read-recently-played user-top-read"
_CODE_LASTS = timedelta(minutes=10)
_MOST_SHOWN = 50
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>A stand-in for Spotify</title></head>
<body><main><h1>A stand-in for Spotify</h1><p>Somebody asks to know: {scope}</p>
<form action="/authorize">{hidden}<ul>{people}</ul>
<p><button name="refuse" value="yes">Refuse</button></p></form></main></body></html>
"""


class _Agreed(msgspec.Struct):
    """What a person has agreed to: what stands behind a token of either kind, and behind a code."""

    person: Person
    generation: int
    scope: str

    @property
    def holds(self) -> bool:
        return self.generation == self.person.generation


class Code(_Agreed):
    redirect_uri: str
    challenge: str
    until: datetime


class Refresh(_Agreed):
    """`predecessor` is the token whose place this one takes once it is used."""

    predecessor: str | None = None


class Access(_Agreed):
    """`until` is in seconds since 1970; `came_with` is the new refresh token of the same answer."""

    until: float
    came_with: str | None = None


class Accounts:
    """Codes and tokens.

    `rotate` says whether a refresh brings a new refresh token, or how probable that is. The old one holds until the
    new one, or the access token that came with it, is used for the first time; without `grace` it ends at once.
    """

    def __init__(self, clock: Clock, rotate: Rotate = "never", grace: bool = True) -> None:
        self.clock, self.rotate, self.grace = clock, rotate, grace
        self.codes: dict[str, Code] = {}
        self.refreshes: dict[str, Refresh] = {}
        self.accesses: dict[str, Access] = {}
        self.expires_in = 3600.0
        self._given: dict[str, list[str]] = {}
        self._renewals = 0

    def code(self, person: Person, query: Mapping[str, str]) -> str:
        made = f"spotify-test-code-{secrets.token_urlsafe(32)}"
        until = self.clock() + _CODE_LASTS
        self.codes[made] = Code(
            person, person.generation, query["scope"], query["redirect_uri"], query["code_challenge"], until
        )
        return made

    def redeem(self, form: Mapping[str, str]) -> Refresh | str:
        """What the code of a form stands for, or what is wrong with it; either way it has had its turn."""
        code = self.codes.pop(form.get("code", ""), None)
        if code is None or not code.holds or self.clock() >= code.until:
            return "Invalid authorization code"
        if form.get("redirect_uri") != code.redirect_uri:
            return "Invalid redirect URI"
        verifier = form.get("code_verifier", "")
        if not 43 <= len(verifier) <= 128 or challenge_of(verifier) != code.challenge:
            return "code_verifier was incorrect"
        return Refresh(code.person, code.generation, code.scope)

    def give(self, agreed: Refresh, *, access: str | None = None, refresh: str | None = None) -> Pair:
        """Tokens for who has just agreed."""
        refresh = refresh or _token("refresh")
        self.refreshes[refresh] = agreed
        return Pair(self._access(agreed, None, access), refresh, self.expires_in)

    def renew(self, token: str) -> tuple[Refresh, str, str | None] | None:
        """Who it is, an access token, and a refresh token where it changes; None where the token doesn't hold."""
        known = self.refreshes.get(token)
        if known is None or not known.holds:
            self.refreshes.pop(token, None)
            return None
        self._used(token)
        fresh = None
        if self._rotates():
            fresh = _token("refresh")
            self.refreshes[fresh] = Refresh(known.person, known.generation, known.scope, token if self.grace else None)
            if not self.grace:
                del self.refreshes[token]
        return known, self._access(known, fresh), fresh

    def holder(self, token: str) -> Access | None:
        """What an access token stands for, if it holds now; with this it is used."""
        known = self.accesses.get(token)
        if known is None or not known.holds or self.clock().timestamp() >= known.until:
            return None
        if known.came_with is not None:
            self._used(known.came_with)
            known.came_with = None
        return known

    def _access(self, agreed: _Agreed, came_with: str | None, token: str | None = None) -> str:
        token, now = token or _token("access"), self.clock().timestamp()
        # What has expired an hour ago is known no longer, else a day of thousands of people would pile up.
        given = self._given.setdefault(agreed.person.id, [])
        while given and self.accesses[given[0]].until < now - 3600:
            del self.accesses[given.pop(0)]
        given.append(token)
        self.accesses[token] = Access(
            agreed.person, agreed.generation, agreed.scope, now + self.expires_in, came_with
        )
        return token

    def _used(self, refresh: str) -> None:
        known = self.refreshes.get(refresh)
        if known is not None and known.predecessor is not None:
            self.refreshes.pop(known.predecessor, None)
            known.predecessor = None

    def _rotates(self) -> bool:
        if isinstance(self.rotate, str):
            return self.rotate == "always"
        self._renewals += 1
        return number("rotation", self._renewals) % 1_000_000 < self.rotate * 1_000_000


def challenge_of(verifier: str) -> str:
    """PKCE's S256."""
    return urlsafe_b64encode(sha256(verifier.encode()).digest()).decode().rstrip("=")


def _token(kind: str) -> str:
    # as long as the real ones
    return f"spotify-test-{kind}-{secrets.token_urlsafe(96)}"


# -- the page ------------------------------------------------------------------------------------------------------


def wrong_with(query: Mapping[str, str], client_id: str, redirect_uris: set[str] | None) -> str | None:
    """Why somebody can't be asked to agree, in the words of the page."""
    if query.get("client_id") != client_id:
        return "INVALID_CLIENT: Invalid client"
    redirect = query.get("redirect_uri", "")
    given = urlsplit(redirect)
    if given.scheme not in ("http", "https") or not given.netloc or given.fragment:
        return "INVALID_CLIENT: Invalid redirect URI"
    if redirect_uris is not None and redirect not in redirect_uris:
        return "INVALID_CLIENT: Invalid redirect URI"
    if query.get("response_type") != "code":
        return "response_type must be code"
    if not query.get("scope") or not set(query["scope"].split()) <= set(SCOPES.split()):
        return "INVALID_SCOPE: Invalid scope"
    if not query.get("state"):
        return "state is missing"
    if query.get("code_challenge_method") != "S256" or not re.fullmatch(
        r"[A-Za-z0-9_-]{43}", query.get("code_challenge", "")
    ):
        return "code_challenge_method must be S256, and code_challenge must be one"
    return None


def page(query: Mapping[str, str], people: Mapping[str, Person]) -> Reply:
    """Whom to agree as."""
    hidden = "".join(
        f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">' for name, value in query.items()
    )
    buttons = "".join(
        f'<li><button name="login_hint" value="{escape(one.id)}">Agree as {escape(one.name or one.id)}</button></li>'
        for one in list(people.values())[:_MOST_SHOWN]
    )
    text = _PAGE.format(scope=escape(query["scope"]), hidden=hidden, people=buttons)
    return Reply(text.encode(), content_type="text/html")


def back(query: Mapping[str, str], **answer: str) -> Reply:
    """The way back to who asked."""
    redirect = query["redirect_uri"]
    location = f"{redirect}{'&' if urlsplit(redirect).query else '?'}{urlencode({**answer, 'state': query['state']})}"
    return Reply(b"", 302, {"Location": location}, "text/plain")


def real_time() -> datetime:
    return datetime.now(UTC)
