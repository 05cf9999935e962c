"""The endpoints of a chain: the healthiest is asked, one that fails is rested. The world's trouble is retried here.

A piece of work that must not mix two nodes' answers is one function of one endpoint, given to `Endpoints.run`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

import aiohttp

from indexer import log
from indexer.config import ChainSettings, EndpointSettings
from indexer.errors import RpcUnavailable, WrongNetwork, accept_hint
from indexer.sources.endpoint import Endpoint, Impossible, RpcTrouble
from indexer.sources.provider_errors import Kind, Trouble

T = TypeVar("T")

# Rest after the n-th failure in a row: at once somewhere else, then doubling.
_FIRST_REST_SECONDS = 0.1
_LONGEST_REST_SECONDS = 15.0
_RATE_REST_SECONDS = 0.5  # at least, where the provider names no time
_BEHIND_REST_SECONDS = 1.0  # at most: the block is about to come
_BILLING_REST_SECONDS = 60.0  # at first, since a gateway's 403 may be a mishap; then doubling
_LONGEST_BILLING_REST_SECONDS = 600.0
_WRONG_CHAIN_REST_SECONDS = 600.0
# Behind the best head by more blocks than this, an endpoint lags.
_LAG_BLOCKS = 10
_LAG_REST_SECONDS = 20.0
# Answers that differ by less do not make one endpoint quicker than another.
_LATENCY_STEP_SECONDS = 0.05
# After so many failures in a row, an endpoint has nothing to say about the network any more.
_SILENT_FAILURES = 5


class Newest(Protocol):
    """A node's newest block, in the terms of its protocol."""

    @property
    def height(self) -> int: ...


E = TypeVar("E", bound=Endpoint)
N = TypeVar("N", bound=Newest)


