"""Sign-in by Spotify over HTTP: there and back, the places, the session, and what never gets out."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit
from uuid import uuid4

import jwt
import pytest
from daemon import until
from signinkit import TOKEN_KEY, Browser, Stage, signing_in

from indexer.sidecar.listening.vault import derived
from indexer.sidecar.providers.spotify_user import SCOPES

pytestmark = pytest.mark.timeout(60)

FLOW, SESSION = "listener-connect", "listener"


@pytest.fixture
async def stage(database_url: str) -> AsyncIterator[Stage]:
    async with signing_in(database_url) as running:
        yield running


def with_(path: str, **changes: str | None) -> str:
    """A way back with other parameters; None leaves one out."""
    place, _, query = path.partition("?")
    given = {**dict(parse_qsl(query)), **changes}
    return f"{place}?{urlencode({name: value for name, value in given.items() if value is not None})}"


def signed(stage: Stage, secret: str = TOKEN_KEY, **changes: Any) -> dict[str, str]:
    """A session's cookie as we would have made it, but for some claims."""
    now = int(stage.now.timestamp())
    claims = {"sub": str(uuid4()), "iat": now, "exp": now + 600, "purpose": "session", **changes}
    kept = {name: value for name, value in claims.items() if value is not None}
    return {"Cookie": f"{SESSION}={jwt.encode(kept, derived(secret, 'session'), 'HS256')}"}


# -- there and back ------------------------------------------------------------------------------------------------


async def test_the_whole_way_there_and_back(stage: Stage) -> None:
    browser = stage.browser()
    stage.known("ann")
    told = await browser.get("/connect/spotify?utm_source=mail")
    asked = {name: value[0] for name, value in parse_qs(urlsplit(told.headers["Location"]).query).items()}
    assert told.status == 302 and asked["scope"].split() == list(SCOPES)
    assert asked["redirect_uri"] == "http://127.0.0.1:8080/connect/spotify/callback"
    assert asked["code_challenge_method"] == "S256" and len(asked["state"]) >= 40
    # nothing of it can be read in the cookie, which goes to sign-in alone
    (flow,) = browser.given
    assert (flow["path"], flow["max-age"], flow["samesite"], flow["httponly"]) == ("/connect", "600", "Lax", True)
    assert asked["state"] not in flow.value and "state" not in flow.value
    told = await browser.get(await browser.agree(told.headers["Location"], "ann"))
    assert (told.status, told.headers["Location"], told.text) == (303, "/me", "")
    assert set(browser.cookies) == {SESSION} and told.headers["Cache-Control"] == "no-store"
    (row,) = await stage.rows("select * from listeners")
    assert (row["spotify_id"], row["tier"], row["is_active"]) == ("ann", "founding", True)
    assert row["created_at"] == stage.now and row["token_expires_at"] == stage.now + timedelta(hours=1)
    # the tokens are encrypted, and are those of the person
    access = stage.listening.vault.decrypt(row["access_token"])
    assert b"spotify" not in row["access_token"] and stage.spotify.accounts.holder(access) is not None
    assert stage.listening.vault.decrypt(row["refresh_token"]) in stage.spotify.accounts.refreshes
    # the first archive is ordered
    (job,) = await stage.rows("select entrypoint, payload, dedupe_key from indexer.pgqueuer")
    assert job["entrypoint"] == "listening.archive" and json.loads(job["payload"]) == {"userIds": [str(row["id"])]}
    assert job["dedupe_key"] == f"listening.archive:connected:{row['id']}"
    assert (await browser.get("/me/state")).json["state"] == "active"


