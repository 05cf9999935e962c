"""replay, gaps and failures as commands: what they print, their exit codes, and what a kill -9 leaves."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from daemon import HOOKS, INDEXER, Commands, Daemon, Ended, dawdle, environment, settings, toml, until
from replaykit import World, chain_of, everything, mine, own_plays, world

from indexer import ledger

Enter = Callable[..., AbstractAsyncContextManager[World]]
Run = Callable[..., Awaitable[Ended]]

BAD = [6, 7, 14, 18]
SKIP = {name: {"on_error": "skip"} for name in ("plays", "aggregates", "milestones")}


@pytest.fixture
def enter(database_url: str, connection: asyncpg.Connection) -> Enter:
    return partial(world, database_url, connection)


@pytest.fixture
def run(commands: Commands, tmp_path: Path) -> Run:
    """A command on the world's database and node; `sections` are laid over the settings."""

    async def with_settings(w: World, *arguments: str, **sections: Any) -> Ended:
        sections.setdefault("hooks", {"enabled": HOOKS, **SKIP})
        sections.setdefault("span", {"max_events": 10, "max_blocks": 5})
        (tmp_path / "indexer.toml").write_text(toml(settings(w.url, w.node.url, **sections)))
        return await commands(*arguments, folder=tmp_path)

    return with_settings


async def holed(w: World, name: str = "aggregates") -> World:
    """The hook was skipped at the blocks BAD."""
    w.picky(name).bad.update(BAD)
    await w.follow()
    w.picky(name).bad.clear()
    return w


def chain(final_lag: int = 4) -> Any:
    return chain_of(3, 24, final_lag, own=BAD)


def refused(ended: Ended, code: int, *words: str) -> None:
    said = ended.out + ended.err
    assert ended.code == code, said
    assert len(ended.errors) == 1 and ended.errors[0].startswith("indexer: "), said
    assert "Traceback" not in said
    for word in words:
        assert word in ended.errors[0], said


GAPS = """\
plays: nothing missing
aggregates: 4 missing
  6 to 7 (2)
  14
  18
milestones: 4 missing
  6 to 7 (2)
  14
  18
"""


async def test_gaps(enter: Enter, run: Run) -> None:
    async with enter(chain()) as w:
        await holed(w)
        shown = await run(w, "gaps")
        assert (shown.code, shown.out, shown.errors) == (1, GAPS, [])
        ranges = [[6, 7], [14, 14], [18, 18]]
        found = json.loads((await run(w, "gaps", "--json")).out)
        assert found == {"plays": [], "aggregates": ranges, "milestones": ranges}
        assert (await run(w, "gaps", "--hook", "plays")).code == 0
        filled = await run(w, "gaps", "--fill", "--json")
        assert (filled.code, json.loads(filled.out)) == (0, {"plays": [], "aggregates": [], "milestones": []})
        await w.is_right()
        again = await run(w, "gaps", "--fill")
        assert (again.code, again.out.splitlines()) == (0, [f"{name}: nothing missing" for name in SKIP])


async def test_gaps_fill_says_what_it_did(enter: Enter, run: Run) -> None:
    async with enter(chain()) as w:
        await holed(w, "plays")
        refused(await run(w, "gaps", "--fill", "--hook", "aggregates"), 2, "comes after plays", "--hook plays")
        filled = await run(w, "gaps", "--fill")
        assert filled.code == 0
        assert filled.out.startswith("replayed 4 blocks with 48 events: ")
        assert "nothing missing" in filled.out
        await w.is_right()


