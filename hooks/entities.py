"""Tracks and users, from the Core chain's ManageEntity transactions and the EVM contract's TrackRegistered event.

Anybody may send a transaction that says anything: what changes a row is who sent it, and what of it is well formed. A
transaction that is neither is passed over and counted by reason; it never takes its block along.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hooks.ownership import BEFORE, TRACK_COLUMNS, USER_COLUMNS, Track, User
from hooks.plays import bigint, text
from indexer import Block, Event, EventSpec, Panel, Row, Tx, sql_folder

ACTIONS = {"Track": ("Create", "Update", "Delete"), "User": ("Create", "Update", "Verify")}
REGISTERED = "Registered"  # our word for what the EVM contract says, which is right whoever asked for it

_EPOCH = datetime(1970, 1, 1)
_INT32 = 1 << 31
_DEEPEST = 100
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


class EntitiesSettings(BaseModel):
    """[hooks.entities]: the events that change tracks and users, and who may verify."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manage_event: str = Field("ManageEntity", description='event that changes a track or a user ("": none)')
    registered_event: str = Field("TrackRegistered", description='event that registers a track ("": none)')
    verifiers: tuple[str, ...] = Field((), description="signers who may change is_verified; empty: everybody may")

    @model_validator(mode="after")
    def _hears_something(self) -> EntitiesSettings:
        if not (self.manage_event or self.registered_event):
            raise ValueError("manage_event or registered_event must name an event")
        return self


class Change(NamedTuple):
    """What a transaction asks for. `data`: the fields that it gives, of whatever type."""

    slot: int
    at: datetime
    entity: str
    action: str
    entity_id: int
    user_id: int
    signer: str
    data: Mapping[str, Any]


class TrackRow(NamedTuple):
    owner_id: int
    title: str | None
    genre: str | None
    created_at: datetime
    is_current: bool
    is_delete: bool
    is_unlisted: bool

    @property
    def state(self) -> Track:
        return Track(self.owner_id, self.is_current, self.is_delete)


class UserRow(NamedTuple):
    handle: str | None
    is_current: bool
    is_verified: bool
    is_deactivated: bool

    @property
    def state(self) -> User:
        return User(self.is_current, self.is_verified, self.is_deactivated)


R = TypeVar("R", bound=TrackRow | UserRow)


