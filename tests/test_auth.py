"""Who may call: API keys, tokens, the cron secret, what failures cost, and that no secret that was sent comes out."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest
from aiohttp import web
from apikit import CRON_SECRET, JWT_SECRET, Api, Told, serving_api
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from pydantic import ValidationError

from indexer.config import Settings
from indexer.errors import ConfigError
from indexer.limits import Recent
from indexer.sidecar import keys, tokens
from indexer.sidecar.api import create_app, serving
from indexer.sidecar.paging import Page
from indexer.sidecar.routes import Answer, Body, Call, Query, route

pytestmark = pytest.mark.timeout(60)

NOBODY = "Exactly one of x-api-key or Authorization must be provided"
WRONG = "The API key or the token is not valid"


class Me(Answer):
    account: UUID
    key: str | None


class Word(Query):
    word: str


class Words(Body):
    words: list[str]


@route("GET", "/api/me", answers={200: Me})
async def me(call: Call) -> Me:
    """Who I am."""
    assert call.caller is not None
    return Me(account=call.account, key=call.caller.key)


@route("POST", "/api/words/{word}", answers={200: Me})
async def words(call: Call, path: Word, query: Page, body: Words) -> Me:
    """A bug that quotes what the caller proves itself with, as a client of another API might."""
    raise RuntimeError(f"the other side refuses {call.resources.get('quoted', '')}")


@route("GET", "/api/internal/tick", answers={202: Me}, access="cron")
async def tick(call: Call) -> Me:
    """What the scheduler calls."""
    return Me(account=UUID(int=0), key=None)


ROUTES = (me, words, tick)
MANY = {"failures_per_minute": 100_000}


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with serving_api(database_url, ROUTES, sidecar=MANY) as running:
        yield running


async def who(api: Api, *headers: tuple[str, str]) -> tuple[int, str]:
    told = await api.get("/api/me", headers=headers)
    if told.status == 401:
        assert told.headers["WWW-Authenticate"] == "Bearer"
    return told.status, told.json["account"] if told.status == 200 else told.error


# -- keys ----------------------------------------------------------------------------------------------------------


async def test_exactly_one_proof_is_wanted(api: Api) -> None:
    key, token = ("x-api-key", api.ann.key), ("Authorization", api.ann.bearer()["Authorization"])
    assert await who(api, key) == await who(api, token) == (200, str(api.ann.account))
    assert await who(api, ("authorization", token[1].replace("Bearer", "bearer"))) == (200, str(api.ann.account))
    for headers in ((), (key, token), (key, key), (token, token), (key, ("x-api-key", api.bob.key))):
        assert await who(api, *headers) == (401, NOBODY)
    for odd in (("x-api-key", ""), ("Authorization", ""), ("Authorization", "Basic YTpi"), ("Authorization", "Bearer")):
        assert await who(api, odd) == (401, WRONG)


async def test_wrong_keys_are_all_answered_alike(api: Api) -> None:
    key, id_ = api.ann.key, api.ann.key_id
    other = "A" if key[-1] != "A" else "B"
    for wrong in (
        key[:-1], key + "A", key[:-1] + other, key.upper(), f"ixk_{'0' * 16}_{key[-43:]}",
        api.bob.key.replace(api.bob.key_id, id_), id_, "ixk_", "ä" * 64, "x" * 4_000, f"{key} ", f"\u2003{key}",
    ):  # fmt: skip
        if wrong.strip(" ") != key:
            assert await who(api, ("x-api-key", wrong)) == (401, WRONG), wrong
    assert await who(api, ("x-api-key", key)) == (200, str(api.ann.account))


async def test_only_a_hash_is_stored_and_use_is_noted_once_a_minute(api: Api) -> None:
    async def last_used() -> datetime | None:
        async with api.database.acquire() as connection:
            row = await connection.fetchrow("select * from account_api_keys where id = $1", api.ann.key_id)
        assert row is not None and api.ann.key[-43:] not in str(dict(row))
        assert row["key_hash"] == keys.hashed(api.ann.key)
        found: datetime | None = row["last_used"]
        return found

    assert await last_used() is None
    assert await who(api, ("x-api-key", api.bob.key.replace(api.bob.key_id, api.ann.key_id))) == (401, WRONG)
    assert await last_used() is None, "only the whole key is a use of it"
    await who(api, ("x-api-key", api.ann.key))
    first = await last_used()
    assert first is not None
    async with api.database.acquire() as connection:
        await keys.note_use(connection, api.ann.key_id)
        assert await last_used() == first
        earlier = first - timedelta(minutes=2)
        await connection.execute("update account_api_keys set last_used = $1", earlier)
        await keys.note_use(connection, api.ann.key_id)
    assert (await last_used() or first) > first


async def test_expired_and_revoked_keys(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async with api.database.acquire() as connection:
        brief, _ = await keys.create(connection, api.ann.account, "", timedelta(seconds=0.5))
        assert await who(api, ("x-api-key", brief)) == (200, str(api.ann.account))
        await asyncio.sleep(0.6)
        # although it was looked up a moment ago
        assert await who(api, ("x-api-key", brief)) == (401, WRONG)
        key, id_ = await keys.create(connection, api.ann.account, "", timedelta(days=3))
        assert await who(api, ("x-api-key", key)) == (200, str(api.ann.account))
        assert await keys.revoke(connection, id_) is True and await keys.revoke(connection, id_) is False
    async with another(api, api.settings) as fresh:
        assert await who(fresh, ("x-api-key", key)) == (401, WRONG)
    # and the one that knew it, as soon as it looks again
    monkeypatch.setattr(Recent, "get", lambda self, name: None)
    assert await who(api, ("x-api-key", key)) == (401, WRONG)


@asynccontextmanager
async def another(api: Api, settings: Settings) -> AsyncIterator[Api]:
    """A second server on the same database, which has looked up nothing yet."""
    async with serving(create_app(settings, api.database, {}, ROUTES), settings.sidecar) as url:
        yield Api(url, api.session, api.database, settings, api.stream)


async def test_a_key_costs_no_query_each_time(api: Api) -> None:
    await who(api, ("x-api-key", api.ann.key))
    async with api.database.acquire() as connection, connection.transaction():
        await connection.execute("lock table account_api_keys, accounts in access exclusive mode")
        assert await who(api, ("x-api-key", api.ann.key)) == (200, str(api.ann.account))


# -- tokens --------------------------------------------------------------------------------------------------------


def unsigned(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, None, "none")  # type: ignore[arg-type]


async def test_tokens_that_are_not_good(api: Api) -> None:
    now, good = int(time.time()), {"sub": str(api.ann.account), "exp": int(time.time()) + 60}
    deep = base64.urlsafe_b64encode(b'{"alg":' + b"[" * 4_000).decode().rstrip("=")
    for token in (
        api.ann.token(exp=now - 60), api.ann.token(exp=None), api.ann.token(sub=None), api.ann.token(sub="ann"),
        api.ann.token(sub=str(uuid4())), api.ann.token(nbf=now + 600), api.ann.token(JWT_SECRET + "!"),
        api.ann.token(algorithm="HS512"), unsigned(good), api.ann.token()[:-4], "a.b.c", "..", "", f"{deep}.e30.e30",
        "eyJhbGciOiJIUzI1NiJ9.e30.AAAA",
    ):  # fmt: skip
        assert await who(api, ("Authorization", f"Bearer {token}")) == (401, WRONG), token
    assert await who(api, ("Authorization", f"Bearer {api.ann.token(aud='anybody', iss='x')}")) == (
        200, str(api.ann.account),
    )  # fmt: skip


async def test_a_secret_that_is_a_key_pairs_is_refused_at_the_start(database_url: str) -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).public_key()
    text = pem.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(ConfigError, match=r"auth\.jwt_secret"):
        async with serving_api(database_url, ROUTES, auth={"jwt_secret": text}):
            pass


async def test_audience_and_issuer_where_they_are_set(database_url: str) -> None:
    settings = {"jwt_audience": "indexer", "jwt_issuer": "https://id.example"}
    async with serving_api(database_url, ROUTES, auth=settings, sidecar=MANY) as api:
        good = {"aud": "indexer", "iss": "https://id.example"}
        for claims, status in (
            (good, 200), ({**good, "aud": ["other", "indexer"]}, 200), ({**good, "aud": "other"}, 401),
            ({**good, "iss": "other"}, 401), ({"aud": "indexer"}, 401), ({"iss": "https://id.example"}, 401),
        ):  # fmt: skip
            assert (await api.get("/api/me", headers=api.ann.bearer(**claims))).status == status, claims


def confused(claims: dict[str, Any], secret: bytes) -> str:
    """A token with the HMAC that PyJWT itself refuses to make: its secret is a public key."""
    parts = [{"alg": "HS256", "kid": "r1"}, claims]
    text = b".".join(base64.urlsafe_b64encode(json.dumps(one).encode()).rstrip(b"=") for one in parts)
    mac = base64.urlsafe_b64encode(hmac.digest(secret, text, "sha256")).rstrip(b"=")
    return (text + b"." + mac).decode()


class Issuer:
    """Serves a JWKS, and counts how often it is asked."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.weak = rsa.generate_private_key(65537, 1024)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.shown: list[dict[str, Any]] = [self.jwk("r1", self.rsa), self.jwk("weak", self.weak)]
        self.asked, self.status = 0, 200

    def jwk(self, kid: str, key: Any) -> dict[str, Any]:
        algorithm: Any = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
        return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}

    async def answer(self, _: web.Request) -> web.Response:
        self.asked += 1
        return web.json_response({"keys": self.shown}, status=self.status)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        application = web.Application()
        application.router.add_get("/jwks.json", self.answer)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/jwks.json"
        await runner.cleanup()


