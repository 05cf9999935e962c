"""What systemd is told (sd_notify): ready, a line of status, stopping, and that there is progress. Else nothing.

A unit with Type=notify puts the address of a datagram socket into $NOTIFY_SOCKET, and the time after which it kills a
process that has gone silent into $WATCHDOG_USEC.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import NamedTuple

from indexer import log

_STARTING_SECONDS = 0.1
_LONGEST_SECONDS = 5.0
_LONGEST_STATUS = 300
_thinned = log.Thinned()


class Standing(NamedTuple):
    """How a process stands: the answers of its /readyz and /livez, and a line for `systemctl status`."""

    ready: bool
    live: bool
    status: str


def notify(*lines: str) -> bool:
    """Send the lines (READY=1, STATUS=...) to systemd; False where there is none, or where it can't be reached."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.setblocking(False)  # a full socket costs one message, never the loop's time
            # an abstract address is written with an @ where its NUL is
            sender.sendto("\n".join(lines).encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        _thinned.warning("systemd not told", error=error.strerror or str(error))
        return False
    return True


def watchdog_seconds() -> float | None:
    """Silence after which systemd kills this process; None if it does not."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(os.environ.get("WATCHDOG_USEC") or 0) / 1e6 or None


async def keep_told(standing: Callable[[], Standing]) -> None:
    """Tell systemd how the process stands, until cancelled: READY once it is, and WATCHDOG only while it is live."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return
    silence = watchdog_seconds()
    pause = min(_LONGEST_SECONDS, (silence or _LONGEST_SECONDS) / 2)
    told: str | None = None
    ready = False
    try:
        while True:
            now = standing()
            news = [] if ready or not now.ready else ["READY=1"]
            news += [] if now.status == told else [_status(now)]
            beat = ["WATCHDOG=1"] if silence is not None and now.live else []
            if (news or beat) and notify(*news, *beat):
                told, ready = now.status, ready or now.ready
            await asyncio.sleep(pause if ready else min(pause, _STARTING_SECONDS))
    finally:
        notify("STOPPING=1", _status(standing()))


def _status(standing: Standing) -> str:
    """One line, whatever an error's text brings: a second one would be another message."""
    return "STATUS=" + " ".join(standing.status.split())[:_LONGEST_STATUS]
