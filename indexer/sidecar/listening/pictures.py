"""Pictures of listening, as SVG that loads nothing: bars by day, a heat map of the week, covers made of a name.

They carry no text of their own, so that they may be stretched to any width; each has a title, and its figures stand
in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from hashlib import sha256

from indexer.sidecar.listening.markup import Html, element, joined

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# Shades of the heat map, 0 being no play at all.
SHADES = 6


def counted(count: int, one: str = "play", many: str = "plays") -> str:
    """12,345 plays"""
    return f"{count:,} {one if count == 1 else many}"


# -- plays of each day ---------------------------------------------------------------------------------------------


def day_bars(days: Sequence[tuple[date, int]]) -> Html:
    """A bar for each day, the last one being the day that is not over yet."""
    most = max((count for _, count in days), default=0)
    bars = []
    for n, (day, count) in enumerate(days):
        # a day with one play is seen beside one with a thousand; a hair where there was none keeps the rhythm
        height = max(100 * count / most, 2.5) if count else 1.0
        kind = "none" if not count else "now" if n == len(days) - 1 else None
        hover = element("rect", class_="hover", x=n, y=0, width=1, height=100)
        bar = element("rect", class_=kind, x=n + 0.12, y=100 - height, width=0.76, height=height)
        bars.append(element("g", element("title", f"{day:%a %d %b}: {counted(count)}"), hover, bar))
    total = sum(count for _, count in days)
    told = f"{counted(total)} in {len(days)} days; {_busiest(days)}"
    return _picture("days", "Plays of each day", told, len(days), 100, *bars)


def day_table(days: Sequence[tuple[date, int]]) -> Html:
    """The same figures, the newest first."""
    return _table(("Day", "Plays"), [(f"{day:%a %d %b %Y}", f"{count:,}") for day, count in reversed(days)])


def _busiest(days: Sequence[tuple[date, int]]) -> str:
    day, count = max(days, key=lambda one: one[1], default=(None, 0))
    return f"most on {day:%A %d %B}, {count:,}" if day and count else "none yet"


# -- the week ------------------------------------------------------------------------------------------------------


def heat_map(cells: Mapping[tuple[int, int], int]) -> Html:
    """Plays by weekday (0: Monday) and hour of the day, darker where there are more."""
    most = max(cells.values(), default=0)
    drawn = []
    for weekday in range(7):
        for hour in range(24):
            count = cells.get((weekday, hour), 0)
            title = element("title", f"{WEEKDAYS[weekday]}, {hour:02}:00: {counted(count)}")
            place = {"x": hour + 0.05, "y": weekday + 0.05, "width": 0.9, "height": 0.9}
            drawn.append(element("rect", title, class_=f"h{_shade(count, most)}", **place))
    told = f"{counted(sum(cells.values()))} by weekday and hour in UTC; {_favourite(cells)}"
    return _picture("week", "The week by the hour", told, 24, 7, *drawn)


def heat_table(cells: Mapping[tuple[int, int], int]) -> Html:
    """The same figures: a row for each hour."""
    rows = [
        (f"{hour:02}:00", *(f"{cells.get((weekday, hour), 0):,}" for weekday in range(7))) for hour in range(24)
    ]  # fmt: skip
    return _table(("Hour", *(weekday[:3] for weekday in WEEKDAYS)), rows)


def _shade(count: int, most: int) -> int:
    """By the square root: few are told from none, and many from more."""
    if not count:
        return 0
    return max(1, min(SHADES - 1, round(math.sqrt(count / most) * (SHADES - 1))))


def _favourite(cells: Mapping[tuple[int, int], int]) -> str:
    (weekday, hour), count = max(cells.items(), key=lambda one: one[1], default=((0, 0), 0))
    return f"most on {WEEKDAYS[weekday]}s from {hour:02}:00 on, {count:,}" if count else "none yet"


# -- the most played -----------------------------------------------------------------------------------------------


def share_bar(count: int, most: int) -> Html:
    """How much of the longest one this is; the figure stands beside it, so it is nothing to read out."""
    width = max(100 * count / most, 0.5) if most else 0
    rail, bar = element("rect", class_="rail", width=100, height=1), element("rect", width=width, height=1)
    view = {"viewBox": "0 0 100 1", "preserveAspectRatio": "none"}
    return element("svg", rail, bar, class_="share", aria_hidden="true", **view)


def cover(key: str, label: str, *, is_round: bool = False) -> Html:
    """Stands for an album's or artist's picture, which would have to be asked of others: always the same of `key`."""
    seed = sha256(key.encode()).digest()
    hue = int.from_bytes(seed[:2]) % 360
    ground, shape = f"hsl({hue} 42% 30%)", f"hsl({(hue + 30 + seed[2] % 90) % 360} 55% 40%)"
    text = element("text", initials(label), x=20, y=25.5, text_anchor="middle")
    return element(
        "svg", element("rect", width=40, height=40, fill=ground), _shape(seed, shape), text,
        class_="cover round" if is_round else "cover", viewBox="0 0 40 40", aria_hidden="true",
    )  # fmt: skip


def _shape(seed: bytes, colour: str) -> Html:
    """Something that tells one cover from another with the same initials."""
    kind, a, b = seed[3] % 4, seed[4] % 41, seed[5] % 41
    if kind == 0:
        return element("circle", cx=a, cy=b, r=12 + seed[6] % 10, fill=colour)
    if kind == 1:
        return element("path", d=f"M0 {a}L40 {b}V40H0z", fill=colour)
    if kind == 2:
        return element("path", d=f"M{a} 0H40V40H{b}z", fill=colour)
    return element("circle", cx=a, cy=b, r=14 + seed[6] % 8, fill="none", stroke=colour, stroke_width=6)


def initials(label: str) -> str:
    """Of the first two words that begin with a letter or digit, an article aside; a note where there is none."""
    words = label.removeprefix("The ").split()
    first = [word[0] for word in words if word[0].isalnum()]
    return "".join(first[:2]).upper()[:2] or "♪"


# -- parts ---------------------------------------------------------------------------------------------------------


def _picture(name: str, title: str, told: str, width: float, height: float, *drawn: Html) -> Html:
    return element(
        "svg", element("title", title, id=f"{name}-title"), element("desc", told, id=f"{name}-desc"), *drawn,
        class_=name, viewBox=f"0 0 {width:g} {height:g}", preserveAspectRatio="none", role="img",
        aria_labelledby=f"{name}-title", aria_describedby=f"{name}-desc",
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    titles = joined(*(element("th", title, scope="col") for title in head))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", value) for value in rest))
        for first, *rest in rows
    ]  # fmt: skip
    table = element("table", element("thead", element("tr", titles)), element("tbody", *body))
    inner = element("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"{head[0]} by plays")
    return element("details", element("summary", "As a table"), inner, class_="figures")
