"""How often the tracks of an artist have been played, play by play through a span."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from hooks.ownership import Owners
from indexer import Tx

SINCE = datetime(2025, 1, 1)  # plays count from here on; the first day of a month, since months are what is counted


class Play(NamedTuple):
    """A play of a track; `owner`: who is rewarded for it, None where nobody is."""

    track: int
    slot: int
    at: datetime
    owner: int | None


async def owned_plays(tx: Tx, owners: Owners) -> list[Play]:
    """The span's plays, each with the artist who is rewarded for it as of its block."""
    rows = tx.inserted("plays")
    plays = list(zip(rows["play_item_id"], rows["slot"], rows["created_at"], strict=True))
    await owners.read_tracks(track for track, _, _ in plays)
    tracks = [owners.track(track, slot) for track, slot, _ in plays]
    await owners.read_users(track.owner_id for track in tracks if track is not None and track.is_current)
    owned = []
    for (played, slot, at), track in zip(plays, tracks, strict=True):
        user = owners.user(track.owner_id, slot) if track is not None and track.is_current else None
        rewarded = track.owner_id if track is not None and user is not None and user.eligible else None
        owned.append(Play(played, slot, at, rewarded))
    return owned


class Sums:
    """The plays of artists' tracks since 2025, play by play through the span.

    The table holds the sums of the span's end, for the owners of then. From them the span's own plays are taken off, to
    be counted again one by one; and a track that changed in the span is taken off whole, to come (with its own count)
    to whoever it belongs to in each block.
    """

    def __init__(self, owners: Owners, sums: Mapping[int, int], tracks: Mapping[int, int]) -> None:
        self._owners = owners
        self._sums = dict(sums)
        self._tracks = dict(tracks)  # counts of those tracks that changed in the span
        self._holder: dict[int, int] = {}
        # latest first, to be taken from the end
        self._moves = sorted(
            ((slot, track, state) for track in tracks for slot, state in owners.moved()[track]), reverse=True
        )

    @classmethod
    async def before(cls, tx: Tx, owners: Owners, plays: Sequence[Play], artists: set[int]) -> Sums:
        """The sums as they were before the span's plays."""
        sums = {
            artist: int(total)
            for artist, total in await tx.fetch(
                """
                select owner_id, sum(count)
                from tracks join aggregate_monthly_plays on play_item_id = track_id
                where owner_id = any($1::bigint[]) and is_current and not is_delete and timestamp >= $2::date
                group by owner_id
                """,
                sorted(artists),
                SINCE.date(),
            )
        }
        moved = {
            track: states
            for track, states in owners.moved().items()
            if any(state.owner_id in artists for _, state in states)
        }
        tracks = dict.fromkeys(moved, 0)
        if moved:
            tracks |= {
                track: int(total)
                for track, total in await tx.fetch(
                    """
                    select play_item_id, sum(count) from aggregate_monthly_plays
                    where play_item_id = any($1::bigint[]) and timestamp >= $2::date
                    group by play_item_id
                    """,
                    sorted(moved),
                    SINCE.date(),
                )
            }
        for track, states in moved.items():
            end = states[-1][1]
            if end.counts and end.owner_id in sums:
                sums[end.owner_id] -= tracks[track]
        found = cls(owners, sums, tracks)
        for play in plays:
            found._add(play, -1)
        return found

    def count(self, play: Play) -> None:
        """Count a play; those before it must have been."""
        while self._moves and self._moves[-1][0] <= play.slot:
            _, track, state = self._moves.pop()
            self._give(self._holder.pop(track, None), -self._tracks[track])
            if state.counts:
                self._holder[track] = state.owner_id
                self._give(state.owner_id, self._tracks[track])
        self._add(play, 1)

    def of(self, artist: int) -> int:
        return self._sums.get(artist, 0)

    def _add(self, play: Play, number: int) -> None:
        if play.at < SINCE:
            return
        if play.track in self._tracks:
            self._tracks[play.track] += number
            self._give(self._holder.get(play.track), number)
            return
        track = self._owners.track(play.track, play.slot)
        if track is not None and track.counts:
            self._give(track.owner_id, number)

    def _give(self, artist: int | None, number: int) -> None:
        if artist is not None:
            self._sums[artist] = self._sums.get(artist, 0) + number