async def test_a_known_person_comes_back_to_new_tokens(database_url: str) -> None:
    async with signing_in(database_url, founding_cap=1) as stage:
        ann = await stage.person("ann")
        before = (await stage.rows("select * from listeners"))[0]
        await stage.value(
            "update listeners set is_active = false, consecutive_failures = 3, last_failure_type = 'AUTH', "
            "cooling_until = $1", stage.now + timedelta(hours=1),
        )  # fmt: skip
        assert (await ann.get("/me/state")).json["state"] == "disconnected"
        other = stage.browser()
        told = await other.sign_in("ann", "/me?window=30d")  # every place is taken: hers among them
        assert (told.status, told.headers["Location"]) == (303, "/me?window=30d")
        after = (await stage.rows("select * from listeners"))[0]
        assert after["id"] == before["id"] and after["refresh_token"] != before["refresh_token"]
        assert (after["is_active"], after["consecutive_failures"], after["cooling_until"]) == (True, 0, None)
        assert (await other.get("/me/state")).json["state"] == (await ann.get("/me/state")).json["state"] == "active"
        assert await stage.value("select taken from listener_places") == 1


async def test_where_a_sign_in_may_lead_is_a_path_of_ours(stage: Stage) -> None:
    for path in ("//evil.example", "https://evil.example", "/\\evil.example", "/a\nb", "me", "/" + "x" * 400):
        told = await stage.browser().get("/connect/spotify?" + urlencode({"next": path}))
        assert told.status == 400 and "evil" not in told.text and told.headers["Content-Type"].startswith("text/html")
    stage.known("ann")
    for path in ("/", "/me/history?limit=5"):
        assert (await stage.browser().sign_in("ann", path)).headers["Location"] == path


# -- what is refused -----------------------------------------------------------------------------------------------


async def test_states_that_are_wrong_missing_late_or_used(stage: Stage) -> None:
    stage.known("ann")
    browser, other = stage.browser(), stage.browser()
    back, others = await browser.way_back("ann"), await other.way_back("ann")
    stranger = stage.browser()
    theirs = dict(parse_qsl(others.partition("?")[2]))["state"]
    for asker, path in (
        (stranger, back), (browser, with_(back, state=theirs)), (browser, with_(back, state=None)),
        (browser, with_(back, state="")), (browser, with_(back, state="ä")), (browser, others),
    ):  # fmt: skip
        told = await asker.get(path)
        assert told.status == 400 and told.headers["Content-Type"] == "text/html; charset=utf-8", path
        assert theirs not in told.text and SESSION not in asker.cookies
    tampered, value = stage.browser(), browser.cookies[FLOW][0]
    tampered.cookies[FLOW] = (value[:40] + ("A" if value[40] != "A" else "B") + value[41:], "/connect")
    assert (await tampered.get(back)).status == 400
    assert stage.spotify.counts("token").total() == 0  # nobody has even asked Spotify
    # the flow itself is still good, once; a copy of its cookie does not make it twice
    copy = stage.browser()
    copy.cookies = dict(browser.cookies)
    fresh = await stage.browser().way_back("ann")
    assert (await browser.get(back)).status == 303
    told = await copy.get(with_(back, code=dict(parse_qsl(fresh.partition("?")[2]))["code"]))
    assert told.status == 400 and "used already" in told.text and stage.spotify.counts("token").total() == 1
    # ten minutes
    stage.later(minutes=10, seconds=1)
    assert (await other.get(others)).status == 400
    assert await stage.value("select count(*) from listeners") == 1


async def test_pkce_holds_the_code_to_the_browser_that_asked(stage: Stage) -> None:
    """A code that was begun with another verifier is worth nothing, whoever brings it."""
    stage.known("ann")
    thief, victim = stage.browser(), stage.browser()
    own, theirs = await thief.way_back("ann"), await victim.way_back("ann")
    told = await thief.get(with_(own, code=dict(parse_qsl(theirs.partition("?")[2]))["code"]))
    assert (told.status, SESSION in thief.cookies) == (400, False)
    assert await stage.value("select count(*) from listeners") == 0