async def test_failures(enter: Enter, run: Run) -> None:
    async with enter(chain()) as w:
        await holed(w, "plays")
        shown = await run(w, "failures")
        lines = [
            f"{n}  skipped at block {at}, hook plays: ValueError: plays does not like block {at}"
            for n, at in enumerate(BAD, 1)
        ]
        assert (shown.code, shown.out.splitlines()) == (1, lines)
        assert [one["first"] for one in json.loads((await run(w, "failures", "list", "--json")).out)] == BAD

        shown = await run(w, "failures", "show", "2")
        first, count, *events = shown.out.splitlines()
        assert shown.code == 0
        assert first.startswith("failure 2 (open): hook plays, block 7, skip, 20")
        assert count == "12 events"
        assert events[3].startswith("  7/3 Played: trackId='1007', userId='3'")
        assert events[-1] == "ValueError: plays does not like block 7"
        assert 'raise ValueError(f"{self.name} does not like block' in shown.out  # the line of the hook itself
        found = json.loads((await run(w, "failures", "show", "2", "--json")).out)
        assert [one["args"]["trackId"] for one in found["events"]] == ["1007"] * 12
        assert (found["first"], found["resolved_at"], found["hook"]) == (7, None, "plays")

        retried = await run(w, "failures", "retry", "2")
        assert retried.code == 0
        assert retried.out.splitlines()[1].endswith(": indexer verify aggregates, indexer verify milestones")
        assert retried.out.splitlines()[2:] == ["no open failures"]
        assert retried.out.startswith("replayed 1 blocks with 12 events: ")
        assert await w.gaps() == {name: [(6, 6), (14, 14), (18, 18)] for name in SKIP}  # downstream too
        assert "failure 2 (resolved 20" in (await run(w, "failures", "show", "2")).out
        again = await run(w, "failures", "retry", "2")
        assert (again.code, again.out.splitlines()[0]) == (
            0, "nothing to do: all of these blocks are applied (replay --force applies them again)",
        )  # fmt: skip
        retried = await run(w, "failures", "retry", "--all", "--json")
        facts = json.loads(retried.out)
        assert (retried.code, facts["blocks"], facts["open"]) == (0, 3, [])
        assert (await run(w, "failures")).out == "no open failures\n"
        assert await w.gaps() == {}
        await w.is_right()


async def test_a_retry_leaves_alone_what_lacks_something_else(enter: Enter, run: Run) -> None:
    """Two hooks failed at one block, and a third builds on both."""
    async with enter(chain()) as w:
        w.aggregates.after = ()  # as if it did not build on plays
        w.plays.bad.add(14)
        w.aggregates.bad.add(14)
        await w.follow()
        async with w.replayer() as replayer:
            found = await ledger.open_failures(w.connection, w.row.id)
            [one] = await replayer.plan_retry([one for one in found if one["hook"] == "plays"])
            assert one.fill == ("plays",)
            [one] = await replayer.plan_retry(found)
            assert one.fill == ("plays", "aggregates", "milestones")


async def test_replay(enter: Enter, run: Run) -> None:
    async with enter(chain()) as w:
        await holed(w)
        before = await everything(w.connection)
        dry = await run(w, "replay", "0", "20", "--dry-run")
        assert dry.code == 0
        assert dry.out.startswith("a dry run of 4 blocks with 48 events; nothing was written\n")
        assert "aggregate_plays: 4 inserted, 0 changed, 0 deleted\n  + count=12, play_item_id=1006\n" in dry.out
        dry = await run(w, "replay", "0", "20", "--dry-run", "--json")
        tables = {one["table"]: one for one in json.loads(dry.out)["tables"]}
        assert tables["milestones"]["inserted"] == 4
        assert len(tables["milestones"]["samples"]) == 3
        assert await everything(w.connection) == before
        refused(await run(w, "replay", "0", "24", "--dry-run", "--force"), 2, "blocks above 20 are not final")

        done = await run(w, "replay", "0", "10")
        assert (done.code, done.errors) == (0, [])
        assert done.out.startswith("replayed 2 blocks with 24 events: 3 rows in ")
        done = await run(w, "replay", "10", "24", "--hook", "aggregates", "--hook", "milestones", "--json")
        facts = json.loads(done.out)
        assert (facts["planned"], facts["blocks"], facts["events"], facts["failures"]) == (2, 2, 24, [])
        await w.is_right()
        before = await everything(w.connection)
        done = await run(w, "replay", "0", "24")
        assert done.out == "nothing to do: all of these blocks are applied (replay --force applies them again)\n"
        assert await everything(w.connection) == before
        assert json.loads((await run(w, "replay", "0", "20", "--force", "--json")).out)["blocks"] == 21
        await w.is_right()


