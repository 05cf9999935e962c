"""What a person is told of the own history, that nobody else is told it, and that it can be gone without a trace."""

from __future__ import annotations

import asyncio
import json
import re
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import aiohttp
import asyncpg
import pytest
import schemathesis
from daemon import until
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from signinkit import START, Browser, Stage, signing_in

from indexer.sidecar import streams
from indexer.sidecar.app import ROUTES
from indexer.sidecar.listening import export, people, reads
from indexer.sidecar.paging import Position, Text, encode

pytestmark = pytest.mark.timeout(60)

TRACKS = 40


@pytest.fixture
async def stage(database_url: str) -> AsyncIterator[Stage]:
    async with signing_in(database_url) as running:
        yield running


async def catalogue(stage: Stage, longer: int = 0) -> None:
    """Tracks 0 to 39: track n is by the artists n % 7 and n % 5 (once, if these are the same), each 10th is on none."""
    async with stage.api.database.acquire() as connection, connection.transaction():
        await connection.execute("insert into artists select 'ar' || n, 'Artist ' || n from generate_series(0, 6) as n")
        await connection.execute(
            "insert into albums select 'al' || n, 'Album ' || n, 'https://i.example/' || n "
            "from generate_series(0, 3) as n"
        )
        await connection.execute(
            """
            insert into spotify_tracks (spotify_id, name, duration_ms, isrc, album)
            select 'tr' || n, 'Track ' || n || repeat('~', $2), case when n <> 3 then 60000 + n * 1000 end, 'ISRC' || n,
                   case when n % 10 <> 0 then 'al' || n % 4 end
            from generate_series(0, $1::int - 1) as n
            """,
            TRACKS, longer,
        )  # fmt: skip
        await connection.execute(
            """
            insert into track_artists
            select 'tr' || n, 'ar' || n % 7, 0 from generate_series(0, $1::int - 1) as n
            union all select 'tr' || n, 'ar' || n % 5, 1 from generate_series(0, $1::int - 1) as n where n % 7 <> n % 5
            """,
            TRACKS,
        )


async def heard(stage: Stage, who: Browser, count: int, every: timedelta, last: datetime = START) -> None:
    """Plays up to `last`, one track after the other, two of them at the same moment each time."""
    async with stage.api.database.acquire() as connection:
        await connection.execute(
            """
            insert into play_events (listener, played_at, track)
            select $1, $4::timestamptz - $3::interval * (n / 2), 'tr' || n * 7 % $5
            from generate_series(0, $2::int - 1) as n
            """,
            who.listener, count, every, last, TRACKS,
        )  # fmt: skip


async def told_pages(who: Browser, limit: int) -> list[dict[str, Any]]:
    plays, cursor = [], ""
    while True:
        told = (await who.get(f"/me/history?limit={limit}{cursor}")).json
        assert len(told["plays"]) <= limit
        plays += told["plays"]
        if told["next"] is None:
            return plays
        cursor = f"&cursor={told['next']}"


# -- history and top -----------------------------------------------------------------------------------------------


