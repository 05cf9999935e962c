"""The Open Audio Core chain as a block source: a block is final once it exists."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from indexer.config import ChainSettings, SpanSettings
from indexer.model import BlockRef, Heads, Span
from indexer.sources import core_queries, core_wire
from indexer.sources.core_history import CoreHistory
from indexer.sources.core_queries import CoreEndpoint, Standing
from indexer.sources.endpoints import Endpoints
from indexer.sources.ranges import BlockPace, EventTarget

_PROBE_SECONDS = 10.0
# A head that drops by more is a node that syncs.
_FAR_BLOCKS = 10
# A height that came with blocks is good as the head for so long.
_FRESH_SECONDS = 0.5
_KEPT_REFS = 64


class CoreSource:
    """A BlockSource on Core nodes."""

    instant = True
    first_block = 1

    def __init__(self, chain: ChainSettings, span: SpanSettings) -> None:
        self.endpoints: Endpoints[CoreEndpoint, Standing] = Endpoints(
            chain, CoreEndpoint, core_queries.chain_id, self._newest, renamed=True
        )
        self._target = EventTarget(span.max_events, span.max_seconds)
        self._history = CoreHistory(chain, self.endpoints, span, self._target)
        self._pace = BlockPace(chain.poll_seconds)
        self._highest = -1
        self._refs: dict[int, BlockRef] = {}  # of what was handed out last

    @property
    def events(self) -> Mapping[str, frozenset[str]]:
        return core_wire.EVENTS

    @property
    def nodes(self) -> Sequence[CoreEndpoint]:
        return self.endpoints.all

    async def identity(self) -> str:
        """The chain's id; raises RpcUnavailable where no endpoint answers in time."""
        return await self.endpoints.identity()

    def took(self, seconds: float) -> None:
        """A span's transaction took so long: the next ones hold fewer events if that was too long."""
        self._target.took(seconds)

    async def close(self) -> None:
        await self.endpoints.close()

    async def heads(self) -> Heads:
        """The newest height: what came with the last blocks, once, or else what a node says."""
        height, at = self._history.height, self._history.height_at
        self._history.height_at = 0.0
        if time.monotonic() - at > _FRESH_SECONDS:
            height = await self._polled()
        self._highest = max(self._highest, height)
        return Heads(height, height)

    async def _polled(self) -> int:
        node = await self.endpoints.run(self._newest)
        if node.height < self._highest - _FAR_BLOCKS and len(self.endpoints.all) > 1:
            node = await self.endpoints.probe() or node
        return node.height

    async def _newest(self, endpoint: CoreEndpoint) -> Standing:
        node = await core_queries.standing(endpoint)
        self._history.check_chain(endpoint, node.chain_id)
        return node

    async def wait(self, seconds: float) -> None:
        """Return after `seconds`, or the pause between polls if that is shorter."""
        self.endpoints.probe_every(_PROBE_SECONDS)
        await asyncio.sleep(min(seconds, self.poll_seconds))

    @property
    def poll_seconds(self) -> float:
        """The configured pause between polls, or a quarter of the block time as the newest blocks show it."""
        return self._pace.poll_seconds

    async def ref(self, number: int) -> BlockRef:
        return self._refs.get(number) or (await self._history.block(number)).end

    async def spans(self, first: int, last: int) -> AsyncGenerator[Span, None]:
        """The blocks `first` to `last`, many to a span. Raises MissingBlock where the chain has a hole."""
        # closed explicitly: else what was fetched ahead would live on for a while after we are closed
        async with aclosing(self._history.spans(first, last)) as spans:
            async for span in spans:
                self._pace.saw(span.last, span.end_timestamp)
                self._refs[span.last] = span.end
                while len(self._refs) > _KEPT_REFS:
                    del self._refs[next(iter(self._refs))]
                yield span
