"""What operators do over HTTP: who may, what it does, what it says when it can't; and what the facts hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg
import pytest
from daemon import HOOKS, Daemon, history, settings, until
from pagekit import BAD, HOSTILE, LAST, PASSWORD, TOKEN, Site, site
from replaykit import World

from indexer.fakechain import FakeNode

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
async def shown(database_url: str) -> AsyncIterator[Site]:
    async with site(database_url) as made:
        yield made


async def idle(shown: Site) -> dict[str, Any]:
    """The work's facts once it has ended."""

    async def ended() -> Any:
        work = (await shown.facts())["admin"]["work"]
        return work if work and work["state"] != "running" else None

    found: dict[str, Any] = await until(ended, "the end of the work")
    return found


async def test_facts_say_what_the_database_knows_and_keep_secrets(shown: Site) -> None:
    await until(lambda: shown.web._facts.history.since(0), "the first point of the history")
    facts = await shown.facts()
    assert facts["failure_count"] == 1
    [failure] = facts["failures"]
    assert (failure["hook"], failure["first"], failure["policy"]) == ("plays", BAD, "skip")
    assert HOSTILE in failure["error"]  # escaped by who shows it, not here
    assert facts["gaps"] == {"plays": [[BAD, BAD]], "aggregates": [[BAD, BAD]], "milestones": [[BAD, BAD]]}
    assert facts["journal"]["rows"] == 42 and facts["journal"]["bytes"] > 0
    assert facts["leader"] == {"name": "test", "led": False, "seen_seconds": pytest.approx(1, abs=30), "standbys": 0}
    assert [(one["block"], one["depth"]) for one in facts["reorgs"]] == [(LAST - 1, 2)]
    counts = {(one["kind"], one["state"]): one["jobs"] for one in facts["jobs"]["counts"]}
    assert counts == {("apify.chunk", "held"): 1, ("songstats.history", "waiting"): 1}
    assert facts["jobs"]["held"][0]["error"] == f"Held: {HOSTILE} by ********"
    budgets = {one["provider"]: one for one in facts["budgets"] if one["what"] == "calls"}
    assert (budgets["songstats"]["used"], budgets["songstats"]["budget"]) == (250, 1000)
    assert [one.get("error") for one in facts["panels"]] == [None, "UndefinedColumnError"]
    assert facts["database"] is None and facts["admin"] == {"enabled": True, "work": None}
    [point] = facts["history"]["points"]
    assert point[1] == 2_998_999
    status, later = await shown.ask("GET", f"status.json?since={point[0]}")
    assert (status, later["history"]["points"]) == (200, [])
    assert (await shown.ask("GET", "status.json?since=yesterday"))[1]["field"] == "since"
    status, text = await shown.ask("GET", f"failures/{failure['id']}")
    assert status == 200 and "Traceback (most recent call last)" in text and "ValueError" in text and HOSTILE in text
    assert PASSWORD not in text + str(facts) and "https://node.test/…" in text
    assert (await shown.ask("GET", "failures/999"))[0] == 404


async def test_who_has_no_token_may_nothing(shown: Site) -> None:
    failure = await shown.failure
    for path in (f"admin/failures/{failure}/retry", "admin/gaps/fill", f"admin/jobs/{shown.held}/requeue"):
        for token, headers, status, field in (
            (None, {}, 401, "Authorization"),
            ("", {}, 401, "Authorization"),
            (None, {"Authorization": TOKEN}, 401, "Authorization"),  # no scheme
            (TOKEN, {"Origin": "https://evil.example"}, 403, "Origin"),
            (TOKEN, {"Sec-Fetch-Site": "cross-site", "Origin": shown.url}, 403, "Origin"),
            (TOKEN, {"Sec-Fetch-Site": "same-site"}, 403, "Origin"),
        ):
            found, told = await shown.ask("POST", path, {"hook": "plays"}, token=token, headers=headers)
            assert (found, told["field"]) == (status, field), (path, headers)
        assert (await shown.ask("GET", path, token=TOKEN))[0] in (404, 405)
    assert await shown.failure == failure
    assert await shown.connection.fetchval("select count(*) from indexer.pgqueuer where status = 'failed'") == 1
    # what was wrong uses up what is allowed, then even the right one has to wait
    wrong = 0
    while (told := await shown.ask("POST", "admin/check", token="guess"))[0] == 401:
        wrong += 1
    assert told[0] == 429 and wrong <= 8 and "try again in" in told[1]["error"]
    assert (await shown.ask("POST", "admin/check", token=TOKEN))[0] == 429
    assert TOKEN not in shown.stream.getvalue() and "guess" not in shown.stream.getvalue()
    assert [one["event"] for one in shown.log].count("admin token refused") == 1


