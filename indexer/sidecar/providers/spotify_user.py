"""Spotify on behalf of a person who has connected: sign-in, tokens, who it is, and what was played of late."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec

from indexer.config import SpotifySettings
from indexer.sidecar.providers.errors import unset
from indexer.sidecar.providers.http import Http
from indexer.sidecar.providers.spotify import bearer, form_headers

SCOPES = ("user-read-email", "user-read-recently-played", "user-top-read")
PAGE = 50


class Tokens(msgspec.Struct, frozen=True):
    """What Spotify gives for a code or a refresh token; `refresh_token` is None where the one we have stays valid."""

    access_token: str
    expires_in: float = 3600
    refresh_token: str | None = None


class Profile(msgspec.Struct, frozen=True):
    id: str
    email: str | None = None
    display_name: str | None = None


class _Played(msgspec.Struct):
    items: list[msgspec.Raw]
    next: str | None = None


class PlayedPage(msgspec.Struct, frozen=True):
    """Plays as they came, each for itself, and the parameters of the next page, None where there is none."""

    items: list[msgspec.Raw]
    next: Mapping[str, str] | None


class SpotifyUser:
    """Asks with people's tokens, of which it keeps none. Every method but `authorize_url` raises ProviderError.

    Terminal with the code `invalid_grant`: the person must connect anew; with status 401: the access token is no
    longer valid. Saturated with status 429 has the wait that Spotify asks for.
    """

    def __init__(self, settings: SpotifySettings, *, connections: int = 64) -> None:
        self._settings = settings
        seconds = settings.timeout_seconds
        self._api = Http("spotify", settings.base_url, timeout_seconds=seconds, connections=connections)
        self._accounts = Http("spotify", settings.accounts_url, timeout_seconds=seconds, connections=connections)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._api.close()
        await self._accounts.close()

    def authorize_url(self, redirect_uri: str, state: str, challenge: str) -> str:
        """The page of Spotify's on which the person agrees; `challenge` is PKCE's S256 of the verifier."""
        if self._settings.client_id is None:
            raise unset("spotify", "client_id")
        query = {
            "response_type": "code", "client_id": self._settings.client_id, "scope": " ".join(SCOPES),
            "redirect_uri": redirect_uri, "state": state, "code_challenge_method": "S256", "code_challenge": challenge,
        }  # fmt: skip
        return f"{self._accounts.path('authorize')}?{urlencode(query)}"

    async def exchange(self, code: str, verifier: str, redirect_uri: str) -> Tokens:
        """The tokens for the code that came back; a code holds once."""
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect_uri}
        return await self._tokens("a code", {**form, "code_verifier": verifier})

    async def refresh(self, refresh_token: str) -> Tokens:
        """A new access token. If a refresh token comes along, it takes the place of the one that was sent."""
        return await self._tokens("a refresh", {"grant_type": "refresh_token", "refresh_token": refresh_token})

    async def profile(self, access_token: str) -> Profile:
        """Who it is."""
        url = self._api.path("v1", "me")
        return (await self._api.ask("a profile", Profile, "GET", url, headers=bearer(access_token))).value

    async def recently_played(self, access_token: str, params: Mapping[str, str]) -> PlayedPage:
        """A page of plays: after or before a moment in Unix milliseconds, or the newest without either."""
        url = self._api.path("v1", "me", "player", "recently-played")
        answer = await self._api.ask(
            "recent plays", _Played, "GET", url, params={"limit": str(PAGE), **params}, headers=bearer(access_token)
        )
        return PlayedPage(answer.value.items, _following(answer.value.next))

    async def _tokens(self, what: str, form: Mapping[str, str]) -> Tokens:
        headers = form_headers(self._settings)
        url = self._accounts.path("api", "token")
        body = urlencode(form).encode()
        return (await self._accounts.ask(what, Tokens, "POST", url, headers=headers, body=body)).value


def _following(url: str | None) -> Mapping[str, str] | None:
    """What the address of the next page says of its place: the address itself is not followed, since it is theirs."""
    if not url:
        return None
    given = dict(parse_qsl(urlsplit(url).query))
    place = {name: given[name] for name in ("after", "before") if given.get(name, "").isdecimal()}
    return place or None
