"""`indexer maintain`: the chores of the enabled hooks, work that is due now and then and belongs to no block."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec

from indexer.db import Database
from indexer.errors import UsageError
from indexer.model import Chore
from indexer.registry import Registered


class Done(msgspec.Struct, frozen=True):
    """A chore and what it did: one line, "" for nothing. `error` says why it failed, if it did."""

    chore: str
    hook: str
    did: str = ""
    error: str = ""


def chores_of(hooks: Sequence[Registered], only: str | None = None) -> list[tuple[str, Chore]]:
    """The chores of the enabled hooks, each with its hook's name. Raises UsageError where there is no such chore."""
    found = [(one.name, chore) for one in hooks for chore in getattr(one.hook, "chores", ())]
    chosen = [(hook, chore) for hook, chore in found if only in (None, chore.name)]
    if only is not None and not chosen:
        known = ", ".join(chore.name for _, chore in found) or "none"
        raise UsageError(f"no enabled hook has a chore {only} (there: {known})")
    return chosen


async def carry_out(database: Database, chores: Sequence[tuple[str, Chore]]) -> AsyncIterator[Done]:
    """Run the chores one after the other, whether one fails or not, each on a connection of its own.

    A chore that another process works on at this moment is left to it.
    """
    for hook, chore in chores:
        connection = await database.connect(application_name=f"{database.name} {chore.name}")
        try:
            # held until the connection ends, over all of the chore's transactions
            if not await connection.fetchval(
                "select pg_try_advisory_lock(hashtext('indexer.chore'), hashtext($1))", f"{hook} {chore.name}"
            ):
                yield Done(chore.name, hook, "left to another process, which works on it")
                continue
            try:
                did = await chore.run(connection)
            except Exception as error:
                yield Done(chore.name, hook, error=" ".join(f"{type(error).__name__}: {error}".split()))
            else:
                yield Done(chore.name, hook, did)
        finally:
            connection.terminate()
