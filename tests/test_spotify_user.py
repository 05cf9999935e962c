"""Spotify on behalf of people, over real HTTP, and the rules of the stand-in that is asked for it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import msgspec
import pytest
from providerkit import everything_said, process

from indexer.config import SpotifySettings
from indexer.sidecar.fakes import Artist, FakeSpotifyPeople, Fault, Song
from indexer.sidecar.fakes.spotify_accounts import challenge_of
from indexer.sidecar.providers import Failed, ProviderError, Saturated, Terminal
from indexer.sidecar.providers.spotify_user import PlayedPage, Profile, SpotifyUser, Tokens

NOW = datetime(2026, 10, 31, 12, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1_000)
BACK = "https://app.example/connect/spotify/callback?at=home"
VERIFIER = "v" * 43
ARTISTS = (Artist("a1", "A"), Artist("a2", "B"))
SONG = Song("song1", "Ünbroken “Song”", "album1", "Album", ARTISTS, 61_000, "QZABC2400001")


class Time:
    """The stand-in's clock."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def passes(self, **how: float) -> None:
        self.now += timedelta(**how)


class Stage:
    def __init__(self, fake: FakeSpotifyPeople, user: SpotifyUser, time: Time) -> None:
        self.fake, self.user, self.time = fake, user, time
        self.ada = fake.person("ada", email="ada@private.example", name="Ada Private")
        self.pair = self.ada.token_pair()

    async def played(self, **params: int) -> PlayedPage:
        return await self.user.recently_played(
            self.pair.access_token, {name: str(value) for name, value in params.items()}
        )

    async def at_spotify(self, hint: str | None = None, **changed: str) -> aiohttp.ClientResponse:
        """What the person's browser gets of the address that we send it to."""
        url = self.user.authorize_url(BACK, "state 1&", challenge_of(VERIFIER))
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        query |= changed | ({} if hint is None else {"login_hint": hint})
        async with aiohttp.ClientSession() as browser:
            params = {name: value for name, value in query.items() if value}
            response = await browser.get(f"{self.fake.url}/authorize", params=params, allow_redirects=False)
            await response.read()
            return response

    async def code(self) -> str:
        return sent_back(await self.at_spotify("ada"))["code"]


def sent_back(response: aiohttp.ClientResponse) -> dict[str, str]:
    location = response.headers["Location"]
    assert response.status == 302 and location.startswith(f"{BACK}&")
    return {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}


@asynccontextmanager
async def staged(*, timeout: float = 15.0, **given: Any) -> AsyncIterator[Stage]:
    time = Time()
    async with FakeSpotifyPeople(clock=time, **given) as fake:
        settings = SpotifySettings.model_validate({
            "base_url": fake.url, "accounts_url": fake.url, "client_id": fake.client_id, "client_secret": fake.key,
            "timeout_seconds": timeout,
        })  # fmt: skip
        async with SpotifyUser(settings) as user:
            yield Stage(fake, user, time)


def moments(page: PlayedPage) -> list[int]:
    """When the plays of a page were, in seconds before NOW."""
    found = [datetime.fromisoformat(msgspec.json.decode(item)["played_at"]) for item in page.items]
    return [round((NOW - at).total_seconds()) for at in found]


async def refused_as(kind: type[ProviderError], asking: Any, code: str | None = None) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await asking
    error = caught.value
    assert type(error) is kind and error.code == code
    for secret in ("spotify-test-", "c3BvdGlmeS10ZXN0", "private.example", "Ada Private", VERIFIER, "127.0.0.1"):
        assert secret not in everything_said(error)
    return error


