"""Who a browser belongs to: a session, signed (HS256) by a key that is derived from listening.token_key.

Nothing of it is stored. It ends with its time, with the person's data, or with the keys of the settings; whoever comes
back within that time gets a new one every day.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import jwt
import msgspec
from jwt.exceptions import PyJWTError

from indexer.config import ListeningSettings
from indexer.errors import ConfigError
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.routes import Cookie

_PURPOSE = "session"
_ALGORITHM = "HS256"
_RENEWED_AFTER = timedelta(days=1)
# The times are compared with the listening jobs' clock, and not by the library with its own.
_OPTIONS: Any = {"require": ["sub", "iat", "exp"], "verify_exp": False, "verify_iat": False, "verify_nbf": False}


class Session(msgspec.Struct, frozen=True):
    """Whose, and since when."""

    listener: UUID
    issued_at: datetime


def secure(settings: ListeningSettings) -> bool:
    """Whether people's browsers come by https, so that cookies can be kept to it."""
    return urlsplit(settings.public_url).scheme == "https"


def cookie_name(settings: ListeningSettings) -> str:
    """With the prefix, a browser takes the cookie from nobody but this host itself."""
    return "__Host-listener" if secure(settings) else "listener"


def begin(listening: Listening, listener: UUID) -> Cookie:
    """A new session, as a cookie. Raises ConfigError where no key is set."""
    issued, lasts = listening.clock(), timedelta(days=listening.settings.session_days)
    claims = {
        "sub": str(listener), "iat": int(issued.timestamp()), "exp": int((issued + lasts).timestamp()),
        "purpose": _PURPOSE,
    }  # fmt: skip
    text = jwt.encode(claims, listening.vault.keys_for(_PURPOSE)[0], _ALGORITHM)
    return _cookie(listening, text, int(lasts.total_seconds()))


def end(listening: Listening) -> Cookie:
    """Takes the session's cookie back."""
    return _cookie(listening, "", 0)


def _cookie(listening: Listening, text: str, seconds: int) -> Cookie:
    settings = listening.settings
    return Cookie(cookie_name(settings), text, seconds, secure=secure(settings))


def read(listening: Listening, cookies: Mapping[str, str]) -> Session | None:
    """The session of these cookies, if there is one that is ours and still lasts."""
    text = cookies.get(cookie_name(listening.settings))
    if not text:
        return None
    try:
        keys = listening.vault.keys_for(_PURPOSE)
    except ConfigError:
        return None
    now = listening.clock()
    return next((found for key in keys if (found := _verified(text, key, now)) is not None), None)


def _verified(text: str, key: bytes, now: datetime) -> Session | None:
    try:
        claims = jwt.decode(text, key, algorithms=[_ALGORITHM], options=_OPTIONS)
        issued, until = (datetime.fromtimestamp(claims[name], UTC) for name in ("iat", "exp"))
        session = Session(UUID(claims["sub"]), issued)
    except (PyJWTError, ValueError, TypeError, RecursionError, OverflowError, OSError):
        return None
    return session if claims.get("purpose") == _PURPOSE and now < until else None


def renewal(listening: Listening, session: Session) -> Cookie | None:
    """The session once more, from now on, if it is older than a day."""
    if listening.clock() - session.issued_at < _RENEWED_AFTER:
        return None
    return begin(listening, session.listener)
