"""A stand-in as a process of its own, for whoever is killed in the test must not take the record of calls along."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable

from indexer.sidecar.fakes import Fake, FakeApify, FakeSongstats, FakeSpotify, FakeStripe, Fault

_MADE: dict[str, Callable[[int], Fake]] = {
    "songstats": lambda port: FakeSongstats(port=port),
    "apify": lambda port: FakeApify(port=port),
    "spotify": lambda port: FakeSpotify(port=port),
    "stripe": lambda port: FakeStripe(port=port, everybody_pays=True),
}


async def _serve(provider: str, port: int, slow_seconds: float) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with _MADE[provider](port) as fake:
        if slow_seconds:
            fake.faults.append(Fault("slow", None, seconds=slow_seconds))
        print(fake.url, flush=True)
        await stopped.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m indexer.sidecar.fakes", description=__doc__)
    parser.add_argument("provider", choices=sorted(_MADE))
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the address is printed")
    parser.add_argument("--slow-seconds", type=float, default=0.0, help="answer so much later")
    given = parser.parse_args()
    asyncio.run(_serve(given.provider, given.port, given.slow_seconds))


if __name__ == "__main__":
    main()
