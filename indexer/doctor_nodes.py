"""The doctor's checks of nodes: there at all, of the right network, fresh, and what they can do."""

from __future__ import annotations

import time

import aiohttp
import msgspec

from indexer.config import EndpointSettings, Settings
from indexer.doctor_finding import Checkup, Verdict, fail, ok, warn
from indexer.sources import core_queries, core_wire, queries
from indexer.sources.contracts import Contracts
from indexer.sources.core_queries import CoreEndpoint
from indexer.sources.endpoint import Impossible, RpcTrouble
from indexer.sources.provider_errors import Kind, too_large
from indexer.sources.ranges import RangeSize
from indexer.sources.recorded import RecordedSource
from indexer.sources.rpc import RpcEndpoint
from indexer.sources.wire import Header, MaybeHeader

# A head is stale after so many block times, and not before so many seconds.
_STALE_BLOCKS, _STALE_SECONDS = 20, 60.0
# A block's time runs ahead of a right clock by some seconds at most.
_AHEAD_SECONDS = 15.0
_APART_BLOCKS = 10
_SPACING_BLOCKS = 20
# Enough to double from the first range to the largest.
_RANGES = 10
_FEW_BLOCKS = 10
_REACH = "look at chain.endpoints, at the node and at the way there"


class Known(msgspec.Struct):
    """What the database knows of the chain: its id, and the block that is needed next."""

    identity: str | None = None
    next_block: int | None = None


class _Node(msgspec.Struct):
    """What was found of a node so far."""

    chain_id: str = ""
    newest: int = -1
    timestamp: int = 0


async def examine(checkup: Checkup, settings: Settings, contracts: Contracts | None, known: Known) -> None:
    """Check every endpoint; `contracts` are those of an EVM chain, if they are well."""
    nodes: dict[str, _Node] = {}
    async with aiohttp.ClientSession() as session:
        for one in settings.chain.endpoints:
            node = _Node()
            group, wanted = f"node {one.label}", _wanted(settings, known, nodes)
            if settings.chain.source == "core":
                core = _Core(CoreEndpoint(one, session, checkup.seconds), node)
                well = await checkup.run(group, "network", core.network(wanted), _REACH)
                if well:
                    await checkup.run(group, "head", core.head(), _REACH)
                    await checkup.run(group, "history", core.history(known.next_block), _REACH)
            else:
                evm = _Evm(RpcEndpoint(one, session, checkup.seconds), node, settings)
                well = await checkup.run(group, "network", evm.network(wanted), _REACH)
                if well and await checkup.run(group, "head", evm.head(), _REACH):
                    await checkup.run(group, "finality", evm.finality(), _REACH)
                    await checkup.run(group, "history", evm.history(known.next_block), _REACH)
                    if contracts is not None:
                        await checkup.run(group, "log ranges", evm.log_ranges(contracts), _REACH)
                    await checkup.run(group, "batches", evm.batches(), _REACH)
                    if one.ws is not None:
                        await checkup.run(group, "websocket", _websocket(session, one, node.chain_id), _REACH)
            if well:
                nodes[one.label] = node
    heights = {name: node.newest for name, node in nodes.items() if node.newest >= 0}
    if len(heights) > 1:
        checkup.add("nodes", "heads together", _together(heights))


def _wanted(settings: Settings, known: Known, nodes: dict[str, _Node]) -> dict[str, str]:
    """Who says which network it must be."""
    wanted = {"chain.chain_id": settings.chain.chain_id, "the database": known.identity}
    wanted |= {f"node {name}": node.chain_id for name, node in nodes.items()}
    return {who: chain_id for who, chain_id in wanted.items() if chain_id is not None}


def _network(found: str, wanted: dict[str, str]) -> Verdict:
    others = [f"{who} says {chain_id}" for who, chain_id in wanted.items() if chain_id != found]
    if others:
        advice = "point chain.endpoints at the right network, or mend chain.chain_id"
        return fail(f"it is a node of chain {found}, but {', '.join(others)}", advice)
    return ok(f"chain {found}")


def _together(heights: dict[str, int]) -> Verdict:
    best = max(heights.values())
    behind = [f"{name} by {best - height:,}" for name, height in heights.items() if best - height > _APART_BLOCKS]
    if behind:
        return warn(f"behind the best head: {', '.join(behind)} blocks", "wait until they have caught up, or mend them")
    return ok(f"all within {_APART_BLOCKS} blocks of {best:,}")


