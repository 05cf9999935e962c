"""The page of a person and the one that welcomes, as HTML that loads nothing from anywhere."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from itertools import groupby
from math import ceil
from pathlib import Path
from string import Template
from urllib.parse import urlencode

from indexer.sidecar.listening.markup import Html, element, joined, name
from indexer.sidecar.listening.page_facts import WINDOWS, Facts, Play, Ranked, Standing, WindowName
from indexer.sidecar.listening.pictures import (
    WEEKDAYS,
    counted,
    cover,
    day_bars,
    day_table,
    heat_map,
    heat_table,
    share_bar,
)
from indexer.sidecar.listening.reads import State

_FOLDER = Path(__file__).parent
_PAGE = Template((_FOLDER / "page.html").read_text(encoding="utf-8"))
_STYLE = (_FOLDER / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_FOLDER / "page.js").read_text(encoding="utf-8")

CONNECT = "/connect/spotify"
_BADGES: dict[State, str] = {
    "active": "Active",
    "cooling_down": "Cools down",
    "rate_limited": "Waits for Spotify",
    "disconnected": "Must reconnect",
}
_CAUSES = {
    "AUTH": "Spotify did not let us in the last time.",
    "NETWORK": "Spotify could not be reached the last time.",
}
_HOUR = timedelta(hours=1)


def _hashed(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


# Our own style and script alone, the icon, and forms that go nowhere else: a name taken for markup could do nothing.
POLICY = (
    f"default-src 'none'; style-src {_hashed(_STYLE)}; script-src {_hashed(_SCRIPT)}; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


def _page(title: str, *body: Html, live: bool = False) -> bytes:
    script = Html(f"<script>{_SCRIPT}</script>") if live else ""
    return _PAGE.substitute(title=joined(title), style=_STYLE, body=joined(*body), script=script).encode()


def _brand(*more: Html) -> Html:
    heights = enumerate((6, 14, 9, 12, 4))
    bars = (element("rect", x=4 * n, y=14 - height, width=3, height=height, rx=1) for n, height in heights)
    logo = element("svg", *bars, viewBox="0 0 19 14", aria_hidden="true")
    return element("header", element("a", logo, "Listening archive", href="/", class_="brand"), *more)


# -- the welcome ---------------------------------------------------------------------------------------------------


def welcome(left: int, session_days: float, *, open_: bool) -> bytes:
    """For whoever is not signed in; `open_`: whether this sidecar can connect anybody."""
    places = (
        element("p", element("strong", f"{left:,}"), f" founding {'place is' if left == 1 else 'places are'} left.")
        if left
        else element("p", "All founding places are taken: connect to join the waitlist.")
    )
    action = (
        element(
            "p", element("a", "Connect with Spotify", href=CONNECT, class_="button"), " ",
            element("a", "Sign in", href=CONNECT, class_="button plain"), class_="row",
        )
        if open_
        else element("p", "Nobody can connect yet: whoever runs this has to set listening.token_key first.")
    )  # fmt: skip
    kept = (
        "Every play: the track with its artists and album, and when you heard it.",
        "Your Spotify id, your name there and your e-mail address; nobody else gets to see them.",
        "What lets us ask Spotify for your plays, encrypted. We can neither play nor change anything of yours.",
    )
    until = (
        "Everything is kept until you delete it: one button on your page, and it is gone at once.",
        "Until then it is yours to take along, as a file of all plays.",
        f"One cookie keeps you signed in for {session_days:g} days. Nothing here counts or follows you.",
    )
    hero = element(
        "div", element("h1", "Keep all the music you hear"),
        element("p", "Spotify remembers your last 50 plays. We look every hour and keep the rest: your whole history, "
                     "from the day you connect."),
        action, places, class_="hero",
    )  # fmt: skip
    cards = element(
        "div", _notes("What is stored", kept), _notes("For how long", until), class_="pair"
    )  # fmt: skip
    foot = element("footer", "Made beside Spotify, not by Spotify.")
    return _page("Listening archive", _brand(), element("main", hero, cards, id="main"), foot)


def _notes(title: str, notes: Sequence[str]) -> Html:
    listed = element("ul", *(element("li", note) for note in notes), class_="notes")
    return element("section", element("h2", title), listed, class_="card")


# -- a person ------------------------------------------------------------------------------------------------------


def person(facts: Facts, window: WindowName, now: datetime, *, form_token: str, newest: bool) -> bytes:
    """The page of a person; `newest`: the timeline begins at the newest play and not on an older page."""
    links = element(
        "nav", element("a", "Export", href="/me/export.ndjson", class_="button plain small"), _sign_out("small"),
        class_="row", aria_label="Account",
    )  # fmt: skip
    standing = facts.standing
    offline = element("p", "No answer from the server: trying again.", id="offline", class_="quiet", hidden=True,
                      role="status")  # fmt: skip
    title = element("h1", name(standing.display_name, "Your listening", 60))
    head = element("div", title, _status(standing, now), offline, class_="wide")
    if standing.plays:
        shown = joined(
            _archive(facts), _last_days(facts), _window(facts, window), _timeline(facts, window, newest),
            _yours(form_token),
        )  # fmt: skip
    else:
        shown = joined(element("p", _WAITING, class_="card empty wide"), _yours(form_token))
    main = element("main", head, shown, id="main", class_="person")
    foot = element("footer", "Days and hours are those of UTC. Covers are drawn here, from names.")
    return _page("Your listening", _brand(links), main, foot, live=True)


def _status(standing: Standing, now: datetime) -> Html:
    label = _BADGES[standing.state]
    if standing.until is not None and standing.state in ("cooling_down", "rate_limited"):
        label += f", {ceil((standing.until - now).total_seconds() / 60)} min left"
    badge = element("span", label, class_=f"badge {standing.state}")
    return element(
        "div", element("p", badge), element("p", *_told(standing, now)), id="status", data_live=True,
        role="status",
    )  # fmt: skip


def _told(standing: Standing, now: datetime) -> list[Html | str]:
    told: list[Html | str] = []
    if standing.state == "disconnected":
        link = element("a", "Connect with Spotify again", href=CONNECT)
        told += ["Spotify no longer lets us see what you hear. ", link, ", and it goes on; nothing archived is lost. "]
    elif standing.state == "cooling_down":
        told.append(_CAUSES.get(standing.failure or "", "The last poll did not work.") + " We try again by ourselves. ")
        if standing.failure == "AUTH":
            told += ["If it stays so, ", element("a", "connect again", href=CONNECT), ". "]
    elif standing.state == "rate_limited":
        told.append("Spotify asked us to wait. Nothing is lost by it. ")
    if standing.last_polled_at is None:
        told.append("Not polled yet" if standing.next_from is None else "The first poll is within the hour")
    else:
        told += ["Last poll ", _ago(standing.last_polled_at, now)]
        if standing.next_from is not None:
            told.append(f"; the next is {_next(standing.next_from, now)}")
    return [*told, "."]


def _next(begin: datetime, now: datetime) -> str:
    return "within the hour" if begin <= now else f"between {begin:%H:%M} and {begin + _HOUR:%H:%M} UTC"


def _ago(moment: datetime, now: datetime) -> Html:
    """How long ago, in the words that the script uses, too."""
    minutes = round((now - moment).total_seconds() / 60)
    if minutes < 1:
        text = "this minute"
    elif minutes < 60:
        text = f"{minutes} minute{'s' * (minutes > 1)} ago"
    elif (hours := round(minutes / 60)) < 48:
        text = f"{hours} hour{'s' * (hours > 1)} ago"
    else:
        text = f"{round(hours / 24)} days ago"
    return element("time", text, datetime=_instant(moment), data_ago="")


def _instant(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%S}Z"


def _tiles(*tiles: tuple[str, str | Html]) -> Html:
    made = (element("div", element("dt", title), element("dd", value), class_="card") for title, value in tiles)
    return element("dl", *made, class_="tiles")


def _archive(facts: Facts) -> Html:
    standing = facts.standing
    first = standing.first_play
    began = element("time", _day(first), datetime=_instant(first)) if first else Html("–")
    last_week = sum(count for _, count in facts.days[-7:])
    tiles = _tiles(
        ("Plays archived", f"{standing.plays:,}"), ("First play", began),
        ("Today", f"{facts.days[-1][1]:,}"), ("Last 7 days", f"{last_week:,}"),
    )  # fmt: skip
    return element("section", tiles, id="archive", class_="wide", data_live=True, aria_label="The archive")


def _day(moment: datetime) -> str:
    return f"{moment.day} {moment:%b %Y}"


def _last_days(facts: Facts) -> Html:
    first, last = facts.days[0][0], facts.days[-1][0]
    most = max(count for _, count in facts.days)
    head = element(
        "div", element("h2", "The last 30 days"),
        element("span", f"up to {counted(most)} a day" if most else "no plays", class_="quiet"),
        class_="split",
    )  # fmt: skip
    ends = element(
        "p", element("span", f"{first.day} {first:%b}"),
        element("span", f"today, {last.day} {last:%b}", class_="now-text"), class_="ends quiet",
    )  # fmt: skip
    return element(
        "section", head, day_bars(facts.days), ends, day_table(facts.days), id="last-days", data_live=True,
        class_="card wide", aria_label="The last 30 days",
    )  # fmt: skip


# -- a window of time ----------------------------------------------------------------------------------------------


def _window(facts: Facts, window: WindowName) -> Html:
    links = [
        element("a", label, href=f"/me?window={key}#window", aria_current="true" if key == window else None)
        for key, (label, _) in WINDOWS.items()
    ]
    head = element("nav", *links, class_="windows", aria_label="Window of time")
    totals = facts.totals
    if not totals.plays:
        inner = element("p", "No play in this time.", class_="card empty")
    else:
        tiles = _tiles(
            ("Plays", f"{totals.plays:,}"), ("Tracks", f"{totals.tracks:,}"), ("Artists", f"{totals.artists:,}"),
            ("Hours, at most", f"{totals.hours:,.0f}" if totals.hours >= 10 else f"{totals.hours:.1f}"),
        )  # fmt: skip
        tops = element(
            "div", _ranking("Top tracks", facts.tracks), _ranking("Top artists", facts.artists), class_="pair"
        )  # fmt: skip
        inner = joined(tiles, tops, _week(facts))
    # what carries the name of a place to jump to is not exchanged, or the browser would lose its place
    live = element("div", inner, id="window-live", data_live=True, class_="stack")
    return element("section", head, live, id="window", class_="stack", aria_label="The most played")


_WAITING = "Nothing is archived yet. What you have heard of late appears here after the first poll."


def _ranking(title: str, ranked: Sequence[Ranked]) -> Html:
    most = max((one.plays for one in ranked), default=0)
    lines = []
    for one in ranked:
        by = element("span", name(one.artists)) if one.artists else None
        what = element("div", element("b", name(one.name)), by, share_bar(one.plays, most), class_="what")
        picture = cover(one.cover, one.name, is_round=one.cover == one.id)
        count = element("span", f"{one.plays:,}", element("span", " plays", class_="unseen"), class_="count")
        lines.append(element("li", picture, what, count, class_="line"))
    return element("section", element("h2", title), element("ol", *lines, class_="ranking"), class_="card")


def _week(facts: Facts) -> Html:
    weekdays = element("ol", *(element("li", weekday[:3]) for weekday in WEEKDAYS), aria_hidden="true")
    hours = element("div", *(element("span", f"{hour:02}:00") for hour in (0, 6, 12, 18)), class_="hours",
                    aria_hidden="true")  # fmt: skip
    picture = element("div", weekdays, heat_map(facts.week), hours, class_="heat")
    head = element("div", element("h2", "Your week by the hour"), element("span", "UTC", class_="quiet"),
                   class_="split")  # fmt: skip
    return element("section", head, picture, heat_table(facts.week), class_="card")


# -- the timeline --------------------------------------------------------------------------------------------------


def _timeline(facts: Facts, window: WindowName, newest: bool) -> Html:
    days = [
        element(
            "section", element("h3", f"{day:%A}, {day.day} {day:%B %Y}"), element("ol", *map(_play, plays)),
            data_day=day.isoformat(),
        )
        for day, plays in groupby(facts.plays, key=lambda play: play.played_at.date())
    ]  # fmt: skip
    if not days:
        days = [element("p", "No older plays.", class_="empty")]
    base = {"window": window}
    back = None if newest else element("a", "Newest", href=f"/me?{urlencode(base)}#timeline")
    on = facts.older and element("a", "Older", href=f"/me?{urlencode({**base, 'older': facts.older})}#timeline")
    pages = element("nav", back or element("span"), on or element("span"), class_="pages", aria_label="Timeline")
    listed = element("div", *days, class_="timeline", data_newest=newest)
    head = element("h2", "Timeline" if newest else "Timeline, further back")
    return element("section", head, listed, pages, id="timeline", class_="card", aria_label="Timeline")


def _play(play: Play) -> Html:
    at = element("time", f"{play.played_at:%H:%M}", datetime=_instant(play.played_at))
    by = joined(name(play.artists, "Unknown artist"), *((" · ", name(play.album)) if play.album else ()))
    what = element("div", element("b", name(play.name)), element("span", by), class_="what")
    key = f"{play.played_at.isoformat()} {play.track}"
    return element("li", at, cover(play.cover, play.name), what, class_="line", data_play=key)


# -- what is theirs ------------------------------------------------------------------------------------------------


def _sign_out(class_: str = "") -> Html:
    button = element("button", "Sign out", class_=f"plain {class_}".strip())
    return element("form", button, method="post", action="/me/signout")


def _yours(form_token: str) -> Html:
    export = element("a", "Export all plays", href="/me/export.ndjson", class_="button")
    sure = element("input", type="checkbox", name="sure", value="yes", required=True, id="sure")
    form = element(
        "form", element("p", "All plays that we archived for you, your name, your e-mail address and what connects us "
                             "with Spotify are deleted at once. Nobody can bring them back."),
        element("label", sure, "I want all of it deleted", for_="sure"),
        element("input", type="hidden", name="token", value=form_token),
        element("button", "Delete everything", class_="danger"),
        method="post", action="/me/delete",
    )  # fmt: skip
    delete = element("details", element("summary", "Delete everything …"), form, class_="delete")
    note = element("p", "The export has one line of JSON for each play, the oldest first.", class_="quiet")
    return element(
        "section", element("h2", "Your data"), element("div", export, _sign_out(), class_="row"), note, delete,
        class_="card yours", id="yours",
    )  # fmt: skip