WRONG = {
    "replay 9 3": ("9 to 3 run backwards",),
    "replay 0 25": ("block 25 is not applied yet", "0 to 24"),
    "replay 0 5 --hook pays": ("no enabled hook is called pays", "plays, aggregates, milestones"),
    "replay 0 five": ("last", "integer", "replay --help"),
    "replay 0 20 --hook milestones": ("comes after aggregates, which has a hole at blocks 6 to 7",),
    "failures show 99": ("there is no failure 99", "failures list"),
    "failures retry": ("which failure?", "--all"),
    "failures retry 1 --all": ("which failure?",),
    "failures list 3": ("failures show 3",),
    "failures mend": ("mend", "list", "show NUMBER"),
}


async def test_wrong_arguments(enter: Enter, run: Run) -> None:
    async with enter(chain()) as w:
        await holed(w)
        before = await everything(w.connection)
        for arguments, words in WRONG.items():
            refused(await run(w, *arguments.split()), 2, *words)
        for arguments in ("replay 0 5", "failures"):
            ended = await run(w, *arguments.split(), chain={"name": "other"})
            refused(ended, 2, "this database knows no chain other", "indexer run")
        late = {"enabled": [*HOOKS, "late:late"], **SKIP}
        assert await everything(w.connection) == before
        module = "from indexer import hook\n@hook('late', listens=['Played'], tables=[])\nasync def late(tx, b): ...\n"
        await asyncio.to_thread(Path(commands_folder(run), "late.py").write_text, module)
        refused(await run(w, "replay", "0", "5", hooks=late), 2, "the hook late is new", "start the daemon")
        assert json.loads((await run(w, "gaps", "--json", hooks=late)).out)["late"] == [[0, 24]]


def commands_folder(run: Any) -> Path:
    """Where the commands run, and import hooks from."""
    return next(cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, Path))


async def test_without_a_node(enter: Enter, run: Run) -> None:
    """What needs no blocks works; the rest is temporary."""
    async with enter(chain()) as w:
        await holed(w)
        await w.node.stop()
        down = {"chain": {"connect_timeout_seconds": 0.3}}
        assert (await run(w, "gaps", **down)).out == GAPS
        assert (await run(w, "failures", "list", **down)).code == 1
        shown = await run(w, "failures", "show", "1", **down)
        assert shown.code == 0
        assert shown.out.splitlines()[1] == "the node does not answer, so its events can't be shown"
        assert "ValueError: aggregates does not like block 6" in shown.out
        for arguments in ("replay 0 20", "replay 0 20 --dry-run", "gaps --fill", "failures retry 1"):
            refused(await run(w, *arguments.split(), **down), 75)
        await w.node.start()
        assert (await run(w, "gaps", "--fill", **down)).code == 0
        await w.is_right()


async def test_while_another_replay_works(enter: Enter, run: Run) -> None:
    async with enter(chain()) as w:
        await holed(w)
        async with w.replayer() as busy:
            await busy.plan(None, None, ["plays"])
            for arguments in ("replay 0 20", "gaps --fill", "failures retry --all"):
                refused(await run(w, *arguments.split()), 75, "another replay or rebuild works on this chain")
            assert (await run(w, "gaps")).code == 1
        assert (await run(w, "failures", "retry", "--all")).code == 0
        await w.is_right()


PICKY = """
from indexer import hook

@hook("picky", listens=["Played"], tables=[])
async def picky(tx, blocks):
    for block in blocks:
        if block.number in (7, 18):
            raise RuntimeError(f"block {block.number} tastes bad")
"""


