"""Tracks and users against the oracle: whatever transactions say, and however the blocks are cut."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made import block, cut, event, heads, span
from oracle_entities import EntitiesOracle, dump

from hooks.entities import Entities, EntitiesSettings, metadata
from hooks.ownership import Owners, Track, User
from indexer import Block, Tx, ledger, metrics
from indexer.config import HookSettings, HooksSettings
from indexer.errors import ConfigError
from indexer.ledger import Pace
from indexer.model import Event, Span
from indexer.pipeline import Pipeline
from indexer.registry import Registered, check_events, load_hooks
from indexer.testing import assert_undo_restores

REASONS = ("entity_id", "user_id", "metadata", "not_owner", "unknown", "verifier")
CREATE = ("Create", "Update", "Delete", "Verify")
_chains = itertools.count(1)


def manage(
    index: int, action: str, kind: str, entity: Any = "1", user: Any = "1", said: Any = None, **more: str
) -> Event:
    """A ManageEntity transaction whose metadata has the chain's own shape, or is the text that is given."""
    text = said if isinstance(said, str) else json.dumps({"cid": "", "data": said or {}})
    args = {"userId": user, "entityType": kind, "entityId": entity, "action": action, "metadata": text}
    return event(index, {"signature": "0x", "signer": "0xAb", "nonce": "0x1"} | args | more, name="ManageEntity")


def registered(index: int, track: Any, owner: Any, title: str = "t", genre: str = "g") -> Event:
    args = {"trackId": track, "ownerId": owner, "title": title, "genre": genre}
    return event(index, args, name="TrackRegistered")


async def run(
    connection: asyncpg.Connection, spans: Iterable[Span], hooks: Sequence[Registered] | None = None
) -> Pipeline:
    """Apply the spans on a chain of their own."""
    hooks = (Registered(Entities(), HookSettings()),) if hooks is None else hooks
    chain = await ledger.open_chain(connection, f"chain{next(_chains)}", "test", "1", 1)
    await ledger.register_hooks(connection, chain.id, [one.name for one in hooks])
    pipeline = Pipeline(chain, hooks, "test")
    at = (await ledger.cursor(connection, chain.id)).ref
    for one in spans:
        async for applied in pipeline.apply(connection, at, one, Pace(heads(10**6))):
            at = applied.span.end
    return pipeline


def skipped() -> dict[str, float]:
    return {reason: metrics.skipped_total.labels("entities", reason)._value.get() for reason in REASONS}


# -- what a chain may say ----------------------------------------------------------------------------------------------

DEEP = '{"data":' * 100_000 + "1" + "}" * 100_000
MALFORMED = [
    "", " ", "{", "nonsense", "[]", "1", "null", '"text"', "{'title': 'x'}", '{"title": "a\0b"}', '{"title": NaN}',
    DEEP, "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"title": "\n"}', "\ufeff{}", '{"a":1}{"b":2}', '{"a":}',
]  # fmt: skip
FINE = [
    "{}", '{"data": null, "title": "top"}', '{"data": {"title": null}}', '{"data": {"title": 7, "genre": ["x"]}}',
    '{"title": "a", "title": "b"}', '{"data": {"title": "n\\u0000ul", "genre": "\\ud83c", "handle": "\\ud83c\\udfb5"}}',
    '{"data": {"owner_id": 3, "user_id": 3, "track_id": 9, "is_delete": true, "is_current": false}}',
    '{"is_unlisted": "true", "is_verified": 1, "is_deactivated": "yes"}', '{"data": [], "genre": "g"}',
    json.dumps({"data": {"title": "é" * 5000}}),
]  # fmt: skip
IDS = st.one_of(
    st.sampled_from(["1", "2", "3"]),
    st.sampled_from(["1", "2", "3", "+1", "x", "", "1.0", "٧", str(2**31), str(2**63), str(-(2**63)), "9" * 5000]),
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "title": st.sampled_from(["a", "b", "", "n\0"]), "genre": st.sampled_from(["Jazz", None]),
        "handle": st.sampled_from(["h", "i"]), "is_unlisted": st.booleans(), "is_verified": st.booleans(),
        "is_deactivated": st.booleans(),
    },
)  # fmt: skip
SAID = st.one_of(FIELDS, FIELDS, st.sampled_from(MALFORMED[:11] + FINE))
MANAGED = st.builds(
    lambda action, kind, entity, user, said, signer: manage(0, action, kind, entity, user, said, signer=signer),
    st.sampled_from([*CREATE, "Save"]), st.sampled_from(["Track", "Track", "User", "Playlist"]), IDS, IDS, SAID,
    st.sampled_from(["0xAb", "0xCd"]),
)  # fmt: skip
THEMSELVES = st.builds(
    lambda action, user, said: manage(0, action, "User", user, user, said),
    st.sampled_from(["Create", "Update", "Verify"]), st.sampled_from("123"), SAID,
)  # fmt: skip
REGISTERED = st.builds(lambda track, owner, title: registered(0, track, owner, title), IDS, IDS, st.sampled_from("xy"))
BLOCKS = st.lists(st.lists(st.one_of(MANAGED, THEMSELVES, REGISTERED), max_size=6), min_size=1, max_size=7).map(
    lambda contents: [
        block(number, [event(index, one.args, name=one.name, tx=index) for index, one in enumerate(events)])
        for number, events in enumerate(contents, 1)
    ]
)
EVERYTHING = [
    block(1, [manage(0, "Create", "Track", str(n), "1", said) for n, said in enumerate(MALFORMED + FINE)]),
    block(2, [manage(0, "Update", "Track", str(n), "1", said) for n, said in enumerate(MALFORMED + FINE)]),
    block(3, [manage(0, action, "User", "5", "5", said) for said in MALFORMED + FINE for action in CREATE]),
]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(BLOCKS, st.sets(st.integers(1, 6), max_size=3), st.sampled_from([(), ("0xAB",)]))
@example(EVERYTHING, {1}, ())
async def test_the_tables_are_the_oracles_whatever_the_cut(
    connection: asyncpg.Connection, blocks: list[Block], borders: set[int], verifiers: tuple[str, ...]
) -> None:
    expected = EntitiesOracle(verifiers).apply(blocks)
    hooks = (Registered(Entities(EntitiesSettings(verifiers=verifiers)), HookSettings()),)
    ways = [[span([one]) for one in blocks], cut(blocks, {b for b in borders if b < len(blocks)}), cut(blocks, ())]
    for spans in ways:
        await connection.execute("truncate tracks, users")
        before = skipped()
        await run(connection, spans, hooks)
        assert await dump(connection) == expected.dump()
        counted = {reason: count - before[reason] for reason, count in skipped().items()}
        assert counted == {reason: expected.skipped.get(reason, 0) for reason in REASONS}


