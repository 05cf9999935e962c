"""What plays, milestones and challenges must be where tracks and users change: block after block, play after play.

Shares no code with the hooks. All changes of tracks and users in a block come before the block's plays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any

import asyncpg
from oracle import Dump, Oracle
from oracle import dump as dump_plays
from oracle_entities import EntitiesOracle
from oracle_entities import dump as dump_entities

from indexer.model import Block

COLUMNS = {
    "challenge_listen_streak": "user_id, last_listen_date, listen_streak",
    "user_challenges": "challenge_id, specifier, user_id, current_step_count, amount, is_complete, "
    "completed_blocknumber, completed_at",
}
AMOUNTS = {"e": 1, "p1": 25, "p2": 100, "p3": 1000}
Tiers = Sequence[tuple[str, int, int]]  # challenge, where it begins, where it is complete


async def dump(connection: asyncpg.Connection) -> Dump:
    ours = {
        table: sorted((tuple(row) for row in await connection.fetch(f"select {columns} from {table}")), key=repr)
        for table, columns in COLUMNS.items()
    }
    return await dump_plays(connection) | await dump_entities(connection) | ours


class World:
    """Everything that the bundled hooks about plays keep. `active`: the challenges that are, with their amounts."""

    def __init__(self, chain: int, tiers: Tiers, active: Mapping[str, int] = AMOUNTS) -> None:
        self.plays, self.entities = Oracle(chain), EntitiesOracle()
        self.tiers, self.active = tiers, active
        self.streaks: dict[int, tuple[datetime, int]] = {}
        self.rows: dict[tuple[str, str], tuple[Any, ...]] = {}

    def apply(self, blocks: Iterable[Block]) -> World:
        for block in blocks:
            self.entities.apply([block])
            self.plays.owners = {
                track: row["owner_id"] for track, row in self.entities.tracks.items() if row["is_current"]
            }
            for event in block.events:
                known = len(self.plays.plays)
                if event.name == "Played":
                    self.plays.play(block, event)
                if len(self.plays.plays) > known:
                    user, _, track, at, slot, *_ = list(self.plays.plays.values())[-1]
                    if user is not None:
                        self.listen(user, at, slot)
                    self.earn(track, at, slot)
        return self

    def listen(self, user: int, at: datetime, slot: int) -> None:
        if user not in self.streaks:
            streak = 1
        else:
            last, streak = self.streaks[user]
            hours = (at - last) / timedelta(hours=1)
            if hours < 16:
                return
            streak = streak + 1 if hours < 48 else 1
        self.streaks[user] = (at, streak)
        specifier = f"{hex(user).replace('0x', '')}{at.isoformat()[:13].replace('-', '').replace('T', '')}"
        if streak > 7:
            self.write("e", specifier, user, 1, 1, True, slot, at)
        else:
            self.write("e", specifier, user, streak, self.active.get("e", 0), streak == 7, slot, at)

    def earn(self, track: int, at: datetime, slot: int) -> None:
        played = self.entities.tracks.get(track)
        if played is None or not played["is_current"]:
            return
        owner = played["owner_id"]
        person = self.entities.users.get(owner)
        if person is None or not person["is_current"] or not person["is_verified"] or person["is_deactivated"]:
            return
        total = 0
        for (of, month, _), count in self.plays.by_month.items():
            row = self.entities.tracks.get(of)
            if row and row["owner_id"] == owner and row["is_current"] and not row["is_delete"]:
                total += count if month >= date(2025, 1, 1) else 0
        for challenge, start, threshold in self.tiers:
            if total >= start:
                specifier = f"{hex(owner).replace('0x', '')}:{threshold}"
                steps, amount = min(total, threshold), self.active.get(challenge, 0)
                self.write(challenge, specifier, owner, steps, amount, total >= threshold, slot, at)

    def write(
        self, challenge: str, specifier: str, user: int, steps: int, amount: int, done: bool, slot: int, at: datetime
    ) -> None:
        present = self.rows.get((challenge, specifier))
        if challenge not in self.active or (present is not None and present[5]):
            return
        when = (slot, at) if done else (None, None)
        self.rows[challenge, specifier] = (challenge, specifier, user, steps, amount, done, *when)

    def dump(self) -> Dump:
        streaks = [(user, *streak) for user, streak in self.streaks.items()]
        ours = {"challenge_listen_streak": streaks, "user_challenges": list(self.rows.values())}
        return self.plays.dump() | self.entities.dump() | {t: sorted(rows, key=repr) for t, rows in ours.items()}