async def test_what_spotify_refuses_is_a_page_that_says_what_to_do(stage: Stage) -> None:
    stage.known("ann")
    browser = stage.browser()
    told = await browser.get(with_(await browser.way_back("ann"), code=None, error="access_denied"))
    assert told.status == 200 and "did not agree" in told.text and FLOW not in browser.cookies
    cases = [("error", {"error": "<script>"}, None, 400), ("no code", {"code": None}, None, 400),
             ("code", {"code": "spotify-test-code-none"}, None, 400),
             ("busy", {}, {"status": 503, "match": "token"}, 503), ("us", {}, {"status": 401, "match": "token"}, 502),
             ("not theirs", {}, {"status": 403, "match": "me"}, 403),
             ("html", {}, {"kind": "html", "match": "me"}, 502),
             ("many", {}, {"status": 429, "retry_after": 7, "match": "me"}, 503)]  # fmt: skip
    for name, changes, fault, status in cases:
        browser = stage.browser()
        back = with_(await browser.way_back("ann"), **changes)
        if fault is not None:
            stage.spotify.fault(fault.pop("kind", "status"), **fault)
        told = await browser.get(back)
        assert told.status == status and told.headers["Content-Type"].startswith("text/html"), (name, told)
        assert "<script" not in told.text and browser.cookies == {}
        policy = told.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        if name == "many":
            assert told.headers["Retry-After"] == "7"
    assert await stage.value("select count(*) from listeners") == 0


async def test_odd_names_and_none(stage: Stage) -> None:
    stage.spotify.person("odd", email="a\0b@listeners.example", name="N\0" + "ä" * 2_000)
    assert (await stage.browser().sign_in("odd")).status == 303
    (row,) = await stage.rows("select email, display_name from listeners")
    assert row["email"] == "ab@listeners.example" and len(row["display_name"]) < 2_000


@pytest.mark.parametrize(
    ("listening", "spotify", "named"),
    [
        ({"token_key": None}, {}, "listening.token_key"),
        ({}, {"client_secret": None}, "providers.spotify.client_secret"),
        ({"token_key": None}, {"client_id": None}, "listening.token_key and providers.spotify.client_id"),
    ],
)
async def test_without_its_settings_sign_in_says_which(
    database_url: str, listening: Mapping[str, Any], spotify: Mapping[str, Any], named: str
) -> None:
    async with signing_in(database_url, spotify=spotify, **listening) as stage:
        for path in ("/connect/spotify", "/connect/spotify/callback?code=x&state=y"):
            told = await stage.browser().get(path)
            assert told.status == 503 and named in told.text and told.headers["Content-Type"].startswith("text/html")
        assert (await stage.browser().get("/me/state", headers={"Cookie": f"{SESSION}=x.y.z"})).status == 401


async def test_an_address_may_sign_in_only_so_often(database_url: str) -> None:
    async with signing_in(database_url, visits_per_minute=3) as stage:
        told = [await stage.browser().get("/connect/spotify") for _ in range(4)]
        assert [one.status for one in told] == [302, 302, 302, 429]
        assert int(told[-1].headers["Retry-After"]) >= 1 and told[-1].headers["Content-Type"].startswith("text/html")


# -- places --------------------------------------------------------------------------------------------------------


async def test_a_hundred_at_once_for_the_last_place(database_url: str) -> None:
    """99 of 100 are taken; through the real way back, exactly one more gets in, and each other a place of its own."""
    async with signing_in(database_url, founding_cap=100) as stage:
        await stage.value(
            "with there as (insert into listeners (spotify_id) select 'early' || n from generate_series(1, 99) as n) "
            "update listener_places set taken = 99"
        )
        browsers = [stage.browser() for _ in range(100)]
        ways = [await one.way_back(stage.known(f"late{n}")) for n, one in enumerate(browsers)]
        told = await asyncio.gather(*(one.get(way) for one, way in zip(browsers, ways, strict=True)))
        assert sorted(one.status for one in told) == [200] * 99 + [303]
        assert sorted(_place(one.text) for one in told if one.status == 200) == list(range(1, 100))
        assert sum(SESSION in one.cookies for one in browsers) == 1
        assert await stage.value("select count(*) from listeners") == 100
        assert await stage.value("select taken from listener_places") == 100
        assert await stage.value("select count(*) from indexer.pgqueuer") == 1
        # what was told stays true, also for who asks again, and no token of theirs is kept anywhere
        waiting = {name: _place(one.text) for name, one in _named(told)}
        assert (await stage.rows("select spotify_id from listener_waitlist order by created_at"))[0][0] == min(
            waiting, key=lambda name: waiting[name]
        )
        again = max(waiting, key=lambda name: waiting[name])
        assert _place((await stage.browser().sign_in(again)).text) == 99


