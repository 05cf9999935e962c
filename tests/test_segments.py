"""What a replay does where: every block once, every hook in its order, and nothing that lacks what it builds on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indexer.config import HookSettings
from indexer.errors import UsageError
from indexer.model import Block
from indexer.registry import Registered
from indexer.segments import earlier, segments
from indexer.transaction import Tx

# -- what is to be done where ------------------------------------------------------------------------------------------


class Named:
    def __init__(self, name: str, after: Sequence[str] = ()) -> None:
        self.name, self.after, self.listens, self.tables = name, tuple(after), (), ()

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None: ...


HOOKS = tuple(
    Registered(one, HookSettings())
    for one in (Named("a"), Named("b", ["a"]), Named("c", ["b"]), Named("d"), Named("e", ["d", "b"]))
)
NAMES = [one.name for one in HOOKS]
BUILDS_ON = {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": set(), "e": {"a", "b", "d"}}
holes = st.dictionaries(st.sampled_from(NAMES), st.sets(st.integers(0, 14)))


def ranges(numbers: set[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


@given(holes, st.sets(st.sampled_from(NAMES)), st.integers(0, 14), st.integers(0, 14), st.booleans())
def test_segments_are_exactly_what_is_asked_for(
    missing: dict[str, set[int]], targets: set[str], one: int, other: int, force: bool
) -> None:
    first, last = min(one, other), max(one, other)
    wanted: dict[int, tuple[set[str], set[str], set[str]]] = {}
    refused = False
    for number in range(first, last + 1):
        lacking = {name for name, numbers in missing.items() if number in numbers}
        fill = targets & lacking
        under = {below for name in fill for below in BUILDS_ON[name]}
        refused = refused or bool(under & lacking - fill)
        again = targets - lacking if force else set()
        if fill or again:
            wanted[number] = fill, under - fill, again
    given_ = {name: ranges(numbers) for name, numbers in missing.items()}
    if refused:
        with pytest.raises(UsageError, match="has a hole at blocks"):
            segments(HOOKS, given_, list(targets), first, last, force=force)
        return
    found = segments(HOOKS, given_, list(targets), first, last, force=force)
    assert {
        number: (set(one.fill), set(one.recall), set(one.again))
        for one in found
        for number in range(one.first, one.last + 1)
    } == wanted
    assert sum(one.last - one.first + 1 for one in found) == len(wanted)  # no block twice
    assert [one.first for one in found] == sorted(one.first for one in found)
    for one in found:  # hooks in the configured order
        for names in (one.fill, one.recall, one.again):
            assert list(names) == [name for name in NAMES if name in names]
    for before, after in pairwise(found):  # no more parts than needed
        assert before.last + 1 < after.first or wanted[before.last] != wanted[after.first]


def test_neighbours_with_the_same_work_are_one_segment() -> None:
    given_ = {"a": [(3, 5)], "d": [(0, 9)]}
    [one] = segments(HOOKS, given_, ["d"], 0, 20, force=False)
    assert (one.first, one.last, one.fill, one.recall, one.again) == (0, 9, ("d",), (), ())


def test_the_refusal_names_the_remedy() -> None:
    with pytest.raises(UsageError) as refused:
        segments(HOOKS, {"b": [(4, 6)], "e": [(0, 9)], "d": [(4, 4)]}, ["e", "d"], 0, 9, force=False)
    text = str(refused.value)
    assert "e comes after b, which has a hole at blocks 4 to 4" in text
    assert "add --hook b" in text and "indexer gaps --fill --hook b" in text


def test_earlier_hooks_are_found_through_others() -> None:
    assert {name: set(earlier(HOOKS, [name])) for name in NAMES} == BUILDS_ON
    assert earlier(HOOKS, ["e", "c"]) == ["a", "b", "d"]
