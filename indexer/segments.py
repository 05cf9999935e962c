"""What a replay has to do where: the blocks, cut at the borders of holes, and the hooks that run in each part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from indexer import ledger
from indexer.db import Connection
from indexer.errors import Temporary, UsageError
from indexer.ledger import ChainRow, Ranges
from indexer.registry import Registered


class Segment(msgspec.Struct, frozen=True):
    """Blocks in which the same hooks have something to do.

    `fill`: hooks that have not applied them. `recall`: hooks that have, and on which those build. `again`: hooks that
    have applied them and are to do so once more.
    """

    first: int
    last: int
    fill: tuple[str, ...]
    recall: tuple[str, ...]
    again: tuple[str, ...]


def segments(
    hooks: Sequence[Registered], gaps: dict[str, Ranges], targets: Sequence[str], first: int, last: int, *, force: bool
) -> list[Segment]:
    """Cut the blocks `first` to `last` where what is to be done changes; parts with nothing to do are left out.

    Raises UsageError where a target builds on a hook that has a hole there and is no target itself.
    """
    edges = {first, last + 1}
    for ranges in gaps.values():
        edges.update(edge for low, high in ranges for edge in (low, high + 1) if first < edge <= last)
    found: list[Segment] = []
    for low, end in pairwise(sorted(edges)):
        missing = {name for name, ranges in gaps.items() if any(a <= low <= b for a, b in ranges)}
        segment = _segment(hooks, missing, targets, low, end - 1, force=force)
        if found and found[-1].last == low - 1 and _work(found[-1]) == _work(segment):
            found[-1] = msgspec.structs.replace(found[-1], last=end - 1)
        elif segment.fill or segment.again:
            found.append(segment)
    return found


def _segment(
    hooks: Sequence[Registered], missing: set[str], targets: Sequence[str], first: int, last: int, *, force: bool
) -> Segment:
    names = [one.name for one in hooks if one.name in targets]
    fill = tuple(name for name in names if name in missing)
    again = tuple(name for name in names if name not in missing) if force else ()
    for name in fill:
        for other in earlier(hooks, [name]):
            if other in missing and other not in fill:
                raise UsageError(
                    f"{name} comes after {other}, which has a hole at blocks {first} to {last}: "
                    f"add --hook {other}, or fill that first (indexer gaps --fill --hook {other})"
                )
    recall = tuple(name for name in earlier(hooks, fill) if name not in fill)
    return Segment(first, last, fill, recall, again)


def _work(segment: Segment) -> tuple[tuple[str, ...], ...]:
    return segment.fill, segment.recall, segment.again


def without(hooks: Sequence[Registered], segment: Segment, failed: str) -> Segment:
    """What is left to do in a block in which a hook failed: nothing for it and for those that build on it."""
    fill = tuple(name for name in segment.fill if name != failed and failed not in earlier(hooks, [name]))
    again = tuple(name for name in segment.again if name != failed)
    recall = tuple(name for name in earlier(hooks, fill) if name not in fill)
    return Segment(segment.first, segment.last, fill, recall, again)


def earlier(hooks: Sequence[Registered], of: Sequence[str]) -> list[str]:
    """All hooks on which those in `of` build, directly or not, in order."""
    # a hook may also come after some that are not enabled
    names = {one.name for one in hooks}
    after = {one.name: names.intersection(one.after) for one in hooks}
    found: set[str] = set()
    ahead = {name for one in of for name in after[one]}
    while ahead - found:
        found |= ahead
        ahead = {name for one in found for name in after[one]}
    return [one.name for one in hooks if one.name in found]


def cut(segment: Segment, first: int | None = None, last: int | None = None) -> Segment:
    low = segment.first if first is None else max(segment.first, first)
    return msgspec.structs.replace(segment, first=low, last=segment.last if last is None else min(segment.last, last))


class Planner:
    """Knows what one chain's hooks have not applied."""

    def __init__(self, connection: Connection, chain: ChainRow, hooks: Sequence[Registered]) -> None:
        self.connection, self.chain, self.hooks = connection, chain, tuple(hooks)

    async def gaps(self) -> dict[str, Ranges]:
        """The blocks that each enabled hook has not applied; all of them, where the daemon does not know it yet."""
        cursor = (await ledger.cursor(self.connection, self.chain.id)).ref.number
        everything = [(self.chain.start_block, cursor)] if cursor >= self.chain.start_block else []
        found = await ledger.gaps(self.connection, self.chain.id)
        known = await ledger.known_hooks(self.connection, self.chain.id)
        return {one.name: found.get(one.name, []) if one.name in known else everything for one in self.hooks}

    async def plan(
        self, first: int | None, last: int | None, targets: Sequence[str], *, force: bool = False
    ) -> list[Segment]:
        """What there is to do between `first` (the start) and `last` (the cursor); see `segments`.

        From here on until the connection ends, no other replay of this chain can begin: a plan must not grow old.
        """
        self.check_names(targets)
        await self._check_known(targets)
        cursor, start = (await ledger.cursor(self.connection, self.chain.id)).ref.number, self.chain.start_block
        low, high = start if first is None else first, cursor if last is None else last
        if first is not None and last is not None and first > last:
            raise UsageError(f"the blocks {first} to {last} run backwards: the first number is the lower one")
        for number in (first, last):
            if number is not None and not start <= number <= cursor:
                raise UsageError(f"block {number} is not applied yet: this chain has the blocks {start} to {cursor}")
        if not await ledger.lock_replays(self.connection, self.chain.id):
            raise Temporary("another replay or rebuild works on this chain: try again once it is done")
        plan = segments(self.hooks, await self.gaps(), targets, low, high, force=force) if low <= high else []
        await self._refuse_pruned(plan)
        return plan

    async def _refuse_pruned(self, plan: Sequence[Segment]) -> None:
        """Rows that were pruned would come back by applying their blocks again, and can't be recalled for others.

        To fill a hole of the very hook whose rows were pruned is fine: what it has not applied nobody has pruned.
        """
        for one in self.hooks:
            pruned = await ledger.pruned_blocks(self.connection, self.chain.id, one.hook.tables)
            for table, last in pruned.items():
                for segment in plan:
                    if segment.first > last or one.name not in (*segment.again, *segment.recall):
                        continue
                    why = f"not give {' and '.join(segment.fill)} what {one.name} inserted there"
                    if one.name in segment.again:
                        why = "insert its rows again, and count them twice"
                    raise UsageError(
                        f"{table} was pruned, of blocks up to {last}: to replay the blocks {segment.first} to "
                        f"{segment.last} would {why}; begin after block {last}"
                    )

    def check_names(self, targets: Sequence[str]) -> None:
        names = [one.name for one in self.hooks]
        for name in targets:
            if name not in names:
                raise UsageError(f"no enabled hook is called {name} (enabled: {', '.join(names)})")

    async def _check_known(self, targets: Sequence[str]) -> None:
        # a table is journalled from the daemon's start on: without that no reorganisation could be undone in it
        known = await ledger.known_hooks(self.connection, self.chain.id)
        for name in targets:
            if name not in known:
                raise UsageError(f"the hook {name} is new: start the daemon with it once, which makes its tables ready")

    async def plan_retry(self, failures: Sequence[dict[str, Any]]) -> list[Segment]:
        """What there is to do to try these failures again: the hooks that failed, and those that build on them as far
        as nothing else is missing there."""
        found: list[Segment] = []
        for first, last in sorted({(one["first"], one["last"]) for one in failures}):
            targets = [one["hook"] for one in failures if (one["first"], one["last"]) == (first, last)]
            plan = await self.plan(first, last, targets)
            for one in self.hooks:
                if one.name not in targets and set(earlier(self.hooks, [one.name])).intersection(targets):
                    try:
                        plan = await self.plan(first, last, [*targets, one.name])
                    except UsageError:
                        continue
                    targets.append(one.name)
            found += plan
        return found
