"""Challenges, milestones and who is told, against the oracle: while tracks and users change, however blocks are cut."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import block, cut, event, heads, span
from oracle_challenges import AMOUNTS, World, dump

from hooks import challenges
from hooks.challenges import TIERS, Challenges, Tier
from indexer import Block, ledger
from indexer.config import HooksSettings
from indexer.ledger import Pace
from indexer.model import Span
from indexer.pipeline import Pipeline
from indexer.rebuild import rebuild, verify
from indexer.registry import Registered, load_hooks
from indexer.testing import assert_undo_restores
from indexer.testing.crash import crash_point

ENABLED = [
    "hooks.entities:entities", "hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones",
    "hooks.challenges:challenges",
]  # fmt: skip
SMALL = (Tier("p1", 1, 4), Tier("p2", 4, 9), Tier("p3", 9, 20))
START = datetime(2024, 12, 30, 20)  # what counts for artists begins two days later
_chains = itertools.count(1)


def bundled(*without: str) -> tuple[Registered, ...]:
    return load_hooks(HooksSettings(enabled=[place for place in ENABLED if place not in without]))


async def start(connection: asyncpg.Connection, hooks: Sequence[Registered]) -> Pipeline:
    chain = await ledger.open_chain(connection, f"chain{next(_chains)}", "test", "1", 1)
    await ledger.register_hooks(connection, chain.id, [one.name for one in hooks])
    return Pipeline(chain, hooks, "test")


async def apply(connection: asyncpg.Connection, pipeline: Pipeline, spans: Iterable[Span]) -> None:
    at = (await ledger.cursor(connection, pipeline.chain.id)).ref
    for one in spans:
        async for applied in pipeline.apply(connection, at, one, Pace(heads(10**6))):
            at = applied.span.end


async def run(connection: asyncpg.Connection, *blocks: Block, hooks: Sequence[Registered] | None = None) -> Pipeline:
    pipeline = await start(connection, hooks or bundled())
    await apply(connection, pipeline, [span(blocks)])
    return pipeline


async def clear(connection: asyncpg.Connection, active: Iterable[str] = AMOUNTS) -> None:
    await connection.execute(
        "truncate plays, aggregate_plays, aggregate_monthly_plays, hourly_play_counts, milestones, notification, "
        "tracks, users, challenge_listen_streak, user_challenges restart identity"
    )
    await connection.execute("update challenges set active = id = any($1::text[])", list(active))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(challenges, "TIERS", SMALL)


def registered(track: int, owner: int) -> tuple[str, dict[str, Any]]:
    return "TrackRegistered", {"trackId": track, "ownerId": owner, "title": "", "genre": ""}


def managed(action: str, kind: str, entity: int, user: int, said: str = "{}") -> tuple[str, dict[str, Any]]:
    args = {"entityType": kind, "action": action, "metadata": said, "signer": ""}
    return "ManageEntity", {"entityId": str(entity), "userId": str(user), **args}


def verified(user: int) -> tuple[str, dict[str, Any]]:
    return managed("Verify", "User", user, user)


def played(track: int, at: datetime = START, user: int | None = None) -> tuple[str, dict[str, Any]]:
    return "Played", {"trackId": str(track), "userId": "" if user is None else str(user), "playedAt": f"{at}Z"}


def block_of(number: int, *said: tuple[str, dict[str, Any]]) -> Block:
    return block(number, [event(index, args, name=name, tx=index) for index, (name, args) in enumerate(said)])


# -- any history -------------------------------------------------------------------------------------------------------

# around the borders of 16 and 48 hours, equal times, and backwards
HOURS = [0, 0, 0, 0.5, 1, 15.99, 16, 16.01, 24, 24, 24, 47.99, 48, 49, -1, -16, -30, 100]


def change(chance: random.Random) -> tuple[str, dict[str, Any]]:
    track, user = chance.choice([1, 1, 2, 3, 4]), chance.choice([1, 1, 2, 3])
    said = f'{{"{chance.choice(["is_verified", "is_deactivated"])}": {chance.choice(["true", "false"])}}}'
    kinds = [registered(track, user), managed(chance.choice(["Create", "Delete"]), "Track", track, user)]
    return chance.choice([*kinds, verified(user), managed("Update", "User", user, user, said)])


@st.composite
def histories(draw: st.DrawFn) -> list[Block]:
    """Blocks of plays among which tracks move and artists come and go."""
    chance, at = random.Random(draw(st.integers(0, 10**6))), START
    known = [verified(1), verified(2), registered(1, 1), registered(2, 1), registered(3, 2)]
    contents = [known if chance.random() < 0.7 else []]
    for _ in range(draw(st.integers(1, 8))):
        said = [change(chance) for _ in range(chance.choice([0, 0, 1, 3]))]
        for _ in range(chance.choice([0, 1, 3, 6, 20])):
            at += timedelta(hours=chance.choice(HOURS))
            said.append(played(chance.choice([1, 1, 1, 2, 2, 3, 4, 5]), at, chance.choice([None, 1, 1, 2, -3, 2**40])))
        chance.shuffle(said)
        contents.append(said)
    return [block_of(number, *said) for number, said in enumerate(contents, 1)]


QUIET = list(HealthCheck)
ACTIVE = st.sampled_from(
    [("e", "p1", "p2", "p3"), ("e", "p1", "p2", "p3"), ("p1", "p2", "p3"), ("p2",), ("e", "p3"), ()]
)


@pytest.mark.usefixtures("small")
@settings(max_examples=30, deadline=None, suppress_health_check=QUIET)
@given(histories(), st.sets(st.integers(1, 8), max_size=3), ACTIVE)
async def test_the_tables_are_the_oracles_whatever_the_cut(
    connection: asyncpg.Connection, blocks: list[Block], borders: set[int], active: tuple[str, ...]
) -> None:
    in_one = cut(blocks, ())
    for spans in ([span([one]) for one in blocks], cut(blocks, {b for b in borders if b < len(blocks)}), in_one):
        await clear(connection, active)
        pipeline = await start(connection, bundled())
        await apply(connection, pipeline, spans)
        world = World(pipeline.chain.id, SMALL, {challenge: AMOUNTS[challenge] for challenge in active})
        assert await dump(connection) == world.apply(blocks).dump()


@pytest.mark.usefixtures("small")
@settings(max_examples=3, deadline=None, suppress_health_check=QUIET)
@given(histories())
async def test_undo_restores(connection: asyncpg.Connection, blocks: list[Block]) -> None:
    await clear(connection)
    await assert_undo_restores(connection, bundled(), blocks)


@pytest.mark.usefixtures("small")
@settings(max_examples=10, deadline=None, suppress_health_check=QUIET)
@given(histories(), st.integers(0, 10**6), st.booleans())
async def test_verify_finds_damage_and_rebuild_repairs_it(
    connection: asyncpg.Connection, blocks: list[Block], seed: int, active: bool
) -> None:
    await clear(connection, AMOUNTS if active else ["p1", "p2", "p3"])
    hooks = bundled()
    await run(connection, *blocks, hooks=hooks)
    assert (await verify(connection, hooks, "challenges")).equal
    right, chance = await dump(connection), random.Random(seed)
    for table, change in (
        ("challenge_listen_streak", "update challenge_listen_streak set listen_streak = 40 where ctid = $1"),
        ("challenge_listen_streak", "delete from challenge_listen_streak where ctid = $1"),
        ("user_challenges", "update user_challenges set is_complete = not is_complete where ctid = $1"),
        ("user_challenges", "delete from user_challenges where ctid = $1"),
    ):
        of = " where challenge_id = 'e'" if table == "user_challenges" else ""
        places = [row[0] for row in await connection.fetch("select ctid from " + table + of)]
        if places:
            await connection.execute(change, chance.choice(places))
    await connection.execute("insert into challenge_listen_streak values (99, 'epoch', 1)")
    assert not (await verify(connection, hooks, "challenges")).equal
    await rebuild(connection, hooks, "challenges")
    assert (await verify(connection, hooks, "challenges")).equal
    assert await dump(connection) == right


# -- the streak --------------------------------------------------------------------------------------------------------


async def rows_of(connection: asyncpg.Connection, challenge: str) -> list[asyncpg.Record]:
    return await connection.fetch(
        """
        select specifier, current_step_count, amount, is_complete, completed_blocknumber, completed_at
        from user_challenges where challenge_id = $1 order by specifier
        """,
        challenge,
    )


async def test_a_streak_day_by_day(connection: asyncpg.Connection) -> None:
    await clear(connection)
    at = datetime(2025, 1, 30, 9, 59, 59)
    days = [at + timedelta(days=day) for day in range(9)]
    await run(connection, *[block_of(n, played(1, day, 255), played(2, day, 255)) for n, day in enumerate(days, 1)])
    assert await connection.fetch("select * from challenge_listen_streak") == [(255, days[-1], 9)]
    assert await rows_of(connection, "e") == [
        *[(f"ff{day:%Y%m%d}09", n, 1, False, None, None) for n, day in enumerate(days[:6], 1)],
        ("ff2025020509", 7, 1, True, 7, days[6]),
        ("ff2025020609", 1, 1, True, 8, days[7]),
        ("ff2025020709", 1, 1, True, 9, days[8]),
    ]


@pytest.mark.parametrize(
    ("hours", "streak", "changed"),
    [(-100, 1, False), (0, 1, False), (15.9999, 1, False), (16, 2, True), (47.9999, 2, True), (48, 1, True)],
)
async def test_the_borders_of_a_day(connection: asyncpg.Connection, hours: float, streak: int, changed: bool) -> None:
    later = START + timedelta(hours=hours)
    await run(connection, block_of(1, played(1, START, 7), played(1, later, 7)))
    assert await connection.fetch("select * from challenge_listen_streak") == [(7, later if changed else START, streak)]
    assert await rows_of(connection, "e") == []  # not active


async def test_what_is_complete_stays_as_it_is(connection: asyncpg.Connection) -> None:
    await clear(connection)
    row = ("e", f"7{START:%Y%m%d%H}", 7, 3, 5, True, 44, datetime(2020, 1, 1))
    await connection.execute("insert into user_challenges values ($1, $2, $3, $4, $5, $6, $7, $8)", *row)
    await run(connection, block_of(1, played(1, START, 7)))
    assert await connection.fetch("select * from user_challenges") == [row]


async def test_an_amount_that_is_no_number(connection: asyncpg.Connection) -> None:
    await clear(connection)
    for amount in ("", "1.5", "-2", "9" * 20, None):
        await connection.execute("update challenges set amount = $1", amount)
        await run(connection, block_of(1, played(1, START, 7)))
        assert await connection.fetchval("select max(amount) from user_challenges") == 0
        await clear(connection)


async def test_ids_in_hex_are_the_same_to_postgres(connection: asyncpg.Connection) -> None:
    for number in (0, 1, 255, 2**63 - 1, -1, -255, -(2**63)):
        assert await connection.fetchval("select challenge_user_hex($1)", number) == f"{number:x}"


# -- artists -----------------------------------------------------------------------------------------------------------

NOW = datetime(2025, 3, 1)
KNOWN = block_of(1, verified(10), registered(1, 10), registered(2, 10))


async def test_the_real_thresholds(connection: asyncpg.Connection) -> None:
    """Each tier begins where the one before is complete; the play that reaches a threshold is the one that is named."""
    blocks = [KNOWN]
    at = NOW
    for number in range(2, 7):
        plays = []
        for _ in range(240):
            at += timedelta(minutes=1)
            plays.append(played(1 + number % 2, at))
        blocks.append(block_of(number, *plays))
    await run(connection, *blocks)
    found = await connection.fetch("select * from user_challenges order by 1")
    assert found == [
        ("p1", "a:250", 10, 250, 25, True, 3, NOW + timedelta(minutes=250)),
        ("p2", "a:1000", 10, 1000, 100, True, 6, NOW + timedelta(minutes=1000)),
        ("p3", "a:10000", 10, 1200, 1000, False, None, None),
    ]
    assert TIERS == (("p1", 1, 250), ("p2", 250, 1000), ("p3", 1000, 10000))


async def test_plays_before_2025_do_not_count(connection: asyncpg.Connection) -> None:
    last_year = datetime(2024, 12, 31, 23, 59, 59)
    pipeline = await run(connection, KNOWN, block_of(2, played(1, last_year), played(2, last_year)))
    assert await connection.fetch("select * from user_challenges") == []
    await apply(connection, pipeline, [span([block_of(3, played(1, datetime(2025, 1, 1)), played(2, last_year))])])
    assert await rows_of(connection, "p1") == [("a:250", 1, 25, False, None, None)]


async def test_who_is_rewarded_is_who_was_verified_then(connection: asyncpg.Connection) -> None:
    gone, back = (managed("Update", "User", 10, 10, f'{{"is_deactivated": {value}}}') for value in ("true", "false"))
    blocks = [KNOWN, block_of(2, played(1, NOW)), block_of(3, gone), block_of(4, *[played(1, NOW)] * 3)]
    await run(connection, *blocks, block_of(5, back))
    assert await rows_of(connection, "p1") == [("a:250", 1, 25, False, None, None)]


async def test_who_is_told_is_who_owned_the_track_in_that_block(connection: asyncpg.Connection) -> None:
    first = block_of(1, registered(1, 10), *[played(1)] * 9)
    blocks = [first, block_of(2, played(1), registered(1, 20)), block_of(3, registered(1, 30), *[played(1)] * 14)]
    await run(connection, *blocks, block_of(4, registered(1, 40), played(1)), block_of(5, registered(1, 50)))
    assert await connection.fetch("select slot, user_ids from notification order by id") == [(2, [20]), (4, [40])]


@pytest.mark.usefixtures("small")
async def test_plays_of_a_deleted_track_do_not_count(connection: asyncpg.Connection) -> None:
    pipeline = await run(connection, KNOWN, block_of(2, managed("Delete", "Track", 2, 10)))
    times = [NOW + timedelta(minutes=minute) for minute in range(12)]
    said = [played(1 if minute in (0, 3, 4, 8) else 2, at) for minute, at in enumerate(times)]
    await apply(connection, pipeline, [span([block_of(3, *said)])])
    assert await rows_of(connection, "p1") == [("a:4", 4, 25, True, 3, times[8])]
    assert await rows_of(connection, "p2") == [("a:9", 4, 100, False, None, None)]


@pytest.mark.usefixtures("small")
async def test_who_has_won_everything_is_summed_up_no_more(connection: asyncpg.Connection) -> None:
    pipeline = await run(connection, KNOWN, block_of(2, *[played(1, NOW)] * 20))
    assert await connection.fetchval("select bool_and(is_complete) and count(*) = 3 from user_challenges")
    before = await connection.fetch("select xmin::text, * from user_challenges")
    with crash_point(connection) as watched:
        await apply(connection, pipeline, [span([block_of(3, *[played(1, NOW)] * 5)])])
    assert not [sql for sql in watched.statements if "sum(count)" in sql]
    assert await connection.fetch("select xmin::text, * from user_challenges") == before
    # until there is more to be won
    await connection.execute("delete from user_challenges where challenge_id = 'p2'")
    await apply(connection, pipeline, [span([block_of(4, played(1, NOW))])])
    assert await rows_of(connection, "p2") == [("a:9", 9, 100, True, 4, NOW)]


async def test_without_entities_the_tables_are_as_they_are(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "insert into tracks (track_id, owner_id, created_at) values (1, 10, 'now'), (2, 11, 'now')"
    )
    await connection.execute("insert into users (user_id, is_verified) values (10, true), (11, false)")
    await connection.execute("insert into users (user_id, is_verified, is_current) values (12, true, false)")
    await connection.execute(
        "insert into tracks values (3, 10, '', '', 'now', false, false), (4, 10, '', '', 'now', true, true)"
    )
    said = [played(track, NOW) for track in (1, 2, 3, 4) for _ in range(10)]
    await run(connection, block_of(1, *said), hooks=bundled(ENABLED[0]))
    assert await connection.fetch("select specifier, current_step_count from user_challenges") == [("a:250", 10)]
    told = await connection.fetch("select specifier, user_ids from notification order by id")
    assert told == [("10", [10]), ("11", [11]), ("10", [10])]  # of track 4 too: it is deleted, but has its owner


async def test_on_the_columns_of_an_older_indexer(connection: asyncpg.Connection) -> None:
    await clear(connection)
    await connection.execute(
        """
        drop materialized view aggregate_interval_plays;
        alter table plays alter user_id type integer, alter play_item_id type integer, alter slot type integer;
        alter table aggregate_monthly_plays alter play_item_id type integer, alter count type integer;
        alter table tracks alter track_id type integer, alter owner_id type integer;
        alter table users alter user_id type integer;
        alter table challenges alter amount type varchar;
        alter table challenge_listen_streak alter user_id type integer;
        alter table user_challenges alter challenge_id type varchar, alter specifier type varchar,
            alter user_id type integer, alter completed_blocknumber type integer,
            add created_at timestamp not null default now();
        """
    )
    blocks = [KNOWN, *[block_of(n, *[played(1, NOW + timedelta(days=n), 10)] * 40) for n in range(2, 11)]]
    hooks = bundled()
    await run(connection, *blocks, hooks=hooks)
    found = await dump(connection)
    assert found["user_challenges"] == World(1, TIERS).apply(blocks).dump()["user_challenges"]
    assert len(found["user_challenges"]) == 9 + 2
    assert (await verify(connection, hooks, "challenges")).equal


async def test_the_panels_can_be_read(connection: asyncpg.Connection) -> None:
    await run(connection, KNOWN, block_of(2, *[played(1, NOW)] * 250))
    (panel,) = Challenges.panels
    assert await connection.fetch(panel.sql) == [("p1", 10, 25, 2, NOW)]
