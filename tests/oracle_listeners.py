"""What the hook `listeners` must leave, by the rules of plays.md, one play at a time; without code of the hook."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import asyncpg

Play = tuple[int | None, int, datetime]  # user, track, time
Dump = dict[str, list[tuple[Any, ...]]]


class ListenersOracle:
    """`limit`: how many tracks a history holds. `heard`: what others' rows and pruned ones say that was before."""

    def __init__(self, limit: int = 1000, heard: Iterable[Play] = ()) -> None:
        self.limit = limit
        self.heard: dict[tuple[int, int], list[datetime]] = {}
        self.hours: dict[int, tuple[int, datetime]] = {}
        self.tracks: dict[int, tuple[int, datetime]] = {}
        self.history: dict[int, list[dict[str, Any]]] = {}
        for user, track, at in heard:
            if user is not None:
                self.heard.setdefault((user, track), []).append(at)

    def play(self, user: int | None, track: int, at: datetime) -> None:
        if user is None:
            return
        if user not in self.hours:
            self.hours[user] = (1, datetime(at.year, at.month, at.day, at.hour))
        else:
            count, updated = self.hours[user]
            if (at.year, at.month, at.day, at.hour) > (updated.year, updated.month, updated.day, updated.hour):
                self.hours[user] = (count + 1, at)
        earlier = self.heard.setdefault((user, track), [])
        if user not in self.tracks:
            self.tracks[user] = (1, at)
        else:
            self.tracks[user] = (self.tracks[user][0] + (not earlier), at)
        earlier.append(at)
        entries = self.history.setdefault(user, [])
        entry = next((one for one in entries if one["track"] == track), None)
        if entry is None:
            entries.append({"track": track, "at": max(earlier), "count": len(earlier)})
        else:
            entry["at"], entry["count"] = max(entry["at"], at), entry["count"] + 1
        entries.sort(key=lambda one: one["track"], reverse=True)
        entries.sort(key=lambda one: one["at"], reverse=True)
        del entries[self.limit :]

    def all(self, plays: Iterable[Play]) -> ListenersOracle:
        for user, track, at in plays:
            self.play(user, track, at)
        return self

    def dump(self) -> Dump:
        return {
            "hours": sorted((user, *row) for user, row in self.hours.items()),
            "tracks": sorted((user, *row) for user, row in self.tracks.items()),
            "history": sorted(
                (user, [(one["track"], written(one["at"]), one["count"]) for one in entries])
                for user, entries in self.history.items()
            ),
        }


def written(at: datetime) -> str:
    text = f"{at.year:04}-{at.month:02}-{at.day:02} {at.hour:02}:{at.minute:02}:{at.second:02}"
    return f"{text}.{at.microsecond:06}" if at.microsecond else text


async def dump(connection: asyncpg.Connection) -> Dump:
    hours = "select user_id, hours_with_play, updated_at::timestamp from user_distinct_play_hours order by 1"
    tracks = "select user_id, track_count, updated_at::timestamp from user_distinct_play_tracks order by 1"
    history = "select user_id, listening_history from user_listening_history order by 1"
    return {
        "hours": [tuple(row) for row in await connection.fetch(hours)],
        "tracks": [tuple(row) for row in await connection.fetch(tracks)],
        "history": [
            (user, [(one["track_id"], one["timestamp"], one["play_count"]) for one in json.loads(entries)])
            for user, entries in await connection.fetch(history)
        ],
    }
