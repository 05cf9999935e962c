"""CoreSource on nodes that fail, lie, prune, lag and change their chain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from corekit import assert_whole, chain_of, collected, hasty, heights, plays, source_of
from structlog.testing import capture_logs

from indexer.config import EndpointSettings
from indexer.errors import MissingBlock, RpcUnavailable, WrongNetwork
from indexer.fakechain import (
    FakeCore,
    FakeCoreNode,
    Fault,
    FaultSource,
    connect_error,
    cut_short,
    garbage,
    http_error,
    recorded_shape,
    slow,
)
from indexer.model import Span
from indexer.sources import connect, core, endpoints
from indexer.sources.core import CoreSource

pytestmark = [pytest.mark.usefixtures("hasty"), pytest.mark.timeout(120)]
__all__ = ["hasty"]

BLOCKS = {"GetBlock", "GetBlocks"}


def answers(result: Any) -> FaultSource:
    """Every question about blocks gets this answer."""
    return lambda method, _params: Fault(result=result) if method in BLOCKS else None


FAULTS: list[tuple[str, Callable[[], FaultSource]]] = [
    ("bad-gateway", lambda: http_error(502, None, b"<html>bad gateway</html>")),
    ("unavailable", lambda: connect_error("unavailable", None)),
    ("internal", lambda: connect_error("internal", None)),
    ("unknown", lambda: connect_error("unknown", None)),
    ("deadline", lambda: connect_error("deadline_exceeded", None)),
    ("not-found", lambda: connect_error("not_found", None)),
    ("exhausted", lambda: connect_error("resource_exhausted", None, retry_after=30)),
    ("message-size", lambda: connect_error("resource_exhausted", None, "message larger than max (9 vs. 5)")),
    ("forbidden", lambda: connect_error("permission_denied", None)),
    ("too-many-requests", lambda: http_error(429, None, b"slow down")),
    ("unimplemented", lambda: connect_error("unimplemented", None)),
    ("nothing-there", lambda: http_error(404, None, b"404 page not found")),
    ("html", lambda: garbage(None)),
    ("cut-short", lambda: cut_short(None)),
    ("slow", lambda: slow(5, None)),
    ("empty", lambda: answers({})),
    ("no-blocks", lambda: answers({"blocks": {}})),
    ("another-block", lambda: answers({"blocks": {"1": {"height": "2"}}})),
    ("no-hash", lambda: answers({"blocks": {"1": {"height": "1", "chainId": "core-test", "hash": "xyz"}}})),
    ("no-time", lambda: answers({"blocks": {"1": {"height": "1", "chainId": "core-test", "hash": "ab" * 32}}})),
    ("no-chain-id", lambda: answers({"blocks": {"1": {"height": "1", "hash": "ab" * 32}}})),
    ("list", lambda: answers([])),
    ("transactions-no-list", lambda: answers({"blocks": {"1": {"height": "1", "transactions": "none"}}})),
]  # fmt: skip


@pytest.mark.parametrize("after", [0, 12])
@pytest.mark.parametrize("fault", [row[1] for row in FAULTS], ids=[row[0] for row in FAULTS])
async def test_one_that_fails_is_replaced_by_the_other(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[], FaultSource], after: int
) -> None:
    """From the start, and in the middle of the work."""
    monkeypatch.setattr(endpoints, "_LONGEST_REST_SECONDS", 10.0)
    chain = chain_of([n % 4 for n in range(200)])
    async with FakeCoreNode(chain) as bad, FakeCoreNode(chain) as good:
        sizes: dict[str, Any] = {"max_blocks": 10, "start": 10, "request_timeout_seconds": 0.4}
        async with source_of(bad, good, chain_id="core-test", **sizes) as source:
            struck = fault()
            bad.faults.append(lambda method, params: struck(method, params) if bad.requests.total() > after else None)
            assert_whole(await collected(source, 1, 200), chain, 1, 200)
            assert good.requests["GetBlocks"] >= 8
        assert bad.requests.total() < 130


@pytest.mark.parametrize("lacks", [{}, {"GetBlocks": "404"}])
async def test_a_good_block_of_another_height_is_not_taken(lacks: dict[str, str]) -> None:
    chain = chain_of([1] * 20)

    def shifted(answer: bytes) -> Fault:
        return Fault(body=answer.replace(b'"height":"7"', b'"height":"8"'))

    async with FakeCoreNode(chain) as wrong, FakeCoreNode(chain) as good, source_of(wrong, good) as source:
        wrong.lacks = lacks
        wrong.faults.append(lambda method, _params: Fault(after=shifted) if method in BLOCKS else None)
        assert_whole(await collected(source, 1, 20), chain, 1, 20)
        assert source.nodes[0].last_error in ("block 8 for block 7", "")
        assert good.requests["GetBlocks"]


async def test_an_endpoint_that_is_gone_is_used_again_when_it_is_back() -> None:
    chain = chain_of([1] * 30)
    async with FakeCoreNode(chain) as first, FakeCoreNode(chain) as second, source_of(first, second) as source:
        await collected(source, 1, 30)
        used = first.requests["GetBlocks"]
        await first.stop()
        with capture_logs() as logged:
            assert_whole(await collected(source, 1, 30), chain, 1, 30)
        assert [one["endpoint"] for one in logged if one["event"] == "endpoint rested"] == ["n0"]
        await first.start()
        for _ in range(200):
            await collected(source, 1, 30)
            if first.requests["GetBlocks"] > used:
                break
            await asyncio.sleep(0.01)
        assert first.requests["GetBlocks"] > used


async def test_retry_after_is_kept() -> None:
    chain = chain_of([1] * 40)
    async with FakeCoreNode(chain, keep_log=True) as node:
        async with source_of(node, max_blocks=5, start=5, requests_in_flight=1) as source:
            await source.heads()
            node.faults.append(connect_error("resource_exhausted", 1, retry_after=0.3))
            started = time.monotonic()
            assert_whole(await collected(source, 1, 40), chain, 1, 40)
        assert time.monotonic() - started >= 0.3
        assert len(heights(node)) == 9  # the refused one again, as large as it was


async def test_a_node_that_takes_fewer_heights_gets_fewer() -> None:
    chain = chain_of([0] * 300)
    async with FakeCoreNode(chain, keep_log=True) as node, source_of(node) as source:
        node.most_heights = 8
        assert_whole(await collected(source, 1, 300), chain, 1, 300)
        sizes = [len(one) for one in heights(node)]
    assert sizes[0] == 100 and sum(size > 8 for size in sizes) < 30
    assert sizes.count(8) + sizes.count(7) + sizes.count(6) > 20


async def test_a_call_that_takes_too_long_is_made_smaller() -> None:
    chain = chain_of([1] * 100)

    def heavy(method: str, params: list[Any]) -> Fault | None:
        return Fault(delay_seconds=1.0) if method == "GetBlocks" and len(params[0]["height"]) > 30 else None

    async with FakeCoreNode(chain) as node, source_of(node, request_timeout_seconds=0.2, start=100) as source:
        node.faults.append(heavy)
        assert_whole(await collected(source, 1, 100), chain, 1, 100)


@pytest.mark.parametrize("how", ["404", "unimplemented"])
async def test_an_older_node_is_asked_block_by_block(how: str) -> None:
    chain = recorded_shape(5, 120)
    async with FakeCoreNode(chain) as node, source_of(node, requests_in_flight=2) as source:
        node.lacks["GetBlocks"] = how
        assert_whole(await collected(source, 1, 120), chain, 1, 120)
        assert node.requests["GetBlocks"] <= 2  # those of the first calls in flight
        assert node.requests["GetBlock"] == 120


async def test_one_that_does_not_know_anything_for_a_while_is_not_taken_for_an_older_one() -> None:
    chain = chain_of([1] * 60)
    async with FakeCoreNode(chain) as node, source_of(node, max_blocks=20, start=20) as source:
        await source.heads()
        node.faults.append(http_error(404, 40, b"not found"))
        assert_whole(await collected(source, 1, 60), chain, 1, 60)
        singly = node.requests["GetBlock"]
        assert_whole(await collected(source, 1, 60), chain, 1, 60)
        assert node.requests["GetBlock"] == singly


async def test_a_node_that_is_brought_up_to_date_is_asked_for_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_LACKING_SECONDS", 0.1)
    chain = chain_of([1] * 60)
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        node.lacks["GetBlocks"] = "404"
        assert_whole(await collected(source, 1, 60), chain, 1, 60)
        node.lacks.clear()
        await asyncio.sleep(0.1)
        singly = node.requests["GetBlock"]
        assert_whole(await collected(source, 1, 60), chain, 1, 60)
        assert node.requests["GetBlock"] == singly


async def test_a_node_behind_is_not_taken_for_a_hole() -> None:
    chain = chain_of([1] * 40)
    async with FakeCoreNode(chain) as behind, FakeCoreNode(chain) as good, source_of(behind, good) as source:
        behind.lag = 25
        assert_whole(await collected(source, 1, 40), chain, 1, 40)
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        node.lag = 5
        following = asyncio.create_task(collected(source, 1, 40))
        await asyncio.sleep(0.4)  # longer than the patience with a hole
        assert not following.done()
        node.lag = 0
        assert_whole(await following, chain, 1, 40)


async def test_a_head_far_below_is_a_node_that_syncs() -> None:
    chain = chain_of([1] * 50)
    async with FakeCoreNode(chain) as first, FakeCoreNode(chain) as second, source_of(first, second) as source:
        assert (await source.heads()).newest == 50
        first.lag = 40
        assert (await source.heads()).newest == 50
        assert source.nodes[0].last_error == "40 blocks behind"


async def test_one_that_lags_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_PROBE_SECONDS", 0.01)
    chain = chain_of([1] * 50)
    async with FakeCoreNode(chain) as laggard, FakeCoreNode(chain) as good, source_of(laggard, good) as source:
        laggard.lag = 20
        for _ in range(50):
            await source.wait(0.02)
            if source.nodes[0].resting:
                break
        assert source.nodes[0].last_error == "20 blocks behind"
        assert (await source.heads()).newest == 50


# Pruned nodes


async def test_a_pruned_node_is_left_for_the_next_and_used_for_what_it_has() -> None:
    chain = chain_of([1] * 60)
    async with FakeCoreNode(chain, keep_log=True) as pruned, FakeCoreNode(chain) as archive:
        pruned.earliest = 41
        with capture_logs() as logged:
            sizes: dict[str, Any] = {"max_blocks": 5, "start": 5, "requests_in_flight": 1}
            async with source_of(pruned, archive, **sizes) as source:
                spans: list[Span] = []
                async for span in source.spans(1, 60):
                    spans.append(span)
                    await asyncio.sleep(0.02)  # a commit
        assert_whole(spans, chain, 1, 60)
        warnings = [one for one in logged if one["event"] == "blocks pruned"]
        assert [(one["endpoint"], one["earliest"]) for one in warnings] == [("n0", 41)]
        assert 1 <= warnings[0]["block"] <= 40
        assert any(one[0] >= 41 for one in heights(pruned))
        assert archive.requests["GetBlocks"] >= 4


async def test_blocks_that_every_node_has_pruned() -> None:
    chain = chain_of([1] * 60)
    async with FakeCoreNode(chain) as one, FakeCoreNode(chain) as other, source_of(one, other) as source:
        one.earliest, other.earliest = 30, 20
        wanted = r"no node has block 1 any more \(n0 from 30 on, n1 from 20 on\): name one that keeps all blocks"
        with pytest.raises(RpcUnavailable, match=wanted):
            await collected(source, 1, 60)
        with pytest.raises(RpcUnavailable):
            await source.ref(5)
        assert_whole(await collected(source, 30, 60), chain, 30, 60)


# Holes


async def gather(source: CoreSource, first: int, last: int, spans: list[Span]) -> None:
    """Put into `spans` all that comes before an error."""
    async for span in source.spans(first, last):
        spans.append(span)


async def until_hole(source: CoreSource, first: int, last: int) -> tuple[list[Span], MissingBlock]:
    spans: list[Span] = []
    with pytest.raises(MissingBlock) as raised:
        await gather(source, first, last, spans)
    return spans, raised.value


@pytest.mark.parametrize("lacks", [{}, {"GetBlocks": "unimplemented"}])
@pytest.mark.parametrize("start", [1, 7, 50])
async def test_a_hole_halts_after_all_that_is_before_it(start: int, lacks: dict[str, str]) -> None:
    chain = chain_of([1] * 50)
    async with FakeCoreNode(chain) as one, FakeCoreNode(chain) as other:
        one.missing = other.missing = {23}
        one.lacks = dict(lacks)
        async with source_of(one, other, start=start, max_blocks=start) as source:
            spans, missing = await until_hole(source, 1, 50)
    assert_whole(spans, chain, 1, 22)
    assert missing.number == 23 and missing.exit_code == 3
    text = r"block 23 is missing: the chain is at block 50, but no node gives it (n0, n1)"
    assert text in str(missing)


async def test_a_hole_of_one_node_is_filled_by_another() -> None:
    chain = chain_of([1] * 50)
    async with FakeCoreNode(chain) as holed, FakeCoreNode(chain) as good, source_of(holed, good) as source:
        holed.missing = {3, 20, 21, 50}
        assert_whole(await collected(source, 1, 50), chain, 1, 50)


async def test_a_hole_that_closes_in_time_is_none() -> None:
    """A node may announce a height a moment before it can show the block."""
    chain = chain_of([1] * 50)
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        node.missing = {50}
        asyncio.get_running_loop().call_later(0.04, node.missing.clear)
        assert_whole(await collected(source, 1, 50), chain, 1, 50)


async def test_the_first_block_of_all_is_missing() -> None:
    chain = chain_of([1] * 5)
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        node.missing = {1}
        assert (await until_hole(source, 1, 5))[0] == []


# Another chain


async def test_a_node_of_another_chain_is_never_used() -> None:
    chain, foreign = chain_of([1] * 40), chain_of([5] * 60)
    async with FakeCoreNode(chain) as ours, FakeCoreNode(foreign) as wrong, source_of(ours, wrong) as source:
        wrong.chain_id = "core-other"
        assert await source.identity() == "core-test"
        ours.faults.append(connect_error("unavailable", 8))
        with capture_logs() as logged:
            assert_whole(await collected(source, 1, 40), chain, 1, 40)
        assert wrong.requests.keys() <= {"GetNodeInfo"}
        said = {one["error"] for one in logged if one.get("endpoint") == "n1"}
        assert said == {"a node of chain core-other, not core-test: mend or remove it in chain.endpoints"}


async def test_a_node_that_changes_its_chain_is_left_for_one_that_does_not() -> None:
    chain = chain_of([1] * 40)
    async with (
        FakeCoreNode(chain) as turncoat, FakeCoreNode(chain) as loyal,
        source_of(turncoat, loyal, max_blocks=5, start=5) as source,
    ):  # fmt: skip
        await collected(source, 1, 10)
        turncoat.chain_id = "core-next"
        assert_whole(await collected(source, 11, 40), chain, 11, 40)
        assert source.nodes[0].resting > 60


WRONG = (
    r"this chain is core-test, but its nodes answer for core-next now: .*"
    r"`indexer chain accept core-next` takes the new chain"
)


@pytest.mark.parametrize("nodes", [1, 2])
async def test_blocks_of_another_chain_stop_the_daemon(nodes: int) -> None:
    chain = chain_of([1] * 20)
    chain.chain_id = "core-next"
    for _ in range(20):
        chain.mine(plays(9))
    async with FakeCoreNode(chain) as one, FakeCoreNode(chain) as other:
        for node in (one, other):  # which call themselves by the old name still
            node.faults.append(
                lambda method, _params: (
                    Fault(result={"chainid": "core-test", "currentHeight": "40"}) if method == "GetNodeInfo" else None
                )
            )
        async with source_of(*[one, other][:nodes], chain_id="core-test", start=3, max_blocks=3) as source:
            spans: list[Span] = []
            with pytest.raises(WrongNetwork, match=WRONG):
                await gather(source, 1, 40, spans)
    assert_whole(spans, chain, 1, spans[-1].last)
    assert spans[-1].last in (18, 20)  # a call with a block of the other chain is refused as a whole


async def test_a_chain_that_starts_anew_is_seen_though_no_block_comes() -> None:
    """Its heights begin at 1 again: nothing above ours will come for a year."""
    chain, anew = chain_of([1] * 20), FakeCore("core-next")
    anew.mine()
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        await collected(source, 1, 20)
        await source.heads()
        node.chain = anew
        with pytest.raises(WrongNetwork, match=WRONG):
            await source.heads()
    async with FakeCoreNode(chain) as node, source_of(node) as source:
        await source.heads()
        node.chain = anew
        with pytest.raises(WrongNetwork, match=WRONG):
            await collected(source, 1, 20)


async def test_one_that_is_silent_has_nothing_to_say_for_the_old_chain() -> None:
    chain = chain_of([1] * 20)
    async with FakeCoreNode(chain) as dead, FakeCoreNode(chain) as other, source_of(dead, other) as source:
        await collected(source, 1, 10)
        await source.endpoints.probe()  # both are known to be of ours
        await dead.stop()
        other.chain_id = "core-next"
        with pytest.raises(WrongNetwork, match=WRONG):
            await collected(source, 11, 20)


async def test_one_that_was_never_ours_is_no_reason_to_stop() -> None:
    """An operator's mistake in the list must not end the daemon when the only right node is away for a while."""
    chain = chain_of([1] * 20)
    async with FakeCoreNode(chain) as good, FakeCoreNode(chain) as wrong, source_of(good, wrong) as source:
        wrong.chain_id = "core-other"
        await collected(source, 1, 10)
        await good.stop()
        following = asyncio.create_task(collected(source, 11, 20))
        await asyncio.sleep(0.5)
        assert not following.done()
        await good.start()
        assert_whole(await following, chain, 11, 20)


