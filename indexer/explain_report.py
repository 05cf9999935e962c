"""What `indexer explain` prints: the facts of one block for people, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Group
from rich.text import Text

_STATES = {
    "final": "final: nothing undoes it any more",
    "can be undone": "applied, and can still be undone",
    "not applied yet": "not applied yet",
    "reorganised": "reorganised: the daemon has applied another block here, and is about to undo it",
}
_RUNS = {
    "undone": "it was undone first, so this is what it has done",
    "next": "it is the next one, so this is what it will do",
    "again": "it is final, so this ran over what is there now: rows that are there are not written again",
}
_LONGEST_VALUE = 72


def as_json(facts: dict[str, Any]) -> str:
    return json.dumps(facts, default=_plain)


def render(facts: dict[str, Any]) -> Group:
    return Group(*_parts(facts))


def _parts(facts: dict[str, Any]) -> Iterator[Text]:
    for name, value in _block(facts):
        yield Text.assemble((f"{name:<9}", "bold"), value)
    yield Text()
    yield from _fetch(facts["fetched"])
    yield from _events(facts)
    yield Text()
    yield from _hooks(facts)


def _block(facts: dict[str, Any]) -> Iterator[tuple[str, str | Text]]:
    yield "block", f"{facts['block']:,} of {facts['chain']} ({facts['source']} {facts['chain_id']})"
    yield "hash", _hash(facts["hash"])
    yield "parent", _hash(facts["parent_hash"])
    yield "time", "unknown" if facts["time"] is None else f"{facts['time']}, {_age(facts['age_seconds'])} ago"
    yield "state", Text(_STATES[facts["state"]], style="" if facts["state"] == "final" else "yellow")
    if facts["state"] == "reorganised":
        yield "applied", _hash(facts["applied_hash"])
    final = "unknown" if facts["final"] is None else f"{facts['final']:,}"
    yield "beside", f"head {facts['head']:,}, cursor {facts['cursor']:,}, final {final}"
    kept = ", ".join(f"{count:,} of {name}" for name, count in facts["journal"]["rows"].items())
    if facts["state"] == "can be undone":
        yield "journal", f"rows to undo it: {kept or 'none'}"
    if facts["journal"]["waiting_jobs"]:
        yield "jobs", f"{facts['journal']['waiting_jobs']:,} wait until it is final"


def _fetch(found: dict[str, Any]) -> Iterator[Text]:
    by = found["by"] or "the source"
    line = f"{by} gave {found['events']:,} events in {_seconds(found['fetch_seconds'])}"
    if found["requests"]:
        asked = ", ".join(f"{one['method']} {_seconds(one['seconds'])}" for one in found["requests"])
        size = f"{found['records']:,} records, {found['bytes']:,} bytes"
        decoded = f"decoded in {_seconds(found['decode_seconds'])}"
        line += f", {size} in {len(found['requests'])} requests ({asked}), {decoded}"
    yield Text.assemble(("fetched  ", "bold"), line)
    for one in found["troubles"]:
        yield Text(f"  refused: {one}", style="yellow")
    for one in found["quarantined"]:
        what = f"  quarantined: {one['index']} {one['event']} {_short(one['address'])}: {one['error']}"
        yield Text(what, style="red")


def _events(facts: dict[str, Any]) -> Iterator[Text]:
    if not facts["events"]:
        return
    yield Text()
    for one in facts["events"]:
        takers = f"taken by {', '.join(one['hooks'])}" if one["hooks"] else "no hook takes it"
        yield Text(f"  {one['index']:>4}  {one['name']}  {_short(one['address'])}  {takers}")
        yield Text(f"        {_arguments(one['args'])}", style="dim")
    if facts["events_left_out"]:
        yield Text(f"  and {facts['events_left_out']:,} more (--limit)")


def _hooks(facts: dict[str, Any]) -> Iterator[Text]:
    run = facts["dry_run"]
    if run["how"] == "none":
        yield Text.assemble(("no dry run  ", "bold"), run["why"])
    else:
        said = f"{_RUNS[run['how']]}; all of it took {_seconds(run['seconds'])}, and is rolled back"
        yield Text.assemble(("dry run  ", "bold"), said)
    for one in facts["hooks"]:
        yield from _hook(one)


def _hook(one: dict[str, Any]) -> Iterator[Text]:
    takes = f"takes {one['events']:,} events" if one["listens"] else "works on what other hooks insert"
    if not one["known"]:
        covered, style = "new: the daemon has not been started with it", "yellow"
    else:
        covered, style = ("covered", "green") if one["covered"] else ("not applied", "yellow")
    run = one["dry_run"]
    took = f", took {_seconds(run['seconds'])}" if run is not None and not run["error"] else ""
    yield Text.assemble("  ", (one["name"], "bold"), "  ", (covered, style), f", {takes}{took}")
    for failed in one["failures"]:
        state = "resolved" if failed["resolved_at"] else "halted" if failed["policy"] == "halt" else "skipped"
        style = "" if failed["resolved_at"] else "red"
        yield Text(f"    failure {failed['id']} ({state}): {_cut(failed['error'])}", style=style)
    for table in one["pruned"]:
        yield Text(f"    {table} was pruned of rows of this time: the dry run brings them back", style="yellow")
    if run is not None:
        yield from _run(run)


def _run(run: dict[str, Any]) -> Iterator[Text]:
    if run["error"]:
        yield Text(f"    fails: {_cut(run['error'])}", style="red")
        return
    for one in run["tables"]:
        numbers = f"{one['inserted']:,} inserted, {one['changed']:,} changed, {one['deleted']:,} deleted"
        yield Text(f"    {one['table']}: {numbers}")
        for before, after in one["samples"]:
            if before is None or after is None:
                yield Text(f"      {'-' if after is None else '+'} {_row(before or after)}", style="dim")
            else:
                yield Text(f"      ~ {_difference(before, after)}", style="dim")
    for what, count in run["counted"].items():
        yield Text(f"    {what}: {count:,} (as the hook counts them)")
    for table, count in run["found"].items():
        yield Text(f"    {table}: {count:,} of its rows are there")
    if not (run["tables"] or run["counted"] or run["found"]):
        yield Text("    no row")


# -- values --------------------------------------------------------------------------------------------------------


def _hash(value: bytes | None) -> str:
    return "0x" + value.hex() if value else "unknown"


def _short(address: str) -> str:
    return f"{address[:6]}…{address[-4:]}" if len(address) > 14 else address or "-"


def _arguments(args: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_cut(_value(value))}" for name, value in args.items())


def _row(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_cut(_value(value))}" for name, value in row.items() if value not in (None, ""))


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The columns that changed, behind those before them that say which row it is."""
    same = {name: value for name, value in after.items() if before.get(name) == value}
    moved = [
        f"{name}: {_cut(_value(before.get(name)))} -> {_cut(_value(value))}"
        for name, value in after.items() if before.get(name) != value
    ]  # fmt: skip
    return "; ".join(part for part in (_row(dict(list(same.items())[:4])), ", ".join(moved)) if part)


def _value(value: Any) -> str:
    return _plain(value) if isinstance(value, bytes) else repr(value)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _age(seconds: float) -> str:
    for size, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {name}"
    return f"{seconds:.0f} s"


def _plain(value: Any) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)
