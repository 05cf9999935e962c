"""What goes wrong with HTTP APIs, as values to append to a stand-in's `faults`.

    songstats.fault("status", status=429, retry_after=2)        the next call
    songstats.fault("drop", count=None, match="USABC2400001")   each call that is about this song
    songstats.fault("status", status=429, count=None, skip=5)   each call after five more
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

Kind: TypeAlias = Literal["status", "drop", "html", "empty", "slow", "stall", "cut", "truncated"]
"""How a call goes wrong. Before the provider has done anything:

status     an error with this HTTP status, and a Retry-After if one is given
drop       the connection closes without an answer
html       status 200 with a proxy's page
empty      status 200 with {}

After it has done what was asked:

slow       the true answer, `seconds` late
stall      headers and the first half of the true answer at once, the rest `seconds` later
cut        the first half of the true answer, then the connection closes
truncated  half of the true answer, as if it were whole: JSON that breaks off
"""

KINDS: tuple[Kind, ...] = ("status", "drop", "html", "empty", "slow", "stall", "cut", "truncated")


class Call(msgspec.Struct):
    """A request as it came: what it was for, about which song, album or account, and how it was answered.

    `status` is None until an answer is out, and stays so where none was given.
    """

    route: str
    key: str
    status: int | None = None


class Fault(msgspec.Struct):
    """A fault and how often it strikes; `count` None is for ever. `skip` calls that match go well before.

    `match` limits it to the calls of one route or one key, or to those that a function picks.
    """

    kind: Kind
    count: int | None = 1
    match: str | Callable[[Call], bool] | None = None
    skip: int = 0
    status: int = 500
    retry_after: float | str | None = None
    seconds: float = 5.0

    def strikes(self, call: Call) -> bool:
        """Whether this call is struck; counts down."""
        if self.count == 0 or not self._about(call):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.count is not None:
            self.count -= 1
        return True

    def _about(self, call: Call) -> bool:
        if self.match is None:
            return True
        return self.match in (call.route, call.key) if isinstance(self.match, str) else self.match(call)