def _freshness(number: int, timestamp: int, block_seconds: float) -> Verdict:
    age = time.time() - timestamp
    if age < -_AHEAD_SECONDS:
        advice = "set the clocks by NTP: this machine's or the node's is wrong"
        return fail(f"block {number:,} is {-age:,.0f} s in the future", advice)
    if age > max(_STALE_BLOCKS * block_seconds, _STALE_SECONDS):
        advice = "see whether the node still syncs, or whether the chain stands still"
        return warn(f"block {number:,} is {age:,.0f} s old, at a block each {block_seconds:.3g} s", advice)
    return ok(f"block {number:,}, {max(age, 0):,.0f} s old, a block each {block_seconds:.3g} s")


def _needed(next_block: int | None, newest: int) -> int | None:
    """The block to ask for as history: what the daemon needs next, if the chain has it."""
    return next_block if next_block is not None and 0 <= next_block <= newest else None


class _Evm:
    """Checks of one JSON-RPC endpoint."""

    def __init__(self, endpoint: RpcEndpoint, node: _Node, settings: Settings) -> None:
        self._endpoint, self._node, self._settings = endpoint, node, settings

    async def network(self, wanted: dict[str, str]) -> Verdict:
        self._node.chain_id = await queries.chain_id(self._endpoint)
        return _network(self._node.chain_id, wanted)

    async def head(self) -> Verdict:
        header = await queries.newest(self._endpoint)
        number, timestamp = header.height, int(header.timestamp, 16)
        self._node.newest, self._node.timestamp = number, timestamp
        before = max(number - _SPACING_BLOCKS, 0)
        spacing = 0.0
        if before < number:
            earlier = await queries.header(self._endpoint, before)
            spacing = (timestamp - int(earlier.timestamp, 16)) / (number - before)
        return _freshness(number, timestamp, spacing)

    async def finality(self) -> Verdict:
        found: dict[str, int | None] = {}
        for tag in ("finalized", "safe"):
            try:
                header: Header | None = await self._endpoint.call("eth_getBlockByNumber", [tag, False], MaybeHeader)
            except RpcTrouble as failed:
                if not failed.declined or failed.trouble.kind in (Kind.RATE_LIMITED, Kind.BILLING):
                    raise
                header = None
            found[tag] = header.height if header is not None else None
        if found["finalized"] is None:
            blocks = self._settings.chain.confirmations
            return warn(
                f"no finalized tag: what is {blocks} blocks below the head counts as final",
                "set chain.confirmations to what this chain never reorganises",
            )
        safe = "no safe tag" if found["safe"] is None else f"safe {found['safe']:,}"
        below = max(self._node.newest - found["finalized"], 0)
        return ok(f"finalized {found['finalized']:,} ({below:,} below the head), {safe}")

    async def history(self, next_block: int | None) -> Verdict:
        needed = _needed(next_block, self._node.newest)
        if needed is None:
            return ok("no block of the past is needed now")
        try:
            await queries.header(self._endpoint, needed)
        except (RpcTrouble, Impossible) as error:
            why = error.trouble.message if isinstance(error, RpcTrouble) else str(error)
            return fail(f"block {needed:,}, the next one needed, is not to be had: {why}", "name a node that keeps it")
        return ok(f"has block {needed:,}, the next one needed")

    async def log_ranges(self, contracts: Contracts) -> Verdict:
        """Grow and shrink a range of newest blocks as the source does, until it is known what the node takes."""
        span, newest = self._settings.span, self._node.newest
        most = min(span.max_blocks, newest + 1)
        size, said, taken, logs = RangeSize(max_blocks=most), "", 0, 0
        for _ in range(_RANGES):
            blocks = size.blocks
            first, where = newest - blocks + 1, {"fromBlock": hex(newest - blocks + 1), "toBlock": hex(newest)}
            try:
                logs = len(await queries.logs(self._endpoint, contracts, where, (first, newest)))
            except RpcTrouble as failed:
                if failed.trouble.kind is not Kind.RANGE:
                    raise
                if blocks == 1:
                    return fail(f"not even one block is given: {failed.trouble.message}", "name another node")
                said = _limit(failed)
                size.shrink(too_large(first, newest, failed.trouble))
                continue
            taken = blocks
            if said or blocks == most or logs >= span.max_events:
                break
            size.went_well(blocks, logs, span.max_events)
        if not taken:
            return warn(f"no range was taken in {_RANGES} tries; {said}", "history will be slow: name another node")
        found = f"takes {taken:,} blocks ({logs:,} logs) in one range"
        if said and taken <= _FEW_BLOCKS:
            return warn(f"{found}; {said}", "history will be slow: name a node that gives more")
        return ok(f"{found}; {said}" if said else found)

    async def batches(self) -> Verdict:
        numbers = range(max(self._node.newest - 1, 0), self._node.newest + 1)
        calls = [[hex(number), False] for number in numbers]
        try:
            await self._endpoint.batch("eth_getBlockByNumber", calls, MaybeHeader)
        except RpcTrouble as failed:
            if not failed.declined:
                raise
            said = failed.trouble.message
            return warn(f"refused ({said}): headers are asked for one by one", "nothing, unless history is slow")
        return ok(f"{len(calls)} calls in one request")