async def test_the_history_page_by_page(stage: Stage) -> None:
    ann, bob = await stage.person("ann"), await stage.person("bob")
    assert (await ann.get("/me/history")).json == {"status": "success", "plays": [], "next": None}
    await catalogue(stage)
    await heard(stage, ann, 101, timedelta(minutes=7))
    await heard(stage, bob, 31, timedelta(minutes=5))
    rows = await stage.rows(
        "select played_at, track from play_events where listener = $1 order by played_at desc, track desc", ann.listener
    )
    assert len(rows) == 101
    for limit in (50, 3, 101, 200):
        plays = await told_pages(ann, limit)
        assert [(datetime.fromisoformat(one["played_at"]), one["track"]["id"]) for one in plays] == [
            (row["played_at"], row["track"]) for row in rows
        ]
    track = next(one["track"] for one in plays if one["track"]["id"] == "tr9")
    assert track == {
        "id": "tr9", "name": "Track 9", "duration_ms": 69_000, "isrc": "ISRC9",
        "artists": [{"id": "ar2", "name": "Artist 2"}, {"id": "ar4", "name": "Artist 4"}],
        "album": {"id": "al1", "name": "Album 1", "image_url": "https://i.example/1"},
    }  # fmt: skip
    assert next(one["track"] for one in plays if one["track"]["id"] == "tr10")["album"] is None
    # what is heard meanwhile moves no page
    first = (await ann.get("/me/history?limit=10")).json
    await heard(stage, ann, 4, timedelta(minutes=1), START + timedelta(minutes=30))
    second = (await ann.get(f"/me/history?limit=10&cursor={first['next']}")).json["plays"]
    assert [one["track"]["id"] for one in second] == [row["track"] for row in rows[10:20]]

    class Elsewhere(Position):
        name: Text

    for wrong in ("limit=0", "limit=201", "cursor=x", f"cursor={encode(Elsewhere('a'))}", "listener=1", "cursor=%00"):
        assert (await ann.get(f"/me/history?{wrong}")).status == 400, wrong
    # another person's place in a list of the same kind is only a place
    place = (await bob.get("/me/history?limit=10")).json["next"]
    told = (await ann.get(f"/me/history?limit=200&cursor={place}")).json["plays"]
    assert len(told) == sum(row["played_at"] < START - timedelta(minutes=20) for row in rows)


async def test_what_was_heard_most_is_what_counting_says(stage: Stage) -> None:
    ann, bob = await stage.person("ann"), await stage.person("bob")
    await catalogue(stage)
    for count, every in ((300, timedelta(hours=3)), (150, timedelta(days=5)), (61, timedelta(minutes=1))):
        await heard(stage, ann, count, every, START - timedelta(seconds=count))
    await heard(stage, bob, 99, timedelta(hours=1))
    plays = await stage.rows("select played_at, track from play_events where listener = $1", ann.listener)
    minutes = {f"tr{n}": (60_000 + n * 1000) / 60_000 if n != 3 else 0.0 for n in range(TRACKS)}
    for window, days in (("7d", 7), ("30d", 30), ("90d", 90), ("365d", 365), ("all", 10_000)):
        since = START - timedelta(days=days)
        tracks = Counter(row["track"] for row in plays if row["played_at"] >= since)
        artists: Counter[str] = Counter()
        heard_for: Counter[str] = Counter()
        for track, count in tracks.items():
            number = int(track[2:])
            for artist in {f"ar{number % 7}", f"ar{number % 5}"}:
                artists[artist] += count
                heard_for[artist] += count * minutes[track]  # type: ignore[assignment]
        told = (await ann.get(f"/me/top?kind=tracks&window={window}&limit=200")).json
        assert (told["kind"], told["window"]) == ("tracks", window)
        assert {one["id"]: one["plays"] for one in told["items"]} == dict(tracks)
        for one in told["items"]:
            assert one["minutes"] == pytest.approx(one["plays"] * minutes[one["id"]], abs=0.051)
        assert [one["plays"] for one in told["items"]] == sorted(tracks.values(), reverse=True)
        ninth = next(one for one in told["items"] if one["id"] == "tr9")
        assert [one["id"] for one in ninth["artists"]] == ["ar2", "ar4"]
        told = (await ann.get(f"/me/top?kind=artists&window={window}")).json
        assert {one["id"]: one["plays"] for one in told["items"]} == dict(artists)
        for one in told["items"]:
            assert one["minutes"] == pytest.approx(heard_for[one["id"]], abs=0.051) and one["artists"] == []
    default = (await ann.get("/me/top?limit=3")).json
    assert (default["kind"], default["window"], len(default["items"])) == ("tracks", "7d", 3)
    for wrong in ("kind=albums", "window=8d", "limit=0", "limit=201", f"listener={bob.listener}"):
        assert (await ann.get(f"/me/top?{wrong}")).status == 400, wrong