async def test_actions_do_what_the_commands_do(shown: Site) -> None:
    own = {"Sec-Fetch-Site": "same-origin", "Origin": shown.url.rstrip("/")}
    assert (await shown.ask("POST", "admin/check", token=TOKEN, headers=own))[0] == 200
    status, told = await shown.ask("POST", f"admin/jobs/{shown.held}/requeue", token=TOKEN)
    assert (status, told["done"]) == (200, f"job {shown.held} waits again")
    assert await shown.connection.fetchval("select status::text from indexer.pgqueuer where id = $1", shown.held) == (
        "queued"
    )
    failure = await shown.failure
    status, told = await shown.ask("POST", f"admin/failures/{failure}/retry", token=TOKEN)
    assert (status, told["done"]) == (202, f"retry of failure {failure}: 1 block is replayed")
    work = await idle(shown)
    assert (work["state"], work["blocks"], work["failures"]) == ("done", 1, []) and work["rows"] > 0
    assert work["verify"] == ["aggregates", "milestones"]
    facts = await shown.facts()
    assert facts["failures"] == [] and not any(facts["gaps"].values())
    await shown.world.is_right(unordered=("milestones", "notification"))
    assert {"admin action", "admin action done"} <= {one["event"] for one in shown.log}
    assert TOKEN not in shown.stream.getvalue()
    # and what can't be done is said, with the field that is wrong
    for path, body, status, field, words in (
        (f"admin/failures/{failure}/retry", None, 409, "id", "resolved already"),
        ("admin/failures/999/retry", None, 404, "id", "no failure 999"),
        ("admin/failures/x/retry", None, 400, "id", "no number"),
        ("admin/jobs/999/requeue", None, 404, "id", "no job 999"),
        (f"admin/jobs/{shown.held}/requeue", None, 409, "id", "is not held"),
        ("admin/jobs/99999999999999999999999/requeue", None, 400, "id", "no number"),
        ("admin/gaps/fill", {"hook": "nobody"}, 409, "hook", "no enabled hook is called nobody"),
        ("admin/gaps/fill", {"hook": 7}, 400, "hook", "must be a text"),
        ("admin/gaps/fill", [], 400, "hook", "name the hook"),
        ("admin/gaps/fill", None, 400, "body", "not JSON"),
        ("admin/gaps/fill", {"hook": "x" * 5000}, 413, "body", "4096 bytes"),
    ):
        found, told = await shown.ask("POST", path, body, token=TOKEN)
        assert (found, told["field"]) == (status, field) and words in told["error"], (path, body, told)
    status, told = await shown.ask("POST", "admin/gaps/fill", {"hook": "plays"}, token=TOKEN)
    assert status == 200 and "nothing to do" in told["done"]


async def test_one_fill_at_a_time_and_none_outlives_the_process(database_url: str) -> None:
    """The source never answers; while it is waited for, the page says what runs, and nothing else may begin."""
    closed = asyncio.Event()

    class Silent:
        def __init__(self, source: Any) -> None:
            self.source = source

        async def spans(self, first: int, last: int) -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield

    def replaying(behind: World) -> Any:
        @asynccontextmanager
        async def opened() -> AsyncIterator[Any]:
            try:
                async with behind.replayer(Silent(behind.source)) as replayer:  # type: ignore[arg-type]
                    yield replayer
            finally:
                closed.set()

        return opened

    async with site(database_url, replaying=replaying) as shown:
        status, told = await shown.ask("POST", "admin/gaps/fill", {"hook": None}, token=TOKEN)
        assert (status, told["work"]["state"], told["work"]["planned"]) == (202, "running", 1)
        status, told = await shown.ask("POST", "admin/gaps/fill", {"hook": "plays"}, token=TOKEN)
        assert status == 409 and told["error"] == "one thing at a time: fill of all hooks runs"
        assert (await shown.facts())["admin"]["work"]["state"] == "running"
        assert not closed.is_set()
    assert closed.is_set() and shown.web._admin.facts["work"].state == "stopped"


async def test_without_a_token_in_the_settings_there_are_no_actions(database_url: str) -> None:
    async with site(database_url, token=None) as shown:
        status, told = await shown.ask("POST", "admin/gaps/fill", {"hook": None}, token="None")
        assert (status, told["field"]) == (404, "http.admin_token")
        assert (await shown.facts())["admin"]["enabled"] is False


async def test_a_daemon_fills_the_hole_of_a_late_hook_and_its_standby_says_who_leads(
    connection: asyncpg.Connection, database_url: str, tmp_path: Path
) -> None:
    chain, _ = history(60)
    async with FakeNode(chain) as node:
        first = settings(database_url, node.url, hooks={"enabled": HOOKS[:1]})
        async with Daemon(tmp_path, first) as daemon:
            await daemon.reached(connection, 60)
            assert await daemon.stop() == 0
        values = settings(database_url, node.url, http={"port": 0, "admin_token": TOKEN})
        async with Daemon(tmp_path, values) as leader:
            await leader.logged("leader acquired")
            async with Daemon(tmp_path, values) as second:
                await second.logged("standing by")
                facts = (await second.get_json("status.json"))[1]
                assert facts["role"] == "standby" and facts["leader"]["led"] and facts["leader"]["standbys"] == 1
                assert facts["leader"]["name"].endswith(f":{leader.process.pid}")
                page = (await second.get(""))[1]
                assert f"Stands by: {facts['leader']['name']} leads." in page
                await fill(leader)
            assert await leader.stop() == 0
    assert await connection.fetchval("select sum(count) from aggregate_plays") == await connection.fetchval(
        "select count(*) from plays"
    )


async def fill(daemon: Daemon) -> None:
    async def gaps() -> Any:
        return (await daemon.get_json("status.json"))[1]["gaps"].get("aggregates")

    assert await until(gaps, "the hole is known") == [[0, 60]]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    url = await daemon.url() + "admin/gaps/fill"
    async with aiohttp.ClientSession(headers=headers) as session, session.post(url, json={"hook": None}) as reply:
        assert reply.status == 202, await reply.text()

    async def filled() -> Any:
        facts = (await daemon.get_json("status.json"))[1]
        return facts["admin"]["work"]["state"] == "done" and not any(facts["gaps"].values())

    await until(filled, "the hole is filled")
