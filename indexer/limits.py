"""Bounded memory: how much somebody has asked of late, and what was looked up a moment ago."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from ipaddress import ip_address, ip_network
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_MOST = 10_000


class Buckets(Generic[K]):
    """A token bucket each: `burst` at once, then `per_minute`. Of this process alone; the longest unused is forgotten.

    Who is forgotten begins with a full bucket: with more than `most` at once the limit is generous, never too strict.
    """

    def __init__(
        self, per_minute: float, burst: float, *, most: int = _MOST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._most, self._clock = per_minute / 60, burst, most, clock
        self._left: dict[K, tuple[float, float]] = {}

    def take(self, who: K) -> float:
        """Take one: 0, or the seconds until there is one (and none is taken)."""
        tokens, now = self._tokens(who)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self._rate
        self._left.pop(who, None)
        if len(self._left) >= self._most:
            del self._left[next(iter(self._left))]
        self._left[who] = (tokens if wait else tokens - 1, now)
        return wait

    def wait(self, who: K) -> float:
        """Seconds until there is one to take, 0 if there is."""
        tokens, _ = self._tokens(who)
        return 0.0 if tokens >= 1 else (1 - tokens) / self._rate

    def _tokens(self, who: K) -> tuple[float, float]:
        now = self._clock()
        tokens, at = self._left.get(who, (self._burst, now))
        return min(self._burst, tokens + (now - at) * self._rate), now


class Recent(Generic[K, V]):
    """What was looked up within the last `seconds`, at most `most` of it."""

    def __init__(self, seconds: float, *, most: int = _MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._most, self._clock = seconds, most, clock
        self._kept: dict[K, tuple[V, float]] = {}

    def get(self, name: K) -> V | None:
        found = self._kept.get(name)
        if found is None or self._clock() - found[1] >= self._seconds:
            return None
        return found[0]

    def put(self, name: K, value: V) -> None:
        self._kept.pop(name, None)
        if len(self._kept) >= self._most:
            del self._kept[next(iter(self._kept))]  # the oldest
        self._kept[name] = (value, self._clock())


def remote_address(peer: str | None, forwarded: str | None, proxies: int) -> str:
    """Whose failures are counted together: the caller's IPv4 address, or the network of its IPv6 address.

    Each of our own proxies appends the address of who called it, so the one of the outermost is true; what stands
    before it was written by the caller.
    """
    address = peer or ""
    if proxies and forwarded:
        hops = [one.strip() for one in forwarded.split(",")]
        address = hops[-proxies] if len(hops) >= proxies else hops[0]
    try:
        parsed = ip_address(address)
    except ValueError:
        return peer or ""
    return str(parsed) if parsed.version == 4 else str(ip_network((parsed, 64), strict=False))
