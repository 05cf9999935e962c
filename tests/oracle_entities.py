"""What the hook `entities` must leave in Postgres, one transaction after another.

Written from the rules and not from the hook, and shares no code with it. Where the rules leave something open, the
answer is here: what is no text (or no boolean) leaves its field as it was, JSON's null too; a track that was deleted
stays so; a user is changed by themselves alone; a verification needs no metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from oracle import Dump, integer, text

from indexer.model import Block, Event

COLUMNS = {
    "tracks": "track_id, owner_id, title, genre, created_at, is_current, is_delete, is_unlisted",
    "users": "user_id, handle, is_current, is_verified, is_deactivated",
}


async def dump(connection: asyncpg.Connection) -> Dump:
    return {
        table: sorted(tuple(row) for row in await connection.fetch(f"select {columns} from {table}"))
        for table, columns in COLUMNS.items()
    }


class EntitiesOracle:
    def __init__(self, verifiers: Iterable[str] = ()) -> None:
        self.verifiers = {address.upper() for address in verifiers}
        self.tracks: dict[int, dict[str, Any]] = {}
        self.users: dict[int, dict[str, Any]] = {}
        self.skipped: dict[str, int] = {}

    def apply(self, blocks: Iterable[Block]) -> EntitiesOracle:
        for block in blocks:
            for event in block.events:
                reason = self.transaction(block, event)
                if reason:
                    self.skipped[reason] = self.skipped.get(reason, 0) + 1
        return self

    def transaction(self, block: Block, event: Event) -> str:
        """Carry it out, or say why not."""
        said, at = event.args, datetime(1970, 1, 1) + timedelta(seconds=block.timestamp)
        if event.name == "TrackRegistered":
            track, owner = integer(said["trackId"]), integer(said["ownerId"])
            if track is None or owner is None:
                return "entity_id" if track is None else "user_id"
            self.tracks.setdefault(track, new_track(owner, at))["owner_id"] = owner
            fill(self.tracks[track], said, ["title", "genre"], str)
            return ""
        what = f"{said['action']} {said['entityType']}" if event.name == "ManageEntity" else ""
        if what not in ("Create Track", "Update Track", "Delete Track", "Create User", "Update User", "Verify User"):
            return ""
        thing, user = integer(said["entityId"]), integer(said["userId"])
        if thing is None or user is None:
            return "entity_id" if thing is None else "user_id"
        fields: dict[str, Any] = {}
        if what != "Delete Track" and not (what == "Verify User" and said.get("metadata", "") == ""):
            try:
                fields = json.loads(said.get("metadata", ""))
            except (ValueError, RecursionError):
                return "metadata"
            if not isinstance(fields, dict) or "NaN" in said["metadata"]:
                return "metadata"
            if isinstance(fields.get("data"), dict):
                fields = fields["data"]
        if what.endswith("User"):
            return self.user(what.split()[0], thing, user, fields, said.get("signer", ""))
        return self.track(what.split()[0], thing, user, fields, at)

    def track(self, action: str, track: int, user: int, fields: dict[str, Any], at: datetime) -> str:
        if track not in self.tracks:
            if action == "Delete":
                return "unknown"
            self.tracks[track] = new_track(user, at)
        row = self.tracks[track]
        if row["owner_id"] != user:
            return "not_owner"
        if action == "Delete":
            row["is_delete"] = True
        else:
            fill(row, fields, ["title", "genre"], str)
            fill(row, fields, ["is_unlisted"], bool)
        return ""

    def user(self, action: str, entity: int, user: int, fields: dict[str, Any], signer: str) -> str:
        if entity != user:
            return "not_owner"
        trusted = not self.verifiers or signer.upper() in self.verifiers
        if action == "Verify" and not trusted:
            return "verifier"
        new = {"handle": None, "is_current": True, "is_verified": False, "is_deactivated": False}
        row = self.users.setdefault(user, new)
        if action == "Verify":
            row["is_verified"] = True
        else:
            fill(row, fields, ["handle"], str)
            fill(row, fields, ["is_deactivated"], bool)
        if trusted:
            fill(row, fields, ["is_verified"], bool)
        return ""

    def dump(self) -> Dump:
        return {
            "tracks": sorted((track, *row.values()) for track, row in self.tracks.items()),
            "users": sorted((user, *row.values()) for user, row in self.users.items()),
        }


def new_track(owner: int, at: datetime) -> dict[str, Any]:
    return {
        "owner_id": owner, "title": None, "genre": None, "created_at": at, "is_current": True, "is_delete": False,
        "is_unlisted": False,
    }  # fmt: skip


def fill(row: dict[str, Any], said: Any, names: list[str], kind: type) -> None:
    for name in names:
        if type(said.get(name)) is kind:
            row[name] = text(said[name]) if kind is str else said[name]
