"""One row a play, known by its place on the chain.

Which event is a play, and which of its arguments are the play's fields, is the operator's to say ([hooks.plays]); the
defaults are those of the bundled PlayRegistry contract. An event that lacks a field leaves it empty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hooks import beside, upkeep
from indexer import Block, Connection, EventSpec, Row, Tx, sql_folder

COLUMNS = (
    "user_id", "play_item_id", "created_at", "slot", "signature", "city", "region", "country",
    "source", "chain", "tx_hash", "event_index",
)  # fmt: skip
PLACE = ("chain", "slot", "tx_hash", "event_index")

_INT32, _INT64 = 1 << 31, 1 << 63
_EPOCH = datetime(1970, 1, 1)
# timestamps from 1970 to the year 9999, in seconds: what a Python datetime and Postgres both hold
_LAST_SECOND = 253_402_300_799
# datetime.fromisoformat takes far more: "2024010112000", which is unix milliseconds, is 20:00 of a day in 2024 to it
_RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ](?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?"
)


class PlaysSettings(BaseModel):
    """[hooks.plays]: the event that is a play, the arguments that are its fields ("" where it has none), and company.

    Beside another writer each play is looked up, and spans are short: that writer waits for our transactions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: str = Field("Played", description="name of the event that is a play")
    track_id: str = Field("trackId", description="argument with the track's id")
    user_id: str = Field("userId", description="argument with the listener's id")
    created_at: str = Field("playedAt", description="argument with the time: unix seconds, or RFC 3339 text")
    signature: str = Field("signature", description="argument with the play's signature")
    city: str = Field("city", description="argument with the city")
    region: str = Field("region", description="argument with the region")
    country: str = Field("country", description="argument with the country")
    beside_writer: bool = Field(False, description="another program writes the same plays into the same table")
    prune_after_days: int | None = Field(
        None, ge=400, description="age of the plays that `indexer maintain` deletes, in days; none by default"
    )


class Plays:
    """The hook `plays`. Writes `plays`; a play without a track or a time is skipped, and counted by reason."""

    name = "plays"
    tables: tuple[str, ...] = ("plays",)
    after = ()
    migrations = ("plays", sql_folder("plays"))
    Settings = PlaysSettings

    def __init__(self, settings: PlaysSettings | None = None) -> None:
        self.fields = settings or PlaysSettings()
        # a name that the operator wrote must be there; a default one may be missing, and the field is empty then
        chosen = self.fields.model_fields_set - {"event", "beside_writer", "prune_after_days"}
        needed = [getattr(self.fields, field) for field in sorted(chosen | {"track_id"})]
        self.listens = (EventSpec(self.fields.event, tuple(name for name in needed if name)),)
        self.brief = self.fields.beside_writer
        self.chores = upkeep.chores(self.fields.prune_after_days)
        if self.fields.beside_writer:
            self.tables = ("plays", *beside.TRIGGER_TABLES)

    async def prepare(self, connection: Connection) -> None:
        await beside.guard(connection, self.fields.beside_writer)
        if await beside.old_trigger(connection) is not None:
            self.tables = ("plays", *beside.TRIGGER_TABLES)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        fields, chain = self.fields, tx.chain
        rows: list[Row] = []
        for block in blocks:
            slot, block_time = block.number, block.timestamp
            for event in block.events:
                argument = event.args.get
                track_id = bigint(argument(fields.track_id))
                if track_id is None:
                    tx.skip("track_id")
                    continue
                created_at = moment(argument(fields.created_at, block_time))
                if created_at is None:
                    tx.skip("created_at")
                    continue
                rows.append((
                    bigint(argument(fields.user_id)), track_id, created_at, slot,
                    text(argument(fields.signature, "")), text(argument(fields.city, "")),
                    text(argument(fields.region, "")), text(argument(fields.country, "")),
                    "relay", chain, event.tx_hash, event.index,
                ))  # fmt: skip
        if _beyond_integer(rows):
            rows = await self._fitting(tx, rows)
        await self._insert(tx, rows)

    async def _insert(self, tx: Tx, rows: Sequence[Row]) -> None:
        if tx.recalling:
            rows = await beside.without_adopted(tx, rows, COLUMNS)
        elif self.fields.beside_writer:
            rows = await beside.adopt(tx, rows, COLUMNS)
        await tx.insert_new("plays", COLUMNS, rows, key=PLACE)

    async def _fitting(self, tx: Tx, rows: Sequence[Row]) -> list[Row]:
        """Beyond its column's range is no integer; in a table that was there before us the ids are `integer`."""
        sizes = await tx.fetch(
            """
            select attname, attlen from pg_attribute
            where attrelid = to_regclass('plays') and attname in ('user_id', 'play_item_id')
            """
        )
        limits = {name: 1 << 8 * size - 1 for name, size in sizes}
        users, tracks = limits["user_id"], limits["play_item_id"]
        fitting = [row for row in rows if -tracks <= row[1] < tracks]
        tx.skip("track_id", len(rows) - len(fitting))
        return [row if row[0] is None or -users <= row[0] < users else (None, *row[1:]) for row in fitting]


def _beyond_integer(rows: Sequence[Row]) -> bool:
    """Whether an id needs more than an `integer`: so rarely that the columns' types need not be asked for before."""
    ids = [number for row in rows for number in row[:2] if number is not None]
    return bool(ids) and not (min(ids) >= -_INT32 and max(ids) < _INT32)


def bigint(value: Any) -> int | None:
    """A plain ASCII integer (or an int) that fits Postgres' bigint, else None."""
    if isinstance(value, str):
        digits = value[1:] if value[:1] in ("+", "-") else value
        if not (digits.isascii() and digits.isdigit()):
            return None
        if len(digits) > 19:  # 19 hold every bigint; int() is slow on long texts, and refuses those of 4,301 digits
            digits = digits.lstrip("0") or "0"
            if len(digits) > 19:
                return None
        value = -int(digits) if value[0] == "-" else int(digits)
    elif not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if -_INT64 <= value < _INT64 else None


def moment(value: Any) -> datetime | None:
    """Unix seconds (int or decimal text) or RFC 3339 text (UTC where it has no offset) as naive UTC, else None."""
    if isinstance(value, str):
        if not (value.isascii() and value.isdigit() and len(value) < 13):
            return _rfc3339(value)
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LAST_SECOND:
        return None
    return _EPOCH + timedelta(seconds=value)


@lru_cache(10_000)  # plays of one moment come together
def _rfc3339(value: str) -> datetime | None:
    if not _RFC3339.fullmatch(value):
        return None
    try:
        time = datetime.fromisoformat(value.upper())  # digits beyond microseconds are cut off
        return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time
    except (ValueError, OverflowError):
        return None


def text(value: Any) -> str:
    """A text as Postgres takes it: without NUL bytes, a half of a surrogate pair as "?"; bytes as 0x hex."""
    if isinstance(value, str):
        if value.isascii() and "\0" not in value:
            return value
        return value.replace("\0", "").encode("utf-8", "replace").decode()
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)


plays = Plays