def _limit(failed: RpcTrouble) -> str:
    """What a refusal limits, in the provider's words."""
    what = "more blocks" if failed.trouble.max_blocks is not None else "more results or blocks"
    return f"{what} are refused ({failed.trouble.message[:120]})"


async def _websocket(session: aiohttp.ClientSession, settings: EndpointSettings, chain_id: str) -> Verdict:
    """Subscribe to new heads, and see that it is the same network."""
    assert settings.ws is not None
    polled = "new heads are polled for meanwhile: look at the endpoint's ws"
    try:
        async with session.ws_connect(settings.ws.get_secret_value()) as socket:
            answers = {}
            for id_, method, params in ((1, "eth_chainId", []), (2, "eth_subscribe", ["newHeads"])):
                await socket.send_json({"jsonrpc": "2.0", "id": id_, "method": method, "params": params})
                while id_ not in answers:
                    given = await socket.receive_json()
                    answers[given.get("id")] = given
    except (aiohttp.ClientError, OSError, ValueError, TypeError, AttributeError) as error:
        return warn(f"not reached ({type(error).__name__})", polled)  # its text may hold the address, and with it a key
    try:
        found = str(int(answers[1]["result"], 16))
    except (KeyError, ValueError, TypeError):
        return warn("does not say of which chain it is", polled)
    if found != chain_id:
        return fail(f"it is of chain {found}, but the node's url of {chain_id}", "mend the endpoint's ws")
    if "result" not in answers[2]:
        return warn("takes no subscription to new heads", polled)
    return ok("announces new heads")


class _Core:
    """Checks of one Core node."""

    def __init__(self, endpoint: CoreEndpoint, node: _Node) -> None:
        self._endpoint, self._node = endpoint, node
        self._earliest = 0

    async def network(self, wanted: dict[str, str]) -> Verdict:
        found = await core_queries.standing(self._endpoint, pruning=True)
        self._node.chain_id, self._node.newest, self._earliest = found.chain_id, found.height, found.earliest
        return _network(found.chain_id, wanted)

    async def head(self) -> Verdict:
        newest, before = self._node.newest, max(self._node.newest - _SPACING_BLOCKS, 1)
        answer = await core_queries.blocks(self._endpoint, [before, newest])
        block, earlier = answer.blocks.get(newest), answer.blocks.get(before)
        if block is None:
            return fail(f"block {newest:,}, its head, is not to be had", _REACH)
        timestamp = core_wire.seconds(block.timestamp)
        self._node.timestamp = timestamp
        spacing = 0.0
        if earlier is not None and before < newest:
            spacing = (timestamp - core_wire.seconds(earlier.timestamp)) / (newest - before)
        found = _freshness(newest, timestamp, spacing)
        if found.state == "ok" and self._endpoint.lacks("GetBlocks"):
            return warn(f"{found.reason}; no GetBlocks: blocks are asked for one by one", "name a newer node")
        return found

    async def history(self, next_block: int | None) -> Verdict:
        needed = _needed(next_block, self._node.newest)
        if needed is not None and self._earliest > needed:
            reason = f"block {needed:,} is needed next, but this node has block {self._earliest:,} and later"
            return fail(reason, "name a node that keeps all blocks")
        return ok(f"blocks from {self._earliest:,} on" if self._earliest else "keeps all blocks, as far as it says")


def recorded(checkup: Checkup, source: RecordedSource, settings: Settings, known: Known) -> None:
    """Check a file of blocks, whose beginning and end have been read."""
    header = source.header
    checkup.add("file", "network", _network(header.chain_id, _wanted(settings, known, {})))
    blocks = f"blocks {header.first:,} to {header.last:,}"
    if known.next_block is not None and known.next_block < header.first:
        reason = f"block {known.next_block:,} is needed next, but it has {blocks}"
        checkup.add("file", "history", fail(reason, "name a file that begins where the database ends"))
    else:
        checkup.add("file", "history", ok(blocks))
