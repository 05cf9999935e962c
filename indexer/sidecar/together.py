"""Work that is cheaper done for many at once: what comes while some is being done goes together with the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")
R = TypeVar("R")


class _Waiting(msgspec.Struct, Generic[T, R], frozen=True):
    item: T
    done: asyncio.Future[R]


class Together(Generic[T, R]):
    """`work` does several items and returns a result each, in their order.

    What it raises is everybody's, unless `alone`: then each item is tried by itself before it is its own.
    """

    def __init__(
        self, work: Callable[[list[T]], Awaitable[Sequence[R]]], *, alone: Callable[[Exception], bool] = lambda _: False
    ) -> None:
        self._work, self._alone = work, alone
        self._waiting: list[_Waiting[T, R]] = []
        self._working: asyncio.Task[None] | None = None

    async def do(self, item: T) -> R:
        """The item's result, once it is done. A caller that is cancelled leaves its item with the others."""
        one: _Waiting[T, R] = _Waiting(item, asyncio.get_running_loop().create_future())
        self._waiting.append(one)
        if self._working is None:
            self._working = asyncio.create_task(self._all(), name="together")
        return await one.done

    async def _all(self) -> None:
        try:
            while self._waiting:
                some, self._waiting = self._waiting, []
                await self._some(some)
        finally:
            self._working = None

    async def _some(self, some: list[_Waiting[T, R]]) -> None:
        try:
            results = await self._work([one.item for one in some])
        except Exception as error:
            if len(some) > 1 and self._alone(error):
                for one in some:
                    await self._some([one])
                return
            for one in some:
                if not one.done.done():
                    one.done.set_exception(error)
        else:
            for one, result in zip(some, results, strict=True):
                if not one.done.done():
                    one.done.set_result(result)
