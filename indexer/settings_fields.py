"""The tree of settings: which field a path leads to, how paths are written, and which values must never be shown."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from indexer.config import HookSettings, HooksSettings, Settings

MASK = "********"
SettingPath = tuple[str | int, ...]
"""A setting's place, `("chain", "endpoints", 0, "url")`; written it is `chain.endpoints[0].url`."""

_SECRET_NAME = re.compile(r"url|dsn|key|token|secret|passw|credential|(?:^|_)ws(?:_|$)", re.IGNORECASE)
_MOST_SHOWN = 60


def children(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section by the names under which they are written."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def bare(annotation: Any) -> Any:
    """A type without Annotated and without `| None`."""
    if get_origin(annotation) is Annotated:
        return bare(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return bare(members[0]) if len(members) == 1 else annotation
    return annotation


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, or holds a list of."""
    kind = bare(annotation)
    if get_origin(kind) is list:
        kind = bare(get_args(kind)[0])
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def holds(annotation: Any, wanted: type) -> bool:
    """Whether a type, or a part of it, is the wanted one."""
    return annotation is wanted or any(holds(part, wanted) for part in get_args(annotation))


def is_container(annotation: Any) -> bool:
    """Whether a field's value is a list or a table, which an environment variable writes as JSON."""
    kind = bare(annotation)
    return section_of(kind) is not None or get_origin(kind) in (list, dict)


def model_at(path: SettingPath) -> type[BaseModel] | None:
    """The section that a path leads to; list positions are stepped over."""
    model: type[BaseModel] | None = Settings
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        field, other = children(model).get(part), HookSettings if model is HooksSettings else None
        model = section_of(field.annotation) if field is not None else other
    return model


def field_at(path: SettingPath) -> FieldInfo | None:
    """The field that a path leads to, or None: a hook's own setting, a hook's table, or nothing that we know."""
    names = [part for part in path if isinstance(part, str)]
    model = model_at(tuple(names[:-1])) if names else None
    return children(model).get(names[-1]) if model is not None else None


def known_paths(model: type[BaseModel] = Settings, above: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its field, in order: `chain.name`, `chain.endpoints[].url`, `hooks.NAME.on_error`."""
    for name, field in children(model).items():
        section = section_of(field.annotation)
        if section is None:
            yield above + name, field
        else:
            many = "[]" if get_origin(bare(field.annotation)) is list else ""
            yield from known_paths(section, f"{above}{name}{many}.")
    if model is HooksSettings:
        yield from known_paths(HookSettings, f"{above}NAME.")


def written(path: SettingPath) -> str:
    """`chain.endpoints[0].url`. A name that cannot be a setting's is not repeated: it may be a misplaced secret."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if re.fullmatch(r"[\w-]{1,64}", part) else ".(unreadable name)"
    return text.removeprefix(".")


def parsed(text: str) -> SettingPath:
    """The path that `written` wrote."""
    return tuple(int(number) if number else name for number, name in re.findall(r"\[(\d+)\]|([^.\[\]]+)", text))


def is_secret(path: SettingPath) -> bool:
    """Whether the value must not be shown: by its type, or since a name on the way to it sounds like a secret."""
    field = field_at(path)
    if field is not None and holds(field.annotation, SecretStr):
        return True
    names = [part for part in path if isinstance(part, str)]
    # A section's and a hook's name are no hint: the settings of a hook called token_balances are not secret.
    below = names[2:] if names[:1] == ["hooks"] and len(names) > 2 else names[1:]
    return any(_SECRET_NAME.search(name) for name in below)


def shown_value(value: Any) -> str | None:
    """A plain value as an error or the report may show it, or None: an address anywhere may hold a password."""
    if not isinstance(value, (str, int, float, bool, Path)):
        return None
    text = str(value)
    if "://" in text or "@" in text:
        return None
    text = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return ascii(text) if isinstance(value, str) else text
