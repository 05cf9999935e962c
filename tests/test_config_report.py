"""What is shown of the settings, and that no secret gets out: in no error, no table, no repr."""

from __future__ import annotations

import io
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from rich.console import Console
from test_config import FULL, load

from indexer.config_report import as_json, effective, render
from indexer.errors import ConfigError
from indexer.settings_fields import holds, known_paths
from indexer.settings_sources import Loaded, load_settings


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SENTINEL = "s3nt1nel"
SECRETS = [path for path, field in known_paths() if holds(field.annotation, SecretStr)]
SCHEMES = {
    "database.url": "postgresql", "chain.endpoints[].url": "https", "chain.endpoints[].ws": "wss",
    "providers.stripe.success_url": "https", "providers.stripe.cancel_url": "https",
}  # fmt: skip
SOURCES = ["file", "environment", "secret", "command line"]
BROKEN = [
    "{s}", "ftp://u:{s}@h/", "SCHEME://u:{s}", "SCHEME://u:{s} @h/", "SCHEME://u:{s}℀@h/", "SCHEME://[{s}]@h/",
    "SCHEME://u:1/{s}@h/", "SCHEME://u:p?{s}@h/", "SCHEME://u:p#{s}@h", "SCHEME:///{s}", "SCHEME://h/{s}\nx", "",
]  # fmt: skip


def arguments_for(path: str, value: Any, source: str) -> dict[str, Any]:
    """What `load` needs to give one secret this value by one source."""
    names = path.split(".")
    if "[]" in path:
        endpoint = {"url": "https://node.example/", names[-1]: value}
        names, value = ["chain", "endpoints"], [endpoint]
    text = value if isinstance(value, str) else json.dumps(value)
    if source == "command line":
        return {"overrides": {".".join(names): value}}
    if source == "secret":
        return {"secrets": {"__".join(names): text}}
    if source == "environment":
        return {"environ": {"INDEXER_" + "__".join(names).upper(): text}}
    if "[]" in path:
        pairs = (f"{name} = {json.dumps(inner, ensure_ascii=False)}\n" for name, inner in value[0].items())
        return {"toml": "[[chain.endpoints]]\n" + "".join(pairs)}
    return {"toml": f"[{'.'.join(names[:-1])}]\n{names[-1]} = {json.dumps(value, ensure_ascii=False)}\n"}


def everything_said(load_it: Callable[[], Loaded]) -> str:
    """All texts that come of loading: of the error with its chain, or of every way to show what was loaded."""
    try:
        loaded = load_it()
    except ConfigError as error:
        return "".join([str(error), repr(error), *traceback.format_exception(error)])
    labels = [one.label for one in loaded.settings.chain.endpoints]
    parts = [effective(loaded), as_json(loaded), loaded, loaded.settings, loaded.settings.model_dump_json(), labels]
    # the cells, since to draw a table of all settings takes longer than everything else
    cells = [str(cell) for column in render(loaded).columns for cell in column.cells]
    assert len(cells) > 100 and "chain.start_block" in cells
    return " ".join([*map(repr, parts), *cells])


LISTS = {"listening.old_token_keys"}