def _place(page: str) -> int:
    return int(page.partition("You are number ")[2].partition(" ")[0])


def _named(told: list[Any]) -> list[tuple[str, Any]]:
    return [(f"late{n}", one) for n, one in enumerate(told) if one.status == 200]


async def test_the_same_person_in_twenty_browsers_takes_one_place(stage: Stage) -> None:
    stage.known("ann")
    browsers = [stage.browser() for _ in range(20)]
    told = await asyncio.gather(*(one.sign_in("ann") for one in browsers))
    assert {one.status for one in told} == {303}
    assert await stage.value("select count(*) from listeners") == 1
    assert await stage.value("select taken from listener_places") == 1
    assert await stage.value("select count(*) from indexer.pgqueuer") == 1
    assert {(await one.get("/me/state")).status for one in browsers} == {200}


async def test_over_the_cap_nothing_is_kept_but_the_place_on_the_waitlist(database_url: str) -> None:
    async with signing_in(database_url, founding_cap=1) as stage:
        ann = await stage.person("ann")
        bob = stage.browser()
        told = await bob.sign_in(stage.known("bob"))
        assert told.status == 200 and _place(told.text) == 1 and bob.cookies == {}
        assert [row["spotify_id"] for row in await stage.rows("select * from listeners")] == ["ann"]
        assert (await ann.ask("DELETE", "/me")).status == 200  # her place is free
        assert (await bob.sign_in("bob")).status == 303
        assert await stage.value("select count(*) from listener_waitlist") == 0


# -- sessions ------------------------------------------------------------------------------------------------------


async def test_the_cookie_where_people_come_by_https(database_url: str) -> None:
    async with signing_in(database_url, public_url="https://listen.example", session_days=7) as stage:
        browser = await stage.person("ann")
        flow, over, session = browser.given
        assert (flow.key, flow["path"], flow["secure"]) == ("__Secure-listener-connect", "/connect", True)
        assert (over.key, over["path"], over["max-age"], over["secure"]) == (flow.key, "/connect", "0", True)
        assert (session.key, session["path"], session["max-age"]) == ("__Host-listener", "/", str(7 * 86_400))
        assert (session["secure"], session["httponly"], session["samesite"]) == (True, True, "Lax")
        assert session["domain"] == ""  # what the prefix asks for
        claims = jwt.decode(session.value, options={"verify_signature": False})
        assert set(claims) == {"sub", "iat", "exp", "purpose"} and claims["sub"] == str(browser.listener)
        document = (await stage.api.get("/openapi.json")).json
        scheme = document["components"]["securitySchemes"]["session"]
        assert (scheme["type"], scheme["in"], scheme["name"]) == ("apiKey", "cookie", "__Host-listener")
        assert (await browser.get("/me/state")).status == 200
        # by http the name without the prefix means nothing here
        stolen = {"Cookie": f"listener={session.value}"}
        assert (await stage.browser().get("/me/state", headers=stolen)).status == 401


async def test_the_cookie_where_people_come_by_http(stage: Stage) -> None:
    session = (await stage.person("ann")).given[-1]
    assert (session.key, session["secure"], session["httponly"], session["samesite"]) == (SESSION, "", True, "Lax")


