"""A stand-in as a process of its own, for whoever is killed in the test must not take the record of calls along."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable

from indexer.sidecar.fakes import Fake, FakeApify, FakeSongstats, FakeSpotifyPeople, FakeStripe, Fault
from indexer.sidecar.fakes.spotify_accounts import Rotate

_MADE: dict[str, Callable[[argparse.Namespace], Fake]] = {
    "songstats": lambda given: FakeSongstats(port=given.port),
    "apify": lambda given: FakeApify(port=given.port),
    "spotify": lambda given: _spotify(given),
    "stripe": lambda given: FakeStripe(port=given.port, everybody_pays=True),
}
_NAMES = ("Ada", "Benno", "Chloe", "Dara", "Emre", "Femi", "Greta", "Hana", "Ivo", "Jun")


def _spotify(given: argparse.Namespace) -> FakeSpotifyPeople:
    fake = FakeSpotifyPeople(port=given.port, plays_per_hour=given.plays_per_hour, rotate=given.rotate)
    for n in range(given.people):
        name = _NAMES[n % len(_NAMES)] + (f" {n // len(_NAMES) + 1}" if n >= len(_NAMES) else "")
        fake.person(f"person{n + 1:04}", name=name)
    return fake


def _rotate(text: str) -> Rotate:
    if text in ("never", "always"):
        return "always" if text == "always" else "never"
    return float(text)


async def _serve(given: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    fake = _MADE[given.provider](given)
    fake.latency_seconds = given.latency_ms / 1_000
    async with fake:
        if given.slow_seconds:
            fake.faults.append(Fault("slow", None, seconds=given.slow_seconds))
        print(fake.url, flush=True)
        await stopped.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m indexer.sidecar.fakes", description=__doc__)
    parser.add_argument("provider", choices=sorted(_MADE))
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the address is printed")
    parser.add_argument("--slow-seconds", type=float, default=0.0, help="answer so much later")
    parser.add_argument("--latency-ms", type=float, default=0.0, help="do nothing about a call for so long")
    people = parser.add_argument_group("spotify")
    people.add_argument("--people", type=int, default=3, help="whom one can agree as")
    people.add_argument("--plays-per-hour", type=float, default=12.0, help="of each of them, on the mean")
    people.add_argument("--rotate", type=_rotate, default="never", help="never, always, or how often of 1")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
