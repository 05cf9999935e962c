"""What the documents tell people to type can be typed: commands parse, settings load, links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import typer.main
from reference import README, REFERENCE, ROOT

from indexer import cli, cli_jobs
from indexer.config import HookSettings, HooksSettings, Settings
from indexer.rebuild import verify
from indexer.registry import Registered, load_hooks, locate
from indexer.sidecar.jobs import JobType
from indexer.testing import assert_set_equals_rows, assert_undo_restores, make_blocks, run_hooks

DOCUMENTS = [README, *sorted((ROOT / "deploy").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
GUIDE = ROOT / "deploy" / "docs" / "hooks.md"
BUNDLED = ["entities", "plays", "aggregates", "milestones", "listeners", "challenges"]
ACTIONS = {"jobs": cli_jobs._ACTIONS, "failures": ("list", "show", "retry"), "listeners": ("show", "reset")}
PROGRAM: Any = typer.main.get_command(cli.app)
PLACEHOLDERS = ("NUMBER", "FIRST", "LAST")
# The names of others' programs in front of ours, and variables that are set for it.
_COMMAND = re.compile(r"(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?indexer (?!\d)(.+)")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, *languages: str) -> list[str]:
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def prose(path: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(path: Path, *, in_prose: bool = False) -> Iterator[list[str]]:
    """The words after `indexer` of each command line in the blocks, or of each text between backticks elsewhere."""
    lines = [line for text in blocks(path, "", "sh", "bash", "console") for line in text.splitlines()]
    if in_prose:
        lines = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]
    for line in lines:
        if match := _COMMAND.fullmatch(line.strip()):
            words = ["1" if word in PLACEHOLDERS else word for word in shlex.split(match[1], comments=True)]
            yield words[: next((place for place, word in enumerate(words) if word in (">", "|", "&&", "&")), None)]


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and what it is given; raises what the program would show.

    Options of the program itself are only looked up: they do their work as soon as they are parsed.
    """
    if words[0].startswith("-"):
        assert [words[0]] in [one.opts for one in PROGRAM.params] and len(words) == 1, "No such option"
        return words[0], {}
    assert not {"--help", "-h"}.intersection(words), "it would show its help and exit"
    command = PROGRAM
    context = command.make_context("indexer", list(words), resilient_parsing=False)
    rest = list(words)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, rest)
        if hasattr(command, "commands") and not rest:
            return str(name), {}  # a group alone shows its help
        context = command.make_context(name, rest, parent=context, resilient_parsing=False)
        rest = [*context._protected_args, *context.args] if hasattr(command, "commands") else []
    return str(context.info_name), context.params


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_are_those_of_the_program(path: Path) -> None:
    for in_prose in (False, True):
        for words in commands(path, in_prose=in_prose and path != REFERENCE):  # its table shows what they take
            try:
                name, given = parse(words)
            except Exception as error:
                if in_prose and "Missing parameter" in str(error):
                    continue  # text may name a command without what it needs
                raise AssertionError(f"{name_of(path)}: indexer {shlex.join(words)}: {error}") from error
            if name in ACTIONS:
                assert given["action"] in ACTIONS[name], f"{name_of(path)}: indexer {shlex.join(words)}"


def test_most_commands_are_in_the_documents() -> None:
    """So that the search for them is known to find some; and a wrong one is refused."""
    found = {words[0] for path in DOCUMENTS for words in commands(path)}
    assert {"run", "status", "replay", "gaps", "failures", "migrate", "verify", "rebuild", "jobs", "keys"} <= found
    for wrong in ("replay 1", "replay one 2", "gaps --all", "chain agree x", "sing", "--sing"):
        with pytest.raises(Exception, match=r"Missing|valid|No such"):
            parse(wrong.split())


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_settings_load(path: Path) -> None:
    """Each block alone, over the defaults; the bundled hooks' own settings, too."""
    for text in blocks(path, "toml"):
        values = tomllib.loads(text)
        if "tool" in values:
            continue  # a project's settings of its tools
        settings = Settings(**values)
        ours = [place for place in settings.hooks.enabled if place.startswith("hooks.")]
        named = [one for one in BUNDLED if f"hooks.{one}:{one}" in ours or one in values.get("hooks", {})]
        own = {name: one for name, one in settings.hooks.__pydantic_extra__.items() if name in named}
        wanted = [one for one in BUNDLED if one in named or (named and not ours)]
        load_hooks(HooksSettings(enabled=[f"hooks.{one}:{one}" for one in wanted], **own))  # type: ignore[arg-type]


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#{1,6} +(.+?) *$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{name_of(path)} links to {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name_of(path)} links to {target}, which has: {sorted(anchors(there))}"


def test_every_document_is_linked() -> None:
    linked = {
        (path.parent / target.partition("#")[0]).resolve()
        for path in DOCUMENTS
        for target in re.findall(r"\]\(([^)\s]+\.md[^)\s]*)\)", path.read_text())
    }
    assert [name_of(path) for path in DOCUMENTS if path not in linked and path != README] == []


# -- the guide's hooks, as a package of their own ----------------------------------------------------------------------

TABLES = """
    create table sale (tx_hash bytea, event_index int, buyer text, price bigint, block bigint,
                       primary key (tx_hash, event_index));
    create table revenue (buyer text primary key, total bigint not null);
    create table discount (tx_hash bytea, event_index int, amount bigint, primary key (tx_hash, event_index));
"""
SOLD = make_blocks(
    [("Sold", {"buyer": "0xb0b", "price": 300})],
    [],
    [("Sold", {"buyer": buyer, "price": price}) for buyer, price in (("0xa1", 40), ("0xb0b", 500), ("0xa1", 7))],
)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "shop" / "sql").mkdir(parents=True)
    for text in [*blocks(README, "python"), *blocks(GUIDE, "python")]:
        if match := re.match(r"# (shop/\w+\.py)\n", text):
            (tmp_path / match[1]).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "shop"]:
        del sys.modules[name]


async def test_the_guides_hooks_keep_their_word(shop: None, connection: asyncpg.Connection) -> None:
    await connection.execute(TABLES)
    places = ["shop.hooks:sales", "shop.revenue:revenue", "shop.receipts:receipts"]
    hooks: list[Registered] = list(load_hooks(HooksSettings(enabled=places)))
    own = HookSettings.model_validate({"least_price": 300})
    hooks += load_hooks(HooksSettings(enabled=["shop.discounts:Discounts"], discounts=own))  # type: ignore[call-arg]
    await assert_undo_restores(connection, hooks, SOLD)
    await assert_set_equals_rows(connection, hooks, SOLD)
    await run_hooks(connection, hooks, SOLD)
    assert dict(await connection.fetch("select buyer, total from revenue")) == {"0xb0b": 800, "0xa1": 47}
    assert await connection.fetchval("select array_agg(amount order by amount) from discount") == [30, 50]
    assert (await verify(connection, tuple(hooks), "revenue", samples=3)).equal


def test_the_guides_other_examples(shop: None) -> None:
    job = locate("shop.receipts:receipt", "job")
    assert isinstance(job, JobType) and job.schedules[0].cron == "17 3 * * *"
    assert importlib.import_module("shop").MIGRATIONS[1].is_dir()
    for text in blocks(GUIDE, "python"):
        exec(compile(text, GUIDE.name, "exec"), {"__file__": __file__, "__name__": "example"})
