"""A person with an account at the stand-in for Spotify: what was played, and how it goes wrong for this one alone."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from datetime import datetime
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from indexer.sidecar.fakes.faults import Fault
from indexer.sidecar.fakes.plays import HOUR_MS, Song, Spoilt, ms_of, packed, plays_of_hour, unpacked

if TYPE_CHECKING:
    from indexer.sidecar.fakes.spotify_people import FakeSpotifyPeople

REACH = 50
_REACH_HOURS = 72

Broken: TypeAlias = Fault | Spoilt | Literal["not_json"] | None


class Pair(msgspec.Struct, frozen=True):
    """Tokens that hold, as they come from an exchange."""

    access_token: str
    refresh_token: str
    expires_in: float = 3600


class Play(msgspec.Struct, frozen=True, order=True):
    """A play: the track's id, and the moment in Unix milliseconds."""

    ms: int
    track: str


class Person:
    """`broken` strikes whatever is asked about this person; a spoilt item spoils all of the person's plays.

    A Fault counts down as any other: `count=None` is for ever, `match="recently_played"` limits it to that route.
    """

    __slots__ = ("_fake", "_played", "_served", "_spoilt", "broken", "email", "generation", "id", "name")

    def __init__(self, fake: FakeSpotifyPeople, person: str, email: str | None, name: str | None) -> None:
        self.id, self.email, self.name = person, email, name
        self.broken: Broken = None
        # tokens hold that were given in this one
        self.generation = 0
        self._fake = fake
        self._played: list[int] = []
        self._spoilt: dict[int, Spoilt] = {}
        self._served = array("q")

    def play(self, track: Song | int, at: datetime, *, spoilt: Spoilt | None = None) -> Play:
        """Have the person play a song, or one of the made-up ones by its number."""
        play = packed(ms_of(at), self._fake.number_of(track))
        insort(self._played, play)
        if spoilt is not None:
            self._spoilt[play] = spoilt
        return self._fake.told(play)

    def token_pair(self, *, access: str | None = None, refresh: str | None = None) -> Pair:
        """Tokens without the browser, those given or new ones."""
        return self._fake.give(self, access=access, refresh=refresh)

    def revoke(self) -> None:
        """Take the permission back: no token that was given so far holds any longer."""
        self.generation += 1

    def within_reach(self, now_ms: int, after_ms: int = -1) -> list[int]:
        """The newest 50 plays up to now, newest first; of these, those after `after_ms`."""
        low, high = packed(after_ms + 1, 0), packed(now_ms + 1, 0)
        reach = self._played[: bisect_left(self._played, high)][-REACH:]
        mean, hour, made = self._fake.plays_per_hour, now_ms // HOUR_MS, 0
        oldest = max(hour - _REACH_HOURS, after_ms // HOUR_MS) if mean else hour + 1
        while hour >= oldest and made < REACH:
            plays = [play for play in plays_of_hour(self.id, hour, mean) if play < high]
            reach += plays
            made, hour = made + len(plays), hour - 1
        reach.sort(reverse=True)
        return [play for play in reach[:REACH] if play >= low]

    def plays_within_reach(self, now: datetime) -> list[Play]:
        return [self._fake.told(play) for play in self.within_reach(ms_of(now))]

    def spoilt(self, play: int) -> Spoilt | None:
        """What is wrong with this play as it is told."""
        if self.broken in ("no_album", "local_track", "missing_played_at"):
            return self.broken
        return self._spoilt.get(play) if self._spoilt else None

    def note_served(self, plays: list[int]) -> None:
        """Note plays that went out whole and can be archived: what has no id or no moment can't."""
        if self._spoilt or self.broken is not None:
            plays = [play for play in plays if self.spoilt(play) in (None, "no_album")]
        self._served.extend(plays)

    @property
    def served(self) -> set[int]:
        return set(self._served)

    def served_plays(self) -> set[tuple[str, str, int]]:
        """Person, track and millisecond of each."""
        told = self._fake.songs
        return {(self.id, told[song].id, ms) for ms, song in map(unpacked, self.served)}
