"""Hooks: the decorator that makes one, and "module:attribute" -> hooks, in the configured order."""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
from pydantic import BaseModel, ValidationError

from indexer.config import HookSettings, HooksSettings
from indexer.errors import ConfigError, HookLoadError, IndexerError
from indexer.model import Block, Derived, EventSpec, Hook
from indexer.transaction import Tx

Apply = Callable[[Tx, Sequence[Block]], Awaitable[None]]
MigrationLine = tuple[str, Path]


class FunctionHook(msgspec.Struct, frozen=True):
    """A hook made of a function by `@hook`."""

    name: str
    function: Apply
    listens: tuple[EventSpec, ...]
    tables: tuple[str, ...]
    after: tuple[str, ...]
    migrations: MigrationLine | None
    derived: tuple[Derived, ...] = ()
    kept: tuple[str, ...] = ()

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None:
        await self.function(tx, blocks)


def hook(
    name: str,
    *,
    listens: Sequence[str | EventSpec],
    tables: Sequence[str],
    after: Sequence[str] = (),
    migrations: MigrationLine | None = None,
    derived: Sequence[Derived] = (),
    kept: Sequence[str] = (),
) -> Callable[[Apply], FunctionHook]:
    """Make a hook of `async def f(tx, blocks)`.

    `listens`: names of the events wanted (an EventSpec also names arguments that must be there). `tables`: the tables
    written. `after`: hooks that must run before this one. `migrations`: a line of SQL files, ("name", folder).
    `derived` and `kept`: what `indexer rebuild` recomputes, and what it leaves as it is.
    """
    if any(isinstance(names, str) for names in (listens, tables, after, kept)):
        raise TypeError(f"@hook({name!r}): listens, tables, after and kept are lists of names, not one name")
    specs = tuple(EventSpec(spec) if isinstance(spec, str) else spec for spec in listens)
    return lambda function: FunctionHook(
        name, function, specs, tuple(tables), tuple(after), migrations, tuple(derived), tuple(kept)
    )


class Registered(msgspec.Struct, frozen=True):
    """A hook with what the operator decided for it."""

    hook: Hook
    policy: HookSettings

    @property
    def name(self) -> str:
        return self.hook.name

    @property
    def after(self) -> tuple[str, ...]:
        """The hooks that it comes after, whether it can't do without them or only minds their order."""
        return (*self.hook.after, *getattr(self.hook, "also_after", ()))


def load_hooks(settings: HooksSettings) -> tuple[Registered, ...]:
    """The enabled hooks, in order, made with their settings.

    Raises HookLoadError (with the hook's own traceback where it does not import) and ConfigError.
    """
    options = dict(settings.__pydantic_extra__)
    registered: list[Registered] = []
    for place in settings.enabled:
        thing = locate(place)
        name = getattr(thing, "name", None)
        if not isinstance(name, str):
            raise HookLoadError(f"hook {place} has no name: decorate a function with @hook(...), or write a class")
        policy = options.pop(name, None) or HookSettings()
        if any(name == other.name for other in registered):
            raise HookLoadError(f"two enabled hooks are called {name}: take one out of hooks.enabled")
        registered.append(Registered(_made(place, name, thing, policy), policy))
    if options:
        enabled = ", ".join(one.name for one in registered) or "none"
        raise ConfigError(f"hooks.{next(iter(options))}: no enabled hook has this name (enabled: {enabled})")
    _check_order(registered)
    return tuple(registered)


def locate(place: str, what: str = "hook") -> Any:
    """The thing at "module:attribute"; raises HookLoadError, which calls it `what`."""
    module_name, colon, attribute = place.partition(":")
    if not colon or not module_name or not attribute:
        raise HookLoadError(f'{what} "{place}" must be written as "module:attribute"')
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise HookLoadError(
                f"{what} {place}: there is no module {error.name}; is its package installed?"
            ) from None
        raise _raised(f"{what} {place} does not import", error) from error
    except Exception as error:
        raise _raised(f"{what} {place} does not import", error) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        hooks = [key for key, value in vars(module).items() if _looks_like_hook(value)]
        known = f" (it has {', '.join(sorted(hooks))})" if hooks else ""
        raise HookLoadError(f"{what} {place}: module {module_name} has no {attribute}{known}") from None


def _looks_like_hook(thing: Any) -> bool:
    # a class lacks what its constructor sets, so it is not asked for all that a hook has
    return isinstance(getattr(thing, "name", None), str) and callable(getattr(thing, "apply", None))


