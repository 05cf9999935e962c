"""Work done for many at once: what comes meanwhile goes together, and what fails may be tried alone."""

from __future__ import annotations

import asyncio

import pytest

from indexer.sidecar.together import Together


async def test_what_comes_while_some_is_done_goes_together() -> None:
    batches: list[list[int]] = []

    async def work(items: list[int]) -> list[int]:
        batches.append(items)
        await asyncio.sleep(0.01)
        return [item * 2 for item in items]

    together = Together(work)
    first = asyncio.create_task(together.do(1))
    await asyncio.sleep(0)
    others = [asyncio.create_task(together.do(n)) for n in range(2, 6)]
    await asyncio.sleep(0)
    others[1].cancel()  # its item stays with the others
    told = await asyncio.gather(first, *others, return_exceptions=True)
    assert batches == [[1], [2, 3, 4, 5]]
    assert told[:2] == [2, 4] and isinstance(told[2], asyncio.CancelledError) and told[3:] == [8, 10]
    assert await together.do(7) == 14  # and goes on afterwards


@pytest.mark.parametrize("alone", [False, True])
async def test_what_fails_is_everybodys_unless_it_is_tried_alone(alone: bool) -> None:
    async def work(items: list[int]) -> list[int]:
        await asyncio.sleep(0)
        if 3 in items:
            raise ValueError("three")
        return items

    together = Together(work, alone=lambda error: alone and isinstance(error, ValueError))
    told = await asyncio.gather(*(together.do(n) for n in (0, 1, 2, 3, 4)), return_exceptions=True)
    failed = [n for n, one in enumerate(told) if isinstance(one, ValueError)]
    assert failed == ([3] if alone else [0, 1, 2, 3, 4])
