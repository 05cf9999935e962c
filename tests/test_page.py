"""The status page in a real Chromium: live, safe with hostile strings, operable, readable by all, asking nobody."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from browserkit import DESK, PHONE
from pagekit import BAD, HOSTILE, LAST, PASSWORD, TOKEN, Site, site
from playwright.async_api import Browser, Page, expect

from indexer.model import Heads
from indexer.state import Role
from indexer.web_page import Page as Rendered

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]

SHOTS = os.environ.get("PAGE_SHOTS")  # a folder: the pages as pictures, to be looked at


@pytest_asyncio.fixture(loop_scope="module")
async def shown(indexer_database_url: str) -> AsyncIterator[Site]:
    async with site(indexer_database_url) as made:
        yield made


class Looked:
    """A page that is open, what it asked for, and what it complained of."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )

    async def shot(self, name: str) -> None:
        if SHOTS:
            await self.page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


@asynccontextmanager
async def looking(browser: Browser, url: str, **options: Any) -> AsyncIterator[Looked]:
    async with await browser.new_context(viewport=options.pop("viewport", DESK), **options) as context:
        looked = Looked(await context.new_page())
        await looked.page.goto(url)
        yield looked


async def unlock(page: Page, token: str = TOKEN) -> None:
    await page.get_by_label("Admin token").fill(token)
    await page.get_by_role("button", name="Show the buttons").click()


async def test_page_lives_and_lets_data_in_as_text_only(browser: Browser, shown: Site) -> None:
    async with looking(browser, shown.url) as looked:
        page = looked.page
        await expect(page.locator("#percent")).not_to_be_empty()
        await page.evaluate("window.sameAsBefore = true")
        await expect(page.locator("#role")).to_have_text("leader")
        await expect(page.locator("#what")).to_have_text("Catches up with the head. One failure is open.")
        for place, text in {
            "#head": f"{LAST + 2_998_999:,}", "#cursor": f"{LAST}", "#lag-blocks": "2,998,999",
            "#journal": "42 rows", "#endpoints": "node.test", "#reorgs": "2 blocks", "#budgets": "750",
        }.items():  # fmt: skip
            await expect(page.locator(place)).to_contain_text(text)
        # a hole shows, and can be read
        strip = page.get_by_role("img", name=f"plays: 1 block missing: {BAD}")
        await expect(strip.locator("path.hole")).to_have_attribute("d", "M47.21 10V0H51.15V10Z")
        tiny = await page.evaluate("strip([[5, 5]], 0, 999999, '').querySelector('.hole').getAttribute('d')")
        assert tiny == "M0 10V5.0h1V10Z"  # one block of a million is seen, too
        assert await page.locator("#lag-plot path.curve").count() >= 1
        # it goes on without being loaded anew
        shown.state.saw(Heads(LAST, LAST - 20))
        shown.state.gaps = {"plays": [(BAD, BAD), (30, 39)], "aggregates": [], "milestones": []}
        await expect(page.locator("#what")).to_contain_text("Follows the head.")
        await expect(page.locator("#lag-blocks")).to_have_text("0")
        await expect(page.get_by_role("img", name="plays: 11 blocks missing: 12, 30 to 39")).to_be_visible()
        await expect(page.get_by_role("img", name="aggregates: no hole")).to_be_visible()
        assert await page.evaluate("window.sameAsBefore") is True
        # the traceback comes as text, without what is secret
        await page.get_by_text("Traceback of failure").click()
        traceback = page.locator("pre.traceback")
        await expect(traceback).to_contain_text("Traceback (most recent call last)")
        await expect(traceback).to_contain_text(HOSTILE)
        assert PASSWORD not in await page.content()
        # the same strings as an error, a held job's, a node's, a panel's title and a cell of it
        assert (await page.locator("body").inner_text()).count(HOSTILE) >= 6
        assert await page.locator("img").count() == 0
        # another role, and a daemon that is gone
        shown.state.became(Role.STANDBY, "another process leads this chain")
        await expect(page.locator("#what")).to_contain_text("Stands by, and takes over when the leader ends.")
        await page.context.set_offline(True)
        await expect(page.locator("#role")).to_have_text("no answer")
        await page.context.set_offline(False)
        await expect(page.locator("#role")).to_have_text("standby")
        assert all(url.startswith(shown.url) for url in looked.asked), looked.asked
        assert {url.removeprefix(shown.url).partition("?")[0].partition("/")[0] for url in looked.asked} <= {
            "", "status.json", "failures", "favicon.ico",
        }  # fmt: skip
        assert [one for one in looked.complaints if "INTERNET_DISCONNECTED" not in one] == []


