"""Songs that nobody wrote, and who hears them when: the same of the same name and hour, so that nothing is kept.

A play is one number, its moment in Unix milliseconds and its song: so are sorted and kept millions of them.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from hashlib import blake2b, sha256
from typing import Any, Literal, TypeAlias

import msgspec

from indexer.sidecar.fakes.made import number, tracks_of

SONGS = 1_500
MOST_AN_HOUR = 40
HOUR_MS = 3_600_000
_SONG_BITS = 20
_SONG_MASK = (1 << _SONG_BITS) - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ARTISTS, _ALBUM_SONGS = 120, 3
_FIRST = (
    "Paper", "Quiet", "Amber", "Northern", "Hollow", "Silver", "Distant", "Velvet", "Early", "Broken", "Little", "Salt",
)  # fmt: skip
_SECOND = (
    "Lanterns", "Harbour", "Signals", "Gardens", "Windows", "Rivers", "Letters", "Engines", "Orchards", "Mirrors",
    "Static", "Bridges", "Hours",
)  # fmt: skip

Spoilt: TypeAlias = Literal["no_album", "local_track", "missing_played_at"]
"""What an item can lack:

no_album           its track has no album (null), and is whole otherwise
local_track        a file of the person's own: nothing has an id
missing_played_at  its moment has another name
"""


class Artist(msgspec.Struct, frozen=True):
    id: str
    name: str


class Song(msgspec.Struct, frozen=True):
    id: str
    name: str
    album_id: str
    album: str
    artists: tuple[Artist, ...]
    duration_ms: int = 200_000
    isrc: str | None = None


@cache
def made_songs() -> tuple[Song, ...]:
    """Some are on one album, and by the same artists. The catalogue knows albums and tracks by the same ids."""
    return tuple(_made_song(n) for n in range(SONGS))


def _made_song(n: int) -> Song:
    album, position = divmod(n, _ALBUM_SONGS)
    album_id = _id("album", album)
    track = tracks_of(album_id, _ALBUM_SONGS)[position]
    # few artists have most of the albums
    first = min(number("artist", album, k) for k in range(2)) % _ARTISTS
    numbers = [first] if n % 4 else [first, (first + 1 + n) % _ARTISTS]
    artists = tuple(Artist(_id("artist", k), _name("artist", k)) for k in dict.fromkeys(numbers))
    seconds = 120 + number("duration", n) % 180
    return Song(track.id, _name("song", n), album_id, _name("album", album), artists, seconds * 1_000, track.isrc)


def _id(*parts: object) -> str:
    return sha256(repr(parts).encode()).hexdigest()[:22]


def _name(kind: str, n: int) -> str:
    seed = number(kind, n)
    name = f"{_FIRST[seed % len(_FIRST)]} {_SECOND[seed // 64 % len(_SECOND)]}"
    return {"artist": f"The {name}", "album": f"{name} ({1970 + seed % 56})"}.get(kind, name)


# -- plays as numbers ----------------------------------------------------------------------------------------------


def ms_of(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(milliseconds=1)


def packed(ms: int, song: int) -> int:
    return ms << _SONG_BITS | song


def unpacked(play: int) -> tuple[int, int]:
    """The moment and the song."""
    return play >> _SONG_BITS, play & _SONG_MASK


@lru_cache(16_384)
def _taste(person: str) -> tuple[float, int]:
    """How much a person listens, as a share of the mean, and where among the songs."""
    seed = number("taste", person)
    return 0.3 + 1.4 * (seed % 1_000) / 1_000, seed // 1_000 % SONGS


def plays_of_hour(person: str, hour: int, mean: float) -> list[int]:
    """What a person plays in an hour since 1970, oldest first, never two in one millisecond; `mean` of all people."""
    seed = int.from_bytes(blake2b(f"{person} {hour}".encode(), digest_size=8).digest())
    share, first = _taste(person)
    count = min(MOST_AN_HOUR, round(mean * share * (0.2 + 1.6 * (seed & 1_023) / 1_024)))
    if count == 0:
        return []
    slot, start, plays = HOUR_MS // count, hour * HOUR_MS, []
    for k in range(count):
        seed = (seed * 6_364_136_223_846_793_005 + 1_442_695_040_888_963_407) & 0xFFFF_FFFF_FFFF_FFFF
        # the product of two: some are played far more often than others
        song = (first + (seed >> 54) * (seed >> 44 & 1_023) * 400 // (1 << 20)) % SONGS
        plays.append((start + k * slot + (seed >> 20 & 0xFF_FFFF) % slot) << _SONG_BITS | song)
    return plays


def plays_between(person: str, start_ms: int, end_ms: int, mean: float) -> list[int]:
    """All plays from `start_ms` on and before `end_ms`, oldest first."""
    hours = range(start_ms // HOUR_MS, -(-end_ms // HOUR_MS))
    low, high = packed(start_ms, 0), packed(end_ms, 0)
    return [play for hour in hours for play in plays_of_hour(person, hour, mean) if low <= play < high]


# -- plays as Spotify tells them -----------------------------------------------------------------------------------


@lru_cache(4_096)
def _hour_text(hour: int) -> bytes:
    return (_EPOCH + timedelta(hours=hour)).strftime("%Y-%m-%dT%H:").encode()


def written(ms: int) -> bytes:
    """The moment as `played_at` has it."""
    hour, rest = divmod(ms, HOUR_MS)
    return b"%s%02d:%02d.%03dZ" % (_hour_text(hour), rest // 60_000, rest // 1_000 % 60, rest % 1_000)


def item_of(song: Song, url: str, spoilt: Spoilt | None) -> tuple[bytes, bytes]:
    """What stands in the JSON of a play before and after its moment; `url` is that of the stand-in."""
    track = _track(song, url)
    if spoilt == "no_album":
        track["album"] = None
    if spoilt == "local_track":
        nothing: dict[str, Any] = {"id": None, "href": None, "external_urls": {}}
        track |= nothing | {"uri": f"spotify:local:::{song.id}:1", "is_local": True, "external_ids": {}}
        track["album"] |= nothing | {"uri": None, "images": []}
        track["artists"] = [one | nothing | {"uri": None} for one in track["artists"]]
    context = {**_about("album", song.album_id, url), "type": "album"}
    del context["id"]
    moment = b"at" if spoilt == "missing_played_at" else b"played_at"
    head = b'{"track":%s,"%s":"' % (msgspec.json.encode(track), moment)
    return head, b'","context":%s}' % msgspec.json.encode(context)


def _track(song: Song, url: str) -> dict[str, Any]:
    artists = [{**_about("artist", one.id, url), "name": one.name, "type": "artist"} for one in song.artists]
    images = [{"url": f"{url}/image/{song.album_id}", "width": size, "height": size} for size in (640, 300, 64)]
    album = {
        **_about("album", song.album_id, url), "album_type": "album", "type": "album", "name": song.album,
        "artists": artists[:1], "images": images, "release_date": "2024-02-02", "release_date_precision": "day",
        "total_tracks": _ALBUM_SONGS,
    }  # fmt: skip
    return {
        **_about("track", song.id, url), "type": "track", "name": song.name, "album": album, "artists": artists,
        "duration_ms": song.duration_ms, "explicit": False, "is_local": False, "popularity": 40, "preview_url": None,
        "disc_number": 1, "track_number": 1, "external_ids": {"isrc": song.isrc} if song.isrc else {},
    }  # fmt: skip


def _about(kind: str, one: str, url: str) -> dict[str, Any]:
    page = {"spotify": f"https://open.spotify.com/{kind}/{one}"}
    return {"id": one, "href": f"{url}/v1/{kind}s/{one}", "uri": f"spotify:{kind}:{one}", "external_urls": page}
