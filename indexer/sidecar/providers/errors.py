"""What a provider's answer can be other than the one wanted, drawn as a tree. No text holds what was sent or said.

    ProviderError
    ├── Saturated      408, 429, 502, 503, 504 and what gateways make of them, timeouts, connections: try again later
    ├── Terminal       every other 4xx: asking again brings nothing else
    └── Failed         500, 501, an answer that can't be read, a missing key: for a person to look at
"""

from __future__ import annotations

# 520 to 524 and 529 say of a gateway before the provider what 502 to 504 do.
_BUSY = frozenset({408, 429, 502, 503, 504, 520, 521, 522, 523, 524, 529})


class ProviderError(Exception):
    """Base of what the clients raise. `status` is that of the answer, None where there was none.

    `asked`: whether a request was sent, so that it counts. `outcome`: what metrics call it. `code`: the error's name
    in the words of OAuth (RFC 6749), where the answer is one of those.
    """

    def __init__(
        self, provider: str, text: str, *, status: int | None = None, outcome: str = "error", asked: bool = True,
        code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"{provider}: {text}")
        self.provider, self.status, self.outcome, self.asked, self.code = provider, status, outcome, asked, code


class Saturated(ProviderError):
    """`retry_after` is the wait that the provider asked for, in seconds, or None."""

    def __init__(
        self, provider: str, text: str, *, status: int | None = None, outcome: str = "error", asked: bool = True,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(provider, text, status=status, outcome=outcome, asked=asked)
        self.retry_after = retry_after


class Terminal(ProviderError):
    pass


class Failed(ProviderError):
    pass


def refused(
    provider: str, what: str, status: int, retry_after: float | None = None, code: str | None = None
) -> ProviderError:
    """The exception for an HTTP status that is not 2xx."""
    text, outcome = f"HTTP {status} to {what}" + (f" ({code})" if code else ""), f"{status // 100}xx"
    if status in _BUSY:
        return Saturated(provider, text, status=status, outcome=outcome, retry_after=retry_after)
    kind = Terminal if 400 <= status < 500 else Failed
    return kind(provider, text, status=status, outcome=outcome, code=code)


def unset(provider: str, setting: str) -> Failed:
    """The exception where a question can't even be asked."""
    return Failed(provider, f"set providers.{provider}.{setting}", outcome="unset", asked=False)
