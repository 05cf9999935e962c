"""Wiring: from settings to a daemon that runs, and its end. One process, one TaskGroup."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from indexer import journal, ledger, log, metrics, notify, registry
from indexer.config import Settings, SpanSettings
from indexer.db import Connection, Database, make_schema, shown
from indexer.embedded import EmbeddedPostgres, default_data_dir
from indexer.errors import ConfigError, IndexerError, UsageError, WrongNetwork, accept_hint
from indexer.follow import follow, leader_name
from indexer.migrations import SQL, migrate
from indexer.model import BlockSource
from indexer.pipeline import Pipeline, prepare
from indexer.registry import Registered
from indexer.replay import Replayer
from indexer.sources.choose import make_source
from indexer.sources.recorded import EndOfFile
from indexer.state import Role, State
from indexer.version import version
from indexer.web import Web

# A stop that takes longer than this is ended by force: the data is at a block's border all the time.
STOP_SECONDS = 4.5
_MONITOR_SECONDS = 5.0
# Of a transaction that somebody waits for.
_BRIEF_EVENTS = 500
_BRIEF_SECONDS = 0.25


@asynccontextmanager
async def open_database(settings: Settings, *, pool: bool = True) -> AsyncIterator[Database]:
    """The configured database, or an embedded server for as long as the block runs."""
    async with AsyncExitStack() as stack:
        url = settings.database.url
        if url is None:
            folder = settings.database.data_dir or default_data_dir()
            server = await stack.enter_async_context(EmbeddedPostgres(folder))
            dsn = server.dsn
            log.get().info(
                "embedded postgres", data_dir=str(server.data_dir), version=server.version, started=server.owned
            )
        else:
            dsn = url.get_secret_value()
        database = Database(dsn, settings.database)
        if pool:
            await stack.enter_async_context(database.opened())
        yield database


def migration_lines(hooks: Sequence[Registered]) -> list[tuple[str, Path]]:
    """The engine's own migrations and those that the enabled hooks bring."""
    return [("indexer", SQL), *registry.migration_lines(hooks)]


async def migrate_database(
    database: Database, hooks: Sequence[Registered], more: Sequence[tuple[str, Path]] = (), *, dry_run: bool = False
) -> list[str]:
    """Bring the database's schema up to date, with `more` lines of migrations.

    Returns the files applied (or, dry, those that would be).
    """
    connection = await database.connect()
    try:
        if not dry_run:
            await make_schema(connection, database.settings.schema_)
        applied = await migrate(connection, [*migration_lines(hooks), *more], dry_run=dry_run)
    finally:
        await connection.close()
    return [f"{one.line}/{one.name}" for one in applied]


class Parts(NamedTuple):
    """What the commands work with that stand beside a daemon."""

    hooks: tuple[Registered, ...]
    source: BlockSource
    database: Database
    chain: ledger.ChainRow


@asynccontextmanager
async def opened(settings: Settings, *, ask_node: bool) -> AsyncIterator[Parts]:
    """The parts of an indexed chain, for a command that stands beside its daemon; `ask_node` if it needs blocks.

    Raises UsageError where the database does not know the chain, WrongNetwork where the node answers for another.
    """
    hooks = registry.load_hooks(settings.hooks)
    async with AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(settings))
        async with database.acquire() as connection:
            try:
                chain = await ledger.find_chain(connection, settings.chain.name)
            except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                chain = None
        if chain is None:
            raise UsageError(f"this database knows no chain {settings.chain.name}: start it with `indexer run`")
        source = make_source(settings, span=_span_settings(settings, hooks))
        stack.push_async_callback(source.close)
        registry.check_events(hooks, source.events)
        if ask_node:
            await _check_network(source, chain)
        yield Parts(hooks, source, database, chain)


async def _check_network(source: BlockSource, chain: ledger.ChainRow) -> None:
    if (identity := await source.identity()) != chain.identity:
        raise WrongNetwork(
            f"chain {chain.name} is {chain.identity} here, but the node answers for {identity}"
            + accept_hint(chain.source, identity)
        )


@asynccontextmanager
async def _replaying(
    settings: Settings, hooks: Sequence[Registered], database: Database, chain: ledger.ChainRow
) -> AsyncIterator[Replayer]:
    """A replay in the daemon's process: on a connection and with a source of its own, as a command's is."""
    async with AsyncExitStack() as stack:
        source = make_source(settings, span=_span_settings(settings, hooks))
        stack.push_async_callback(source.close)
        await _check_network(source, chain)
        connection = await database.connect(application_name=f"{database.name} replay")
        # the right to replay ends with the session
        stack.callback(connection.terminate)
        yield Replayer(connection, chain, hooks, source, f"{leader_name()} replay")


class Beside(NamedTuple):
    """What runs in the daemon's process beside it: its migrations, and its work, given what tells it of a halt."""

    lines: Sequence[tuple[str, Path]]
    work: Callable[[Settings, Database, Callable[[], bool]], Coroutine[Any, Any, None]]


