"""Final blocks, by ranges of logs: several ranges fetched ahead, each in as many pieces as the provider wants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence

import msgspec

from indexer import metrics
from indexer.config import ChainSettings
from indexer.model import Block, BlockRef, Quarantined, Span
from indexer.sources import queries
from indexer.sources.ahead import spans_ahead
from indexer.sources.contracts import Contracts
from indexer.sources.endpoint import Impossible, RpcTrouble
from indexer.sources.endpoints import Endpoints
from indexer.sources.provider_errors import Kind, too_large
from indexer.sources.ranges import EventTarget, RangeSize
from indexer.sources.rpc import RpcEndpoint
from indexer.sources.wire import Header, Log, in_order, to_bytes

# A range is at most so many pieces of a provider's limit: it has an end before anybody gets impatient.
_MOST_PIECES = 8


class _Piece(msgspec.Struct):
    """A part of a range up to `last`, from one endpoint. `header` is of `last`, where it was asked for."""

    last: int
    logs: int
    blocks: tuple[Block, ...]
    quarantined: tuple[Quarantined, ...]
    header: Header | None


class History:
    """Reads ranges of final blocks. `target` is how many events one span should hold."""

    def __init__(
        self, settings: ChainSettings, endpoints: Endpoints[RpcEndpoint, Header], contracts: Contracts,
        size: RangeSize, target: EventTarget,
    ) -> None:  # fmt: skip
        self._endpoints, self._contracts, self._target = endpoints, contracts, target
        self._in_flight, self._size, self._max_blocks = settings.requests_in_flight, size, size.max_blocks

    def spans(self, first: int, last: int) -> AsyncGenerator[Span, None]:
        """The blocks in order. What is ready when the last span is committed goes into the next together."""
        return spans_ahead(
            self._range, self._range_blocks, first, last, self._in_flight, self._target, self._max_blocks
        )

    def _range_blocks(self) -> int:
        limit = self._endpoints.best().max_blocks
        return min(self._size.blocks, limit * _MOST_PIECES) if limit else self._size.blocks

    async def _range(self, first: int, last: int) -> Span:
        """A range's events and the header of its last block. What an endpoint gave stays, though another goes on."""
        started, blocks = time.perf_counter(), list[Block]()
        quarantined, header, logs, position = list[Quarantined](), None, 0, first
        size = RangeSize(max_blocks=last - first + 1, start=last - first + 1)
        while position <= last:
            piece = await self._endpoints.run(lambda one, at=position: self._piece(one, at, last, size))  # type: ignore[misc]
            size.went_well(piece.last - position + 1, piece.logs, self._target.events)
            blocks += piece.blocks
            quarantined += piece.quarantined
            header, logs, position = piece.header, logs + piece.logs, piece.last + 1
        assert header is not None
        metrics.span_seconds.labels("fetch").observe(time.perf_counter() - started)
        self._size.went_well(last - first + 1, logs, self._target.events)
        end = BlockRef(last, to_bytes(header.hash))
        return Span(first, last, tuple(blocks), end, int(header.timestamp, 16), True, tuple(quarantined))

    async def _piece(self, endpoint: RpcEndpoint, first: int, last: int, size: RangeSize) -> _Piece:
        """As many blocks from `first` on, at most to `last`, as the endpoint gives in one answer."""
        while True:
            end = min(first + min(size.blocks, endpoint.max_blocks or size.blocks) - 1, last)
            try:
                logs, header = await self._fetch(endpoint, first, end, last)
                break
            except RpcTrouble as failed:
                if first == end or failed.trouble.kind in (Kind.BEHIND, Kind.BILLING):
                    raise
                if failed.trouble.kind is not Kind.RANGE:
                    if size.failed(too_long=failed.outcome == "timeout"):
                        self._size.shrink(size.blocks)
                    raise
                self._give_way(failed, too_large(first, end, failed.trouble), size)
        logs = in_order(logs, first, end)
        if header is not None and logs and int(logs[-1].block_number, 16) == end and logs[-1].block_hash != header.hash:
            raise Impossible(f"logs of another block {end} than its header's")
        timestamps = await self._timestamps(endpoint, logs)
        started = time.perf_counter()
        blocks, quarantined = await self._contracts.blocks(logs, timestamps)
        metrics.span_seconds.labels("decode").observe(time.perf_counter() - started)
        return _Piece(end, len(logs), blocks, quarantined, header)

    def _give_way(self, failed: RpcTrouble, blocks: int, size: RangeSize) -> None:
        """The range was too large. Raises where the endpoint is overloaded, so that it rests before the smaller one."""
        endpoint, trouble = failed.endpoint, failed.trouble
        overloaded = trouble.retry_after is not None
        size.shrink(blocks, lasting=not overloaded)
        self._size.shrink(blocks, lasting=not overloaded)
        metrics.rpc_range_blocks.labels(endpoint.name).set(blocks)
        if trouble.max_blocks is not None:
            endpoint.max_blocks = max(1, min(trouble.max_blocks, endpoint.max_blocks or trouble.max_blocks))
        if overloaded:
            raise failed

    async def _fetch(self, endpoint: RpcEndpoint, first: int, end: int, last: int) -> tuple[list[Log], Header | None]:
        """The logs of a piece, and the header of its end where that is wanted.

        A node whose head is below the range answers with the logs that it has, and no error. So it has to have shown
        that it knows the end, before or (if it has not announced so many blocks) with that block's header.
        """
        query, span = {"fromBlock": hex(first), "toBlock": hex(end)}, (first, end)
        if end > endpoint.newest:
            header = await queries.header(endpoint, end)
            return await queries.logs(endpoint, self._contracts, query, span), header
        if end < last:
            return await queries.logs(endpoint, self._contracts, query, span), None
        asked = asyncio.create_task(queries.header(endpoint, end))
        try:
            return await queries.logs(endpoint, self._contracts, query, span), await asked
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    async def _timestamps(self, endpoint: RpcEndpoint, logs: Sequence[Log]) -> dict[int, int]:
        """The times of the logs' blocks: from the logs, or from headers where a log has none."""
        newest = {one.block_number: one for one in logs}
        times = {int(n, 16): int(one.block_timestamp, 16) for n, one in newest.items() if one.block_timestamp}
        lacking = {int(n, 16): one.block_hash for n, one in newest.items() if not one.block_timestamp}
        for number, header in (await queries.headers(endpoint, list(lacking))).items() if lacking else ():
            if header.hash != lacking[number]:
                raise Impossible(f"logs of another block {number} than its header's")
            times[number] = int(header.timestamp, 16)
        return times
