"""Challenges: a listener's streak of days ('e'), and the plays of a verified artist's tracks ('p1' to 'p3').

A challenge writes rows for its readers while its row in `challenges` is active. Complete is complete: what was won is
neither taken back nor changed, whatever becomes of the plays, the tracks or their owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from hooks.artists import Play, Sums, owned_plays
from hooks.ownership import Owners
from indexer import Block, Derived, EventSpec, Panel, Tx, sql_folder

STREAK = "e"
STREAK_DAYS = 7
SAME_DAY = timedelta(hours=16)  # nearer to the last listen than this is still the same day
TOO_LATE = timedelta(hours=48)


class Tier(NamedTuple):
    """A challenge that begins at so many plays of an artist's tracks, and is complete at `threshold`."""

    challenge: str
    start: int
    threshold: int


TIERS = (Tier("p1", 1, 250), Tier("p2", 250, 1_000), Tier("p3", 1_000, 10_000))

# Another writer's plays are not ours to fold, nor are those of its rows that became ours: it has told of them itself.
_SHARED = "select exists (select from plays where chain is null or counterpart = 'adopted')"

DERIVED = (
    Derived(
        "challenge_listen_streak",
        """
        select user_id, (streak).last_listen_date, (streak).listen_streak
        from (
            select user_id, fold_listen_streak(created_at order by chain, slot, id) as streak
            from plays
            where chain is not null and counterpart is distinct from 'adopted' and user_id is not null
            group by user_id
        ) as folded
        """,
        base=("plays",),
        shared=_SHARED,
    ),
    # Only of the streak, and as if 'e' had always been active. What an artist has reached was said at a play, with the
    # tracks and the verification that they had then, which no table keeps: compared with those of now, a row would look
    # wrong after each track that was deleted. The next play of one of their tracks says it anew, until it is complete.
    Derived(
        "user_challenges",
        """
        select 'e' as challenge_id, user_id,
               challenge_user_hex(user_id) || to_char(created_at, 'YYYYMMDDHH24') as specifier,
               case when days <= 7 then days else 1 end as current_step_count,
               case when days <= 7 then challenge_amount(amount) else 1 end as amount,
               days >= 7 as is_complete,
               case when days >= 7 then slot end as completed_blocknumber,
               case when days >= 7 then created_at end as completed_at
        from (
            select user_id, created_at, slot, (streak).listen_streak as days, (streak).last_listen_date as last,
                   lag((streak).last_listen_date) over (partition by user_id order by chain, slot, id) as last_before
            from (
                select *, fold_listen_streak(created_at) over (partition by user_id order by chain, slot, id) as streak
                from plays
                where chain is not null and counterpart is distinct from 'adopted' and user_id is not null
            ) as folded
        ) as listened
        join challenges on challenges.id = 'e' and active
        where last is distinct from last_before
        """,
        base=("plays", "challenges"),
        only="challenge_id = 'e' and exists (select from challenges where challenges.id = 'e' and active)",
        shared=_SHARED,
    ),
)


class Reached(NamedTuple):
    """A row of user_challenges."""

    challenge: str
    specifier: str
    user: int
    steps: int
    amount: int
    complete: bool
    slot: int | None
    at: datetime | None


class Challenges:
    """The hook `challenges`. Reads the plays that `plays` inserted in this span, never the table.

    The artists' plays are those in aggregate_monthly_plays, which already holds this span's: somebody must keep it (the
    hook `aggregates`, or the trigger of an older indexer). A hole that is filled later finds the sums of now in it, and
    a listener's streak that has gone on: `indexer rebuild challenges` puts the streaks right.
    """

    name = "challenges"
    listens: tuple[EventSpec, ...] = ()
    tables = ("challenge_listen_streak", "user_challenges")
    after = ("plays",)
    also_after = ("aggregates", "entities")
    migrations = ("plays", sql_folder("plays"))
    derived = DERIVED
    panels = (
        Panel(
            "Last completed challenges",
            "select challenge_id as challenge, user_id as user, amount, completed_blocknumber as block,"
            " completed_at as at from user_challenges where completed_at is not null"
            " order by completed_at desc, specifier limit 10",
        ),
    )

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        if not tx.inserted("plays"):
            return
        amounts = await _active(tx)
        reached = await self._streaks(tx, amounts.get(STREAK))
        tiers = [tier for tier in TIERS if tier.challenge in amounts]
        if tiers:
            reached += await self._artists(tx, tiers, amounts)
        if reached:
            await _write(tx, sorted(reached))

    # -- listeners -------------------------------------------------------------------------------------------------

    async def _streaks(self, tx: Tx, amount: int | None) -> list[Reached]:
        """Fold the plays into their listeners' streaks; what these reached, where there is an `amount` for it."""
        plays = tx.inserted("plays")
        listened = [
            play
            for play in zip(plays["user_id"], plays["slot"], plays["created_at"], strict=True)
            if play[0] is not None
        ]
        if not listened:
            return []
        found = await tx.fetch(
            """
            select user_id, last_listen_date, listen_streak from challenge_listen_streak
            where user_id = any($1::bigint[])
            """,
            sorted({user for user, _, _ in listened}),
        )
        before: dict[int, tuple[datetime | None, int]] = {user: (last, days) for user, last, days in found}
        streaks = dict(before)
        reached: list[Reached] = []
        for user, slot, at in listened:
            last, days = streaks.get(user, (None, 0))
            if last is not None and at - last < SAME_DAY:
                continue
            days = 1 if last is None or at - last >= TOO_LATE else days + 1
            streaks[user] = at, days
            if amount is not None:
                reached.append(_day(user, slot, at, days, amount))
        changed = sorted(user for user, streak in streaks.items() if streak != before.get(user))
        await tx.execute(
            """
            insert into challenge_listen_streak (user_id, last_listen_date, listen_streak)
            select * from unnest($1::bigint[], $2::timestamp[], $3::integer[])
            on conflict (user_id) do update
            set last_listen_date = excluded.last_listen_date, listen_streak = excluded.listen_streak
            """,
            changed,
            [streaks[user][0] for user in changed],
            [streaks[user][1] for user in changed],
        )
        new = sum(user not in before for user in changed)
        tx.wrote("challenge_listen_streak", "inserted", new)
        tx.wrote("challenge_listen_streak", "updated", len(changed) - new)
        return reached

    # -- artists ---------------------------------------------------------------------------------------------------

    async def _artists(self, tx: Tx, tiers: Sequence[Tier], amounts: Mapping[str, int]) -> list[Reached]:
        """Walk through the plays, with the sum of each artist's plays as it was at each of them."""
        owners = Owners(tx)
        plays = await owned_plays(tx, owners)
        complete = await _complete(tx, tiers, {play.owner for play in plays if play.owner is not None})
        # who has won all that is to be won is left out: so nobody's many plays are summed up again and again
        open_to = {
            play.owner
            for play in plays
            if play.owner is not None and any((tier.challenge, play.owner) not in complete for tier in tiers)
        }
        if not open_to:
            return []
        sums = await Sums.before(tx, owners, plays, open_to)
        rows: dict[tuple[str, int], Reached] = {}
        for play in plays:
            sums.count(play)
            if play.owner not in open_to:
                continue
            total = sums.of(play.owner)
            for tier in tiers:
                key = (tier.challenge, play.owner)
                if total >= tier.start and key not in complete:
                    rows[key] = _step(tier, play, play.owner, total, amounts[tier.challenge])
                    if rows[key].complete:
                        complete.add(key)
        return list(rows.values())


