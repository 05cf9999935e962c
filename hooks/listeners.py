"""What each person has heard: in how many hours, how many tracks, and which ones last.

A play is counted as if it had come alone, however many come in one span. Whether a person has heard a track before is
asked of `plays` (whoever wrote the rows) and of `pruned_listens`, what is left of the plays that were pruned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec

from hooks import beside
from indexer import Block, Connection, Derived, EventSpec, Rows, Tx, sql_folder

LIMIT = 1000

# Another writer's plays are not ours to count, nor those of its rows that became ours.
_SHARED = "select exists (select from plays where chain is null or counterpart = 'adopted')"

# In chain order, as `milestones` has it. A hole that is filled late changes what followed upon what: `hours_with_play`
# and both `updated_at` are then those of the order in which the plays came in, until a rebuild. The tracks and the
# history are the same in any order.
DERIVED = (
    Derived(
        "user_distinct_play_hours",
        """
        select user_id, count(*) as hours_with_play,
               case when count(*) = 1 then max(hour) else max(created_at) end as updated_at
        from (
            select user_id, created_at, date_trunc('hour', created_at) as hour,
                   max(date_trunc('hour', created_at)) over (
                       partition by user_id order by chain, slot, id rows between unbounded preceding and 1 preceding
                   ) as latest
            from plays
            where chain is not null and counterpart is distinct from 'adopted' and user_id is not null
        ) as listened
        where latest is null or hour > latest
        group by user_id
        """,
        base=("plays",),
        shared=_SHARED,
    ),
    Derived(
        "user_distinct_play_tracks",
        """
        select user_id, count(distinct play_item_id) as track_count,
               (array_agg(created_at order by chain desc, slot desc, id desc))[1] as updated_at
        from plays
        where chain is not null and counterpart is distinct from 'adopted' and user_id is not null
        group by user_id
        """,
        base=("plays",),
        shared=_SHARED,
    ),
    Derived(
        "user_listening_history",
        """
        select user_id,
               jsonb_agg(jsonb_build_object(
                   'track_id', play_item_id, 'play_count', plays,
                   'timestamp', replace(to_char(latest, 'YYYY-MM-DD HH24:MI:SS.US'), '.000000', '')
               ) order by place) as listening_history
        from (
            select user_id, play_item_id, count(*) as plays, max(created_at) as latest,
                   row_number() over (partition by user_id order by max(created_at) desc, play_item_id desc) as place
            from plays
            where chain is not null and counterpart is distinct from 'adopted' and user_id is not null
            group by user_id, play_item_id
        ) as heard
        where place <= 1000
        group by user_id
        """,
        base=("plays",),
        shared=_SHARED,
    ),
)

Pair = tuple[int, int]  # user, track


class Entry(msgspec.Struct, order=True, gc=False):
    """A track in a person's history. They sort by time, and texts of this form sort as the times do."""

    timestamp: str
    track_id: int
    play_count: Annotated[int, msgspec.Meta(ge=1)]


History = dict[int, Entry]  # by track
_entries = msgspec.json.Decoder(list[Entry])
_text = msgspec.json.Encoder()


class Listened(msgspec.Struct, frozen=True):
    """The span's plays of people who are known, in order, and by pair how many they are and when the latest was."""

    users: list[int]
    tracks: list[int]
    times: list[datetime]
    counts: Counter[Pair]
    latest: dict[Pair, datetime]


