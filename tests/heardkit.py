"""People who have listened to music nobody wrote, as rows that the archive would have stored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

import asyncpg

ARTISTS = (
    "Nadia Okafor", "The Paper Lanterns", "Sólveig", "Low Tide Motel", "Ember & Ash", "DJ Kumquat", "Óscar Peña Trío",
    "Velvet Cartography", "長岡ゆき", "Brass Monkeys of Łódź", "Quiet Hours", "فرقة البحر",
)  # fmt: skip
WORDS = ("Blue", "Harbour", "Static", "Honey", "Slow", "Lightning", "Sunday", "Glass", "Orchard", "Echo", "Mile", "Fox")
_HOURS = (3, 1, 1, 1, 1, 1, 2, 6, 10, 8, 6, 5, 7, 6, 5, 6, 7, 9, 12, 14, 13, 11, 9, 6)


async def add_catalogue(connection: asyncpg.Connection, seed: int = 7) -> list[str]:
    """Artists with two albums of six tracks each; every fifth track has a guest. Returns the tracks' ids."""
    dice, tracks = random.Random(seed), []
    await connection.executemany(
        "insert into artists (spotify_id, name) values ($1, $2)",
        [(f"artist{n:02}", artist) for n, artist in enumerate(ARTISTS)],
    )
    for n in range(len(ARTISTS)):
        for album in range(2):
            title = " ".join(dice.sample(WORDS, 2))
            await connection.execute("insert into albums (spotify_id, name) values ($1, $2)", f"a{n:02}{album}", title)
            for position in range(6):
                track = f"t{n:02}{album}{position}"
                tracks.append(track)
                await add_track(
                    connection, track, " ".join(dice.sample(WORDS, dice.randint(1, 3))), [f"artist{n:02}"]
                    + [f"artist{(n + 1) % len(ARTISTS):02}"] * (position == 4), f"a{n:02}{album}",
                    duration_ms=dice.randint(120_000, 400_000),
                )  # fmt: skip
    return tracks


async def add_track(
    connection: asyncpg.Connection, track: str, name: str, artists: Sequence[str], album: str | None,
    duration_ms: int | None = 200_000,
) -> None:  # fmt: skip
    """A track by these artists, who are there."""
    await connection.execute(
        "insert into spotify_tracks (spotify_id, name, duration_ms, album) values ($1, $2, $3, $4)",
        track, name, duration_ms, album,
    )  # fmt: skip
    await connection.executemany(
        "insert into track_artists (track, artist, position) values ($1, $2, $3)",
        [(track, artist, n) for n, artist in enumerate(artists)],
    )


async def add_person(connection: asyncpg.Connection, spotify_id: str, display_name: str | None = None) -> UUID:
    """Somebody who is connected, and takes a place."""
    await connection.execute("update listener_places set taken = taken + 1 where tier = 'founding'")
    return await connection.fetchval(
        """
        insert into listeners (spotify_id, display_name, access_token, refresh_token, token_expires_at)
        values ($1, $2, 'access', 'refresh', now() + interval '1 hour') returning id
        """,
        spotify_id, display_name,
    )  # fmt: skip


def made_plays(tracks: Sequence[str], days: int, now: datetime, seed: int = 3) -> list[tuple[str, datetime]]:
    """Plays as somebody has them who loves few tracks and knows many, evenings and weekends most."""
    dice, plays = random.Random(seed), []
    order = list(tracks)
    dice.shuffle(order)
    weights = [1 / (n + 2) for n in range(len(order))]
    midnight = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    for ago in range(days):
        day = midnight - timedelta(days=ago)
        count = 0 if dice.random() < 0.08 else int(dice.gammavariate(4, 5) * (1.5 if day.weekday() > 4 else 1))
        for track in dice.choices(order, weights, k=count):
            hour = dice.choices(range(24), _HOURS)[0]
            at = day + timedelta(hours=hour, seconds=dice.random() * 3600)
            if at <= now:
                plays.append((track, at))
    return plays


async def add_plays(connection: asyncpg.Connection, listener: UUID, plays: Sequence[tuple[str, datetime]]) -> None:
    await connection.copy_records_to_table(
        "play_events", records=[(listener, track, at) for track, at in plays],
        columns=("listener", "track", "played_at"),
    )  # fmt: skip
