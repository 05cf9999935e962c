"""What a node's error means: one table, read from top to bottom, of what providers are known to answer.

Texts come before codes, as providers agree on no code: -32005 stands for too many results here and for too many
requests there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

_TEXT_LENGTH = 4000  # of an error that is looked at; some carry the whole request
_WORDS_LENGTH = 500  # of an error that is kept for people
_PAUSE_SECONDS = 1.0  # before a smaller question to a provider that says it is overloaded


class Kind(Enum):
    """What can be done about an error."""

    RANGE = auto()  # fewer blocks
    ADDRESSES = auto()  # the same blocks, fewer addresses
    RATE_LIMITED = auto()  # later
    BILLING = auto()  # a person must pay or mend a key; leave the endpoint alone for long
    BEHIND = auto()  # the node doesn't have these blocks yet: wait or ask another, and never take it for empty
    FATAL = auto()  # the same question gets the same answer
    TRANSIENT = auto()  # try again elsewhere


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error of a node, understood. `message` is in the provider's words.

    Of RANGE: `max_blocks` is the provider's limit for every query, `hint` a range (both ends included) that it says
    will do for this one; with neither, halve. `retry_after` is in seconds, None where the provider named none; beside
    RATE_LIMITED it is given for a RANGE that is better asked after a pause.
    """

    kind: Kind
    message: str = ""
    max_blocks: int | None = None
    hint: tuple[int, int] | None = None
    retry_after: float | None = None


def classify(
    *,
    status: int | None,
    code: int | None,
    message: str,
    data: str = "",
    first: int | None = None,
    last: int | None = None,
    retry_after: float | None = None,
) -> Trouble:
    """What the error of an HTTP `status` and of a JSON-RPC `code`, `message` and `data` means.

    `first` and `last` are the blocks asked for with eth_getLogs, None for other methods. A limit or hint that would
    not make that range smaller is left out. `retry_after` is the header's, in seconds.
    """
    text = f"http={status} code={code} {message} {data}"[:_TEXT_LENGTH].lower()
    text = _THOUSANDS.sub(lambda match: re.sub(r"[.,]", "", match[0]), text)
    words = f"{message} ({data})" if data and data not in ("null", '""', "{}") else message
    asked = _Asked(words[:_WORDS_LENGTH], first, last, retry_after)
    for pattern, make in _ROWS:
        match = pattern.search(text)
        trouble = make(match, asked) if match else None
        if trouble:
            return trouble
    return Trouble(Kind.TRANSIENT, asked.words, retry_after=retry_after)


