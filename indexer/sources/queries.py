"""What is asked of a node about blocks and logs, in pieces as small as it wants them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from indexer.sources.contracts import Contracts
from indexer.sources.endpoint import RpcTrouble
from indexer.sources.provider_errors import Kind, Trouble
from indexer.sources.rpc import MOST_CALLS_A_BATCH, RpcEndpoint
from indexer.sources.wire import Header, Log, MaybeHeader, check_header, quantity

# Headers more after each batch that went well: a limit is tried again now and then.
_BATCH_GROWTH = 0.1
_PAUSE_SECONDS = 0.5


async def chain_id(endpoint: RpcEndpoint) -> str:
    return str(quantity(await endpoint.call("eth_chainId", [], str)))


async def newest(endpoint: RpcEndpoint) -> Header:
    """The node's newest block, whose header it then does not have to be asked for again."""
    header = await endpoint.call("eth_getBlockByNumber", ["latest", False], MaybeHeader)
    if header is None:
        raise endpoint.failed("eth_getBlockByNumber", Trouble(Kind.BEHIND, "no newest block"), "invalid")
    check_header(header)
    endpoint.announce(header)
    return header


async def logs(
    endpoint: RpcEndpoint, contracts: Contracts, where: dict[str, Any], span: tuple[int, int] | None = None
) -> list[Log]:
    """eth_getLogs for all contracts, with the addresses split where the node wants fewer.

    `where`: the blocks. `span`: the range, if it is one; None for one block by its hash. Raises RpcTrouble.
    """
    addresses, found = contracts.addresses, list[Log]()
    one_block = span is None or span[0] == span[1]
    size = min(len(addresses), endpoint.max_addresses or len(addresses))
    position = 0
    while position < len(addresses):
        some = addresses[position : position + size]
        query = {**where, "address": some, "topics": [contracts.topics]}
        try:
            found += await endpoint.call("eth_getLogs", [query], list[Log], span=span)
        except RpcTrouble as failed:
            too_many = failed.trouble.kind is Kind.ADDRESSES
            # one block can't be made smaller, but what is asked of it can
            if size == 1 or not (too_many or (one_block and failed.trouble.kind is Kind.RANGE)):
                raise
            size = max(1, size // 2)
            if too_many:
                endpoint.max_addresses = min(size, endpoint.max_addresses or size)
            continue
        position += size
    return found


async def header(endpoint: RpcEndpoint, number: int) -> Header:
    """The header of a block that the chain has; raises RpcTrouble, Impossible."""
    return _there(endpoint, number, await endpoint.call("eth_getBlockByNumber", [hex(number), False], MaybeHeader))


async def headers(endpoint: RpcEndpoint, numbers: Sequence[int]) -> dict[int, Header]:
    """The headers of many blocks, in batches as large as the node takes; raises RpcTrouble, Impossible."""
    found: dict[int, Header] = {}
    while len(found) < len(numbers):
        some = numbers[len(found) : len(found) + int(endpoint.max_batch)]
        if len(some) == 1:
            found[some[0]] = await header(endpoint, some[0])
            continue
        try:
            answers = await endpoint.batch("eth_getBlockByNumber", [[hex(one), False] for one in some], MaybeHeader)
        except RpcTrouble as failed:
            if not failed.declined or failed.trouble.kind in (Kind.BILLING, Kind.BEHIND):
                raise
            endpoint.max_batch = max(1.0, len(some) / 2)
            if failed.trouble.kind is Kind.RATE_LIMITED:  # each call of a batch may count, and be too many at once
                await asyncio.sleep(failed.trouble.retry_after or _PAUSE_SECONDS)
            continue
        found |= {number: _there(endpoint, number, one) for number, one in zip(some, answers, strict=True)}
        endpoint.max_batch = min(endpoint.max_batch + _BATCH_GROWTH, MOST_CALLS_A_BATCH)
    return found


def _there(endpoint: RpcEndpoint, number: int, answer: Header | None) -> Header:
    """A null for a block that was announced means a node that lags, never an empty block."""
    if answer is None:
        raise behind(endpoint, f"no block {number} yet", "eth_getBlockByNumber")
    check_header(answer, number)
    endpoint.newest = max(endpoint.newest, number)
    return answer


def behind(endpoint: RpcEndpoint, message: str, method: str = "eth_getLogs") -> RpcTrouble:
    """The exception to raise where a node shows that it does not have all of a block yet."""
    return endpoint.failed(method, Trouble(Kind.BEHIND, message), "invalid")