@pytest.mark.parametrize("said", MALFORMED, ids=range(len(MALFORMED)))
async def test_malformed_metadata_skips_the_transaction_alone(connection: asyncpg.Connection, said: str) -> None:
    whole = [manage(0, "Create", "Track", "1", said={"title": "one"}), manage(1, "Create", "Track", "2", said=said)]
    whole += [manage(2, "Create", "User", "1", said=said), manage(3, "Create", "Track", "3", said={"title": "three"})]
    await run(connection, [span([block(1, whole)])])
    assert await connection.fetch("select track_id, title from tracks order by 1") == [(1, "one"), (3, "three")]
    assert await connection.fetchval("select count(*) from users") == 0


def test_metadata_of_any_type() -> None:
    assert metadata(None) is None
    assert metadata(7) is None
    assert metadata('{"a": 1, "data": "x"}') == {"a": 1, "data": "x"}


def test_metadata_that_nests_deep_takes_nothing_down() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1_000_000)  # as some library may; Python's parser would then run out of stack
    try:
        assert metadata(DEEP) is None
        assert metadata("[" * 100_000) is None
        assert metadata('{"title": "' + "[" * 1_000 + '\\""}') == {"title": "[" * 1_000 + '"'}
        assert metadata('{"a": [' + "{}, " * 1_000 + "{}]}") is not None
    finally:
        sys.setrecursionlimit(limit)


async def test_texts_are_as_postgres_takes_them(connection: asyncpg.Connection) -> None:
    said = '{"data": {"title": "n\\u0000ul", "genre": "\\ud83c alone"}}'
    await run(connection, [span([block(1, [manage(0, "Create", "Track", said=said)])])])
    assert await connection.fetchrow("select title, genre from tracks") == ("nul", "? alone")


async def test_nobody_claims_anothers_track(connection: asyncpg.Connection) -> None:
    mine = [manage(0, "Create", "Track", "1", "1", {"title": "mine", "owner_id": 2})]
    theirs = [manage(n, a, "Track", "1", "2", {"title": "theirs", "owner_id": 2}) for n, a in enumerate(CREATE[:3])]
    await run(connection, [span([block(1, mine), block(2, theirs)])])
    assert await connection.fetch("select owner_id, title, is_delete from tracks") == [(1, "mine", False)]


async def test_where_the_columns_are_integer(connection: asyncpg.Connection) -> None:
    await connection.execute("drop materialized view aggregate_interval_plays")
    await connection.execute("alter table tracks alter track_id type integer, alter owner_id type integer")
    await connection.execute("alter table users alter user_id type integer")
    big, low = str(2**31), str(-(2**31))
    said = [
        manage(0, "Create", "Track", big, "1"), manage(1, "Create", "Track", "1", big), registered(2, 2**31 - 1, 1),
        manage(3, "Create", "User", big, big), manage(4, "Create", "User", low, low), manage(5, "Delete", "Track", big),
    ]  # fmt: skip
    before = skipped()
    await run(connection, [span([block(1, said)])])
    assert await connection.fetch("select track_id from tracks") == [(2**31 - 1,)]
    assert await connection.fetch("select user_id from users") == [(-(2**31),)]
    assert {reason: n - before[reason] for reason, n in skipped().items() if n > before[reason]} == {
        "entity_id": 3, "user_id": 1,
    }  # fmt: skip


