"""Texts for people who may look but need not know every secret: errors and tracebacks of the status page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import BaseModel, SecretStr

from indexer.config import shown_url

_MASK = "********"
# Shorter ones would make holes in words; a key that is worth having is longer.
_SHORTEST = 6
_SHORTEST_PART = 12

_ADDRESS = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s'\"<>`\\]+", re.IGNORECASE)
_NAMED = re.compile(
    r"(?P<name>\b[\w-]*(?:password|passwd|secret|token|api[_-]?key|authorization)\b[\"']?\s*[=:]\s*)"
    r"(?P<value>[\"'][^\"'\n]+[\"']|(?:bearer\s+)?[^\s\"',;&)\]}]{6,})",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_SIGNED = re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*")
_MAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
# what a hook's own setting may be called that holds a secret
_SECRET_NAME = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


class Redactor:
    """Takes out of a text what the settings call a secret, and what looks like one: addresses keep host and port."""

    def __init__(self, settings: BaseModel | None) -> None:
        found = {part for secret in _secrets(settings) for part in _parts(secret)}
        texts = sorted(found, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, texts))) if texts else None

    def __call__(self, text: str) -> str:
        text = _ADDRESS.sub(_host_only, text)
        if self._known is not None:
            text = self._known.sub(_MASK, text)
        text = _BEARER.sub(rf"\1 {_MASK}", text)
        text = _NAMED.sub(_named, text)
        return _MAIL.sub(_MASK, _SIGNED.sub(_MASK, text))


def _named(match: re.Match[str]) -> str:
    value = match["value"]
    # code names things too, and a traceback that lost its code is none: what is called or looked up is no secret
    if value[0] not in "\"'" and ("(" in value or "." in value) and not value.lower().startswith("bearer"):
        return match[0]
    return match["name"] + _MASK


def _host_only(match: re.Match[str]) -> str:
    try:
        shown = shown_url(match[0])
    except ValueError:
        return f"{match[0].partition('://')[0]}://…"
    return shown if match[0].rstrip("/.,;:)") == shown else f"{shown}/…"


def _secrets(value: Any, name: str = "") -> Iterator[str]:
    """Every SecretStr, and those of a hook's own settings whose name says that they hold one."""
    if isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, BaseModel):
        fields = {field: getattr(value, field) for field in type(value).model_fields}
        for inner, one in {**fields, **(value.model_extra or {})}.items():
            yield from _secrets(one, inner)
    elif isinstance(value, Mapping):
        for inner, one in value.items():
            yield from _secrets(one, str(inner))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _secrets(one, name)
    elif isinstance(value, str) and _SECRET_NAME.search(name) and not _is_public(name):
        yield value


def _is_public(name: str) -> bool:
    # where public keys are, which of a provider's fields is meant
    return name.endswith(("_url", "_field"))


def _parts(secret: str) -> Iterator[str]:
    """The secret itself; of an address what may be a key in it: its user, its path and its query."""
    if "://" not in secret:
        if len(secret) >= _SHORTEST:
            yield secret
        return
    try:
        parts = urlsplit(secret)
    except ValueError:
        return
    query = [value for _, value in parse_qsl(parts.query, keep_blank_values=True)]
    path = parts.path.split("/") if parts.scheme.startswith(("http", "ws")) else []  # a database's name is none
    texts = [parts.password or "", *path, *query, parts.fragment]
    for text in {*texts, *map(unquote, texts)}:
        if len(text) >= (_SHORTEST if text == parts.password else _SHORTEST_PART):
            yield text
