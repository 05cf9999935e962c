"""What the bundled hooks must leave in Postgres, as slowly and simply as it can be said: one play after another.

Written from the rules and not from the hooks, and shares no code with them. Where the rules leave something open, the
answer is here: a play whose time is none is skipped; a country counts by its first 200 characters; a notification
whose owner does not fit `user_ids` is not written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import asyncpg

from indexer.model import Block, Event

Dump = dict[str, list[tuple[Any, ...]]]

COLUMNS = {
    "plays": "user_id, source, play_item_id, created_at, slot, signature, city, region, country, chain, tx_hash, "
    "event_index",
    "aggregate_plays": "play_item_id, count",
    "aggregate_monthly_plays": "play_item_id, timestamp, country, count",
    "hourly_play_counts": "hourly_timestamp, play_count",
    "milestones": "id, name, threshold, slot, timestamp",
    "notification": "specifier, group_id, type, slot, timestamp, data, user_ids",
}
MILESTONES = {10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 25000, 50000, 100000, 250000, 500000, 1000000}
TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d)(?::?(\d\d))?)?", re.ASCII
)


async def dump(connection: asyncpg.Connection) -> Dump:
    """What is in the tables, without what the database itself gives (ids, updated_at); rows in a fixed order."""
    tables: Dump = {}
    for table, columns in COLUMNS.items():
        rows = [tuple(row) for row in await connection.fetch(f"select {columns} from {table}")]
        if table == "notification":
            rows = [(*row[:5], _json(json.loads(row[5])), *row[6:]) for row in rows]
        tables[table] = sorted(rows, key=repr)
    return tables


class Oracle:
    """`owners`: the tracks whose row is current, with their owners. `bits`: the size of the columns with ids."""

    def __init__(self, chain: int, owners: Mapping[int, int] | None = None, bits: int = 64) -> None:
        self.chain, self.owners, self.bits = chain, dict(owners or {}), bits
        self.plays: dict[tuple[int, bytes, int], tuple[Any, ...]] = {}
        self.by_track: dict[int, int] = {}
        self.by_month: dict[tuple[int, date, str], int] = {}
        self.by_hour: dict[datetime, int] = {}
        self.milestones: dict[tuple[int, str, int], tuple[Any, ...]] = {}
        self.notifications: dict[tuple[str, str], tuple[Any, ...]] = {}
        self.skipped: dict[str, int] = {}

    def apply(self, blocks: Iterable[Block]) -> Oracle:
        for block in blocks:
            for event in block.events:
                self.play(block, event)
        return self

    def play(self, block: Block, event: Event) -> None:
        args, slot = event.args, block.number
        track = integer(args.get("trackId"), self.bits)
        if track is None:
            self.skipped["track_id"] = self.skipped.get("track_id", 0) + 1
            return
        at = moment(args["playedAt"]) if "playedAt" in args else moment(block.timestamp)
        if at is None:
            self.skipped["created_at"] = self.skipped.get("created_at", 0) + 1
            return
        place = (slot, event.tx_hash, event.index)
        if place in self.plays:
            return
        user = integer(args.get("userId"), self.bits)
        signature, city, region, country = (text(args.get(n, "")) for n in ("signature", "city", "region", "country"))
        self.plays[place] = (user, "relay", track, at, slot, signature, city, region, country, self.chain, *place[1:])
        self.count(track, at, country)
        self.reach(track, self.by_track[track], slot, at)

    def count(self, track: int, at: datetime, country: str) -> None:
        month = (track, date(at.year, at.month, 1), country[:200])
        hour = datetime(at.year, at.month, at.day, at.hour)
        self.by_track[track] = self.by_track.get(track, 0) + 1
        self.by_month[month] = self.by_month.get(month, 0) + 1
        self.by_hour[hour] = self.by_hour.get(hour, 0) + 1

    def reach(self, track: int, total: int, slot: int, at: datetime) -> None:
        name = "LISTEN_COUNT"
        if total not in MILESTONES or (track, name, total) in self.milestones:
            return
        self.milestones[track, name, total] = (track, name, total, slot, at)
        owner = self.owners.get(track)
        if owner is None or not -(2**31) <= owner < 2**31:
            return
        group = f"milestone:{name}:id:{track}:threshold:{total}"
        data = _json({"type": name, "track_id": track, "threshold": total})
        row = (str(owner), group, "milestone", slot, at, data, [owner])
        self.notifications.setdefault((group, str(owner)), row)

    def dump(self) -> Dump:
        rows = {
            "plays": list(self.plays.values()),
            "aggregate_plays": list(self.by_track.items()),
            "aggregate_monthly_plays": [(*key, count) for key, count in self.by_month.items()],
            "hourly_play_counts": list(self.by_hour.items()),
            "milestones": list(self.milestones.values()),
            "notification": list(self.notifications.values()),
        }
        return {table: sorted(rows[table], key=repr) for table in COLUMNS}


def integer(value: Any, bits: int = 64) -> int | None:
    if isinstance(value, str):
        if not re.fullmatch("[+-]?[0-9]+", value):
            return None
        value = Decimal(value)  # of any length, which int() refuses
    if not isinstance(value, int | Decimal) or isinstance(value, bool):
        return None
    return int(value) if -(2 ** (bits - 1)) <= value < 2 ** (bits - 1) else None


def moment(value: Any) -> datetime | None:
    try:
        if isinstance(value, int) or re.fullmatch("[0-9]{1,12}", value):
            return datetime(1970, 1, 1) + timedelta(seconds=int(value)) if int(value) >= 0 else None
        match = TIME.fullmatch(value)
        if match is None:
            return None
        *numbers, fraction, sign, hours, minutes = match.groups()
        if int(hours or 0) > 23 or int(minutes or 0) > 59:
            return None
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        at = datetime(*map(int, numbers), int((fraction or "").ljust(6, "0")[:6]))
        return at + offset if sign == "-" else at - offset
    except (ValueError, OverflowError):
        return None


def text(value: Any) -> str:
    characters = ("?" if 0xD800 <= ord(character) <= 0xDFFF else character for character in value if character != "\0")
    return "".join(characters)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
