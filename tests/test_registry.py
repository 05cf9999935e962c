"""From "module:attribute" to hooks, and everything that can be wrong with it, said in one line."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hooks.plays import Plays
from indexer import hook
from indexer.config import HookSettings, HooksSettings
from indexer.errors import ConfigError, HookLoadError
from indexer.model import Block, EventSpec, Hook
from indexer.registry import Registered, check_events, load_hooks, migration_lines
from indexer.transaction import Tx

Module = Callable[[str], str]
_numbers = itertools.count(1)

GOOD = """
from indexer import hook

@hook("{name}", listens=["Played"], tables=["t"], after={after})
async def {name}(tx, blocks):
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """Make a module of a text, to be imported by the name that comes back."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(text: str) -> str:
        name = f"someones_hooks_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        return name

    return make


def load(*enabled: str, **settings: dict[str, Any]) -> tuple[Registered, ...]:
    return load_hooks(HooksSettings(enabled=list(enabled), **settings))


def said(error: type[Exception], *enabled: str, **settings: dict[str, Any]) -> str:
    """What is said where these hooks can't be loaded: one line."""
    with pytest.raises(error) as raised:
        load(*enabled, **settings)
    text = str(raised.value)
    assert "\n" not in text
    return text


class TestFunctions:
    async def test_a_function_becomes_a_hook(self) -> None:
        calls = []

        @hook("mine", listens=["Played", EventSpec("Tipped", ("amount",))], tables=["t"], after=["plays"])
        async def mine(tx: Tx, blocks: Sequence[Block]) -> None:
            calls.append(blocks)

        assert isinstance(mine, Hook)
        assert (mine.name, mine.tables, mine.after, mine.migrations) == ("mine", ("t",), ("plays",), None)
        assert mine.listens == (EventSpec("Played"), EventSpec("Tipped", ("amount",)))
        await mine.apply(None, ["blocks"])  # type: ignore[arg-type]
        assert calls == [["blocks"]]

    def test_it_is_loaded_with_the_operators_policy(self, module: Module) -> None:
        place = module(GOOD.format(name="mine", after=()))
        [one] = load(f"{place}:mine", mine={"on_error": "skip", "retries": 3})
        assert (one.name, one.policy.on_error, one.policy.retries) == ("mine", "skip", 3)
        [one] = load(f"{place}:mine")
        assert (one.policy.on_error, one.policy.retries) == ("halt", 0)

    @pytest.mark.parametrize("part", ["listens", "tables", "after"])
    def test_one_name_is_no_list(self, part: str) -> None:
        lists = {"listens": ["Played"], "tables": ["t"], "after": ["plays"], part: "abc"}
        with pytest.raises(TypeError, match="lists of names, not one name"):
            hook("mine", **lists)  # type: ignore[arg-type]


CLASS = """
from pydantic import BaseModel
from indexer import EventSpec

class Tips:
    name = "tips"
    listens = ({listens},)
    tables = ("tips",)
    after = ()

    class Settings(BaseModel):
        least: int = 1
        {more}

    def __init__(self, settings):
        self.settings = settings

    async def apply(self, tx, blocks):
        pass
"""