async def test_only_real_changes_are_written(connection: asyncpg.Connection) -> None:
    said = [manage(0, "Create", "Track", said={"title": "a"}), manage(1, "Create", "User", said={"handle": "h"})]
    await run(connection, [span([block(1, said)])])
    rows = "select xmin::text from tracks union all select xmin::text from users"
    before = await connection.fetch(rows)
    again = [
        *said,
        manage(2, "Update", "Track", said={"title": "b"}),
        manage(3, "Update", "Track", said=said[0].args["metadata"]),
    ]
    await run(connection, [span([block(1, again)])])
    assert await connection.fetch(rows) == before


async def test_what_later_hooks_are_told(connection: asyncpg.Connection) -> None:
    """One state before the span, and one for each block with a change that matters to them."""
    seen: dict[str, Any] = {}

    class Asking:
        name, listens, tables, after = "asking", (), (), ("entities",)

        async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
            owners = Owners(tx)
            await owners.read_tracks([1, 2, 3, 9])
            await owners.read_users([1, 2, 9])
            seen["rows"] = tx.inserted("tracks").values
            seen["tracks"] = {(t, slot): owners.track(t, slot) for t in (1, 2, 3, 9) for slot in range(5)}
            seen["users"] = {(u, slot): owners.user(u, slot) for u in (1, 2, 9) for slot in range(5)}

    first = [registered(0, 1, 7), registered(1, 3, 7), manage(2, "Create", "User", "1", "1")]
    blocks = [
        block(1, first),
        block(2, [registered(0, 1, 8), registered(1, 1, 9), manage(2, "Verify", "User", "1", "1", "")]),
        block(3, [registered(0, 1, 9, "other title"), registered(1, 2, 5)]),
        block(4, [registered(0, 1, 7), manage(1, "Update", "User", "2", "2", {"is_deactivated": True})]),
    ]
    hooks = (Registered(Entities(), HookSettings()), Registered(Asking(), HookSettings()))
    await run(connection, [span(blocks[:1]), span(blocks[1:])], hooks)
    assert seen["rows"] == [
        (1, -1, 7, True, False), (1, 2, 9, True, False), (1, 4, 7, True, False), (2, 3, 5, True, False),
    ]  # fmt: skip
    owned = {key: track.owner_id for key, track in seen["tracks"].items() if track}
    assert owned == {
        (1, 0): 7, (1, 1): 7, (1, 2): 9, (1, 3): 9, (1, 4): 7, (2, 3): 5, (2, 4): 5, **{(3, n): 7 for n in range(5)},
    }  # fmt: skip
    assert seen["tracks"][1, 2] == Track(9, True, False)
    assert [seen["users"][1, slot].eligible for slot in range(5)] == [False, False, True, True, True]
    assert [seen["users"][2, slot] for slot in (3, 4)] == [None, User(True, False, True)]
    assert seen["users"][9, 4] is None


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(BLOCKS)
async def test_undo_restores(connection: asyncpg.Connection, blocks: list[Block]) -> None:
    await connection.execute("truncate tracks, users")
    known = "insert into tracks (track_id, owner_id, created_at) values (1, 1, 'epoch')"
    await connection.execute(known)
    await assert_undo_restores(connection, [Entities()], blocks)


async def test_the_panels_can_be_read(connection: asyncpg.Connection) -> None:
    for panel in Entities.panels:
        assert [row[0] for row in await connection.fetch(panel.sql)] == ["tracks", "users"]


# -- the events that a source has --------------------------------------------------------------------------------------

CORE = {"ManageEntity": frozenset({"userId", "entityType", "entityId", "action", "metadata", "signer"})}
EVM = {"TrackRegistered": frozenset({"trackId", "ownerId", "title", "genre"})}
PLAYED = {"Played": frozenset({"trackId"})}


def hooks(**own: Any) -> tuple[Registered, ...]:
    return load_hooks(HooksSettings(enabled=["hooks.entities:entities"], entities=own))


@pytest.mark.parametrize("source", [CORE, EVM, CORE | EVM, CORE | PLAYED])
def test_either_event_is_enough(source: Mapping[str, frozenset[str]]) -> None:
    check_events(hooks(), source)


@pytest.mark.parametrize(
    ("own", "source", "words"),
    [
        ({}, PLAYED, r"entities listens to ManageEntity or TrackRegistered, .* has none \(there: Played\)"),
        ({}, {}, r"ManageEntity or TrackRegistered, .* \(there: none\)"),
        ({"manage_event": "ManageEntity"}, EVM, "listens to the event ManageEntity, which"),
        ({"registered_event": "Registered"}, CORE, "listens to the event Registered, which"),
        ({}, {"TrackRegistered": frozenset({"trackId"})}, "needs the argument ownerId of TrackRegistered"),
        ({"manage_event": ""}, CORE, "listens to TrackRegistered, of which"),
    ],
)  # fmt: skip
def test_a_source_without_the_events(own: dict[str, str], source: Mapping[str, frozenset[str]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_events(hooks(**own), source)


def test_settings_that_hear_nothing() -> None:
    with pytest.raises(ConfigError, match="manage_event or registered_event must name an event"):
        hooks(manage_event="", registered_event="")
