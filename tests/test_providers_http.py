"""What the clients share: Retry-After, backoff, addresses, connections that are kept, limits of size."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from providerkit import songstats_at
from pydantic import ValidationError

from indexer.config import ApifySettings, SongstatsSettings
from indexer.sidecar.fakes import FakeSongstats
from indexer.sidecar.providers import Saturated, Terminal, http, with_backoff
from indexer.sidecar.providers.http import Http, retry_after

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None), ("5", 5), (" 7 ", 7), ("0", 0), ("-3", 0), ("1.5", 1.5), ("1e99", 86_400), ("inf", 86_400),
        ("nan", None), ("", None), ("soon", None), ("Sun, 22 Nov 2026 12:01:30 GMT", 90),
        ("Sun, 22 Nov 2026 11:00:00 GMT", 0), ("Sun, 22 Nov 2026 13:00:00 +0100", 0),
        ("22 Nov 2027 12:00:00 -0000", 86_400),
        ("Sun, 99 Nov 2026 12:01:30 GMT", None),
    ],
)  # fmt: skip
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, NOW) == seconds


@given(st.text("0123456789.-+eE ,:GMTSunov", max_size=40))
def test_retry_after_may_be_anything(header: str) -> None:
    seconds = retry_after(header, NOW)
    assert seconds is None or 0 <= seconds <= 86_400


class Calls:
    """A call that raises these in turn, then returns how often it was made; and a sleep that only notes."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.made, self.slept = list(errors), 0, list[float]()

    async def __call__(self) -> int:
        self.made += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.made

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def busy(retry_after: float | None = None) -> Saturated:
    return Saturated("songstats", "busy", retry_after=retry_after)


class TestBackoff:
    async def test_at_once(self) -> None:
        calls = Calls()
        assert await with_backoff(calls, sleep=calls.sleep) == 1
        assert calls.slept == []

    async def test_delays_and_what_retry_after_says(self) -> None:
        calls = Calls(busy(), busy(3), busy(), busy(0))
        assert await with_backoff(calls, sleep=calls.sleep) == 5
        assert calls.slept == [1, 3, 4, 0]

    async def test_given_up(self) -> None:
        calls = Calls(*(busy() for _ in range(9)))
        with pytest.raises(Saturated):
            await with_backoff(calls, sleep=calls.sleep)
        assert calls.made == 5
        assert calls.slept == [1, 2, 4, 8]

    async def test_a_long_wait_is_the_callers(self) -> None:
        calls = Calls(busy(), busy(61))
        with pytest.raises(Saturated) as caught:
            await with_backoff(calls, sleep=calls.sleep)
        assert caught.value.retry_after == 61
        assert (calls.made, calls.slept) == (2, [1])

    async def test_other_errors_are_not_repeated(self) -> None:
        calls = Calls(Terminal("songstats", "no", status=404))
        with pytest.raises(Terminal):
            await with_backoff(calls, sleep=calls.sleep)
        assert calls.made == 1

    async def test_over_http(self) -> None:
        """The header as a number, as a date, and none at all, from a server to the sleep."""
        at = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
        calls = Calls()
        async with FakeSongstats() as fake, songstats_at(fake) as client:
            for header in (2, at, None):
                fake.fault("status", status=503, retry_after=header)
            found = await with_backoff(lambda: client.history("A"), sleep=calls.sleep)
        assert len(found.points) == 3
        assert fake.keys() == ["A"] * 4
        assert calls.slept[0] == 2
        assert 20 < calls.slept[1] <= 40
        assert calls.slept[2] == 4


class TestAddresses:
    @pytest.mark.parametrize("base", ["http://h", "http://h/", "http://h/base/"])
    def test_a_segment_stays_one(self, base: str) -> None:
        path = Http("x", base, timeout_seconds=1).path("v1", "a/../b?c#d%2F", "user~actor")
        assert path == base.rstrip("/") + "/v1/a%2F..%2Fb%3Fc%23d%252F/user~actor"

    @pytest.mark.parametrize("segment", ["", ".", ".."])
    def test_none_leads_elsewhere(self, segment: str) -> None:
        with pytest.raises(ValueError, match="no part of an address"):
            Http("x", "http://h", timeout_seconds=1).path("v1", segment)

    @pytest.mark.parametrize(
        "url",
        ["ftp://h/", "h", "https://u:secret@h/", "https://h/?key=secret", "https://h/#secret", "https://@h/", "http:///x"],
    )
    def test_base_urls_hold_no_secret(self, url: str) -> None:
        with pytest.raises(ValidationError) as caught:
            SongstatsSettings(base_url=url)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("actor", ["", "a/b/c", "../x", "a b", "a?b"])
    def test_actors(self, actor: str) -> None:
        with pytest.raises(ValidationError):
            ApifySettings(actor=actor)


async def test_connections_are_kept() -> None:
    peers: set[Any] = set()

    def noted(self: FakeSongstats, request: Any) -> bool:
        peers.add(request.transport.get_extra_info("peername"))
        return True

    async with FakeSongstats() as fake, songstats_at(fake) as client:
        fake.authorized = noted.__get__(fake)  # type: ignore[method-assign]
        for n in range(10):
            await client.history(f"S{n}")
    assert len(fake.calls) == 10
    assert len(peers) == 1


async def test_an_endless_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_MOST_BYTES", 1 << 20)
    async with FakeSongstats(days=40_000) as fake, songstats_at(fake) as client:
        with pytest.raises(Exception, match="larger than 1 MB"):
            await client.history("A")


@pytest.mark.parametrize("deep", [lambda n: b"[" * n, lambda n: b'{"stats":' * n, lambda n: b"\xff" * n])
async def test_hostile_json(deep: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeSongstats() as fake, songstats_at(fake) as client:

        async def read(*_: Any) -> bytes:
            return deep(100_000)

        monkeypatch.setattr(Http, "_read", read)
        with pytest.raises(Exception, match="can't be read"):
            await client.history("A")