class TestClasses:
    def test_a_class_is_made_with_its_settings(self) -> None:
        [one] = load("hooks.plays:Plays", plays={"track_id": "song", "retries": 1})
        assert isinstance(one.hook, Plays)
        assert one.hook.fields.track_id == "song"
        assert one.policy.retries == 1
        [other] = load("hooks.plays:plays")
        assert other.hook is not one.hook
        assert other.hook.fields.track_id == "trackId"

    def test_a_text_from_the_environment_is_converted(self, module: Module) -> None:
        place = module(CLASS.format(listens='EventSpec("Tipped")', more=""))
        [one] = load(f"{place}:Tips", tips={"least": "7"})
        assert one.hook.settings.least == 7

    def test_a_class_without_settings(self) -> None:
        _, one = load("hooks.plays:plays", "hooks.aggregates:aggregates")
        assert one.name == "aggregates"
        assert isinstance(one.hook, Hook)

    def test_a_setting_that_it_lacks(self, module: Module) -> None:
        """Though the author's model did not ask for it: a slip of the pen is not to pass for a setting."""
        place = module(CLASS.format(listens='EventSpec("Tipped")', more=""))
        text = said(ConfigError, f"{place}:Tips", tips={"lest": 7})
        assert text == "hooks.tips.lest: the hook tips has no such setting (its own: least)"
        text = said(ConfigError, "hooks.plays:plays", plays={"song": "x"})
        assert text.startswith("hooks.plays.song: the hook plays has no such setting (its own: event, track_id, ")

    def test_a_model_may_take_any_setting(self, module: Module) -> None:
        place = module(CLASS.format(listens='EventSpec("Tipped")', more='model_config = {"extra": "allow"}'))
        [one] = load(f"{place}:Tips", tips={"lest": 7})
        assert one.hook.settings.lest == 7

    def test_a_setting_of_the_wrong_type(self, module: Module) -> None:
        place = module(CLASS.format(listens='EventSpec("Tipped")', more="inner: dict[str, int] = {}"))
        text = said(ConfigError, f"{place}:Tips", tips={"least": "many"})
        assert text.startswith("hooks.tips.least: Input should be a valid integer")
        text = said(ConfigError, f"{place}:Tips", tips={"inner": {"deep": "many"}})
        assert text.startswith("hooks.tips.inner.deep: Input should be a valid integer")

    def test_a_setting_for_a_hook_that_has_none(self, module: Module) -> None:
        place = module(GOOD.format(name="mine", after=()))
        text = said(ConfigError, f"{place}:mine", mine={"x": 1})
        assert text == "hooks.mine.x: the hook mine has no settings of its own"
        text = said(ConfigError, "hooks.plays:plays", "hooks.aggregates:aggregates", aggregates={"x": 1})
        assert text == "hooks.aggregates.x: the hook aggregates has no settings of its own"

    def test_a_constructor_that_raises(self, module: Module) -> None:
        place = module(
            """
            class Broken:
                name, listens, tables, after = "broken", (), (), ()
                def __init__(self):
                    self.limit = {}["limit"]
                async def apply(self, tx, blocks): ...
            """
        )
        with pytest.raises(HookLoadError, match=f"hook {place}:Broken can't be made: KeyError: 'limit'") as raised:
            load(f"{place}:Broken")
        assert 'self.limit = {}["limit"]' in raised.value.details
        assert "registry.py" not in raised.value.details

    def test_a_constructor_may_refuse_a_setting(self, module: Module) -> None:
        place = module(
            """
            from indexer.errors import ConfigError
            class Fussy:
                name, listens, tables, after = "fussy", (), (), ()
                def __init__(self):
                    raise ConfigError("hooks.fussy.api: name one of two")
                async def apply(self, tx, blocks): ...
            """
        )
        assert said(ConfigError, f"{place}:Fussy") == "hooks.fussy.api: name one of two"


class TestWhatIsNotThere:
    @pytest.mark.parametrize("place", ["", ":", "hooks.plays", "hooks.plays:", ":plays", "hooks/plays.py"])
    def test_not_module_and_attribute(self, place: str) -> None:
        assert said(HookLoadError, place) == f'hook "{place}" must be written as "module:attribute"'

    def test_no_such_module(self) -> None:
        text = said(HookLoadError, "nobodys_package.hooks:x")
        assert text == "hook nobodys_package.hooks:x: there is no module nobodys_package; is its package installed?"
        text = said(HookLoadError, "hooks.nothing:x")
        assert text == "hook hooks.nothing:x: there is no module hooks.nothing; is its package installed?"
        text = said(HookLoadError, "hooks.plays.deeper:x")
        assert text == "hook hooks.plays.deeper:x: there is no module hooks.plays.deeper; is its package installed?"

    def test_a_missing_attribute_with_those_that_are_there(self, module: Module) -> None:
        text = said(HookLoadError, "hooks.plays:play")
        assert text == "hook hooks.plays:play: module hooks.plays has no play (it has Plays, plays)"
        place = module(GOOD.format(name="one", after=()) + GOOD.format(name="two", after=()))
        text = said(HookLoadError, f"{place}:three")
        assert text == f"hook {place}:three: module {place} has no three (it has one, two)"
        assert said(HookLoadError, "json:x") == "hook json:x: module json has no x"

    def test_an_import_that_fails_inside_the_module(self, module: Module) -> None:
        """What is missing there is not the hook's module, and the author wants to see the line."""
        inner = module("import nobodys_package")
        outer = module(f"VALUE = 1\nimport {inner}")
        with pytest.raises(HookLoadError) as raised:
            load(f"{outer}:x")
        assert str(raised.value) == (
            f"hook {outer}:x does not import: ModuleNotFoundError: No module named 'nobodys_package'"
        )
        lines = raised.value.details.splitlines()
        assert lines[0] == "Traceback (most recent call last):"
        files = [line for line in lines if line.startswith("  File ")]
        assert [Path(line.split('"')[1]).stem for line in files] == [outer, inner]
        assert lines[-2:] == ["    import nobodys_package", "ModuleNotFoundError: No module named 'nobodys_package'"]

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("def f(:", "SyntaxError"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("import os.nope", "ModuleNotFound"),
        ],
    )
    def test_a_module_that_raises(self, module: Module, text: str, error: str) -> None:
        place = module(text)
        with pytest.raises(HookLoadError, match=f"hook {place}:x does not import: {error}") as raised:
            load(f"{place}:x")
        assert text in raised.value.details

    @pytest.mark.parametrize("text", ["async def x(tx, blocks): ...", "x = 7", "class x:\n    name = 7"])
    def test_something_without_a_name(self, module: Module, text: str) -> None:
        place = module(text)
        text = said(HookLoadError, f"{place}:x")
        assert text == f"hook {place}:x has no name: decorate a function with @hook(...), or write a class"

    def test_something_that_lacks_a_part(self, module: Module) -> None:
        place = module("class x:\n    name, listens, tables = 'x', (), ()\n    async def apply(self, tx, blocks): ...")
        text = said(HookLoadError, f"{place}:x")
        assert text == f"hook {place}:x is not a hook: it needs name, listens, tables, after and apply(tx, blocks)"

    @pytest.mark.parametrize("listens", ['"Tipped"', "7", "EventSpec"])
    def test_listens_must_be_specs(self, module: Module, listens: str) -> None:
        place = module(CLASS.format(listens=listens, more=""))
        assert said(HookLoadError, f"{place}:Tips") == f"hook {place}:Tips: listens must be a list of EventSpec"

    def test_tables_must_be_a_list(self, module: Module) -> None:
        text = CLASS.format(listens='EventSpec("Tipped")', more="").replace('tables = ("tips",)', 'tables = ("tips")')
        place = module(text)
        assert said(HookLoadError, f"{place}:Tips") == f"hook {place}:Tips: tables must be a list of names"


