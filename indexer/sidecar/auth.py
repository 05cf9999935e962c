"""Who calls: an account by its API key or bearer token, the scheduler by the cron secret, a listener by a session."""

from __future__ import annotations

import hmac
import math
from datetime import UTC, datetime
from urllib.parse import urlsplit
from uuid import UUID

from aiohttp import web

from indexer.config import Settings
from indexer.db import Database
from indexer.limits import Buckets, Recent, remote_address
from indexer.sidecar import keys
from indexer.sidecar.keys import Key
from indexer.sidecar.listening import people, session
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.listening.session import Session
from indexer.sidecar.routes import Access, Caller, Cookie, Refused
from indexer.sidecar.tokens import Tokens

EITHER = "Exactly one of x-api-key or Authorization must be provided"
# One text for a key that is unknown, expired or no key at all: which of these it is concerns nobody.
WRONG = "The API key or the token is not valid"
BUSY = "Too many requests"
SIGNED_OUT = "Sign in with Spotify to see what is yours"
CROSS_SITE = "Another site's page may not change what is yours"

# What was looked up is trusted for so long: a revoked key, or a deleted account, is refused after that at the latest.
_TRUSTED_SECONDS = 5.0
_CHALLENGE = {"WWW-Authenticate": "Bearer"}
# What a person's own browser can come to; an export alone takes a while.
_LISTENER_PER_MINUTE, _LISTENER_BURST = 300, 100
# as browsers say where a request comes from: none is the person's own doing
_OWN_SITE = ("same-origin", "none")


class Auth:
    """Decides on each request. An address that failed too often gets no query of the database for a while."""

    def __init__(self, settings: Settings, database: Database, listening: Listening | None = None) -> None:
        self._settings, self._database, self._listening = settings, database, listening
        self._tokens = Tokens(settings.auth)
        self._keys: Recent[str, Key] = Recent(_TRUSTED_SECONDS)
        self._accounts: Recent[UUID, bool] = Recent(_TRUSTED_SECONDS)
        self._requests: Buckets[UUID] = Buckets(settings.sidecar.requests_per_minute, settings.sidecar.burst)
        failures = settings.sidecar.failures_per_minute
        self._failures: Buckets[str] = Buckets(failures, failures)
        self._people: Buckets[UUID] = Buckets(_LISTENER_PER_MINUTE, _LISTENER_BURST)
        visits = settings.listening.visits_per_minute
        self._visits: Buckets[str] = Buckets(visits, visits)

    async def close(self) -> None:
        await self._tokens.close()

    async def caller(self, request: web.Request, access: Access) -> Caller | None:
        """The account that calls, None where no account is. Raises Refused: 401, 429, or 500 without a cron secret."""
        if access == "none":
            return None
        if access == "visitor":
            if wait := self._visits.take(self._address(request)):
                raise _busy(wait)
            return None
        if access == "cron":
            self._check_cron(request)
            return None
        key, header = _credentials(request)
        address = self._address(request)
        trusted_only = self._failures.wait(address) > 0
        caller = await self._by_key(key, trusted_only) if key is not None else None
        if header is not None and (token := _bearer(header)):
            caller = await self._by_token(token, trusted_only)
        if caller is None:
            raise self._failed(address)
        if wait := self._requests.take(caller.account):
            raise _busy(wait)
        return caller

    async def listener(self, request: web.Request, *, changes: bool) -> tuple[Session, Cookie | None]:
        """Whose session came, and its renewal where it is due. No key and no token counts here.

        Raises Refused: 401, 429, or 403 where `changes` are asked for by the page of another site.
        """
        found = session.read(self._listening, request.cookies) if self._listening is not None else None
        if found is None or self._listening is None:
            raise Refused(401, SIGNED_OUT)
        if changes and not self._same_site(request):
            raise Refused(403, CROSS_SITE)
        if wait := self._people.take(found.listener):
            raise _busy(wait)
        async with self._database.acquire() as connection:
            if not await people.exists(connection, found.listener):
                raise Refused(401, SIGNED_OUT)
        return found, session.renewal(self._listening, found)

    def _same_site(self, request: web.Request) -> bool:
        """Whether nothing says that the request comes from elsewhere; SameSite has kept such cookies back already."""
        site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
        if site is not None and site not in _OWN_SITE:
            return False
        if origin is None or (origin == "null" and site is not None):  # a page may keep its origin to itself
            return True
        own = urlsplit(self._settings.listening.public_url)
        return origin == f"{own.scheme}://{own.netloc}" or urlsplit(origin).netloc == request.host

    async def _by_key(self, text: str, trusted_only: bool) -> Caller | None:
        id_ = keys.id_of(text)
        if id_ is None:
            return None
        key = self._keys.get(id_)
        if key is None and not trusted_only:
            async with self._database.acquire() as connection:
                key = await keys.find(connection, id_)
                if key is None or not key.is_of(text):
                    return None
                if not key.used_lately:
                    await keys.note_use(connection, id_)
            self._keys.put(id_, key)
        if key is None or not key.is_of(text) or (key.expires_at and key.expires_at <= datetime.now(UTC)):
            return None
        return Caller(key.account, id_)

    async def _by_token(self, token: str, trusted_only: bool) -> Caller | None:
        account = await self._tokens.account(token)
        if account is None:
            return None
        if not self._accounts.get(account):
            if trusted_only:
                return None
            async with self._database.acquire() as connection:
                if not await keys.account_exists(connection, account):
                    return None
            self._accounts.put(account, True)
        return Caller(account)

    def _check_cron(self, request: web.Request) -> None:
        secret = self._settings.auth.cron_secret
        if secret is None:
            raise Refused(500, "no cron secret is configured")
        headers = request.headers.getall("Authorization", [])
        given = _bearer(headers[0]) if len(headers) == 1 else None
        if given is None or not hmac.compare_digest(_bytes(given), secret.get_secret_value().encode()):
            raise self._failed(self._address(request))

    def _failed(self, address: str) -> Refused:
        """Count a failure; the answer to it."""
        wait = self._failures.take(address)
        return _busy(wait) if wait else Refused(401, WRONG, _CHALLENGE)

    def _address(self, request: web.Request) -> str:
        forwarded = ",".join(request.headers.getall("X-Forwarded-For", []))
        return remote_address(request.remote, forwarded, self._settings.sidecar.trusted_proxies)


def _credentials(request: web.Request) -> tuple[str | None, str | None]:
    """The API key or the Authorization header, of which exactly one is there, once."""
    given = request.headers.getall("x-api-key", []), request.headers.getall("Authorization", [])
    if len(given[0]) + len(given[1]) != 1:
        raise Refused(401, EITHER, _CHALLENGE)
    return (given[0][0], None) if given[0] else (None, given[1][0])


def _bearer(header: str) -> str | None:
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _bytes(text: str) -> bytes:
    """What stood in a header: aiohttp decodes what is no UTF-8 into lone surrogates."""
    return text.encode("utf-8", "surrogateescape")


def _busy(wait: float) -> Refused:
    return Refused(429, BUSY, {"Retry-After": str(math.ceil(wait))})
