"""Answers that are sent as they come. One that can't be finished breaks off: it must never look like a whole one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web
from multidict import CIMultiDict

# A client that takes no piece for so long is gone, or means to keep us busy.
_PIECE_SECONDS = 30.0


class BrokenOff(Exception):
    """Raised where an answer was begun and could not be finished; its cause says why.

    `by_client`: it hung up, or did not take what was sent. `response` is what was begun.
    """

    def __init__(self, response: web.StreamResponse, by_client: bool) -> None:
        super().__init__("an answer was broken off")
        self.response, self.by_client = response, by_client


async def streamed(
    request: web.Request, pieces: AsyncGenerator[bytes, None], status: int, headers: CIMultiDict[str]
) -> web.StreamResponse:
    """Send the pieces. What goes wrong before the first one is there is raised as it is, later on as BrokenOff."""
    async with aclosing(pieces):
        piece = await anext(pieces, b"")
        response = web.StreamResponse(status=status, headers=headers)
        await response.prepare(request)
        sending = False
        try:
            while piece:
                sending = True
                async with asyncio.timeout(_PIECE_SECONDS):
                    await response.write(piece)
                sending = False
                piece = await anext(pieces, b"")
            await response.write_eof()
        except Exception as error:
            if request.transport is not None:
                request.transport.abort()
            raise BrokenOff(response, sending) from error
    return response
