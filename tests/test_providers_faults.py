"""Every client under every fault, over real HTTP: its class, that it is asked once, that nothing leaks."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import structlog
from providerkit import ACCOUNT, CASES, ISRC, everything_said, pair, songstats_at
from structlog.testing import capture_logs

from indexer import metrics
from indexer.sidecar.fakes import KINDS, FakeSongstats, Kind, Reply
from indexer.sidecar.providers import Failed, ProviderError, Saturated, Terminal
from indexer.sidecar.providers.http import Http

# fault -> what is raised, the status in it, and what metrics call it
STATUSES = {
    **dict.fromkeys((408, 429, 502, 503, 504, 522), Saturated),
    **dict.fromkeys((400, 402, 403, 404, 410, 422, 425), Terminal),
    **dict.fromkeys((500, 501, 505, 302, 304), Failed),
}
BROKEN = {
    "drop": (Saturated, None, "error"),
    "stall": (Saturated, None, "timeout"),
    "slow": (Saturated, None, "timeout"),
    "cut": (Saturated, None, "error"),
    "truncated": (Failed, 200, "invalid"),
    "html": (Failed, 200, "invalid"),
    "empty": (Failed, None, "invalid"),
}
# What Stripe's customer lookup says of 404 is that there is no such customer.
NO_CUSTOMER = ("stripe customer", 404)
SECRETS = [
    "songstats-test-key", "apify-test-token", "spotify-test-", "sk_test_stripe_key", "somebody@example.com",
    "page-secret", "c3BvdGlmeS10ZXN0", ACCOUNT, ISRC, "cus_0001", "?",
]  # fmt: skip


def requests(provider: str, outcome: str) -> float:
    name, labels = "indexer_provider_requests_total", {"provider": provider, "status": outcome}
    return metrics.registry.get_sample_value(name, labels) or 0.0


def test_all_faults_are_tried() -> None:
    assert set(BROKEN) | {"status"} == set(KINDS)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("name", CASES)
async def test_every_status(name: str, status: int) -> None:
    case = CASES[name]
    async with pair(case) as (fake, client):
        fake.fault("status", status=status, match=case.route, retry_after=7)
        if (name, status) == NO_CUSTOMER:
            assert (await case.ask(client)).card
            return
        before = requests(fake.name, f"{status // 100}xx")
        with pytest.raises(ProviderError) as caught:
            await case.ask(client)
    # Who is no application gets no token, and that is for a person to look at.
    expected = Failed if name == "spotify token" and STATUSES[status] is Terminal else STATUSES[status]
    assert type(caught.value) is expected
    assert caught.value.status == status
    assert caught.value.asked
    if isinstance(caught.value, Saturated):
        assert caught.value.retry_after == 7
    assert len(fake.keys(case.route)) == 1
    assert requests(fake.name, f"{status // 100}xx") == before + 1


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", CASES)
async def test_every_broken_answer(name: str, kind: Kind) -> None:
    case, (expected, status, outcome) = CASES[name], BROKEN[kind]
    if kind == "empty" and case.fake.name == "stripe":
        outcome = "2xx"  # JSON as far as the transport can see; the package finds nothing in it
    async with pair(case, timeout_seconds=0.3 if outcome == "timeout" else 20) as (fake, client):
        fake.fault(kind, match=case.route, seconds=1)
        before = requests(fake.name, outcome)
        with pytest.raises(ProviderError) as caught:
            await case.ask(client)
        assert type(caught.value) is expected
        if status is not None:
            assert caught.value.status == status
        assert requests(fake.name, outcome) > before
        # Never a second time of its own accord: each call costs.
        assert len(fake.keys(case.route)) == 1
        # The next one is well again.
        await case.ask(client)


@pytest.mark.parametrize("name", CASES)
async def test_nobody_there(name: str) -> None:
    case = CASES[name]
    async with pair(case) as (fake, client):
        await fake.stop()
        with pytest.raises(Saturated, match="no answer to") as caught:
            await case.ask(client)
        # Nor is the address told, of which some hold a key.
        assert "127.0.0.1" not in everything_said(caught.value)


async def test_a_connection_that_breaks_is_one_call() -> None:
    """aiohttp repeats a GET unseen where the connection breaks; that would be a call that no ledger knows."""
    async with FakeSongstats() as fake, songstats_at(fake) as client:
        await client.history("A")
        fake.fault("drop")
        with pytest.raises(Saturated):
            await client.history("B")
        assert fake.keys() == ["A", "B"]


async def test_a_redirect_takes_no_key_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeSongstats() as other, FakeSongstats() as fake, songstats_at(fake) as client:

        async def moved(_: Any) -> Reply:
            path = "/enterprise/v1/tracks/historic_stats?isrc=A&source=spotify"
            return Reply({}, 307, {"Location": other.url + path})

        monkeypatch.setattr(Http, "path", lambda *_: f"{fake.url}/moved")
        await fake.stop()
        monkeypatch.setattr(fake, "routes", lambda router: router.add_get("/moved", fake.answering("moved", moved)))
        await fake.start()
        with pytest.raises(Failed, match="HTTP 307"):
            await client.history("A")
        assert other.calls == []


@pytest.mark.parametrize("name", CASES)
async def test_no_secret_in_any_text(name: str, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    case, said = CASES[name], []
    caplog.set_level(logging.DEBUG)
    with capture_logs() as logs:
        for kind in KINDS:
            timeout_seconds = 0.2 if kind in ("slow", "stall") else 20
            async with pair(case, timeout_seconds=timeout_seconds) as (fake, client):
                fake.fault(kind, match=case.route, status=400, seconds=0.5)
                with pytest.raises(ProviderError) as caught:
                    await case.ask(client)
                said.append(everything_said(caught.value))
                structlog.get_logger().warning("failed", error=caught.value)
                await case.ask(client)
    said += [record.getMessage() for record in caplog.records]
    said += ["".join(f"{key}={value}" for key, value in entry.items()) for entry in logs]
    said += [*capfd.readouterr(), metrics.exposition().decode()]
    for text in said:
        for secret in SECRETS:
            assert secret not in text, secret


@pytest.mark.parametrize("name", CASES)
async def test_no_key_no_question(name: str) -> None:
    case = CASES[name]
    key = {"songstats": "api_key", "apify": "token", "spotify": "client_secret", "stripe": "api_key"}[case.fake.name]
    async with pair(case, **{key: None}) as (fake, client):
        with pytest.raises(Failed, match=rf"set providers\.{fake.name}\.{key}") as caught:
            await case.ask(client)
        assert caught.value.status is None
        assert not caught.value.asked
        assert fake.calls == []


async def test_cancelling_closes_the_call() -> None:
    async with FakeSongstats() as fake, songstats_at(fake) as client:
        fake.fault("slow", seconds=30)
        before = requests("songstats", "cancelled")
        task = asyncio.create_task(client.history("A"))
        while not fake.calls:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert requests("songstats", "cancelled") == before + 1
        assert (await client.history("B")).points
