"""Random histories: a chain that forks, a node that lies, a daemon that dies; at the end every row must be right.

    python tests/chaos.py --seconds 600          # as `make chaos SECONDS=600`
    python tests/chaos.py --seed 17 --histories 1

The daemon is the real one from `follow` down, on a real Postgres; the node's answers reach it without a socket, and all
pauses are short, so that a history takes a fraction of a second. The same seed tells the same history, but for what the
clock decides: at which moment of the daemon's work each blow falls.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import asyncpg
import structlog
import uvloop
from chaoskit import CONTRACT, LOGS, PLAYS, Session, hasty, misfortune
from oracle import Oracle, dump

from hooks.aggregates import Aggregates
from hooks.milestones import Milestones
from hooks.plays import Plays
from indexer import journal, ledger, metrics
from indexer.config import ChainSettings, DatabaseSettings, EndpointSettings, HookSettings, SpanSettings
from indexer.db import Connection, Database
from indexer.fakechain import FakeBlock, FakeChain, FakeLog, FakeNode
from indexer.follow import follow
from indexer.model import Block, BlockRef, Event
from indexer.pipeline import Pipeline
from indexer.pytest_plugin import SESSION, Databases, server
from indexer.registry import Registered
from indexer.sources.evm import EvmSource
from indexer.sources.wire import to_bytes
from indexer.state import State
from indexer.testing import crash_point

HOOKS = tuple(Registered(one, HookSettings()) for one in (Plays(), Aggregates(), Milestones()))
OWNERS = {1: 11, 2: 12}
QUIET_SECONDS = 20.0  # in which a daemon that is left alone must have caught up


class ChaosDatabase(Database):
    """Hands out writers whose connection breaks off at some statement, now and then."""

    def __init__(self, dsn: str, chance: random.Random) -> None:
        super().__init__(dsn, DatabaseSettings.model_validate({"pool_size": 2}))
        self.chance, self.doomed = chance, 0.0

    async def writer(self) -> Connection:
        connection = await super().writer()
        if self.chance.random() < self.doomed:
            when = self.chance.choice(("before", "after"))
            crash_point(connection, self.chance.randint(2, 80), when).__enter__()
        return connection


class History:
    """One random history. `story` is what happened, to be printed if it ends badly."""

    def __init__(
        self, database: ChaosDatabase, connection: asyncpg.Connection, seed: int, lag: int | None = None
    ) -> None:
        self.database, self.connection, self.seed = database, connection, seed
        self.chance = random.Random(seed)
        self.lag = lag or self.chance.randint(2, 8)
        self.chain = FakeChain(final_lag=self.lag, block_seconds=1)
        self.node = FakeNode(self.chain, supports_finalized=self.chance.random() < 0.7)
        self.final = 0  # no fork goes below
        self.story: list[str] = []
        self.daemons: list[asyncio.Task[None]] = []
        self.states: list[State] = []

    async def run(self) -> None:
        await self._clean()
        with hasty(self.chance.choice((0.002, 0.02, 1.0))):
            try:
                await self.blows()
                await self._calm_down()
            finally:
                await self.stop()
        await self._compare()

    async def blows(self) -> None:
        chance = self.chance
        self.database.chance, self.database.doomed = chance, chance.choice((0.0, 0.3, 0.6))
        self.mine(chance.randint(1, 6))
        self.start()
        for _ in range(chance.randint(3, 8)):
            await self._something()
            await self._while(chance.choice((0, 0.002, 0.01, 0.5, 0.5)))

    async def _while(self, seconds: float) -> None:
        """Let the daemon work for so long, or until it is at the head: the next blow is to fall on something."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not any(one.cursor == self.chain.head.number for one in self.states):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    # -- what happens ----------------------------------------------------------------------------------------------

    async def _something(self) -> None:
        blows: list[tuple[int, Callable[[], Any]]] = [
            (8, lambda: self.mine(self.chance.randint(1, 4))),
            (9, self._fork),
            (6, self._lie),
            (3, self._kill_backend),
            (2, self._kill_daemon),
            (2, self._mine_while_away),
            (1, self._second_daemon),
        ]
        [blow] = self.chance.choices([blow for _, blow in blows], [weight for weight, _ in blows])
        done = blow()
        if done is not None:
            await done

    def _note(self, what: str) -> None:
        self.story.append(f"{what} (head {self.chain.head.number})")

    def _block(self) -> list[list[FakeLog]]:
        many = self.chance.choice((0, 0, 1, 2, 3, 6))
        return [[self.chance.choice(LOGS)] for _ in range(many)]

    def mine(self, blocks: int) -> None:
        for _ in range(blocks):
            self.chain.mine(*self._block())
        self._finalise()
        self._note(f"mined {blocks}")

    def _finalise(self) -> None:
        self.final = max(self.final, self.chain.head.number - self.lag)

    def _fork(self) -> None:
        deepest = self.chain.head.number - self.final
        if deepest:
            depth = self.chance.choice((1, deepest, self.chance.randint(1, deepest)))
            self.fork(depth, max(0, depth + self.chance.choice((-2, -1, 0, 0, 1, 1, 2, 5))))

    def fork(self, depth: int, blocks: int) -> None:
        blocks = max(blocks, 1 + depth - self.chain.head.number)  # a chain that ends before the start block is none
        # some of what was there comes again, at another place
        again = [list(map(list, block.transactions)) for block in self.chain.blocks[-depth:]]
        new = [self.chance.choice(again) if self.chance.random() < 0.4 else self._block() for _ in range(blocks)]
        self.chain.fork(depth, new)
        self._finalise()
        self._note(f"forked {depth} for {blocks}")

    def _lie(self) -> None:
        self.node.faults = [*self.node.faults[-2:], misfortune(self.chance, self.lag)]
        self._note("lied")

    async def _kill_backend(self) -> None:
        self._note("killed the backend")
        await self.connection.execute(
            """
            select pg_terminate_backend(pid) from pg_stat_activity
            where datname = current_database() and application_name = 'indexer writer'
            """
        )

    async def _kill_daemon(self) -> None:
        self._note("killed the daemon")
        await self.stop()
        self.start()

    async def _mine_while_away(self) -> None:
        """Forks and more blocks while nobody looks: perhaps so many that the fork is final by then."""
        self._note("went away")
        await self.stop()
        self._fork()
        self.mine(self.chance.choice((0, 1, 3, 2 * self.lag)))
        self.start()

    def _second_daemon(self) -> None:
        if len(self.daemons) < 2:
            self._note("started another daemon")
            self.start()

    # -- the daemon ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self.daemons.append(asyncio.create_task(self._daemon()))

    async def _daemon(self) -> None:
        settings = ChainSettings(
            endpoints=[EndpointSettings.model_validate({"url": "http://node", "name": "node"})], poll_seconds=0.002,
            confirmations=self.lag, requests_in_flight=self.chance.choice((1, 4)),
        )  # fmt: skip
        source = EvmSource(settings, [], SpanSettings(max_events=self.chance.choice((5, 5000))))
        await source.endpoints._session.close()
        for endpoint in source.endpoints.all:
            endpoint._session = Session(self.node)
        source.endpoints._session = Session(self.node)
        pipeline, state = Pipeline(self.row, HOOKS, "chaos"), State("main", 1)
        self.states.append(state)
        try:
            await follow(self.database, source, pipeline, state)
        finally:
            await source.close()

    async def stop(self) -> None:
        daemons, self.daemons, self.states = self.daemons, [], []
        failed = [one for one in daemons if one.done()]
        for one in daemons:
            one.cancel()
        await asyncio.gather(*daemons, return_exceptions=True)
        for one in failed:
            one.result()

    # -- its end ---------------------------------------------------------------------------------------------------

    async def _clean(self) -> None:
        await self.connection.execute(
            """
            delete from plays; delete from aggregate_plays; delete from aggregate_monthly_plays;
            delete from hourly_play_counts; delete from milestones; delete from notification;
            delete from indexer.journal; delete from indexer.block; delete from indexer.coverage;
            delete from indexer.failure; delete from indexer.cursor;
            """
        )
        self.row = await ledger.open_chain(self.connection, "main", "evm", "31337", 1)
        await ledger.register_hooks(self.connection, self.row.id, [one.name for one in HOOKS])
        for one in HOOKS:
            await journal.watch(self.connection, one.hook.tables)

    async def _calm_down(self) -> None:
        """No more blows: the daemon is to arrive at the chain's head."""
        self.node.faults.clear()
        self.database.doomed = 0.0
        self.mine(1)  # a chain that only lost its newest blocks can't be told from a node that lags
        self._note("quiet")
        await self.arrive()

    async def arrive(self) -> None:
        """Wait until the daemon is at the chain's head."""
        deadline, head = time.monotonic() + QUIET_SECONDS, self.chain.head.ref
        while not await self._arrived(head):
            for one in self.daemons:
                if one.done():
                    one.result()
            assert time.monotonic() < deadline, "the daemon did not arrive at the head"
            await asyncio.sleep(0.002)

    async def _arrived(self, head: BlockRef) -> bool:
        # the database is busy enough: it is asked once a daemon believes to be there
        believed = any(state.cursor == head.number for state in self.states)
        return believed and (await ledger.cursor(self.connection, self.row.id)).ref == head

    async def _compare(self) -> None:
        expected = Oracle(self.row.id, OWNERS).apply(self._canonical()).dump()
        found = await dump(self.connection)
        for table, rows in expected.items():
            missing = [row for row in rows if row not in found[table]]
            surplus = [row for row in found[table] if row not in rows]
            assert found[table] == rows, f"{table}: missing {missing[:3]}, surplus {surplus[:3]}"
        gaps = await ledger.gaps(self.connection, self.row.id)
        assert gaps == {one.name: [] for one in HOOKS}, f"holes: {gaps}"

    def _canonical(self) -> list[Block]:
        return [
            Block(block.number, block.hash, block.parent_hash, block.timestamp, tuple(_events(block)))
            for block in self.chain.blocks[1:]
        ]


