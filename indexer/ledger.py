"""All SQL on the engine's tables: chain, cursor, block, coverage, failure, quarantine."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec

from indexer.db import Connection
from indexer.errors import HookFailed, LostLeadership, WrongNetwork, accept_hint
from indexer.model import BlockRef, Heads, Quarantined, Span

# asyncpg's type for int8multirange is a list of ranges
Ranges = list[tuple[int, int]]


class ChainRow(msgspec.Struct, frozen=True):
    """A chain as the database knows it: its number there, its id and the first block that is indexed."""

    id: int
    name: str
    source: str
    identity: str
    start_block: int


class Cursor(msgspec.Struct, frozen=True):
    """How far a chain is applied: the newest applied block, its time (seconds since 1970), what its writer last saw."""

    ref: BlockRef
    block_time: int | None
    heads: Heads | None


class Pace(msgspec.Struct, frozen=True):
    """What the writer sees and how fast it goes, stored beside the cursor for `indexer status`."""

    heads: Heads
    blocks_per_second: float = 0.0
    events_per_second: float = 0.0


async def open_chain(connection: Connection, name: str, source: str, identity: str, start_block: int) -> ChainRow:
    """The chain's row, created together with its cursor where it is new.

    Raises WrongNetwork where the database was started with another chain of that name.
    """
    async with connection.transaction():
        if await find_chain(connection, name) is None:  # a try to insert would use up one of 32,767 ids at each start
            await connection.execute(
                """
                insert into indexer.chain (name, source, identity, start_block) values ($1, $2, $3, $4)
                on conflict (name) do nothing
                """,
                name, source, identity, start_block,
            )  # fmt: skip
        chain = await find_chain(connection, name)
        assert chain is not None
        await connection.execute(
            "insert into indexer.cursor (chain, number, hash) values ($1, $2, '') on conflict do nothing",
            chain.id, chain.start_block - 1,
        )  # fmt: skip
    if chain.identity != identity:
        raise WrongNetwork(
            f"chain {name} in this database is {chain.identity}, the node answers for {identity}: "
            "point chain.endpoints at the right network, or give this chain another chain.name"
            + accept_hint(source, identity)
        )
    return chain


async def find_chain(connection: Connection, name: str) -> ChainRow | None:
    row = await connection.fetchrow(
        "select id, name, source, identity, start_block from indexer.chain where name = $1", name
    )
    return ChainRow(**dict(row)) if row else None


async def chains(connection: Connection) -> list[dict[str, Any]]:
    """All chains of this database with how far they are applied, in the order in which they came."""
    rows = await connection.fetch(
        """
        select chain.id, chain.name, chain.source, chain.identity, chain.start_block, cursor.number as cursor
        from indexer.chain left join indexer.cursor on cursor.chain = chain.id
        order by chain.id
        """
    )
    return [dict(row) for row in rows]


async def rename_chain(connection: Connection, chain: int, name: str) -> None:
    await connection.execute("update indexer.chain set name = $2 where id = $1", chain, name)


async def cursor(connection: Connection, chain: int) -> Cursor:
    row = await connection.fetchrow(
        "select number, hash, block_time, head, final from indexer.cursor where chain = $1", chain
    )
    assert row is not None, "open_chain makes the cursor"
    time = row["block_time"]
    heads = Heads(row["head"], row["final"]) if row["head"] is not None else None
    return Cursor(BlockRef(row["number"], row["hash"]), int(time.timestamp()) if time else None, heads)


async def advance(connection: Connection, chain: int, at: BlockRef, span: Span, pace: Pace, leader: str) -> None:
    """Move the cursor from `at` to the end of `span`: the first statement of the span's transaction.

    Raises LostLeadership where the cursor is no longer at `at`: somebody else writes this chain. A second writer waits
    here for the first one's commit, and then loses.
    """
    status = await connection.execute(
        """
        update indexer.cursor
        set number = $4, hash = $5, block_time = $6, head = greatest($7::bigint, $4::bigint), final = $8,
            blocks_per_second = $9, events_per_second = $10, leader = $11, updated_at = now(), seen_at = now()
        where chain = $1 and number = $2 and hash = $3
        """,
        chain, at.number, at.hash, span.end.number, span.end.hash, moment(span.end_timestamp),
        pace.heads.newest, pace.heads.final, pace.blocks_per_second, pace.events_per_second, leader,
    )  # fmt: skip
    if status != "UPDATE 1":
        raise LostLeadership(f"the cursor is no longer at block {at.number}: another process writes this chain")


async def heartbeat(connection: Connection, chain: int, at: BlockRef, pace: Pace, leader: str) -> None:
    """Say that the leader lives, and what it sees, while there is nothing to commit.

    Raises LostLeadership where the cursor is no longer at `at`: an idle daemon notices a rewind at once, too.
    """
    status = await connection.execute(
        """
        update indexer.cursor
        set head = $4, final = $5, blocks_per_second = $6, events_per_second = $7, leader = $8, seen_at = now()
        where chain = $1 and number = $2 and hash = $3
        """,
        chain, at.number, at.hash, pace.heads.newest, pace.heads.final,
        pace.blocks_per_second, pace.events_per_second, leader,
    )  # fmt: skip
    if status != "UPDATE 1":
        raise LostLeadership(f"the cursor is no longer at block {at.number}: another process moved it")


async def register_hooks(connection: Connection, chain: int, hooks: Sequence[str]) -> None:
    """Give each hook its coverage row; one that is added late starts with a hole."""
    await connection.execute(
        "insert into indexer.coverage (chain, hook) select $1, unnest($2::text[]) on conflict do nothing",
        chain, list(hooks),
    )  # fmt: skip


async def known_hooks(connection: Connection, chain: int) -> set[str]:
    """The hooks that a daemon has been started with."""
    rows = await connection.fetch("select hook from indexer.coverage where chain = $1", chain)
    return {row["hook"] for row in rows}


async def cover(connection: Connection, chain: int, hooks: Sequence[str], first: int, last: int) -> None:
    """Note that the hooks have applied the blocks `first` to `last`."""
    await connection.execute(
        """
        update indexer.coverage
        set blocks = blocks + int8multirange(int8range($3, $4, '[]'))
        where chain = $1 and hook = any($2)
        """,
        chain, list(hooks), first, last,
    )  # fmt: skip


async def gaps(connection: Connection, chain: int) -> dict[str, Ranges]:
    """For each hook the ranges (first, last) from the start block to the cursor that it has not applied."""
    rows = await connection.fetch(
        """
        select coverage.hook,
               int8multirange(int8range(chain.start_block, cursor.number, '[]')) - coverage.blocks as missing
        from indexer.coverage
        join indexer.chain on chain.id = coverage.chain
        join indexer.cursor on cursor.chain = coverage.chain
        where coverage.chain = $1 and cursor.number >= chain.start_block
        order by coverage.hook
        """,
        chain,
    )
    return {row["hook"]: [_closed(range_) for range_ in row["missing"]] for row in rows}


def _closed(range_: asyncpg.Range[int]) -> tuple[int, int]:
    # int8 ranges come back in the canonical form [first, end)
    first, end = range_.lower, range_.upper
    assert first is not None and end is not None
    return first, end - 1


async def hold(connection: Connection, chain: int) -> Cursor:
    """Keep the cursor where it is until the caller's transaction ends: no span of this chain is committed meanwhile."""
    await connection.execute("select from indexer.cursor where chain = $1 for update", chain)
    return await cursor(connection, chain)