async def test_the_state_of_the_archive(stage: Stage) -> None:
    ann = await stage.person("ann")
    await catalogue(stage)
    hour = START.replace(minute=0)

    async def told(**columns: Any) -> tuple[Any, ...]:
        names = ("is_active", "cooling_until", "rate_limited_until", "last_polled_at")
        await stage.value(
            "update listeners set is_active = $1, cooling_until = $2, rate_limited_until = $3, last_polled_at = $4",
            *(columns.get(name, True if name == "is_active" else None) for name in names),
        )
        found = (await ann.get("/me/state")).json
        next_ = found["next_poll_from"]
        return found["state"], found["minutes_left"], next_ and datetime.fromisoformat(next_) - hour

    minutes = {n: timedelta(minutes=n) for n in (0, 10, 30, 60, 75, 90)}
    assert await told() == ("active", None, minutes[0])  # due in this hour
    assert await told(last_polled_at=START - minutes[10]) == ("active", None, minutes[60])
    assert await told(last_polled_at=START - minutes[30]) == ("active", None, minutes[0])  # in the hour before
    later = START + timedelta(minutes=69, seconds=30)
    assert await told(cooling_until=later) == ("cooling_down", 70, timedelta(minutes=89, seconds=30))
    assert await told(rate_limited_until=START + minutes[10]) == ("rate_limited", 10, minutes[30])
    assert await told(cooling_until=START, rate_limited_until=START) == ("active", None, START - hour)
    assert await told(is_active=False, cooling_until=later) == ("disconnected", None, None)
    await heard(stage, ann, 7, timedelta(minutes=1))
    found = (await ann.get("/me/state")).json
    assert found["plays_archived"] == 7 and datetime.fromisoformat(found["connected_at"]) == START


# -- all of it -----------------------------------------------------------------------------------------------------


async def test_an_export_is_all_of_it_and_takes_no_memory(stage: Stage) -> None:
    ann, bob = await stage.person("ann"), await stage.person("bob")
    await catalogue(stage, longer=1_000)
    await heard(stage, ann, 20_000, timedelta(minutes=3))
    await heard(stage, bob, 50, timedelta(minutes=3))
    rows = iter(await stage.rows(
        "select played_at, track, name, duration_ms, isrc from play_events join spotify_tracks on spotify_id = track "
        "where listener = $1 order by played_at, track", ann.listener,
    ))  # fmt: skip
    await stage.value("insert into play_rejects (listener, raw, reason, digest) values ($1, $2, 'odd', $2)",
                      ann.listener, b"{\xff")  # fmt: skip
    count = 0
    async with stage.api.session.get(f"{stage.api.url}me/export.ndjson", headers=cookie(ann)) as response:
        assert response.status == 200 and response.headers["Content-Type"] == "application/x-ndjson"
        assert response.headers["Content-Disposition"] == 'attachment; filename="spotify-history-2026-11-28.ndjson"'
        assert (response.headers["Cache-Control"], response.headers["Server"]) == ("no-store", "indexer")
        assert response.headers["X-Content-Type-Options"] == "nosniff" and response.headers["X-Request-Id"]
        account = json.loads(await response.content.readline())
        while line := await response.content.readline():
            told, count = json.loads(line), count + 1
            if told["type"] == "unreadable_play":
                assert (told["reason"], told["raw"]) == ("odd", "e/8=")
                continue
            row = next(rows)
            assert (datetime.fromisoformat(told["played_at"]), told["track"]) == (row["played_at"], row["track"])
            assert (told["name"], told["duration_ms"], told["isrc"]) == (row["name"], row["duration_ms"], row["isrc"])
    assert count == 20_001 and next(rows, None) is None
    assert account["type"] == "account" and (account["spotify_id"], account["plays"]) == ("ann", 20_000)
    assert account["email"] == "secret-mail-ann@listeners.example" and account["unreadable_plays"] == 1
    assert not [name for name in account if "token" in name]
    size = 0
    tracemalloc.start()
    try:
        async with stage.api.session.get(f"{stage.api.url}me/export.ndjson", headers=cookie(ann)) as response:
            async for piece in response.content.iter_any():
                size += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 20_000_000 and peak < 6_000_000, (size, peak)


