"""POST /api/research/measurement-jobs: have songs measured, now or in the past. Auth, body, payment, work."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field, ModelWrapValidatorHandler, RootModel, ValidationError, model_validator

from indexer.sidecar import drain, scope, snapshots
from indexer.sidecar.providers import Payments, ProviderError, Saturated
from indexer.sidecar.routes import Answer, Body, Call, Failure, Invalid, Refused, route
from indexer.sidecar.scope import NoCatalog, Unfinished
from indexer.sidecar.snapshots import Order, OverCap, Placed

NO_CATALOG = "There is no such catalog"
_ONE_SCOPE = "Provide exactly one of scope.catalog_id, scope.album_ids, scope.isrcs"
_NOTHING = "No recordings resolvable from the given scope: no song or album is known by it"
_NO_CARD = "A card on file is required for historical measurements: leave one at checkoutUrl, which costs nothing"
_MOST_ISRCS, _MOST_ALBUMS = 50_000, 1_000

Isrc = Annotated[str, Field(pattern=r"^[A-Za-z]{2}-?[A-Za-z0-9]{3}-?[0-9]{2}-?[0-9]{5}$")]
AlbumId = Annotated[str, Field(pattern=r"^[0-9A-Za-z]{1,64}$")]


class MeasurementScope(Body):
    """What is to be measured: exactly one of the three."""

    catalog_id: UUID | None = Field(default=None, description="a catalog of the account")
    album_ids: Annotated[list[AlbumId], Field(min_length=1, max_length=_MOST_ALBUMS)] | None = Field(
        default=None, description="albums by their Spotify id"
    )
    isrcs: Annotated[list[Isrc], Field(min_length=1, max_length=_MOST_ISRCS)] | None = Field(
        default=None, description="songs by their ISRC"
    )

    @model_validator(mode="wrap")
    @classmethod
    def _exactly_one(cls, values: Any, handler: ModelWrapValidatorHandler[MeasurementScope]) -> MeasurementScope:
        """Whatever is no scope at all gets the same text; a wrong entry or too many of them are named."""
        try:
            made = handler(values)
        except ValidationError as error:
            details = error.errors(include_url=False, include_input=False)
            if any(len(one["loc"]) > 1 or one["type"] == "too_long" for one in details):
                raise
            raise Invalid(_ONE_SCOPE) from None
        if sum(one is not None for one in (made.catalog_id, made.album_ids, made.isrcs)) != 1:
            raise Invalid(_ONE_SCOPE)
        return made

    def plain(self) -> scope.Scope:
        isrcs = None if self.isrcs is None else tuple(isrc.replace("-", "").upper() for isrc in self.isrcs)
        albums = None if self.album_ids is None else tuple(dict.fromkeys(self.album_ids))
        return scope.Scope(self.catalog_id, albums, isrcs)


class MeasurementOrder(Body):
    source: Literal["current", "historical"] = Field(description="play counts as they are now, or their daily history")
    scope: MeasurementScope
    platforms: Annotated[list[Literal["spotify", "chain"]], Field(min_length=1, max_length=10)] = Field(
        default=["spotify"], description="chain: our own plays; of the past there is spotify alone"
    )
    schedule: Literal["once", "monthly"] = Field(
        default="once", description="monthly: again 30 days after the last time, for current alone"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_scope_is_none_of_three(cls, values: Any) -> Any:
        return {"scope": {}, **values} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _past_is_once(self) -> MeasurementOrder:
        if self.source == "historical" and self.schedule != "once":
            raise Invalid("schedule must be once for historical measurements")
        return self


class Backfill(Answer):
    """Jobs that were queued. `skipped` need no new one: measured, answered for good, or waiting or running already."""

    status: Literal["success"] = "success"
    source: Literal["historical"] = "historical"
    id: None = None
    enqueued: int
    skipped: int


class SnapshotPlaced(Answer):
    """A snapshot that was ordered; `reused`: within the last hour, so that it costs nothing now."""

    status: Literal["success"] = "success"
    source: Literal["current"] = "current"
    id: UUID
    state: Literal["queued", "running", "done", "failed"]
    album_count: int
    estimated_cost_usd: float
    reused: bool


class Ordered(RootModel[Backfill | SnapshotPlaced]):
    pass


class Unpaid(Failure):
    checkout_url: str = Field(alias="checkoutUrl", description="a page of Stripe's that takes a card, for $0")


@route("POST", "/api/research/measurement-jobs", answers={202: Ordered, 402: Unpaid}, refuses=(404, 429, 503))
async def measurement_jobs(call: Call, body: MeasurementOrder) -> Ordered:
    """Have songs measured.

    Historical measurements need a card on file, and each song's history is asked for once ever. Current ones cost the
    account a little for each album; the same order within an hour is the same snapshot.
    """
    if body.source == "historical":
        await _check_card(call)
        return Ordered(await _backfill(call, body))
    return Ordered(await _snapshot(call, body))


# -- payment -------------------------------------------------------------------------------------------------------


async def _check_card(call: Call) -> None:
    """Raises Refused(402) where the account has left no card."""
    stripe: Payments = call.resources["stripe"]
    async with call.database.acquire() as connection:
        customer = await connection.fetchval("select stripe_customer_id from accounts where id = $1", call.account)
    async with _answering(call):
        found = await stripe.card_on_file(str(call.account), customer)
        url = None if found.card else await stripe.setup_url(str(call.account), found.customer)
    if found.customer is not None and found.customer != customer:
        async with call.database.acquire() as connection:
            await connection.execute(
                "update accounts set stripe_customer_id = $2 where id = $1", call.account, found.customer
            )
    if url is not None:
        raise Refused(402, Unpaid(error=_NO_CARD, checkout_url=url))


@asynccontextmanager
async def _answering(call: Call) -> AsyncIterator[None]:
    """A provider that does not answer is our trouble for now, and nothing that the caller did."""
    try:
        yield
    except ProviderError as error:
        call.log.warning("provider failed", error=str(error))
        wait = error.retry_after if isinstance(error, Saturated) else None
        text = f"{error.provider} can't be asked at the moment"
        raise Refused(503, text, {"Retry-After": str(math.ceil(wait or 1))}) from None


# -- work ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _resolving(call: Call) -> AsyncIterator[None]:
    try:
        async with _answering(call):
            yield
    except NoCatalog:
        raise Refused(404, NO_CATALOG) from None
    except Unfinished as error:
        text = f"the albums of {error.left} more recordings are still to be looked up: ask again"
        raise Refused(503, text, {"Retry-After": "1"}) from None


async def _backfill(call: Call, body: MeasurementOrder) -> Backfill:
    async with _resolving(call):
        isrcs = await scope.isrcs_of(call.database, call.resources["spotify"], call.account, body.scope.plain())
    if not isrcs:
        raise Refused(400, _NOTHING)
    async with call.database.acquire() as connection, connection.transaction():
        await scope.add_songs(connection, isrcs)
        enqueued = await drain.order(connection, isrcs)
    # the queue's own notice has the workers look at once
    return Backfill(enqueued=enqueued, skipped=len(isrcs) - enqueued)


async def _snapshot(call: Call, body: MeasurementOrder) -> SnapshotPlaced:
    wanted = await _resolved(call, body)
    cap = call.settings.providers.apify.monthly_budget
    async with call.database.acquire() as connection:
        try:
            placed = await snapshots.place(connection, wanted, Decimal(str(cap)))
        except OverCap as error:
            seconds = max(1, math.ceil((error.until - datetime.now(UTC)).total_seconds()))
            text = f"this would be more than the {cap:g} USD that an account may spend a month"
            raise Refused(429, text, {"Retry-After": str(seconds)}) from None
    return _told(placed)


async def _resolved(call: Call, body: MeasurementOrder) -> Order:
    """The order as albums, for Spotify's counts, and as songs, for our own."""
    given, spotify = body.scope.plain(), call.resources["spotify"]
    albums: Sequence[str] = ()
    isrcs: Sequence[str] = sorted(set(given.isrcs or ()))
    async with _resolving(call):
        if "chain" in body.platforms:
            isrcs = await scope.isrcs_of(call.database, spotify, call.account, given)
        if "spotify" in body.platforms:
            albums = await scope.albums_of(call.database, spotify, call.account, given)
    if not albums and ("chain" not in body.platforms or not isrcs):
        raise Refused(400, _NOTHING)
    return Order(call.account, given.catalog, albums, isrcs, sorted(set(body.platforms)), body.schedule)


def _told(placed: Placed) -> SnapshotPlaced:
    return SnapshotPlaced(
        id=placed.id, state=placed.state, album_count=placed.albums,
        estimated_cost_usd=float(placed.cost), reused=placed.reused,
    )  # fmt: skip


ROUTES = (measurement_jobs,)
