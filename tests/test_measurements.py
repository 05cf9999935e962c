"""POST measurement-jobs over HTTP: each row of its table, in the order auth, body, payment, work."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

import pytest
from measurekit import PATH, Stage, isrcs, songs_of, stage

from indexer.sidecar import drain
from indexer.sidecar.auth import EITHER

__all__ = ["stage"]
pytestmark = pytest.mark.timeout(120)

GOOD = {"source": "historical", "scope": {"isrcs": ["QZABC2400001"]}}
ONE_SCOPE = "Provide exactly one of scope.catalog_id, scope.album_ids, scope.isrcs"


class TestAuth:
    async def test_exactly_one_credential(self, stage: Stage) -> None:
        for headers in ({}, {"x-api-key": stage.ann.key, **stage.ann.bearer()}):
            told = await stage.api.post(PATH, GOOD, headers=headers)
            assert (told.status, told.json) == (401, {"status": "error", "error": EITHER})

    async def test_wrong_credentials(self, stage: Stage) -> None:
        await stage.run("update account_api_keys set expires_at = now() where id = $1", stage.bob.key_id)
        old = stage.ann.bearer(exp=int(time.time()) - 60)
        wrong: list[dict[str, str]] = [
            {"x-api-key": "ixk_0123456789abcdef_" + "a" * 43}, {"x-api-key": "nonsense"},
            {"x-api-key": stage.bob.key}, {"Authorization": "Bearer nonsense"}, old,
        ]  # fmt: skip
        for headers in wrong:
            assert (await stage.api.post(PATH, GOOD, headers=headers)).status == 401

    async def test_a_token_is_as_good_as_a_key(self, stage: Stage) -> None:
        assert (await stage.api.post(PATH, GOOD, headers=stage.ann.bearer())).status == 202

    async def test_before_the_body(self, stage: Stage) -> None:
        assert (await stage.api.ask("POST", PATH, data=b"{")).status == 401


def body(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**GOOD, **fields}.items() if value is not None}


CASES: list[tuple[dict[str, Any], str]] = [
    (body(source=None), "source must be current or historical"),
    (body(source="both"), "source must be current or historical"),
    (body(platforms=["tape"]), "platforms[0] must be spotify or chain"),
    (body(platforms=[]), "platforms must have at least 1 entries"),
    (body(scope=None), ONE_SCOPE),
    (body(scope=[]), ONE_SCOPE),
    (body(scope={}), ONE_SCOPE),
    (body(scope={"isrcs": []}), ONE_SCOPE),
    (body(scope={"album_ids": []}), ONE_SCOPE),
    (body(scope={"catalog_id": "nonsense"}), ONE_SCOPE),
    (body(scope={"isrcs": ["QZABC2400001"], "album_ids": ["a"]}), ONE_SCOPE),
    (body(scope={"isrcs": ["QZABC2400001", "nonsense"]}), "scope.isrcs[1] does not have the right form"),
    (body(scope={"album_ids": ["no id"]}), "scope.album_ids[0] does not have the right form"),
    (body(schedule="monthly"), "schedule must be once for historical measurements"),
    (body(extra=1), "extra is not known"),
]


class TestBody:
    """Bob has no card on file: his body is read before that matters."""

    async def test_not_json(self, stage: Stage) -> None:
        told = await stage.api.ask("POST", PATH, data=b"{", by=stage.bob)
        assert (told.status, told.error) == (400, "the body is not JSON")

    async def test_refused_with_its_name(self, stage: Stage) -> None:
        for sent, text in CASES:
            told = await stage.api.post(PATH, sent, by=stage.bob)
            assert (told.status, told.error) == (400, text), sent

    async def test_the_order_of_what_is_wrong(self, stage: Stage) -> None:
        told = await stage.api.post(PATH, {}, by=stage.bob)
        assert told.error == "source must be current or historical"


class TestPayment:
    async def test_without_a_card(self, stage: Stage) -> None:
        told = await stage.order("historical", stage.bob, isrcs=isrcs(1))
        assert told.status == 402 and told.json["status"] == "error" and told.error
        assert told.json["checkoutUrl"].startswith(stage.stripe.url)
        session = stage.stripe.sessions[0]
        assert session["mode"] == "setup" and session["client_reference_id"] == str(stage.bob.account)
        assert not any(name.startswith("line_items") for name in session)
        assert await stage.jobs() == {}

    async def test_before_the_work(self, stage: Stage) -> None:
        assert (await stage.order("historical", stage.bob, catalog_id=str(uuid4()))).status == 402

    async def test_current_is_exempt(self, stage: Stage) -> None:
        assert (await stage.order("current", stage.bob, album_ids=["a"])).status == 202
        assert stage.stripe.calls == []

    async def test_customer_is_remembered(self, stage: Stage) -> None:
        for _ in range(2):
            assert (await stage.order("historical", isrcs=isrcs(1))).status == 202
        assert await stage.value("select stripe_customer_id from accounts where id = $1", stage.ann.account)
        assert stage.stripe.counts("search").total() == 1

    async def test_stripe_is_away(self, stage: Stage) -> None:
        stage.stripe.fault("status", status=503, count=None, retry_after=7)
        told = await stage.order("historical", isrcs=isrcs(1))
        assert (told.status, told.headers["Retry-After"]) == (503, "7") and await stage.jobs() == {}


class TestScope:
    async def test_catalog_of_another_is_as_one_that_is_not_there(self, stage: Stage) -> None:
        catalog = await stage.catalog(stage.bob, isrcs(1))
        for source in ("historical", "current"):
            theirs = await stage.order(source, catalog_id=str(catalog))
            missing = await stage.order(source, catalog_id=str(uuid4()))
            assert theirs.status == missing.status == 404 and theirs.text == missing.text

    async def test_nothing(self, stage: Stage) -> None:
        stage.spotify.strict = True
        empty = str(await stage.catalog(stage.ann, []))
        nothing: list[tuple[str, dict[str, Any]]] = [
            ("historical", {"catalog_id": empty}), ("current", {"catalog_id": empty}),
            ("historical", {"album_ids": ["nowhere"]}), ("current", {"isrcs": isrcs(1)}),
            ("current", {"album_ids": ["nowhere"], "platforms": ["chain"]}),
        ]  # fmt: skip
        for source, scope in nothing:
            told = await stage.order(source, **scope)
            assert told.status == 400 and told.error.startswith("No recordings resolvable from the given scope"), scope

    async def test_albums_that_only_spotify_knows(self, stage: Stage) -> None:
        told = await stage.order("historical", album_ids=["one", "two", "one"])
        assert told.json == {"status": "success", "source": "historical", "id": None, "enqueued": 6, "skipped": 0}
        found = await stage.rows("select dedupe_key from indexer.pgqueuer")
        assert {row[0] for row in found} == {f"{drain.KIND}:{song}" for song in songs_of("one") | songs_of("two")}
        asked = len(stage.spotify.calls)
        assert (await stage.order("historical", album_ids=["one", "two"])).json["skipped"] == 6
        assert len(stage.spotify.calls) == asked

    async def test_spotify_is_away(self, stage: Stage) -> None:
        stage.spotify.fault("status", status=500, count=None)
        assert (await stage.order("historical", album_ids=["one"])).status == 503

    async def test_a_scope_of_many_unknown_songs_goes_on_at_each_request(self, stage: Stage) -> None:
        stage.spotify.strict = True
        for left in (150, 50):
            told = await stage.order("current", isrcs=isrcs(250))
            assert told.status == 503 and str(left) in told.error
        assert (await stage.order("current", isrcs=isrcs(250))).status == 400
        assert stage.spotify.counts("search").total() == 250
        assert set(stage.spotify.counts("search").values()) == {1}