class Listeners:
    """The hook `listeners`. Reads the plays that `plays` inserted in this span, and looks up those before them."""

    name = "listeners"
    listens: tuple[EventSpec, ...] = ()
    tables = ("user_distinct_play_hours", "user_distinct_play_tracks", "user_listening_history")
    after = ("plays",)
    migrations = ("plays", sql_folder("plays"))
    derived = DERIVED
    limit = LIMIT

    async def prepare(self, connection: Connection) -> None:
        await beside.refuse_trigger(connection, self.name)

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        plays = tx.inserted("plays")
        listened = _listened(plays)
        if not listened.users:
            return
        # Another chain's hook may be at the same people: what it has not committed yet could not be looked up below.
        await tx.execute("select pg_advisory_xact_lock('user_listening_history'::regclass::oid::bigint)")
        recalled = tx.recalled("plays")
        new = await (_first_heard(tx, listened, plays) if recalled else _never_heard(tx, listened))
        await self._hours(tx, listened)
        await self._tracks(tx, listened, new)
        await self._history(tx, listened, new, recalled)

    async def _hours(self, tx: Tx, listened: Listened) -> None:
        """An hour counts once, and only if it is later than the last one that did."""
        rows = await tx.fetch(
            """
            select user_id, coalesce(updated_at::timestamp, '-infinity')
            from user_distinct_play_hours where user_id = any($1::bigint[])
            """,
            sorted(set(listened.users)),
        )
        updated: dict[int, datetime] = dict(rows)  # type: ignore[arg-type]
        hours: Counter[int] = Counter()
        for user, time in zip(listened.users, listened.times, strict=True):
            before = updated.get(user)
            if before is None or _hour(time) > _hour(before):
                hours[user] += 1
                updated[user] = _hour(time) if before is None else time
        users = sorted(hours)
        await tx.execute(
            """
            insert into user_distinct_play_hours (user_id, hours_with_play, updated_at)
            select * from unnest($1::bigint[], $2::bigint[], $3::timestamp[])
            on conflict (user_id) do update
            set hours_with_play = user_distinct_play_hours.hours_with_play + excluded.hours_with_play,
                updated_at = excluded.updated_at
            """,
            users, [hours[user] for user in users], [updated[user] for user in users],
        )  # fmt: skip

    async def _tracks(self, tx: Tx, listened: Listened, new: set[Pair]) -> None:
        tracks = Counter(user for user, _ in new)
        tracks.update(await self._begun(tx, listened, new))
        last = dict(zip(listened.users, listened.times, strict=True))
        users = sorted(last)
        await tx.execute(
            """
            insert into user_distinct_play_tracks (user_id, track_count, updated_at)
            select * from unnest($1::bigint[], $2::bigint[], $3::timestamp[])
            on conflict (user_id) do update
            set track_count = user_distinct_play_tracks.track_count + excluded.track_count,
                updated_at = excluded.updated_at
            """,
            users, [tracks[user] for user in users], [last[user] for user in users],
        )  # fmt: skip

    async def _begun(self, tx: Tx, listened: Listened, new: set[Pair]) -> list[int]:
        """The people whose row begins with a track that another writer's plays have already: it counts all the same.

        Where an earlier play of ours has it, this hook has missed that one, and counts it once the hole is filled.
        """
        first: dict[int, int] = {}
        for user, track in zip(listened.users, listened.tracks, strict=True):
            first.setdefault(user, track)
        old = sorted(pair for pair in first.items() if pair not in new)
        if not old:
            return []
        rows = await tx.fetch(
            """
            select pair.user_id
            from unnest($1::bigint[], $2::bigint[]) as pair (user_id, track_id)
            where not exists (select from user_distinct_play_tracks as known where known.user_id = pair.user_id)
                and (
                    exists (
                        select from pruned_listens
                        where pruned_listens.user_id = pair.user_id and play_item_id = pair.track_id
                    )
                    -- id + 0, for the index of the listener and not that of the id
                    or (select chain is null or counterpart is not distinct from 'adopted' from plays
                        where plays.user_id = pair.user_id and play_item_id = pair.track_id order by id + 0 limit 1)
                )
            """,
            *_columns(old),
        )
        return [row[0] for row in rows]

    async def _history(self, tx: Tx, listened: Listened, new: set[Pair], recalled: bool) -> None:
        histories, unknown = await _histories(tx, sorted(set(listened.users)))
        # Plays that are recalled may be in some counts already, since whoever looked up a total found them. And a track
        # that comes back into the history, or that another writer knows, had plays before.
        for user, track in listened.counts:
            if recalled or ((user, track) not in new and track not in histories[user]):
                unknown.add((user, track))
        totals = await _totals(tx, sorted(unknown))
        for (user, track), total in totals.items():
            known = histories[user].get(track, total)
            histories[user][track] = Entry(max(total.timestamp, known.timestamp), track, total.play_count)
        for (user, track), count in listened.counts.items():
            if (user, track) not in totals:
                _add(histories[user], track, count, str(listened.latest[user, track]))
        await tx.execute(
            """
            insert into user_listening_history (user_id, listening_history)
            select user_id, history::jsonb from unnest($1::bigint[], $2::text[]) as heard (user_id, history)
            on conflict (user_id) do update set listening_history = excluded.listening_history
            """,
            list(histories),
            [_text.encode(sorted(known.values(), reverse=True)[: self.limit]).decode() for known in histories.values()],
        )


def _listened(plays: Rows) -> Listened:
    listened = Listened([], [], [], Counter(), {})
    for user, track, time in zip(plays["user_id"], plays["play_item_id"], plays["created_at"], strict=True):
        if user is not None:
            listened.users.append(user)
            listened.tracks.append(track)
            listened.times.append(time)
            before = listened.latest.get((user, track), time)
            listened.latest[user, track] = max(time, before)
    listened.counts.update(zip(listened.users, listened.tracks, strict=True))
    return listened


async def _never_heard(tx: Tx, listened: Listened) -> set[Pair]:
    """The pairs of which nothing is known but the span's own plays, which are in the table already."""
    pairs = sorted(listened.counts)
    rows = await tx.fetch(
        """
        select pair.user_id, pair.track_id
        from unnest($1::bigint[], $2::bigint[], $3::bigint[]) as pair (user_id, track_id, own)
        where not exists (
                select from plays where plays.user_id = pair.user_id and play_item_id = pair.track_id offset pair.own
            )
            and not exists (
                select from pruned_listens where pruned_listens.user_id = pair.user_id and play_item_id = pair.track_id
            )
        """,
        *_columns(pairs), [listened.counts[pair] for pair in pairs],
    )  # fmt: skip
    return {(user, track) for user, track in rows}