class TestConnecting:
    async def test_to_the_page_and_back(self) -> None:
        async with staged(rotate="always") as stage:
            asked = urlsplit(stage.user.authorize_url(BACK, "state 1&", challenge_of(VERIFIER)))
            assert f"{asked.scheme}://{asked.netloc}{asked.path}" == f"{stage.fake.url}/authorize"
            assert parse_qs(asked.query) == {
                "response_type": ["code"], "client_id": [stage.fake.client_id], "redirect_uri": [BACK],
                "scope": ["user-read-email user-read-recently-played user-top-read"], "state": ["state 1&"],
                "code_challenge_method": ["S256"], "code_challenge": [challenge_of(VERIFIER)],
            }  # fmt: skip
            answer = sent_back(await stage.at_spotify("ada"))
            assert answer["state"] == "state 1&"
            tokens = await stage.user.exchange(answer["code"], VERIFIER, BACK)
            assert tokens.refresh_token is not None and tokens.expires_in == 3600
            assert await stage.user.profile(tokens.access_token) == Profile("ada", "ada@private.example", "Ada Private")
            # a code holds once
            await refused_as(Terminal, stage.user.exchange(answer["code"], VERIFIER, BACK), "invalid_grant")
            assert stage.fake.keys("token") == ["ada", ""]

    async def test_codes_of_others(self) -> None:
        async with staged() as stage:
            for verifier, uri in (("w" * 43, BACK), (VERIFIER, "https://app.example/"), ("", BACK)):
                asking = stage.user.exchange(await stage.code(), verifier, uri)
                await refused_as(Terminal, asking, "invalid_grant")
            late = await stage.code()
            stage.time.passes(minutes=10)
            await refused_as(Terminal, stage.user.exchange(late, VERIFIER, BACK), "invalid_grant")
            await refused_as(Terminal, stage.user.exchange("made up", VERIFIER, BACK), "invalid_grant")

    async def test_refusing_and_the_page(self) -> None:
        async with staged() as stage:
            assert sent_back(await stage.at_spotify(refuse="yes"))["error"] == "access_denied"
            page = await stage.at_spotify()
            assert page.status == 200 and page.content_type == "text/html"
            text = await page.text()
            assert 'name="login_hint" value="ada">Agree as Ada Private<' in text and 'value="state 1&amp;"' in text
            stage.fake.agrees_as = "ada"
            assert sent_back(await stage.at_spotify())["code"]
            stage.fake.refuses = True
            back = sent_back(await stage.at_spotify())
            assert back == {"at": "home", "error": "access_denied", "state": "state 1&"}

    @pytest.mark.parametrize(
        "changed",
        [
            {"client_id": "other"}, {"redirect_uri": "javascript:1"}, {"redirect_uri": "https://app.example/other"},
            {"response_type": "token"}, {"scope": "everything"}, {"scope": ""}, {"state": ""},
            {"code_challenge_method": "plain"}, {"code_challenge": "short"}, {"login_hint": "nobody"},
        ],
    )  # fmt: skip
    async def test_what_the_page_does_not_take(self, changed: dict[str, str]) -> None:
        async with staged() as stage:
            stage.fake.redirect_uris = {BACK}
            assert (await stage.at_spotify("ada")).status == 302
            assert (await stage.at_spotify(**({"login_hint": "ada"} | changed))).status == 400


