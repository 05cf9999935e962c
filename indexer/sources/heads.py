"""Blocks above finality: one at a time, header and logs tied together by the block's hash, no empty answer on trust."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator

from indexer import log, metrics
from indexer.config import ChainSettings
from indexer.model import Block, Quarantined
from indexer.sources import queries
from indexer.sources.contracts import Contracts
from indexer.sources.endpoint import RpcTrouble
from indexer.sources.endpoints import Endpoints
from indexer.sources.provider_errors import Kind
from indexer.sources.rpc import RpcEndpoint
from indexer.sources.wire import Header, Log, in_order, to_bytes

Whole = tuple[Block, tuple[Quarantined, ...]]

# How often an empty answer is asked for again where the node refuses to show the whole block.
_DOUBTS = 5
# After so long without a block, it is asked whether the chain goes so far at all.
_PATIENCE_SECONDS = 2.0


class HeadBlocks:
    """Reads blocks that can still be reorganised."""

    def __init__(
        self, settings: ChainSettings, endpoints: Endpoints[RpcEndpoint, Header], contracts: Contracts
    ) -> None:
        self._settings, self._endpoints, self._contracts = settings, endpoints, contracts
        self._doubts: dict[str, int] = {}

    async def blocks(self, first: int, last: int) -> AsyncGenerator[Whole, None]:
        """The blocks in order, each whole from one endpoint, a few fetched ahead.

        Ends early where the chain does: after a reorganisation it may be shorter for a while, or a dev chain for good.
        """
        ahead: deque[asyncio.Task[Whole]] = deque()
        position = first

        def fetch_ahead() -> None:
            nonlocal position
            while len(ahead) < self._settings.requests_in_flight and position <= last:
                ahead.append(asyncio.create_task(self._block(position)))
                position += 1

        try:
            fetch_ahead()
            while ahead:
                if await self._gone(ahead[0], position - len(ahead)):
                    return
                whole = await ahead.popleft()
                fetch_ahead()
                yield whole
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _gone(self, block: asyncio.Task[Whole], number: int) -> bool:
        """Wait for a block; true if it does not come since the chain ends before it."""
        while not (await asyncio.wait({block}, timeout=_PATIENCE_SECONDS))[0]:
            if int((await self._endpoints.run(queries.newest)).number, 16) < number:
                return not block.done()
        return False

    async def _block(self, number: int) -> Whole:
        started = time.perf_counter()
        whole = await self._endpoints.run(lambda one: self._whole(one, number))
        metrics.span_seconds.labels("fetch").observe(time.perf_counter() - started)
        return whole

    async def _whole(self, endpoint: RpcEndpoint, number: int) -> Whole:
        """A header and the logs of the very block (by its hash), from one endpoint."""
        header = endpoint.announced(number) or await queries.header(endpoint, number)
        logs = await queries.logs(endpoint, self._contracts, {"blockHash": header.hash})
        if not logs and self._settings.check_bloom:
            await self._believe_empty(endpoint, header)
        if any(one.block_hash != header.hash for one in logs):
            raise queries.behind(endpoint, f"logs of another block {number}")
        timestamp = int(header.timestamp, 16)
        found, quarantined = await self._contracts.blocks(in_order(logs, number, number), {number: timestamp})
        events = found[0].events if found else ()
        return Block(number, to_bytes(header.hash), to_bytes(header.parent_hash), timestamp, events), quarantined

    async def _believe_empty(self, endpoint: RpcEndpoint, header: Header) -> None:
        """An empty answer that the header's bloom contradicts is believed only once the block's logs are really there.

        A bloom may speak falsely for us, since it is a bloom; so the block is asked for with no filter at all. A node
        that has indexed the block answers with the logs that set those bits; one that has not answers with nothing.
        """
        if not self._contracts.may_be_in(int(header.logs_bloom, 16)):
            return
        number = int(header.number, 16)
        try:
            everything = await endpoint.call("eth_getLogs", [{"blockHash": header.hash}], list[Log])
        except RpcTrouble as failed:
            if not failed.declined or failed.trouble.kind in (Kind.RATE_LIMITED, Kind.BILLING, Kind.BEHIND):
                raise
            self._doubt(endpoint, header, failed.trouble.message)
            return
        ours = any(self._contracts.wants(one) for one in everything)
        if ours or not everything:
            hint = "" if ours else " (where blooms are not kept: chain.check_bloom = false)"
            raise queries.behind(endpoint, f"empty logs for block {number}, against its logsBloom{hint}")

    def _doubt(self, endpoint: RpcEndpoint, header: Header, why: str) -> None:
        """A node that will not show the whole block is asked a few times more, with pauses; then it is believed."""
        number, doubts = int(header.number, 16), self._doubts.pop(header.hash, 0) + 1
        if doubts <= _DOUBTS:
            self._doubts = {header.hash: doubts} | {key: self._doubts[key] for key in list(self._doubts)[:100]}
            raise queries.behind(endpoint, f"empty logs for block {number}, against its logsBloom")
        log.get().warning("empty logs believed", endpoint=endpoint.name, block=number, doubts=_DOUBTS, error=why)
