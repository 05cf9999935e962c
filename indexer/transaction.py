"""Tx: what a hook may do inside the span's transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import asyncpg

from indexer import queue
from indexer.db import Connection, translated
from indexer.errors import DatabaseUnavailable
from indexer.queue import After, NewJob

Row = tuple[Any, ...]


class Rows:
    """Rows of one table in the order in which they were given; `rows["column"]` is that column as a list."""

    def __init__(self, columns: Sequence[str], values: Sequence[Row] = ()) -> None:
        self.columns = tuple(columns)
        self.values = list(values)

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.values)

    def __getitem__(self, column: str) -> list[Any]:
        if not self.values:
            return []
        place = self.columns.index(column)
        return [row[place] for row in self.values]


class Tx:
    """The span's transaction as its hooks see it.

    `chain` is the engine's number for the chain. Postgres' own troubles (lost connection, deadlock, timeout) leave as
    DatabaseUnavailable and make the engine try the span again; every other error is the hook's. `waits_at`: the block
    with which its jobs wait for finality; they are queued at once without one.
    """

    def __init__(self, connection: Connection, chain: int, *, waits_at: int | None = None) -> None:
        self.chain = chain
        self._waits_at = waits_at
        self._connection = connection
        self._inserted: dict[str, Rows] = {}
        self._recalled: set[str] = set()
        self.skipped: Counter[tuple[str, str]] = Counter()
        self.written: Counter[tuple[str, str]] = Counter()
        self.hook = ""
        self.recalling = False
        # the error of the last statement, if it failed: a hook that catches it has a broken transaction all the same
        self.trouble: Exception | None = None

    @contextmanager
    def _statement(self) -> Iterator[None]:
        try:
            with translated():
                yield
        except asyncpg.InFailedSQLTransactionError as error:
            raise error from self.trouble
        except (asyncpg.PostgresError, DatabaseUnavailable) as error:
            # an argument that does not fit is refused before it is sent, without a severity: the transaction is whole
            if not isinstance(error, asyncpg.DataError) or getattr(error, "severity", None):
                self.trouble = error
            raise
        # after an error Postgres takes no statement but one that rolls back to a savepoint: then all is well again
        self.trouble = None

    async def execute(self, sql: str, *args: Any) -> str:
        """Run a statement; returns Postgres' command tag, as "UPDATE 3"."""
        with self._statement():
            return await self._connection.execute(sql, *args)

    async def fetch(self, sql: str, *args: Any) -> list[asyncpg.Record]:
        with self._statement():
            return await self._connection.fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: Any) -> asyncpg.Record | None:
        with self._statement():
            return await self._connection.fetchrow(sql, *args)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        with self._statement():
            return await self._connection.fetchval(sql, *args)

    async def insert_new(
        self, table: str, columns: Sequence[str], records: Sequence[Row], *, key: Sequence[str]
    ) -> Rows:
        """Insert the records that are not there yet, and remember them for the hooks that come after.

        `key` names the columns of the unique constraint by which a record is known. A record that meets any unique
        constraint of the table is passed over (`on conflict do nothing`). Returns the rows really inserted, in the
        order given. While the engine recalls an earlier hook's rows for a replay, nothing is inserted and the rows
        that are there already come back.
        """
        new: Sequence[Row] = records
        if records and self.recalling:
            new = await self._by_key(table, columns, records, key, insert=False)
        elif records and not await self._copied(table, columns, records):
            new = await self._by_key(table, columns, records, key, insert=True)
        self.remember(table, columns, new)
        self.wrote(table, "inserted", len(new))
        return Rows(columns, new)

    def remember(self, table: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Have `inserted(table)` give these rows to later hooks: for a hook that inserts with statements of its own."""
        remembered = self._inserted.setdefault(table, Rows(columns))
        if remembered.columns != tuple(columns):
            raise ValueError(f"{table}: a span inserts with one list of columns; {columns} is a second one")
        remembered.values.extend(rows)
        if self.recalling:
            self._recalled.add(table)

    async def _copied(self, table: str, columns: Sequence[str], records: Sequence[Row]) -> bool:
        # A conflict is the exception (a replay, another writer): the quick way first, in a savepoint that gives it up.
        with self._statement():
            try:
                async with self._connection.transaction():
                    await self._connection.copy_records_to_table(table, records=records, columns=list(columns))
            except asyncpg.UniqueViolationError:
                return False
        return True

    async def _by_key(
        self, table: str, columns: Sequence[str], records: Sequence[Row], key: Sequence[str], *, insert: bool
    ) -> list[Row]:
        """Insert those records whose key is not there yet, or just find those whose key is; returns these records."""
        # Postgres itself writes the statements (format with %I), so that no name is pasted into SQL here.
        with self._statement():
            create, insert_new, find_present, drop = await self._connection.fetchrow(  # type: ignore[misc]
                """
                select format('create temporary table indexer_rows on commit drop as select %s from %I with no data',
                              cols, tbl),
                       format('insert into %I (%s) select %s from indexer_rows on conflict do nothing returning %s',
                              tbl, cols, cols, keys),
                       format('select %s from indexer_rows join %I using (%s)', keys, tbl, keys),
                       'drop table indexer_rows'
                from (select $1::text as tbl,
                             (select string_agg(quote_ident(c), ', ' order by n)
                              from unnest($2::text[]) with ordinality as u (c, n)) as cols,
                             (select string_agg(quote_ident(c), ', ' order by n)
                              from unnest($3::text[]) with ordinality as u (c, n)) as keys) as names
                """,
                table, list(columns), list(key),
            )  # fmt: skip
            await self._connection.execute(create)
            await self._connection.copy_records_to_table("indexer_rows", records=records, columns=list(columns))
            found = await self._connection.fetch(insert_new if insert else find_present)
            fresh = Counter(tuple(row) for row in found)
            await self._connection.execute(drop)
        places = [list(columns).index(column) for column in key]
        new = []
        for record in records:
            identity = tuple(record[place] for place in places)
            if fresh[identity]:  # of two records with one key the first is the one inserted
                fresh[identity] -= 1
                new.append(record)
        return new

    def inserted(self, table: str) -> Rows:
        """The rows of `table` that earlier hooks really inserted in this span, in their order; perhaps none."""
        return self._inserted.get(table, Rows(()))

    def recalled(self, table: str) -> bool:
        """Whether the rows of `inserted(table)` were there before, and come back for a hook that had missed them.

        Rows of later blocks may then be in the table as well, which that hook has seen already, or will see.
        """
        return table in self._recalled

    async def enqueue(
        self, kind: str, payload: Mapping[str, Any], *, key: str | None = None, priority: int = 0, after: After = None,
        window: timedelta | None = None,
    ) -> bool:  # fmt: skip
        """Order a job, which is there once the block is committed and can't be reorganised any more.

        False where a job of that kind and key waits or runs already (or was queued within its window); what waits for
        finality is compared only then. A replay of the block orders it again: give it a key, and make it bear that.
        """
        return await self.enqueue_many(kind, [NewJob(payload, key, priority, after)], window=window) == 1

    async def enqueue_many(self, kind: str, jobs: Sequence[NewJob], *, window: timedelta | None = None) -> int:
        """Order many jobs of one kind at once; returns how many are new, as far as it is known by now."""
        with self._statement():
            if self._waits_at is None:
                return await queue.enqueue_many(self._connection, kind, jobs, window=window)
            await queue.keep_waiting(self._connection, self.chain, self._waits_at, kind, jobs, window=window)
        return len(jobs)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count events that the hook's rules pass over, by reason (metric indexer_skipped_total, after COMMIT)."""
        if count:
            self.skipped[self.hook, reason] += count

    def wrote(self, table: str, op: str, count: int) -> None:
        """Count rows for the metric indexer_rows_total, published after COMMIT; `op` as inserted, updated."""
        if count:
            self.written[table, op] += count

    def mark(self) -> dict[str, int]:
        """What is remembered now, to come back to it if the hook's savepoint is undone."""
        return {table: len(rows) for table, rows in self._inserted.items()}

    def back_to(self, mark: dict[str, int]) -> None:
        for table, rows in self._inserted.items():
            del rows.values[mark.get(table, 0) :]