async def run(
    settings: Settings, *, started: Callable[[State, Web], None] | None = None, to_end: bool = False,
    beside: Beside | None = None,
) -> None:  # fmt: skip
    """Run the daemon until it is cancelled, or (`to_end`) until a file of blocks is applied to its end.

    Raises UsageError (2) for settings that can't work, Temporary (75) where database or node are not to be had at
    start, Halted (3) where a hook stopped it.
    """
    hooks = registry.load_hooks(settings.hooks)
    async with AsyncExitStack() as stack:
        source = make_source(settings, span=_span_settings(settings, hooks), to_end=to_end)
        stack.push_async_callback(source.close)
        registry.check_events(hooks, source.events)
        database = await stack.enter_async_context(open_database(settings))
        for name in await migrate_database(database, hooks, beside.lines if beside else ()):
            log.get().info("migration applied", file=name)
        chain = await _open_chain(settings, database, source, hooks)
        state = State(chain.name, chain.start_block)
        pipeline = Pipeline(chain, hooks, leader_name())
        await _recall_halt(database, pipeline)
        served = Web(
            settings, database, source.nodes, hooks, state, lambda: _replaying(settings, hooks, database, chain)
        )
        web = await stack.enter_async_context(served.serving())
        log.get().info(
            "started", version=version(), chain=chain.name, chain_id=chain.identity, start_block=chain.start_block,
            hooks=[one.name for one in hooks], database=shown(database.dsn), status=web.url,
        )  # fmt: skip
        if started is not None:
            started(state, web)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_monitor(database, chain.id, state, settings.http.stall_seconds), name="monitor")
                tasks.create_task(follow(database, source, pipeline, state), name="follow")
                told = notify.keep_told(lambda: _standing(state, settings.http.stall_seconds))
                tasks.create_task(told, name="notify")
                if beside is not None:
                    halted = lambda: state.role is Role.HALTED  # noqa: E731
                    tasks.create_task(beside.work(settings, database, halted), name="sidecar")
        except ExceptionGroup as group:
            first = group.exceptions[0]
            if not isinstance(first, EndOfFile):
                raise first from first.__cause__
            log.get().info("end of file", chain=chain.name, block=state.cursor, file=str(settings.chain.file))
        finally:
            if state.role is not Role.HALTED:
                state.became(Role.STOPPING)


def _span_settings(settings: Settings, hooks: Sequence[Registered]) -> SpanSettings:
    """The limits of a span, which are tighter where somebody waits for a hook's transactions."""
    span = settings.span
    if not any(getattr(one.hook, "brief", False) for one in hooks):
        return span
    return span.model_copy(
        update={"max_events": min(span.max_events, _BRIEF_EVENTS), "max_seconds": min(span.max_seconds, _BRIEF_SECONDS)}
    )


async def _open_chain(
    settings: Settings, database: Database, source: BlockSource, hooks: Sequence[Registered]
) -> ledger.ChainRow:
    """Compare the network, the start block and the database's memory of both."""
    identity = await source.identity()
    wanted = settings.chain.chain_id
    if wanted is not None and wanted != identity:
        raise WrongNetwork(
            f"chain.chain_id is {wanted}, but the node answers for chain {identity}: which is right?"
            + accept_hint(settings.chain.source, identity)
        )
    start = settings.chain.start_block
    start = source.first_block if start is None else start
    async with database.acquire() as connection:
        known = await ledger.find_chain(connection, settings.chain.name)
        if known is None:
            newest = (await source.heads()).newest
            if start > newest:
                raise UsageError(f"the start block {start} is above the chain's head {newest}: lower chain.start_block")
            if source.instant and start < source.first_block:
                raise UsageError(f"there is no block before {source.first_block}: raise chain.start_block from {start}")
        chain = await ledger.open_chain(connection, settings.chain.name, settings.chain.source, identity, start)
        if chain.start_block != start:
            log.get().warning(
                "start block differs", configured=start, used=chain.start_block,
                why="the database was started with it; another start needs another chain.name or database",
            )  # fmt: skip
        await ledger.register_hooks(connection, chain.id, [one.name for one in hooks])
        for one in hooks:
            await prepare(connection, one.hook)
        if not source.instant:
            await _watch_tables(connection, hooks)
    metrics.build.info({"version": version(), "chain": chain.name, "source": chain.source})
    # there from the start, so that the first one is seen as a change
    metrics.reorgs_total.labels(chain.name)
    metrics.reorg_depth.labels(chain.name)
    return chain


async def _watch_tables(connection: Connection, hooks: Sequence[Registered]) -> None:
    """Have the tables that hooks declare journalled, while blocks can still be reorganised."""
    for one in hooks:
        try:
            await journal.watch(connection, one.hook.tables)
        except asyncpg.UndefinedTableError as error:
            raise ConfigError(f"hook {one.name} declares a table that is not there: {error}") from None
        except (asyncpg.RaiseError, asyncpg.InsufficientPrivilegeError) as error:
            raise ConfigError(f"hook {one.name}: {error}") from None


