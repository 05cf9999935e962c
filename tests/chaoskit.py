"""For the chaos suite: plays, a node that is reached without a socket and lies now and then, and pauses made short."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from multidict import CIMultiDict

from indexer import follow
from indexer.config import ContractSettings
from indexer.demochain import PLAY_REGISTRY
from indexer.devchain import load_artifact
from indexer.fakechain import (
    FakeLog,
    FakeNode,
    Fault,
    FaultSource,
    encode_event,
    event_abi,
    garbage,
    http_error,
    null_blocks,
    old_head,
    rate_limited,
    slow,
)  # fmt: skip
from indexer.sources import endpoints, evm, provider_errors, queries
from indexer.sources.contracts import Contracts

CONTRACT = "0x" + "a1" * 20
ABI = load_artifact(PLAY_REGISTRY)["abi"]
CONTRACTS = Contracts(
    [ContractSettings.model_validate({"address": CONTRACT, "abi": PLAY_REGISTRY, "events": ["Played"]})]
)

# every pause that would make a history longer without making it harder
PAUSES = (
    (follow, "_STANDBY_SECONDS", 0.005), (follow, "_FIRST_PAUSE_SECONDS", 0.002),
    (follow, "_LONGEST_PAUSE_SECONDS", 0.01), (endpoints, "_FIRST_REST_SECONDS", 0.001),
    (endpoints, "_LONGEST_REST_SECONDS", 0.01), (endpoints, "_RATE_REST_SECONDS", 0.002),
    (endpoints, "_BEHIND_REST_SECONDS", 0.002), (endpoints, "_BILLING_REST_SECONDS", 0.002),
    (endpoints, "_LONGEST_BILLING_REST_SECONDS", 0.01), (endpoints, "_LAG_REST_SECONDS", 0.01),
    (provider_errors, "_PAUSE_SECONDS", 0.002), (queries, "_PAUSE_SECONDS", 0.002),
)  # fmt: skip


@contextmanager
def hasty(final_seconds: float) -> Iterator[None]:
    # the contract is compiled once, which is a slow thing
    pauses = (*PAUSES, (evm, "_FINAL_SECONDS", final_seconds), (evm, "Contracts", lambda _: CONTRACTS))
    before = [(module, name, getattr(module, name)) for module, name, _ in pauses]
    for module, name, seconds in pauses:
        setattr(module, name, seconds)
    try:
        yield
    finally:
        for module, name, seconds in before:
            setattr(module, name, seconds)


class Answer:
    """A node's HTTP answer that came through no socket."""

    def __init__(self, node: FakeNode, body: bytes) -> None:
        self._node, self._body = node, body

    async def __aenter__(self) -> Answer:
        await asyncio.sleep(0)
        self._raw, fault = await self._node._answer(self._body, None)
        self.status = fault.status if fault else 200
        self.headers = CIMultiDict(fault.headers if fault else {})
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def read(self) -> bytes:
        return self._raw


class Session:
    def __init__(self, node: FakeNode) -> None:
        self._node = node

    def post(self, _url: str, *, data: bytes, headers: Mapping[str, str]) -> Answer:
        return Answer(self._node, data)

    async def close(self) -> None:
        pass


# Plays are encoded once: a slow thing, and the same log may come again and again.
def _plays() -> dict[FakeLog, dict[str, str]]:
    chance, played = random.Random(0), event_abi(ABI, "Played")
    found = {}
    for n in range(120):
        args = {
            "trackId": chance.choice(["1", "1", "1", "2", "3", "4", "no track"]), "userId": str(chance.randint(1, 9)),
            "playedAt": str(1_700_000_000 + chance.randrange(5) * 86_400 * 20), "signature": f"0x{n}",
            "city": chance.choice(["Köln", ""]), "region": "", "country": chance.choice(["DE", "BR", ""]),
        }  # fmt: skip
        found[encode_event(played, args, CONTRACT)] = args
    return found


PLAYS = _plays()
LOGS = tuple(PLAYS)


def no_logs(times: int) -> FaultSource:
    """A node that has a block's header and not yet its logs. (Of a range of final blocks nobody could tell.)"""
    left = [times]

    def source(method: str, params: list[Any]) -> Fault | None:
        if method != "eth_getLogs" or "blockHash" not in params[0] or not left[0]:
            return None
        left[0] -= 1
        return Fault(result=[])

    return source


def misfortune(chance: random.Random, lag: int) -> FaultSource:
    """A few wrong answers of one kind."""
    times = chance.randint(1, 4)
    kinds: list[Callable[[], FaultSource]] = [
        lambda: rate_limited(times),
        lambda: rate_limited(times, retry_after=0.002),
        lambda: rate_limited(times, status=200),
        lambda: garbage(times),
        lambda: null_blocks(times),
        lambda: no_logs(times),
        lambda: http_error(chance.choice([403, 500, 502, 503, 504]), times, b"<html>no</html>"),
        lambda: slow(0.004, times),
        lambda: old_head(chance.randint(1, lag), times),
    ]
    return chance.choice(kinds)()
