"""What is asked of a Core node: how it stands, and its blocks, many to a call or one by one from an older node."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from indexer.sources import core_wire
from indexer.sources.connect import ConnectEndpoint
from indexer.sources.core_wire import CoreBlock, RawBlock
from indexer.sources.endpoint import Impossible, RpcTrouble
from indexer.sources.provider_errors import Kind, Trouble

MOST_HEIGHTS = 500  # that a node takes in one call
# From a node without GetBlocks: so many blocks make one piece, so many of them are asked for at the same time.
MOST_SINGLES = 40
_SINGLES_IN_FLIGHT = 8


class CoreEndpoint(ConnectEndpoint):
    """A node of the Open Audio Core chain."""

    service = "core.v1.CoreService"
    measured = frozenset({"GetNodeInfo", "GetStatus"})


class Standing(NamedTuple):
    """How a node stands: its chain, its newest block, and the oldest that it has kept, where it said that."""

    chain_id: str
    height: int
    earliest: int = 0


class Answer(NamedTuple):
    """Blocks by height, as far as the node gave them, and its newest height (-1 where it did not say)."""

    blocks: dict[int, CoreBlock | RawBlock]
    height: int


class _NodeInfo(msgspec.Struct, rename="camel"):
    chainid: str = ""
    current_height: str | int = 0


class _ChainInfo(msgspec.Struct, rename="camel"):
    chain_id: str = ""
    current_height: str | int = 0


class _PruningInfo(msgspec.Struct, rename="camel"):
    earliest_height: str | int = 0


class _Status(msgspec.Struct, rename="camel"):
    chain_info: _ChainInfo | None = None
    pruning_info: _PruningInfo | None = None


async def standing(endpoint: CoreEndpoint, *, pruning: bool = False) -> Standing:
    """How the node stands, by the lightest question that it knows; with its oldest block where `pruning` matters."""
    methods = ("GetStatus", "GetNodeInfo") if pruning else ("GetNodeInfo", "GetStatus")
    known = [method for method in methods if not endpoint.lacks(method)] or methods  # lacking both is a mishap
    for method in known:
        try:
            found = await (_by_status if method == "GetStatus" else _by_info)(endpoint)
        except RpcTrouble:
            if not endpoint.lacks(method) or method == known[-1]:
                raise
            continue
        if found.chain_id:
            endpoint.newest = max(endpoint.newest, found.height)
            return found
    raise Impossible("a node that does not name its chain")


async def _by_info(endpoint: CoreEndpoint) -> Standing:
    info = await endpoint.call("GetNodeInfo", {}, _NodeInfo)
    return Standing(info.chainid, core_wire.height(info.current_height))


async def _by_status(endpoint: CoreEndpoint) -> Standing:
    status = await endpoint.call("GetStatus", {}, _Status)
    chain, pruning = status.chain_info or _ChainInfo(), status.pruning_info or _PruningInfo()
    return Standing(chain.chain_id, core_wire.height(chain.current_height), core_wire.height(pruning.earliest_height))


async def chain_id(endpoint: CoreEndpoint) -> str:
    return (await standing(endpoint)).chain_id


async def blocks(endpoint: CoreEndpoint, numbers: Sequence[int]) -> Answer:
    """The blocks that the node has of these, each checked to be the one asked for; raises RpcTrouble, Impossible."""
    if not endpoint.lacks("GetBlocks"):
        try:
            return await _many(endpoint, numbers)
        except RpcTrouble:
            if not endpoint.lacks("GetBlocks"):
                raise
    try:
        return await _one_by_one(endpoint, numbers[:MOST_SINGLES])
    except RpcTrouble:
        if endpoint.lacks("GetBlock"):  # it knows neither: a mishap, and not an older node
            endpoint.forgive("GetBlock", "GetBlocks")
        raise


async def _many(endpoint: CoreEndpoint, numbers: Sequence[int]) -> Answer:
    message = {"height": [str(number) for number in numbers]}
    answer = await endpoint.call("GetBlocks", message, core_wire.Blocks, core_wire.RawBlocks)
    found: dict[int, CoreBlock | RawBlock] = {}
    for key, block in answer.blocks.items():
        number = core_wire.height(key)
        if core_wire.height(block.height) != number:
            raise Impossible(f"block {block.height} for block {number}")
        found[number] = block
    return Answer(found, _noted(endpoint, answer.current_height))


async def _one_by_one(endpoint: CoreEndpoint, numbers: Sequence[int]) -> Answer:
    found: dict[int, CoreBlock | RawBlock] = {}
    newest, waiting = -1, iter(numbers)

    async def ask() -> None:
        nonlocal newest
        for number in waiting:
            block, seen = await _one(endpoint, number)
            newest = max(newest, seen)
            if block is not None:
                found[number] = block

    tasks = [asyncio.create_task(ask()) for _ in range(min(_SINGLES_IN_FLIGHT, len(numbers)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return Answer(found, newest)


async def _one(endpoint: CoreEndpoint, number: int) -> tuple[CoreBlock | RawBlock | None, int]:
    """The block, None where the node does not have it; and the node's newest height, -1 where it did not say."""
    message = {"height": str(number)}
    try:
        answer = await endpoint.call("GetBlock", message, core_wire.OneBlock, core_wire.RawOneBlock)
    except RpcTrouble as failed:
        if failed.trouble.kind is Kind.BEHIND:  # how some nodes say it
            return None, -1
        raise
    newest, block = _noted(endpoint, answer.current_height), answer.block
    if block is None or core_wire.height(block.height) < 0:
        return None, newest
    if core_wire.height(block.height) != number:
        raise Impossible(f"block {block.height} for block {number}")
    return block, newest


def _noted(endpoint: CoreEndpoint, given: str | int) -> int:
    newest = core_wire.height(given)
    endpoint.newest = max(endpoint.newest, newest)
    return newest


def behind(endpoint: CoreEndpoint, message: str) -> RpcTrouble:
    """The exception to raise where a node does not have a block that the chain has."""
    return endpoint.failed("GetBlocks", Trouble(Kind.BEHIND, message), "invalid")
