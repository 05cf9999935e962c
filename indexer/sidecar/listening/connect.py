"""Sign-in by Spotify: there and back, a place or the waitlist, and the session.

What must be known on the way back (state, PKCE's verifier, where the person was going) travels in an encrypted cookie;
that it has been used stands in the database, so that no way back is gone twice, whichever process answers.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from base64 import urlsafe_b64encode
from datetime import UTC, datetime, timedelta
from typing import Annotated

import msgspec
from pydantic import Field

from indexer import queue
from indexer.db import Database
from indexer.errors import ConfigError
from indexer.sidecar import pages
from indexer.sidecar.listening import people, session
from indexer.sidecar.listening.people import Connected
from indexer.sidecar.listening.schedule import KIND
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.listening.vault import Undecipherable
from indexer.sidecar.providers import Failed, ProviderError, Saturated
from indexer.sidecar.providers.spotify_user import Profile, Tokens
from indexer.sidecar.routes import HTML, Call, Cookie, Link, Reply, route

_LASTS = timedelta(minutes=10)
_PATH = "/connect"
_HOME = "/me"
# Spotify's own limits are shorter; what is longer is cut, and what Postgres can't keep is left out.
_LONGEST = 320
_AGAIN = ("/connect/spotify", "Sign in with Spotify")
_AGAIN_TEXT = "Please begin once more."

Next = Annotated[str, Field(pattern=r"^/([0-9A-Za-z._~-][0-9A-Za-z._~/?=&%-]*)?$", max_length=300)]
Sent = Annotated[str, Field(pattern=r"^[!-~]*$", max_length=2_000)]


class Flow(msgspec.Struct, frozen=True, tag="connect"):
    """A sign-in that is under way; `until` is in Unix seconds."""

    state: str
    verifier: str
    next: str
    until: float


# -- there ---------------------------------------------------------------------------------------------------------


class ConnectQuery(Link):
    next: Next = Field(default=_HOME, description="where to go after it, a path of this site")


@route("GET", "/connect/spotify", answers={302: None, 503: HTML}, access="visitor", page=True)
async def connect_spotify(call: Call, query: ConnectQuery) -> Reply:
    """Sign in: on to Spotify's page, where the person agrees. 503 says what the operator has to set."""
    if missing := _unset(call):
        return _told(503, "Not set up yet", f"Whoever runs this has to set {' and '.join(missing)} first.")
    listening: Listening = call.resources["listening"]
    until = listening.clock() + _LASTS
    flow = Flow(secrets.token_urlsafe(32), secrets.token_urlsafe(64), query.next, until.timestamp())
    challenge = urlsafe_b64encode(hashlib.sha256(flow.verifier.encode()).digest()).decode().rstrip("=")
    url = listening.spotify.authorize_url(listening.settings.redirect_url, flow.state, challenge)
    sealed = listening.vault.encrypt(msgspec.json.encode(flow).decode()).decode()
    return Reply(None, 302, {"Location": url}, [_cookie(listening, sealed, int(_LASTS.total_seconds()))])


def _unset(call: Call) -> list[str]:
    """The settings without which nobody can connect."""
    listening: Listening | None = call.resources.get("listening")
    spotify = call.settings.providers.spotify
    missing = [f"providers.spotify.{name}" for name in ("client_id", "client_secret") if getattr(spotify, name) is None]
    try:
        if listening is None or not listening.vault:
            raise ConfigError("no listening")
    except ConfigError:
        missing.insert(0, "listening.token_key")
    return missing


def _cookie_name(listening: Listening) -> str:
    return "__Secure-listener-connect" if session.secure(listening.settings) else "listener-connect"


def _cookie(listening: Listening, text: str, seconds: int) -> Cookie:
    return Cookie(_cookie_name(listening), text, seconds, _PATH, session.secure(listening.settings))


# -- and back ------------------------------------------------------------------------------------------------------


class CallbackQuery(Link):
    state: Sent = ""
    code: Sent = Field(default="", description="what Spotify gives the tokens for")
    error: Sent = Field(default="", description="why there is no code; access_denied: the person did not agree")


@route(
    "GET", "/connect/spotify/callback", answers={303: None, 200: HTML, 400: HTML, 403: HTML, 502: HTML, 503: HTML},
    access="visitor", page=True,
)  # fmt: skip
async def connect_spotify_callback(call: Call, query: CallbackQuery) -> Reply:
    """The way back from Spotify: store who it is, begin the session, and order the first archive.

    Where every place is taken, a page tells the place on the waitlist, and no token is kept.
    """
    if missing := _unset(call):
        return _told(503, "Not set up yet", f"Whoever runs this has to set {' and '.join(missing)} first.")
    listening: Listening = call.resources["listening"]
    flow = _flow(listening, call.cookies.get(_cookie_name(listening), ""))
    if flow is None or not hmac.compare_digest(flow.state.encode(), query.state.encode()):
        return _told(400, "This sign-in is not under way", "It has run out, or was begun elsewhere.", again=True)
    over = _cookie(listening, "", 0)
    if not await _first_use(call.database, flow):
        return _told(400, "This sign-in is over", "It has been used already.", again=True, cookies=[over])
    if query.error or not query.code:
        return _not_agreed(query.error, over)
    try:
        tokens = await listening.spotify.exchange(query.code, flow.verifier, listening.settings.redirect_url)
        profile = _storable(await listening.spotify.profile(tokens.access_token))
    except ProviderError as error:
        call.log.warning("sign-in failed", error=str(error))
        return _failed(error, over)
    connected = await _connect(call.database, listening, profile, tokens)
    if connected.listener is None:
        return _waiting(connected, over)
    return Reply(None, 303, {"Location": flow.next}, [over, session.begin(listening, connected.listener)])


