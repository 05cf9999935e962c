"""An EVM chain as a block source: history by log ranges, the head block by block, all of it checked and frozen."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, cast

import msgspec

from indexer import log, metrics
from indexer.config import ChainSettings, ContractSettings, SpanSettings
from indexer.model import Block, BlockRef, Event, Heads, Quarantined, Span
from indexer.sources.contracts import Contracts
from indexer.sources.newheads import NewHeads
from indexer.sources.provider_errors import Kind, Trouble, too_large
from indexer.sources.ranges import RangeSize
from indexer.sources.rpc import Endpoint, Endpoints, RpcTrouble

# Headers asked for in one JSON-RPC batch; providers commonly take 100.
_HEADERS_A_BATCH = 100
# Logs decoded before other tasks (the commit under way) get their turn.
_LOGS_A_TURN = 500
_FINAL_SECONDS = 2.0
_PROBE_SECONDS = 10.0


class Header(msgspec.Struct, gc=False, rename="camel"):
    """What we need of a block's header, as JSON-RPC gives it."""

    number: str
    hash: str
    parent_hash: str
    timestamp: str
    logs_bloom: str = "0x0"


class Log(msgspec.Struct, gc=False, rename="camel"):
    """A log as JSON-RPC gives it; `block_timestamp` is not given by every node."""

    address: str
    topics: list[str]
    data: str
    block_number: str
    block_hash: str
    transaction_hash: str
    log_index: str
    removed: bool = False
    block_timestamp: str | None = None


# what a node answers for a block that it does not have
MaybeHeader = cast("type[Header | None]", Header | None)


