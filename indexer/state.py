"""What this process knows of its own progress: written by the follower; read by probes, page, bar and metrics."""

from __future__ import annotations

import time
from collections import deque
from enum import StrEnum
from typing import NamedTuple

from indexer import metrics
from indexer.model import Heads, Span

_WINDOW_SECONDS = 15.0
_REORGS = 20


class Role(StrEnum):
    STARTING = "starting"
    STANDBY = "standby"
    LEADER = "leader"
    HALTED = "halted"
    STOPPING = "stopping"


class Reorg(NamedTuple):
    """A reorganisation that this process has undone: the first block of it, how many, when (seconds since 1970)."""

    block: int
    depth: int
    at: float


class State:
    """The progress of one chain in this process. Numbers of blocks; seconds by the monotonic clock."""

    def __init__(self, chain: str, start_block: int = 0) -> None:
        self.chain, self.start_block = chain, start_block
        self.role = Role.STARTING
        self.reason = ""
        self.heads = Heads(-1, -1)
        self.cursor = start_block - 1
        self.block_time: int | None = None
        self.blocks = self.events = self.spans = 0
        self.waiting_on = "fetch"
        self.gaps: dict[str, list[tuple[int, int]]] = {}
        self.journal_rows: int | None = None
        self.reorgs: deque[Reorg] = deque(maxlen=_REORGS)
        now = time.monotonic()
        self.progressed_at = self.heard_at = now
        self._ticks: deque[tuple[float, int, int]] = deque([(now, 0, 0)])

    def became(self, role: Role, reason: str = "") -> None:
        self.role, self.reason = role, reason
        self.progressed_at = self.heard_at = time.monotonic()
        metrics.leader.labels(self.chain).set(role is Role.LEADER)

    def saw(self, heads: Heads) -> None:
        if self.lag_blocks == 0:
            self.progressed_at = time.monotonic()  # nothing to do is not a stall
        self.heads, self.heard_at = heads, time.monotonic()
        metrics.head_block.labels(self.chain).set(heads.newest)
        metrics.final_block.labels(self.chain).set(heads.final)
        self._lag()

    def at(self, number: int, block_time: int | None) -> None:
        """The cursor, as read from the database or as committed."""
        self.cursor, self.block_time = number, block_time
        metrics.cursor_block.labels(self.chain).set(number)
        self._lag()

    def committed(self, span: Span) -> None:
        now = time.monotonic()
        self.blocks += span.last - span.first + 1
        self.events += span.events
        self.spans += 1
        self.progressed_at = now
        self._ticks.append((now, self.blocks, self.events))
        self.at(span.last, span.end_timestamp)

    def undone(self, first: int, last: int) -> None:
        """The blocks `first` to `last` were reorganised and are undone."""
        self.reorgs.append(Reorg(first, last - first + 1, time.time()))
        self.at(first - 1, None)

    def _lag(self) -> None:
        metrics.lag_blocks.labels(self.chain).set(self.lag_blocks)
        metrics.lag_seconds.labels(self.chain).set(self.lag_seconds)

    @property
    def lag_blocks(self) -> int:
        return max(0, self.heads.newest - self.cursor)

    @property
    def lag_seconds(self) -> float:
        """Age of the newest committed block while behind, else 0."""
        if not self.lag_blocks or self.block_time is None:
            return 0.0
        return max(0.0, time.time() - self.block_time)

    @property
    def rates(self) -> tuple[float, float]:
        """Blocks and events a second over the last seconds."""
        while len(self._ticks) > 1 and time.monotonic() - self._ticks[1][0] > _WINDOW_SECONDS:
            self._ticks.popleft()
        t0, blocks, events = self._ticks[0]
        seconds = max(time.monotonic() - t0, 0.05)
        return (self.blocks - blocks) / seconds, (self.events - events) / seconds

    @property
    def eta_seconds(self) -> float | None:
        """Time to the head at the present rate; None while there is no rate, 0 at the head."""
        if not self.lag_blocks:
            return 0.0
        blocks_per_second = self.rates[0]
        return self.lag_blocks / blocks_per_second if blocks_per_second > 0 else None

    @property
    def stalled_seconds(self) -> float:
        """Since the head moved and nothing was committed; 0 where there is nothing to commit or we do not lead."""
        if self.role is not Role.LEADER or not self.lag_blocks:
            return 0.0
        return time.monotonic() - self.progressed_at

    def stalled(self, after_seconds: float) -> bool:
        """Whether a restart is the remedy: what /livez, the log and systemd's watchdog go by."""
        return self.stalled_seconds > after_seconds

    def ready(self, after_seconds: float) -> bool:
        """Whether we lead or stand by, and get on if we lead: what /readyz and systemd's READY go by."""
        silent = self.silent_seconds > after_seconds
        return self.role in (Role.LEADER, Role.STANDBY) and not self.stalled(after_seconds) and not silent

    @property
    def silent_seconds(self) -> float:
        """Since any node told us of a head, while we lead: nothing to commit may also mean that nobody tells us."""
        return time.monotonic() - self.heard_at if self.role is Role.LEADER else 0.0