async def have_applied(connection: Connection, chain: int, hooks: Sequence[str], first: int, last: int) -> bool:
    """Whether one of the hooks has applied any of the blocks `first` to `last`."""
    return bool(
        await connection.fetchval(
            """
            select exists (
                select from indexer.coverage
                where chain = $1 and hook = any($2) and blocks && int8range($3, $4, '[]')
            )
            """,
            chain, list(hooks), first, last,
        )
    )  # fmt: skip


async def lock_replays(connection: Connection, chain: int) -> bool:
    """Take the right to replay on this chain for as long as the connection lives; False where another replay runs."""
    return bool(await connection.fetchval("select pg_try_advisory_lock(hashtext('indexer.replay'), $1)", chain))


async def failure(connection: Connection, chain: int, id_: int) -> dict[str, Any] | None:
    """One failure with its traceback; None where there is none of that number."""
    row = await connection.fetchrow("select * from indexer.failure where chain = $1 and id = $2", chain, id_)
    return dict(row) if row else None


async def quarantine(connection: Connection, chain: int, logs: Sequence[Quarantined]) -> None:
    await connection.executemany(
        """
        insert into indexer.quarantine
            (chain, number, block_hash, log_index, event, address, tx_hash, topics, data, error)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
        on conflict do nothing
        """,
        [
            (chain, log.number, log.block_hash, log.index, log.event, log.address, log.tx_hash,
             list(log.topics), log.data, log.error)
            for log in logs
        ],
    )  # fmt: skip