def _flow(listening: Listening, sealed: str) -> Flow | None:
    """The sign-in of this cookie, if it is one of ours and has not run out."""
    try:
        flow = msgspec.json.decode(listening.vault.decrypt(sealed.encode()), type=Flow)
    except (Undecipherable, msgspec.DecodeError, UnicodeError):
        return None
    return flow if listening.clock().timestamp() < flow.until else None


async def _first_use(database: Database, flow: Flow) -> bool:
    """Note that the sign-in has been used; False where it had been before."""
    key = f"connect_{hashlib.sha256(flow.state.encode()).hexdigest()}"
    async with database.acquire() as connection:
        return bool(
            await connection.fetchval(
                "insert into listening_keys (key, until) values ($1, $2) on conflict (key) do nothing returning true",
                key, datetime.fromtimestamp(flow.until, UTC),
            )
        )  # fmt: skip


def _storable(profile: Profile) -> Profile:
    """The profile as Postgres can keep it. Raises Failed where it is nobody's."""
    if not profile.id or "\0" in profile.id or len(profile.id) > _LONGEST:
        raise Failed("spotify", "a profile without an id", outcome="invalid")

    def cut(text: str | None) -> str | None:
        return text.replace("\0", "")[:_LONGEST] if text is not None else None

    return Profile(profile.id, cut(profile.email), cut(profile.display_name))


async def _connect(database: Database, listening: Listening, profile: Profile, tokens: Tokens) -> Connected:
    """Store the person and order an archive at once, in one transaction: who was polled this hour is passed over."""
    now = listening.clock()
    async with database.acquire() as connection, connection.transaction():
        connected = await people.connect(
            connection, listening.vault, profile, tokens, listening.settings.founding_cap, now
        )
        if connected.listener is not None:
            id_ = str(connected.listener)
            await queue.enqueue(connection, KIND, {"userIds": [id_]}, key=f"connected:{id_}")
    return connected


# -- pages ---------------------------------------------------------------------------------------------------------


def _told(
    status: int, title: str, *paragraphs: str, again: bool = False, cookies: list[Cookie] | None = None,
    retry_after: float | None = None,
) -> Reply:  # fmt: skip
    texts = (*paragraphs, _AGAIN_TEXT) if again else paragraphs
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    return Reply(pages.message(title, *texts, link=_AGAIN if again else None), status, headers, cookies or [])


def _waiting(connected: Connected, over: Cookie) -> Reply:
    text = f"Every place is taken. You are number {connected.place} on the waitlist; nothing is archived until then."
    keeps = "We keep your e-mail address for this, and nothing that would let us see what you hear."
    return _told(200, "You are on the waitlist", text, keeps, cookies=[over])


def _not_agreed(error: str, over: Cookie) -> Reply:
    if error == "access_denied":
        text = "You did not agree on Spotify's page, so nothing was stored. You can still change your mind."
        return Reply(pages.message("Not connected", text, link=_AGAIN), 200, {}, [over])
    return _told(400, "Spotify did not let you in", "It gave no reason that we know.", again=True, cookies=[over])


def _failed(error: ProviderError, over: Cookie) -> Reply:
    """Of what Spotify has refused: whether it is the code, the person, the load or our settings."""
    if error.code == "invalid_grant":
        return _told(400, "This sign-in is over", "Spotify no longer takes its code.", again=True, cookies=[over])
    if isinstance(error, Saturated):
        wait = error.retry_after or 1.0
        text = "Spotify does not answer at the moment."
        return _told(503, "Please try again later", text, again=True, cookies=[over], retry_after=wait)
    if error.status == 403:
        return _told(403, "Not open to you yet", "Spotify does not let this application see your account.",
                     cookies=[over])  # fmt: skip
    return _told(502, "Spotify did not let you in", "Its answer was not what we expect.", again=True, cookies=[over])


# -- and out -------------------------------------------------------------------------------------------------------


@route("POST", "/me/signout", answers={303: None}, access="listener", page=True)
async def me_signout(call: Call) -> Reply:
    """Sign out in this browser."""
    return Reply(None, 303, {"Location": "/"}, [session.end(call.resources["listening"])])


ROUTES = (connect_spotify, connect_spotify_callback, me_signout)
