"""People's plays, archived from a stand-in over HTTP into a real Postgres: exactly once, and each person alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from uuid import uuid4

import asyncpg
import msgspec
import pytest
from daemon import until
from hypothesis import given
from hypothesis import strategies as st
from listenkit import HOUR, MINUTE, START, Connected, Stage, listening_stage

from indexer import metrics
from indexer.config import ListeningSettings
from indexer.sidecar.fakes import Fault
from indexer.sidecar.fakes.plays import made_songs
from indexer.sidecar.listening import people
from indexer.sidecar.listening.cooldown import FailureType, cool_down
from indexer.sidecar.listening.plays import Play, read
from indexer.sidecar.listening.poll import Misconfigured
from indexer.sidecar.listening.vault import Vault
from indexer.sidecar.providers.spotify_user import Profile, Tokens


@pytest.fixture
async def stage(database_url: str, connection: asyncpg.Connection) -> AsyncIterator[Stage]:
    async with listening_stage(database_url, connection) as stage:
        yield stage


async def polled(stage: Stage, one: Connected) -> int:
    return len(stage.fake.polls[one.at_spotify.id])


# -- one person ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_most", [1, 7, 50])
async def test_each_play_is_archived_once_whatever_the_pages(stage: Stage, page_most: int) -> None:
    stage.fake.page_most = page_most
    (ann,) = await stage.people(1)
    for n in range(60):  # of which Spotify has the newest 50
        ann.at_spotify.play(n % 9, START - timedelta(minutes=60 - n))
    first = await stage.archive(ann)
    assert (first.count("successful"), first.songs) == (1, 50)
    row = await stage.row(ann)
    assert row["last_polled_at"] == START and row["cursor_ms"] == max(ms for _, _, ms in stage.fake.served)
    # again in the same hour: the key is there
    again = await stage.archive(ann)
    assert again.outcomes[0].reason == "already_completed" and await polled(stage, ann) == 1
    # an hour later only what is new is asked for
    stage.now += HOUR
    new = [ann.at_spotify.play(3, stage.now - n * MINUTE) for n in range(1, 4)]
    stage.fake.calls.clear()
    assert (await stage.archive(ann)).songs == 3
    assert len(stage.fake.keys("recently_played")) == (4 if page_most == 1 else 1)
    assert await stage.archived() == stage.fake.served >= {(ann.at_spotify.id, play.track, play.ms) for play in new}
    keys = await stage.connection.fetch("select key, until from listening_keys order by key")
    assert [tuple(key) for key in keys] == [
        (f"archive_{ann.id}_2031_03_14_{hour:02}", START + (hour - 9 + 24) * HOUR) for hour in (9, 10)
    ]


async def test_what_a_play_is_made_of(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    song = made_songs()[5]
    ann.at_spotify.play(song, START - MINUTE)
    ann.at_spotify.play(6, START - 2 * MINUTE, spoilt="no_album")
    ann.at_spotify.play(7, START - 3 * MINUTE, spoilt="local_track")
    ann.at_spotify.play(8, START - 4 * MINUTE, spoilt="missing_played_at")
    assert (await stage.archive(ann)).songs == 2
    row = await stage.connection.fetchrow(
        """
        select track.name, duration_ms, isrc, album.name as album, image_url,
               (select array_agg(artist.name order by position) from track_artists
                join artists as artist on artist.spotify_id = artist where track = track.spotify_id) as artists
        from spotify_tracks as track join albums as album on album.spotify_id = album where track.spotify_id = $1
        """,
        song.id,
    )
    assert tuple(row)[:4] == (song.name, song.duration_ms, song.isrc, song.album) and row["image_url"]
    assert row["artists"] == [artist.name for artist in song.artists]
    without = await stage.connection.fetchval("select count(*) from spotify_tracks where album is null")
    assert without == 1
    # what can't be a play is kept as it came, once
    rejects = await stage.connection.fetch("select reason, raw from play_rejects order by reason")
    assert [one["reason"] for one in rejects] == ["cannot be read", "its track has no id"]
    assert all(b'"track"' in one["raw"] for one in rejects)


async def test_names_change_and_nothing_known_is_forgotten(stage: Stage) -> None:
    ann, bob = await stage.people(2)
    song = made_songs()[5]
    ann.at_spotify.play(song, START - MINUTE)
    await stage.archive(ann)
    await stage.connection.execute("update spotify_tracks set name = 'old', isrc = 'KEPT'")
    bob.at_spotify.play(song, START - MINUTE, spoilt="no_album")
    await stage.archive(bob)
    row = await stage.connection.fetchrow("select name, album from spotify_tracks")
    assert tuple(row) == (song.name, song.album_id)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
                    lambda part: st.lists(part, max_size=3) | st.dictionaries(
                        st.sampled_from(["track", "played_at", "id", "name", "album", "artists", "duration_ms",
                                         "images", "external_ids", "isrc"]), part, max_size=5), max_leaves=12))
def test_whatever_comes_is_a_play_or_is_kept(item: object) -> None:
    raw = msgspec.Raw(msgspec.json.encode(item))
    found = read(raw, START)
    if isinstance(found, Play):
        assert found.track.id and "\0" not in found.track.name and found.played_at.tzinfo is not None
    else:
        assert found.raw == bytes(raw)


# -- tokens --------------------------------------------------------------------------------------------------------


async def test_a_token_is_refreshed_five_minutes_early_and_the_rotated_one_kept(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    before = await stage.row(ann)
    stage.fake.rotate, stage.fake.grace = "always", False
    stage.now = START + 54 * MINUTE
    await stage.archive(ann)
    assert stage.fake.keys("token") == []  # six minutes are enough
    stage.now = START + HOUR - 5 * MINUTE
    await stage.connection.execute("update listeners set last_polled_at = null; delete from listening_keys")
    await stage.archive(ann)
    after, vault = await stage.row(ann), Vault(stage.settings)
    assert stage.fake.keys("token") == [ann.at_spotify.id]
    assert vault.decrypt(after["refresh_token"]) != vault.decrypt(before["refresh_token"])
    assert after["token_expires_at"] == stage.now + HOUR
    for token in (after["access_token"], after["refresh_token"]):
        assert b"spotify-test" not in token
    stage.now += HOUR
    assert (await stage.archive(ann)).count("successful") == 1  # the new one is good


async def test_a_withdrawn_access_token_is_refreshed_once(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    ann.at_spotify.play(1, START - MINUTE)
    for access in stage.fake.accounts.accesses.values():
        access.until = 0.0
    assert (await stage.archive(ann)).songs == 1
    assert stage.fake.keys("token") == [ann.at_spotify.id]
    # one that is refused again is the person's failure, and not asked for without end
    stage.now += HOUR / 2
    await stage.connection.execute("update listeners set last_polled_at = null; delete from listening_keys")
    ann.at_spotify.broken = Fault("status", None, "recently_played", status=401)
    stage.fake.calls.clear()
    assert (await stage.archive(ann)).outcomes[0].reason == "AUTH: spotify: HTTP 401 to recent plays"
    assert (len(stage.fake.keys("recently_played")), len(stage.fake.keys("token"))) == (2, 1)


async def test_a_refresh_is_carried_through_although_the_poll_is_given_up(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    stage.fake.rotate, stage.fake.grace = "always", False
    stage.settings = stage.settings.model_copy(update={"person_seconds": 0.1})
    stage.listening = stage.another()
    stage.now += HOUR
    ann.at_spotify.broken = Fault("slow", 1, "token", seconds=0.4)
    assert (await stage.archive(ann)).outcomes[0].reason == "NETWORK: the poll took too long"
    await stage.listening.settle()
    stage.now += HOUR
    stage.settings = stage.settings.model_copy(update={"person_seconds": 5.0})
    assert (await stage.archive(ann, by=stage.another())).count("successful") == 1


async def test_who_takes_the_permission_back_is_deactivated_the_second_time(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    ann.at_spotify.revoke()
    assert "invalid_grant" in str((await stage.archive(ann)).outcomes[0].reason)
    row = await stage.row(ann)
    assert row["is_active"] and row["cooling_until"] == START + 30 * MINUTE
    stage.now += 30 * MINUTE
    await stage.archive(ann)
    row = await stage.row(ann)
    assert not row["is_active"] and (row["last_failure_type"], row["consecutive_failures"]) == ("AUTH", 2)
    stage.now += 24 * HOUR
    calls = len(stage.fake.calls)
    assert (await stage.archive(ann)).outcomes[0].reason == "disconnected" and len(stage.fake.calls) == calls
    # and is back after connecting anew
    pair = ann.at_spotify.token_pair()
    async with stage.connection.transaction():
        again = await people.connect(
            stage.connection, Vault(stage.settings), Profile(ann.at_spotify.id),
            Tokens(pair.access_token, 3600, pair.refresh_token), 100, stage.now,
        )  # fmt: skip
    assert (again.listener, again.new) == (ann.id, False)
    assert (await stage.archive(ann)).count("successful") == 1


async def test_who_connects_anew_in_the_middle_of_a_poll_is_not_harmed_by_it(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    ann.at_spotify.play(1, START - MINUTE)
    ann.at_spotify.broken = Fault("slow", 1, "recently_played", seconds=0.3)
    poll = asyncio.create_task(stage.archive(ann))
    await until(lambda: stage.fake.calls, "the poll is under way")
    pair = ann.at_spotify.token_pair()
    async with stage.connection.transaction():
        await people.connect(stage.connection, Vault(stage.settings), Profile(ann.at_spotify.id),
                             Tokens(pair.access_token, 3600, pair.refresh_token), 100, stage.now)  # fmt: skip
    assert (await poll).outcomes[0].reason == "connected_anew"
    assert (await stage.row(ann))["last_polled_at"] is None
    assert (await stage.archive(ann)).songs == 1


async def test_two_workers_never_poll_the_same_person_at_once(stage: Stage) -> None:
    everybody = await stage.people(20)
    stage.fake.rotate, stage.fake.grace = "always", False
    stage.now += HOUR
    reports = await asyncio.gather(*(stage.archive(*everybody, by=stage.another()) for _ in range(4)))
    assert sum(report.count("successful") for report in reports) == 20
    left = {one.reason for report in reports for one in report.outcomes if one.status == "skipped"}
    assert left <= {"in_progress", "already_completed"}
    assert set(stage.fake.counts("token").values()) == {1} and len(stage.fake.polls) == 20
    assert all(len(times) == 1 for times in stage.fake.polls.values())


async def test_a_dead_workers_person_is_taken_over_once_the_lease_has_run_out(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    lasts = timedelta(minutes=3)
    (dead,) = await people.claim(stage.connection, [ann.id], ann.id, stage.now, lasts)
    assert dead.standing == "claimed"
    stage.now += lasts - timedelta(seconds=1)
    assert (await stage.archive(ann)).outcomes[0].reason == "in_progress"
    stage.now += timedelta(seconds=1)
    assert (await stage.archive(ann)).count("successful") == 1
    # what the dead one might still say counts no longer
    assert await people.failed(stage.connection, dead, FailureType.UNKNOWN, stage.now, revoked=False) == 0
    assert (await stage.row(ann))["consecutive_failures"] == 0


# -- what goes wrong -----------------------------------------------------------------------------------------------

BROKEN = {
    "NETWORK: spotify: HTTP 500 to recent plays": Fault("status", None, status=500),
    "NETWORK: spotify: HTTP 503 to recent plays": Fault("status", None, status=503),
    "NETWORK: spotify: no answer to recent plays (ServerDisconnectedError)": Fault("drop", None),
    "NETWORK: spotify: no answer to recent plays within 3 s": Fault("slow", None, seconds=3.4),
    "NETWORK: spotify: no answer to recent plays (ClientPayloadError)": Fault("cut", None),
    "UNKNOWN: spotify: the answer to recent plays can't be read": "not_json",
    "UNKNOWN: spotify: the answer to recent plays can't be read ": Fault("html", None),
    "UNKNOWN: spotify: the answer to recent plays can't be read  ": Fault("truncated", None),
    "AUTH: spotify: HTTP 403 to recent plays": Fault("status", None, status=403),
}  # fmt: skip


async def test_of_fifty_ten_fail_in_ten_ways_and_forty_are_archived(stage: Stage) -> None:
    everybody = await stage.people(50)
    for n, one in enumerate(everybody):
        for k in range(1, 4):
            one.at_spotify.play(n + k, START - k * MINUTE, spoilt="no_album" if n % 7 == 0 else None)
    for one, fault in zip(everybody[5::5], BROKEN.values(), strict=True):
        one.at_spotify.broken = fault  # type: ignore[assignment]
    everybody[0].at_spotify.revoke()
    report = await stage.archive(*everybody)
    assert (report.count("successful"), report.count("failed"), report.count("skipped")) == (40, 10, 0)
    reasons = {one.listener: one.reason for one in report.outcomes if one.status == "failed"}
    assert [reasons[one.id] for one in everybody[5::5]] == [reason.rstrip() for reason in BROKEN]
    assert "invalid_grant" in str(reasons[everybody[0].id])
    well = {one.at_spotify.id for n, one in enumerate(everybody) if n % 5}
    assert {play for play in stage.fake.served if play[0] in well} == await stage.archived()
    assert len(await stage.archived()) == 120
    assert all("Name-of" not in str(line) and "@" not in str(line) for line in stage.logs)


async def test_a_row_that_postgres_refuses_is_one_persons_failure(stage: Stage) -> None:
    everybody = await stage.people(20)
    for one in everybody:
        one.at_spotify.play(1, START - MINUTE)
    bad = everybody[7]
    await stage.connection.execute(f"""
        create function refuse() returns trigger language plpgsql as $$ begin
            if new.listener = '{bad.id}' then raise exception 'no place for Name-of-{bad.at_spotify.id}'; end if;
            return new;
        end $$;
        create trigger refuse before insert on play_events for each row execute function refuse()
    """)
    report = await stage.archive(*everybody)
    assert (report.count("successful"), report.count("failed")) == (19, 1)
    assert report.reasons == {"UNKNOWN: RaiseError": 1}
    assert (await stage.row(bad))["last_failure_type"] == "UNKNOWN"
    assert "Name-of" not in stage.stream.getvalue()


TABLE = {
    "AUTH": (Fault("status", None, status=403), [30, 60, 120, 240, 240]),
    "NETWORK": (Fault("status", None, status=502), [10, 20, 40, 60, 60]),
    "UNKNOWN": ("not_json", [20, 40, 80, 160, 180, 180]),
}


@pytest.mark.parametrize("kind", TABLE)
async def test_cool_downs_follow_the_table_to_the_minute_and_a_success_resets(stage: Stage, kind: str) -> None:
    fault, minutes = TABLE[kind]
    (ann,) = await stage.people(1)
    ann.at_spotify.broken = fault  # type: ignore[assignment]
    await stage.connection.execute("update listeners set token_expires_at = $1", START + 100 * HOUR)
    for access in stage.fake.accounts.accesses.values():
        access.until = 1e12
    for failures, wait in enumerate(minutes, 1):
        assert (await stage.archive(ann)).outcomes[0].status == "failed"
        row = await stage.row(ann)
        assert (row["consecutive_failures"], row["last_failure_type"]) == (failures, kind)
        assert row["cooling_until"] - stage.now == wait * MINUTE == cool_down(FailureType(kind), failures)
        stage.now += wait * MINUTE - timedelta(seconds=1)
        assert (await stage.archive(ann)).outcomes[0].reason == "cooling_down"
        stage.now += timedelta(seconds=1)
    ann.at_spotify.broken = None
    assert (await stage.archive(ann)).count("successful") == 1
    row = await stage.row(ann)
    assert (row["consecutive_failures"], row["last_failure_type"], row["cooling_until"]) == (0, None, None)


async def test_a_429_holds_for_the_person_and_for_everybody(stage: Stage) -> None:
    stage.settings = stage.settings.model_copy(update={"people_at_once": 1})
    stage.listening = stage.another()
    everybody = await stage.people(6)
    everybody[2].at_spotify.broken = Fault("status", 1, status=429, retry_after=90)
    report = await stage.archive(*everybody)
    assert [one.reason for one in report.outcomes] == [None, None, "rate_limited", *["spotify_rests"] * 3]
    assert (report.rest_seconds, report.count("failed")) == (90, 0)
    row = await stage.row(everybody[2])
    assert (row["rate_limited_until"], row["consecutive_failures"]) == (START + timedelta(seconds=90), 0)
    assert await stage.connection.fetchval("select count(*) from listeners where lease is not null") == 0
    stage.now += timedelta(seconds=90)
    report = await stage.archive(*everybody)
    assert [one.reason for one in report.outcomes if one.status == "skipped"] == ["already_completed"] * 2
    assert report.count("successful") == 4


async def test_where_spotify_is_away_the_breaker_opens_and_rests_longer_each_time(stage: Stage) -> None:
    stage.settings = stage.settings.model_copy(update={"people_at_once": 1})
    stage.listening = stage.another()
    everybody = await stage.people(40)
    await stage.fake.stop()
    rests = []
    for _ in range(3):
        report = await stage.archive(*everybody)
        assert report.count("failed") == 10  # and no more: the others are left as they were
        rests.append(report.rest_seconds)
    assert rests == [60, 120, 240]
    await stage.fake.start()
    report = await stage.archive(*everybody)
    assert (report.count("successful"), report.rest_seconds) == (10, None)
    await stage.fake.stop()
    stage.now += HOUR
    await stage.archive(*everybody[30:])
    assert stage.listening.breaker.failed() is None  # it begins anew


async def test_our_own_settings_are_nobodys_failure(stage: Stage) -> None:
    everybody = await stage.people(3)
    stage.now += HOUR
    stage.fake.key = "another secret"  # type: ignore[misc]
    with pytest.raises(Misconfigured, match=r"HTTP 401 to a refresh"):
        await stage.archive(*everybody)
    assert await stage.connection.fetchval("select count(*) from listeners where consecutive_failures > 0") == 0
    assert await stage.connection.fetchval("select count(*) from listeners where lease is not null") == 0


async def test_without_a_key_or_with_another_one(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    listening = stage.another()
    listening.settings = ListeningSettings()
    with pytest.raises(Misconfigured, match=r"listening\.token_key"):
        await stage.archive(ann, by=listening)
    listening = stage.another()
    listening.settings = ListeningSettings(token_key="quite another key of thirty-two bytes")  # type: ignore[arg-type]
    assert "encrypted by a key that is not in the settings" in str((await stage.archive(ann, by=listening)).outcomes)


async def test_unknown_ids_and_ids_given_twice(stage: Stage) -> None:
    (ann,) = await stage.people(1)
    stranger = Connected(uuid4(), ann.at_spotify)
    report = await stage.archive(ann, ann, stranger)
    assert sorted((one.status, one.reason) for one in report.outcomes) == [
        ("skipped", "unknown_listener"), ("successful", None)
    ]  # fmt: skip


# -- metrics -------------------------------------------------------------------------------------------------------


async def test_metrics_count_what_happened(stage: Stage) -> None:
    def value(name: str, **labels: str) -> float:
        return metrics.registry.get_sample_value(f"indexer_{name}", labels) or 0.0

    plays, failures = value("play_events_total"), value("listener_failures_total", type="NETWORK")
    refreshes = value("token_refreshes_total", outcome="kept")
    ann, bob = await stage.people(2)
    ann.at_spotify.play(1, START - MINUTE)
    bob.at_spotify.broken = Fault("status", None, "recently_played", status=500)
    stage.now += 57 * MINUTE
    await stage.archive(ann, bob)
    assert value("play_events_total") - plays == 1
    assert value("listener_failures_total", type="NETWORK") - failures == 1
    assert value("token_refreshes_total", outcome="kept") - refreshes == 2


def test_a_moment_in_milliseconds_is_exact() -> None:
    now = datetime.fromisoformat("2031-03-14T09:00:00.123456+00:00")
    assert Play(None, now).ms == 1931245200123  # type: ignore[arg-type]