async def test_sessions_that_are_none(stage: Stage) -> None:
    ann = await stage.person("ann")
    good = ann.cookies[SESSION][0]
    me = {"sub": str(ann.listener)}
    head, payload, mark = good.split(".")
    other = base64.urlsafe_b64encode(json.dumps({**jwt.decode(good, options={"verify_signature": False}),
                                                 "sub": str(uuid4())}).encode()).decode().rstrip("=")  # fmt: skip
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
    late = int(stage.now.timestamp()) - 1
    headers = [{"Cookie": f"{SESSION}={text}"} for text in (
        "", "x", f"{head}.{other}.{mark}", f"{none}.{payload}.", f"{head}.{payload}.{mark[:-2]}AA", f"{head}.{payload}",
        jwt.encode(me, "a secret of thirty-two bytes, at least", "HS256"),
    )]  # fmt: skip
    headers += [signed(stage, **me, exp=late), signed(stage, **me, exp=None), signed(stage, **me, purpose="reset"),
                signed(stage, **me, purpose=None), signed(stage, **me, iat=None), signed(stage, sub="x"),
                signed(stage, "another key of thirty-two bytes ...", **me), signed(stage, **me, exp=10**30),
                signed(stage)]  # a person who is not there  # fmt: skip
    for one in headers:
        told = await stage.browser().get("/me/state", headers=one)
        assert told.status == 401 and told.error == "Sign in with Spotify to see what is yours", one
    assert (await stage.browser().get("/me/state", headers=signed(stage, **me))).status == 200


async def test_a_session_ends_by_itself_and_is_renewed_before(stage: Stage) -> None:
    ann = await stage.person("ann")
    count = len(ann.given)
    stage.later(hours=23)
    await ann.get("/me/state")
    assert len(ann.given) == count
    idle = stage.browser()
    idle.cookies = dict(ann.cookies)
    for _ in range(4):  # whoever comes back keeps it
        stage.later(days=20)
        assert (await ann.get("/me/state")).status == 200
    assert len(ann.given) == count + 4
    assert (await idle.get("/me/state")).status == 401
    # signing out is the end of it, though it would have been renewed
    stage.later(days=2)
    told = await ann.ask("POST", "/me/signout")
    assert (told.status, told.headers["Location"], ann.cookies) == (303, "/", {})
    assert len(told.headers.getall("Set-Cookie")) == 1  # type: ignore[attr-defined]
    told = await ann.ask("POST", "/me/signout")
    assert told.status == 401 and "/connect/spotify" in told.text and told.headers["Content-Type"][:9] == "text/html"


async def test_a_key_is_replaced_without_anybody_signing_in_again(database_url: str) -> None:
    async with signing_in(database_url) as stage:
        old = dict((await stage.person("ann")).cookies)
        await stage.value("truncate accounts cascade")
    new = "a new key of at least thirty-two bytes"
    async with signing_in(database_url, token_key=new, old_token_keys=[TOKEN_KEY]) as stage:
        ann = stage.browser()
        ann.cookies = dict(old)
        assert (await ann.get("/me/state")).status == 200
        stage.later(days=2)
        assert (await ann.get("/me/state")).status == 200  # and now it is signed by the new one
        await stage.value("truncate accounts cascade")
    async with signing_in(database_url, token_key=new) as stage:
        assert (await Browser(stage).get("/me/state", headers={"Cookie": f"{SESSION}={old[SESSION][0]}"})).status == 401
        kept = stage.browser()
        kept.cookies = dict(ann.cookies)
        assert (await kept.get("/me/state")).status == 200


LISTENERS_OWN = (
    ("GET", "/me/history"), ("GET", "/me/top"), ("GET", "/me/state"), ("GET", "/me/export.ndjson"), ("DELETE", "/me"),
    ("POST", "/me/signout"),
)  # fmt: skip


async def test_accounts_and_listeners_are_strangers_to_each_other(stage: Stage) -> None:
    ann = await stage.person("ann")
    for method, path in LISTENERS_OWN:
        for headers in ({}, {"x-api-key": stage.api.ann.key}, stage.api.ann.bearer(), ann_as_bearer(ann)):
            assert (await stage.api.ask(method, path, headers=headers)).status == 401, path
    # an account whose id is the listener's is still no listener
    token = {"Cookie": f"{SESSION}={stage.api.ann.token(sub=str(ann.listener))}"}
    assert (await stage.api.get("/me/state", headers=token)).status == 401
    for path in ("/api/tasks/runs?id=6f0f8b0e-8f53-4f7c-9d0c-0a6a0c3b8a11", "/api/internal/playcount-maintenance"):
        for headers in ({}, ann_as_bearer(ann)):
            assert (await ann.get(path, headers=headers)).status == 401, path
    assert (await ann.get("/me/state", headers={"x-api-key": stage.api.ann.key})).status == 200


