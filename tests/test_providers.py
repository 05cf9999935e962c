"""The providers' clients over real HTTP: what they ask and make of answers; stand-ins as processes."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import date
from typing import Any

import aiohttp
import pytest
from providerkit import ACCOUNT, ISRC, apify_at, process, songstats_at, spotify_at, stripe_at

from indexer.config import ProvidersSettings
from indexer.sidecar.fakes import FakeApify, FakeSongstats, FakeSpotify, FakeStripe, MadeTrack, body_of, tracks_of
from indexer.sidecar.providers import (
    CardOnFile,
    Failed,
    History,
    PlayCount,
    Point,
    Saturated,
    Terminal,
    Track,
    open_providers,
)


class TestSongstats:
    async def test_history(self) -> None:
        async with FakeSongstats() as fake, songstats_at(fake) as client:
            fake.histories[ISRC] = [
                {"date": "2024-02-01", "streams_total": 20, "streams_current": 3},
                {"date": "2024-01-31", "streams_total": 10},
            ]
            expected = (Point(date(2024, 1, 31), 10), Point(date(2024, 2, 1), 20))
            assert await client.history(ISRC) == History(expected)
            assert fake.keys("historic_stats") == [ISRC]

    @pytest.mark.parametrize(
        "point",
        [
            {"streams_total": 1}, {"date": None, "streams_total": 1}, {"date": "soon", "streams_total": 1},
            {"date": "2024-02-30", "streams_total": 1}, {"date": "20240101", "streams_total": 1},
            {"date": 20240101, "streams_total": 1}, {"date": "2024-W01-1", "streams_total": 1},
            {"date": "2024-01-01junk", "streams_total": 1}, {"date": "2024-01-01"},
            {"date": "2024-01-01", "streams_total": None}, {"date": "2024-01-01", "streams_total": "1"},
            {"date": "2024-01-01", "streams_total": True}, {"date": "2024-01-01", "streams_total": -1},
            {"date": "2024-01-01", "streams_total": 2**63}, {"date": "2024-01-01", "streams_total": [1]},
            None, 7, "2024-01-01", [],
        ],
    )  # fmt: skip
    async def test_points_that_say_nothing(self, point: Any) -> None:
        async with FakeSongstats() as fake, songstats_at(fake) as client:
            fake.histories[ISRC] = [point, {"date": "2024-01-01", "streams_total": 5}]
            assert await client.history(ISRC) == History((Point(date(2024, 1, 1), 5),), dropped=1)

    async def test_points_in_other_dress(self) -> None:
        async with FakeSongstats() as fake, songstats_at(fake) as client:
            fake.histories[ISRC] = [
                {"date": "2024-01-02T00:00:00Z", "streams_total": 8.0},
                {"date": "2024-01-01", "streams_total": 2**63 - 1},
                {"date": "2024-01-02", "streams_total": 9},
            ]
            days = [(point.day.day, point.streams) for point in (await client.history(ISRC)).points]
            assert days == [(1, 2**63 - 1), (2, 9)]

    @pytest.mark.parametrize(
        ("stats", "points"),
        [
            ([], 0), ([{"source": "deezer", "data": {"history": [{"date": "2024-01-01", "streams_total": 1}]}}], 0),
            ([{"source": "spotify", "data": {}}], 0), ([{"source": "spotify", "data": None}], 0),
            ([{"source": "spotify"}], 0), ([{"source": "spotify", "data": {"history": None}}], 0),
            ([{"source": "x"}, *body_of([{"date": "2024-01-01", "streams_total": 1}])["stats"]], 1),
        ],
    )  # fmt: skip
    async def test_entries(self, stats: Any, points: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("indexer.sidecar.fakes.songstats.body_of", lambda _: {"stats": stats})
        async with FakeSongstats() as fake, songstats_at(fake) as client:
            assert len((await client.history(ISRC)).points) == points

    @pytest.mark.parametrize("body", [{"stats": None}, {"stats": {}}, {"stats": [1]}, {"error": "no"}])
    async def test_other_bodies(self, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("indexer.sidecar.fakes.songstats.body_of", lambda _: body)
        async with FakeSongstats() as fake, songstats_at(fake) as client:
            with pytest.raises(Failed, match="can't be read"):
                await client.history(ISRC)

    async def test_no_history_and_a_wrong_key(self) -> None:
        async with FakeSongstats() as fake, songstats_at(fake) as client, songstats_at(fake, api_key="no") as other:
            fake.missing.add(ISRC)
            with pytest.raises(Terminal) as caught:
                await client.history(ISRC)
            assert caught.value.status == 404
            with pytest.raises(Terminal, match="HTTP 401"):
                await other.history(ISRC)


class TestApify:
    async def test_a_run(self) -> None:
        slept: list[float] = []
        async with FakeApify() as fake, apify_at(fake, slept) as client:
            fake.polls = 3
            run = await client.start(["albumA", "albumB"])
            assert (run.id, run.over) == ("run1", False)
            counts = await client.collect(run.id)
        expected = [(album, one.id, one.play_count) for album in ("albumA", "albumB") for one in tracks_of(album, 3)]
        assert [(row.album_id, row.track_id, row.play_count) for row in counts.rows] == expected
        assert (counts.run_id, counts.dropped) == ("run1", 0)
        assert [call.route for call in fake.calls] == ["start", "run", "run", "run", "items"]
        assert fake.keys("start") == ["albumA,albumB"]
        assert slept == [2, 2]

    async def test_rows(self) -> None:
        async with FakeApify() as fake, apify_at(fake) as client:
            fake.rows["a"] = [
                {"album_id": "a", "track_id": "t1", "name": "One", "play_count": 5},
                {"albumId": "a", "trackId": "t2", "name": "Two", "playCount": "1234567"},
                {"albumId": "a", "id": "t3", "playcount": "1,234"},
                {"albumId": "a", "trackId": "t4", "playCount": 0.0},
                *({"albumId": "a", "trackId": "t", "playCount": bad} for bad in (None, "", "many", -1, 1.5, True)),
                {"albumId": "a", "trackId": "t", "playCount": 2**63},
                {"albumId": "a", "playCount": 1}, {"trackId": "t", "playCount": 1}, {"albumId": 3, "trackId": "t"},
                "text", None, {},
            ]  # fmt: skip
            counts = await client.collect((await client.start(["a"])).id)
        assert [(row.track_id, row.name, row.play_count) for row in counts.rows] == [
            ("t1", "One", 5), ("t2", "Two", 1_234_567), ("t3", "", 1_234), ("t4", "", 0),
        ]  # fmt: skip
        assert counts.dropped == 12

    @pytest.mark.parametrize("gives_total", [True, False])
    async def test_pages(self, gives_total: bool) -> None:
        async with FakeApify() as fake, apify_at(fake) as client:
            fake.gives_total = gives_total
            fake.rows["a"] = [{"albumId": "a", "trackId": f"t{n}", "playCount": n} for n in range(2_500)]
            # A page that is short since one of its items is empty is not the last.
            fake.rows["a"][500] = {}
            counts = await client.collect((await client.start(["a"])).id)
        assert [row.play_count for row in counts.rows] == [n for n in range(2_500) if n != 500]
        assert len(fake.keys("items")) == (3 if gives_total else 4)

    @pytest.mark.parametrize("status", ["FAILED", "ABORTED", "TIMED-OUT"])
    async def test_a_run_that_fails(self, status: str) -> None:
        async with FakeApify() as fake, apify_at(fake) as client:
            fake.ends_as = status
            with pytest.raises(Failed, match=f"ended as {status}"):
                await client.collect((await client.start(["a"])).id)
            assert fake.keys("items") == []

    async def test_a_run_that_never_ends(self) -> None:
        async with FakeApify() as fake, apify_at(fake, run_seconds=0.05) as client:
            fake.ends_as = "RUNNING"
            with pytest.raises(Saturated, match="not over after"):
                await client.collect((await client.start(["a"])).id)

    async def test_a_saturated_provider_does_not_lose_the_run(self) -> None:
        slept: list[float] = []
        async with FakeApify() as fake, apify_at(fake, slept) as client:
            run = await client.start(["a"])
            fake.fault("status", status=429, retry_after=3, match="run")
            fake.fault("status", status=502, count=2, match="items")
            assert len((await client.collect(run.id)).rows) == 3
        assert len(fake.runs) == 1
        assert slept == [3, 2, 1, 2]

    async def test_a_lost_start_is_not_repeated(self) -> None:
        async with FakeApify() as fake, apify_at(fake) as client:
            fake.fault("cut")
            with pytest.raises(Saturated):
                await client.start(["a"])
            assert len(fake.keys("start")) == len(fake.runs) == 1

    async def test_no_actor(self) -> None:
        async with FakeApify() as fake, apify_at(fake, actor=None) as client:
            with pytest.raises(Failed, match=r"set providers\.apify\.actor"):
                await client.start(["a"])


class TestSpotify:
    async def test_albums(self) -> None:
        async with FakeSpotify(strict=True) as fake, spotify_at(fake) as client:
            fake.albums = {f"album{n}": tracks_of(f"album{n}", 2) for n in range(45)}
            asked = [*fake.albums, "unknown", "album0", "no/id", "", "a,b"]
            found = await client.albums(asked)
            assert list(found) == list(fake.albums)
            assert found["album7"].name == "Album album7"
            assert [one.id for one in found["album7"].tracks] == [one.id for one in fake.albums["album7"]]
            assert [len(key.split(",")) for key in fake.keys("albums")] == [20, 20, 6]
            assert len(fake.keys("token")) == 1

    async def test_a_long_album(self) -> None:
        async with FakeSpotify() as fake, spotify_at(fake) as client:
            fake.albums["long"] = tracks_of("long", 120)
            found = (await client.albums(["long"]))["long"]
            assert [one.id for one in found.tracks] == [one.id for one in fake.albums["long"]]
            assert fake.keys("album") == ["long", "long"]

    async def test_tracks(self) -> None:
        async with FakeSpotify(strict=True) as fake, spotify_at(fake) as client:
            fake.albums["a"] = [*tracks_of("a", 60), MadeTrack("bare", "Bare", "", 0)]
            found = await client.tracks([*(one.id for one in fake.albums["a"]), "unknown", "\x00"])
            first = fake.albums["a"][0]
            assert found[first.id] == Track(first.id, first.name, "a", first.isrc)
            assert found["bare"] == Track("bare", "Bare", "a", None)
            assert len(found) == 61
            assert len(fake.keys("tracks")) == 2

    async def test_nothing_is_asked_for_nothing(self) -> None:
        async with FakeSpotify() as fake, spotify_at(fake) as client:
            assert await client.albums([]) == await client.tracks(["not an id"]) == {}
            assert await client.search_isrc("isrc:x OR y") == ()
            assert fake.calls == []

    async def test_search_takes_what_it_is_and_not_what_is_near(self) -> None:
        async with FakeSpotify() as fake, spotify_at(fake) as client:
            fake.albums["a"] = [MadeTrack("t1", "One", ISRC, 0), MadeTrack("t2", "Two", ISRC[:-1] + "9", 0)]
            assert await client.search_isrc(ISRC.lower()) == (Track("t1", "One", "a", ISRC),)
            assert fake.keys("search") == [f"isrc:{ISRC}"]

    async def test_one_token_for_all_and_a_new_one_in_time(self) -> None:
        now = [0.0]
        async with FakeSpotify() as fake, spotify_at(fake, lambda: now[0]) as client:
            await asyncio.gather(*(client.albums([f"a{n}"]) for n in range(20)))
            assert len(fake.keys("token")) == 1
            now[0] = 3_569
            await client.albums(["a"])
            assert len(fake.keys("token")) == 1
            now[0] = 3_570
            await asyncio.gather(*(client.albums([f"a{n}"]) for n in range(20)))
            assert len(fake.keys("token")) == 2

    async def test_a_withdrawn_token_is_renewed_once(self) -> None:
        async with FakeSpotify() as fake, spotify_at(fake) as client:
            await client.albums(["a"])
            fake.revoke()
            found = await asyncio.gather(*(client.albums([f"a{n}"]) for n in range(20)))
            assert all(len(one) == 1 for one in found)
            assert len(fake.keys("token")) == 2

    async def test_a_second_401_is_final(self) -> None:
        async with FakeSpotify() as fake, spotify_at(fake) as client:
            fake.fault("status", status=401, count=None, match="albums")
            with pytest.raises(Terminal, match="HTTP 401"):
                await client.albums(["a"])
            assert len(fake.keys("albums")) == 2

    async def test_a_wrong_secret_is_for_a_person(self) -> None:
        async with FakeSpotify() as fake, spotify_at(fake, client_secret="wrong") as client:
            with pytest.raises(Failed, match="look at client_id and client_secret"):
                await client.albums(["a"])

    async def test_too_few_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(FakeSpotify, "_album_body", lambda *_: None)
        async with FakeSpotify() as fake, spotify_at(fake) as client:
            assert await client.albums(["a"]) == {}
            with pytest.raises(Failed, match="can't be read"):
                client._paired("albums", ["a", "b"], [None])


class TestStripe:
    @pytest.mark.parametrize(
        ("cards", "default", "card"), [(0, None, False), (1, None, True), (0, "pm_1", True), (2, "pm_1", True)]
    )
    async def test_card_on_file(self, cards: int, default: str | None, card: bool) -> None:
        async with FakeStripe() as fake, stripe_at(fake) as client:
            customer = fake.add_customer(ACCOUNT, cards=cards, default=default)
            fake.add_customer("another")
            assert await client.card_on_file(ACCOUNT) == CardOnFile(customer.id, card)
            assert fake.keys("search") == [ACCOUNT]
            assert await client.card_on_file(ACCOUNT, customer.id) == CardOnFile(customer.id, card)
            assert len(fake.keys("search")) == 1

    async def test_nobody(self) -> None:
        async with FakeStripe() as fake, stripe_at(fake) as client:
            assert await client.card_on_file(ACCOUNT) == CardOnFile(None, False)

    async def test_an_account_can_not_widen_the_search(self) -> None:
        async with FakeStripe() as fake, stripe_at(fake) as client:
            fake.add_customer(ACCOUNT)
            account = f"x' OR metadata['account']:'{ACCOUNT}"
            assert not (await client.card_on_file(account)).card
            assert not (await client.card_on_file("back\\")).card
            assert fake.keys("search") == [account, "back\\"]

    @pytest.mark.parametrize("gone", ["deleted", "unknown"])
    async def test_a_customer_that_is_gone_is_searched_for(self, gone: str) -> None:
        async with FakeStripe() as fake, stripe_at(fake) as client:
            old, new = fake.add_customer(ACCOUNT), fake.add_customer(ACCOUNT)
            old.deleted = True
            known = old.id if gone == "deleted" else "cus_unknown"
            assert await client.card_on_file(ACCOUNT, known) == CardOnFile(new.id, True)

    async def test_the_customer_with_a_card_counts_else_the_oldest(self) -> None:
        async with FakeStripe() as fake, stripe_at(fake) as client:
            first, second = fake.add_customer(ACCOUNT, cards=0), fake.add_customer(ACCOUNT, cards=0)
            assert await client.card_on_file(ACCOUNT) == CardOnFile(first.id, False)
            second.cards = 1
            assert await client.card_on_file(ACCOUNT) == CardOnFile(second.id, True)

    async def test_setup_page(self) -> None:
        async with FakeStripe() as fake, stripe_at(fake) as client:
            customer = fake.add_customer(ACCOUNT, cards=0)
            assert await client.setup_url(ACCOUNT, customer.id) == f"{fake.url}/pay/cs_test_1"
        (form,) = fake.sessions
        assert form["mode"] == "setup"
        assert form["client_reference_id"] == form["metadata[account]"] == ACCOUNT
        assert form["success_url"] == "https://app.example/done?secret=page-secret"
        assert form["cancel_url"] == "https://app.example/no"

    async def test_one_customer_for_all_who_ask_at_once(self) -> None:
        async with FakeStripe() as fake, stripe_at(fake) as client, stripe_at(fake, cancel_url=None) as other:
            fake.searchable = False
            asked = [one.setup_url(ACCOUNT) for one in (client, other, client)]
            assert len(set(await asyncio.gather(*asked))) == 3
            assert [one.account for one in fake.customers.values()] == [ACCOUNT]
            await client.setup_url("another")
            assert len(fake.customers) == 2

    async def test_no_page_to_return_to(self) -> None:
        async with FakeStripe() as fake, stripe_at(fake, success_url=None) as client:
            with pytest.raises(Failed, match=r"set providers\.stripe\.success_url"):
                await client.setup_url(ACCOUNT)
            assert fake.calls == []


async def test_all_together() -> None:
    async with FakeSongstats() as songstats, FakeSpotify() as spotify, FakeApify() as apify, FakeStripe() as stripe:
        settings = ProvidersSettings.model_validate({
            "songstats": {"base_url": songstats.url, "api_key": songstats.key},
            "apify": {"base_url": apify.url, "token": apify.key, "actor": apify.actor},
            "spotify": {
                "base_url": spotify.url, "accounts_url": spotify.url, "client_id": spotify.client_id,
                "client_secret": spotify.key,
            },
            "stripe": {"base_url": stripe.url, "api_key": stripe.key},
        })  # fmt: skip
        apify.polls = 1
        async with open_providers(settings) as clients:
            counts = await clients.apify.collect((await clients.apify.start(["a"])).id)
            albums = await clients.spotify.albums(["a"])
            tracks = await clients.spotify.tracks([row.track_id for row in counts.rows])
            # The stand-ins agree on the music that they make up.
            assert [row.track_id for row in counts.rows] == [one.id for one in albums["a"].tracks] == list(tracks)
            assert isinstance(counts.rows[0], PlayCount)
            assert (await clients.songstats.history(ISRC)).points
            assert not (await clients.stripe.card_on_file(ACCOUNT)).card


async def test_a_stand_in_as_a_process() -> None:
    async with process("songstats", "--port", "0") as (running, url):
        fake = FakeSongstats()
        fake.port = int(url.rpartition(":")[2])
        async with songstats_at(fake) as client, aiohttp.ClientSession() as session:
            for isrc in ("B", "A", "B"):
                await client.history(isrc)
            async with session.get(f"{url}/_calls") as response:
                told = await response.json()
        assert [call["key"] for call in told["calls"]] == ["B", "A", "B"]
        assert told["counts"] == {"B": 2, "A": 1}
        assert {call["status"] for call in told["calls"]} == {200}
        os.kill(running.pid, signal.SIGTERM)
        assert await asyncio.wait_for(running.wait(), 30) == 0