async def test_identity_gives_up_in_time() -> None:
    async with FakeCoreNode(chain_of([1])) as node, source_of(node, connect_timeout_seconds=0.2) as source:
        node.faults.append(http_error(404, None, b"nothing here"))
        with pytest.raises(RpcUnavailable, match=r"no node answers \(n0: HTTP 404 nothing here\); check"):
            await source.identity()


async def test_no_key_in_any_text(caplog: pytest.LogCaptureFixture) -> None:
    """The node repeats the address in its errors; nothing of it is logged, raised or shown."""
    key = "5ecret-K3y-0f-the-0perator"
    chain, texts = chain_of([1] * 3), list[str]()
    async with FakeCoreNode(chain) as node:
        settings = EndpointSettings.model_validate({"url": f"{node.url}/{key}?token={key}x"})
        async with source_of(settings, connect_timeout_seconds=0.2) as source:
            assert_whole(await collected(source, 1, 3), chain, 1, 3)  # the path of the address is kept
            source.endpoints._thinned._seconds = 0
            for fault in (
                connect_error("unavailable", None, f"cannot serve /{key}"), http_error(500, None, f"no {key}".encode()),
                connect_error("unknown", None, f"bad key {key.lower()}"),
            ):  # fmt: skip
                node.faults[:] = [fault]
                with capture_logs() as logged, pytest.raises(TimeoutError):
                    await asyncio.wait_for(source.ref(1), 0.1)
                texts += [repr(logged), source.nodes[0].last_error]
    everything = "\n".join([*texts, caplog.text]).lower()
    assert "***" in everything and key[:12].lower() not in everything
