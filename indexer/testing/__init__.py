"""Tests for hooks: blocks made by hand or mined by a simulated chain, run through the real pipeline on a real Postgres.

    from indexer.testing import assert_set_equals_rows, assert_undo_restores, make_blocks, run_hooks

    BLOCKS = make_blocks([("Sold", {"price": 3})], [], [("Sold", {"price": 4}), ("Sold", {"price": 5})])

    async def test_sales(indexer_connection):
        await run_hooks(indexer_connection, [sales], BLOCKS)
        assert await indexer_connection.fetchval("select sum(price) from sale") == 12

The fixtures `indexer_connection` and `indexer_database_url` come from the pytest plugin (`indexer.pytest_plugin`): a
migrated database for each test. `crash_point` interrupts a transaction at any of its statements. A FakeChain served by
a FakeNode stands in for a node, with forks and the lies of providers; a FakeCore and its FakeCoreNode for those of the
Open Audio Core chain (`indexer.fakechain`).
"""

from indexer.fakechain import (
    FakeBlock,
    FakeChain,
    FakeCore,
    FakeCoreNode,
    FakeLog,
    FakeNode,
    Fault,
    FaultSource,
    encode_event,
    event_abi,
)
from indexer.testing.bench import Bench, Tables, run_hooks
from indexer.testing.blocks import make_blocks, one_span, one_span_a_block, spans_of
from indexer.testing.checks import assert_set_equals_rows, assert_undo_restores
from indexer.testing.crash import CrashPoint, crash_point, hang_up

__all__ = [
    "Bench",
    "CrashPoint",
    "FakeBlock",
    "FakeChain",
    "FakeCore",
    "FakeCoreNode",
    "FakeLog",
    "FakeNode",
    "Fault",
    "FaultSource",
    "Tables",
    "assert_set_equals_rows",
    "assert_undo_restores",
    "crash_point",
    "encode_event",
    "event_abi",
    "hang_up",
    "make_blocks",
    "one_span",
    "one_span_a_block",
    "run_hooks",
    "spans_of",
]
