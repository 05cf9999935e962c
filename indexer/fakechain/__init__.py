"""Simulated chains and the nodes that serve them: for tests, the testing kit, and a demo without anvil.

There is no EVM in a FakeChain: a transaction is the logs that it emitted. What an indexer can see is real, though:
JSON-RPC over HTTP and WebSocket, ABI-encoded logs, keccak blooms, forks, and the lies and limits of nodes (`faults`).

    chain = FakeChain()
    chain.mine([encode_event(played, {"trackId": "1", ...}, ADDRESS)])
    async with FakeNode(chain) as node:
        node.faults.append(rate_limited(2, retry_after=1))
        ...  # point an indexer at node.url, and node.ws_url
        chain.fork(1, [[], []])

A FakeCore is a chain of Open Audio Core blocks, served by a FakeCoreNode, which speaks Connect; `recorded_shape` makes
one that looks like the public chain.
"""

from indexer.fakechain.answers import RpcError
from indexer.fakechain.chain import FakeBlock, FakeChain
from indexer.fakechain.core import FakeCore, FakeCoreBlock, core_play, core_plays
from indexer.fakechain.core_node import FakeCoreNode, connect_error, cut_short
from indexer.fakechain.core_shape import recorded_shape
from indexer.fakechain.encoding import FakeLog, encode_event, event_abi, logs_bloom
from indexer.fakechain.faults import (
    Fault,
    FaultSource,
    empty_logs,
    garbage,
    http_error,
    limit_range,
    limit_results,
    missing_block,
    null_blocks,
    old_head,
    rate_limited,
    slow,
    wrong_chain,
)
from indexer.fakechain.node import FakeNode

__all__ = [
    "FakeBlock",
    "FakeChain",
    "FakeCore",
    "FakeCoreBlock",
    "FakeCoreNode",
    "FakeLog",
    "FakeNode",
    "Fault",
    "FaultSource",
    "RpcError",
    "connect_error",
    "core_play",
    "core_plays",
    "cut_short",
    "empty_logs",
    "encode_event",
    "event_abi",
    "garbage",
    "http_error",
    "limit_range",
    "limit_results",
    "logs_bloom",
    "missing_block",
    "null_blocks",
    "old_head",
    "rate_limited",
    "recorded_shape",
    "slow",
    "wrong_chain",
]
