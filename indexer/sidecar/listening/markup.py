"""HTML in which every text is escaped unless it was made here: names of tracks and people are anybody's to choose."""

from __future__ import annotations

import re
from html import escape
from typing import TypeAlias

# Tracks with names longer than a page wants to show exist; nothing is lost, since the export has them whole.
_SHOWN = 120
# What is no character of a text and would garble the page: controls, and what else Unicode calls none.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufff9-\ufffb]+")
_VOID = frozenset({"rect", "circle", "path", "input"})


class Html(str):
    """Markup; any other str is text."""

    __slots__ = ()


Child: TypeAlias = str | None


def element(tag: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """`<tag name="value">children</tag>`.

    An attribute that is None or False is left out, one that is True has no value; a last underscore (class_, for_) is
    dropped, any other becomes a hyphen: aria_label.
    """
    opened = "".join(
        f" {_hyphened(name)}" if value is True else f' {_hyphened(name)}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    if tag in _VOID and not children:
        return Html(f"<{tag}{opened}/>")
    return Html(f"<{tag}{opened}>{joined(*children)}</{tag}>")


def joined(*children: Child) -> Html:
    """These one after the other, the texts escaped."""
    return Html("".join(one if isinstance(one, Html) else escape(one) for one in children if one is not None))


def name(text: str | None, missing: str = "Unnamed", longest: int = _SHOWN) -> Html:
    """A name from outside: isolated, so that its direction of writing ends with it, and of bounded length."""
    shown = _CONTROLS.sub(" ", text or "").strip()
    if len(shown) > longest:
        shown = shown[: longest - 1].rstrip() + "…"
    return element("bdi", shown or missing)


def _hyphened(attribute: str) -> str:
    return attribute.rstrip("_").replace("_", "-")


def _text(value: str | float) -> str:
    """A number as short as it can be."""
    return value if isinstance(value, str) else f"{value:.6g}"