async def _recall_halt(database: Database, pipeline: Pipeline) -> None:
    """Say at once why the last run stopped, if a hook stopped it: the same block is tried again now."""
    async with database.acquire() as connection:
        halts = [one for one in await ledger.open_failures(connection, pipeline.chain.id) if one["policy"] == "halt"]
    for halt in halts:
        pipeline.halted_at = halt["first"] if pipeline.halted_at is None else min(pipeline.halted_at, halt["first"])
        metrics.halted.labels(pipeline.chain.name, halt["hook"]).set(1)
        log.get().warning(
            "halted before", chain=pipeline.chain.name, block=halt["first"], hook=halt["hook"], error=halt["error"],
            at=halt["failed_at"].isoformat(timespec="seconds"), now="trying this block again",
        )  # fmt: skip


async def _monitor(database: Database, chain: int, state: State, stall_seconds: float) -> None:
    """Refresh what only the database or the clock knows: gaps, pool, stall."""
    told = False
    while True:
        metrics.stalled_seconds.labels("fetch").set(state.stalled_seconds if state.waiting_on == "fetch" else 0)
        metrics.stalled_seconds.labels("write").set(state.stalled_seconds if state.waiting_on == "write" else 0)
        metrics.lag_seconds.labels(state.chain).set(state.lag_seconds)
        database.publish()
        try:
            async with database.acquire() as connection:
                state.gaps = await ledger.gaps(connection, chain)
                state.journal_rows = await journal.journal_rows(connection, chain)
                metrics.journal_rows.labels(state.chain).set(state.journal_rows)
        except IndexerError:
            pass  # the follower says what is wrong with the database
        for hook, ranges in state.gaps.items():
            metrics.gap_blocks.labels(hook).set(sum(last - first + 1 for first, last in ranges))
        told = _tell_stall(state, stall_seconds, told)
        await asyncio.sleep(_MONITOR_SECONDS)


def _tell_stall(state: State, stall_seconds: float, told: bool) -> bool:
    """Log once a stall what every task waits for, and once that it is over; returns whether one has been told of."""
    if not state.stalled(stall_seconds):
        if told:
            log.get().info("stalled: over", chain=state.chain, block=state.cursor)
        return False
    if not told:
        tasks = {task.get_name(): _waits_at(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        log.get().error(
            "stalled", chain=state.chain, block=state.cursor, lag_blocks=state.lag_blocks, on=state.waiting_on,
            seconds=round(state.stalled_seconds, 1), tasks=tasks,
        )  # fmt: skip
    return True


def _standing(state: State, stall_seconds: float) -> notify.Standing:
    """For systemd: what /readyz and /livez answer, and where the daemon is."""
    at = f"{state.role} at block {state.cursor}, lag {state.lag_blocks} blocks, {state.lag_seconds:.0f} s"
    stalled = state.stalled(stall_seconds)
    why = f"stalled for {state.stalled_seconds:.0f} s, waiting on {state.waiting_on}" if stalled else state.reason
    return notify.Standing(state.ready(stall_seconds), not stalled, f"{at}: {why}" if why else at)


def _waits_at(task: asyncio.Task[object]) -> str:
    """Where a task waits: its innermost coroutines, innermost last."""
    places: list[str] = []
    awaited: object = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "ag_frame", None)
        if frame is not None:
            places.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "ag_await", None)
    return " > ".join(places[-4:])


def _calm_garbage_collection() -> None:
    """Look for cycles less often: what a span allocates lives until its commit and holds none.

    With Python's defaults the collector walks a span's hundred thousand objects again and again, an eighth of the time.
    """
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)


def serve(main: Callable[[], object], stop_seconds: float = STOP_SECONDS) -> int:
    """Run the coroutine function `main` until it ends or a signal comes; returns the exit code 0.

    SIGTERM and SIGINT just cancel: nothing needs repair, since every moment is a block's border. A second signal, or a
    stop that takes longer than `stop_seconds`, ends the process at once.
    """
    _calm_garbage_collection()
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None
    try:
        import uvloop

        loop_factory = uvloop.new_event_loop
    except ImportError:
        loop_factory = None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_until_signalled(main, stop_seconds))


async def _until_signalled(main: Callable[[], object], stop_seconds: float) -> int:
    loop = asyncio.get_running_loop()
    task: asyncio.Task[object] = asyncio.ensure_future(main())  # type: ignore[call-overload]
    signals: list[int] = []

    def stop(number: int) -> None:
        if signals:
            os._exit(0)
        signals.append(number)
        log.get().info("stopping", signal=signal.Signals(number).name)
        task.cancel()
        loop.call_later(stop_seconds, os._exit, 0)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not signals:
            raise
        log.get().info("stopped")
    return 0
