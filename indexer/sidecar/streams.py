"""Answers that are sent as they come. One that can't be finished breaks off: it must never look like a whole one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web
from multidict import CIMultiDict

# A client that takes no piece for so long, or the whole no sooner, is gone or means to keep us busy.
_PIECE_SECONDS = 30.0
_WHOLE_SECONDS = 900.0


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
        time, sending = asyncio.get_running_loop().time, False
        ends = time() + _WHOLE_SECONDS
        try:
            while piece:
                sending = True
                async with asyncio.timeout_at(min(time() + _PIECE_SECONDS, ends)):
                    await response.write(piece)
                sending = False
                piece = await anext(pieces, b"")
            await response.write_eof()
        except Exception as error:
            if request.transport is not None:
                request.transport.abort()
            raise BrokenOff(response, sending) from error
    return response
