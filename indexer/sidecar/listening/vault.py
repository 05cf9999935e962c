"""People's tokens at rest: encrypted (Fernet: AES-128-CBC with HMAC) by keys derived from those of the settings.

The newest key encrypts, any of them decrypts, so that a key is replaced without anybody having to connect anew:
put the new one first, the old one under old_token_keys, run `indexer keys rotate-tokens`, and drop the old one.
"""

from __future__ import annotations

import base64

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from indexer.config import ListeningSettings
from indexer.errors import ConfigError

_UNSET = "set listening.token_key: people's tokens are encrypted by it (32 random bytes, as `openssl rand -base64 32`)"


class Undecipherable(Exception):
    """None of the keys has encrypted this."""


class Vault:
    """Encrypts and decrypts; also derives the keys that sign sessions. Raises ConfigError where no key is set."""

    def __init__(self, settings: ListeningSettings) -> None:
        if settings.token_key is None:
            raise ConfigError(_UNSET)
        self._secrets = [key.get_secret_value() for key in (settings.token_key, *settings.old_token_keys)]
        fernets = [Fernet(base64.urlsafe_b64encode(derived(secret, "tokens"))) for secret in self._secrets]
        self._newest, self._any = fernets[0], MultiFernet(fernets)

    def encrypt(self, text: str) -> bytes:
        return self._newest.encrypt(text.encode())

    def decrypt(self, secret: bytes) -> str:
        """Raises Undecipherable."""
        try:
            return self._any.decrypt(secret).decode()
        except InvalidToken:
            raise Undecipherable("a token was encrypted by a key that is not in the settings") from None

    def renewed(self, secret: bytes) -> bytes | None:
        """The same encrypted by the newest key, or None where it is already. Raises Undecipherable."""
        try:
            self._newest.decrypt(secret)
        except InvalidToken:
            return self.encrypt(self.decrypt(secret))
        return None

    def keys_for(self, purpose: str) -> list[bytes]:
        """Keys for something else than tokens, the newest first."""
        return [derived(secret, purpose) for secret in self._secrets]


def derived(secret: str, purpose: str) -> bytes:
    """32 bytes that tell nothing of the secret nor of what it gives for another purpose (HKDF)."""
    return HKDF(SHA256(), 32, salt=None, info=f"indexer listening {purpose}".encode()).derive(secret.encode())
