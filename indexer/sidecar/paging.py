"""Pages by keyset: the next one begins behind the last row's place, however many rows come and go meanwhile.

    class Place(Position):
        captured_at: Time
        id: Number

    place = decode(Place, query.cursor)       # None on the first page
    rows = ... where ($2::timestamptz is null or (captured_at, id) > ($2, $3)) order by captured_at, id limit $4 + 1
    page, cursor = cut(rows, query.limit, lambda row: Place(row["captured_at"], row["id"]))
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from pydantic import Field

from indexer.sidecar.routes import Query, Refused

T = TypeVar("T")
P = TypeVar("P", bound="Position")

MOST = 200
_LONGEST = 500

# A cursor comes from outside, whoever made it: these are the values that Postgres takes.
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Time: TypeAlias = Annotated[datetime, msgspec.Meta(tz=True)]
Text: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[^\x00]*\Z", max_length=300)]


class Position(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of a row's place in an order; the class's name goes along, so that no cursor fits another list."""


class Page(Query):
    """Base of the parameters of a list."""

    limit: Annotated[int, Field(ge=1, le=MOST)] = 50
    cursor: Annotated[str, Field(max_length=_LONGEST)] | None = None


def encode(place: Position) -> str:
    """The place as an opaque text."""
    return base64.urlsafe_b64encode(msgspec.json.encode(place)).decode().rstrip("=")


def decode(kind: type[P], cursor: str | None) -> P | None:
    """The place that `encode` wrote; raises Refused(400) for anything else."""
    if cursor is None:
        return None
    try:
        raw = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        place = msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, binascii.Error, ValueError, RecursionError):
        place = None
    if place is None or encode(place) != cursor:
        raise Refused(400, "cursor must be one that a page of this list has given")
    return place


def cut(rows: Sequence[T], limit: int, place: Callable[[T], Position]) -> tuple[Sequence[T], str | None]:
    """A page of rows of which one more than `limit` was asked for, and the cursor of the next page, if there is one."""
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], encode(place(rows[limit - 1]))
