"""How many blocks to ask for in one range, and how often for new ones: both learn from what came before."""

from __future__ import annotations

from collections import deque

_START_BLOCKS = 100
_PROBE_GROWTH = 1.05
# Failures in a row after which a range is made smaller, though nobody said that it was too large.
_FAILURES = 3


class RangeSize:
    """`blocks` is the size of the next range, at first `start` and never more than `max_blocks`."""

    def __init__(self, *, max_blocks: int, start: int = _START_BLOCKS) -> None:
        self.max_blocks = max_blocks
        self._ceiling = float(max_blocks)
        self._failures = 0
        self.blocks = min(start, max_blocks)

    def shrink(self, blocks: int, *, lasting: bool = True) -> None:
        """A provider refused; `blocks` is what it takes. Not `lasting`: it was overloaded, and may be well soon."""
        self.blocks = max(1, min(self.blocks, blocks))
        if lasting:
            self._ceiling = float(self.blocks)

    def failed(self, *, too_long: bool) -> bool:
        """A query failed for another reason, or so it says. What took `too_long`, or fails again and again, may be too
        much for the node whatever it calls that: then it is halved, which is returned."""
        self._failures += 1
        if not too_long and self._failures < _FAILURES:
            return False
        self.shrink(self.blocks // 2)
        return True

    def went_well(self, blocks: int, events: int, target_events: int) -> None:
        """A range of `blocks` gave `events`: aim at `target_events`, at most doubling.

        The ceiling that a refusal set rises slowly, so that a limit is tried again now and then but not every time.
        """
        self._failures = 0
        self._ceiling = min(self._ceiling * _PROBE_GROWTH + 0.1, self.max_blocks)
        wanted = blocks * target_events / events if events else blocks * 2.0
        self.blocks = max(1, int(min(wanted, self.blocks * 2, self._ceiling)))


class EventTarget:
    """How many events one span should hold: the configured number, or fewer where their transaction takes too long."""

    def __init__(self, max_events: int, max_seconds: float) -> None:
        self._max_events, self._max_seconds = max_events, max_seconds
        self.events = max_events

    def took(self, seconds: float) -> None:
        """Learn from a span's transaction: in proportion where it was too long, and slowly back."""
        if seconds > self._max_seconds:
            self.events = max(1, int(self.events * self._max_seconds / seconds))
        else:
            self.events = min(self._max_events, self.events + self.events // 10 + 1)


class BlockPace:
    """How often to ask for a new block: as `configured`, or a quarter of the block time that the newest ones show."""

    def __init__(self, configured: float | None) -> None:
        self._configured = configured
        self._times: deque[tuple[int, int]] = deque(maxlen=20)  # (number, timestamp)

    def saw(self, number: int, timestamp: int) -> None:
        self._times.append((number, timestamp))

    @property
    def poll_seconds(self) -> float:
        if self._configured is not None:
            return self._configured
        if len(self._times) < 2 or self._times[-1][0] <= self._times[0][0]:
            return 0.25
        (n0, t0), (n1, t1) = self._times[0], self._times[-1]
        return min(max((t1 - t0) / (n1 - n0) / 4, 0.1), 3.0)
