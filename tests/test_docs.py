"""What is written about the code is held equal to it: the tables of the reference, the layers of the design."""

from __future__ import annotations

import ast
from pathlib import Path

from reference import REFERENCE, ROOT, rendered

# A file imports only from lines above it. Names of one line may know each other.
LAYERS = (
    "errors version limits",
    "model",
    "config settings_fields settings_errors settings_sources config_report",
    "log metrics redact",
    "notify",
    "binaries embedded db migrations",
    "ledger queue",
    "journal",
    "transaction",
    "registry",
    "pipeline state segments derivation",
    "sources fakechain devchain",
    "follow replay rebuild record accept maintenance",
    "web web_facts web_admin web_page progress",
    "app",
    "testing pytest_plugin",
    "sidecar",
    "status demochain demolisteners explain explain_report",
    "watch doctor_finding",
    "doctor_nodes",
    "doctor_database",
    "doctor",
    "demo",
    "cli cli_chain cli_recovery cli_jobs cli_keys cli_listeners cli_operate completion",
)


def _layer_of(module: str) -> int | None:
    name = module.removeprefix("indexer.").partition(".")[0]
    return next((n for n, line in enumerate(LAYERS) if name in line.split()), None)


def _imports(path: Path) -> set[str]:
    """Modules imported when `path` is, or while it runs; those for type checkers alone don't count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names if node.module == "indexer")
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def test_the_references_tables_are_those_of_the_code() -> None:
    text = REFERENCE.read_text()
    assert text == rendered(text), "run: .venv/bin/python tests/reference.py"


def test_every_file_imports_only_from_the_lines_above_it() -> None:
    for path in sorted((ROOT / "indexer").rglob("*.py")):
        parts = path.relative_to(ROOT / "indexer").with_suffix("").parts
        if parts[0] == "__init__":
            continue
        own = _layer_of(parts[0])
        assert own is not None, f"{path.name} has no line in LAYERS"
        for module in _imports(path):
            if module.startswith("indexer."):
                other = _layer_of(module)
                assert other is not None, f"{path.name} imports {module}, which has no line"
                assert other <= own, f"{path.name} must not import {module}"


def test_hooks_import_only_indexer() -> None:
    for path in sorted((ROOT / "hooks").glob("*.py")):
        for module in _imports(path):
            ours = module.startswith("indexer.") and not hasattr(__import__("indexer"), module.partition(".")[2])
            assert not ours, f"{path.name} imports {module}: hooks have no private door"
            assert module.partition(".")[0] not in ("web3", "eth_abi", "eth_utils", "aiohttp", "asyncpg"), path.name
