"""indexer: follows a chain's blocks and runs your hooks on them inside one Postgres transaction.

What a hook needs is here: `from indexer import hook, Block, Event, EventSpec, Tx`.
"""

from indexer.migrations import sql_folder
from indexer.model import Block, BlockRef, Event, EventSpec, Hook, Panel
from indexer.registry import hook
from indexer.transaction import Row, Rows, Tx

__all__ = ["Block", "BlockRef", "Event", "EventSpec", "Hook", "Panel", "Row", "Rows", "Tx", "hook", "sql_folder"]