async def test_keys_of_an_issuer(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = Issuer()
    async with (
        issuer.serving() as url,
        serving_api(database_url, ROUTES, auth={"jwt_secret": None, "jwks_url": url}, sidecar=MANY) as api,
    ):

        def signed(key: Any, algorithm: str, kid: str | None = None) -> tuple[str, str]:
            claims = {"sub": str(api.ann.account), "exp": int(time.time()) + 60}
            return "Authorization", f"Bearer {jwt.encode(claims, key, algorithm, {'kid': kid} if kid else {})}"

        ann = (200, str(api.ann.account))
        assert await who(api, signed(issuer.rsa, "RS256", "r1")) == ann
        # the only key needs no id; a weak one is none
        assert await who(api, signed(issuer.rsa, "RS256")) == ann
        assert await who(api, signed(issuer.weak, "RS256", "weak")) == (401, WRONG)
        assert issuer.asked == 1, "asked again only after a pause"
        # the public key as the secret of an HMAC, and the algorithm that the token would like
        public = issuer.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        claims = {"sub": str(api.ann.account), "exp": int(time.time()) + 60}
        assert await who(api, ("Authorization", f"Bearer {confused(claims, public)}")) == (401, WRONG)
        assert await who(api, signed(issuer.rsa, "RS512", "r1")) == (401, WRONG)
        assert await who(api, signed(issuer.rsa, "PS256", "r1")) == (401, WRONG)
        # a new key is found by its unknown id
        issuer.shown.append(issuer.jwk("e1", issuer.ec))
        assert await who(api, signed(issuer.ec, "ES256", "e1")) == (401, WRONG)
        monkeypatch.setattr(tokens, "_PAUSE_SECONDS", 0.0)
        assert await who(api, signed(issuer.ec, "ES256", "e1")) == ann
        assert await who(api, signed(issuer.ec, "ES256", "r1")) == (401, WRONG)
        # an issuer that is away costs nobody its access, and one that takes a key back is heard
        issuer.status = 503
        monkeypatch.setattr(tokens, "_FRESH_SECONDS", 0.0)
        assert await who(api, signed(issuer.ec, "ES256", "e1")) == ann
        issuer.status, issuer.shown = 200, issuer.shown[:1]
        assert await who(api, signed(issuer.ec, "ES256", "e1")) == (401, WRONG)


async def test_without_the_issuers_keys_nobody_is_wrong(database_url: str) -> None:
    settings = {"jwt_secret": None, "jwks_url": "http://127.0.0.1:9/jwks.json"}
    async with serving_api(database_url, ROUTES, auth=settings) as api:
        token = jwt.encode({"sub": "x", "exp": 1}, rsa.generate_private_key(65537, 2048), "RS256")
        told = await api.get("/api/me", headers={"Authorization": f"Bearer {token}"})
        assert (told.status, told.error) == (500, "internal error")
        assert (await api.get("/api/me", by=api.ann)).status == 200


# -- the scheduler, and failures -----------------------------------------------------------------------------------


async def test_the_cron_secret(api: Api) -> None:
    bearer = {"Authorization": f"Bearer {CRON_SECRET}"}
    assert (await api.get("/api/internal/tick", headers=bearer)).status == 202
    for headers in (
        {}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": CRON_SECRET},
        {"Authorization": f"Basic {CRON_SECRET}"}, {"x-api-key": api.ann.key}, api.ann.bearer(),
        {"Authorization": "Bearer ä\udcff".encode("utf-8", "surrogateescape").decode("latin-1")},
    ):  # fmt: skip
        assert (await api.get("/api/internal/tick", headers=headers)).status == 401, headers
    assert await who(api, ("Authorization", bearer["Authorization"])) == (401, WRONG)
    none = api.settings.model_copy(update={"auth": api.settings.auth.model_copy(update={"cron_secret": None})})
    async with another(api, none) as other:
        for headers in ({}, bearer, {"Authorization": "Bearer "}):
            told = await other.get("/api/internal/tick", headers=headers)
            assert (told.status, told.error) == (500, "no cron secret is configured")


async def test_an_address_that_fails_too_often_waits(database_url: str) -> None:
    async with serving_api(database_url, ROUTES, sidecar={"failures_per_minute": 3, "trusted_proxies": 1}) as api:

        async def told(key: str, *address: str) -> int:
            headers = [("x-api-key", key), ("X-Forwarded-For", ", ".join(address))]
            return (await api.get("/api/me", headers=headers)).status

        assert await told(api.ann.key, "192.0.2.1") == 200
        wrong = keys.make()[0]
        assert [await told(wrong, "192.0.2.1") for _ in range(4)] == [401, 401, 401, 429]
        # what the caller itself wrote there makes nobody another one
        assert await told(wrong, "198.51.100.9", "192.0.2.1") == 429
        assert await told(api.bob.key, "192.0.2.1") == 429, "no query for this address"
        assert await told(api.ann.key, "192.0.2.1") == 200, "who was known a moment ago is not locked out by others"
        assert await told(wrong, "192.0.2.2") == 401 and await told(api.bob.key, "192.0.2.2") == 200


# -- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_no_secret_that_was_sent_comes_out(database_url: str, seed: int) -> None:
    """Keys, tokens and e-mail addresses, good and wrong ones, at every place of a request."""
    chance, quoted, answers = random.Random(seed), {"quoted": ""}, list[Told]()
    async with serving_api(database_url, ROUTES, quoted, sidecar=MANY) as api:
        secrets = [
            api.ann.key, keys.make()[0], api.ann.token(), api.ann.token("another secret of thirty-two bytes!"),
            CRON_SECRET, "cecile.d@example.org", JWT_SECRET,
        ]  # fmt: skip
        # a bug that quotes what the caller proved itself with
        for proof in ({"x-api-key": api.ann.key}, api.ann.bearer()):
            quoted["quoted"] = next(iter(proof.values())).removeprefix("Bearer ")
            secrets.append(quoted["quoted"])
            answers.append(await api.post("/api/words/x", {"words": []}, headers=proof))
            assert answers[-1].status == 500 and "refuses ********" in api.stream.getvalue()
        quoted["quoted"] = ""
        answers += [await scattered(api, chance, secrets) for _ in range(80)]
        for told in answers:
            assert told.error or told.status == 403
        everything = "\n".join(told.text + str(dict(told.headers)) for told in answers) + api.stream.getvalue()
        for secret in secrets:
            assert secret not in everything, secret


async def scattered(api: Api, chance: random.Random, secrets: list[str]) -> Told:
    """The answer to a request that has secrets in places where none belongs."""
    one, two, three, four = (chance.choice(secrets) for _ in range(4))
    headers = [
        chance.choice([
            ("x-api-key", one), ("Authorization", f"Bearer {one}"), ("Authorization", one), ("X-Request-Id", one + "!"),
            ("Cookie", one), ("Origin", one),
        ]),
        chance.choice([("X-Other", two), ("x-api-key", api.ann.key), ("X-Request-Id", two.ljust(49, "x"))]),
        chance.choice([("Content-Type", "application/json"), ("Content-Type", three), ("X-Nothing", "")]),
    ]  # fmt: skip
    body = chance.choice([
        json.dumps({"words": [four]}), json.dumps({four: 1}), json.dumps({"words": four}), four, f'{{"{four}',
        json.dumps({"words": [{four: three}]}),
    ])  # fmt: skip
    path = chance.choice([
        f"/api/words/{three}", f"/api/{three}", f"/api/words/x?{four}=1", f"/api/words/x?limit={four}",
        f"/api/words/x?cursor={four}", f"/api/internal/tick?{three}",
    ])  # fmt: skip
    method = chance.choice(["POST", "POST", "GET", "OPTIONS"])
    return await api.ask(method, path, headers=headers, data=body.encode() if method == "POST" else None)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"auth": {"jwt_secret": "x" * 31}}, "32 bytes long"),
        ({"auth": {"jwt_secret": "x" * 32, "jwks_url": "https://id.example/jwks"}}, "jwt_secret or jwks_url, not both"),
        ({"auth": {"jwks_url": "https://user:word@id.example/jwks"}}, "no user"),
        ({"auth": {"cron_secret": ""}}, "at least 1 item"),
        ({"sidecar": {"cors_origins": ["https://app.example/"]}}, "must be an origin"),
        ({"sidecar": {"cors_origins": ["app.example"]}}, "http:// or https://"),
    ],
)
def test_settings_that_are_refused(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused_:
        Settings(**sections)
    assert words in str(refused_.value) and "word@" not in str(refused_.value) and "xxx" not in str(refused_.value)
