"""Crash points: a connection that is lost before or after its n-th statement, as if the process had died there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, cast
from weakref import WeakKeyDictionary

import asyncpg

from indexer.db import Connection

T = TypeVar("T")
When = Literal["before", "after"]


def hang_up(connection: Connection) -> None:
    """Lose the connection: the server rolls back what is open, as for a process that was killed."""
    connection.terminate()
    raise asyncpg.ConnectionDoesNotExistError("crash point: the connection is lost")


class CrashPoint:
    """What a connection ran: `statements`, in order, as SQL or as "copy TABLE". `struck` says whether it crashed."""

    def __init__(self, at: int | None, when: When, act: Callable[[Connection], None]) -> None:
        self.at, self.when, self.act = at, when, act
        self.statements: list[str] = []
        self.struck = False

    async def run(self, connection: Connection, statement: str, work: Callable[[], Awaitable[T]]) -> T:
        self.statements.append(statement)
        here = not self.struck and len(self.statements) == self.at
        if here and self.when == "before":
            self._strike(connection)
        result = await work()
        if here and self.when == "after":
            self._strike(connection)
        return result

    def _strike(self, connection: Connection) -> None:
        self.struck = True
        self.act(connection)


@contextmanager
def crash_point(
    connection: Connection,
    at: int | None = None,
    when: When = "before",
    *,
    act: Callable[[Connection], None] = hang_up,
) -> Iterator[CrashPoint]:
    """Within the block, `connection` crashes before or after its `at`-th statement (from 1; BEGIN and COMMIT count).

    Without `at` the statements are only recorded. `act` is what a crash is: by default the connection is lost, for us
    and for the server; in a subprocess of a test it may be `lambda _: os._exit(9)`. A crash after COMMIT is one whose
    commit has happened, though nobody was told.
    """
    point = CrashPoint(at, when, act)
    # asyncpg's connections have no place for attributes of ours, but a class without new ones fits on them
    plain = type(connection)
    connection.__class__ = _watched(plain)
    _points[connection] = point
    try:
        yield point
    finally:
        connection.__class__ = plain
        del _points[connection]


_points: WeakKeyDictionary[Any, CrashPoint] = WeakKeyDictionary()
_classes: dict[type, type] = {}


def _watched(plain: type[Any]) -> type[Any]:
    """A subclass whose statements go through the connection's crash point."""
    if plain not in _classes:
        methods = {name: _method(plain, name) for name in ("execute", "executemany", "fetch", "fetchrow", "fetchval")}
        methods["copy_records_to_table"] = _method(plain, "copy_records_to_table", "copy ")
        _classes[plain] = type(f"Watched{plain.__name__}", (plain,), {"__slots__": (), **methods})
    return _classes[plain]


def _method(plain: type[Any], name: str, prefix: str = "") -> Callable[..., Any]:
    function = cast("Callable[..., Awaitable[Any]]", getattr(plain, name))

    async def method(self: Any, statement: str, *args: Any, **options: Any) -> Any:
        return await _points[self].run(self, prefix + statement, lambda: function(self, statement, *args, **options))

    return method
