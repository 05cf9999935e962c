"""Routes as feature modules declare them, for the tests of the API's frame."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field, model_validator

from indexer.sidecar.paging import Page
from indexer.sidecar.routes import Answer, Body, Call, Failure, Invalid, Query, Refused, Reply, Route, route


class Scope(Body):
    ids: Annotated[list[UUID], Field(min_length=1, max_length=3)] | None = None
    name: Annotated[str, Field(max_length=20)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Scope:
        if (self.ids is None) == (self.name is None):
            raise Invalid("Provide exactly one of scope.ids, scope.name")
        return self


class Order(Body):
    scope: Scope
    source: Literal["current", "historical"]
    count: int = Field(default=1, ge=1, le=10)


class Done(Answer):
    status: Literal["success"] = "success"
    source: str
    account: UUID


class Unpaid(Failure):
    checkout: str = Field(alias="checkoutUrl")


class Item(Query):
    item: UUID


class Filter(Query):
    kinds: list[Literal["a", "b"]] = Field(default=[])
    days: int = Field(default=30, ge=1)


class Seen(Answer):
    item: UUID
    kinds: list[str]
    days: int


class Number(Answer):
    number: int


@route("POST", "/api/orders", answers={202: Done, 402: Unpaid}, refuses=(404,))
async def order(call: Call, body: Order) -> Done:
    """Order something.

    It is done some day.
    """
    if body.scope.name == "unpaid":
        raise Refused(402, Unpaid(error="no card on file", checkout="https://pay.example"))
    if body.scope.name == "absent":
        raise Refused(404, "there is no such order")
    return Done(source=body.source, account=call.account)


@route("GET", "/api/items/{item}", answers={200: Seen})
async def item(call: Call, path: Item, query: Filter) -> Seen:
    """See an item."""
    return Seen(item=path.item, kinds=list(query.kinds), days=query.days)


@route("GET", "/api/pages", answers={200: Number})
async def pages(call: Call, query: Page) -> Number:
    """A page."""
    return Number(number=query.limit)


@route("GET", "/api/rows", answers={200: Number}, access="none")
async def rows(call: Call) -> Number:
    """What the database says."""
    async with call.database.acquire() as connection:
        return Number(number=await connection.fetchval("select 7"))


@route("POST", "/api/broken", answers={200: Number}, access="none")
async def broken(call: Call, body: Scope) -> Number:
    """A bug that quotes what was sent."""
    raise ValueError(f"can't do with {body.name}")


@route("GET", "/api/undeclared", answers={200: Number}, access="none")
async def undeclared(call: Call) -> Reply:
    """Answers what nobody has been told of."""
    return Reply(Number(number=1), 201)


@route("POST", "/api/small", answers={200: Number}, body_bytes=50)
async def small(call: Call, body: Scope) -> Number:
    """Takes little."""
    return Number(number=1)


@route("GET", "/api/internal/tick", answers={202: Number}, access="cron")
async def tick(call: Call) -> Number:
    """What the scheduler calls."""
    return Number(number=1)


class Held:
    """Requests to /api/slow wait for `go`; `begun` is set by the first."""

    def __init__(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()


@route("GET", "/api/slow", answers={200: Number}, access="none")
async def slow(call: Call) -> Number:
    """Takes its time."""
    held: Held = call.resources["held"]
    held.begun.set()
    await held.go.wait()
    return Number(number=2)


ROUTES: tuple[Route, ...] = (order, item, pages, rows, broken, undeclared, small, tick, slow)
GOOD = {"scope": {"name": "x"}, "source": "current"}