async def test_buttons_work_with_the_token_and_are_not_there_without(browser: Browser, shown: Site) -> None:
    failure = await shown.failure
    async with looking(browser, shown.url) as looked:
        page = looked.page
        retry = page.get_by_role("button", name=f"Retry failure {failure}")
        await expect(page.get_by_label("Admin token")).to_be_visible()
        await expect(page.locator("#failures-list")).to_contain_text(f"block {BAD}")
        assert await page.locator("button.act").count() == 0
        await unlock(page, "a wrong one")
        await expect(page.get_by_role("status")).to_contain_text("This is not http.admin_token")
        assert await page.locator("button.act").count() == 0
        await unlock(page)
        await expect(page.get_by_role("status")).to_contain_text("The token is right")
        await expect(page.get_by_role("button", name="Fill all holes of all hooks")).to_be_visible()
        await looked.shot("operate")
        await page.get_by_role("button", name=f"Requeue job {shown.held}").click()
        await expect(page.get_by_role("status")).to_contain_text(f"Job {shown.held} waits again")
        await retry.click()
        await expect(page.get_by_role("status")).to_contain_text("1 block is replayed")
        await expect(page.get_by_role("heading", name=f"Retry of failure {failure}: done")).to_be_visible()
        await expect(page.locator("#work-left")).to_contain_text("indexer verify aggregates")
        await expect(page.locator("#failures")).to_be_hidden()
        await expect(page.get_by_role("img", name="plays: no hole")).to_be_visible()
        await looked.shot("done")
        # the token stays in the tab, and nowhere that a request or another page would see it
        assert not any(TOKEN in url for url in looked.asked)
        assert await page.evaluate("document.cookie + localStorage.length + location.href") == f"0{shown.url}"
        await page.reload()
        await expect(page.locator("#unlocked")).to_be_visible()
        await page.get_by_role("button", name="Forget the token").click()
        await expect(page.get_by_label("Admin token")).to_be_visible()
        assert await page.evaluate("sessionStorage.length") == 0
    assert not await shown.failure


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_page_is_readable_by_everybody(browser: Browser, shown: Site, scheme: Any) -> None:
    async with looking(browser, shown.url, color_scheme=scheme) as looked:
        page = looked.page
        await unlock(page)
        await expect(page.get_by_role("button", name="Retry failure")).to_be_visible()
        await page.get_by_text("Traceback of failure").click()
        await expect(page.locator("pre.traceback")).to_contain_text("Traceback (most")
        for name, viewport in (("desk", DESK), ("phone", PHONE)):
            await page.set_viewport_size(viewport)
            await page.evaluate("new Promise(requestAnimationFrame)")
            assert await page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
            found = (await Axe().run(page)).response["violations"]
            bad = [
                (one["id"], [node["html"][:200] for node in one["nodes"]])
                for one in found
                if one["impact"] in ("serious", "critical")
            ]
            assert bad == [], f"{scheme}, {name}"
            await looked.shot(f"{scheme}-{name}")


async def test_page_is_of_use_without_script(browser: Browser, shown: Site) -> None:
    async with looking(browser, shown.url, java_script_enabled=False) as looked:
        text = await looked.page.locator("body").inner_text()
        for part in (
            "main", "leader", "Catches up with the head.", "2,998,999", f"{LAST + 2_998_999:,}", "1 block missing: 12",
            f"plays, block {BAD}", HOSTILE, "loads itself anew every 5 seconds",
        ):  # fmt: skip
            assert part in text, part
        assert "Admin token" not in text and "Budgets" not in text
        assert await looked.page.locator("img").count() == 0
        # a noscript's content is text to a parser that runs scripts
        refresh = looked.page.locator("meta[http-equiv=refresh]")
        assert await refresh.get_attribute("content") == "5"
        await looked.shot("no-script")
        await looked.page.get_by_role("link", name="Traceback of failure").click()
        assert "ValueError" in await looked.page.locator("body").inner_text()
        assert all(url.startswith(shown.url) for url in looked.asked)


async def test_page_says_what_is_wrong_with_the_database(browser: Browser, shown: Site) -> None:
    async with looking(browser, shown.url) as looked:
        await expect(looked.page.locator("#failures")).to_be_visible()
        await shown.connection.execute("alter schema indexer rename to away")
        try:
            notice = looked.page.locator("#trouble")
            await expect(notice).to_contain_text("The database can’t be read")
            await expect(looked.page.locator("#failures")).to_be_visible()  # as it was read last
            async with shown.session.get(shown.url) as reply:
                assert "The database can’t be read" in await reply.text()
        finally:
            await shown.connection.execute("alter schema away rename to indexer")
        await expect(notice).to_be_hidden()


async def test_page_is_small_and_runs_nothing_but_its_own_script(shown: Site) -> None:
    async with shown.session.get(shown.url) as reply:
        body, policy = await reply.read(), reply.headers["Content-Security-Policy"]
        assert reply.headers["Cache-Control"] == "no-store" and reply.headers["X-Content-Type-Options"] == "nosniff"
    assert len(body) < 80_000
    assert "unsafe" not in policy and policy.count("sha256-") == 2 and "default-src 'none'" in policy
    page = body.decode()
    script = page[page.index("<script>") : page.index("</script>")]
    assert not re.search(r"https?:|\bdata:|@import|url\(|wss?:", page.replace("https://node.test", ""))
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "srcdoc", "DOMParser", "eval("):
        assert sink not in script
    assert not re.search(r"<[^>]*\s(?:on\w+|style)=", page.replace(script, "").replace("&lt;", ""))
    # what the script fills is there, and what it reads is told
    wanted = set(re.findall(r'\b(?:at|put|plot)\("([\w-]+)"', script))
    assert wanted and wanted <= set(re.findall(r'\bid="([\w-]+)"', page))
    assert set(re.findall(r"\bfacts\.(\w+)", script)) - {"done", "error"} <= set(await shown.facts())


async def test_nothing_that_is_put_into_the_page_is_expanded_again(shown: Site) -> None:
    facts = {**await shown.facts(), "chain": "{{script}}<b>", "reason": "{{style}}", "head": None}
    page = Rendered().render(facts).decode()
    assert "<h1><span id=\"chain\">{{script}}&lt;b&gt;</span>" in page and ">{{style}}</p>" in page
    assert await asyncio.to_thread(Rendered().render, {**facts, "head": 10**15})
