"""The circuit breaker: where Spotify can't be reached for one person after the other, nobody is asked for a while.

It counts in this process; its rest is the gate of the jobs' kind, which holds for all workers.
"""

from __future__ import annotations

_LONGEST_SECONDS = 900.0


class Breaker:
    """Opens after so many failures in a row; each time without a success between, it rests twice as long."""

    def __init__(self, failures: int, seconds: float) -> None:
        self._most, self._seconds = failures, seconds
        self._in_a_row = self._opened = 0

    def succeeded(self) -> None:
        self._in_a_row = self._opened = 0

    def failed(self) -> float | None:
        """Count a failure; returns the seconds to rest where that was one too many, else None."""
        self._in_a_row += 1
        if self._in_a_row < self._most:
            return None
        self._in_a_row = 0
        self._opened += 1
        return float(min(self._seconds * 2.0 ** (self._opened - 1), max(_LONGEST_SECONDS, self._seconds)))