@pytest.mark.parametrize("on_error", ["skip", "halt"])
async def test_a_hook_that_fails_again(on_error: str, enter: Enter, run: Run, tmp_path: Path) -> None:
    (tmp_path / "picky_hooks.py").write_text(PICKY)
    hooks = {"enabled": [*HOOKS, "picky_hooks:picky"], **SKIP, "picky": {"on_error": on_error}}
    async with enter(chain()) as w:
        await w.follow()
        await ledger.register_hooks(w.connection, w.row.id, ["picky"])
        dry = await run(w, "replay", "0", "20", "--dry-run", hooks=hooks)
        if on_error == "halt":
            refused(dry, 3, "hook picky failed at block 7: RuntimeError: block 7 tastes bad")
            refused(await run(w, "gaps", "--fill", hooks=hooks), 3, "hook picky failed at block 7")
            assert (await w.gaps())["picky"][0][0] == 7
            return
        assert dry.code == 1
        assert dry.out.splitlines()[1:] == [
            "left out: hook picky failed at block 7: RuntimeError: block 7 tastes bad",
            "left out: hook picky failed at block 18: RuntimeError: block 18 tastes bad",
            "no row would change",
        ]
        done = await run(w, "replay", "0", "20", hooks=hooks)
        assert done.code == 1
        assert "left out: hook picky failed at block 18: RuntimeError: block 18 tastes bad" in done.out
        filled = await run(w, "gaps", "--fill", hooks=hooks)
        assert filled.code == 1
        assert filled.out.endswith("picky: 2 missing\n  7\n  18\n")
        assert (await run(w, "failures", "retry", "--all", hooks=hooks)).code == 1
        # tried four times, and still two failures
        failures = json.loads((await run(w, "failures", "--json", hooks=hooks)).out)
        assert [(one["id"], one["first"]) for one in failures] == [(3, 7), (4, 18)]  # 1 and 2 were rolled back
        (tmp_path / "picky_hooks.py").write_text(PICKY.replace("(7, 18)", "()"))
        assert (await run(w, "failures", "retry", "--all", hooks=hooks)).code == 0
        assert (await run(w, "gaps", hooks=hooks)).code == 0


# -- processes -------------------------------------------------------------------------------------------------------


async def test_progress_off_a_terminal_and_kill_9(enter: Enter, run: Run, tmp_path: Path) -> None:
    """What was committed stays, and the next one finishes the rest."""
    bad = list(range(4, 24))
    async with enter(chain_of(3, 24, 0, own=bad)) as w:
        w.plays.bad.update(bad)
        await w.follow()
        w.plays.bad.clear()
        await dawdle(w.connection, 0.25)
        assert (await run(w, "gaps", span={"max_blocks": 1, "max_events": 1})).code == 1  # writes the settings
        killed = await asyncio.create_subprocess_exec(
            INDEXER, "replay", "0", "24", cwd=tmp_path, env=environment(), stderr=asyncio.subprocess.PIPE
        )
        assert killed.stderr is not None
        line = (await killed.stderr.readline()).decode()
        assert line.startswith("replayed ")
        assert " of 20 blocks  " in line and "events/s  ETA " in line
        killed.send_signal(signal.SIGKILL)
        await killed.wait()
        left = (await w.gaps())["plays"]
        assert left and left != [(4, 23)]
        slots = await w.connection.fetch("select distinct slot from plays where slot between 4 and 23")
        assert {row["slot"] for row in slots} == set(bad) - {n for low, high in left for n in range(low, high + 1)}
        await w.connection.execute("drop trigger dawdle on plays")

        async def free() -> bool:  # the server notices soon that the killed one's session is gone
            return (await run(w, "gaps", "--fill")).code == 0

        await until(free, "the rest is filled")
        await w.is_right()


async def test_beside_a_daemon(enter: Enter, run: Run, tmp_path: Path) -> None:
    """A real daemon goes on at the head, keeps its lead, and shows the gap in its metrics until it is filled."""
    async with enter(chain_of(3, 60, 30, own=[*BAD, 45])) as w:
        w.picky("plays").bad.update([*BAD, 45])
        await w.follow()
        hooks = {"enabled": HOOKS, **SKIP}
        async with Daemon(tmp_path, settings(w.url, w.node.url, hooks=hooks)) as daemon:
            await daemon.logged("leader acquired")
            filling = asyncio.create_task(run(w, "gaps", "--fill"))
            number, started = 60, time.monotonic()
            while not filling.done() or number < 66:
                number += 1
                mine(w.chain, own_plays(number))
                await asyncio.sleep(0.1)
                assert time.monotonic() - started < 30
            assert (await filling).code == 0, (await filling).out
            await daemon.reached(w.connection, w.chain.head.number)
            w.chain.fork(20, [[] for _ in range(21)])
            await daemon.logged("reorg undone")
            await daemon.reached(w.connection, w.chain.head.number)
            assert await w.gaps() == {}
            await w.is_right()
            assert await daemon.stop() == 0
