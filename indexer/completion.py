"""What the shell is offered behind TAB, as far as it is to be had at once: read from the file of settings, where there
is one, without its checks and without the hooks' code. An error offers nothing."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

# the kinds of job that every sidecar has; held equal to the code by a test
KINDS = (
    "chores", "listening.archive", "listening.schedule", "playcount.maintenance", "snapshot.chunk", "snapshot.finish",
    "songstats.history",
)  # fmt: skip

Offer = Callable[[typer.Context, str], list[str]]


def _settings(context: typer.Context) -> dict[str, Any]:
    """The file's tables; the one named on the line so far, by INDEXER_CONFIG, or in this folder."""
    named = context.params.get("config") or os.environ.get("INDEXER_CONFIG") or "indexer.toml"
    return tomllib.loads(Path(named).read_text(encoding="utf-8-sig"))


def _offer(find: Callable[[dict[str, Any]], Iterable[str]], always: Sequence[str] = ()) -> Offer:
    def offer(ctx: typer.Context, incomplete: str) -> list[str]:
        found = list(always)
        try:
            found += find(_settings(ctx))
        except Exception:
            found = list(always)  # a TAB is no place to complain
        return [one for one in dict.fromkeys(found) if one.startswith(incomplete)]

    return offer


def words(*these: str) -> Offer:
    """One of these, whatever the settings say."""
    return _offer(lambda _: (), these)


def _hooks(settings: dict[str, Any]) -> list[str]:
    # what stands behind the colon is a hook's name with nearly everybody, and its table carries the name itself
    hooks = settings["hooks"]
    enabled = os.environ.get("INDEXER_HOOKS__ENABLED", "").split(",") if "enabled" not in hooks else hooks["enabled"]
    places = [place.partition(":")[2] for place in enabled]
    return [name for name in (*places, *(key for key, value in hooks.items() if isinstance(value, dict))) if name]


def _kinds(settings: dict[str, Any]) -> list[str]:
    sidecar = settings["sidecar"]
    scheduled = [one.get("kind", "") for one in sidecar.get("schedules", {}).values()]
    return [kind for kind in (*sidecar.get("concurrency", {}), *scheduled) if kind]


hooks = _offer(_hooks)
kinds = _offer(_kinds, KINDS)
chain_ids = _offer(lambda settings: [str(settings["chain"]["chain_id"])])
