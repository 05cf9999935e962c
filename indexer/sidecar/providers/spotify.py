"""Spotify's catalogue: the tracks of albums and their ISRC, with the application's own token."""

from __future__ import annotations

import asyncio
import re
import time
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote_plus

import msgspec

from indexer.config import SpotifySettings
from indexer.sidecar.providers.errors import Failed, Terminal, unset
from indexer.sidecar.providers.http import Answer, Http
from indexer.sidecar.providers.protocols import Album, AlbumTrack, Track

T = TypeVar("T")

_ALBUMS_A_CALL = 20
_TRACKS_A_CALL = 50
_PAGE = 50
_EARLY_SECONDS = 30.0
# One that can't be an id makes Spotify refuse all that are asked for with it.
_ID = re.compile(r"[0-9A-Za-z]{1,64}")
_ISRC = re.compile(r"[0-9A-Za-z]{12}")


class _Token(msgspec.Struct):
    access_token: str
    expires_in: float = 3600


class _AlbumTrack(msgspec.Struct):
    id: str | None = None
    name: str = ""


class _Page(msgspec.Struct):
    items: list[_AlbumTrack | None]
    total: int = 0


class _Album(msgspec.Struct):
    id: str
    tracks: _Page
    name: str = ""


class _Albums(msgspec.Struct):
    albums: list[_Album | None]


class _Named(msgspec.Struct):
    id: str | None = None


class _External(msgspec.Struct):
    isrc: str | None = None


class _Track(msgspec.Struct):
    id: str | None = None
    name: str = ""
    album: _Named | None = None
    external_ids: _External | None = None


class _Tracks(msgspec.Struct):
    tracks: list[_Track | None]


class _Found(msgspec.Struct):
    items: list[_Track | None]


class _Search(msgspec.Struct):
    tracks: _Found


class Spotify:
    """A Catalogue. `clock` counts seconds."""

    def __init__(self, settings: SpotifySettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._api = Http("spotify", settings.base_url, timeout_seconds=settings.timeout_seconds)
        self._accounts = Http("spotify", settings.accounts_url, timeout_seconds=settings.timeout_seconds)
        self._token, self._expires = "", 0.0
        self._renewing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._api.close()
        await self._accounts.close()

    async def albums(self, ids: Collection[str]) -> Mapping[str, Album]:
        albums: dict[str, Album] = {}
        for some in _parts(ids, _ALBUMS_A_CALL):
            answer = await self._get("albums", _Albums, ("albums",), {"ids": ",".join(some)})
            for asked, found in self._paired("albums", some, answer.value.albums):
                albums[asked] = Album(asked, found.name, tuple(await self._tracks_of(asked, found.tracks)))
        return albums

    async def _tracks_of(self, album: str, page: _Page) -> list[AlbumTrack]:
        """The tracks of an album, of which the first page is there already."""
        items, total = list(page.items), page.total
        while page.items and len(items) < total:
            params = {"limit": str(_PAGE), "offset": str(len(items))}
            page = (await self._get("an album's tracks", _Page, ("albums", album, "tracks"), params)).value
            items += page.items
        return [AlbumTrack(item.id, item.name) for item in items if item is not None and item.id]

    async def tracks(self, ids: Collection[str]) -> Mapping[str, Track]:
        tracks: dict[str, Track] = {}
        for some in _parts(ids, _TRACKS_A_CALL):
            answer = await self._get("tracks", _Tracks, ("tracks",), {"ids": ",".join(some)})
            tracks |= {asked: _told(asked, found) for asked, found in self._paired("tracks", some, answer.value.tracks)}
        return tracks

    async def search_isrc(self, isrc: str) -> tuple[Track, ...]:
        if not _ISRC.fullmatch(isrc):
            return ()
        params = {"type": "track", "q": f"isrc:{isrc.upper()}", "limit": "10"}
        answer = await self._get("a search", _Search, ("search",), params)
        found = (_told(item.id, item) for item in answer.value.tracks.items if item is not None and item.id)
        # The search is a search: what it finds may only be near.
        return tuple(track for track in found if track.isrc == isrc.upper())

    def _paired(self, what: str, asked: Sequence[str], found: Sequence[T | None]) -> list[tuple[str, T]]:
        """Answers come in the order of the ids, null for one that is not known."""
        if len(asked) != len(found):
            raise self._api.unreadable(what)
        return [(one, other) for one, other in zip(asked, found, strict=True) if other is not None]

    async def _get(self, what: str, answer: type[T], path: tuple[str, ...], params: Mapping[str, str]) -> Answer[T]:
        token = await self._valid_token()
        url = self._api.path("v1", *path)
        try:
            return await self._api.ask(what, answer, "GET", url, params=params, headers=bearer(token))
        except Terminal as error:
            if error.status != 401:
                raise
        # The token was withdrawn before its time: a new one, once, unless another caller has one already.
        token = await self._valid_token(not_this=token)
        return await self._api.ask(what, answer, "GET", url, params=params, headers=bearer(token))

    async def _valid_token(self, not_this: str = "") -> str:
        """The token, renewed once for all who wait for it."""
        async with self._renewing:
            if not self._token or self._token == not_this or self._clock() >= self._expires:
                self._token = ""
                token = await self._renewed()
                self._token = token.access_token
                self._expires = self._clock() + max(token.expires_in - _EARLY_SECONDS, token.expires_in / 2)
            return self._token

    async def _renewed(self) -> _Token:
        headers = form_headers(self._settings)
        url = self._accounts.path("api", "token")
        try:
            body = b"grant_type=client_credentials"
            return (await self._accounts.ask("a token", _Token, "POST", url, headers=headers, body=body)).value
        except Terminal as error:
            # It is the settings that are wrong, not what was asked for.
            text = f"HTTP {error.status} to a token: look at client_id and client_secret"
            raise Failed("spotify", text, status=error.status, outcome=error.outcome) from None


def bearer(token: str) -> dict[str, str]:
    """What says for whom something is asked of the web API."""
    return {"Authorization": f"Bearer {token}"}


def form_headers(settings: SpotifySettings) -> dict[str, str]:
    """The application's own login at the accounts service, for a form; raises Failed where it is not set."""
    name, secret = settings.client_id, settings.client_secret
    if name is None or secret is None:
        raise unset("spotify", "client_id" if name is None else "client_secret")
    login = b64encode(f"{quote_plus(name)}:{quote_plus(secret.get_secret_value())}".encode()).decode()
    return {"Authorization": f"Basic {login}", "Content-Type": "application/x-www-form-urlencoded"}


def _told(asked: str, found: _Track) -> Track:
    isrc = found.external_ids.isrc if found.external_ids is not None else None
    return Track(asked, found.name, found.album.id if found.album else None, isrc.upper() if isrc else None)


def _parts(ids: Collection[str], size: int) -> Iterator[list[str]]:
    """The ids that can be ones, each once, in parts of what one call takes."""
    left = iter(dict.fromkeys(one for one in ids if _ID.fullmatch(one)))
    while some := list(islice(left, size)):
        yield some
