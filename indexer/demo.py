"""`indexer demo`: an embedded Postgres, a local chain, plays arriving, daemon and sidecar, and pages to look at."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from indexer import app, log
from indexer.config import LogSettings, Settings, shown_url
from indexer.db import Database
from indexer.demochain import PLAY_REGISTRY, DemoChain, local_chain
from indexer.demolisteners import DemoListeners, archived, demo_listeners
from indexer.embedded import EmbeddedPostgres
from indexer.errors import DatabaseUnavailable, UsageError
from indexer.sources.choose import make_source
from indexer.state import State

if TYPE_CHECKING:
    import asyncpg

    from indexer.web import Web

HOOKS = ["hooks.plays:plays", "hooks.aggregates:aggregates", "hooks.milestones:milestones"]
# on a Core chain there are people and tracks, too; who owns a track is known before a milestone of it is told
CORE_HOOKS = [
    "hooks.entities:entities", *HOOKS, "hooks.listeners:listeners", "hooks.challenges:challenges",
]  # fmt: skip
NETWORKS = {"audius": "https://rpc.audius.co"}
_PLAIN_SECONDS = 2.0
_NEAR_BLOCKS = 3
# how far back a real chain is followed by default
_RECENT_BLOCKS = 1_000
_RECENT_CORE_BLOCKS = 300


class Options(msgspec.Struct, frozen=True):
    """What the command line said."""

    seconds: float | None
    chain: str
    rpc: str | None
    contract: str | None
    start_block: int | None
    data_dir: Path | None
    port: int
    network: str | None = None


class _Running:
    """What is shown once the daemon runs."""

    def __init__(self, listeners: DemoListeners | None) -> None:
        self.listeners = listeners
        self.state: State | None = None
        self.url = ""
        self.ready = asyncio.Event()


def main(options: Options) -> int:
    """Run the demo; returns the exit code. Raises UsageError for options that don't fit together."""
    if options.chain not in ("auto", "anvil", "simulated"):
        raise UsageError(f'--chain "{options.chain}" is not known: anvil, simulated or auto')
    if options.network is not None and options.network not in NETWORKS:
        raise UsageError(f'--network "{options.network}" is not known: {", ".join(NETWORKS)}')
    if options.network is not None and options.contract is not None:
        raise UsageError("--contract is of an EVM chain, and --network is another one: leave out one of them")
    if options.network is None and (options.rpc is None) != (options.contract is None):
        raise UsageError("--rpc and --contract go together: the node's address and that of a PlayRegistry contract")
    if options.rpc is not None and not options.rpc.startswith(("http://", "https://")):
        raise UsageError("--rpc is the address of a node, and begins with http:// or https://")
    # a node that can't be reached is said once, by the error that ends us
    log.configure(LogSettings(level="error", format="console"))
    return app.serve(lambda: _demo(options))


async def _demo(options: Options) -> None:
    async with AsyncExitStack() as stack:
        _print("Looking for a chain ...")
        chain = await stack.enter_async_context(_chain(options))
        # the summary is what is looked at here; of the log only what is wrong
        log.configure(LogSettings(level="warning", format="console"))
        data_dir = options.data_dir
        if data_dir is None:
            data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="indexer-demo-"))) / "postgres"
        _print(f"Starting Postgres in {data_dir} ...")
        server = await stack.enter_async_context(EmbeddedPostgres(data_dir))
        _print(f"Postgres {server.version}; {chain.description}")
        listeners = None
        if options.network is None and options.rpc is None:  # beside a real chain nothing is made up
            listeners = await stack.enter_async_context(demo_listeners(fixed_port=options.port != 0))
        await _together(_settings(options, chain, server.dsn, listeners), chain, listeners, options.seconds)


def _settings(options: Options, chain: DemoChain, dsn: str, listeners: DemoListeners | None) -> Settings:
    contract = {"name": "PlayRegistry", "address": chain.contract, "abi": PLAY_REGISTRY, "events": ["Played"]}
    given: dict[str, Any] = {
        "database": {"url": dsn},
        "chain": {
            "name": "demo", "source": "evm" if chain.contract else "core",
            "endpoints": [{"url": chain.url, "ws": chain.ws_url, "name": chain.name}],
            "start_block": chain.start_block,
        },
        "contracts": [contract] if chain.contract else [],
        "hooks": {"enabled": HOOKS if chain.contract else CORE_HOOKS},
        "http": {"port": options.port},
    }  # fmt: skip
    if listeners is not None:
        given |= listeners.sections
    return Settings(**given)


async def _together(
    settings: Settings, chain: DemoChain, listeners: DemoListeners | None, seconds: float | None
) -> None:
    """The daemon, the plays and the summary, until one fails, the time is over or we are cancelled."""
    running = _Running(listeners)

    def started(state: State, web: Web) -> None:
        running.state, running.url = state, web.url
        running.ready.set()

    tasks = [
        asyncio.create_task(app.run(settings, started=started, beside=listeners.beside if listeners else None)),
        asyncio.create_task(chain.play()),
        asyncio.create_task(_show(settings, running)),
    ]
    if listeners is not None:
        tasks.append(asyncio.create_task(_announce(listeners, running)))
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks[1:]:
            task.cancel()
        await asyncio.gather(*tasks[1:], return_exceptions=True)
        tasks[0].cancel()
        await asyncio.gather(tasks[0], return_exceptions=True)
        if running.state is not None:
            with suppress(Exception):
                async with asyncio.timeout(2):
                    await _say_goodbye(settings, listeners is not None)


