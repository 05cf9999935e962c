"""indexer: follows a chain's blocks and runs your hooks on them inside one Postgres transaction.

What a hook needs is here: `from indexer import hook, Block, Event, EventSpec, Tx`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indexer.db import Connection
    from indexer.errors import ConfigError
    from indexer.ledger import note_pruned
    from indexer.migrations import sql_folder
    from indexer.model import Block, BlockRef, Chore, Derived, Event, EventSpec, Hook, Panel
    from indexer.queue import NewJob
    from indexer.registry import hook
    from indexer.transaction import Row, Rows, Tx

__all__ = [
    "Block", "BlockRef", "Chore", "ConfigError", "Connection", "Derived", "Event", "EventSpec", "Hook", "NewJob",
    "Panel", "Row", "Rows", "Tx", "hook", "note_pruned", "sql_folder",
]  # fmt: skip

_PLACES = {
    "indexer.db": ("Connection",),
    "indexer.errors": ("ConfigError",),
    "indexer.ledger": ("note_pruned",),
    "indexer.migrations": ("sql_folder",),
    "indexer.model": ("Block", "BlockRef", "Chore", "Derived", "Event", "EventSpec", "Hook", "Panel"),
    "indexer.queue": ("NewJob",),
    "indexer.registry": ("hook",),
    "indexer.transaction": ("Row", "Rows", "Tx"),
}


def __getattr__(name: str) -> Any:
    # asyncpg and pydantic take a while to import, and `indexer --help` needs neither
    for module, names in _PLACES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
