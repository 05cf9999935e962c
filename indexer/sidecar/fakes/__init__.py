"""Stand-ins for the providers, over real HTTP: for tests and the demo.

    async with FakeSongstats() as songstats:
        songstats.fault("status", status=429, retry_after=1)
        ...  # point providers.songstats.base_url at songstats.url, with the key songstats.key
        assert songstats.keys() == ["USABC2400001", "USABC2400001"]

As processes: `python -m indexer.sidecar.fakes songstats --port 0` prints its address; GET /_calls tells what was asked.
"""

from indexer.sidecar.fakes.apify import FakeApify
from indexer.sidecar.fakes.base import Fake, Reply
from indexer.sidecar.fakes.faults import KINDS, Call, Fault, Kind
from indexer.sidecar.fakes.made import MadeTrack, history_of, tracks_of
from indexer.sidecar.fakes.people import Person, Play
from indexer.sidecar.fakes.plays import Artist, Song
from indexer.sidecar.fakes.songstats import FakeSongstats, body_of
from indexer.sidecar.fakes.spotify import FakeSpotify
from indexer.sidecar.fakes.spotify_people import FakeSpotifyPeople
from indexer.sidecar.fakes.stripe import FakeCustomer, FakeStripe

__all__ = [
    "KINDS",
    "Artist",
    "Call",
    "Fake",
    "FakeApify",
    "FakeCustomer",
    "FakeSongstats",
    "FakeSpotify",
    "FakeSpotifyPeople",
    "FakeStripe",
    "Fault",
    "Kind",
    "MadeTrack",
    "Person",
    "Play",
    "Reply",
    "Song",
    "body_of",
    "history_of",
    "tracks_of",
]