async def _first_heard(tx: Tx, listened: Listened, plays: Rows) -> set[Pair]:
    """The pairs whose first row in the table is among the span's own: of rows that are recalled others may be later.

    Any other row of the pair found this one there, or has yet to come by: so each pair is counted once, in any order.
    """
    own = set(zip(*(plays[column] for column in ("slot", "tx_hash", "event_index")), strict=True))
    rows = await tx.fetch(
        """
        select pair.user_id, pair.track_id, slot, tx_hash, event_index
        from unnest($1::bigint[], $2::bigint[]) as pair (user_id, track_id)
        cross join lateral (
            select chain, slot, tx_hash, event_index from plays
            where plays.user_id = pair.user_id and play_item_id = pair.track_id
            order by id + 0 limit 1 -- id + 0, for the index of the listener and not that of the id
        ) as first
        where chain = $3 and not exists (
            select from pruned_listens where pruned_listens.user_id = pair.user_id and play_item_id = pair.track_id
        )
        """,
        *_columns(sorted(listened.counts)), tx.chain,
    )  # fmt: skip
    return {(user, track) for user, track, *place in rows if tuple(place) in own}


async def _histories(tx: Tx, users: Sequence[int]) -> tuple[dict[int, History], set[Pair]]:
    """The histories as they are, and those of their entries whose play_count is not known."""
    histories: dict[int, History] = {user: {} for user in users}
    unknown: set[Pair] = set()
    rows = await tx.fetch(
        """
        select user_id, coalesce(listening_history::text, '[]')
        from user_listening_history where user_id = any($1::bigint[])
        """,
        users,
    )
    for user, text in rows:
        try:
            entries = _entries.decode(text)
            ours = all(len(entry.timestamp) in (19, 26) and entry.timestamp[10] == " " for entry in entries)
        except msgspec.DecodeError:
            ours = False
        if not ours:
            entries = _mended(text)
            unknown.update((user, entry.track_id) for entry in entries if entry.play_count == 0)
        # where another writer has a track twice, the latest is the one
        histories[user] = {entry.track_id: entry for entry in sorted(entries)}
    return histories, unknown


def _mended(text: str) -> list[Entry]:
    """What can be read of a history that another writer left. A play_count of 0 is one that is not known."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    entries = []
    for one in found if isinstance(found, list) else ():
        fields = one if isinstance(one, dict) else {}
        track, time, count = fields.get("track_id"), _moment(fields.get("timestamp")), fields.get("play_count")
        if type(track) is int and -(1 << 63) <= track < 1 << 63 and time is not None:
            entries.append(Entry(time, track, count if type(count) is int and 0 < count < 1 << 63 else 0))
    return entries


def _moment(value: Any) -> str | None:
    try:
        time = datetime.fromisoformat(value)
        return str(time.astimezone(UTC).replace(tzinfo=None) if time.tzinfo else time)
    except (TypeError, ValueError, OverflowError):
        return None


async def _totals(tx: Tx, pairs: Sequence[Pair]) -> Mapping[Pair, Entry]:
    """How often, and when last, these people have heard these tracks in all."""
    if not pairs:
        return {}
    rows = await tx.fetch(
        """
        select pair.user_id, pair.track_id, greatest(listened.latest, pruned.latest) as latest,
               listened.plays + coalesce(pruned.count, 0) as plays
        from unnest($1::bigint[], $2::bigint[]) as pair (user_id, track_id)
        cross join lateral (
            select count(*) as plays, max(created_at) as latest from plays
            where plays.user_id = pair.user_id and play_item_id = pair.track_id
        ) as listened
        left join pruned_listens as pruned on pruned.user_id = pair.user_id and pruned.play_item_id = pair.track_id
        """,
        *_columns(pairs),
    )
    # an entry of another writer's whose plays are nowhere stands for one play at least
    return {
        (user, track): Entry(str(latest) if latest else "", track, max(count, 1)) for user, track, latest, count in rows
    }


def _add(history: History, track: int, count: int, time: str) -> None:
    entry = history.get(track)
    if entry is None:
        history[track] = Entry(time, track, count)
    else:
        entry.play_count += count
        entry.timestamp = max(entry.timestamp, time)


def _columns(pairs: Iterable[Pair]) -> tuple[list[int], list[int]]:
    users, tracks = [], []
    for user, track in pairs:
        users.append(user)
        tracks.append(track)
    return users, tracks


def _hour(time: datetime) -> datetime:
    return time.replace(minute=0, second=0, microsecond=0)


listeners = Listeners