def _events(block: FakeBlock) -> Iterator[Event]:
    made = [log for tx in block.transactions for log in tx]
    for log, mined in zip(block.logs, made, strict=True):
        yield Event(int(log["logIndex"], 16), "Played", PLAYS[mined], CONTRACT, to_bytes(log["transactionHash"]))


class WrongRow(AssertionError):
    pass


@asynccontextmanager
async def prepared(url: str) -> AsyncIterator[tuple[ChaosDatabase, asyncpg.Connection]]:
    connection = await asyncpg.connect(url, server_settings=SESSION)
    try:
        await connection.executemany(
            "insert into tracks (track_id, owner_id, created_at) values ($1, $2, now()) on conflict do nothing",
            list(OWNERS.items()),
        )
        async with ChaosDatabase(url, random.Random(0)).opened() as database:
            yield database, connection  # type: ignore[misc]
    finally:
        await connection.close(timeout=5)


async def histories(url: str, first_seed: int, *, number: int = 10**9, seconds: float = 10**9) -> int:
    """Run histories with the seeds from `first_seed` on, so many or for so long; how many ran. Raises WrongRow."""
    started, ran = time.monotonic(), 0
    async with prepared(url) as (database, connection):
        while ran < number and time.monotonic() - started < seconds:
            history = History(database, connection, first_seed + ran)
            try:
                await asyncio.wait_for(history.run(), 3 * QUIET_SECONDS)
            except Exception as error:
                told = "\n".join(f"  {line}" for line in history.story)
                raise WrongRow(f"seed {history.seed}: {type(error).__name__}: {error}\n{told}") from error
            ran += 1
            if ran % 100 == 0:
                await connection.execute("vacuum")
    return ran


