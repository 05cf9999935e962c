"""What must stand in no log, metric or error: the tokens, e-mails and names that the tests' people have."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import pytest

from indexer import log

# as the stand-ins and the kits make them
_PERSONAL = re.compile(
    r"spotify-test-(?:access|refresh|code)-[\w-]+|spotify-test-token-\d+|[\w.+-]+@(?:listeners\.example|example\.org)"
    r"|Name-of-\w+"
)


def personal(text: str) -> list[str]:
    """What in the text is a person's."""
    return _PERSONAL.findall(text)


class Tee:
    """A stream that also keeps what is written."""

    def __init__(self, stream: TextIO, kept: list[str]) -> None:
        self._stream, self._kept = stream, kept

    def write(self, text: str) -> int:
        self._kept.append(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def overheard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All that the process logs, and all errors that its API answers, while the block runs."""
    said: list[str] = []
    configure = log.configure

    def listened(settings: Any, stream: TextIO | None = None) -> None:
        configure(settings, Tee(stream or sys.stderr, said))  # type: ignore[arg-type]

    monkeypatch.setattr(log, "configure", listened)
    for name in ("middleware", "api"):
        module = sys.modules.get(f"indexer.sidecar.{name}")
        if module is not None:
            monkeypatch.setattr(module, "failed", _kept(module.failed, said))
    pages = sys.modules.get("indexer.sidecar.pages")
    if pages is not None:
        monkeypatch.setattr(pages, "message", _kept_page(pages.message, said))
    yield said


def _kept(failed: Any, said: list[str]) -> Any:
    def answered(status: int, failure: Any, headers: Any) -> Any:
        response = failed(status, failure, headers)
        said.append(response.text)
        return response

    return answered


def _kept_page(message: Any, said: list[str]) -> Any:
    def answered(*texts: str, **named: Any) -> bytes:
        page: bytes = message(*texts, **named)
        said.append(page.decode())
        return page

    return answered
