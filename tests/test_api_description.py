"""What the API says of itself is what it does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from apikit import Api, serving_api
from apiroutes import ROUTES, Item, Number

from indexer.sidecar.routes import Call, route

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[Api]:
    async with serving_api(database_url, ROUTES) as running:
        yield running


async def test_the_description_has_exactly_the_routes(api: Api) -> None:
    document = (await api.get("/openapi.json")).json
    own = {("GET", path) for path in ("/livez", "/readyz", "/metrics", "/openapi.json", "/docs")}
    described = {(method.upper(), path) for path, one in document["paths"].items() for method in one}
    assert described == {(one.method, one.path) for one in ROUTES} | own
    for method, path in described:  # and each is there: whatever it answers, it is no 404 or 405
        told = await api.ask(method, path.replace("{item}", "x")) if path != "/api/slow" else None
        assert told is None or told.status not in (404, 405), path
    operation = document["paths"]["/api/orders"]["post"]
    assert operation["security"] == [{"apiKey": []}, {"bearer": []}]
    assert (operation["summary"], operation["description"]) == ("Order something", "It is done some day.")
    assert set(operation["responses"]) == {"202", "400", "401", "402", "404", "408", "413", "415", "429", "500"}
    unpaid = operation["responses"]["402"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert "checkoutUrl" in document["components"]["schemas"][unpaid]["properties"]
    assert document["openapi"].startswith("3.1") and "$defs" not in json.dumps(document)


async def test_every_reference_of_the_description_leads_somewhere(api: Api) -> None:
    document = (await api.get("/openapi.json")).json
    waiting: list[Any] = [document]
    count = 0
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if "$ref" in one:
                count += 1
                assert one["$ref"].rpartition("/")[2] in document["components"]["schemas"], one["$ref"]
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    assert count > 20


async def test_the_page_for_people_loads_nothing(api: Api) -> None:
    told = await api.get("/docs")
    assert told.status == 200 and "default-src 'none'" in told.headers["Content-Security-Policy"]
    assert "/api/orders" in told.text and "://" not in told.text and "src=" not in told.text


def test_slips_in_a_declaration_are_seen_at_once() -> None:
    async def other(call: Call, path: Item) -> Number:
        """Something."""
        return Number(number=1)

    async def silent(call: Call) -> Number:
        return Number(number=1)

    # annotations of functions within functions are looked up in the module
    for path, function in (("/api/{name}", other), ("/api/x", silent)):
        with pytest.raises(TypeError, match="/api/"):
            route("GET", path, answers={200: Number})(function)
