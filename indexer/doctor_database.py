"""The doctor's checks of the database, and of what runs there. Whatever they try is rolled back."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg

from indexer import ledger, migrations
from indexer.app import migration_lines, open_database
from indexer.config import Settings
from indexer.db import Connection, is_led, shown, sidecars, standbys, translated
from indexer.doctor_finding import Checkup, Verdict, fail, ok, warn
from indexer.doctor_nodes import Known
from indexer.embedded import default_data_dir
from indexer.queue import depth
from indexer.registry import Registered
from indexer.sidecar.app import sidecar_lines
from indexer.status import duration

_OLDEST = 140000
_SKEW_SECONDS, _WRONG_SECONDS = 2.0, 30.0
_SILENT_SECONDS = 30.0
_FREE_SHARE, _FREE_BYTES, _FULL_BYTES = 0.1, 5 << 30, 256 << 20
_SIDECAR_CONNECTIONS = 2  # beside the pool
_GROUP = "database"
_HELP = "see what the database says, and what the role of database.url may do"
_TRIGGERS = [f"indexer_journal_{what}" for what in ("insert", "update", "delete", "truncate")]


async def examine(
    checkup: Checkup, settings: Settings, hooks: Sequence[Registered], *, undoable: bool, sidecar: bool
) -> Known:
    """Check the database; `undoable`: blocks may be reorganised, so that tables are journalled."""
    folder = _data_dir(settings)
    if folder is not None and not (folder / "PG_VERSION").exists():
        why = f"there is no embedded database at {folder} yet"
        checkup.add(_GROUP, "connection", warn(why, "`indexer run` makes it, unless database.url names another"))
        return Known()
    async with AsyncExitStack() as stack:
        patient = _Patient(settings, hooks, undoable, sidecar, stack)
        reach = "look at database.url, at the server and at the way there"
        if not await checkup.run(_GROUP, "connection", patient.connected(), reach):
            return patient.known
        # what the checks after it need to know; a missing right shows in them
        for name, work in (
            ("migrations", patient.migrations), ("rights", patient.rights), ("extensions", patient.extensions),
            ("clock", patient.clock), ("space", patient.space), ("connections", patient.connections),
            ("chain", patient.chain),
        ):  # fmt: skip
            await checkup.run(_GROUP, name, work(), _HELP)
        if patient.row is not None:
            if undoable:
                await checkup.run(_GROUP, "journal", patient.journal(), _HELP)
            for name, work in (("leader", patient.leader), ("failures", patient.failures), ("gaps", patient.gaps)):
                await checkup.run("daemon", name, work(), _HELP)
        if sidecar:
            await checkup.run("sidecar", "jobs", patient.jobs(), _HELP)
        return patient.known


def _data_dir(settings: Settings) -> Path | None:
    """The folder of the embedded server; None where another one is named."""
    if settings.database.url is not None:
        return None
    return (settings.database.data_dir or default_data_dir()).expanduser()


class _Patient:
    """One connection to the database, and what is known of it so far."""

    def __init__(
        self, settings: Settings, hooks: Sequence[Registered], undoable: bool, sidecar: bool, stack: AsyncExitStack
    ) -> None:
        self._settings, self._hooks, self._undoable, self._sidecar = settings, hooks, undoable, sidecar
        self._stack = stack
        self._pending = False
        self._connection: Connection
        self.row: ledger.ChainRow | None = None
        self.known = Known()

    @property
    def _tables(self) -> list[str]:
        return sorted({table for one in self._hooks for table in one.hook.tables})

    async def connected(self) -> Verdict:
        database = await self._stack.enter_async_context(open_database(self._settings, pool=False))
        self._connection = await database.connect()
        self._stack.callback(self._connection.terminate)
        row = await self._connection.fetchrow(
            """
            select current_setting('server_version_num')::int as number, current_setting('server_version') as version,
                   pg_is_in_recovery() as replica, current_setting('default_transaction_read_only')::bool as read_only
            """
        )
        assert row is not None
        where = f"Postgres {row['version']} at {shown(database.dsn)}"
        if row["number"] < _OLDEST:
            return fail(f"{where} is too old", "the indexer needs Postgres 14 or newer")
        if row["replica"] or row["read_only"]:
            return fail(f"{where} only reads", "name the primary in database.url")
        return ok(where)

    async def migrations(self) -> Verdict:
        lines = [*migration_lines(self._hooks), *(sidecar_lines() if self._sidecar else [])]
        missing = await migrations.pending(self._connection, lines)
        self._pending = bool(missing)
        if missing:
            names = ", ".join(f"{one.line}/{one.path.name}" for one in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            return warn(f"{len(missing)} to apply: {names}{more}", "`indexer run` applies them, or `indexer migrate`")
        return ok("all are applied")

    # -- rights ----------------------------------------------------------------------------------------------------

    async def rights(self) -> Verdict:
        """Try what the daemon will do, in a transaction that is rolled back."""
        lacking = [what for what, sql in await self._tries() if not await self._may(sql)]
        lacking += await self._closed_tables()
        role = await self._connection.fetchval("select current_user")
        if not lacking:
            return ok(f"{role} may do what is needed")
        reason = f"{role} may not {', '.join(lacking)}"
        making = [what for what in lacking if what.startswith("create ")]
        advice = f"grant it to {role}, as the owner of the database or of the tables"
        if lacking == making and not self._pending:
            return warn(f"{reason}; nothing has to be made now", "the next migration will need it")
        return fail(reason, advice)

    async def _tries(self) -> list[tuple[str, str]]:
        """What is to be allowed, and a statement that needs it; Postgres itself quotes the names."""
        schema = self._settings.database.schema_
        rows = await self._connection.fetch(
            """
            select name, to_regnamespace(quote_ident(name)) is null as missing,
                   format('create schema %I', name) as make_schema,
                   format('create table %I.indexer_doctor (id int)', name) as make_table
            from unnest($1::text[]) as name
            """,
            list(dict.fromkeys(["indexer", schema])),
        )
        made = [
            (f"create the schema {row['name']}", row["make_schema"]) if row["missing"]
            else (f"create tables in the schema {row['name']}", row["make_table"])
            for row in rows
        ]  # fmt: skip
        return [
            *made,
            ("make temporary tables", "create temporary table indexer_doctor (id int) on commit drop"),
            (
                "make triggers",
                """
                create temporary table indexer_doctor (id int) on commit drop;
                create function pg_temp.indexer_doctor() returns trigger language plpgsql as 'begin return null; end';
                create trigger indexer_doctor after insert on indexer_doctor
                for each statement execute function pg_temp.indexer_doctor()
                """,
            ),
            ("take advisory locks", "select pg_try_advisory_xact_lock(hashtext('indexer.doctor'), 0)"),
            ("listen", "listen indexer_doctor"),
        ]

    async def _may(self, sql: str) -> bool:
        attempt = self._connection.transaction()
        await attempt.start()
        try:
            await self._connection.execute(sql)
        except asyncpg.InsufficientPrivilegeError:
            return False
        finally:
            await attempt.rollback()
        return True

    async def _closed_tables(self) -> list[str]:
        """Rights that are missing on tables that are there: the engine's, and those that hooks declare."""
        rows = await self._connection.fetch(
            """
            with needed as (
                select to_regclass(name) as relation,
                       array['select', 'insert', 'update', 'delete']
                       || case when $2 then '{trigger}'::text[] end as wanted
                from unnest($1::text[]) as name
                union all
                select oid, array['select', 'insert', 'update', 'delete'] from pg_class
                where relnamespace = to_regnamespace('indexer') and relkind = 'r'
            )
            select relation::regclass::text as name, string_agg(privilege, ', ') as lacking
            from needed, unnest(wanted) as privilege
            where relation is not null and not has_table_privilege(relation, privilege)
            group by relation order by 1
            """,
            self._tables, self._undoable,
        )  # fmt: skip
        return [f"{row['lacking']} on {row['name']}" for row in rows]

    # -- the server ------------------------------------------------------------------------------------------------

    async def extensions(self) -> Verdict:
        there = await self._connection.fetchval(
            "select exists (select from pg_extension where extname = 'pg_stat_statements')"
        )
        wish = "pg_stat_statements is there" if there else "pg_stat_statements would show which statements are slow"
        return ok(f"none is needed; {wish}")

    async def clock(self) -> Verdict:
        before = time.time()
        theirs = await self._connection.fetchval("select extract(epoch from clock_timestamp())::float8")
        after = time.time()
        skew = theirs - (before + after) / 2
        off = max(abs(skew) - (after - before) / 2, 0.0)
        said = f"the server's clock is {abs(skew):,.2f} s {'ahead of' if skew > 0 else 'behind'} ours"
        if off > _SKEW_SECONDS:
            verdict = fail if off > _WRONG_SECONDS else warn
            return verdict(said, "set the clocks of both machines by NTP")
        return ok(said)

    async def space(self) -> Verdict:
        size = await self._connection.fetchval("select pg_database_size(current_database())")
        folder = _data_dir(self._settings)
        if folder is None:
            return ok(f"the database is {_bytes(size)}; how much room its server has can't be seen from here")
        disk = await asyncio.to_thread(shutil.disk_usage, folder)
        said = f"the database is {_bytes(size)}, {_bytes(disk.free)} of {_bytes(disk.total)} are free at {folder}"
        if disk.free < _FULL_BYTES:
            return fail(said, "make room: Postgres stops where it can't write")
        if disk.free < min(_FREE_BYTES, _FREE_SHARE * disk.total):
            return warn(said, "make room before it is full")
        return ok(said)

    async def connections(self) -> Verdict:
        row = await self._connection.fetchrow(
            """
            select current_setting('max_connections')::int as most,
                   current_setting('superuser_reserved_connections')::int
                   + coalesce(current_setting('reserved_connections', true), '0')::int as reserved,
                   (select count(*) from pg_stat_activity
                    where backend_type = 'client backend' and application_name not like 'indexer%') as others,
                   (select nullif(rolconnlimit, -1) from pg_roles where rolname = current_user) as of_role,
                   (select nullif(datconnlimit, -1) from pg_database where datname = current_database()) as of_database
            """
        )
        assert row is not None
        needed = self._settings.database.pool_size + 1 + (_SIDECAR_CONNECTIONS if self._sidecar else 0)
        limits = [row["most"] - row["reserved"] - row["others"], row["of_role"], row["of_database"]]
        free = min(limit for limit in limits if limit is not None)
        said = f"a daemon takes up to {needed}, {max(free, 0)} are left by others (max_connections {row['most']})"
        if free < needed:
            return fail(said, "lower database.pool_size, or raise the server's, role's or database's limit")
        if free < 2 * needed:
            return warn(f"{said}: too few for a standby", "lower database.pool_size, or raise max_connections")
        return ok(said)

    # -- the chain -------------------------------------------------------------------------------------------------

    async def chain(self) -> Verdict:
        name = self._settings.chain.name
        try:
            self.row = await ledger.find_chain(self._connection, name)
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            self.row = None
        if self.row is None:
            return warn(f"chain {name} is not in this database yet", "`indexer run` begins it")
        cursor = await ledger.cursor(self._connection, self.row.id)
        self.known = Known(self.row.identity, cursor.ref.number + 1)
        if self.row.source != self._settings.chain.source:
            say = f"chain {name} was begun from {self.row.source}, but chain.source is {self._settings.chain.source}"
            return fail(say, "mend chain.source, or give this chain another chain.name")
        return ok(f"chain {name} is {self.row.identity}, applied up to block {cursor.ref.number:,}")

    async def journal(self) -> Verdict:
        """The triggers by which a reorganisation can be undone, on all tables that hooks declare."""
        rows = await self._connection.fetch(
            """
            select name, to_regclass(name) is null as missing,
                   exists (select from pg_constraint where conrelid = to_regclass(name) and contype = 'p') as keyed,
                   (select count(*) from pg_trigger
                    where tgrelid = to_regclass(name) and tgname = any($2) and tgenabled in ('O', 'A')) as triggers
            from unnest($1::text[]) as name
            """,
            self._tables, _TRIGGERS,
        )  # fmt: skip
        known = await ledger.known_hooks(self._connection, self._chain.id)
        new = sorted({table for one in self._hooks if one.name not in known for table in one.hook.tables})
        keyless = [row["name"] for row in rows if not row["missing"] and not row["keyed"]]
        bare = [row["name"] for row in rows if row["missing"] or row["triggers"] < len(_TRIGGERS)]
        if keyless:
            return fail(f"no primary key: {', '.join(keyless)}", "give them one: nothing can be undone without")
        broken = [name for name in bare if name not in new]
        if broken:
            advice = "start the daemon anew: it makes missing triggers (one that is disabled: alter table ... enable)"
            return fail(f"what is written is not journalled: {', '.join(broken)}", advice)
        if bare:
            return warn(f"not journalled yet: {', '.join(bare)}", "`indexer run` makes the triggers of new hooks")
        return ok(f"{len(rows)} tables are journalled")

    @property
    def _chain(self) -> ledger.ChainRow:
        assert self.row is not None
        return self.row

    async def leader(self) -> Verdict:
        row = await ledger.standing(self._connection, self._chain.name)
        assert row is not None
        waiting = await standbys(self._connection, self._chain.id)
        seen, head = row["seen_seconds_ago"], row["head"]
        if not await is_led(self._connection, self._chain.id):
            return warn(f"none runs; the last was seen {duration(seen)} ago", "start one: indexer run")
        said = f"{row['leader']} leads, seen {seen:.0f} s ago"
        if seen > _SILENT_SECONDS:
            return fail(f"{said}: it says nothing", "look at its log and at its /livez")
        behind = max((head or 0) - row["cursor"], 0)
        lag = f", {behind:,} blocks behind" if behind else ", at the head"
        return ok(f"{said}{lag}, {f'{waiting} standing by' if waiting else 'no standby'}")

    async def failures(self) -> Verdict:
        found = await ledger.open_failures(self._connection, self._chain.id)
        halts = [one for one in found if one["policy"] == "halt"]
        if halts:
            one = halts[0]
            say = f"hook {one['hook']} halted at block {one['first']:,}: {one['error']}"
            return fail(say, f"indexer failures show {one['id']}; mend the hook or set its on_error, then start")
        if found:
            names = ", ".join(sorted({one["hook"] for one in found}))
            return warn(f"{len(found)} open, of {names}", "indexer failures list, then indexer failures retry --all")
        return ok("none is open")

    async def gaps(self) -> Verdict:
        with translated():
            found = await ledger.gaps(self._connection, self._chain.id)
        enabled = {one.name for one in self._hooks}
        missing = {
            name: sum(last - first + 1 for first, last in ranges)
            for name, ranges in found.items() if ranges and name in enabled
        }  # fmt: skip
        if missing:
            said = ", ".join(f"{name} {blocks:,} blocks" for name, blocks in missing.items())
            return warn(f"missing: {said}", "indexer gaps, then indexer gaps --fill")
        return ok("every enabled hook has applied every block")

    async def jobs(self) -> Verdict:
        try:
            found = await depth(self._connection)
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            return warn("there is no queue yet", "indexer migrate")
        workers = await sidecars(self._connection)
        counts = {state: sum(one.jobs for one in found if one.state == state) for state in ("waiting", "held")}
        said = f"{counts['waiting']:,} waiting, {counts['held']:,} held, {workers} sidecars"
        if counts["held"]:
            return warn(said, "indexer jobs list --state held, then requeue or cancel them")
        if counts["waiting"] and not workers:
            return warn(said, "start one: indexer sidecar")
        return ok(said)


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1024:
            return f"{size:,.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TB"
