"""An EVM chain as a block source: history by log ranges, the head block by block, all of it checked and frozen."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from indexer import log
from indexer.config import ChainSettings, ContractSettings, SpanSettings
from indexer.model import BlockRef, Heads, Span
from indexer.sources import queries
from indexer.sources.contracts import Contracts
from indexer.sources.endpoint import RpcTrouble
from indexer.sources.endpoints import Endpoints
from indexer.sources.heads import HeadBlocks
from indexer.sources.history import History
from indexer.sources.newheads import NewHeads
from indexer.sources.provider_errors import Kind
from indexer.sources.ranges import BlockPace, EventTarget, RangeSize
from indexer.sources.rpc import RpcEndpoint
from indexer.sources.wire import Header, MaybeHeader, check_header, to_bytes

_FINAL_SECONDS = 2.0
_PROBE_SECONDS = 10.0
# How often a node may fail at the finalised tag before that is taken for not knowing it.
_FINAL_REFUSALS = 3
# JSON-RPC's invalid request, unknown method, invalid params; geth's unknown block
_UNKNOWN_TAG_CODES = (-32600, -32601, -32602, -39001)
# A head that drops by more is a node that syncs, not a reorganisation.
_FAR_BLOCKS = 10


class EvmSource:
    """A BlockSource on JSON-RPC endpoints."""

    instant = False

    def __init__(self, chain: ChainSettings, contracts: Sequence[ContractSettings], span: SpanSettings) -> None:
        self.contracts = Contracts(contracts)
        self.endpoints = Endpoints(chain, RpcEndpoint, queries.chain_id, queries.newest)
        self._settings = chain
        self._target = EventTarget(span.max_events, span.max_seconds)
        size = RangeSize(max_blocks=span.max_blocks)
        self._history = History(chain, self.endpoints, self.contracts, size, self._target)
        self._head = HeadBlocks(chain, self.endpoints, self.contracts)
        self._newheads = NewHeads(self.endpoints.all)
        self._heads: Heads | None = None
        self._highest = -1
        self._final, self._final_at, self._final_refusals = -1, -_PROBE_SECONDS, 0
        self._pace = BlockPace(chain.poll_seconds)
        self._thinned = log.Thinned()

    @property
    def events(self) -> Mapping[str, frozenset[str]]:
        return self.contracts.events

    @property
    def first_block(self) -> int:
        return self.contracts.first_block

    @property
    def nodes(self) -> Sequence[RpcEndpoint]:
        return self.endpoints.all

    async def identity(self) -> str:
        """The chain id in decimal; raises RpcUnavailable where no endpoint answers in time."""
        return await self.endpoints.identity()

    def took(self, seconds: float) -> None:
        """A span's transaction took so long: the next ones hold fewer events if that was too long."""
        self._target.took(seconds)

    async def close(self) -> None:
        await self._newheads.close()
        await self.endpoints.close()

    # -- heads ---------------------------------------------------------------------------------------------------

    async def heads(self) -> Heads:
        """The newest block, as announced by ws where that is fresher than any poll, and the newest that is final."""
        header = self._newheads.take()
        if header is None:
            header = await self._polled()
        number = int(header.number, 16)
        self._highest = max(self._highest, number)
        if time.monotonic() - self._final_at > 5 * _FINAL_SECONDS:
            await self.endpoints.run(self._learn_final)
        final = self._final if self._final >= 0 else max(number - self._settings.confirmations, -1)
        self._heads = Heads(number, final, to_bytes(header.hash))
        return self._heads

    async def _polled(self) -> Header:
        header = await self.endpoints.run(queries.newest)
        if int(header.number, 16) < self._highest - _FAR_BLOCKS and len(self.endpoints.all) > 1:
            header = await self.endpoints.probe() or header
        self._newheads.polled(int(header.number, 16))
        return header

    async def _learn_final(self, endpoint: RpcEndpoint) -> None:
        """Ask for the finalised block; a node that does not know the tag leaves us head minus confirmations."""
        self._final_at = time.monotonic()
        try:
            header = await endpoint.call("eth_getBlockByNumber", ["finalized", False], MaybeHeader)
        except RpcTrouble as failed:
            if not self._unknown_tag(failed):
                raise
            header = None
        if header is not None:
            check_header(header)
            # of several nodes one is always a little behind: what was final stays so
            self._final = max(self._final, int(header.number, 16))
        elif self._final < 0:
            self._thinned.warning(
                "no finalized tag", endpoint=endpoint.name, confirmations=self._settings.confirmations
            )

    def _unknown_tag(self, failed: RpcTrouble) -> bool:
        """Whether this is how a node says that it does not know the tag. To believe it wrongly would make blocks final
        that are not; so what may be a mishap has to come several times."""
        if not failed.declined or failed.trouble.kind in (Kind.RATE_LIMITED, Kind.BILLING):
            return False
        self._final_refusals += 1
        return failed.code in _UNKNOWN_TAG_CODES or self._final_refusals >= _FINAL_REFUSALS

    async def wait(self, seconds: float) -> None:
        """Return when ws announces a head, at the latest after `seconds` or a quarter of the block time."""
        if time.monotonic() - self._final_at > _FINAL_SECONDS:
            self.endpoints.background("finalized", self.endpoints.run(self._learn_final))
        self.endpoints.probe_every(_PROBE_SECONDS)
        await self._newheads.wait(min(seconds, self.poll_seconds))

    @property
    def poll_seconds(self) -> float:
        """The configured pause between polls, or a quarter of the block time as the newest blocks show it."""
        return self._pace.poll_seconds

    async def ref(self, number: int) -> BlockRef:
        header = await self.endpoints.run(lambda one: queries.header(one, number))
        return BlockRef(number, to_bytes(header.hash))

    # -- spans ---------------------------------------------------------------------------------------------------

    async def spans(self, first: int, last: int) -> AsyncGenerator[Span, None]:
        """The blocks `first` to `last`: many to a span below the finalised head, one above it.

        Above it they end early where the chain turns out to be shorter; the next question for the head says so.
        """
        heads = self._heads or await self.heads()
        final = min(heads.final, last)
        # closed explicitly: else what was fetched ahead would live on for a while after we are closed
        if first <= final:
            async with aclosing(self._history.spans(first, final)) as spans:
                async for span in spans:
                    yield span
        if final < last:
            async with aclosing(self._head.blocks(max(first, final + 1), last)) as blocks:
                async for block, quarantined in blocks:
                    self._pace.saw(block.number, block.timestamp)
                    yield Span(block.number, block.number, (block,), block.ref, block.timestamp, False, quarantined)
