"""The README's tables of settings and metrics, made from the code. `python tests/reference.py` writes them anew."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic_core import PydanticUndefined

from indexer import metrics
from indexer.settings_fields import known_paths

README = Path(__file__).parent.parent / "README.md"


def settings_table() -> str:
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for path, field in known_paths():
        default = field.default
        if default is PydanticUndefined:
            shown = "must be given"
        elif default is None or default in ("", []):
            shown = ""
        else:
            shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
        rows.append(f"| `{path}` | {shown} | {(field.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def metrics_table() -> str:
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for name, one in sorted(vars(metrics).items()):
        if hasattr(one, "_labelnames") and hasattr(one, "_type"):
            labels = ", ".join(one._labelnames) or ("version, chain, source" if one._type == "info" else "")
            full = next(iter(one.describe())).name + ("_total" if one._type == "counter" else "")
            assert one._type == "info" or full == f"indexer_{name}", f"{name} is called {full}"
            rows.append(f"| `{full}` | {one._type} | {labels} | {one._documentation} |")
    return "\n".join(rows)


def rendered(text: str) -> str:
    """The README with its tables as they should be."""
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        pattern = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        assert count == 1, f"README.md has no place for {name}"
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
