"""Connections to Postgres: UTC, a timeout on everything, the leader's lock, which troubles are the database's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
from asyncpg.exceptions import PostgresError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from indexer import metrics
from indexer.config import DatabaseSettings
from indexer.errors import ConfigError, DatabaseUnavailable, IndexerError

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection = asyncpg.Connection
    Pool = asyncpg.Pool

# A leader that is paused or cut off loses its session, and with it its lock, after this long: the standby's turn.
LEADER_SILENCE_SECONDS = 7
HEARTBEAT_SECONDS = 2.0

# SQLSTATE classes that are the server's state and not the statement's fault: connection, rollbacks by conflict,
# resources, locks and timeouts, an operator's intervention, system errors.
_TRANSIENT_CLASSES = frozenset({"08", "40", "53", "55", "57", "58"})
# a server that has just become a replica, and the timeouts of a session that was idle or long in a transaction
_TRANSIENT_STATES = frozenset({"25006", "25P03", "25P04"})


def is_transient(error: BaseException) -> bool:
    """Whether `error` is the database's own trouble, worth the same statement again, and never a hook's failure."""
    if isinstance(error, DatabaseUnavailable):
        return True
    if isinstance(error, PostgresError):
        state = error.sqlstate or ""
        return state[:2] in _TRANSIENT_CLASSES or state in _TRANSIENT_STATES
    if isinstance(error, asyncpg.InterfaceError):
        # a rollback on a connection that broke just now may find the broken statement "in progress" still
        before = error.__context__
        return "connection" in str(error) or (before is not None and is_transient(before))
    # asyncpg loses its place where the server has ended the session while we did not look: a leader that was paused
    return isinstance(error, (OSError, TimeoutError, asyncpg.InternalClientError))


def _refused(error: BaseException) -> IndexerError | None:
    """What a failed connect means for the operator."""
    wrong_settings = (
        asyncpg.InvalidPasswordError,
        asyncpg.InvalidAuthorizationSpecificationError,
        asyncpg.InvalidCatalogNameError,
    )
    if isinstance(error, asyncpg.ClientConfigurationError | ValueError):
        return ConfigError("database.url is not a valid address: write postgresql://user:password@host:5432/name")
    if isinstance(error, wrong_settings):
        return ConfigError(f"the database refuses us: {error}; check database.url")
    if is_transient(error):
        reason = str(error) or "no answer in time"
        return DatabaseUnavailable(f"the database can't be reached: {reason}; check database.url and the server")
    return None


@contextmanager
def translated() -> Iterator[None]:
    """Turn the database's own troubles into DatabaseUnavailable and let every other error pass."""
    try:
        yield
    except DatabaseUnavailable:
        raise
    except Exception as error:
        if is_transient(error):
            raise DatabaseUnavailable(f"{type(error).__name__}: {error}") from error
        raise


class Database:
    """Where connections come from. `pool` is for readers and small writes; spans have a connection of their own."""

    def __init__(self, dsn: str, settings: DatabaseSettings, *, name: str = "indexer") -> None:
        self.dsn, self.settings, self.name = dsn, settings, name
        self.pool: Pool

    def _options(self, **server: str) -> dict[str, Any]:
        seconds = self.settings.command_timeout_seconds
        return {
            "command_timeout": seconds,
            "server_settings": {
                "application_name": self.name,
                "timezone": "UTC",
                "search_path": self.settings.schema_,
                "statement_timeout": str(int(seconds * 1000)),
                # notice a lost network in seconds and not in hours (no effect on a unix socket)
                "tcp_keepalives_idle": "2",
                "tcp_keepalives_interval": "1",
                "tcp_keepalives_count": "3",
                **server,
            },
        }

    async def connect(self, **server: str) -> Connection:
        """One connection, tried until connect_timeout_seconds have passed; `server` are further session settings.

        Raises ConfigError where the settings are wrong, DatabaseUnavailable where the server is not to be had.
        """
        options = self._options(**server)
        connection: Connection = await self._patiently(
            lambda: asyncpg.connect(self.dsn, timeout=self._patience, **options)
        )
        return connection

    @property
    def _patience(self) -> float:
        return self.settings.connect_timeout_seconds

    async def _patiently(self, open_: Any) -> Any:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(DatabaseUnavailable),
            wait=wait_random_exponential(multiplier=0.1, max=1.0),
            stop=stop_after_delay(self._patience),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                try:
                    return await open_()
                except Exception as error:
                    refused = _refused(error)
                    if refused is None:
                        raise
                    raise refused from error
        raise AssertionError("tenacity ends by returning or raising")

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Database]:
        """Open the pool for the time of the block."""
        self.pool = await self._patiently(
            lambda: asyncpg.create_pool(
                self.dsn, min_size=1, max_size=self.settings.pool_size, timeout=self._patience, **self._options()
            )
        )
        try:
            yield self
        finally:
            # what does not close in time is dropped with the process
            with suppress(Exception):
                await asyncio.wait_for(self.pool.close(), 2.0)

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Connection]:
        """A connection of the pool, waited for at most connect_timeout_seconds; troubles are DatabaseUnavailable."""
        with translated():
            async with self.pool.acquire(timeout=self._patience) as connection:
                yield connection  # type: ignore[misc]

    def publish(self) -> None:
        """The pool as metrics: how many of its connections are used, idle, and allowed."""
        size, idle = self.pool.get_size(), self.pool.get_idle_size()
        for state, number in (("used", size - idle), ("idle", idle), ("limit", self.pool.get_max_size())):
            metrics.db_pool_connections.labels(state).set(number)

    async def writer(self) -> Connection:
        """The connection that will hold the leader's lock and write spans.

        Its session ends on the server when we fall silent, inside a transaction or outside: a process that was paused
        or cut off can't keep the lock from the standby.
        """
        silence = str(LEADER_SILENCE_SECONDS * 1000)
        return await self.connect(
            idle_session_timeout=silence,
            idle_in_transaction_session_timeout=silence,
            application_name=f"{self.name} writer",
        )