class EvmSource:
    """A BlockSource on JSON-RPC endpoints. `target_events` is how many events one span should hold."""

    def __init__(self, chain: ChainSettings, contracts: Sequence[ContractSettings], span: SpanSettings) -> None:
        self.contracts = Contracts(contracts)
        self.endpoints = Endpoints(chain)
        self.target_events = span.max_events
        self._settings, self._span = chain, span
        self._size = RangeSize(max_blocks=span.max_blocks)
        self._newheads = NewHeads(self.endpoints.all)
        self._final, self._final_at = -1, 0.0
        self._probed_at = time.monotonic()
        self._times: deque[tuple[int, int]] = deque(maxlen=20)  # (number, timestamp) of the newest blocks
        self._tasks: set[asyncio.Task[Any]] = set()
        self._thinned = log.Thinned()

    async def identity(self) -> str:
        """The chain id in decimal; raises RpcUnavailable where no endpoint answers in time."""
        patience = self._settings.connect_timeout_seconds
        chain_id = await self.endpoints.run(lambda one: one.call("eth_chainId", [], str), patience=patience)
        return str(int(chain_id, 16))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._newheads.close()
        await self.endpoints.close()

    # -- heads ---------------------------------------------------------------------------------------------------

    async def heads(self) -> Heads:
        """Newest and finalised number; the newest as announced by ws where that is fresher than any poll."""
        announced = self._newheads.take()
        newest = announced if announced is not None else await self.endpoints.run(self._newest)
        if time.monotonic() - self._final_at > 5 * _FINAL_SECONDS:
            await self.endpoints.run(self._learn_final)
        if self._settings.confirmations and self._final < 0:
            return Heads(newest, max(newest - self._settings.confirmations, -1))
        return Heads(newest, min(self._final, newest))

    async def _newest(self, endpoint: Endpoint) -> int:
        return int(await endpoint.call("eth_blockNumber", [], str), 16)

    async def _learn_final(self, endpoint: Endpoint) -> None:
        """Ask for the finalised block; a node that does not know the tag leaves us head minus confirmations."""
        self._final_at = time.monotonic()
        try:
            header = await endpoint.call("eth_getBlockByNumber", ["finalized", False], MaybeHeader)
        except RpcTrouble as failed:
            if failed.outcome in ("timeout", "invalid") or failed.trouble.kind is Kind.RATE_LIMITED:
                raise
            header = None
        if header is not None:
            # of several nodes one is always a little behind: what was final stays so
            self._final = max(self._final, int(header.number, 16))
        elif self._final < 0:
            self._thinned.warning(
                "no finalized tag", endpoint=endpoint.name, confirmations=self._settings.confirmations
            )

    async def wait(self, seconds: float) -> None:
        """Return when ws announces a head, at the latest after `seconds` or a quarter of the block time."""
        if time.monotonic() - self._final_at > _FINAL_SECONDS:
            self._background(self.endpoints.run(self._learn_final))
        if len(self.endpoints.all) > 1 and time.monotonic() - self._probed_at > _PROBE_SECONDS:
            self._background(self._probe())
        await self._newheads.wait(min(seconds, self.poll_seconds))

    @property
    def poll_seconds(self) -> float:
        """The configured pause between polls, or a quarter of the block time as the newest blocks show it."""
        if self._settings.poll_seconds is not None:
            return self._settings.poll_seconds
        if len(self._times) < 2 or self._times[-1][0] <= self._times[0][0]:
            return 0.25
        (n0, t0), (n1, t1) = self._times[0], self._times[-1]
        return min(max((t1 - t0) / (n1 - n0) / 4, 0.1), 3.0)

    def _background(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _probe(self) -> None:
        """Ask every endpoint for its head; one that lags behind the best is rested."""
        self._probed_at = time.monotonic()
        answers = await asyncio.gather(*(self._newest(one) for one in self.endpoints.all), return_exceptions=True)
        best = max((answer for answer in answers if isinstance(answer, int)), default=0)
        for endpoint, answer in zip(self.endpoints.all, answers, strict=True):
            if isinstance(answer, int) and best - answer > 5:
                endpoint.rest(2 * _PROBE_SECONDS, f"{best - answer} blocks behind")
            elif isinstance(answer, RpcTrouble):
                endpoint.rest(_PROBE_SECONDS, answer.trouble.message)

    async def ref(self, number: int) -> BlockRef:
        header = await self.endpoints.run(lambda one: self._header(one, number))
        return BlockRef(number, _bytes(header.hash))

    # -- spans ---------------------------------------------------------------------------------------------------

    async def spans(self, first: int, last: int) -> AsyncIterator[Span]:
        """The blocks `first` to `last`: many to a span below the finalised head, one above it."""
        final = min((await self.heads()).final, last)
        if first <= final:
            async for span in self._history(first, final):
                yield span
        if final < last:
            async for block, quarantined in self._head(max(first, final + 1), last):
                yield Span(block.number, block.number, (block,), block.ref, block.timestamp, False, quarantined)

    async def _history(self, first: int, last: int) -> AsyncIterator[Span]:
        """Ranges fetched ahead, in order. What is ready when the last span is committed goes into the next together."""
        ahead: deque[asyncio.Task[Span]] = deque()
        position = first
        try:
            while ahead or position <= last:
                while len(ahead) < self._settings.requests_in_flight and position <= last:
                    end = min(position + self._size.blocks - 1, last)
                    ahead.append(asyncio.create_task(self._range(position, end)))
                    position = end + 1
                span = await ahead.popleft()
                while ahead and ahead[0].done() and span.events < self.target_events:
                    following = ahead[0].result()
                    if span.events + following.events > self.target_events:
                        break
                    span = _joined(span, following)
                    ahead.popleft()
                yield span
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _range(self, first: int, last: int) -> Span:
        started = time.perf_counter()
        logs, end, timestamps = await self.endpoints.run(lambda one: self._fetch_range(one, first, last))
        fetched = time.perf_counter()
        blocks, quarantined = await self._decoded(logs, timestamps)
        metrics.span_seconds.labels("fetch").observe(fetched - started)
        metrics.span_seconds.labels("decode").observe(time.perf_counter() - fetched)
        self._size.went_well(last - first + 1, len(logs), self.target_events)
        ref = BlockRef(last, _bytes(end.hash))
        return Span(first, last, blocks, ref, int(end.timestamp, 16), True, quarantined)

    async def _fetch_range(self, endpoint: Endpoint, first: int, last: int) -> tuple[list[Log], Header, dict[int, int]]:
        """The logs of a range with the header of its last block, all from one endpoint."""
        header = asyncio.ensure_future(self._header(endpoint, last))
        try:
            logs = await self._logs(endpoint, first, last)
            return logs, await header, await self._timestamps(endpoint, logs)
        finally:
            header.cancel()
            await asyncio.gather(header, return_exceptions=True)

    async def _logs(self, endpoint: Endpoint, first: int, last: int) -> list[Log]:
        """eth_getLogs over a range, in as many pieces as the provider wants, sorted and checked."""
        logs: list[Log] = []
        position, size = first, last - first + 1
        while position <= last:
            end = min(position + min(size, endpoint.max_blocks or size) - 1, last)
            try:
                logs += await self._query(endpoint, {"fromBlock": hex(position), "toBlock": hex(end)}, (position, end))
            except RpcTrouble as failed:
                if failed.trouble.kind is not Kind.RANGE or position == end:
                    raise
                size = too_large(position, end, failed.trouble)
                if failed.trouble.max_blocks is not None:
                    endpoint.max_blocks = max(1, min(failed.trouble.max_blocks, endpoint.max_blocks or 1 << 62))
                self._size.shrink(size)
                metrics.rpc_range_blocks.labels(endpoint.name).set(size)
                await asyncio.sleep(failed.trouble.retry_after or 0)
                continue
            position = end + 1
        logs.sort(key=lambda one: (int(one.block_number, 16), int(one.log_index, 16)))
        self._check(endpoint, logs, first, last)
        return logs

    async def _query(self, endpoint: Endpoint, where: dict[str, Any], span: tuple[int, int] | None) -> list[Log]:
        """One eth_getLogs for all contracts, with the addresses split where the provider wants fewer."""
        addresses = self.contracts.addresses
        size = min(len(addresses), endpoint.max_addresses or len(addresses))
        logs: list[Log] = []
        position = 0
        while position < len(addresses):
            some = addresses[position : position + size]
            query = {**where, "address": some, "topics": [self.contracts.topics]}
            try:
                logs += await endpoint.call("eth_getLogs", [query], list[Log], span=span)
            except RpcTrouble as failed:
                if failed.trouble.kind is not Kind.ADDRESSES or size == 1:
                    raise
                size = endpoint.max_addresses = max(1, size // 2)
                continue
            position += size
        return logs

    def _check(self, endpoint: Endpoint, logs: Sequence[Log], first: int, last: int) -> None:
        """Logs must be of the range asked for, one hash a block, none twice and none removed."""
        before = (-1, -1, "")
        for one in logs:
            number, index = int(one.block_number, 16), int(one.log_index, 16)
            twice = (number, index) == before[:2]
            mixed = number == before[0] and one.block_hash != before[2]
            if not first <= number <= last or one.removed or twice or mixed:
                trouble = Trouble(Kind.TRANSIENT, f"logs that can't be: block {number}, log {index}")
                raise RpcTrouble(endpoint, "eth_getLogs", trouble, "invalid")
            before = (number, index, one.block_hash)

    async def _timestamps(self, endpoint: Endpoint, logs: Sequence[Log]) -> dict[int, int]:
        """The times of the logs' blocks: from the logs, or from headers where a log has none."""
        times = {int(one.block_number, 16): one.block_timestamp for one in logs}
        known = {number: int(text, 16) for number, text in times.items() if text is not None}
        lacking = [number for number, text in times.items() if text is None]
        for start in range(0, len(lacking), _HEADERS_A_BATCH):
            some = lacking[start : start + _HEADERS_A_BATCH]
            calls = [[hex(number), False] for number in some]
            headers = await endpoint.batch("eth_getBlockByNumber", calls, MaybeHeader)
            for number, header in zip(some, headers, strict=True):
                known[number] = int(self._there(endpoint, header, number).timestamp, 16)
        return known

    async def _header(self, endpoint: Endpoint, number: int) -> Header:
        header = await endpoint.call("eth_getBlockByNumber", [hex(number), False], MaybeHeader)
        return self._there(endpoint, header, number)

    def _there(self, endpoint: Endpoint, header: Header | None, number: int) -> Header:
        """A null for a block that was announced means a node that lags, never an empty block."""
        if header is None or int(header.number, 16) != number:
            trouble = Trouble(Kind.BEHIND, f"no block {number} yet")
            raise RpcTrouble(endpoint, "eth_getBlockByNumber", trouble, "invalid")
        return header

    # -- the head ------------------------------------------------------------------------------------------------

    async def _head(self, first: int, last: int) -> AsyncIterator[tuple[Block, tuple[Quarantined, ...]]]:
        """Blocks above finality, each whole from one endpoint, a few fetched ahead."""
        ahead: deque[asyncio.Task[tuple[Block, tuple[Quarantined, ...]]]] = deque()
        position = first
        try:
            while ahead or position <= last:
                while len(ahead) < self._settings.requests_in_flight and position <= last:
                    ahead.append(asyncio.create_task(self._block(position)))
                    position += 1
                yield await ahead.popleft()
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _block(self, number: int) -> tuple[Block, tuple[Quarantined, ...]]:
        started = time.perf_counter()
        header, logs = await self.endpoints.run(lambda one: self._fetch_block(one, number))
        timestamp = int(header.timestamp, 16)
        blocks, quarantined = await self._decoded(logs, {number: timestamp})
        metrics.span_seconds.labels("fetch").observe(time.perf_counter() - started)
        events = blocks[0].events if blocks else ()
        self._times.append((number, timestamp))
        return Block(number, _bytes(header.hash), _bytes(header.parent_hash), timestamp, events), quarantined

    async def _fetch_block(self, endpoint: Endpoint, number: int) -> tuple[Header, list[Log]]:
        """A header and the logs of the very block (by its hash), from one endpoint."""
        announced = self._newheads.header(endpoint, number)
        header = Header(**announced) if announced else await self._header(endpoint, number)
        logs = await self._query(endpoint, {"blockHash": header.hash}, None)
        if not logs and self._settings.check_bloom:
            await self._believe_empty(endpoint, header)
        logs.sort(key=lambda one: int(one.log_index, 16))
        self._check(endpoint, logs, number, number)
        if any(one.block_hash != header.hash for one in logs):
            trouble = Trouble(Kind.BEHIND, f"logs of another block {number}")
            raise RpcTrouble(endpoint, "eth_getLogs", trouble, "invalid")
        return header, logs

    async def _believe_empty(self, endpoint: Endpoint, header: Header) -> None:
        """An empty answer that the header's bloom contradicts is believed only once the block's logs are really there.

        A bloom may speak falsely for us, since it is a bloom; so the block is asked for with no filter at all. A node
        that has indexed the block answers with the logs that set those bits; one that has not answers with nothing.
        """
        if not self.contracts.may_be_in(int(header.logs_bloom, 16)):
            return
        everything = await endpoint.call("eth_getLogs", [{"blockHash": header.hash}], list[Log])
        ours = set(self.contracts.addresses)
        if not everything or any(one.address.lower() in ours and self.contracts.wants(one) for one in everything):
            trouble = Trouble(Kind.BEHIND, f"empty logs for block {int(header.number, 16)}, against its logsBloom")
            raise RpcTrouble(endpoint, "eth_getLogs", trouble, "invalid")

    # -- decoding ------------------------------------------------------------------------------------------------

    async def _decoded(
        self, logs: Sequence[Log], timestamps: dict[int, int]
    ) -> tuple[tuple[Block, ...], tuple[Quarantined, ...]]:
        """Sorted logs as blocks with their events, a turn at a time so that the commit under way keeps going."""
        blocks: list[Block] = []
        quarantined: list[Quarantined] = []
        events: list[Event] = []
        current = ""
        for n, one in enumerate(logs):
            if one.block_number != current:
                if events:
                    blocks.append(_block(logs[n - 1], timestamps, events))
                    events = []
                current = one.block_number
            self.contracts.decode(one, events, quarantined)
            if n % _LOGS_A_TURN == _LOGS_A_TURN - 1:
                await asyncio.sleep(0)
        if events:
            blocks.append(_block(logs[-1], timestamps, events))
        return tuple(blocks), tuple(quarantined)


def _block(log: Log, timestamps: dict[int, int], events: Sequence[Event]) -> Block:
    number = int(log.block_number, 16)
    return Block(number, _bytes(log.block_hash), None, timestamps[number], tuple(events))


def _joined(span: Span, following: Span) -> Span:
    return Span(
        span.first, following.last, span.blocks + following.blocks, following.end, following.end_timestamp,
        span.final and following.final, span.quarantined + following.quarantined,
    )  # fmt: skip


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text[2:])