class TestTogether:
    def test_two_of_one_name(self) -> None:
        text = said(HookLoadError, "hooks.plays:plays", "hooks.plays:Plays")
        assert text == "two enabled hooks are called plays: take one out of hooks.enabled"

    def test_the_order_is_that_of_the_settings(self, module: Module) -> None:
        place = module(GOOD.format(name="a", after=["b"]) + GOOD.format(name="b", after=[]))
        assert [one.name for one in load(f"{place}:b", f"{place}:a")] == ["b", "a"]
        assert said(ConfigError, f"{place}:a", f"{place}:b") == "hooks.enabled: a must stand after b"
        assert said(ConfigError, f"{place}:a") == "hooks.enabled: a needs the hook b, which is not enabled"

    def test_the_bundled_hooks_know_their_order(self) -> None:
        places = [f"hooks.{name}:{name}" for name in ("plays", "aggregates", "milestones")]
        assert [one.name for one in load(*places)] == ["plays", "aggregates", "milestones"]
        for order in itertools.permutations(places):
            if list(order) != places:
                assert "must stand after" in said(ConfigError, *order)

    def test_settings_of_a_hook_that_is_not_enabled(self) -> None:
        text = said(ConfigError, "hooks.plays:plays", plai={"retries": 1})
        assert text == "hooks.plai: no enabled hook has this name (enabled: plays)"
        assert said(ConfigError, plays={}) == "hooks.plays: no enabled hook has this name (enabled: none)"

    def test_none_is_fine(self) -> None:
        assert load() == ()


class TestEvents:
    AVAILABLE = {"Played": frozenset({"trackId", "userId"}), "Tipped": frozenset({"amount"})}  # noqa: RUF012

    def check(self, *specs: str | EventSpec) -> None:
        async def apply(tx: Tx, blocks: Sequence[Block]) -> None: ...

        one = hook("mine", listens=specs, tables=[])(apply)
        check_events([Registered(one, HookSettings())], self.AVAILABLE)

    def test_what_is_there(self) -> None:
        self.check("Played", EventSpec("Tipped", ("amount",)), EventSpec("Played", ("userId", "trackId")))

    def test_no_such_event(self) -> None:
        with pytest.raises(ConfigError) as raised:
            self.check("Played", "Liked")
        assert str(raised.value) == (
            "hook mine listens to the event Liked, which no [[contracts]] has (there: Played, Tipped)"
        )

    def test_no_such_argument(self) -> None:
        with pytest.raises(ConfigError) as raised:
            self.check(EventSpec("Played", ("trackId", "song")))
        assert str(raised.value) == "hook mine needs the argument song of Played, which has: trackId, userId"


class TestMigrationLines:
    def made(self, name: str, line: tuple[str, Path] | None) -> Registered:
        async def apply(tx: Tx, blocks: Sequence[Block]) -> None: ...

        return Registered(hook(name, listens=[], tables=[], migrations=line)(apply), HookSettings())

    def test_each_line_once_in_the_order_of_the_hooks(self) -> None:
        b, a = ("b", Path("one")), ("a", Path("two"))
        hooks = [self.made("1", b), self.made("2", None), self.made("3", a), self.made("4", ("b", Path("one")))]
        assert migration_lines(hooks) == [b, a]

    def test_the_bundled_hooks_share_one(self) -> None:
        [(name, folder)] = migration_lines(load("hooks.plays:plays", "hooks.aggregates:aggregates"))
        assert name == "plays"
        assert (folder / "0001_plays.sql").is_file()

    def test_one_name_for_two_folders(self) -> None:
        hooks = [self.made("one", ("tables", Path("one"))), self.made("two", ("tables", Path("two")))]
        with pytest.raises(HookLoadError, match="hook two calls its migrations tables, as another hook calls those of"):
            migration_lines(hooks)
