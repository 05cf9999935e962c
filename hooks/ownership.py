"""Who owned a track and what a user was as of a block of the span, for hooks that look at plays.

A span may be one block or thousands and must leave the same rows, so the tables, which are those of the span's end, are
not enough: the hook `entities` remembers each state that it changed. All changes of a block count for all of its plays,
wherever they stand in it. Where nobody remembers anything, the tables are as they are: without that hook, and where a
later hook's hole is filled, for then the tables are already those of now.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from indexer import Rows, Tx

BEFORE = -1  # the slot of the state before the span


class Track(NamedTuple):
    owner_id: int
    is_current: bool
    is_delete: bool

    @property
    def counts(self) -> bool:
        """Whether its plays count among those of its owner."""
        return self.is_current and not self.is_delete


class User(NamedTuple):
    is_current: bool
    is_verified: bool
    is_deactivated: bool

    @property
    def eligible(self) -> bool:
        """Whether the plays of their tracks are rewarded."""
        return self.is_current and self.is_verified and not self.is_deactivated


# what `entities` remembers of these tables: nothing of rows that did not change in the span; else the state before it
# (if there was one), and one for each block in which it changed, in order
TRACK_COLUMNS = ("track_id", "slot", *Track._fields)
USER_COLUMNS = ("user_id", "slot", *User._fields)

T = TypeVar("T", Track, User)


class _States(Generic[T]):
    """The states of a table's rows by key: those that changed in the span with their slots, others as they are."""

    def __init__(self, kind: type[T], changed: Rows) -> None:
        self.changed: dict[int, list[tuple[int, T]]] = {}
        for key, slot, *state in changed:
            self.changed.setdefault(key, []).append((slot, kind(*state)))
        self.table: dict[int, T] = {}

    def unread(self, keys: Iterable[int]) -> list[int]:
        return sorted(set(keys) - self.changed.keys() - self.table.keys())

    def at(self, key: int, slot: int) -> T | None:
        states = self.changed.get(key)
        if states is None:
            return self.table.get(key)
        place = bisect_right(states, slot, key=lambda state: state[0])
        return states[place - 1][1] if place else None


class Owners:
    """Tracks and users as of a block. What has not changed in this span must be read before it is asked for."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self._tracks = _States(Track, tx.inserted("tracks"))
        self._users = _States(User, tx.inserted("users"))

    async def read_tracks(self, tracks: Iterable[int]) -> None:
        if unread := self._tracks.unread(tracks):
            rows = await self._tx.fetch(
                """
                select track_id, owner_id, is_current, is_delete from tracks
                where track_id = any($1::bigint[]) and is_current
                """,
                unread,
            )
            self._tracks.table.update((track, Track(*state)) for track, *state in rows)

    async def read_users(self, users: Iterable[int]) -> None:
        if unread := self._users.unread(users):
            rows = await self._tx.fetch(
                """
                select user_id, is_current, is_verified, is_deactivated from users
                where user_id = any($1::bigint[]) and is_current
                """,
                unread,
            )
            self._users.table.update((user, User(*state)) for user, *state in rows)

    def track(self, track: int, slot: int) -> Track | None:
        """The track as of this block: None where it is not known, or was not yet."""
        return self._tracks.at(track, slot)

    def user(self, user: int, slot: int) -> User | None:
        return self._users.at(user, slot)

    def moved(self) -> dict[int, list[tuple[int, Track]]]:
        """The tracks that changed in this span, each with its states and the blocks since which they hold."""
        return self._tracks.changed