class TestMasking:
    def test_all_secrets_are_tried(self) -> None:
        plain = {"database.url", "chain.endpoints[].url", "chain.endpoints[].ws", "http.admin_token"}
        plain |= {"listening.token_key", *LISTS}
        keys = {"songstats.api_key", "apify.token", "spotify.client_secret", "stripe.api_key"}
        assert plain | {f"providers.{key}" for key in keys} <= set(SECRETS)

    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("path", SECRETS)
    @pytest.mark.parametrize("other", [{}, {"log.level": "loud"}, {"nonsense": 1}, {"chain.endpoint": []}])
    def test_good_values(self, path: str, source: str, other: dict[str, Any]) -> None:
        scheme = SCHEMES.get(path)
        value = f"{scheme}://u:{SENTINEL}@host.example:8/{SENTINEL}?k={SENTINEL}" if scheme else SENTINEL * 4
        arguments = arguments_for(path, [value] if path in LISTS else value, source)
        arguments["overrides"] = {**arguments.get("overrides", {}), **other}
        said = everything_said(lambda: load(**arguments))
        assert SENTINEL not in said
        if not other:
            shown = f"{scheme}://host.example:8" if "[]" in path else "********"
            console = Console(width=400, record=True, file=io.StringIO())
            console.print(render(load(**arguments)))
            drawn = console.export_text()
            assert shown in said and shown in drawn and SENTINEL not in drawn

    @pytest.mark.parametrize("source", SOURCES)
    @pytest.mark.parametrize("path", SECRETS)
    @pytest.mark.parametrize("shape", [*BROKEN, [SENTINEL], {SENTINEL: SENTINEL}])
    def test_broken_values(self, path: str, source: str, shape: Any) -> None:
        value = shape
        if isinstance(shape, str):
            value = shape.replace("{s}", SENTINEL).replace("SCHEME", SCHEMES.get(path, "https"))
        said = everything_said(lambda: load(**arguments_for(path, value, source)))
        # A name is no value: of an unknown setting the name is told.
        assert SENTINEL not in said.replace(f".{SENTINEL} ", "")

    @given(
        st.text(":/?#@[]%a1.\\ ℀\t\x1f", max_size=4), st.text(":/?#@[]%a1\\", max_size=4), st.text("/?#@:1", max_size=3)
    )
    def test_malformed_addresses(self, before: str, after: str, end: str) -> None:
        url = f"https://{before}{SENTINEL}{after}@host{end}"
        overrides = {"chain.endpoints": [{"url": url, "ws": url.replace("https", "wss")}]}
        said = everything_said(lambda: load_settings(environ={}, overrides=overrides))
        assert SENTINEL not in said.casefold()

    def test_a_hooks_own_secrets(self) -> None:
        toml = f'[hooks.token_fees]\nretries = 1\napi_key = "{SENTINEL}"\nnode = "https://h/{SENTINEL}"\n'
        toml += f'deep = {{ password = "{SENTINEL}", tables = ["plays"] }}\n'
        loaded = load(toml)
        assert SENTINEL not in everything_said(lambda: loaded).replace(loaded.settings.model_dump_json(), "")
        rows = {row[0]: row[1] for row in effective(loaded)}
        assert rows["hooks.token_fees.retries"] == "1"
        assert rows["hooks.token_fees.api_key"] == "********"
        assert rows["hooks.token_fees.deep"] == '{"password": "********", "tables": ["plays"]}'


class TestReport:
    def test_rows(self) -> None:
        rows = {path: rest for path, *rest in effective(load(FULL, {"INDEXER_HTTP__PORT": "1"}))}
        assert rows["http.port"][:2] == ["1", "environment INDEXER_HTTP__PORT"]
        assert rows["database.schema"] == ["plays", "file indexer.toml", "schema of the hooks' tables"]
        assert rows["database.url"][0] == "********"
        assert rows["chain.start_block"][:2] == ["", "default"]
        assert rows["chain.endpoints[0].url"][:2] == ["https://node.example", "file indexer.toml"]
        assert rows["chain.endpoints[0].ws"][:2] == ["", "default"]
        assert rows["contracts[1].address"][0] == '["0xbb", "0xcc"]'
        assert rows["hooks.plays.beside_writer"] == ["true", "file indexer.toml", "the hook's own setting"]
        assert all(description for *_, description in rows.values())

    def test_json(self) -> None:
        rows = {row["setting"]: row for row in as_json(load(FULL))}
        assert json.loads(json.dumps(rows)) == rows
        assert rows["database.pool_size"]["value"] == 6
        assert rows["contracts[0].address"]["value"] == ["0xaa"]
        assert rows["http.admin_token"] == {
            "setting": "http.admin_token",
            "value": None,
            "origin": "default",
            "description": "token for the buttons of the status page",
        }

    def test_table_takes_no_markup(self) -> None:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(render(load('[hooks]\nenabled = ["[bold]a:b[/bold]"]\n[hooks.plays]\nx = "\\u001b[31m"\n')))
        text = console.export_text()
        assert '["[bold]a:b[/bold]"]' in text
        assert r"\u001b[31m" in text
