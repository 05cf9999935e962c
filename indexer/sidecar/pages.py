"""Small pages in HTML that load nothing: how a browser is told of an error, or of what became of a sign-in."""

from __future__ import annotations

import base64
import hashlib
from html import escape

_STYLE = """
:root { color-scheme: light dark; }
body { font: 18px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 15vh auto 2rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
small { opacity: .75; }
"""
# The style is named by its hash, so that nothing that gets into a page could bring one of its own.
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    # An address may hold the code of a sign-in, which is none of another site's business.
    "Referrer-Policy": "same-origin",
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main><h1>{title}</h1>
{text}
</main></body></html>
"""

_TITLES = {
    400: "That did not work",
    401: "You are not signed in",
    403: "That is not allowed",
    404: "There is nothing here",
    429: "Please wait a moment",
    503: "Please try again later",
}
_SIGN_IN = ("/connect/spotify", "Sign in with Spotify")


def message(title: str, *paragraphs: str, link: tuple[str, str] | None = None, small: str | None = None) -> bytes:
    """A page with a title, a few sentences, and perhaps a link: its address and its words."""
    parts = [f"<p>{escape(one)}</p>" for one in paragraphs]
    if link is not None:
        parts.append(f'<p><a href="{escape(link[0])}">{escape(link[1])}</a></p>')
    if small is not None:
        parts.append(f"<p><small>{escape(small)}</small></p>")
    return _PAGE.format(title=escape(title), style=_STYLE, text="\n".join(parts)).encode()


def failure(status: int, text: str, request_id: str) -> bytes:
    """The page of an error; `text` is ours and quotes nothing."""
    title = _TITLES.get(status, "Something went wrong" if status >= 500 else "That did not work")
    link = _SIGN_IN if status == 401 else None
    return message(title, f"{text[:1].upper()}{text[1:]}.", link=link, small=f"Request {request_id}")
