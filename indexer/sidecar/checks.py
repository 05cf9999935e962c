"""What callers send, checked by pydantic: the field is named in words of ours, and nothing that was sent is quoted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from indexer.settings_fields import bare, section_of
from indexer.sidecar.routes import Invalid, Model, Refused

# A name that nobody knows comes from the caller as well: only what looks like a name is repeated.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")
_NUL = "\0"

_PHRASES: dict[str, str] = {
    "missing": "is missing",
    "string_type": "must be a text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "string_pattern_mismatch": "does not have the right form",
    "extra_forbidden": "is not known",
    "finite_number": "must be a finite number",
    "none_required": "must be null",
}
_FAMILIES: dict[str, str] = {
    "uuid": "must be a UUID",
    "int": "must be a whole number",
    "float": "must be a number",
    "decimal": "must be a number",
    "datetime": "must be a time as 2024-01-31T00:00:00Z",
    "timezone": "must be a time with its zone",
    "date": "must be a date as 2024-01-31",
    "url": "must be an address",
}
_LIMITS: dict[str, tuple[str, str]] = {
    "greater_than_equal": ("must be at least {}", "ge"),
    "greater_than": ("must be more than {}", "gt"),
    "less_than_equal": ("must be at most {}", "le"),
    "less_than": ("must be less than {}", "lt"),
    "too_short": ("must have at least {} entries", "min_length"),
    "too_long": ("must have at most {} entries", "max_length"),
    "string_too_short": ("must have at least {} characters", "min_length"),
    "string_too_long": ("must have at most {} characters", "max_length"),
}


def body(model: Model, raw: bytes) -> BaseModel:
    """A JSON body as its model; raises Refused(400)."""
    if b"\\u0000" in raw and _holds_nul(raw):
        raise Refused(400, "the body holds a NUL character, which Postgres can't keep")
    return _checked(model, lambda: model.model_validate_json(raw))


def form(model: Model, raw: bytes) -> BaseModel:
    """What a page's form sends (application/x-www-form-urlencoded) as its model; raises Refused(400)."""
    try:
        pairs = parse_qsl(raw.decode(), keep_blank_values=True, strict_parsing=bool(raw), max_num_fields=100)
    except ValueError:
        raise Refused(400, "the body is not that of a form") from None
    return query(model, pairs)


def query(model: Model, pairs: Iterable[tuple[str, str]]) -> BaseModel:
    """The parameters of an address as their model; raises Refused(400), also where a single one comes twice."""
    lists = {field.alias or name for name, field in model.model_fields.items() if _is_list(field)}
    values: dict[str, Any] = {}
    for name, value in pairs:
        if _NUL in value:
            raise Refused(400, f"{_named(name)} holds a NUL character")
        if name in lists:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise Refused(400, f"{_named(name)} is given twice")
        else:
            values[name] = value
    return _checked(model, lambda: model.model_validate(values))


def path(model: Model, values: Mapping[str, str]) -> BaseModel:
    """The variable parts of a path as their model; raises Refused(400)."""
    return query(model, values.items())


def _checked(model: Model, validate: Callable[[], BaseModel]) -> BaseModel:
    try:
        return validate()
    except ValidationError as error:
        raise Refused(400, explain(model, error)) from None


def explain(model: Model, error: ValidationError) -> str:
    """The first thing that is wrong; unknown names last, since what was meant by them is missing elsewhere."""
    found = error.errors(include_url=False, include_input=False)
    detail = min(found, key=lambda one: one["type"] == "extra_forbidden")
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "json_invalid":
        return "the body is not JSON"
    if isinstance(context.get("error"), Invalid):
        return str(context["error"])
    field = _field(model, detail["loc"])
    where = ".".join(_named(part) for part in detail["loc"] if isinstance(part, int) or _NAME.fullmatch(part))
    where = where.replace(".[", "[") or ("the body" if not detail["loc"] else "a field")
    return f"{where} {_phrase(kind, context, field)}"


def _phrase(kind: str, context: Mapping[str, Any], field: FieldInfo | None) -> str:
    choices = get_args(bare(field.annotation)) if field and get_origin(bare(field.annotation)) is Literal else ()
    if choices and kind in ("missing", "literal_error"):
        return f"must be {_either(map(str, choices))}"
    if kind in ("literal_error", "enum"):
        return f"must be {str(context.get('expected', 'another')).replace(chr(39), '')}"
    if kind in _PHRASES:
        return _PHRASES[kind]
    if kind in _LIMITS:
        text, name = _LIMITS[kind]
        return text.format(context[name])
    return _FAMILIES.get(kind.partition("_")[0], "is not valid")


def _either(choices: Iterable[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def _field(model: Model | None, location: tuple[int | str, ...]) -> FieldInfo | None:
    """The field at which pydantic found something wrong; None within lists of plain values and unions."""
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, int):
            continue
        names = {one.alias or name: one for name, one in model.model_fields.items()} if model else {}
        field = names.get(part)
        if field is None:
            return None
        model = section_of(field.annotation)
    return field


def _named(part: int | str) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    return part if _NAME.fullmatch(part) else "a parameter"


def _is_list(field: FieldInfo) -> bool:
    return get_origin(bare(field.annotation)) in (list, tuple)


def _holds_nul(raw: bytes) -> bool:
    """Whether a text in the JSON has a NUL, and not just a backslash before u0000."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return False  # for the model to say
    waiting = [found]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and _NUL in one:
            return True
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list):
            waiting += one
    return False