@asynccontextmanager
async def _chain(options: Options) -> AsyncIterator[DemoChain]:
    if options.network is not None:
        url = options.rpc or NETWORKS[options.network]
        newest, first = await _core_blocks(url)
        recent = max(first, newest - _RECENT_CORE_BLOCKS)
        begin = recent if options.start_block is None else options.start_block
        description = f"the Open Audio Core chain from block {begin:,} on, by {shown_url(url)}"
        yield DemoChain(options.network, description, url, None, "", begin)
        return
    if options.rpc is None or options.contract is None:
        async with local_chain(options.chain) as chain:
            yield chain
        return
    start = options.start_block
    if start is None:
        from indexer.devchain import DevClient

        async with DevClient(options.rpc) as client:
            start = max(0, await client.block_number() - _RECENT_BLOCKS)
    yield DemoChain("node", "a real chain, from your node", options.rpc, None, options.contract, start)


async def _core_blocks(url: str) -> tuple[int, int]:
    """The newest block of a Core chain and its first; raises RpcUnavailable where its node does not answer in time."""
    source = make_source(Settings(chain={"source": "core", "endpoints": [{"url": url}]}))
    try:
        await source.identity()
        return (await source.heads()).newest, source.first_block
    finally:
        await source.close()


async def _facts(connection: asyncpg.Connection[Any]) -> dict[str, Any]:
    plays, tracks, milestones = await connection.fetchrow(  # type: ignore[misc]
        """
        select (select count(*) from plays), (select count(*) from aggregate_plays), (select count(*) from milestones)
        """
    )
    top = await connection.fetch(
        "select play_item_id, count from aggregate_plays order by count desc, play_item_id limit 5"
    )
    last = await connection.fetch(
        "select id, threshold, slot from milestones order by timestamp desc, threshold desc limit 5"
    )
    return {"plays": plays, "tracks": tracks, "milestones": milestones, "top": top, "last": last}


async def _announce(listeners: DemoListeners, running: _Running) -> None:
    """Let people listen once the chain is caught up with, for both at once take longer; and tell where to look."""
    await running.ready.wait()
    assert running.state is not None
    while running.state.cursor < max(1, running.state.heads.newest - _NEAR_BLOCKS):  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    listeners.begin.set()
    await listeners.ready.wait()
    _print(f"Listening page: {listeners.url} (Connect with Spotify: a stand-in asks who you are)")
    await asyncio.Event().wait()


async def _show(settings: Settings, running: _Running) -> None:
    """The live summary: a picture on a terminal, a plain line now and then elsewhere."""
    console = Console()
    database = Database(_dsn(settings), settings.database, name="indexer demo")
    await running.ready.wait()
    assert running.state is not None
    _print(f"Status page: {running.url}")
    connection = await database.connect()
    try:
        if not console.is_terminal:
            while True:
                _print(_line(running.state, await _facts(connection)))
                await asyncio.sleep(_PLAIN_SECONDS)
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while True:
                live.update(_picture(running, await _facts(connection)))
                await asyncio.sleep(0.5)
    finally:
        connection.terminate()


def _line(state: State, facts: dict[str, Any]) -> str:
    blocks, events = state.rates
    return (
        f"head {state.heads.newest}  cursor {state.cursor}  lag {state.lag_blocks}  {blocks:.1f} blocks/s  "
        f"{events:.1f} events/s  plays {facts['plays']:,}  tracks {facts['tracks']:,}  "
        f"milestones {facts['milestones']:,}"
    )


def _picture(running: _Running, facts: dict[str, Any]) -> Group:
    assert running.state is not None
    tables = Table.grid(padding=(0, 4))
    top, last = Table(title="Top tracks"), Table(title="Last milestones")
    for column in ("track", "plays"):
        top.add_column(column, justify="right")
    for column in ("track", "plays", "block"):
        last.add_column(column, justify="right")
    for row in facts["top"]:
        top.add_row(f"{row['play_item_id']:,}", f"{row['count']:,}")
    for row in facts["last"]:
        last.add_row(f"{row['id']:,}", f"{row['threshold']:,}", f"{row['slot']:,}")
    tables.add_row(top, last)
    listening = f"   Listening page: {running.listeners.url}" if running.listeners else ""
    hint = Text(f"Status page: {running.url}{listening}   Ctrl-C ends the demo", style="dim")
    return Group(Text(_line(running.state, facts)), tables, hint)


async def _say_goodbye(settings: Settings, listened: bool) -> None:
    """What was indexed, by nothing but the database."""
    database = Database(_dsn(settings), settings.database, name="indexer demo")
    connection = await database.connect()
    try:
        facts = await _facts(connection)
        blocks = await connection.fetchval(
            "select number - start_block + 1 from indexer.cursor join indexer.chain on chain.id = cursor.chain"
        )
        plays, people = await archived(connection) if listened else (0, 0)
    finally:
        connection.terminate()
    if listened:
        _print(f"Archived {plays:,} plays of {people} listeners.")
    _print(
        f"Indexed {blocks:,} blocks: {facts['plays']:,} plays of {facts['tracks']:,} tracks, "
        f"{facts['milestones']:,} milestones."
    )


def _dsn(settings: Settings) -> str:
    if settings.database.url is None:
        raise DatabaseUnavailable("the demo has no database")
    return settings.database.url.get_secret_value()


def _print(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stdout, flush=True)