class Entities:
    """The hook `entities`. Must stand before `plays`, so that later hooks know the owners as of each block.

    What is known only of a later change (a history that was begun late) is taken from that: an update of an unknown
    track or user makes it known. The rows say what the newest transaction said that was applied: a hole that is filled
    later is applied on top of newer ones, so replay from there up to the head.
    """

    name = "entities"
    tables = ("tracks", "users")
    after = ()
    migrations = ("plays", sql_folder("plays"))
    Settings = EntitiesSettings
    panels = (
        Panel(
            "Tracks and users",
            # the server's own count, which costs nothing however many they are
            "select relname as of, n_live_tup as rows from pg_stat_user_tables"
            " where relid in (to_regclass('tracks'), to_regclass('users')) order by relname",
        ),
    )

    def __init__(self, settings: EntitiesSettings | None = None) -> None:
        self.settings = chosen = settings or EntitiesSettings()
        self.verifiers = frozenset(address.lower() for address in chosen.verifiers)
        # an event that the operator named must be there; of the default ones a source has one or the other
        named = chosen.model_fields_set
        specs = (
            EventSpec(chosen.manage_event, ("userId", "entityType", "entityId", "action"),
                      optional="manage_event" not in named),
            EventSpec(chosen.registered_event, ("trackId", "ownerId"), optional="registered_event" not in named),
        )  # fmt: skip
        self.listens = tuple(spec for spec in specs if spec.name)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        asked = [self._change(tx, block, event) for block in blocks for event in block.events]
        changes = await _fitting(tx, [change for change in asked if change is not None])
        tracks = [change for change in changes if change.entity == "Track"]
        users = [change for change in changes if change.entity == "User"]
        if tracks:
            await self._change_tracks(tx, tracks)
        if users:
            await self._change_users(tx, users)

    def _change(self, tx: Tx, block: Block, event: Event) -> Change | None:
        """What the event asks for; None where that is nothing of ours, or nothing that can be understood."""
        argument = event.args.get
        if event.name == self.settings.registered_event:
            entity, action, ids = "Track", REGISTERED, ("trackId", "ownerId")
        else:
            entity, action, ids = str(argument("entityType")), str(argument("action")), ("entityId", "userId")
            if action not in ACTIONS.get(entity, ()):
                return None
        entity_id, user_id = (bigint(argument(name)) for name in ids)
        if entity_id is None or user_id is None:
            tx.skip("entity_id" if entity_id is None else "user_id")
            return None
        data: Mapping[str, Any] | None
        if action == REGISTERED:
            data = event.args
        elif action == "Delete" or (action == "Verify" and not argument("metadata")):
            data = {}
        else:
            data = metadata(argument("metadata"))
        if data is None:
            tx.skip("metadata")
            return None
        at = _EPOCH + timedelta(seconds=block.timestamp)
        return Change(block.number, at, entity, action, entity_id, user_id, str(argument("signer", "")), data)

    # -- tracks ----------------------------------------------------------------------------------------------------

    async def _change_tracks(self, tx: Tx, changes: Sequence[Change]) -> None:
        found = await tx.fetch(
            """
            select track_id, owner_id, title, genre, created_at, is_current, is_delete, is_unlisted
            from tracks where track_id = any($1::bigint[]) order by track_id for update
            """,
            sorted({change.entity_id for change in changes}),
        )
        before = {track: TrackRow(*row) for track, *row in found}
        states = _folded(changes, before, lambda old, change: _track(tx, old, change))
        tx.remember("tracks", TRACK_COLUMNS, _changed_states(before, states))
        if rows := _changed_rows(tx, "tracks", before, states):
            await tx.execute(
                """
                insert into tracks (track_id, owner_id, title, genre, created_at, is_current, is_delete, is_unlisted)
                select * from unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::timestamp[],
                                     $6::boolean[], $7::boolean[], $8::boolean[])
                on conflict (track_id) do update
                set owner_id = excluded.owner_id, title = excluded.title, genre = excluded.genre,
                    is_delete = excluded.is_delete, is_unlisted = excluded.is_unlisted
                """,
                *_columns(rows),
            )

    # -- users -----------------------------------------------------------------------------------------------------

    async def _change_users(self, tx: Tx, changes: Sequence[Change]) -> None:
        found = await tx.fetch(
            """
            select user_id, handle, is_current, is_verified, is_deactivated
            from users where user_id = any($1::bigint[]) order by user_id for update
            """,
            sorted({change.entity_id for change in changes}),
        )
        before = {user: UserRow(*row) for user, *row in found}
        states = _folded(changes, before, lambda old, change: self._user(tx, old, change))
        tx.remember("users", USER_COLUMNS, _changed_states(before, states))
        if rows := _changed_rows(tx, "users", before, states):
            await tx.execute(
                """
                insert into users (user_id, handle, is_current, is_verified, is_deactivated)
                select * from unnest($1::bigint[], $2::text[], $3::boolean[], $4::boolean[], $5::boolean[])
                on conflict (user_id) do update
                set handle = excluded.handle, is_verified = excluded.is_verified,
                    is_deactivated = excluded.is_deactivated
                """,
                *_columns(rows),
            )

    def _user(self, tx: Tx, old: UserRow | None, change: Change) -> UserRow | None:
        """The user after the change; the old one where it is not allowed."""
        if change.entity_id != change.user_id:
            tx.skip("not_owner")
            return old
        may_verify = not self.verifiers or change.signer.lower() in self.verifiers
        if change.action == "Verify":
            if not may_verify:
                tx.skip("verifier")
                return old
            fields: dict[str, Any] = {"is_verified": True, **_flags(change.data, "is_verified")}
        else:
            fields = _texts(change.data, "handle") | _flags(change.data, "is_deactivated")
            if may_verify:
                fields |= _flags(change.data, "is_verified")
        return (old or UserRow(None, True, False, False))._replace(**fields)


def _track(tx: Tx, old: TrackRow | None, change: Change) -> TrackRow | None:
    """The track after the change; the old one where it is not allowed. Its owner is who made it known, no other."""
    if old is None and change.action == "Delete":
        tx.skip("unknown")
        return None
    if old is not None and old.owner_id != change.user_id and change.action != REGISTERED:
        tx.skip("not_owner")
        return old
    row = old or TrackRow(change.user_id, None, None, change.at, True, False, False)
    if change.action == "Delete":
        return row._replace(is_delete=True)
    fields = _texts(change.data, "title", "genre") | _flags(change.data, "is_unlisted")
    return row._replace(owner_id=change.user_id, **fields)