def _raised(what: str, error: Exception) -> HookLoadError:
    # our own frames and importlib's say nothing to the hook's author
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename != __file__
    ]
    details = "".join(["Traceback (most recent call last):\n", *traceback.format_list(frames)])
    details += "".join(traceback.format_exception_only(error))
    return HookLoadError(f"{what}: {type(error).__name__}: {error}", details)


def _made(place: str, name: str, thing: Any, policy: HookSettings) -> Hook:
    own: Mapping[str, Any] = policy.__pydantic_extra__ or {}
    model = getattr(thing, "Settings", None) if inspect.isclass(thing) else None
    if own and model is None:
        raise ConfigError(f"hooks.{name}.{next(iter(own))}: the hook {name} has no settings of its own")
    if inspect.isclass(thing):
        factory = cast("Callable[..., Any]", thing)
        arguments = () if model is None else (_own_settings(name, model, own),)
        try:
            thing = factory(*arguments)
        except IndexerError:
            raise
        except Exception as error:
            raise _raised(f"hook {place} can't be made", error) from error
    if not isinstance(thing, Hook):
        raise HookLoadError(f"hook {place} is not a hook: it needs name, listens, tables, after and apply(tx, blocks)")
    _check_lists(place, thing)
    return thing


def _own_settings(name: str, model: type[BaseModel], own: Mapping[str, Any]) -> BaseModel:
    """The hook's own settings; an unknown one is an error, unless the hook says that it takes any."""
    try:
        return model.model_validate(own, extra=model.model_config.get("extra") or "forbid")
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(["hooks", name, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(field.alias or key for key, field in model.model_fields.items()) or "none"
            raise ConfigError(f"{where}: the hook {name} has no such setting (its own: {known})") from None
        raise ConfigError(f"{where}: {first['msg']}") from None


def _check_lists(place: str, one: Hook) -> None:
    # a text is a sequence of texts as well: its letters would be taken for names
    for part, kind, wanted in (("listens", EventSpec, "EventSpec"), ("tables", str, "names"), ("after", str, "names")):
        value = getattr(one, part)
        if isinstance(value, str) or not all(isinstance(item, kind) for item in value):
            raise HookLoadError(f"hook {place}: {part} must be a list of {wanted}")


def _check_order(registered: Sequence[Registered]) -> None:
    seen: set[str] = set()
    names = {one.name for one in registered}
    for one in registered:
        for earlier in one.hook.after:
            if earlier not in names:
                raise ConfigError(f"hooks.enabled: {one.name} needs the hook {earlier}, which is not enabled")
        for earlier in one.after:
            if earlier in names and earlier not in seen:
                raise ConfigError(f"hooks.enabled: {one.name} must stand after {earlier}")
        seen.add(one.name)


def check_events(registered: Sequence[Registered], available: Mapping[str, frozenset[str]]) -> None:
    """Compare what the hooks listen to with the events (name -> argument names) that the source gives."""
    for one in registered:
        events = ", ".join(sorted(available)) or "none"
        for spec in one.hook.listens:
            if spec.name not in available:
                if spec.optional:
                    continue
                raise ConfigError(
                    f"hook {one.name} listens to the event {spec.name}, which no [[contracts]] has (there: {events})"
                )
            missing = [name for name in spec.args if name not in available[spec.name]]
            if missing:
                arguments = ", ".join(sorted(available[spec.name]))
                raise ConfigError(
                    f"hook {one.name} needs the argument {missing[0]} of {spec.name}, which has: {arguments}"
                )
        wanted = [spec.name for spec in one.hook.listens]
        if wanted and available.keys().isdisjoint(wanted):
            raise ConfigError(
                f"hook {one.name} listens to {' or '.join(wanted)}, of which the source has none (there: {events})"
            )


def migration_lines(registered: Sequence[Registered]) -> list[MigrationLine]:
    """The migration lines that the hooks bring, each once, in the order of the hooks."""
    lines: dict[str, Path] = {}
    for one in registered:
        line = getattr(one.hook, "migrations", None)
        if line is not None and lines.setdefault(*line) != line[1]:
            raise HookLoadError(
                f"the hook {one.name} calls its migrations {line[0]}, as another hook calls those of another folder: "
                "give them a name of their own"
            )
    return list(lines.items())