async def record_failure(connection: Connection, chain: int, failed: HookFailed, policy: str) -> None:
    """Keep why a hook failed; where it failed there before and nothing has resolved that, it is the same failure."""
    cause = failed.__cause__
    assert cause is not None
    error, details = _storable(f"{type(cause).__name__}: {cause}"), "".join(traceback.format_exception(cause))
    facts = (chain, failed.hook, failed.first, failed.last, policy, error, _storable(details))
    async with connection.transaction():
        known = await connection.fetchval(
            """
            update indexer.failure set last = $4, policy = $5, error = $6, traceback = $7, failed_at = now()
            where chain = $1 and hook = $2 and first = $3 and resolved_at is null
            returning id
            """,
            *facts,
        )
        if known is None:
            await connection.execute(
                """
                insert into indexer.failure (chain, hook, first, last, policy, error, traceback)
                values ($1, $2, $3, $4, $5, $6, $7)
                """,
                *facts,
            )


def _storable(text: str) -> str:
    # a hook's error may quote what the chain said: Postgres takes no NUL and no half of a surrogate pair
    return text.replace("\0", "").encode("utf-8", "replace").decode()


async def resolve_failures(connection: Connection, chain: int, hooks: Sequence[str], first: int, last: int) -> None:
    """Close the failures in the blocks `first` to `last`, as far as the hooks have now applied all of their blocks."""
    await connection.execute(
        """
        update indexer.failure set resolved_at = now()
        from indexer.coverage
        where coverage.chain = failure.chain and coverage.hook = failure.hook
          and failure.chain = $1 and failure.hook = any($2) and resolved_at is null
          and int8range(failure.first, failure.last, '[]') && int8range($3, $4, '[]')
          and int8range(failure.first, failure.last, '[]') <@ coverage.blocks
        """,
        chain, list(hooks), first, last,
    )  # fmt: skip


async def open_failures(connection: Connection, chain: int) -> list[dict[str, Any]]:
    """The failures that nothing has resolved yet, oldest first."""
    rows = await connection.fetch(
        """
        select id, hook, first, last, policy, error, failed_at, resolved_at from indexer.failure
        where chain = $1 and resolved_at is null
        order by id
        """,
        chain,
    )
    return [dict(row) for row in rows]


async def failures_at(connection: Connection, chain: int, number: int) -> list[dict[str, Any]]:
    """All failures at that block, resolved ones too, oldest first."""
    rows = await connection.fetch(
        """
        select id, hook, first, last, policy, error, failed_at, resolved_at from indexer.failure
        where chain = $1 and $2 between first and last
        order by id
        """,
        chain, number,
    )  # fmt: skip
    return [dict(row) for row in rows]


async def standing(connection: Connection, name: str) -> dict[str, Any] | None:
    """The row of facts behind `indexer status`, or None where the database does not know the chain."""
    row = await connection.fetchrow(
        """
        select chain.id, chain.name, chain.source, chain.identity, chain.start_block,
               cursor.number as cursor, cursor.hash, cursor.block_time, cursor.head, cursor.final,
               cursor.blocks_per_second, cursor.events_per_second, cursor.leader,
               extract(epoch from now() - cursor.updated_at)::float8 as committed_seconds_ago,
               extract(epoch from now() - cursor.seen_at)::float8 as seen_seconds_ago
        from indexer.chain join indexer.cursor on cursor.chain = chain.id
        where chain.name = $1
        """,
        name,
    )
    return dict(row) if row else None


def moment(seconds: int) -> datetime:
    """A block's time as Postgres takes it."""
    return datetime.fromtimestamp(seconds, UTC)


async def note_pruned(
    connection: Connection, table: str, before: datetime, rows: int, *, blocks: Mapping[int, int] = {}
) -> None:
    """Say that a job deleted `rows` rows of `table` from before that moment (UTC): in the delete's own transaction.

    `blocks`: for each chain the newest block of which a row is gone. Up to there replays that need it are refused.
    """
    await connection.execute(
        """
        insert into indexer.pruned as known (relation, before, rows) values ($1::text::regclass, $2, $3)
        on conflict (relation) do update
        set before = greatest(known.before, excluded.before), rows = known.rows + excluded.rows, pruned_at = now()
        """,
        table, before, rows,
    )  # fmt: skip
    await connection.execute(
        """
        insert into indexer.pruned_blocks as known (relation, chain, last)
        select $1::text::regclass, * from unnest($2::smallint[], $3::bigint[])
        on conflict (relation, chain) do update set last = greatest(known.last, excluded.last)
        """,
        table, list(blocks), list(blocks.values()),
    )  # fmt: skip


async def pruned_blocks(connection: Connection, chain: int, tables: Sequence[str]) -> dict[str, int]:
    """For those of the tables that were pruned the newest block of which a row is gone."""
    rows = await connection.fetch(
        """
        select name, last from unnest($2::text[]) as name
        join indexer.pruned_blocks on relation = to_regclass(name) and chain = $1
        """,
        chain, list(tables),
    )  # fmt: skip
    return {row["name"]: row["last"] for row in rows}