class TestTokens:
    async def test_without_rotation(self) -> None:
        async with staged() as stage:
            for _ in range(2):
                tokens = await stage.user.refresh(stage.pair.refresh_token)
                assert tokens.refresh_token is None
                assert (await stage.user.profile(tokens.access_token)).id == "ada"

    @pytest.mark.parametrize("use", ["refresh", "access"])
    async def test_the_old_one_holds_until_the_new_one_is_used(self, use: str) -> None:
        async with staged(rotate="always") as stage:
            old = stage.pair.refresh_token
            await stage.user.refresh(old)
            # its answer was lost, for all that we know
            tokens = await stage.user.refresh(old)
            assert tokens.refresh_token not in (None, old)
            await self._use(stage, tokens, use)
            await refused_as(Terminal, stage.user.refresh(old), "invalid_grant")
            assert (await stage.user.refresh(tokens.refresh_token or "")).access_token

    async def _use(self, stage: Stage, tokens: Tokens, what: str) -> None:
        if what == "access":
            await stage.user.profile(tokens.access_token)
        else:
            await stage.user.refresh(tokens.refresh_token or "")

    async def test_rotation_without_grace_and_by_chance(self) -> None:
        async with staged(rotate="always", grace=False) as stage:
            tokens = await stage.user.refresh(stage.pair.refresh_token)
            await refused_as(Terminal, stage.user.refresh(stage.pair.refresh_token), "invalid_grant")
            stage.fake.rotate = 0.5
            current, rotated = tokens.refresh_token or "", 0
            for _ in range(40):
                fresh = (await stage.user.refresh(current)).refresh_token
                current, rotated = fresh or current, rotated + (fresh is not None)
            assert 8 < rotated < 32

    async def test_expiry_and_revocation(self) -> None:
        async with staged() as stage:
            stage.time.passes(seconds=3599)
            assert (await stage.user.profile(stage.pair.access_token)).id == "ada"
            stage.time.passes(seconds=1)
            assert (await refused_as(Terminal, stage.user.profile(stage.pair.access_token))).status == 401
            other = stage.fake.person("other").token_pair()
            tokens, code = await stage.user.refresh(stage.pair.refresh_token), await stage.code()
            stage.ada.revoke()
            assert (await refused_as(Terminal, stage.user.profile(tokens.access_token))).status == 401
            await refused_as(Terminal, stage.user.refresh(stage.pair.refresh_token), "invalid_grant")
            await refused_as(Terminal, stage.user.exchange(code, VERIFIER, BACK), "invalid_grant")
            assert (await stage.user.profile(other.access_token)).id == "other"
            # the person agrees anew
            assert (await stage.user.exchange(await stage.code(), VERIFIER, BACK)).refresh_token

    async def test_the_application_is_asked_for_its_own_secret(self) -> None:
        async with staged() as stage:
            stage.fake.key = "spotify-test-other"
            assert (await refused_as(Terminal, stage.user.refresh(stage.pair.refresh_token))).status == 401
        nobody = SpotifyUser(SpotifySettings())
        await refused_as(Failed, nobody.refresh("spotify-test-refresh"))
        with pytest.raises(Failed, match=r"set providers\.spotify\.client_id"):
            nobody.authorize_url(BACK, "s", "c")


