"""Says in one line what is wrong with the settings: which, what, the value unless it may be secret, and where from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from pydantic import ValidationError

from indexer.config import HooksSettings
from indexer.settings_fields import (
    SettingPath,
    children,
    field_at,
    is_container,
    is_secret,
    known_paths,
    model_at,
    section_of,
    shown_value,
    written,
)

_PHRASES = {
    "missing": "is required",
    "model_type": "must be a table",
    "model_attributes_type": "must be a table",
    "dict_type": "must be a table",
    "list_type": "must be a list",
}


class Problem(NamedTuple):
    """One thing that is wrong; `value` is a text that may be shown, or None."""

    path: SettingPath
    what: str
    origin: str
    value: str | None = None

    def __str__(self) -> str:
        got = f", got {self.value}" if self.value is not None else ""
        return f"{written(self.path)} {self.what}{got} ({self.origin})"


def one_line(problems: Sequence[Problem]) -> str:
    """The first problem and how many more there are."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{problems[0]}{more}".split())


def problems_of(
    error: ValidationError, values: Mapping[str, Any], origin: Callable[[SettingPath], str]
) -> list[Problem]:
    """What pydantic found, once a setting; unknown names first, since a slip also makes its setting missing."""
    unknown: dict[SettingPath, Problem] = {}
    wrong: dict[SettingPath, Problem] = {}
    for detail in error.errors(include_url=False):
        path = _place(detail["loc"], values)
        kind = detail["type"]
        if kind == "extra_forbidden" or (kind == "model_type" and field_at(path) is None):
            unknown.setdefault(path, Problem(path, f"is no setting{_near(path, origin(path))}", origin(path)))
        else:
            what = _PHRASES.get(kind) or _phrase(detail["msg"])
            wrong.setdefault(path, Problem(path, what, origin(path), _value(path, kind, detail["input"], origin(path))))
    return [*unknown.values(), *wrong.values()]


def _place(location: tuple[int | str, ...], values: Any) -> SettingPath:
    """The setting's path in what was given: pydantic also names the members of unions on the way."""
    path: list[str | int] = []
    for part in location:
        if isinstance(values, Mapping) and isinstance(part, str):
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _phrase(message: str) -> str:
    """pydantic's words in ours; none of its messages that our fields can cause quotes the value."""
    message = re.sub(r"^(Input|String|List|Value) should", "must", message.removeprefix("Value error, "))
    return re.split(r", unable| after validation", message)[0]


def _value(path: SettingPath, kind: str, value: Any, origin: str) -> str | None:
    field = field_at(path)
    if kind == "missing" or field is None or is_secret(path) or origin.startswith("secret file"):
        return None
    # Where a table or a list belongs anything may stand, such as a database's address for [database].
    if section_of(field.annotation) or (is_container(field.annotation) and not isinstance(path[-1], int)):
        return None
    return shown_value(value)


def _near(path: SettingPath, origin: str) -> str:
    """The name that was probably meant."""
    name, model = str(path[-1]), model_at(path[:-1])
    near = get_close_matches(name, children(model), 1, cutoff=0.6) if model is not None else []
    if len(path) == 1:
        # A section's name is missing or only one underscore follows it: pool_size at the top, INDEXER_HTTP_PORT.
        whole = [text for text, _ in known_paths() if text.count(".") == 1 and "[" not in text]
        by_name = {text.partition(".")[2]: text for text in reversed(whole)}
        last = [by_name[text] for text in get_close_matches(name, by_name, 1, cutoff=0.9)]
        near = get_close_matches(name, whole, 1, cutoff=0.8) or near or last
    if not near:
        return "" if model is not HooksSettings else "; a hook's settings are a table"
    if origin.startswith("environment") and len(path) == 1:
        return f", did you mean INDEXER_{near[0].replace('.', '__').upper()}?"
    return f", did you mean {near[0]}?"
