"""`indexer demo --network audius` on a stand-in node of the Core chain."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path

from daemon import command
from test_record_cli import refused

from indexer.fakechain import FakeCore, FakeCoreNode, core_play, core_plays


async def test_the_public_chain_from_a_recent_block_on(tmp_path: Path) -> None:
    chain, at = FakeCore("audius-test"), int(time.time())
    for n in range(400):
        time_ = datetime.fromtimestamp(at - 400 + n, UTC).isoformat()
        chain.mine(core_plays(core_play("7", "5", time_), core_play(str(100 + n % 20), "", time_)))
    async with FakeCoreNode(chain) as node:
        done = await command(
            "demo", "--network", "audius", "--rpc", node.url, "--seconds", "8", "--port", "0", folder=tmp_path
        )
    assert done.code == 0, done
    assert "the Open Audio Core chain from block 100 on, by http://127.0.0.1:" in done.out
    assert re.search(r"Indexed 301 blocks: 602 plays of 21 tracks, 25 milestones.$", done.out.strip()), done.out
    assert done.errors == [], done.err


async def test_options_that_do_not_fit_together(tmp_path: Path) -> None:
    for arguments, word in (
        (["--network", "spotify"], '"spotify" is not known: audius'),
        (["--network", "audius", "--contract", "0x1"], "--contract is of an EVM chain"),
        (["--network", "audius", "--rpc", "127.0.0.1:1"], "begins with http:// or https://"),
    ):
        refused(await command("demo", *arguments, folder=tmp_path), 2, word)