async def make_schema(connection: Connection, schema: str) -> None:
    """Make the schema of the hooks' tables where it is missing; an existing one needs no right to make one."""
    with translated():
        if await connection.fetchval("select to_regnamespace(quote_ident($1)) is null", schema):
            # Postgres itself quotes the name
            await connection.execute(
                await connection.fetchval("select format('create schema if not exists %I', $1::text)", schema)
            )


async def try_lead(connection: Connection, chain: int) -> bool:
    """Take the chain's advisory lock for as long as this connection lives; False where another process has it."""
    with translated():
        return bool(await connection.fetchval("select pg_try_advisory_lock(hashtext('indexer.leader'), $1)", chain))


async def stand_by(connection: Connection, chain: int, *, over: bool = False) -> None:
    """Let others see that this connection waits for the chain's lock, until it ends or the waiting is `over`."""
    with translated():
        if over:
            await connection.execute("select pg_advisory_unlock_shared(hashtext('indexer.standby'), $1)", chain)
        else:
            await connection.execute("select pg_advisory_lock_shared(hashtext('indexer.standby'), $1)", chain)


async def standbys(connection: Connection, chain: int) -> int:
    """How many processes wait for the chain's lock."""
    with translated():
        return int(
            await connection.fetchval(
                """
                select count(*) from pg_locks
                where locktype = 'advisory' and granted and objsubid = 2 and objid = $1::int::oid
                    and classid::bigint = hashtext('indexer.standby')::bigint & 4294967295
                    and database = (select oid from pg_database where datname = current_database())
                """,
                chain,
            )
        )


async def is_led(connection: Connection, chain: int) -> bool:
    """Whether some process holds the chain's lock at this moment."""
    with translated():
        return bool(
            await connection.fetchval(
                """
                select exists (
                    select from pg_locks
                    where locktype = 'advisory' and granted and objsubid = 2 and objid = $1::int::oid
                        and classid::bigint = hashtext('indexer.leader')::bigint & 4294967295
                        and database = (select oid from pg_database where datname = current_database())
                )
                """,
                chain,
            )
        )


async def sidecars(connection: Connection) -> int:
    """How many sidecars work in this database."""
    with translated():
        return int(
            await connection.fetchval(
                """
                select count(*) from pg_stat_activity
                where datname = current_database() and application_name = 'indexer sidecar'
                """
            )
        )


def shown(dsn: str) -> str:
    """The database's address without user, password and parameters."""
    parts = urlsplit(dsn)
    return f"{parts.scheme}://{parts.hostname or 'local'}{f':{parts.port}' if parts.port else ''}{parts.path}"


async def silent_holder(connection: Connection, chain: int) -> tuple[int, str] | None:
    """The server process that holds the chain's lock while it waits for its client, and a mark of how far it is.

    A mark that stays the same is a leader that says nothing: paused or cut off, wherever in the protocol it was. None
    where nobody holds the lock, where the server works for the holder, or where it is another role's.
    """
    row = await connection.fetchrow(
        """
        select activity.pid,
               concat_ws(' ', activity.pid, state, state_change, query_start, xact_start, bytes_processed) as mark
        from pg_locks
        join pg_stat_activity as activity using (pid)
        left join pg_stat_progress_copy as copy on copy.pid = activity.pid
        where locktype = 'advisory' and granted
          and database = (select oid from pg_database where datname = current_database())
          and classid::bigint = hashtext('indexer.leader')::bigint & 4294967295 and objid::bigint = $1 and objsubid = 2
          and wait_event_type = 'Client'
        """,
        chain,
    )
    return (row["pid"], row["mark"]) if row else None
