"""A stand-in for Stripe: customers, their cards, and Checkout sessions that take one."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from aiohttp import web

from indexer.sidecar.fakes.base import Fake, Reply


class FakeCustomer(msgspec.Struct):
    id: str
    account: str
    cards: int = 0
    default: str | None = None
    deleted: bool = False
    created: int = 1_700_000_000


class FakeStripe(Fake):
    """Knows the `customers` that were added or created. `searchable` False: the search has not caught up yet.

    `everybody_pays`: an account that nobody knows has a card, too, for those who are not here to test payment.
    Routes: "search" and "create" (key: the account), "customer" and "cards" (key: the customer), "session" (key: the
    customer).
    """

    name = "stripe"
    key = "sk_test_stripe_key"

    def __init__(self, *, port: int = 0, everybody_pays: bool = False) -> None:
        super().__init__(port=port)
        self.customers: dict[str, FakeCustomer] = {}
        self.sessions: list[dict[str, str]] = []
        self.searchable, self.everybody_pays = True, everybody_pays
        self._made_by: dict[str, str] = {}

    def add_customer(self, account: str, *, cards: int = 1, default: str | None = None) -> FakeCustomer:
        made = FakeCustomer(f"cus_{len(self.customers) + 1:04}", account, cards, default)
        made.created += len(self.customers)
        self.customers[made.id] = made
        return made

    def routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/v1/customers/search", self.answering("search", self._search, _account))
        router.add_get("/v1/customers/{id}", self.answering("customer", self._customer, _id))
        router.add_get("/v1/customers/{id}/payment_methods", self.answering("cards", self._cards, _id))
        router.add_post("/v1/customers", self.answering("create", self._create, _posted("metadata[account]")))
        router.add_post("/v1/checkout/sessions", self.answering("session", self._session, _posted("customer")))

    def error(self, status: int) -> Any:
        kind = "api_error" if status >= 500 else "invalid_request_error"
        # The real one quotes what was sent, and so do we.
        return {"error": {"type": kind, "message": f"error {status}: {self.key} of somebody@example.com"}}

    async def _search(self, request: web.Request) -> Reply:
        account = await _account(request)
        if not account:
            return Reply(self.error(400), 400)
        found = [one for one in self.customers.values() if one.account == account and not one.deleted]
        if not found and self.everybody_pays:
            found = [self.add_customer(account)]
        data = [_customer(one) for one in reversed(found)] if self.searchable else []
        return Reply({"object": "search_result", "data": data, "has_more": False, "url": "/v1/customers/search"})

    async def _customer(self, request: web.Request) -> Reply:
        known = self.customers.get(await _id(request))
        if known is None:
            return Reply(self.error(404), 404)
        if known.deleted:
            return Reply({"id": known.id, "object": "customer", "deleted": True})
        return Reply(_customer(known))

    async def _cards(self, request: web.Request) -> Reply:
        known = self.customers.get(await _id(request))
        if known is None or request.query.get("type") != "card":
            return Reply(self.error(404), 404)
        cards = [{"id": f"pm_{n}", "object": "payment_method", "type": "card"} for n in range(known.cards)]
        return Reply({"object": "list", "data": cards[: int(request.query.get("limit", 10))], "has_more": False})

    async def _create(self, request: web.Request) -> Reply:
        key = request.headers.get("Idempotency-Key", "")
        if key not in self._made_by:
            self._made_by[key] = self.add_customer(await _posted("metadata[account]")(request), cards=0).id
        return Reply(_customer(self.customers[self._made_by[key]]))

    async def _session(self, request: web.Request) -> Reply:
        form = {name: str(value) for name, value in (await request.post()).items()}
        known = form.get("customer") in self.customers
        cards_only = form.get("allowed_payment_method_types[0]") == "card"
        if form.get("mode") != "setup" or not known or not cards_only or "success_url" not in form:
            return Reply(self.error(400), 400)
        self.sessions.append(form)
        session = f"cs_test_{len(self.sessions)}"
        url = f"{self.url}/pay/{session}"
        return Reply({"id": session, "object": "checkout.session", "mode": "setup", "amount_total": None, "url": url})


def _customer(one: FakeCustomer) -> Any:
    return {
        "id": one.id, "object": "customer", "created": one.created, "email": "somebody@example.com",
        "metadata": {"account": one.account}, "invoice_settings": {"default_payment_method": one.default},
    }  # fmt: skip


async def _account(request: web.Request) -> str:
    found = re.fullmatch(r"metadata\['account'\]:'((?:[^'\\]|\\.)*)'", request.query.get("query", ""))
    return re.sub(r"\\(.)", r"\1", found[1]) if found else ""


async def _id(request: web.Request) -> str:
    return request.match_info["id"]


def _posted(name: str) -> Any:
    async def key(request: web.Request) -> str:
        return str((await request.post()).get(name, ""))

    return key
