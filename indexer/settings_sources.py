"""Reads the settings: command line over environment over secret files over TOML file over defaults.

pydantic-settings has sources for these too. They drop variables that they don't know, can't say which one set a value
and put the value into their errors; so each source here is flattened to (path, value, origin) and laid on the others.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import ValidationError

from indexer.config import Settings
from indexer.errors import ConfigError
from indexer.settings_errors import Problem, one_line, problems_of
from indexer.settings_fields import SettingPath, bare, field_at, holds, is_container, parsed

PREFIX = "INDEXER_"
DEFAULT_FILE = "indexer.toml"
OTHER_VARIABLES = frozenset({"INDEXER_CONFIG", "INDEXER_SECRETS_DIR"})
"""Variables with our prefix that are no settings."""

# Kubernetes puts such variables into every pod beside a service called indexer or indexer-something.
_KUBERNETES = re.compile(r"INDEXER_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")


class Given(NamedTuple):
    """One value that a source gave."""

    path: tuple[str, ...]
    value: Any
    origin: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings and where each of them came from."""

    settings: Settings
    _origins: Mapping[tuple[str, ...], str] = field(repr=False)

    def origin(self, path: str) -> str:
        """Where a setting came from: `origin("database.pool_size")` is "default", "file indexer.toml", ...

        A list comes from one place with all that is in it; a section may come from several, joined by commas.
        """
        return _origin_of(self._origins, parsed(path))