def ann_as_bearer(ann: Browser) -> dict[str, str]:
    return {"Authorization": f"Bearer {ann.cookies[SESSION][0]}"}


async def test_no_other_sites_page_changes_anything(stage: Stage) -> None:
    ann = await stage.person("ann")
    host = urlsplit(stage.api.url).netloc
    for headers in (
        {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "cross-site", "Origin": f"http://{host}"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"}, {"Origin": f"http://{host}.evil.example"},
    ):  # fmt: skip
        for method, path in (("DELETE", "/me"), ("POST", "/me/signout")):
            told = await ann.ask(method, path, headers=headers)
            assert told.status == 403 and "evil" not in told.text, headers
        # who only looks may come from a link
        assert (await ann.get("/me/state", headers={"Sec-Fetch-Site": "cross-site"})).status == 200
    for headers in (
        {"Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}, {"Origin": "http://127.0.0.1:8080"},
        {"Origin": "null", "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"},
    ):  # fmt: skip
        held = dict(ann.cookies)
        assert (await ann.ask("POST", "/me/signout", headers=headers)).status == 303, headers
        ann.cookies = held
    assert (await ann.ask("DELETE", "/me", headers={"Origin": f"http://{host}"})).status == 200


# -- what never gets out -------------------------------------------------------------------------------------------


async def test_no_token_e_mail_or_name_is_in_logs_metrics_or_errors(database_url: str) -> None:
    async with signing_in(database_url, founding_cap=1) as stage:
        ann, bob = await stage.person("ann"), stage.browser()
        texts = [(await bob.sign_in(stage.known("bob"))).text]
        back = await bob.way_back("bob")
        codes = [value for name, value in parse_qsl(back.partition("?")[2]) if name in ("code", "state")]
        flow = bob.cookies[FLOW][0]
        stage.spotify.fault("status", status=500, match="me")
        texts += [(await bob.get(back)).text, (await bob.get(back)).text]
        # a bug of ours, on the way back and with a session, which quotes whatever it has
        await stage.value("alter table listener_waitlist add constraint broken check (email is null) not valid")
        await stage.value("alter table listeners rename column is_active to is_not")
        back = await bob.way_back("bob")
        told = [await bob.get(back), await ann.get("/me/state")]
        assert [one.status for one in told] == [500, 500] and told[0].headers["Content-Type"].startswith("text/html")
        await stage.value("alter table listeners rename column is_not to is_active")
        texts += [one.text for one in told] + [(await stage.api.get("/metrics")).text, stage.api.stream.getvalue()]
        accounts = stage.spotify.accounts
        secrets = [
            *accounts.accesses, *accounts.refreshes, *codes, flow, ann.cookies[SESSION][0], "secret-mail",
            "Secret Name", stage.spotify.key, TOKEN_KEY,
        ]  # fmt: skip
        for text in texts:
            for secret in secrets:
                assert secret not in text, (secret, text)
        lines = [line for line in stage.api.log if line["event"] == "request" and line.get("listener")]
        assert {line["listener"] for line in lines} == {str(ann.listener)}
        assert sum("traceback" in line for line in stage.api.log) == 2


async def test_nobody_waits_for_anothers_answer_from_spotify(stage: Stage) -> None:
    """While Spotify dawdles over one, no transaction is open, and another takes a place."""
    stage.spotify.fault("slow", match="me", seconds=30)
    slow = asyncio.create_task(stage.browser().sign_in(stage.known("slow")))
    await until(lambda: stage.spotify.counts("me").total() == 1, "the question who it is")
    open_ = "select count(*) from pg_stat_activity where datname = current_database() and state ~ '^idle in tr'"
    assert await stage.value(open_) == 0
    await stage.person("quick")
    assert not slow.done()
    await stage.spotify.stop()
    assert (await slow).status == 503
    assert await stage.value("select taken from listener_places") == 1
