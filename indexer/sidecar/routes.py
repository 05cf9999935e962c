"""Routes, as feature modules declare them. The API and its OpenAPI document are both made of these declarations.

    class Window(Query):
        window: Literal["30d", "365d"] = "365d"

    @route("GET", "/api/research/tracks/{track}/measurements", answers={200: Series}, refuses=(404,))
    async def measurements(call: Call, path: Track, query: Window) -> Series: ...

    ROUTES = (measurements,)

The function takes the call and what it needs of `body`, `query` and `path`, whose types say what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from http.cookies import Morsel
from typing import Any, Literal, NoReturn, TypeAlias, get_type_hints
from uuid import UUID

import msgspec
from pydantic import BaseModel, ConfigDict

from indexer.config import Settings
from indexer.db import Database

Access: TypeAlias = Literal["account", "cron", "listener", "visitor", "none"]
Model: TypeAlias = type[BaseModel]

HTML = "text/html; charset=utf-8"

_PARTS = frozenset({"body", "query", "path"})


class Body(BaseModel):
    """Base of what is sent as JSON: nothing unknown, nothing converted (a text is no number)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class Form(BaseModel):
    """Base of what a page's form sends: texts, as behind a `?`, but in the body."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Query(BaseModel):
    """Base of the parameters behind a `?` and of those in a path, which are all texts at first."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Link(Query):
    """Base of the parameters of a page: what others put behind its address is passed over."""

    model_config = ConfigDict(extra="ignore")


class Answer(BaseModel):
    """Base of what is answered: sent under the names of its aliases, unset fields too."""

    model_config = ConfigDict(frozen=True, serialize_by_alias=True, validate_by_name=True, validate_by_alias=True)


class Failure(Answer):
    """Every answer of 400 and above."""

    status: Literal["error"] = "error"
    error: str


class Invalid(ValueError):
    """Raised in a model's validators: its text is the whole answer, and quotes nothing of what was sent.

    The text of any other ValueError is not shown: who knows what it quotes.
    """


class Refused(Exception):
    """Raised in a route's function: the answer is an error. `failure` is its text, or a Failure with further fields."""

    def __init__(self, status: int, failure: str | Failure, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.headers = status, headers or {}
        self.failure = Failure(error=failure) if isinstance(failure, str) else failure


class Cookie(msgspec.Struct, frozen=True):
    """A cookie that no script reads and no other site's form or picture sends along; `seconds` 0 takes it back."""

    name: str
    value: str
    seconds: int
    path: str = "/"
    secure: bool = True

    @property
    def header(self) -> str:
        """As Set-Cookie has it."""
        morsel: Morsel[str] = Morsel()
        morsel.set(self.name, self.value, self.value)
        morsel["path"], morsel["max-age"], morsel["samesite"] = self.path, str(self.seconds), "Lax"
        morsel["httponly"], morsel["secure"] = True, self.secure
        return morsel.OutputString()


class Reply(msgspec.Struct, frozen=True):
    """An answer with another status than the route's first, with headers and cookies, or none of a model.

    `value`: a model, bytes, a generator of bytes that are sent as they come, or None, each as the route declares it.
    """

    value: BaseModel | bytes | AsyncGenerator[bytes, None] | None
    status: int
    headers: Mapping[str, str] = {}
    cookies: Sequence[Cookie] = ()


class Caller(msgspec.Struct, frozen=True):
    """Who calls: the account, and the id of its API key unless it came with a token."""

    account: UUID
    key: str | None = None


class Call(msgspec.Struct, frozen=True):
    """What a route's function may use. `resources` are the providers' clients by name; `log` knows the request.

    `person` is whose session came, where access is "listener". `cookies` are there for pages and people's routes.
    """

    database: Database
    settings: Settings
    resources: Mapping[str, Any]
    request_id: str
    log: Any
    caller: Caller | None = None
    person: UUID | None = None
    cookies: Mapping[str, str] = {}

    @property
    def account(self) -> UUID:
        """The caller's account. What is another's must look as if it were not there."""
        if self.caller is None:
            raise LookupError("this route is not open to accounts: declare access='account'")
        return self.caller.account

    @property
    def listener(self) -> UUID:
        """Whose session it is: of what is archived, this person's alone may be told."""
        if self.person is None:
            raise LookupError("this route is not open to listeners: declare access='listener'")
        return self.person


Function: TypeAlias = Callable[..., Awaitable[BaseModel | Reply]]


class Route(msgspec.Struct, frozen=True):
    """A route with its function and all that can be said of it; made by `@route`."""

    method: str
    path: str
    function: Function
    access: Access
    answers: Mapping[int, Model | str | None]
    refuses: Sequence[int]
    parts: Mapping[str, Model]
    body_bytes: int | None
    page: bool
    signed_out: str | None

    @property
    def status(self) -> int:
        """Of an answer that names no other."""
        return next(iter(self.answers))

    @property
    def statuses(self) -> frozenset[int]:
        """All that the route may answer, those of the frame as well."""
        found = {*self.answers, *self.refuses, 500}
        if self.parts:
            found.add(400)
        if "body" in self.parts:
            found.update((408, 413, 415))
        if self.access != "none":
            found.update((429,) if self.access == "visitor" else (401, 429))
        if self.access == "listener" and self.changes:
            found.add(403)
        return frozenset(found)

    @property
    def changes(self) -> bool:
        """Whether it changes something, so that no other site's page may have the browser ask."""
        return self.method != "GET"


def route(
    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"], path: str, *,
    answers: Mapping[int, Model | str | None], refuses: Sequence[int] = (), access: Access = "account",
    body_bytes: int | None = None, page: bool = False, signed_out: str | None = None,
) -> Callable[[Function], Route]:  # fmt: skip
    """Make a route of `async def f(call, body, query, path)`, of which the last three are there where it takes them.

    `answers`: by status the model, the media type of bytes, or None for a redirect; the first is what a plain return
    gives. `refuses`: the statuses of Refused, beside those of the frame (Route.statuses). `access`: an account's key
    or token, the cron secret, a listener's session, or nobody is asked, of whom a visitor may come only so often.
    `body_bytes`: the largest body, by default that of the settings. `page`: browsers open it themselves, so that its
    errors are pages. `signed_out`: where a browser without a session is sent, instead of an error.
    """

    def make(function: Function) -> Route:
        hints = get_type_hints(function)
        parts = {name: hints[name] for name in hints if name in _PARTS}
        made = Route(method, path, function, access, dict(answers), tuple(refuses), parts, body_bytes, page, signed_out)
        _check(made, set(hints) - _PARTS - {"return"})
        return made

    return make


def _check(one: Route, others: set[str]) -> None:
    """A slip in a declaration is seen when its module is imported."""
    if others != {"call"}:
        _wrong(one, f"takes call, and perhaps body, query and path, not {', '.join(sorted(others)) or 'nothing'}")
    named = set(re.findall(r"{(\w+)}", one.path))
    path = one.parts.get("path")
    if named != (set(path.model_fields) if path else set()):
        _wrong(one, "has other fields in its path's model than in its path")
    if "body" in one.parts and one.method == "GET":
        _wrong(one, "is a GET, which has no body")
    if not one.function.__doc__:
        _wrong(one, "says nothing about itself: its docstring is its description")
    for status in (*one.answers, *one.refuses):
        HTTPStatus(status)


def _wrong(one: Route, what: str) -> NoReturn:
    raise TypeError(f"{one.method} {one.path} {what}")