async def _active(tx: Tx) -> dict[str, int]:
    """The challenges that are active, with what each step is worth."""
    rows = await tx.fetch(
        "select id, challenge_amount(amount) from challenges where active and id = any($1::text[])",
        [STREAK, *(tier.challenge for tier in TIERS)],
    )
    return {challenge: amount for challenge, amount in rows}  # noqa: C416  records are no pairs to mypy


async def _complete(tx: Tx, tiers: Sequence[Tier], artists: set[int]) -> set[tuple[str, int]]:
    """The challenges that these artists have completed."""
    specifiers = {_specifier(tier, artist): (tier.challenge, artist) for tier in tiers for artist in artists}
    rows = await tx.fetch(
        """
        select challenge_id, specifier from user_challenges
        where challenge_id = any($1::text[]) and specifier = any($2::text[]) and is_complete
        """,
        [tier.challenge for tier in tiers],
        list(specifiers),
    )
    return {specifiers[specifier] for challenge, specifier in rows if specifiers[specifier][0] == challenge}


def _specifier(tier: Tier, artist: int) -> str:
    return f"{artist:x}:{tier.threshold}"


def _step(tier: Tier, play: Play, artist: int, total: int, amount: int) -> Reached:
    complete = total >= tier.threshold
    steps = min(total, tier.threshold)
    slot, at = (play.slot, play.at) if complete else (None, None)
    return Reached(tier.challenge, _specifier(tier, artist), artist, steps, amount, complete, slot, at)


def _day(user: int, slot: int, at: datetime, days: int, amount: int) -> Reached:
    """A day of a streak; from the eighth on each is a challenge of its own, of one step."""
    specifier = f"{user:x}{at.year:04}{at:%m%d%H}"
    steps, worth = (days, amount) if days <= STREAK_DAYS else (1, 1)
    if days < STREAK_DAYS:
        return Reached(STREAK, specifier, user, steps, worth, False, None, None)
    return Reached(STREAK, specifier, user, steps, worth, True, slot, at)


async def _write(tx: Tx, reached: Sequence[Reached]) -> None:
    """Write the rows that differ, in the order of their keys; one that is complete stays as it is."""
    written = await tx.fetchrow(
        """
        with written as (
            insert into user_challenges as present (
                challenge_id, specifier, user_id, current_step_count, amount, is_complete,
                completed_blocknumber, completed_at
            )
            select * from unnest($1::text[], $2::text[], $3::bigint[], $4::integer[], $5::integer[], $6::boolean[],
                                 $7::bigint[], $8::timestamp[])
            on conflict (challenge_id, specifier) do update
            set current_step_count = excluded.current_step_count, amount = excluded.amount,
                is_complete = excluded.is_complete, completed_blocknumber = excluded.completed_blocknumber,
                completed_at = excluded.completed_at
            where not present.is_complete
              and (present.current_step_count, present.amount, present.is_complete)
                  is distinct from (excluded.current_step_count, excluded.amount, excluded.is_complete)
            returning xmax = 0 as new
        )
        select count(*) filter (where new) as inserted, count(*) filter (where not new) as updated from written
        """,
        *[list(column) for column in zip(*reached, strict=True)],
    )
    assert written is not None
    tx.wrote("user_challenges", "inserted", written["inserted"])
    tx.wrote("user_challenges", "updated", written["updated"])


challenges = Challenges
