"""Music that nobody wrote: the stand-ins make the same of the same name, so that their answers agree."""

from __future__ import annotations

from datetime import date, timedelta
from hashlib import sha256

import msgspec


class MadeTrack(msgspec.Struct, frozen=True):
    id: str
    name: str
    isrc: str
    play_count: int


def number(*parts: object) -> int:
    """A number that is always the same for the same parts."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:6])


def tracks_of(album: str, count: int) -> list[MadeTrack]:
    """The tracks of an album."""
    made = []
    for position in range(1, count + 1):
        seed = number(album, position)
        code = f"QZ{number('registrant', album) % 10**3:03}{position % 100:02}{seed % 10**5:05}"
        made.append(MadeTrack(f"{sha256(f'{album} {position}'.encode()).hexdigest()[:22]}", f"Song {position}", code,
                              seed % 10_000_000))  # fmt: skip
    return made


def history_of(isrc: str, days: int, end: date = date(2026, 10, 31)) -> list[dict[str, object]]:
    """Points up to `end` that only rise."""
    total, points = number(isrc) % 100_000, []
    for n in range(days):
        total += number(isrc, n) % 1_000
        points.append({"date": (end - timedelta(days=days - 1 - n)).isoformat(), "streams_total": total})
    return points