class TestPlays:
    async def test_a_play_as_it_comes(self) -> None:
        async with staged() as stage:
            at = NOW - timedelta(milliseconds=1)
            play = stage.ada.play(SONG, at)
            page = await stage.played()
            assert page.next is None and len(page.items) == 1
            item = msgspec.json.decode(page.items[0])
            track = item["track"]
            assert item["played_at"] == "2026-10-31T11:59:59.999Z" and item["context"]["type"] == "album"
            assert (track["id"], track["name"], track["duration_ms"]) == ("song1", SONG.name, 61_000)
            assert (track["album"]["id"], track["album"]["name"]) == ("album1", "Album")
            assert [one["id"] for one in track["artists"]] == ["a1", "a2"]
            assert track["external_ids"] == {"isrc": "QZABC2400001"}
            assert track["album"]["images"][0]["url"].startswith(stage.fake.url)
            assert stage.fake.served == {("ada", "song1", play.ms)}

    async def test_fifty_are_within_reach(self) -> None:
        async with staged() as stage:
            for ago in range(-5, 60):
                stage.ada.play(abs(ago), NOW - timedelta(seconds=ago))
            assert moments(await stage.played()) == list(range(50))
            assert moments(await stage.played(before=NOW_MS - 48_000)) == [49]
            assert [play.ms for play in stage.ada.plays_within_reach(NOW)] == [NOW_MS - n * 1_000 for n in range(50)]
            stage.time.passes(seconds=3)
            assert moments(await stage.played()) == list(range(-3, 47))

    async def test_cursors_are_exclusive(self) -> None:
        async with staged() as stage:
            for ago in (1, 2, 3):
                stage.ada.play(ago, NOW - timedelta(seconds=ago))
            assert moments(await stage.played(after=NOW_MS - 2_000)) == [1]
            assert moments(await stage.played(after=NOW_MS - 2_001)) == [1, 2]
            assert moments(await stage.played(before=NOW_MS - 2_000)) == [3]
            assert moments(await stage.played(after=NOW_MS)) == []
            for wrong in ({"after": 1, "before": 1}, {"limit": 51}, {"limit": 0}, {"after": -1}):
                assert (await refused_as(Terminal, stage.played(**wrong))).status == 400
            assert len(stage.fake.polls["ada"]) == 6 and stage.fake.polls["ada"][0] == NOW

    async def test_pages_to_the_end(self) -> None:
        async with staged() as stage, FakeSpotifyPeople() as elsewhere:
            for ago in range(7):
                stage.ada.play(ago, NOW - timedelta(seconds=ago))
            # where `next` points to is never asked
            stage.fake.page_most, stage.fake.next_base = 3, elsewhere.url
            page, seen = await stage.played(), list[int]()
            pages = [moments(page)]
            while page.next is not None:
                seen.append(int(page.next["before"]))
                page = await stage.user.recently_played(stage.pair.access_token, page.next)
                pages.append(moments(page))
            assert pages == [[0, 1, 2], [3, 4, 5], [6]]
            assert seen == [NOW_MS - 2_000, NOW_MS - 5_000]
            assert elsewhere.calls == [] and len(stage.fake.polls["ada"]) == 1
            # With a cursor there is a next page where plays after it are left; that one knows of the cursor no more.
            page = await stage.played(after=NOW_MS - 4_000)
            assert moments(page) == [0, 1, 2] and page.next == {"before": str(NOW_MS - 2_000)}
            assert moments(await stage.user.recently_played(stage.pair.access_token, page.next)) == [3, 4, 5]
            assert (await stage.played(after=NOW_MS - 3_000)).next is None

    async def test_played_of_their_own_accord(self) -> None:
        async with staged(plays_per_hour=12) as stage:
            hour = timedelta(hours=1)
            counts = [len(stage.fake.made_plays(f"p{n}", NOW, NOW + hour)) for n in range(500)]
            assert 10 < sum(counts) / 500 < 14 and max(counts) <= 40
            made = stage.fake.made_plays("ada", NOW - 6 * hour, NOW)
            another = FakeSpotifyPeople(plays_per_hour=12)
            assert made == sorted(set(made)) == another.made_plays("ada", NOW - 6 * hour, NOW)
            own = stage.ada.play(SONG, NOW - timedelta(minutes=7))
            expected = sorted([own, *made])[-50:]
            assert stage.ada.plays_within_reach(NOW) == expected[::-1]
            # Polled each hour, nothing is lost.
            await stage.played()
            for _ in range(5):
                before = int(stage.time.now.timestamp() * 1_000)
                stage.time.passes(hours=1)
                stage.pair = stage.ada.token_pair()
                await stage.played(after=before)
            heard = {("ada", play.track, play.ms) for play in stage.fake.made_plays("ada", NOW, stage.time.now)}
            assert stage.fake.served == heard | {("ada", play.track, play.ms) for play in expected}

    async def test_spoilt_plays(self) -> None:
        async with staged() as stage:
            whole = stage.ada.play(1, NOW)
            for n, spoilt in enumerate(("no_album", "local_track", "missing_played_at"), 1):
                stage.ada.play(1, NOW - timedelta(seconds=n), spoilt=spoilt)
            items = [msgspec.json.decode(item) for item in (await stage.played()).items]
            assert items[1]["track"]["album"] is None
            assert items[2]["track"]["id"] is None and items[2]["track"]["is_local"] is True
            assert "played_at" not in items[3]
            # What has no id or no moment can't be archived.
            assert {ms for _, _, ms in stage.fake.served} == {whole.ms, whole.ms - 1_000}
            stage.ada.broken = "local_track"
            other = stage.fake.person("other")
            other.play(1, NOW)
            pages = [await stage.user.recently_played(one.token_pair().access_token, {}) for one in (stage.ada, other)]
            ids = [[msgspec.json.decode(item)["track"]["id"] for item in page.items] for page in pages]
            assert ids == [[None] * 4, [whole.track]]


