"""Ids of requests: the caller's own where it is one, so that a request can be followed through many programs."""

from __future__ import annotations

import os
import re

HEADER = "X-Request-Id"

# Shorter than a key or a token: neither gets into logs by standing in the wrong header.
_SANE = re.compile(r"[A-Za-z0-9._-]{1,48}")


def request_id(given: str | None) -> str:
    """What the caller sent, if it may stand in logs and headers; else a new one."""
    if given is not None and _SANE.fullmatch(given):
        return given
    return os.urandom(12).hex()
