"""The status page: one small file that asks nobody else, lets data in as text only, and reads what status.json has."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from indexer import ledger
from indexer.model import Heads, Panel
from indexer.state import Role, State
from indexer.web import Web

PAGE = (Path(__file__).parent.parent / "indexer" / "page.html").read_text(encoding="utf-8")
SCRIPT = PAGE[PAGE.index("<script>") : PAGE.index("</script>")]
HOSTILE = "<img src=x onerror=alert(1)>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Connection:
    """Stands for the database's: each panel has one row."""

    async def fetch(self, sql: str, timeout: float) -> list[dict[str, Any]]:
        return [{"track": 1234567, "plays": 7654321, "title": HOSTILE}]


@asynccontextmanager
async def acquire() -> AsyncIterator[Connection]:
    yield Connection()


@pytest.fixture
async def web(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Web]:
    """The daemon's HTTP with a leader that is behind, a hole, a failure, a resting endpoint and a panel."""

    async def find_chain(*_: object) -> SimpleNamespace:
        return SimpleNamespace(id=1)

    async def open_failures(*_: object) -> list[dict[str, Any]]:
        failure = {"id": 1, "hook": "plays", "first": 1500, "last": 1500, "policy": "skip", "error": HOSTILE}
        return [{**failure, "failed_at": None}]

    monkeypatch.setattr(ledger, "find_chain", find_chain)
    monkeypatch.setattr(ledger, "open_failures", open_failures)
    state = State("testnet", 1000)
    state.became(Role.LEADER)
    state.saw(Heads(3_000_999, 3_000_900))
    state.at(2000, 1_700_000_000)
    state.gaps = {"plays": [(1500, 1500)], "aggregates": []}
    endpoint = SimpleNamespace(name="node.test", resting=3.0, latency=0.0123, last_error="too many requests")
    hook = SimpleNamespace(hook=SimpleNamespace(panels=(Panel("Top tracks", "select"),)))
    http = SimpleNamespace(host="127.0.0.1", port=0, stall_seconds=120.0)
    made: Any = Web(SimpleNamespace(http=http), SimpleNamespace(acquire=acquire), [endpoint], [hook], state)
    async with made.serving():
        yield made


async def test_page_is_served_whole_and_small(web: Web) -> None:
    async with aiohttp.ClientSession() as session, session.get(web.url) as reply:
        body = await reply.read()
    assert reply.status == 200
    assert reply.content_type == "text/html"
    assert body.decode() == PAGE
    assert len(body) < 40_000


def test_page_asks_nobody_else() -> None:
    assert not re.search(r"https?:|\bdata:|@import|url\(|wss?:|['\"(=]//", PAGE)
    assert set(re.findall(r"\b(?:href|src|action)=\"([^\"]*)\"", PAGE)) == {"./status.json", "./metrics", "./readyz"}
    assert re.findall(r"fetch\(\"([^\"]*)\"", SCRIPT) == ["./status.json"]


def test_page_fits_its_content_security_policy() -> None:
    # style elements and script elements may be inline; handlers and style attributes would bind us to allowing them
    assert not re.search(r"<[^>]*\s(?:on\w+|style)=", PAGE.replace(SCRIPT, ""))
    assert not re.search(r"\beval\(|new Function|setTimeout\(\s*['\"`]|javascript:", PAGE)


@pytest.mark.parametrize(
    "sink",
    ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "srcdoc", "DOMParser", "createContextual"],
)
def test_data_gets_into_the_page_as_text_only(sink: str) -> None:
    assert sink not in PAGE


def test_page_is_of_use_without_script() -> None:
    found = re.search(r"<noscript>(.*?)</noscript>", PAGE, re.DOTALL)
    assert found
    assert all(f'href="./{path}"' in found[1] for path in ("status.json", "metrics", "readyz"))


def test_only_the_line_of_the_role_is_read_out() -> None:
    assert re.findall(r'id="(\w+)" aria-live="(\w+)"', PAGE) == [("summary", "polite")]
    assert PAGE.count("aria-live") == 1


def test_every_element_the_script_fills_is_there() -> None:
    ids = set(re.findall(r'\bid="([\w-]+)"', PAGE))
    wanted = set(re.findall(r"\b(?:at|put|plot)\(\"([\w-]+)\"", SCRIPT))
    assert wanted
    assert wanted <= ids


async def test_status_has_what_the_page_reads(web: Web) -> None:
    async with aiohttp.ClientSession() as session, session.get(f"{web.url}status.json") as reply:
        facts = await reply.json()
    maybe = {"stalled", "database"}  # the page does without
    assert set(re.findall(r"\bfacts\.(\w+)", SCRIPT)) - maybe <= set(facts)


if not os.environ.get("CI"):

    async def test_page_in_a_browser(web: Web, tmp_path: Path) -> None:
        if BROWSER is None:
            pytest.skip("no Chromium here: the page is not looked at in a browser (apt-get install chromium)")
        process = await asyncio.create_subprocess_exec(
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path}", "--virtual-time-budget=1500", "--dump-dom", web.url,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(60):
                output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        page = output.decode().partition("<script>")[0]
        assert re.search(r'id="role">leader<.*Catches up with the head\. One failure is open\.', page)
        for shown in (
            "testnet", "3,000,999", "2,998,999", "2,000", "plays, block 1,500", "1 block missing: 1,500", "99.90 %",
            "no hole", "node.test", "resting", "12.3 ms", "too many requests", "Top tracks", "7,654,321",
        ):  # fmt: skip
            assert shown in page
        # once as the failure's error, once in the panel, and never as an element
        assert page.count("&lt;img src=x onerror=alert(1)&gt;") == 2
        assert "<img" not in page
        assert page.count('class="curve"') == 2