def reorgs() -> float:
    """How many were undone in this process."""
    return metrics.registry.get_sample_value("indexer_reorgs_total", {"chain": "main"}) or 0.0


def quiet() -> None:
    """What goes wrong is on purpose: no log of it."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(os.environ.get("CHAOS_SEED") or random.randrange(10**9)))
    parser.add_argument("--histories", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=10**9)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--database", help="address of a migrated database, for a worker")
    asked = parser.parse_args()
    quiet()
    if asked.database:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            ran = runner.run(histories(asked.database, asked.seed, number=asked.histories, seconds=asked.seconds))
        print(ran, int(reorgs()), sep="\n")
        return 0
    with server() as address, ExitStack() as stack:
        databases = Databases(address)
        stack.callback(databases.drop_templates)
        urls = [stack.enter_context(databases.migrated(["hooks.plays:plays"])) for _ in range(asked.workers)]
        return run_workers(urls, asked.seed, asked.histories, asked.seconds)


def run_workers(urls: Sequence[str], seed: int, number: int, seconds: float) -> int:
    """A process for each database; prints what they did, and returns how many of them failed."""
    print(f"CHAOS_SEED={seed}", flush=True)
    started, each = time.monotonic(), -(-number // len(urls))
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, "--database", url, "--seed", str(seed + n * 1_000_000),
             "--histories", str(each), "--seconds", str(seconds)],
            stdout=subprocess.PIPE, text=True,
        )
        for n, url in enumerate(urls)
    ]  # fmt: skip
    try:
        said = [worker.communicate()[0] for worker in workers]
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                worker.kill()
    failed = sum(worker.returncode != 0 for worker in workers)
    ran, undone = (sum(int(text.split()[place]) for text in said if text.strip()) for place in (0, 1))
    passed = time.monotonic() - started
    print(
        f"{ran} histories in {passed:.1f} s, {ran / passed:.1f} a second; {undone} reorganisations undone", flush=True
    )
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
