"""A stand-in for Spotify's catalogue and the accounts service that gives its tokens."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from aiohttp import web

from indexer.sidecar.fakes.base import Fake, Reply
from indexer.sidecar.fakes.made import MadeTrack, tracks_of


class FakeSpotify(Fake):
    """Knows the `albums` that it was given or asked for before; unless `strict`, any other album is made up.

    Its tokens hold until `revoke`. Routes: "token", "albums" and "tracks" (key: the ids with commas), "album" (key:
    the id; its further tracks), "search" (key: what was searched for).
    """

    name = "spotify"
    client_id, key = "spotify-test-client", "spotify-test-secret"

    def __init__(self, *, port: int = 0, tracks: int = 3, strict: bool = False) -> None:
        super().__init__(port=port)
        self.albums: dict[str, list[MadeTrack]] = {}
        self.made_tracks, self.strict = tracks, strict
        self.expires_in = 3600
        self.tokens = 0
        self._revoked = 0

    def revoke(self) -> None:
        """Withdraw every token that was given."""
        self._revoked = self.tokens

    def routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/api/token", self.answering("token", self._token, self._asker))
        router.add_get("/v1/albums", self.answering("albums", self._albums, _ids))
        router.add_get("/v1/albums/{id}/tracks", self.answering("album", self._album, _id))
        router.add_get("/v1/tracks", self.answering("tracks", self._tracks, _ids))
        router.add_get("/v1/search", self.answering("search", self._search, _searched))

    def authorized(self, request: web.Request) -> bool:
        sent = request.headers.get("Authorization", "")
        if request.path == "/api/token":
            return sent == "Basic " + b64encode(f"{self.client_id}:{self.key}".encode()).decode()
        number = sent.removeprefix("Bearer spotify-test-token-")
        return number.isdecimal() and self._revoked < int(number) <= self.tokens

    def error(self, status: int) -> Any:
        return {"error": {"status": status, "message": f"error {status}"}}

    async def _asker(self, _: web.Request) -> str:
        """Whom a token is for: the application itself."""
        return ""

    async def _token(self, request: web.Request) -> Reply:
        if (await request.post()).get("grant_type") != "client_credentials":
            return Reply({"error": "unsupported_grant_type"}, 400)
        self.tokens += 1
        token = f"spotify-test-token-{self.tokens}"
        return Reply({"access_token": token, "token_type": "Bearer", "expires_in": self.expires_in})

    async def _albums(self, request: web.Request) -> Reply:
        ids = (await _ids(request)).split(",")
        if len(ids) > 20:
            return Reply(self.error(400), 400)
        return Reply({"albums": [self._album_body(one) for one in ids]})

    def _album_body(self, album: str) -> Any:
        tracks = self._known(album)
        if tracks is None:
            return None
        return {"id": album, "name": f"Album {album}", "total_tracks": len(tracks), "tracks": _page(tracks, 0, 50)}

    def _known(self, album: str) -> list[MadeTrack] | None:
        if album not in self.albums and not self.strict:
            self.albums[album] = tracks_of(album, self.made_tracks)
        return self.albums.get(album)

    async def _album(self, request: web.Request) -> Reply:
        tracks, limit = self._known(await _id(request)), int(request.query.get("limit", 20))
        if tracks is None or limit > 50:
            return Reply(self.error(404), 404)
        return Reply(_page(tracks, int(request.query.get("offset", 0)), limit))

    async def _tracks(self, request: web.Request) -> Reply:
        ids = (await _ids(request)).split(",")
        if len(ids) > 50:
            return Reply(self.error(400), 400)
        found = {track.id: _track(album, track) for album, tracks in self.albums.items() for track in tracks}
        return Reply({"tracks": [found.get(one) for one in ids]})

    async def _search(self, request: web.Request) -> Reply:
        if request.query.get("type") != "track":
            return Reply(self.error(400), 400)
        isrc = (await _searched(request)).removeprefix("isrc:")
        found = [
            _track(album, track)
            for album, tracks in self.albums.items()
            for track in tracks
            # a search finds what is near, too
            if track.isrc[:-1] == isrc[:-1]
        ]
        return Reply({"tracks": {"items": found, "total": len(found), "limit": 10, "offset": 0, "next": None}})


def _track(album: str, track: MadeTrack) -> Any:
    isrc = {"isrc": track.isrc} if track.isrc else {}
    return {"id": track.id, "name": track.name, "album": {"id": album}, "external_ids": isrc, "popularity": 1}


def _page(tracks: list[MadeTrack], offset: int, limit: int) -> Any:
    items = [{"id": track.id, "name": track.name, "type": "track"} for track in tracks[offset : offset + limit]]
    return {"items": items, "total": len(tracks), "offset": offset, "limit": limit, "next": None}


async def _ids(request: web.Request) -> str:
    return request.query.get("ids", "")


async def _id(request: web.Request) -> str:
    return request.match_info["id"]


async def _searched(request: web.Request) -> str:
    return request.query.get("q", "")