def too_large(first: int, last: int, trouble: Trouble) -> int:
    """How many blocks to ask for after a RANGE trouble with the blocks `first` to `last`: fewer, and at least one."""
    size = last - first + 1
    wanted = size // 2
    if trouble.hint:
        wanted = trouble.hint[1] - trouble.hint[0] + 1
    elif trouble.max_blocks:
        wanted = trouble.max_blocks
    return max(1, wanted if wanted < size else size // 2)


@dataclass(frozen=True, slots=True)
class _Asked:
    words: str
    first: int | None
    last: int | None
    retry_after: float | None

    @property
    def size(self) -> int | None:
        return None if self.first is None or self.last is None else self.last - self.first + 1


_Make = Callable[[re.Match[str], _Asked], Trouble | None]


def _is(kind: Kind) -> _Make:
    return lambda _match, asked: Trouble(kind, asked.words, retry_after=asked.retry_after)


def _halve(_match: re.Match[str], asked: _Asked) -> Trouble:
    return Trouble(Kind.RANGE, asked.words)


def _below(match: re.Match[str], asked: _Asked) -> Trouble:
    """The limit named is one block too many."""
    return _limit(match, asked, less=1)


def _limit(match: re.Match[str], asked: _Asked, less: int = 0) -> Trouble:
    """The limit named: `n`, in thousands if `k` is there."""
    return _limited(int(match["n"]) * (1000 if match["k"] else 1) - less, asked)


def _limited(blocks: int, asked: _Asked) -> Trouble:
    if asked.size is not None and blocks >= asked.size:
        return Trouble(Kind.RANGE, asked.words)
    return Trouble(Kind.RANGE, asked.words, max_blocks=max(1, blocks))


def _known(*limits: int) -> _Make:
    """Limits that the provider is known to have, but doesn't name: the largest that is smaller than what was asked."""

    def make(_match: re.Match[str], asked: _Asked) -> Trouble:
        for limit in limits:
            if asked.size is None or limit < asked.size:
                return _limited(limit, asked)
        return Trouble(Kind.RANGE, asked.words)

    return make


def _guess(blocks: int) -> _Make:
    """A size to try for this query; the text is of several providers, and not all are so narrow."""

    def make(_match: re.Match[str], asked: _Asked) -> Trouble:
        if asked.first is None or asked.size is None or asked.size <= blocks:
            return Trouble(Kind.RANGE, asked.words)
        return Trouble(Kind.RANGE, asked.words, hint=(asked.first, asked.first + blocks - 1))

    return make


def _hint(match: re.Match[str], asked: _Asked) -> Trouble:
    """The range named, `a` to `b`, which some providers give the wrong way round."""
    low, high = sorted((int(match["a"], 0), int(match["b"], 0)))
    if asked.first is not None and asked.last is not None:
        within = asked.first <= low and high <= asked.last
        if not within or (low, high) == (asked.first, asked.last):
            return Trouble(Kind.RANGE, asked.words)
    return Trouble(Kind.RANGE, asked.words, hint=(low, high))


def _limit_and_hint(match: re.Match[str], asked: _Asked) -> Trouble:
    limit, hint = _limit(match, asked), _hint(match, asked)
    return Trouble(Kind.RANGE, asked.words, max_blocks=limit.max_blocks, hint=hint.hint)


def _overloaded(divisor: int) -> _Make:
    """A provider that is overloaded, perhaps by this query: ask for less, after a pause. No row for one block."""

    def make(_match: re.Match[str], asked: _Asked) -> Trouble | None:
        if asked.first is None or asked.size is None or asked.size <= 1:
            return None
        pause = _PAUSE_SECONDS if asked.retry_after is None else asked.retry_after
        hint = (asked.first, asked.first + max(1, asked.size // divisor) - 1)
        return Trouble(Kind.RANGE, asked.words, hint=hint, retry_after=pause)

    return make


_THOUSANDS = re.compile(r"\b\d{1,3}(?:[.,]\d{3})+\b")
_N = r"(?P<n>\d+) ?(?P<k>k?)\b"
_BLOCK = r"(?:0x[0-9a-f]+|\d+)"
_FROM_TO = rf"\[ ?(?P<a>{_BLOCK}), ?(?P<b>{_BLOCK}) ?\]"
_WORDS = {"N": _N, "FROM_TO": _FROM_TO, "BLOCK": _BLOCK}


def _row(pattern: str, make: _Make) -> tuple[re.Pattern[str], _Make]:
    """A row; in its pattern `<N>` is a number of blocks, `<FROM_TO>` a range in brackets, `<BLOCK>` a block."""
    return re.compile(re.sub(r"<(N|FROM_TO|BLOCK)>", lambda match: _WORDS[match[1]], pattern), re.DOTALL), make


_ROWS: tuple[tuple[re.Pattern[str], _Make], ...] = (
    # The node lacks the blocks. Before the ranges, whose words these texts use too.
    _row(r"block range extends beyond current head block", _is(Kind.BEHIND)),  # Base, OP
    _row(r"after last accepted block|cannot query unfinalized data", _is(Kind.BEHIND)),  # Avalanche
    _row(r"header not found|missing trie node|unknown block|block not found", _is(Kind.BEHIND)),  # geth and kin
    _row(r"height is not available|greater than latest|not currently canonical", _is(Kind.BEHIND)),  # Cosmos, Erigon
    # Too many addresses
    _row(r"specify less number of address", _is(Kind.ADDRESSES)),  # Alchemy, dRPC
    _row(r"addresses or topics per search position|too many addresses", _is(Kind.ADDRESSES)),  # geth
    _row(r"filters\b.*current limit is \d+", _is(Kind.ADDRESSES)),  # Infura
    # Ranges that the provider says will do
    _row(
        r"response size exceeded.*this block range should work: ?<FROM_TO>", _hint
    ),  # Alchemy: of the logs, not blocks
    _row(r"up to an? <N> block range.*this block range should work: ?<FROM_TO>", _limit_and_hint),  # Alchemy, free
    _row(r"this block range should work: ?<FROM_TO>", _hint),  # Alchemy
    _row(r"try with this block range ?<FROM_TO>", _hint),  # Infura, zkSync, Thirdweb, Tenderly
    _row(r"retry with the range (?P<a><BLOCK>) ?- ?(?P<b><BLOCK>)", _hint),  # llama
    # Limits that the provider names
    _row(r"up to an? <N> block range", _limit),  # Alchemy free, Aurora
    _row(r"\brange \d+ exceeds (?:the )?limit of <N>", _limit),  # Infura
    _row(r"\brange \d+ is bigger than range limit <N>", _limit),  # Tenderly
    _row(r"limited to (?:an? )?(?:0 ?- ?)?<N> ?(?:blocks? ?)?range", _limit),  # QuickNode, 1RPC, Blast, zkEVM
    _row(r"limited to (?:an? )?(?:0 ?- ?)?<N> blocks?\b", _limit),  # BlockPI
    _row(r"exceeds the range allowed for your plan \(\d+ > <N>\)", _limit),  # Blast, paid
    _row(r"block range is too wide \(maximum <N>\)", _limit),  # Moonriver
    _row(r"maximum \[from, to\] blocks distance: <N>", _limit),  # Ankr TAC
    _row(r"block range = \d+, max block range = <N>", _limit),  # Morph
    _row(r"max range: <N>", _below),  # Cloudflare, cdk-erigon
    _row(r"maximum allowed number of requested blocks is <N>", _limit),  # Thirdweb
    _row(r"requested too many blocks from .* maximum is set to <N>", _below),  # Avalanche
    _row(r"limit the query to at most <N> blocks", _below),  # Coinbase
    _row(r"maximum block range: <N>", _limit),  # PublicNode
    _row(r"exceeds max block range:? <N>", _limit),  # Hyperliquid
    _row(r"exceed max block range: <N>", _below),  # Tron
    _row(r"block range greater than <N> max", _limit),  # Swell
    _row(r"block range exceeds <N>", _limit),  # Somnia
    _row(r"query must be smaller than size <N>", _limit),  # Harmony
    _row(r"range is too large, max is <N> blocks", _limit),  # Merkle, llama
    _row(r"block range too large \(\d+\), maximum allowed is <N> blocks", _limit),  # Sei
    _row(r"logs over more than <N> blocks", _limit),  # Etherlink
    # Limits that it doesn't name, or not to be relied on
    _row(r"ranges over \d+k? blocks are not supported", _halve),  # dRPC
    _row(r"block range is too wide", _known(3000)),  # Ankr
    _row(r"block range limit exceeded", _known(10_000, 100)),  # Chainstack
    _row(r"block range (?:is )?too (?:large|high)", _guess(2000)),  # Base; Monad, Optimism, Candle
    _row(r"block range threshold exceeded|exceeded max allowed|range threshold exceeded", _halve),  # Altitude, eRPC
    _row(r"block range is bigger than maxblockrange", _halve),  # Scroll
    # Too much in the answer
    _row(r"more than \d+k? (?:results|logs)|\d+k? logs returned|too many logs", _halve),  # Infura, zkEVM, HyperRPC
    _row(r"query exceeds max results|logs matched by query exceeds limit", _halve),  # llama, Ankr, Arbitrum
    _row(r"response size should not (?:be )?greater than|backend response too large", _halve),  # 1RPC, OP
    _row(r"response (?:size )?is too (?:big|large)|response size exceeded", _halve),  # reth, jsonrpsee, Alchemy
    _row(r"error decoding response body|^http=413\b", _halve),  # proxies
    _row(r"query timeout exceeded", _halve),  # Infura
    _row(r"code=-32614\b", _halve),  # QuickNode's own code for ranges
    # Money and keys. Before the rates, as these often come with a 429.
    _row(r"monthly capacity limit|reached the free tier|^http=402\b", _is(Kind.BILLING)),  # Alchemy, dRPC
    _row(r"^http=40[13]\b", _is(Kind.BILLING)),  # a key that is wrong or not allowed to
    # Rates
    _row(r"^http=429\b|code=(?:429|-32012|-32016)\b", _is(Kind.RATE_LIMITED)),  # all; QuickNode; Base
    _row(r"credits limited to \d+|compute units", _is(Kind.RATE_LIMITED)),  # QuickNode, Alchemy
    _row(r"too many requests|rate.?limit|request limit reached", _is(Kind.RATE_LIMITED)),  # many
    _row(r"exceeded the quota|under too much load", _is(Kind.RATE_LIMITED)),  # eRPC's list
    # A range that is too much in words that nobody has met yet
    _row(r"\b(?:too (?:many|large|big|wide)|exceed\w*|limit\w*|max\w*)\b.*\bblock ?range", _halve),
    _row(r"\bblock ?range\b.*\b(?:too|exceed\w*|limit\w*|max\w*|larger|bigger|greater)\b", _halve),
    # Never
    _row(r"code=(?:-32700|-32601|-32004|-32006)\b|^http=(?:404|405|501|505)\b", _is(Kind.FATAL)),
    _row(r"\breverted?\b|method not found|\bunsupported\b", _is(Kind.FATAL)),
    _row(r"\bmethod\b.{0,60}\b(?:does not exist|not supported|not available)", _is(Kind.FATAL)),
    # Overload, perhaps by this query: less of it, later
    _row(r"no backend is currently healthy to serve traffic", _overloaded(2)),  # Base, OP proxyd
    _row(r"503 service unavailable|servererror\(-3200[05]\)|code=-32000\b", _overloaded(10)),  # Alchemy, Infura
    _row(r"code=-32005 limit exceeded", _overloaded(10)),  # BSC
    _row(r"code=-32005\b", _is(Kind.RATE_LIMITED)),  # Infura
)
