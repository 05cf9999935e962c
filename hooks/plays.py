"""One row a play, known by its place on the chain.

Which event is a play, and which of its arguments are the play's fields, is the operator's to say ([hooks.plays]); the
defaults are those of the bundled PlayRegistry contract. An event that lacks a field leaves it empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from indexer import Block, EventSpec, Row, Tx, sql_folder

COLUMNS = (
    "user_id", "play_item_id", "created_at", "slot", "signature", "city", "region", "country",
    "chain", "tx_hash", "event_index",
)  # fmt: skip
PLACE = ("chain", "slot", "tx_hash", "event_index")

_INT64 = 1 << 63
_EPOCH = datetime(1970, 1, 1)
# timestamps from 1970 to the year 9999, in seconds: what a Python datetime and Postgres both hold
_LAST_SECOND = 253_402_300_799


class PlaysSettings(BaseModel):
    """[hooks.plays]: the event that is a play, and the arguments that are its fields ("" where it has none)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    event: str = Field("Played", description="name of the event that is a play")
    track_id: str = Field("trackId", description="argument with the track's id")
    user_id: str = Field("userId", description="argument with the listener's id")
    created_at: str = Field("playedAt", description="argument with the time: unix seconds, or RFC 3339 text")
    signature: str = Field("signature", description="argument with the play's signature")
    city: str = Field("city", description="argument with the city")
    region: str = Field("region", description="argument with the region")
    country: str = Field("country", description="argument with the country")


class Plays:
    """The hook `plays`. Writes `plays`; a play without a track or a time is skipped, and counted by reason."""

    name = "plays"
    tables = ("plays",)
    after = ()
    migrations = ("plays", sql_folder("plays"))
    Settings = PlaysSettings

    def __init__(self, settings: PlaysSettings | None = None) -> None:
        self.fields = settings or PlaysSettings()
        # a name that the operator wrote must be there; a default one may be missing, and the field is empty then
        chosen = self.fields.model_fields_set - {"event"}
        needed = [getattr(self.fields, field) for field in sorted(chosen | {"track_id"})]
        self.listens = (EventSpec(self.fields.event, tuple(name for name in needed if name)),)

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
                    chain, event.tx_hash, event.index,
                ))  # fmt: skip
        await tx.insert_new("plays", COLUMNS, rows, key=PLACE)


def bigint(value: Any) -> int | None:
    """A plain ASCII integer (or an int) that fits Postgres' bigint, else None."""
    if isinstance(value, str):
        digits = value[1:] if value[:1] in ("+", "-") else value
        # 19 digits hold every bigint; leading zeros beyond that are rare, and int() of a long text is slow
        if not (digits.isascii() and digits.isdigit()) or len(digits.lstrip("0")) > 19:
            return None
        value = int(value)
    elif not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if -_INT64 <= value < _INT64 else None


def moment(value: Any) -> datetime | None:
    """Unix seconds (int or decimal text) or RFC 3339 text as naive UTC, else None."""
    if isinstance(value, str):
        if not (value.isascii() and value.isdigit() and len(value) < 13):
            return _rfc3339(value)
        value = int(value)
    if not isinstance(value, int) or not 0 <= value <= _LAST_SECOND:
        return None
    return _EPOCH + timedelta(seconds=value)


def _rfc3339(value: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(value)
        return time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time
    except (ValueError, OverflowError):
        return None


def text(value: Any) -> str:
    """A text as Postgres takes it: without NUL bytes; bytes as 0x hex."""
    if isinstance(value, str):
        return value.replace("\0", "") if "\0" in value else value
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)


plays = Plays
