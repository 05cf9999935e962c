"""What a person sees in a browser: the welcome, the own page, and its form."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal
from uuid import UUID

import jwt
from jwt.exceptions import PyJWTError
from pydantic import Field

from indexer.sidecar.listening import page_facts, page_view, people, reads, session
from indexer.sidecar.listening.page_facts import WindowName
from indexer.sidecar.listening.reads import Older
from indexer.sidecar.listening.service import Listening
from indexer.sidecar.paging import decode
from indexer.sidecar.routes import HTML, Call, Form, Link, Refused, Reply, route

_HEADERS = {"Content-Security-Policy": page_view.POLICY}
_PURPOSE, _ALGORITHM = "form", "HS256"
_FORM_LASTS = timedelta(days=1)


@route("GET", "/", answers={200: HTML, 303: None}, access="visitor", page=True)
async def welcome(call: Call) -> Reply:
    """What this is, and the way in; who is signed in is sent on to the own page."""
    listening: Listening = call.resources["listening"]
    settings = listening.settings
    found = session.read(listening, call.cookies)
    async with call.database.acquire() as connection:
        if found is not None and await people.exists(connection, found.listener):
            return Reply(None, 303, {"Location": "/me"})
        left = await page_facts.places_left(connection, settings.founding_cap)
    open_ = settings.token_key is not None
    return Reply(page_view.welcome(left, settings.session_days, open_=open_), 200, _HEADERS)


class PageLink(Link):
    window: WindowName = Field(default="30d", description="of the most played")
    older: Annotated[str, Field(max_length=500)] | None = Field(default=None, description="where the timeline begins")


@route(
    "GET", "/me", answers={200: HTML, 303: None}, access="listener", page=True, signed_out="/"
)  # fmt: skip
async def me(call: Call, query: PageLink) -> Reply:
    """A person's own page: how it goes with the archive, what was heard most, and when."""
    listening: Listening = call.resources["listening"]
    now, place = listening.clock(), decode(Older, query.older)
    async with call.database.acquire() as connection:
        found = await page_facts.facts(connection, call.listener, query.window, place, now)
    if found is None:  # deleted while we looked
        return Reply(None, 303, {"Location": "/"}, (session.end(listening),))
    token = form_token(listening, call.listener)
    body = page_view.person(found, query.window, now, form_token=token, newest=place is None)
    return Reply(body, 200, _HEADERS)


class Deletion(Form):
    token: Annotated[str, Field(max_length=1_000)] = Field(description="from the form on the person's page")
    sure: Literal["yes"] = Field(description="that it is no slip")


@route("POST", "/me/delete", answers={303: None}, refuses=(403,), access="listener", page=True, signed_out="/")
async def delete_by_form(call: Call, body: Deletion) -> Reply:
    """Delete the person with all that was archived, by the page's form, as DELETE /me does."""
    listening: Listening = call.resources["listening"]
    if not _is_form_token(listening, call.listener, body.token):
        raise Refused(403, "the form is too old: open your page again")
    async with call.database.acquire() as connection, connection.transaction():
        await reads.delete(connection, call.listener)
    return Reply(None, 303, {"Location": "/"}, (session.end(listening),))


def form_token(listening: Listening, listener: UUID) -> str:
    """Shows that a form comes from this person's page, of not long ago: no other site can read it there.

    Not bound to the cookie itself, which may be renewed while the page is open.
    """
    until = int((listening.clock() + _FORM_LASTS).timestamp())
    claims = {"sub": str(listener), "exp": until}
    return jwt.encode(claims, listening.vault.keys_for(_PURPOSE)[0], _ALGORITHM)


def _is_form_token(listening: Listening, listener: UUID, text: str) -> bool:
    now = listening.clock().timestamp()
    for key in listening.vault.keys_for(_PURPOSE):
        try:
            claims = jwt.decode(
                text, key, algorithms=[_ALGORITHM], options={"require": ["sub", "exp"], "verify_exp": False}
            )
        except PyJWTError:
            continue
        return bool(claims["sub"] == str(listener) and now < claims["exp"])
    return False


ROUTES = (welcome, me, delete_by_form)