class Endpoints(Generic[E, N]):
    """All endpoints of a chain, in order of preference. `chain_id`: the network that they must be of, once known.

    `make` makes one, `identify` asks it for its network's id, `newest` for its newest block (and notes that there).
    `renamed`: such a chain may start anew under another id, so that no endpoint is of ours any more: WrongNetwork.
    """

    def __init__(
        self,
        settings: ChainSettings,
        make: Callable[[EndpointSettings, aiohttp.ClientSession, float], E],
        identify: Callable[[E], Awaitable[str]],
        newest: Callable[[E], Awaitable[N]],
        *,
        renamed: bool = False,
    ) -> None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=True)
        self.all = [make(one, self._session, settings.request_timeout_seconds) for one in settings.endpoints]
        self.chain_id = settings.chain_id
        self._identify, self._newest, self._renamed = identify, newest, renamed
        self._source = settings.source
        self._patience = settings.connect_timeout_seconds
        self._thinned = log.Thinned()
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._probed_at = time.monotonic()

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    # -- work ------------------------------------------------------------------------------------------------------

    def best(self, need: int = sys.maxsize) -> E:
        """The endpoint to ask next: one that does not rest and is not in doubt, the quickest, the first in order.

        `need`: a block that it must not have pruned; raises RpcUnavailable where all of them have.
        """
        able = [one for one in self.all if one.earliest <= need]
        if not able:
            have = ", ".join(f"{one.name} from {one.earliest} on" for one in self.all)
            raise RpcUnavailable(
                f"no node has block {need} any more ({have}): name one that keeps all blocks in chain.endpoints, or "
                "begin at a later chain.start_block in another database"
            )
        return min(able, key=lambda one: (one.resting, one.doubted, int(one.latency / _LATENCY_STEP_SECONDS)))

    async def run(self, work: Callable[[E], Awaitable[T]], need: int = sys.maxsize) -> T:
        """Run `work` on the best endpoint, and on the next one if that fails, until one has done it.

        Waits while all of them rest, and tries for ever: the daemon's stall is then plain to see. Only if none of
        them can ever give what is asked (a RANGE trouble that `work` could not make smaller, or the block `need` is
        pruned), raises RpcUnavailable; and WrongNetwork where the chain was `renamed`.
        """
        refusals = 0
        while True:
            endpoint = await self._next(need)
            started = time.monotonic()
            try:
                await self._check_chain(endpoint)
                result = await self.ask(endpoint, work)
            except RpcTrouble as failed:
                self._rest(failed, started)
                refusals += failed.trouble.kind is Kind.RANGE and failed.trouble.retry_after is None
                if refusals > len(self.all):
                    raise RpcUnavailable(f"{failed}: no endpoint gives what is asked of it") from None
            else:
                if endpoint.failures:
                    self._thinned.over("endpoint rested", about=endpoint.name, endpoint=endpoint.name)
                if started >= endpoint.rested_at:  # else it was asked before what it rests for
                    endpoint.well()
                return result

    async def ask(self, endpoint: E, work: Callable[[E], Awaitable[T]]) -> T:
        """Run `work` on this endpoint once; raises RpcTrouble, also for what the checks find impossible."""
        try:
            return await work(endpoint)
        except Impossible as error:
            raise endpoint.failed("answer", Trouble(Kind.TRANSIENT, str(error)), "invalid") from None

    async def _next(self, need: int = sys.maxsize) -> E:
        endpoint = self.best(need)
        while pause := endpoint.resting:
            self._check_renamed()
            await asyncio.sleep(pause)
            endpoint = self.best(need)  # another may be well by now, or this one rest longer
        for one in self.all:
            if one.doubted and not one.resting and one is not endpoint:
                self.background(f"revive {one.name}", self._revive(one))
        return endpoint

    def _rest(self, failed: RpcTrouble, started: float) -> None:
        endpoint, trouble = failed.endpoint, failed.trouble
        # requests that were under way together fail together, which is one failure
        endpoint.failures += endpoint.failures == 0 or started >= endpoint.rested_at
        doublings = 2 ** min(endpoint.failures - 1, 10)
        seconds = min(_FIRST_REST_SECONDS * doublings, _LONGEST_REST_SECONDS)
        if trouble.kind is Kind.BILLING:
            seconds = min(_BILLING_REST_SECONDS * doublings, _LONGEST_BILLING_REST_SECONDS)
        elif trouble.retry_after:
            seconds = max(trouble.retry_after, _FIRST_REST_SECONDS)
        elif trouble.kind is Kind.RATE_LIMITED:
            seconds = max(seconds, _RATE_REST_SECONDS)
        elif trouble.kind is Kind.BEHIND:
            seconds = min(seconds, _BEHIND_REST_SECONDS)
        endpoint.rest(seconds, trouble.message)
        if trouble.kind is not Kind.BEHIND or endpoint.failures > 3:
            self._thinned.warning(
                "endpoint rested", about=endpoint.name, endpoint=endpoint.name, method=failed.method,
                error=trouble.message[:300], kind=trouble.kind.name.lower(), seconds=round(seconds, 2),
            )  # fmt: skip

    # -- who they are ----------------------------------------------------------------------------------------------

    async def identity(self) -> str:
        """The chain id in decimal of the first endpoint that answers; raises RpcUnavailable where none does in time."""
        try:
            async with asyncio.timeout(self._patience):
                return await self._first_identity()
        except TimeoutError:
            reasons = "; ".join(f"{one.name}: {one.last_error or 'no answer'}" for one in self.all)
            raise RpcUnavailable(f"no node answers ({reasons}); check chain.endpoints and the node") from None

    async def _first_identity(self) -> str:
        while True:
            endpoint, started = await self._next(), time.monotonic()
            try:
                chain_id = await self.ask(endpoint, self._identify)
            except RpcTrouble as failed:
                self._rest(failed, started)
                continue
            endpoint.chain_id = chain_id
            if self.chain_id is None:
                self.chain_id = chain_id
            return chain_id

    async def _check_chain(self, endpoint: E) -> None:
        """Before an endpoint is used first: it must be of our network. The first one asked says which that is."""
        if endpoint.chain_id is None:
            endpoint.chain_id = await self.ask(endpoint, self._identify)
            if self.chain_id is None:
                self.chain_id = endpoint.chain_id
        if endpoint.chain_id != self.chain_id:
            raise self.foreign(endpoint, endpoint.chain_id)
        endpoint.foreign, endpoint.was_ours = None, True

    def foreign(self, endpoint: E, chain_id: str) -> RpcTrouble:
        """The exception to raise where a node shows that it is of the network `chain_id`, which is not ours."""
        trouble = Trouble(
            Kind.FATAL, f"a node of chain {chain_id}, not {self.chain_id}: mend or remove it in chain.endpoints",
            retry_after=_WRONG_CHAIN_REST_SECONDS,
        )  # fmt: skip
        endpoint.foreign = chain_id
        endpoint.chain_id = None  # asked again after its rest
        return endpoint.failed("identity", trouble, "invalid")

    def _check_renamed(self) -> None:
        """Raise WrongNetwork where the chain goes on under another id: endpoints that were of ours are of that one,
        and no other has anything to say against it."""
        changed = [one.foreign for one in self.all if one.foreign is not None and one.was_ours]
        if not (self._renamed and changed):
            return
        if all(one.foreign is not None or one.failures >= _SILENT_FAILURES for one in self.all):
            raise WrongNetwork(
                f"this chain is {self.chain_id}, but its nodes answer for {changed[0]} now: point chain.endpoints at "
                f"the right network{accept_hint(self._source, changed[0])}"
            )

    # -- how they are ----------------------------------------------------------------------------------------------

    def probe_every(self, seconds: float) -> None:
        """Probe behind the scenes, if there are several endpoints and the last time was so long ago."""
        if len(self.all) > 1 and time.monotonic() - self._probed_at > seconds:
            self._probed_at = time.monotonic()
            self.background("probe", self.probe())

    async def probe(self) -> N | None:
        """Ask every endpoint that does not rest for its newest block, and rest those that lag; the newest of all."""
        asked = [one for one in self.all if not one.resting]
        answers = await asyncio.gather(*(self._newest_of(one) for one in asked), return_exceptions=True)
        best = max((one for one in answers if not isinstance(one, BaseException)), key=_height, default=None)
        for endpoint, answer in zip(asked, answers, strict=True):
            if isinstance(answer, RpcTrouble) and best is not None:
                self._rest(answer, endpoint.rested_at)
            elif not isinstance(answer, BaseException) and best is not None:
                self._rest_if_behind(endpoint, answer.height, best.height)
        return best

    async def _newest_of(self, endpoint: E) -> N:
        await self._check_chain(endpoint)
        return await self.ask(endpoint, self._newest)

    def _rest_if_behind(self, endpoint: E, number: int, best: int) -> bool:
        if best - number <= _LAG_BLOCKS:
            return False
        endpoint.rest(_LAG_REST_SECONDS, f"{best - number} blocks behind")
        return True

    async def _revive(self, endpoint: E) -> None:
        """See whether an endpoint that has rested is well, at nobody's expense: others do the work meanwhile."""
        started = time.monotonic()
        try:
            found = await self._newest_of(endpoint)
        except RpcTrouble as failed:
            self._rest(failed, started)
            return
        best = max((one.newest for one in self.all if not one.doubted), default=-1)
        if not self._rest_if_behind(endpoint, found.height, best):
            endpoint.doubted = False

    def background(self, name: str, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` beside everything else, unless the same is under way."""
        if name in self._tasks:
            work.close()
            return
        task = self._tasks[name] = asyncio.create_task(work, name=name)
        task.add_done_callback(lambda _done: self._tasks.pop(name, None))


def _height(found: Newest) -> int:
    return found.height
