"""The small parts of the API alone: limits, what was looked up, addresses, cursors."""

from __future__ import annotations

import base64
import json
from datetime import datetime

import pytest

from indexer.limits import Buckets, Recent, remote_address
from indexer.sidecar.paging import Number, Position, Text, Time, cut, decode, encode
from indexer.sidecar.routes import Refused


def test_addresses() -> None:
    assert remote_address("10.0.0.1", "1.1.1.1", 0) == "10.0.0.1"
    assert remote_address("10.0.0.1", "6.6.6.6, 1.1.1.1, 2.2.2.2", 2) == "1.1.1.1"
    assert remote_address("10.0.0.1", None, 1) == remote_address("10.0.0.1", "nonsense", 1) == "10.0.0.1"
    assert remote_address("2001:db8:1:2::7", None, 0) == remote_address("2001:db8:1:2:ffff::1", None, 0)


def test_buckets_fill_with_time_and_stay_bounded() -> None:
    clock = [0.0]
    buckets: Buckets[int] = Buckets(60, 2, most=3, clock=lambda: clock[0])
    assert [buckets.take(1) for _ in range(3)] == [0, 0, 1.0] and buckets.wait(1) == 1.0
    clock[0] += 0.5
    assert buckets.take(1) == 0.5
    clock[0] += 0.5
    assert buckets.take(1) == 0 and buckets.take(1) > 0
    clock[0] += 1_000
    assert [buckets.take(1) for _ in range(3)] == [0, 0, 1.0]
    for who_ in range(2, 10):
        buckets.take(who_)
    assert len(buckets._left) == 3


def test_what_was_looked_up_is_trusted_for_seconds_and_stays_bounded() -> None:
    clock = [0.0]
    kept: Recent[str, int] = Recent(5.0, most=2, clock=lambda: clock[0])
    kept.put("a", 1)
    clock[0] = 4.9
    assert kept.get("a") == 1
    clock[0] = 5.0
    assert kept.get("a") is None
    for name in "bcd":
        kept.put(name, 2)
    assert (kept.get("b"), kept.get("c"), kept.get("d")) == (None, 2, 2)


class Place(Position):
    at: Time
    id: Number
    name: Text


class Elsewhere(Position):
    at: Time
    id: Number
    name: Text


def test_cursors_come_back_and_nothing_else_does() -> None:
    place = Place(datetime.fromisoformat("2024-01-31T00:00:00.123456+00:00"), 2**63 - 1, "ä")
    cursor = encode(place)
    assert decode(Place, cursor) == place and decode(Place, None) is None and "+" not in cursor and "=" not in cursor
    raw = base64.urlsafe_b64encode
    for wrong in (
        "", "x", cursor[:-1], cursor + "A", cursor + "=", encode(Elsewhere(place.at, 1, "")), "ä", "\n" + cursor,
        *(raw(json.dumps(one).encode()).decode().rstrip("=") for one in (
            [], {}, 1, ["Place", "2024-01-31T00:00:00Z", 2**63, ""], ["Place", "2024-01-31T00:00:00", 1, ""],
            ["Place", "2024-01-31T00:00:00Z", "1", ""], ["Place", "2024-01-31T00:00:00Z", 1, "\0"],
        )),
        raw(b"[" * 300).decode(),
    ):  # fmt: skip
        with pytest.raises(Refused) as refused:
            decode(Place, wrong)
        assert refused.value.status == 400 and refused.value.failure.error.startswith("cursor must be"), wrong


def test_a_page_is_cut_where_more_rows_are() -> None:
    numbers = list(range(4))
    assert cut(numbers, 4, lambda row: Elsewhere(datetime.now().astimezone(), row, "")) == (numbers, None)
    page, cursor = cut(numbers, 3, lambda row: Elsewhere(datetime.now().astimezone(), row, ""))
    place = decode(Elsewhere, cursor)
    assert (page, place.id if place else None) == ([0, 1, 2], 2)
