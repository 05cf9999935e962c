"""A stand-in for Spotify with people: they agree on a page, have tokens, and play songs."""

from __future__ import annotations

from collections import defaultdict, deque
from datetime import datetime
from math import ceil
from typing import Any, Literal
from urllib.parse import urlencode

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from indexer.sidecar.fakes.base import Reply
from indexer.sidecar.fakes.faults import Call, Fault
from indexer.sidecar.fakes.made import number
from indexer.sidecar.fakes.people import REACH, Pair, Person, Play
from indexer.sidecar.fakes.plays import (
    Song,
    Spoilt,
    item_of,
    made_songs,
    ms_of,
    plays_between,
    unpacked,
    written,
)
from indexer.sidecar.fakes.spotify import FakeSpotify
from indexer.sidecar.fakes.spotify_accounts import (
    SCOPES,
    Access,
    Accounts,
    Clock,
    Refresh,
    Rotate,
    back,
    page,
    real_time,
    wrong_with,
)

_WEB_API = frozenset({"me", "recently_played", "albums", "tracks", "album", "search"})
_MOST_DIGITS = 13
_ICON = b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><rect width="1" height="1" fill="#%s"/></svg>'


class FakeSpotifyPeople(FakeSpotify):
    """The catalogue, and people whose last 50 plays are within reach; all by `clock`.

    Who agrees on the page is `agrees_as`, if that or a `login_hint` is given, else whoever is chosen there; `refuses`
    has everybody refuse. Of the redirect URIs, all are good unless `redirect_uris` are given. With `plays_per_hour`
    (a mean) people play of their own accord, the same ones at the same hour each time. `page_most` makes pages of plays
    smaller than asked for, and `next_base` has `next` name another address than ours. `polls` has the times at which
    each person's plays were asked for: retries count, further pages don't.

    Routes beside those of the catalogue: "authorize" (key: login_hint), "me" and "recently_played" (key: the person's
    id), "token" (key: the person's id, or nothing for the application's own). To who is in another process: GET and
    POST /_clock {"now": "2026-10-31T12:00:00Z"} (null: the real time), POST /_people {"people": [...]}, see
    `PersonGiven`, GET /_served, GET /_polls.
    """

    def __init__(
        self, *, port: int = 0, tracks: int = 3, strict: bool = False, clock: Clock = real_time,
        plays_per_hour: float = 0.0, rotate: Rotate = "never", grace: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(port=port, tracks=tracks, strict=strict)
        self.clock, self.plays_per_hour = clock, plays_per_hour
        self.accounts = Accounts(lambda: self.clock(), rotate, grace)
        self.people: dict[str, Person] = {}
        self.songs: list[Song] = list(made_songs())
        self.agrees_as: str | None = None
        self.refuses = False
        self.redirect_uris: set[str] | None = None
        self.page_most, self.next_base = REACH, ""
        self.polls: dict[str, list[datetime]] = defaultdict(list)
        self._numbers = {song.id: n for n, song in enumerate(self.songs)}
        self._items: dict[tuple[int, Spoilt | None], tuple[bytes, bytes]] = {}
        self._limit: tuple[int, float] | None = None
        self._lately: deque[float] = deque()

    # -- what tests set and read ---------------------------------------------------------------------------------

    def person(self, person: str, *, email: str | None = None, name: str | None = None) -> Person:
        """Make a person, or find the one of this id."""
        if person not in self.people:
            self.people[person] = Person(self, person, email or f"{person}@listeners.example", name or person)
        return self.people[person]

    def made_plays(self, person: str, start: datetime, end: datetime) -> list[Play]:
        """What a person plays of their own accord from `start` on and before `end`, oldest first."""
        return [self.told(play) for play in plays_between(person, ms_of(start), ms_of(end), self.plays_per_hour)]

    def rate_limit(self, requests: int, seconds: float) -> None:
        """Answer 429 to what is more than so many requests to the web API within so much time."""
        self._limit = requests, seconds
        self._lately.clear()

    @property
    def rotate(self) -> Rotate:
        return self.accounts.rotate

    @rotate.setter
    def rotate(self, rotate: Rotate) -> None:
        self.accounts.rotate = rotate

    @property
    def grace(self) -> bool:
        return self.accounts.grace

    @grace.setter
    def grace(self, grace: bool) -> None:
        self.accounts.grace = grace

    @property
    def served(self) -> set[tuple[str, str, int]]:
        """Person, track and millisecond of every play that ever went out whole and that has all of these."""
        return {play for person in self.people.values() for play in person.served_plays()}

    def give(self, person: Person, *, access: str | None = None, refresh: str | None = None) -> Pair:
        return self.accounts.give(Refresh(person, person.generation, SCOPES), access=access, refresh=refresh)

    def number_of(self, song: Song | int) -> int:
        if isinstance(song, int):
            return song
        if song.id not in self._numbers:
            self._numbers[song.id] = len(self.songs)
            self.songs.append(song)
        return self._numbers[song.id]

    def told(self, play: int) -> Play:
        ms, song = unpacked(play)
        return Play(ms, self.songs[song].id)

    # -- how it answers ------------------------------------------------------------------------------------------

    def routes(self, router: web.UrlDispatcher) -> None:
        super().routes(router)
        router.add_get("/authorize", self.answering("authorize", self._authorize, _hinted))
        router.add_get("/v1/me", self.answering("me", self._me, self._holder))
        played = self.answering("recently_played", self._recently_played, self._polled)
        router.add_get("/v1/me/player/recently-played", played)
        router.add_get("/image/{id}", _image)
        router.add_get("/_served", self._served_told)
        router.add_get("/_polls", self._polls_told)
        router.add_get("/_clock", self._clock_told)
        router.add_post("/_clock", self._clock_set)
        router.add_post("/_people", self._people_made)

    def authorized(self, request: web.Request) -> bool:
        if request.path == "/authorize":
            return True
        access = self.accounts.holder(_bearer(request))
        if request.path.startswith("/v1/me"):
            return access is not None
        return access is not None or super().authorized(request)

    def striking(self, call: Call) -> Fault | None:
        if call.route in _WEB_API and (wait := self._too_many()) is not None:
            return Fault("status", status=429, retry_after=wait)
        person = self.people.get(call.key)
        if person is not None and isinstance(person.broken, Fault) and person.broken.strikes(call):
            return person.broken
        return super().striking(call)

    def _too_many(self) -> int | None:
        """The wait in whole seconds where there were too many requests lately."""
        if self._limit is None:
            return None
        most, seconds = self._limit
        now, lately = self.clock().timestamp(), self._lately
        while lately and lately[0] <= now - seconds:
            lately.popleft()
        if len(lately) >= most:
            return max(1, ceil(lately[0] + seconds - now)) if lately else max(1, ceil(seconds))
        lately.append(now)
        return None

    async def _authorize(self, request: web.Request) -> Reply:
        query = dict(request.query)
        if wrong := wrong_with(query, self.client_id, self.redirect_uris):
            return Reply(wrong.encode(), 400, content_type="text/plain")
        if self.refuses or "refuse" in query:
            return back(query, error="access_denied")
        chosen = query.get("login_hint") or self.agrees_as
        if chosen is None:
            return page(query, self.people)
        if chosen not in self.people:
            return Reply(b"There is no such person", 400, content_type="text/plain")
        return back(query, code=self.accounts.code(self.people[chosen], query))

    async def _asker(self, request: web.Request) -> str:
        form = await request.post()
        known = self.accounts.codes.get(str(form.get("code"))) or self.accounts.refreshes.get(
            str(form.get("refresh_token"))
        )
        return known.person.id if known is not None else ""

    async def _token(self, request: web.Request) -> Reply:
        form = {name: str(value) for name, value in (await request.post()).items()}
        told: dict[str, Any] = {"token_type": "Bearer", "expires_in": self.accounts.expires_in}
        if form.get("grant_type") == "authorization_code":
            agreed = self.accounts.redeem(form)
            if isinstance(agreed, str):
                return _invalid_grant(agreed)
            pair = self.accounts.give(agreed)
            return Reply(told | {"access_token": pair.access_token, "refresh_token": pair.refresh_token,
                                 "scope": agreed.scope})  # fmt: skip
        if form.get("grant_type") == "refresh_token":
            renewed = self.accounts.renew(form.get("refresh_token", ""))
            if renewed is None:
                return _invalid_grant("Refresh token revoked")
            known, access, refresh = renewed
            told |= {"access_token": access, "scope": known.scope}
            return Reply(told | ({"refresh_token": refresh} if refresh is not None else {}))
        return await super()._token(request)

    async def _me(self, request: web.Request) -> Reply:
        access = self._access(request)
        person = access.person
        told: dict[str, Any] = {
            "id": person.id, "display_name": person.name, "type": "user", "uri": f"spotify:user:{person.id}",
            "href": f"{self.url}/v1/users/{person.id}", "images": [], "followers": {"href": None, "total": 0},
        }  # fmt: skip
        if "user-read-email" in access.scope.split():
            told["email"] = person.email
        return Reply(told)

    async def _recently_played(self, request: web.Request) -> Reply:
        access, query = self._access(request), request.query
        if "user-read-recently-played" not in access.scope.split():
            return Reply(self.error(403), 403)
        limit, after, before = (_number(query.get(name)) for name in ("limit", "after", "before"))
        limit = 20 if limit is None else limit
        if not 1 <= limit <= 50 or (after is not None and before is not None) or -1 in (after, before):
            return Reply(self.error(400), 400)
        person = access.person
        if person.broken == "not_json":
            return Reply(b"this is no JSON")
        reach = person.within_reach(ms_of(self.clock()), -1 if after is None else after)
        if before is not None:
            reach = [play for play in reach if unpacked(play)[0] < before]
        plays = reach[: min(limit, self.page_most)]
        body = self._played_body(person, plays, limit, len(reach) > len(plays))
        return Reply(body, sent=lambda: person.note_served(plays))

    def _played_body(self, person: Person, plays: list[int], limit: int, more: bool) -> bytes:
        items, following, cursors = [], b"null", b"null"
        for play in plays:
            ms, song = unpacked(play)
            head, tail = self._item(song, person.spoilt(play))
            items.append(head + written(ms) + tail)
        if plays:
            newest, oldest = unpacked(plays[0])[0], unpacked(plays[-1])[0]
            cursors = b'{"after":"%d","before":"%d"}' % (newest, oldest)
        address = f"{self.next_base or self.url}/v1/me/player/recently-played"
        if more:
            following = msgspec.json.encode(f"{address}?{urlencode({'before': oldest, 'limit': limit})}")
        return b'{"items":[%s],"next":%s,"cursors":%s,"limit":%d,"href":%s}' % (
            b",".join(items), following, cursors, limit, msgspec.json.encode(f"{address}?limit={limit}"),
        )  # fmt: skip

    def _item(self, song: int, spoilt: Spoilt | None) -> tuple[bytes, bytes]:
        item = self._items.get((song, spoilt))
        if item is None:
            item = self._items[song, spoilt] = item_of(self.songs[song], self.url, spoilt)
        return item

    def _access(self, request: web.Request) -> Access:
        return self.accounts.accesses[_bearer(request)]

    async def _holder(self, request: web.Request) -> str:
        known = self.accounts.accesses.get(_bearer(request))
        return known.person.id if known is not None else ""

    async def _polled(self, request: web.Request) -> str:
        person = await self._holder(request)
        if person and "before" not in request.query:
            self.polls[person].append(self.clock())
        return person

    # -- for other processes -------------------------------------------------------------------------------------

    async def _clock_told(self, _: web.Request) -> web.Response:
        return _told({"now": self.clock()})

    async def _clock_set(self, request: web.Request) -> web.Response:
        given = msgspec.json.decode(await request.read(), type=_ClockGiven).now
        self.clock = real_time if given is None else lambda: given
        return _told({"now": self.clock()})

    async def _served_told(self, _: web.Request) -> web.Response:
        return _told({"served": sorted(self.served)})

    async def _polls_told(self, _: web.Request) -> web.Response:
        return _told(self.polls)

    async def _people_made(self, request: web.Request) -> web.Response:
        made = []
        for given in msgspec.json.decode(await request.read(), type=_PeopleGiven).people:
            person = self.person(given.id, email=given.email, name=given.name)
            if given.revoke:
                person.revoke()
            if not isinstance(given.broken, UnsetType):
                person.broken = Fault(**given.broken) if isinstance(given.broken, dict) else given.broken
            if not given.revoke:
                pair = person.token_pair(access=given.access_token, refresh=given.refresh_token)
                made.append({"id": person.id, **msgspec.structs.asdict(pair)})
        return _told({"people": made})


class PersonGiven(msgspec.Struct):
    """A person as POST /_people has it: made or changed. Without tokens new ones are made; all come back.

    `broken` is the name of what is spoilt, or a Fault by its fields; null heals. `revoke` makes no tokens.
    """

    id: str
    email: str | None = None
    name: str | None = None
    access_token: str | None = None
    refresh_token: str | None = None
    broken: dict[str, Any] | Literal["no_album", "local_track", "missing_played_at", "not_json"] | UnsetType | None = (
        UNSET
    )
    revoke: bool = False


class _PeopleGiven(msgspec.Struct):
    people: list[PersonGiven]


class _ClockGiven(msgspec.Struct):
    now: datetime | None


def _told(what: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(what), content_type="application/json")


def _invalid_grant(why: str) -> Reply:
    return Reply({"error": "invalid_grant", "error_description": why}, 400)


def _bearer(request: web.Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def _number(text: str | None) -> int | None:
    """A parameter as a number; -1 where it is none."""
    if text is None:
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else -1


async def _hinted(request: web.Request) -> str:
    return request.query.get("login_hint", "")


async def _image(request: web.Request) -> web.Response:
    colour = f"{number(request.match_info['id']) & 0xFF_FFFF:06x}".encode()
    return web.Response(body=_ICON % colour, content_type="image/svg+xml")
