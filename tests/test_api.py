"""The frame of the API over HTTP: what is refused, how errors look, what is told of a request and what never is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest
from aiohttp import web
from apikit import Api, serving_api
from apiroutes import GOOD, ROUTES, Held
from prometheus_client.parser import text_string_to_metric_families

from indexer.errors import ConfigError
from indexer.sidecar.api import serving

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with serving_api(database_url, ROUTES, sidecar={"cors_origins": ["https://app.example"]}) as running:
        yield running


# -- what is sent --------------------------------------------------------------------------------------------------

WRONG: list[tuple[Any, str]] = [
    ({**GOOD, "source": "someday"}, "source must be current or historical"),
    ({"scope": {"name": "x"}}, "source must be current or historical"),
    ({**GOOD, "source": None}, "source must be current or historical"),
    ({"source": "current"}, "scope is missing"),
    ({**GOOD, "scope": []}, "scope must be an object"),
    ({**GOOD, "scope": {}}, "Provide exactly one of scope.ids, scope.name"),
    ({**GOOD, "scope": {"name": "x", "ids": ["6f0f8b0e-8f53-4f7c-9d0c-0a6a0c3b8a11"]}}, "Provide exactly one of"),
    ({**GOOD, "scope": {"name": 5}}, "scope.name must be a text"),
    ({**GOOD, "scope": {"name": "x" * 21}}, "scope.name must have at most 20 characters"),
    ({**GOOD, "scope": {"ids": []}}, "scope.ids must have at least 1 entries"),
    ({**GOOD, "scope": {"ids": ["no-uuid"]}}, "scope.ids[0] must be a UUID"),
    ({**GOOD, "scope": {"name": "a\0b"}}, "the body holds a NUL character"),
    ({**GOOD, "count": "3"}, "count must be a whole number"),
    ({**GOOD, "count": 1.5}, "count must be a whole number"),
    ({**GOOD, "count": 11}, "count must be at most 10"),
    ({**GOOD, "count": 10**30}, "count must be"),
    ({**GOOD, "extra": 1}, "extra is not known"),
    ({**GOOD, "extra" * 20: 1}, "a field is not known"),
    ({**GOOD, "scope": {"name": "x", "<b>": 1}}, "scope is not known"),
    ([], "the body must be an object"),
    (None, "the body is not JSON"),
]


async def test_every_wrong_body_is_a_400_that_names_the_field(api: Api) -> None:
    for body, text in WRONG:
        told = await api.post("/api/orders", body, by=api.ann)
        assert (told.status, told.error.startswith(text)) == (400, True), (body, told)
    for raw in (b"", b"{", b"\xff", b'{"scope": {"name": "\xff"}}', b'{"scope": "\\ud800"}', b"[" * 100_000):
        told = await api.post("/api/orders", data=raw, by=api.ann)
        assert (told.status, told.error) == (400, "the body is not JSON"), raw[:40]
    # a backslash before u0000 is no NUL
    told = await api.post("/api/orders", data=rb'{"scope": {"name": "\\u0000"}, "source": "current"}', by=api.ann)
    assert told.status == 202


async def test_parameters_are_checked_and_converted(api: Api) -> None:
    id_ = "6f0f8b0e-8f53-4f7c-9d0c-0a6a0c3b8a11"
    told = await api.get(f"/api/items/{id_}?kinds=a&kinds=b&days=7", by=api.ann)
    assert told.json == {"item": id_, "kinds": ["a", "b"], "days": 7}
    for path, text in (
        ("no-uuid", "item must be a UUID"),
        (f"{id_}?days=0", "days must be at least 1"),
        (f"{id_}?days=x", "days must be a whole number"),
        (f"{id_}?days=1&days=2", "days is given twice"),
        (f"{id_}?kinds=c", "kinds[0] must be a or b"),
        (f"{id_}?other=1", "other is not known"),
        (f"{id_}?days=%00", "days holds a NUL character"),
    ):
        told = await api.get(f"/api/items/{path}", by=api.ann)
        assert (told.status, told.error) == (400, text)
    for limit, status in ((1, 200), (200, 200), (0, 400), (201, 400)):
        assert (await api.get(f"/api/pages?limit={limit}", by=api.ann)).status == status


async def test_content_types_and_sizes(api: Api) -> None:
    good = json.dumps(GOOD).encode()
    for headers, status in (
        ({}, 202), ({"Content-Type": "application/json; charset=utf-8"}, 202), ({"Content-Type": "text/plain"}, 202),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415),
    ):  # fmt: skip
        told = await api.post("/api/orders", data=good, headers=headers, by=api.ann)
        assert told.status == status, headers
    large = json.dumps({"name": "x" * 60}).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for byte in large:
            yield bytes([byte])

    for data in (large, pieces()):
        told = await api.post("/api/small", data=data, by=api.ann)
        assert (told.status, told.error) == (413, "the body is larger than 50 bytes")
    assert (await api.post("/api/small", {"name": "x"}, by=api.ann)).status == 200
    assert (await api.post("/api/orders", data=b" " * (1 << 20) + b"!", by=api.ann)).status == 413
    # who calls comes first
    assert (await api.post("/api/small", data=large)).status == 401


async def test_a_client_that_waits_before_it_sends_its_body(api: Api) -> None:
    for expect, status in (("100-continue", 202), ("s3cr3t", 417)):
        told = await api.post("/api/orders", GOOD, by=api.ann, headers={"Expect": expect})
        assert told.status == status and "s3cr3t" not in told.text
    assert told.error == "the expectation can't be met"


async def test_unknown_routes_and_methods(api: Api) -> None:
    told = await api.get("/api/nothing?key=value")
    assert (told.status, told.error) == (404, "there is no such route")
    told = await api.get("/api/orders")
    assert (told.status, told.headers["Allow"], told.error) == (405, "POST", "this route does not take this method")
    told = await api.ask("OPTIONS", "/api/orders")
    assert told.status == 405


async def test_answers_that_are_errors_of_the_route(api: Api) -> None:
    told = await api.post("/api/orders", {**GOOD, "scope": {"name": "unpaid"}}, by=api.ann)
    assert told.status == 402
    assert told.json == {"status": "error", "error": "no card on file", "checkoutUrl": "https://pay.example"}
    told = await api.post("/api/orders", {**GOOD, "scope": {"name": "absent"}}, by=api.ann)
    assert (told.status, told.error) == (404, "there is no such order")


# -- what goes wrong -----------------------------------------------------------------------------------------------


async def test_a_bug_is_a_500_and_one_line_with_its_traceback(api: Api) -> None:
    told = await api.post("/api/broken", {"name": "x"}, headers={"X-Request-Id": "my-id.7"})
    assert told.status == 500
    assert told.json == {"status": "error", "error": "internal error", "request_id": "my-id.7"}
    lines = [line for line in api.log if "traceback" in line]
    assert len(lines) == 1 and lines[0]["request_id"] == "my-id.7" and "ValueError" in lines[0]["traceback"]
    assert (await api.get("/api/undeclared")).status == 500


async def test_a_database_that_is_away_is_a_500_and_comes_back(database_url: str) -> None:
    name = urlsplit(database_url).path[1:]
    admin = await asyncpg.connect(database_url.replace(f"/{name}", "/postgres"))
    async with serving_api(database_url, ROUTES, database={"connect_timeout_seconds": 0.5}) as api:
        assert (await api.get("/api/rows")).json == {"number": 7}
        assert (await api.get("/readyz")).json["ready"] is True
        await admin.execute(f"alter database {name} with allow_connections false")
        await admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
        try:
            for path, by in (("/api/rows", None), ("/api/pages", api.ann)):
                told = await api.get(path, by=by)
                assert (told.status, told.error, told.headers["Retry-After"]) == (500, "internal error", "1")
            told = await api.get("/readyz")
            assert (told.status, told.json["ready"], told.json["reason"]) == (503, False, "no database")
            assert (await api.get("/livez")).status == 200
        finally:
            await admin.execute(f"alter database {name} with allow_connections true")
            await admin.close()
        assert (await api.get("/api/rows")).status == 200
        assert (await api.get("/api/pages", by=api.ann)).status == 200
        assert [line["event"] for line in api.log if "database" in line["event"]] == [
            "database unavailable", "database unavailable: over",
        ]  # fmt: skip


async def test_what_is_no_http_is_answered_like_every_error(api: Api) -> None:
    parts = urlsplit(api.url)
    for raw in (b"nonsense s3cr3t-k3y\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nx-api-key s3cr3t-k3y\r\n\r\n"):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(raw)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.") and b" 400 " in head and b"s3cr3t" not in head
        assert json.loads(body) == {"status": "error", "error": "the request is not valid HTTP"}
    assert "s3cr3t" not in api.stream.getvalue()


# -- what is told of a request -------------------------------------------------------------------------------------


async def test_request_ids_are_taken_over_or_made(api: Api) -> None:
    assert (await api.get("/livez", headers={"X-Request-Id": "abc-1"})).headers["X-Request-Id"] == "abc-1"
    for odd in ("a b", "x" * 49, "ä", api.ann.key, "<i>"):
        made = (await api.get("/nothing", headers={"X-Request-Id": odd})).headers["X-Request-Id"]
        assert made != odd and len(made) == 24
    first, second = [(await api.get("/livez")).headers["X-Request-Id"] for _ in range(2)]
    assert first != second


async def test_the_log_has_one_line_a_request_without_what_was_sent(api: Api) -> None:
    told = await api.get("/api/items/6f0f8b0e-8f53-4f7c-9d0c-0a6a0c3b8a11?days=77", by=api.ann)
    lines = [line for line in api.log if line["event"] == "request"]
    assert len(lines) == 1
    line = lines[0]
    assert 0 < line.pop("seconds") < 30 and line.pop("timestamp")
    assert line == {
        "event": "request", "level": "info", "method": "GET", "route": "/api/items/{item}", "status": 200,
        "request_id": told.headers["X-Request-Id"], "account": str(api.ann.account), "key": api.ann.key_id,
    }  # fmt: skip
    await api.get("/livez")
    assert api.log[-1]["level"] == "debug"


async def test_metrics_know_routes_and_never_paths(api: Api) -> None:
    path = "6f0f8b0e-8f53-4f7c-9d0c-0a6a0c3b8a11"

    async def counted() -> tuple[str, dict[tuple[str, str], float]]:
        body = (await api.get("/metrics")).text
        return body, {
            (sample.labels["route"], sample.labels["status"]): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
            if sample.name == "indexer_http_requests_total"
        }

    _, before = await counted()  # other tests of this process may have asked other servers
    await api.get(f"/api/items/{path}", by=api.ann)
    await api.get(f"/api/unknown/{path}")
    body, after = await counted()
    assert path not in body
    more = {route: after[route] - before.get(route, 0) for route in after if after[route] != before.get(route, 0)}
    assert more == {("/api/items/{item}", "2xx"): 1, ("unmatched", "4xx"): 1, ("/metrics", "2xx"): 1}


async def test_cors_is_for_the_configured_origins(api: Api) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    told = await api.ask("OPTIONS", "/api/orders", headers={**asked, "Origin": "https://app.example"})
    assert (told.status, told.headers["Access-Control-Allow-Origin"]) == (204, "https://app.example")
    assert "POST" in told.headers["Access-Control-Allow-Methods"]
    assert "x-api-key" in told.headers["Access-Control-Allow-Headers"] and told.headers["Vary"] == "Origin"
    told = await api.ask("OPTIONS", "/api/orders", headers={**asked, "Origin": "https://evil.example"})
    assert told.status == 403 and "Access-Control-Allow-Origin" not in told.headers
    # errors, too, are for the page to read
    told = await api.post("/api/orders", GOOD, headers={"Origin": "https://app.example"})
    assert (told.status, told.headers["Access-Control-Allow-Origin"]) == (401, "https://app.example")
    told = await api.post("/api/orders", GOOD, by=api.ann, headers={"Origin": "https://evil.example"})
    assert told.status == 202 and "Access-Control-Allow-Origin" not in told.headers


async def test_no_origin_is_let_in_by_default(database_url: str) -> None:
    async with serving_api(database_url, ROUTES) as api:
        told = await api.get("/livez", headers={"Origin": "https://app.example"})
        assert "Access-Control-Allow-Origin" not in told.headers


# -- limits and the end --------------------------------------------------------------------------------------------


async def test_an_account_may_ask_only_so_often(database_url: str) -> None:
    async with serving_api(database_url, ROUTES, sidecar={"requests_per_minute": 2, "burst": 3}) as api:
        told = [await api.get("/api/pages", by=api.ann) for _ in range(4)]
        assert [one.status for one in told] == [200, 200, 200, 429]
        assert 1 <= int(told[-1].headers["Retry-After"]) <= 30
        # a token is the same account, another account is another matter
        assert (await api.get("/api/pages", headers=api.ann.bearer())).status == 429
        assert (await api.get("/api/pages", by=api.bob)).status == 200


async def test_a_stop_lets_requests_under_way_finish(database_url: str) -> None:
    held = Held()
    async with aiohttp.ClientSession() as session:

        async def ask(url: str) -> Any:
            async with session.get(f"{url}api/slow") as response:
                return await response.json()

        async with serving_api(database_url, ROUTES, {"held": held}) as api:
            asking = asyncio.create_task(ask(api.url))
            await held.begun.wait()
            asyncio.get_running_loop().call_later(0.3, held.go.set)
            # here the server is stopped
        assert await asking == {"number": 2}
        with pytest.raises(aiohttp.ClientConnectorError):
            await ask(api.url)


async def test_a_taken_port_is_an_error_of_the_settings(api: Api) -> None:
    taken = api.settings.sidecar.model_copy(update={"port": urlsplit(api.url).port})
    with pytest.raises(ConfigError, match=r"set sidecar\.port"):
        async with serving(web.Application(), taken):
            pass