def metadata(value: Any) -> Mapping[str, Any] | None:
    """The fields of a metadata text: those of its "data" where that is an object, else its own; None if it has none."""
    if not isinstance(value, str) or _deeper(value, _DEEPEST):
        return None
    try:
        whole = json.loads(value, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return None
    data = whole.get("data")
    return data if isinstance(data, dict) else whole


def _deeper(value: str, depth: int) -> bool:
    """Whether the text nests objects and lists deeper than that.

    Anybody may send a text that does: how deep Python's parser can go before it takes the process down is not ours to
    know, since others may have raised the recursion limit.
    """
    if value.count("{") + value.count("[") <= depth:
        return False
    level = 0
    for mark in _MARKS.finditer(value):
        level += (mark[0] in "{[") - (mark[0] in "}]")
        if level > depth:
            return True
    return False


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")  # though Python takes it


def _texts(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Those of the fields that are there, as Postgres takes them; one that is no text stays as it was."""
    return {name: text(data[name]) for name in names if isinstance(data.get(name), str)}


def _flags(data: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: data[name] for name in names if isinstance(data.get(name), bool)}


async def _fitting(tx: Tx, changes: list[Change]) -> list[Change]:
    """Beyond its column's range is no id; in tables that were there before us the ids are `integer`."""
    ids = [number for change in changes for number in (change.entity_id, change.user_id)]
    if not ids or (min(ids) >= -_INT32 and max(ids) < _INT32):
        return changes  # nearly always: the columns need not be asked
    sizes = await tx.fetch(
        """
        select attname, attlen from pg_attribute
        where attrelid in (to_regclass('tracks'), to_regclass('users'))
          and attname in ('track_id', 'owner_id', 'user_id')
        """
    )
    limits = {name: 1 << 8 * size - 1 for name, size in sizes}
    fitting = []
    for change in changes:
        own, of = ("track_id", "owner_id") if change.entity == "Track" else ("user_id", "user_id")
        if not -limits[own] <= change.entity_id < limits[own]:
            tx.skip("entity_id")
        elif not -limits[of] <= change.user_id < limits[of]:
            tx.skip("user_id")
        else:
            fitting.append(change)
    return fitting


def _folded(
    changes: Sequence[Change], before: Mapping[int, R], step: Callable[[R | None, Change], R | None]
) -> dict[int, dict[int, R]]:
    """The changes one after another: each row as of the end of the blocks that were about it, by its id and slot."""
    rows = dict(before)
    states: dict[int, dict[int, R]] = {}
    for change in changes:
        row = step(rows.get(change.entity_id), change)
        if row is not None:
            rows[change.entity_id] = row
            states.setdefault(change.entity_id, {})[change.slot] = row
    return states


def _changed_states(before: Mapping[int, R], states: Mapping[int, Mapping[int, R]]) -> list[Row]:
    """What later hooks must know to tell what a row was at a block (see hooks/ownership.py)."""
    found: list[Row] = []
    for key, by_slot in states.items():
        last = before[key].state if key in before else None
        mine: list[Row] = []
        for slot, row in by_slot.items():
            if row.state != last:
                mine.append((key, slot, *row.state))
                last = row.state
        if mine and key in before:
            found.append((key, BEFORE, *before[key].state))
        found += mine
    return found


def _changed_rows(
    tx: Tx, table: str, before: Mapping[int, R], states: Mapping[int, Mapping[int, R]]
) -> list[tuple[int, R]]:
    """The rows to write, in the order of their keys: two writers that lock rows in one order can't deadlock."""
    rows: list[tuple[int, R]] = []
    for key in sorted(states):
        row = list(states[key].values())[-1]
        if row != before.get(key):
            rows.append((key, row))
    new = sum(key not in before for key, _ in rows)
    tx.wrote(table, "inserted", new)
    tx.wrote(table, "updated", len(rows) - new)
    return rows


def _columns(rows: Sequence[tuple[int, R]]) -> list[list[Any]]:
    values: list[Row] = [(key, *row) for key, row in rows]
    return [list(column) for column in zip(*values, strict=True)]


entities = Entities
