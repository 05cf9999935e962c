"""structlog: one event a line, JSON off a terminal; repeated warnings are thinned out."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any, TextIO

import structlog

from indexer.config import LogSettings


def configure(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Set up structlog for the process: JSON lines in UTC, or readable lines on a terminal."""
    stream = stream or sys.stderr
    console = settings.format == "console" or (settings.format == "auto" and stream.isatty())
    renderer: Any
    if console:
        renderer = structlog.dev.ConsoleRenderer(colors=stream.isatty())
    else:
        renderer = structlog.processors.JSONRenderer(default=str)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(level=logging.WARNING, handlers=[_Libraries()], force=True)


class _Libraries(logging.Handler):
    """What libraries log in their own way (asyncpg's pool, asyncio) as one event a line, too."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if error is not None:
            fields["error"] = f"{type(error).__name__}: {error}"
        if record.levelno >= logging.ERROR:
            get().error("library", **fields, exc_info=error)
        else:
            get().warning("library", **fields)


def get() -> Any:
    """The process's logger."""
    return structlog.get_logger()


class Thinned:
    """A warning that is said at most once a minute, and once more when it is over."""

    def __init__(self, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._said: dict[str, float] = {}
        self._held: dict[str, int] = {}

    def warning(self, event: str, /, *, about: str = "", **fields: Any) -> None:
        """Warn of `event`, or count it if the same (about the same thing) was said within the last minute."""
        key, now = f"{event} {about}", time.monotonic()
        if now - self._said.get(key, -1e9) < self._seconds:
            self._held[key] = self._held.get(key, 0) + 1
            return
        self._said[key] = now
        repeats = self._held.pop(key, 0)
        get().warning(event, **fields, **({"repeats": repeats} if repeats else {}))

    def over(self, event: str, /, *, about: str = "", **fields: Any) -> None:
        """Say that what `event` warned of is over, if it was ever said."""
        key = f"{event} {about}"
        if self._said.pop(key, None) is not None:
            repeats = self._held.pop(key, 0)
            get().info(f"{event}: over", **fields, **({"repeats": repeats} if repeats else {}))
