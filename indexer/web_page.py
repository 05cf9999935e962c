"""The status page as HTML: what it shows at first is written here, so that it is of use without any script.

Everything that comes from outside gets in escaped. Style and script stand in the page itself; the policy names their
hashes, so that nothing else runs.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = ("draw.js", "plots.js", "operate.js", "live.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_SHOWN_RANGES = 3

_SENTENCES = {
    "starting": "Not at work yet.",
    "standby": "Stands by, and takes over when the leader ends.",
    "halted": "Stopped at a block, and writes nothing more until it is restarted.",
    "stopping": "Ends in a moment.",
}
_KINDS = {"leader": "good", "standby": "calm", "starting": "warn", "halted": "bad", "stopping": "warn"}


class Page:
    """The page's parts, read once. `policy` is its Content-Security-Policy."""

    def __init__(self) -> None:
        self._style = (_FOLDER / "page.css").read_text(encoding="utf-8")
        self._script = "".join((_FOLDER / name).read_text(encoding="utf-8") for name in _SCRIPTS)
        self._html = (_FOLDER / "page.html").read_text(encoding="utf-8")
        self.policy = (
            f"default-src 'none'; connect-src 'self'; style-src {_hash(self._style)}; "
            f"script-src {_hash(self._script)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def render(self, facts: Mapping[str, Any]) -> bytes:
        """The page with these facts in it (see web_facts)."""
        values = {name: escape(text) for name, text in _texts(facts).items()}
        values |= {
            "style": self._style, "script": self._script,
            "role_kind": "warn" if facts["stalled"] else _KINDS.get(facts["role"], ""),
            "progress": f'value="{_share(facts):.2f}"' if facts["head"] is not None else "",
            "hooks": "".join(_hook(name, ranges, facts) for name, ranges in _in_order(facts)) or _NOT_KNOWN,
            "failures": "".join(_failure(one) for one in facts["failures"]),
            "no_failures": "" if facts["failures"] else " hidden",
            "no_trouble": "" if facts["database"] else " hidden",
            "no_detail": "" if facts["reason"] else " hidden",
        }  # fmt: skip
        return _PLACE.sub(lambda match: values[match[1]], self._html).encode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    """What is plain text in the page, by the name of its place."""
    head, behind = facts["head"], facts["lag_blocks"]
    eta = facts["eta_seconds"]
    return {
        "chain": facts["chain"], "role": facts["role"], "what": _sentence(facts), "detail": facts["reason"],
        "trouble": _trouble(facts["database"]), "leader": _leader(facts),
        "head": number(head), "final": number(facts["final"]), "start": number(facts["start_block"]),
        "cursor": number(facts["cursor"]) if facts["cursor"] >= facts["start_block"] else "none yet",
        "lag_blocks": number(behind) if head is not None else "unknown",
        "lag_seconds": "" if head is None else f"{duration(facts['lag_seconds'])} behind" if behind else "at the head",
        "blocks_rate": f"{facts['blocks_per_second']:,}", "events_rate": f"{facts['events_per_second']:,}",
        "blocks": f"{facts['blocks']:,} since its start", "events": f"{facts['events']:,} since its start",
        "eta": "–" if eta is None or head is None else "at the head" if not behind else duration(eta),
        "failure_count": number(facts["failure_count"]) if facts["failure_count"] else "none",
        "failures_more": _more(facts), "version": f"indexer {facts['version']}. ",
    }  # fmt: skip


def _sentence(facts: Mapping[str, Any]) -> str:
    leader = facts["leader"]
    if facts["role"] == "standby" and leader and leader["led"] and leader["name"]:
        return f"Stands by: {leader['name']} leads."
    if facts["role"] in _SENTENCES:
        return _SENTENCES[facts["role"]]
    if facts["head"] is None:
        return "Waits for a node to say where the head is."
    if facts["stalled"]:
        return "Nothing gets committed although the head is ahead."
    return "Catches up with the head." if facts["lag_blocks"] > 5 else "Follows the head."


def _trouble(text: str | None) -> str:
    return f"The database can’t be read: {text}. What is below of it is what was read last." if text else ""


def _leader(facts: Mapping[str, Any]) -> str:
    if facts["role"] == "leader":
        return f"{facts['name']} (this process)"
    leader = facts["leader"]
    return leader["name"] if leader and leader["led"] and leader["name"] else "nobody now"


def _more(facts: Mapping[str, Any]) -> str:
    shown, count = len(facts["failures"]), facts["failure_count"]
    return f"The oldest {shown} of {count:,}" if count > shown else ""


def _share(facts: Mapping[str, Any]) -> float:
    """How much of the chain is applied, in percent, rounded down."""
    whole, done = facts["head"] - facts["start_block"] + 1, facts["cursor"] - facts["start_block"] + 1
    return max(0, min(10_000, 10_000 * done // whole)) / 100 if whole > 0 else 0.0


_NOT_KNOWN = '<li class="quiet">Not known yet.</li>'


def _in_order(facts: Mapping[str, Any]) -> list[tuple[str, Sequence[Sequence[int]]]]:
    """The gaps by hook, in the order in which the hooks run; those that are not enabled now come last."""
    hooks: Sequence[str] = facts["hooks"]
    return sorted(facts["gaps"].items(), key=lambda one: hooks.index(one[0]) if one[0] in hooks else len(hooks))


def _hook(name: str, ranges: Sequence[Sequence[int]], facts: Mapping[str, Any]) -> str:
    return f'<li>{escape(name)}<p class="quiet">{escape(_missing(ranges, facts))}</p></li>'


def _missing(ranges: Sequence[Sequence[int]], facts: Mapping[str, Any]) -> str:
    if facts["cursor"] < facts["start_block"]:
        return "nothing applied yet"
    if not ranges:
        return "no hole"
    blocks = sum(last - first + 1 for first, last in ranges)
    shown = ", ".join(_range(first, last) for first, last in ranges[:_SHOWN_RANGES])
    more = f" and {len(ranges) - _SHOWN_RANGES:,} more" if len(ranges) > _SHOWN_RANGES else ""
    return f"{blocks:,} {'block' if blocks == 1 else 'blocks'} missing: {shown}{more}"


def _failure(one: Mapping[str, Any]) -> str:
    blocks = "block" if one["first"] == one["last"] else "blocks"
    what = f"{one['hook']}, {blocks} {_range(one['first'], one['last'])}"
    kind, word = ("bad", "halted") if one["policy"] == "halt" else ("warn", "skipped")
    return (
        f'<li><span class="badge {kind}">{word}</span>{escape(what)}<p class="error">{escape(one["error"])}</p>'
        f'<p class="quiet"><a href="./failures/{int(one["id"])}">Traceback of failure {int(one["id"])}</a></p></li>'
    )


def _range(first: int, last: int) -> str:
    return number(first) if first == last else f"{number(first)} to {number(last)}"


def number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
