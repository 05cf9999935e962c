"""deploy/docs/reference.md, made from the code. `python tests/reference.py` writes its tables anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from hooks.entities import entities
from hooks.plays import plays
from indexer import cli, metrics
from indexer.config import Settings
from indexer.settings_fields import known_paths

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "deploy" / "docs" / "reference.md"

BUNDLED = (plays, entities)  # those that have settings of their own


def _row(path: str, field: FieldInfo) -> str:
    default = field.default
    if default is PydanticUndefined:
        shown = "must be given"
    elif default is None or default in ("", [], ()):
        shown = ""
    else:
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    return f"| `{path}` | {shown} | {_cell(field.description or '')} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_HEAD = ["", "| setting | default | meaning |", "| --- | --- | --- |"]


def settings_tables() -> str:
    """A table for each section, under a heading with its name."""
    lines: list[str] = []
    section = ""
    for path, field in known_paths():
        name = re.split(r"[.\[]", path)[0]
        if name != section:
            section = name
            lines += ["", f"### {name}", "", f"{(Settings.model_fields[name].description or '').capitalize()}.", *_HEAD]
        lines.append(_row(path, field))
    return "\n".join(lines[1:])


def hooks_table() -> str:
    lines = _HEAD[1:]
    for one in BUNDLED:
        model: type[BaseModel] = one.Settings
        for name, field in model.model_fields.items():
            lines.append(_row(f"hooks.{one.name}.{name}", field))
    return "\n".join(lines)


def metrics_table() -> str:
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for name, one in sorted(vars(metrics).items()):
        if hasattr(one, "_labelnames") and hasattr(one, "_type"):
            labels = ", ".join(one._labelnames) or ("version, chain, source" if one._type == "info" else "")
            full = next(iter(one.describe())).name + ("_total" if one._type == "counter" else "")
            assert one._type == "info" or full == f"indexer_{name}", f"{name} is called {full}"
            rows.append(f"| `{full}` | {one._type} | {labels} | {one._documentation} |")
    return "\n".join(rows)


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its full name, those of groups too."""

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        for word, one in sorted(getattr(command, "commands", {}).items()):
            yield from below(f"{name} {word}", one)
        if not hasattr(command, "commands"):
            yield name, command

    yield from below("indexer", typer.main.get_command(cli.app))


def commands_table() -> str:
    rows = ["| command | what it does | options |", "| --- | --- | --- |"]
    for name, command in commands():
        words = [name]
        options = []
        for one in command.params:
            if one.param_type_name == "argument":
                word = (one.metavar or one.name or "").upper().strip("[]{}")
                words.append(word if one.required else f"[{word}]")
            elif one.name not in ("config", "secrets", "help"):
                options.append(f"`{one.opts[0]}`")
        said = (command.help or "").split("\n\n")[0].replace("\n", " ").strip()
        rows.append(f"| `{' '.join(words)}` | {_cell(said)} | {' '.join(options)} |")
    return "\n".join(rows)


def rendered(text: str) -> str:
    """The reference with its tables as they should be."""
    tables = {
        "commands": commands_table(), "settings": settings_tables(), "hooks": hooks_table(), "metrics": metrics_table(),
    }  # fmt: skip
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
        assert count == 1, f"{REFERENCE.name} has no place for {name}"
    return text


if __name__ == "__main__":
    REFERENCE.write_text(rendered(REFERENCE.read_text()))