def cookie(who: Browser) -> dict[str, str]:
    return {"Cookie": "; ".join(f"{name}={value}" for name, (value, _) in who.cookies.items())}


async def test_half_an_export_looks_like_none(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = await stage.person("ann")
    await catalogue(stage)
    await heard(stage, ann, 3_000, timedelta(minutes=3))
    line, seen = export._line, Counter[str]()

    def broken(row: asyncpg.Record) -> bytes:
        seen["lines"] += 1
        if seen["lines"] > 2_000:
            raise RuntimeError("a bug")
        return line(row)

    monkeypatch.setattr(export, "_line", broken)
    got = b""
    with pytest.raises(aiohttp.ClientError):  # noqa: PT012
        async with stage.api.session.get(f"{stage.api.url}me/export.ndjson", headers=cookie(ann)) as response:
            assert response.status == 200
            async for piece in response.content.iter_any():
                got += piece
    assert got.count(b"\n") < 3_000
    await until(lambda: any(one.get("status") == 500 for one in stage.api.log), "the request's line")
    (log,) = [one for one in stage.api.log if one["event"] == "answer broken off"]
    assert "RuntimeError: a bug" in log["traceback"]
    monkeypatch.setattr(export, "_line", lambda row: broken(row))  # before the first line it is an error as every other
    told = await ann.get("/me/export.ndjson")
    assert (told.status, told.error) == (500, "internal error")
    monkeypatch.undo()
    assert len((await ann.get("/me/export.ndjson")).text.splitlines()) == 3_001


async def test_exports_are_few_at_a_time_and_end_with_their_browser(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann, bob = await stage.person("ann"), await stage.person("bob")
    await catalogue(stage, longer=2_000)
    await heard(stage, ann, 20_000, timedelta(minutes=3))
    held = "select count(*) from pg_stat_activity where application_name = 'indexer export'"

    def gone() -> list[Any]:
        return [one for one in stage.api.log if one["event"] == "request" and one["status"] == 499]

    async with stage.api.session.get(f"{stage.api.url}me/export.ndjson", headers=cookie(ann)) as response:
        await response.content.readline()
        assert await stage.value(held) == 1  # 40 MB are in no buffer
        told = await ann.get("/me/export.ndjson")
        assert (told.status, told.headers["Retry-After"]) == (429, "10")
        assert len((await bob.get("/me/export.ndjson")).text.splitlines()) == 1
        response.close()
    monkeypatch.setattr(streams, "_PIECE_SECONDS", 0.2)  # another hangs on, and reads nothing
    await until(lambda: not export._under_way, "the end of the export")
    async with stage.api.session.get(f"{stage.api.url}me/export.ndjson", headers=cookie(ann)):
        await until(lambda: len(gone()) == 2, "the end of a reader that is too slow")
    await until(lambda: not export._under_way, "the end of the export")

    async def left() -> bool:
        return bool(await stage.value(held) == 0)

    await until(left, "the end of its connection")
    assert len(gone()) == 2 and not [one for one in stage.api.log if one["event"] == "answer broken off"]


# -- the end of it -------------------------------------------------------------------------------------------------


async def tables_about_people(stage: Stage) -> list[tuple[str, str]]:
    """Every table with a column that holds a listener's id, and which."""
    rows = await stage.rows(
        """
        select c.oid::regclass::text as name, attname from pg_attribute join pg_class as c on c.oid = attrelid
        join pg_namespace as n on n.oid = relnamespace
        where relkind = 'r' and nspname in ('public', 'indexer') and not attisdropped
          and (attname = 'listener' or (relname = 'listeners' and attname = 'id')) and atttypid = 'uuid'::regtype
        """
    )
    return [(row["name"], row["attname"]) for row in rows]


async def traces(stage: Stage, who: UUID, spotify_id: str) -> dict[str, int]:
    """How many rows of each table still know the person: by the column, or by an id anywhere in the row."""
    found = {}
    for name, column in await tables_about_people(stage):
        found[name] = await stage.value(f"select count(*) from {name} where {column} = $1", who)
    for name in ("listeners", "listener_waitlist", "listening_keys", "play_events", "play_rejects"):
        query = f"select count(*) from {name} as row where to_jsonb(row)::text ~ $1"
        found[f"{name} as text"] = await stage.value(query, f'{who}|"{spotify_id}"')
    return {name: count for name, count in found.items() if count}


async def test_a_person_is_gone_without_a_trace(database_url: str) -> None:
    async with signing_in(database_url, founding_cap=2) as stage:
        ann, bob = await stage.person("ann"), await stage.person("bob")
        await catalogue(stage)
        for one in (ann, bob):
            await heard(stage, one, 30, timedelta(minutes=3))
            await stage.value("insert into play_rejects (listener, raw, reason, digest) values ($1, 'x', 'odd', 'd')",
                              one.listener)  # fmt: skip
            await stage.value("insert into listening_keys values ($1, $2)", people.hour_key(one.listener, START), START)
        await stage.value("insert into listener_waitlist (spotify_id, email) values ('ann', 'secret-mail-ann')")
        assert {name for name, _ in await tables_about_people(stage)} == {"listeners", "play_events", "play_rejects"}
        before = await traces(stage, bob.listener, "bob")
        assert set(before) == {name.replace("ann", "bob") for name in await traces(stage, ann.listener, "ann")} - {
            "listener_waitlist as text"
        }
        elsewhere = stage.browser()
        await elsewhere.sign_in("ann")
        told = await ann.ask("DELETE", "/me")
        assert told.json == {"status": "success", "plays": 30, "unreadable_plays": 1} and ann.cookies == {}
        assert await traces(stage, ann.listener, "ann") == {}
        assert await traces(stage, bob.listener, "bob") == before
        assert await stage.value("select taken from listener_places") == 1
        assert (await elsewhere.get("/me/state")).status == (await elsewhere.ask("DELETE", "/me")).status == 401
        # who comes back is somebody new
        again = await stage.person("ann")
        assert again.listener != ann.listener and (await again.get("/me/state")).json["plays_archived"] == 0


async def test_two_deletions_at_once_free_one_place(stage: Stage) -> None:
    ann = await stage.person("ann")
    await stage.person("bob")
    told = await asyncio.gather(*(stage.api.ask("DELETE", "/me", headers=cookie(ann)) for _ in range(8)))
    assert sorted(one.status for one in told) == [200] + [401] * 7
    assert await stage.value("select taken from listener_places") == 1


# -- that person alone ---------------------------------------------------------------------------------------------


OWN = {"me_history", "me_top", "me_state", "me_export", "me_delete", "me_signout"}


async def test_each_route_tells_of_its_own_person_alone(stage: Stage) -> None:
    """Whatever Bob asks, he is told the same whether Ann has a history or not."""
    assert {one.function.__name__ for one in ROUTES if one.access == "listener"} >= OWN
    ann, bob = await stage.person("ann"), await stage.person("bob")
    await catalogue(stage)
    asked = ["/me/history", "/me/top", "/me/top?kind=artists&window=all", "/me/state", "/me/export.ndjson"]
    before = [(await bob.get(path)).text for path in asked]
    await heard(stage, ann, 50, timedelta(minutes=3))
    assert [(await bob.get(path)).text for path in asked] == before
    for path in asked:
        for name in ("listener", "user", "id", "sub", "userId"):
            separator = "&" if "?" in path else "?"
            told = await bob.get(f"{path}{separator}{name}={ann.listener}")
            assert told.status == 400 or told.text == before[asked.index(path)], path
    # and what he deletes is his
    assert (await bob.ask("DELETE", f"/me?id={ann.listener}")).status == 200
    assert len((await ann.get("/me/history")).json["plays"]) == 50


class Overheard:
    """A connection that notes what is asked instead of only asking it."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.query = ""

    async def fetch(self, query: str, *args: Any) -> list[Any]:
        self.query = query
        return await self.connection.fetch(query, *args)


async def test_history_and_top_read_that_persons_rows_by_the_primary_key(stage: Stage) -> None:
    ann = await stage.person("ann")
    everybody = [ann, *[await stage.person(f"p{n}") for n in range(9)]]
    await catalogue(stage)
    for one in everybody:
        await heard(stage, one, 3_000, timedelta(minutes=3))
    async with stage.api.database.acquire() as connection:
        await connection.execute("analyze play_events, spotify_tracks, track_artists, artists, albums")
        await connection.execute("set plan_cache_mode = force_generic_plan")
        try:
            one = Overheard(connection)
            cases = [
                (reads.history(one, ann.listener, None, 50), "uuid, timestamptz, text, int", "null, null, 50", ann),  # type: ignore[arg-type]
                (reads.history(one, ann.listener, reads.Older(START, "tr1"), 50), "uuid, timestamptz, text, int",  # type: ignore[arg-type]
                 f"'{START}', 'tr1', 50", ann),
                (reads.top_tracks(one, ann.listener, START, 20), "uuid, timestamptz, int", f"'{START}', 20", ann),  # type: ignore[arg-type]
                (reads.top_artists(one, ann.listener, START, 20), "uuid, timestamptz, int", f"'{START}', 20", ann),  # type: ignore[arg-type]
            ]  # fmt: skip
            for asking, types, args, who in cases:
                await asking
                await connection.execute(f"prepare asked ({types}) as {one.query}")
                rows = await connection.fetch(f"explain (costs off) execute asked ('{who.listener}', {args})")
                await connection.execute("deallocate asked")
                plan = "\n".join(row[0] for row in rows)
                assert "Seq Scan on play_events" not in plan and "play_events_pkey" in plan, plan
                condition = plan.partition("play_events_pkey")[2].partition("Index Cond:")[2].partition("\n")[0]
                assert "listener = $1" in condition and "played_at" in condition, plan
                if "played_at desc" in one.query:  # a page is read off the index, and no more than the page
                    assert re.search(r"Limit\s+->  Index Only Scan Backward using play_events_pkey", plan), plan
        finally:
            await connection.execute("reset plan_cache_mode")


# -- whatever is sent ----------------------------------------------------------------------------------------------


async def test_answers_are_those_of_the_description(stage: Stage) -> None:
    """Generated requests, valid and not: no answer of 500, and none that /openapi.json does not tell of."""
    ann = await stage.person("ann")
    await catalogue(stage)
    await heard(stage, ann, 60, timedelta(minutes=3))
    document: dict[str, Any] = (await stage.api.get("/openapi.json")).json
    assert document["paths"]["/me/history"]["get"]["security"] == [{"session": []}]
    assert set(document["paths"]["/me"]["delete"]["responses"]) == {"200", "401", "403", "429", "500"}
    callback = document["paths"]["/connect/spotify/callback"]["get"]
    assert callback["security"] == [] and "Location" in callback["responses"]["303"]["headers"]
    assert set(callback["responses"]["500"]["content"]) == {"text/html; charset=utf-8"}
    assert "listener's session" in (await stage.api.get("/docs")).text
    place = (await ann.get("/me/history?limit=5")).json["next"]
    for parameter in document["paths"]["/me/history"]["get"]["parameters"]:
        if parameter["name"] == "cursor":
            parameter["schema"] = {"enum": [place]}
    headers = cookie(ann)

    def run() -> int:
        seen = 0
        schema = schemathesis.openapi.from_dict(document)
        for result in schema.include(path_regex="^/(me/(history|top|state|export)|connect)").get_all_operations():
            operation = result.ok()

            @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            def one(case: schemathesis.Case) -> None:
                nonlocal seen
                seen += 1
                case.call_and_validate(
                    base_url=stage.api.url.rstrip("/"), headers=headers, allow_redirects=False,
                    checks=(not_a_server_error, status_code_conformance, content_type_conformance,
                            response_schema_conformance),
                )  # fmt: skip

            given(case=operation.as_strategy())(one)()
        return seen

    assert await asyncio.to_thread(run) >= 30
