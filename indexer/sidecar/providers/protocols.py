"""What the sidecar's work asks of the world, and the values that come back. Every method raises ProviderError."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Protocol

import msgspec


class Point(msgspec.Struct, frozen=True):
    """A song's streams in all up to a day."""

    day: date
    streams: int


class History(msgspec.Struct, frozen=True):
    """A song's points, one a day, in order; `dropped` had no date or no number."""

    points: tuple[Point, ...]
    dropped: int = 0


class PlayHistory(Protocol):
    """The past of a song's streams."""

    async def history(self, isrc: str) -> History:
        """One call, never repeated of its own accord. Terminal with status 404: there is no history."""
        ...


class Run(msgspec.Struct, frozen=True):
    """A run of the actor. Its id is worth keeping: a run is paid for when it starts, and can be asked for later."""

    id: str
    status: str
    dataset: str

    @property
    def over(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "ABORTED", "TIMED-OUT")


class PlayCount(msgspec.Struct, frozen=True):
    album_id: str
    track_id: str
    name: str
    play_count: int


class PlayCounts(msgspec.Struct, frozen=True):
    """What a run has read; `dropped` rows lacked an id or a count."""

    run_id: str
    rows: tuple[PlayCount, ...]
    dropped: int = 0


class AlbumCounts(Protocol):
    """Today's play counts of albums, by a run that takes minutes: start it, keep its id, then collect."""

    async def start(self, albums: Sequence[str]) -> Run:
        """Start a run, which costs money: not to be repeated where its answer is lost."""
        ...

    async def run(self, run_id: str) -> Run:
        """How far a run is."""
        ...

    async def collect(self, run_id: str) -> PlayCounts:
        """Wait for a run's end and read its rows. Failed where it did not succeed."""
        ...


class AlbumTrack(msgspec.Struct, frozen=True):
    id: str
    name: str


class Album(msgspec.Struct, frozen=True):
    """An album with all its tracks that can be played."""

    id: str
    name: str
    tracks: tuple[AlbumTrack, ...]


class Track(msgspec.Struct, frozen=True):
    """A track; `isrc` in capitals, None where the catalogue has none."""

    id: str
    name: str
    album_id: str | None = None
    isrc: str | None = None


class Catalogue(Protocol):
    """Albums and tracks. What is not known, or can't be an id, is absent from the answer."""

    async def albums(self, ids: Collection[str]) -> Mapping[str, Album]: ...

    async def tracks(self, ids: Collection[str]) -> Mapping[str, Track]: ...

    async def search_isrc(self, isrc: str) -> tuple[Track, ...]:
        """The tracks that have just this ISRC."""
        ...


class CardOnFile(msgspec.Struct, frozen=True):
    """Whether an account has left a card; `customer` is its customer's id, None where there is none yet."""

    customer: str | None
    card: bool


class Payments(Protocol):
    """Cards on file. `customer` is what is known of the account; without it, it is searched for by the account."""

    async def card_on_file(self, account: str, customer: str | None = None) -> CardOnFile: ...

    async def setup_url(self, account: str, customer: str | None = None) -> str:
        """The address of a page that takes a card and no money."""
        ...
