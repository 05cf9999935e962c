"""A user of one account learns nothing of another: route by route, what is Ann's is to Bob as if it were not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from measurekit import Stage, isrcs, measuring, stage
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from indexer.sidecar.app import ROUTES

__all__ = ["stage"]
pytestmark = pytest.mark.timeout(180)

# What each route tells one account of another is tried below; these are the ones that name nothing of an account's.
TRIED = {
    "measurement_jobs", "runs", "track_measurements", "album_measurements", "catalog_measurements",
}  # fmt: skip


def test_every_route_of_accounts_is_tried() -> None:
    assert {one.function.__name__ for one in ROUTES if one.access == "account"} == TRIED


async def same(stage: Stage, theirs: str, missing: str) -> None:
    """Bob gets the same answer to the one as to the other, and Ann another."""
    first, second = [await stage.api.get(path, by=stage.bob) for path in (theirs, missing)]
    assert first.status == second.status == 404 and first.text == second.text
    own = ("X-Request-ID", "Date")
    told = {name: value for name, value in first.headers.items() if name not in own}
    assert told == {name: value for name, value in second.headers.items() if name not in own}
    assert (await stage.api.get(theirs, by=stage.ann)).status == 200


async def test_runs(stage: Stage) -> None:
    told = await stage.order("current", album_ids=["one"])
    job = await stage.value("select id from playcount_chunks")
    for id_ in (told.json["id"], job):
        await same(stage, f"/api/tasks/runs?id={id_}", f"/api/tasks/runs?id={uuid4()}")


async def test_catalog_measurements(stage: Stage) -> None:
    catalog = await stage.catalog(stage.ann, isrcs(2))
    await same(stage, f"/api/catalogs/{catalog}/measurements", f"/api/catalogs/{uuid4()}/measurements")
    page = (await stage.api.get(f"/api/catalogs/{catalog}/measurements?limit=1", by=stage.ann)).json
    cursor = f"/api/catalogs/{{}}/measurements?limit=1&cursor={page['next']}"
    await same(stage, cursor.format(catalog), cursor.format(uuid4()))


async def test_measurement_jobs(stage: Stage) -> None:
    """Not by her catalog, not by her snapshot of the same albums, and not by her spend."""
    stage.stripe.add_customer(str(stage.bob.account))
    catalog = await stage.catalog(stage.ann, isrcs(2))
    for source in ("historical", "current"):
        theirs = await stage.order(source, stage.bob, catalog_id=str(catalog))
        missing = await stage.order(source, stage.bob, catalog_id=str(uuid4()))
        assert theirs.status == missing.status == 404 and theirs.text == missing.text
    hers = await stage.order("current", album_ids=["one"])
    his = await stage.order("current", stage.bob, album_ids=["one"])
    assert his.json["id"] != hers.json["id"] and his.json["reused"] is False
    assert his.json["estimated_cost_usd"] == 0.003


async def test_a_catalog_that_is_both_in_scope_and_not_theirs_costs_nothing(stage: Stage) -> None:
    catalog = await stage.catalog(stage.ann, isrcs(2))
    await stage.order("current", stage.bob, catalog_id=str(catalog))
    assert await stage.value("select count(*) from playcount_snapshots") == 0 and stage.spotify.calls == []


async def test_counts_name_nobody(stage: Stage) -> None:
    """A song's count is public; who has ordered it is not."""
    stage.release("one")
    told = await stage.order("current", album_ids=["one"])
    async with stage.working():
        await stage.settled()
    song = await stage.value("select min(song) from song_measurements")
    for path in (f"/api/research/tracks/{song}/measurements", "/api/research/albums/one/measurements"):
        text = (await stage.api.get(path, by=stage.bob)).text
        assert song in text
        for secret in (told.json["id"], str(stage.ann.account), "run1", stage.ann.email):
            assert secret not in text


async def test_maintenance_is_closed_to_accounts(stage: Stage) -> None:
    for person in (stage.ann, stage.bob):
        told = await stage.api.get("/api/internal/playcount-maintenance", headers=person.bearer())
        assert told.status == 401


# -- whatever is sent ----------------------------------------------------------------------------------------------


@pytest.fixture
async def served(database_url: str) -> AsyncIterator[Stage]:
    async with measuring(database_url, sidecar={"failures_per_minute": 100_000}) as made:
        yield made


async def test_answers_are_those_of_the_description(served: Stage) -> None:
    """Generated requests, valid and not: no answer of 500, and none that /openapi.json does not tell of."""
    document: dict[str, Any] = (await served.api.get("/openapi.json")).json
    await served.measured(isrcs(1)[0], 5)
    await served.measured(isrcs(1)[0], 4, timedelta(days=1))
    await served.run("insert into song_identifiers values ($1, 'spotify', 'album_id', 'lp')", isrcs(1)[0])
    there = {
        "track": isrcs(1)[0], "album": "lp", "catalog": str(await served.catalog(served.ann, isrcs(3))),
        "id": (await served.order("current", album_ids=["one"])).json["id"],
    }  # fmt: skip
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] in there:  # else nobody would ever hit upon what is there
                    parameter["schema"]["enum"] = [there[parameter["name"]], str(uuid4())]
    headers = {"x-api-key": served.ann.key}

    def run() -> int:
        schema = schemathesis.openapi.from_dict(document)
        seen = 0
        for result in schema.include(path_regex="^/api/(research|tasks|catalogs)").get_all_operations():
            operation = result.ok()

            @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def one(case: schemathesis.Case) -> None:
                nonlocal seen
                seen += 1
                case.call_and_validate(
                    base_url=served.api.url.rstrip("/"), headers=headers,
                    checks=(not_a_server_error, status_code_conformance, content_type_conformance,
                            response_schema_conformance),
                )  # fmt: skip

            given(case=operation.as_strategy())(one)()
        return seen

    assert await asyncio.to_thread(run) >= 40
