"""Bearer tokens: JWTs that are signed with a shared secret (HS256), or with keys that a JWKS shows (RS256, ES256).

The algorithm is the key's and never the token's choice.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from uuid import UUID

import aiohttp
import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.exceptions import PyJWTError

from indexer import log
from indexer.config import AuthSettings
from indexer.errors import ConfigError, Temporary

# clocks differ a little
_LEEWAY_SECONDS = 5.0
_FETCH_SECONDS = 5.0
_MOST_BYTES = 1 << 20
# a key that its issuer has taken back is refused after so long at most
_FRESH_SECONDS = 300.0
# between two fetches, whatever unknown ids of keys come
_PAUSE_SECONDS = 10.0
_LEAST_BITS = 2048


class KeysUnavailable(Temporary):
    """The issuer's keys can't be fetched, and none are known."""


class Tokens:
    """Checks tokens as the settings say; raises ConfigError where they can't work."""

    def __init__(self, settings: AuthSettings) -> None:
        self._settings = settings
        self._jwks = Jwks(settings.jwks_url) if settings.jwks_url is not None else None
        if settings.jwt_secret is not None:
            try:
                jwt.encode({}, settings.jwt_secret.get_secret_value(), "HS256")
            except PyJWTError:
                text = "auth.jwt_secret is the key of another algorithm: show public keys at an auth.jwks_url"
                raise ConfigError(text) from None

    async def close(self) -> None:
        if self._jwks is not None:
            await self._jwks.close()

    async def account(self, token: str) -> UUID | None:
        """The account of a good token, or None. Raises KeysUnavailable."""
        try:
            key, algorithm = await self._key(token)
            if key is None:
                return None
            claims = jwt.decode(
                token, key, algorithms=[algorithm], audience=self._settings.jwt_audience,
                issuer=self._settings.jwt_issuer, leeway=_LEEWAY_SECONDS,
                options={"require": ["exp", "sub"], "verify_aud": self._settings.jwt_audience is not None},
            )  # fmt: skip
            return UUID(claims["sub"])
        except (PyJWTError, ValueError, TypeError, RecursionError, OverflowError):
            return None

    async def _key(self, token: str) -> tuple[Any, str]:
        """The key to check with and its algorithm; no key where none fits."""
        if self._settings.jwt_secret is not None:
            return self._settings.jwt_secret.get_secret_value(), "HS256"
        if self._jwks is None:
            return None, ""
        id_ = jwt.get_unverified_header(token).get("kid")
        return await self._jwks.find(id_ if isinstance(id_, str) else None)


class Jwks:
    """The public keys at an address, fetched when they are old or when one is asked for that is unknown."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._keys: dict[str | None, tuple[Any, str]] = {}
        self._fetched_at = self._tried_at = -1e9
        self._fetching = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None
        self._warned = log.Thinned()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def find(self, id_: str | None) -> tuple[Any, str]:
        """The key of this id (without one: the only key) and its algorithm, or (None, "")."""
        if self._wanted(id_):
            async with self._fetching:
                if self._wanted(id_):
                    await self._fetch()
        if not self._keys:
            raise KeysUnavailable("the keys at auth.jwks_url can't be had")
        if id_ is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(id_, (None, ""))

    def _wanted(self, id_: str | None) -> bool:
        now = time.monotonic()
        unknown = id_ not in self._keys and not (id_ is None and len(self._keys) == 1)
        return (unknown or now - self._fetched_at > _FRESH_SECONDS) and now - self._tried_at > _PAUSE_SECONDS

    async def _fetch(self) -> None:
        """Fetch the keys; where that fails, those that are known stay."""
        try:
            found = usable(await self._answer())
        except (aiohttp.ClientError, OSError, ValueError, RecursionError, PyJWTError) as error:
            self._warned.warning("token keys not fetched", error=type(error).__name__, known=len(self._keys))
        else:
            self._keys, self._fetched_at = found, time.monotonic()
            self._warned.over("token keys not fetched", known=len(found))
        finally:
            self._tried_at = time.monotonic()

    async def _answer(self) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_FETCH_SECONDS))
        async with self._session.get(self._url, allow_redirects=False) as response:
            if response.status != 200:
                raise ValueError("another answer than 200")
            raw = bytearray()
            async for piece in response.content.iter_chunked(1 << 16):
                raw += piece
                if len(raw) > _MOST_BYTES:
                    raise ValueError("an answer that is too long")
        return json.loads(raw)


def usable(found: Any) -> dict[str | None, tuple[Any, str]]:
    """The keys of a JWKS with which we check signatures, by id: RSA of 2,048 bits or more, and P-256."""
    keys: dict[str | None, tuple[Any, str]] = {}
    for one in found["keys"] if isinstance(found, dict) and isinstance(found.get("keys"), list) else []:
        if not isinstance(one, dict) or one.get("use", "sig") != "sig":
            continue
        id_ = one.get("kid")
        try:
            # An HMAC key (kty oct) has no place in a public list; it falls through both tests below.
            key = jwt.PyJWK(one).key
        except (PyJWTError, ValueError, TypeError, KeyError):
            continue
        if isinstance(key, RSAPublicKey) and key.key_size >= _LEAST_BITS:
            keys[id_ if isinstance(id_, str) else None] = (key, "RS256")
        elif isinstance(key, EllipticCurvePublicKey) and key.curve.name == "secp256r1":
            keys[id_ if isinstance(id_, str) else None] = (key, "ES256")
    if not keys:
        raise ValueError("no key that can be used")
    return keys