def load_settings(
    config: Path | None = None,
    secrets: Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read all sources once.

    `overrides` is what the command line says, nested or with dotted names; None means that it says nothing. Raises
    ConfigError, one line that never holds a secret.
    """
    problems: list[Problem] = []
    layers = [
        _from_file(config, environ),
        _from_names(_secret_files(secrets, environ), problems),
        _from_names(_variables(environ), problems),
        _from_overrides(overrides or {}, problems),
    ]
    if problems:
        raise ConfigError(one_line(problems))
    given = _laid_over(item for layer in layers for item in layer)
    origins = {path: item.origin for path, item in given.items()}
    values = _nested(given)
    invalid: ValidationError | None = None
    try:
        return Loaded(Settings(**values), origins)
    except ValidationError as error:
        invalid = error
    # Raised out here, so that the error which holds the values is not its context and shows up in no traceback.
    raise ConfigError(one_line(problems_of(invalid, values, lambda path: _origin_of(origins, path))))


def _laid_over(items: Iterable[Given]) -> dict[tuple[str, ...], Given]:
    """The values that count, later ones over earlier ones; a list replaces the list as a whole."""
    result: dict[tuple[str, ...], Given] = {}
    for item in items:
        size = len(item.path)
        below = [path for path in result if path[:size] == item.path]
        if item.value == {} and below:
            continue
        above = [item.path[:end] for end in range(1, size)]
        for path in (*below, *above):
            result.pop(path, None)
        result[item.path] = item
    return result


def _nested(given: Mapping[tuple[str, ...], Given]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, item in given.items():
        table = result
        for part in path[:-1]:
            table = table.setdefault(part, {})
        table[path[-1]] = item.value
    return result


def _origin_of(origins: Mapping[tuple[str, ...], str], path: SettingPath) -> str:
    names = tuple(part for part in path if isinstance(part, str))
    for end in range(len(names), 0, -1):
        if names[:end] in origins:
            return origins[names[:end]]
    below = [origin for other, origin in origins.items() if other[: len(names)] == names]
    return ", ".join(dict.fromkeys(below)) or "default"


def _flat(value: Any, origin: str, path: tuple[str, ...] = ()) -> Iterator[Given]:
    if isinstance(value, Mapping) and (value or not path):
        for name, inner in value.items():
            yield from _flat(inner, origin, (*path, str(name)))
    else:
        yield Given(path, value, origin)


def _from_file(config: Path | None, environ: Mapping[str, str]) -> list[Given]:
    named = config or environ.get("INDEXER_CONFIG")
    path = Path(named or DEFAULT_FILE)
    if not named and not path.is_file():
        return []
    folder = path.absolute().parent
    given = _flat(_toml(path), f"file {path}")
    return [item._replace(value=_anchored(item.path, item.value, folder)) for item in given]


def _toml(path: Path) -> dict[str, Any]:
    text = _text(path, "file")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        what = str(error)
    at = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", what)
    line, column = (at[1], at[2]) if at and at[1] else (text.count("\n") + 1, len(text) - text.rfind("\n"))
    # The parser quotes single characters and the names of tables; a name may be a misplaced secret.
    phrase = re.sub(r"\('.*'.*\)", "a table", what[: at.start()] if at else what)
    raise ConfigError(f"file {path}, line {line}, column {column}: {phrase}")


def _text(path: Path, kind: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        what = "there is no such file"
    except OSError as error:
        what = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        what = "is not UTF-8"
    raise ConfigError(f"{kind} {path}: {what}")


def _anchored(path: SettingPath, value: Any, folder: Path) -> Any:
    """The value with file names in it taken relative to the folder of the settings' file."""
    if isinstance(value, Mapping):
        return {name: _anchored((*path, name), inner, folder) for name, inner in value.items()}
    if isinstance(value, list):
        return [_anchored((*path, position), inner, folder) for position, inner in enumerate(value)]
    place = field_at(path)
    # A position at the end is an item of a list: a signature, where `abi` could have been a file.
    if isinstance(value, str) and place is not None and isinstance(path[-1], str) and holds(place.annotation, Path):
        return str(folder / Path(value).expanduser()) if value else value
    return value


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for name, value in environ.items():
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES or _is_kubernetes(name, value):
            continue
        yield name, value, f"environment {name}"


def _is_kubernetes(name: str, value: str) -> bool:
    if "__" in name:
        return False
    return bool(_KUBERNETES.fullmatch(name) or (name.endswith("_PORT") and _KUBERNETES_PORT.match(value)))


def _secret_files(secrets: Path | None, environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    explicit = secrets or environ.get("INDEXER_SECRETS_DIR")
    named = explicit or environ.get("CREDENTIALS_DIRECTORY")
    if not named:
        return
    folder = Path(named)
    if not folder.is_dir():
        if explicit:
            raise ConfigError(f"secrets folder {folder}: there is no such folder")
        return
    for file in sorted(_listed(folder)):
        # Kubernetes keeps ..data and folders beside the links to the secrets.
        if file.name.startswith(".") or file.is_dir() or (not explicit and "__" not in file.name):
            continue
        yield file.name, _text(file, "secret file").rstrip("\r\n"), f"secret file {file.name}"


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        what = error.strerror or type(error).__name__
    raise ConfigError(f"secrets folder {folder}: {what}")


def _from_names(named: Iterable[tuple[str, str, str]], problems: list[Problem]) -> list[Given]:
    """Settings from names like INDEXER_DATABASE__URL or database__url."""
    found: dict[tuple[str, ...], str] = {}
    given: list[Given] = []
    # By depth: a whole table as JSON first, then what is said about one of its settings.
    for name, text, origin in sorted(named, key=lambda item: item[0].count("__")):
        bare_name = name.lower().removeprefix(PREFIX.lower())
        path = tuple(bare_name.split("__"))
        if path in found:
            problems.append(Problem(path, "is given twice", f"{found[path]} and {origin}"))
            continue
        found[path] = origin
        given += _decoded(path, text, origin, problems)
    return given


def _from_overrides(overrides: Mapping[str, Any], problems: list[Problem]) -> list[Given]:
    given: list[Given] = []
    for path, value, origin in _flat(overrides, "command line"):
        names = tuple(part for name in path for part in name.split("."))
        if isinstance(value, str):
            given += _decoded(names, value, origin, problems)
        elif value is not None:
            given.append(Given(names, list(value) if isinstance(value, tuple) else value, origin))
    return given


def _decoded(path: tuple[str, ...], text: str, origin: str, problems: list[Problem]) -> list[Given]:
    """A text as the value that its field wants: JSON for lists and tables, commas for lists of plain texts."""
    place = field_at(path)
    looks_json = text.lstrip()[:1] in ("[", "{")
    kind = bare(place.annotation) if place is not None else None
    # What is no field of ours is a hook's own setting, or its table, or unknown: lists and tables are JSON there too.
    if not (looks_json if place is None else is_container(kind)):
        return [Given(path, text, origin)]
    if get_origin(kind) is list and get_args(kind)[0] is str and not looks_json:
        return [Given(path, [part.strip() for part in text.split(",") if part.strip()], origin)]
    try:
        return list(_flat(json.loads(text), origin, path))
    except (ValueError, RecursionError):
        if place is None:
            return [Given(path, text, origin)]
    problems.append(Problem(path, "must be JSON, a list [...] or a table {...}, and is not", origin))
    return []
