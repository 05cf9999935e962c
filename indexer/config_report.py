"""What `indexer config` shows: every setting in force, where it came from and what it is for; secrets are masked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import BaseModel, SecretStr
from rich.table import Table
from rich.text import Text

from indexer.config import EndpointSettings, HookSettings, shown_url
from indexer.settings_fields import MASK, SettingPath, children, field_at, is_secret, written
from indexer.settings_sources import Loaded

_OWN = "the hook's own setting"


class _Row(NamedTuple):
    path: str
    value: Any
    origin: str
    description: str


def effective(loaded: Loaded) -> list[tuple[str, str, str, str]]:
    """Every setting in force: its path, its value as text, its origin, its description. Secrets are masked."""
    return [(row.path, _text(row.value), row.origin, row.description) for row in _rows(loaded)]


def as_json(loaded: Loaded) -> list[dict[str, Any]]:
    """The same for `--json`; numbers, lists and nulls keep their type."""
    names = {"path": "setting", "value": "value", "origin": "origin", "description": "description"}
    return [{names[name]: value for name, value in row._asdict().items()} for row in _rows(loaded)]


def render(loaded: Loaded) -> Table:
    """The same for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("setting", "value", "from", "meaning"):
        table.add_column(header, overflow="fold")
    for path, value, origin, description in effective(loaded):
        # Text, since rich would take [..] in a value for markup.
        dim = "dim" if origin == "default" else ""
        table.add_row(Text(path), Text(value, dim), Text(origin, dim), Text(description, "dim"))
    return table


def _rows(loaded: Loaded) -> Iterator[_Row]:
    for path, value, is_given in _leaves(loaded.settings, ()):
        field = field_at(path)
        description = (field.description or "") if field is not None else _OWN
        # The list's origin is not that of what its items leave out.
        yield _Row(written(path), value, loaded.origin(written(path)) if is_given else "default", description)


def _leaves(model: BaseModel, path: SettingPath) -> Iterator[tuple[SettingPath, Any, bool]]:
    attributes = {field.alias or name: name for name, field in type(model).model_fields.items()}
    for name in children(type(model)):
        inner, value = (*path, name), getattr(model, attributes[name])
        if isinstance(value, BaseModel):
            yield from _leaves(value, inner)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for position, item in enumerate(value):
                yield from _leaves(item, (*inner, position))
        else:
            yield inner, _shown(model, inner, value), attributes[name] in model.model_fields_set
    for name, value in (model.model_extra or {}).items():
        inner = (*path, name)
        if isinstance(value, HookSettings):
            yield from _leaves(value, inner)
        else:
            yield inner, _shown(model, inner, value), True


def _shown(model: BaseModel, path: SettingPath, value: Any) -> Any:
    """The value as JSON can hold it, masked where it is secret."""
    if value is None:
        return None
    if isinstance(value, SecretStr):
        return shown_url(value.get_secret_value()) if isinstance(model, EndpointSettings) else MASK
    if isinstance(value, dict):
        return {str(name): _shown(model, (*path, str(name)), inner) for name, inner in value.items()}
    if is_secret(path):
        return MASK
    if isinstance(value, list):
        return [_shown(model, (*path, position), inner) for position, inner in enumerate(value)]
    if isinstance(value, (bool, int, float)):
        return value
    # A hook's own address may hold a password or a key, whatever it is called.
    return MASK if "://" in str(value) else str(value)


def _text(value: Any) -> str:
    if isinstance(value, str) and value.isprintable():
        return value
    return "" if value is None else json.dumps(value)
