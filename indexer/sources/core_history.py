"""Core blocks, which are final once they exist: ranges fetched ahead, whole, with no height left out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from indexer import log, metrics
from indexer.config import ChainSettings, SpanSettings
from indexer.errors import MissingBlock
from indexer.model import Block, Quarantined, Span
from indexer.sources import core_queries, core_wire
from indexer.sources.ahead import spans_ahead
from indexer.sources.core_queries import MOST_HEIGHTS, CoreEndpoint, Standing
from indexer.sources.core_wire import Decoded
from indexer.sources.endpoint import Impossible, RpcTrouble
from indexer.sources.endpoints import Endpoints
from indexer.sources.provider_errors import Kind, too_large
from indexer.sources.ranges import EventTarget, RangeSize

# A block that a node should have and does not give is asked for again, here and elsewhere, for so long; for longer
# where an endpoint has not been able to say anything about it.
_HOLE_SECONDS = 3.0
_LONGEST_HOLE_SECONDS = 10.0


class _Hole(msgspec.Struct):
    since: float
    missed_by: set[str]


class CoreHistory:
    """Reads ranges of blocks. `target` is how many events one span should hold."""

    def __init__(
        self, settings: ChainSettings, endpoints: Endpoints[CoreEndpoint, Standing], span: SpanSettings,
        target: EventTarget,
    ) -> None:  # fmt: skip
        self._endpoints, self._target, self._in_flight = endpoints, target, settings.requests_in_flight
        self._max_blocks = span.max_blocks
        self._size = RangeSize(max_blocks=min(span.max_blocks, MOST_HEIGHTS))
        self._holes: dict[int, _Hole] = {}
        self._thinned = log.Thinned()
        self.height, self.height_at = -1, 0.0  # that came with the newest answer

    async def spans(self, first: int, last: int) -> AsyncGenerator[Span, None]:
        """The blocks in order; what is before a hole comes before MissingBlock is raised."""
        position = first
        while position <= last:
            ahead = spans_ahead(
                self._range, lambda: self._size.blocks, position, last, self._in_flight, self._target, self._max_blocks
            )
            async with aclosing(ahead) as spans:
                async for span in spans:
                    if span.first != position:
                        break  # a range has ended early: what it lacks is asked for again, and nothing before it
                    yield span
                    position = span.last + 1

    async def block(self, number: int) -> Decoded:
        size = RangeSize(max_blocks=1)
        return await self._endpoints.run(lambda one: self._piece(one, number, number, size), number)

    async def _range(self, first: int, last: int) -> Span:
        """A range's events; it ends early before a block that is missing. What an endpoint gave stays, though another
        goes on."""
        started, blocks, quarantined = time.perf_counter(), list[Block](), list[Quarantined]()
        position, events = first, 0
        size = RangeSize(max_blocks=last - first + 1, start=last - first + 1)
        while position <= last:
            try:
                piece = await self._endpoints.run(
                    lambda one, at=position: self._piece(one, at, last, size), position  # type: ignore[misc]
                )  # fmt: skip
            except MissingBlock:
                if position == first:
                    raise
                break
            size.went_well(piece.end.number - position + 1, piece.events, self._target.events)
            blocks += piece.blocks
            quarantined += piece.quarantined
            position, events, end, end_timestamp = (
                piece.end.number + 1, events + piece.events, piece.end, piece.end_timestamp
            )  # fmt: skip
        metrics.span_seconds.labels("fetch").observe(time.perf_counter() - started)
        self._size.went_well(end.number - first + 1, events, self._target.events)
        return Span(first, end.number, tuple(blocks), end, end_timestamp, True, tuple(quarantined))

    async def _piece(self, endpoint: CoreEndpoint, first: int, last: int, size: RangeSize) -> Decoded:
        """As many blocks from `first` on, at most to `last`, as the endpoint gives in one answer without a hole."""
        while True:
            end = min(first + size.blocks - 1, last)
            try:
                answer = await core_queries.blocks(endpoint, range(first, end + 1))
                break
            except RpcTrouble as failed:
                self._learn(failed, first, end, size)
        if answer.height > 0:
            self.height, self.height_at = answer.height, time.monotonic()
        given: list[core_wire.CoreBlock | core_wire.RawBlock] = []
        while (block := answer.blocks.get(first + len(given))) is not None:
            self.check_chain(endpoint, block.chain_id)
            given.append(block)
        if not given:
            raise await self._absent(endpoint, first)
        started = time.perf_counter()
        piece = await core_wire.decoded(given)
        metrics.span_seconds.labels("decode").observe(time.perf_counter() - started)
        for number in [one for one in self._holes if first <= one <= piece.end.number]:
            del self._holes[number]
        return piece

    def _learn(self, failed: RpcTrouble, first: int, end: int, size: RangeSize) -> None:
        """Make the next ranges smaller where this one was too large for the node; raises what is another trouble."""
        if first == end or failed.trouble.kind in (Kind.BEHIND, Kind.BILLING):
            raise failed
        if failed.trouble.kind is not Kind.RANGE:
            if size.failed(too_long=failed.outcome == "timeout"):
                self._size.shrink(size.blocks)
            raise failed
        blocks = too_large(first, end, failed.trouble)
        size.shrink(blocks)
        self._size.shrink(blocks)
        metrics.rpc_range_blocks.labels(failed.endpoint.name).set(blocks)

    def check_chain(self, endpoint: CoreEndpoint, chain_id: str) -> None:
        """What a node says must be of our chain: one that was started anew may go on under another id."""
        if not chain_id:
            raise Impossible("no chain id where one belongs")
        if chain_id != self._endpoints.chain_id:
            raise self._endpoints.foreign(endpoint, chain_id)

    async def _absent(self, endpoint: CoreEndpoint, number: int) -> RpcTrouble:
        """The exception to raise for a block that a node has left out; raises MissingBlock once nobody gives it."""
        node = await core_queries.standing(endpoint, pruning=True)
        self.check_chain(endpoint, node.chain_id)
        if node.height < number:
            return core_queries.behind(endpoint, f"no block {number} yet")
        if node.earliest > number:
            endpoint.earliest = node.earliest
            self._thinned.warning(
                "blocks pruned", about=endpoint.name, endpoint=endpoint.name, block=number, earliest=node.earliest,
                why="this node cannot serve the block that is needed; the next endpoint is asked",
            )  # fmt: skip
            return core_queries.behind(endpoint, f"block {number} is pruned, it has block {node.earliest} and later")
        hole = self._holes.setdefault(number, _Hole(time.monotonic(), set()))
        hole.missed_by.add(endpoint.name)
        able = {one.name for one in self._endpoints.all if one.earliest <= number and one.foreign is None}
        patience = _HOLE_SECONDS if able <= hole.missed_by else _LONGEST_HOLE_SECONDS
        if time.monotonic() - hole.since >= patience:
            raise MissingBlock(
                number,
                f"block {number} is missing: the chain is at block {node.height}, but no node gives it "
                f"({', '.join(sorted(hole.missed_by))}); name one that has it in chain.endpoints",
            )
        return core_queries.behind(endpoint, f"no block {number}, though it is at block {node.height}")
