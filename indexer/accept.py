"""`indexer chain accept`: a chain's height restarts under a new chain id, and an operator says that this is meant.

What was indexed of the old chain stays: its rows, and in the schema `indexer` its number, cursor, coverage and history,
under the name `NAME@OLD_ID`. The new chain takes the configured name with a number of its own, so that heights, which
begin anew, never meet those of the old one.
"""

from __future__ import annotations

import msgspec

from indexer import ledger
from indexer.config import ChainSettings
from indexer.db import Connection, is_led
from indexer.errors import Temporary, UsageError
from indexer.ledger import ChainRow
from indexer.pipeline import transaction


class Accepted(msgspec.Struct, frozen=True):
    """The old chain under its new name, the new one, and the block at which it goes on."""

    old: ChainRow
    new: ChainRow
    next_block: int


async def accept(connection: Connection, settings: ChainSettings, identity: str, start_block: int | None) -> Accepted:
    """Have the configured chain be `identity` from now on; it begins with `start_block`, or where its settings say.

    A chain that was there under that name before goes on where it stopped. Raises UsageError where the chain is not
    known or is that one already, Temporary while a daemon leads it.
    """
    name = settings.name
    async with transaction(connection):
        old = await ledger.find_chain(connection, name)
        if old is None:
            raise UsageError(f"this database knows no chain {name}: start it with `indexer run`")
        if old.identity == identity:
            raise UsageError(f"chain {name} is {identity} already: there is nothing to accept")
        await ledger.hold(connection, old.id)
        if await is_led(connection, old.id):
            raise Temporary(f"a daemon leads chain {name}: stop it, and try again")
        known = {one["name"]: one for one in await ledger.chains(connection)}
        former = next(
            (one for one in known.values() if one["identity"] == identity and one["name"].startswith(f"{name}@")), None
        )
        if former is not None and start_block is not None:
            raise UsageError(
                f"this database has {identity} as chain {former['name']} from block {former['start_block']} on, and "
                "it goes on where it stopped: leave out --start-block"
            )
        kept = f"{name}@{old.identity}"
        await ledger.rename_chain(connection, old.id, kept)
        if former is not None:
            await ledger.rename_chain(connection, former["id"], name)
        choices = (start_block, settings.start_block, 1 if settings.source == "core" else old.start_block)
        start = next(one for one in choices if one is not None)
        new = await ledger.open_chain(connection, name, settings.source, identity, start)
        at = await ledger.cursor(connection, new.id)
    return Accepted(msgspec.structs.replace(old, name=kept), new, at.ref.number + 1)