class TestFaults:
    @pytest.mark.parametrize(
        ("broken", "kind", "status"),
        [
            (Fault("status", None, status=429, retry_after=7), Saturated, 429),
            (Fault("status", None, status=401), Terminal, 401), (Fault("status", None, status=403), Terminal, 403),
            (Fault("status", None, status=500), Failed, 500), (Fault("status", None, status=503), Saturated, 503),
            (Fault("drop", None), Saturated, None), (Fault("cut", None), Saturated, None),
            (Fault("slow", None, seconds=1), Saturated, None), (Fault("stall", None, seconds=1), Saturated, None),
            (Fault("html", None), Failed, 200), (Fault("empty", None), Failed, 200),
            (Fault("truncated", None), Failed, 200),
            ("not_json", Failed, 200),
        ],
    )  # fmt: skip
    async def test_one_person_alone(self, broken: Any, kind: type[ProviderError], status: int | None) -> None:
        late = getattr(broken, "kind", "") in ("slow", "stall")
        async with staged(timeout=0.3 if late else 15) as stage:
            other = stage.fake.person("other")
            for person in (stage.ada, other):
                person.play(1, NOW)
            stage.ada.broken = broken
            error, well = await asyncio.gather(
                refused_as(kind, stage.played()), stage.user.recently_played(other.token_pair().access_token, {})
            )
            assert error.status == status
            assert not isinstance(error, Saturated) or error.retry_after == (7 if status == 429 else None)
            assert len(well.items) == 1
            assert {person for person, _, _ in stage.fake.served} == {"other"}
            stage.ada.broken = None
            assert len((await stage.played()).items) == 1

    async def test_everybody(self) -> None:
        async with staged() as stage:
            stage.fake.rate_limit(2, 30)
            await stage.played()
            stage.time.passes(seconds=10.5)
            await stage.played()
            error = await refused_as(Saturated, stage.played())
            assert isinstance(error, Saturated) and error.retry_after == 20
            # The accounts service counts for itself.
            assert (await stage.user.refresh(stage.pair.refresh_token)).access_token
            stage.time.passes(seconds=19.5)
            await stage.played()
            stage.fake.latency_seconds = 0.05
            started = asyncio.get_running_loop().time()
            await stage.user.refresh(stage.pair.refresh_token)
            assert asyncio.get_running_loop().time() - started >= 0.05


async def test_as_a_process() -> None:
    async with process("spotify", "--people", "2", "--plays-per-hour", "30") as (running, url):
        async with aiohttp.ClientSession() as session:

            async def ask(path: str, given: Any = None, token: str = "") -> Any:
                headers = {"Authorization": f"Bearer {token}"}
                method = "GET" if given is None else "POST"
                async with session.request(method, f"{url}{path}", json=given, headers=headers) as response:
                    return await response.json()

            assert await ask("/_clock", {"now": "2026-10-31T12:00:00Z"}) == await ask("/_clock")
            people = [{"id": "ada", "access_token": "spotify-test-1", "refresh_token": "spotify-test-2"}, {"id": "ben"}]
            made = (await ask("/_people", {"people": people}))["people"]
            assert made[0] == {**people[0], "expires_in": 3600.0} and made[1]["access_token"]
            assert (await ask("/v1/me", token="spotify-test-1"))["id"] == "ada"
            played = await ask("/v1/me/player/recently-played?limit=5", token="spotify-test-1")
            assert len(played["items"]) == len((await ask("/_served"))["served"]) == 5
            assert await ask("/_polls") == {"ada": ["2026-10-31T12:00:00Z"]}
            fault = {"kind": "status", "count": None, "status": 429, "retry_after": 3}
            await ask("/_people", {"people": [{"id": "ben", "broken": fault}, {"id": "ada", "revoke": True}]})
            for token, status in ((made[1]["access_token"], 429), ("spotify-test-1", 401)):
                assert (await ask("/v1/me", token=token))["error"]["status"] == status
            assert [call["key"] for call in (await ask("/_calls"))["calls"]] == ["ada", "ada", "ben", "ada"]
            assert (await ask("/_clock", {"now": None}))["now"] > "2026-11"
        os.kill(running.pid, signal.SIGTERM)
        assert await asyncio.wait_for(running.wait(), 30) == 0
