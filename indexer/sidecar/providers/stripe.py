"""Stripe: whether an account has a card on file, and the page that takes one. The official client over our transport.

Its own transports know no time limit for a body that stalls, and repeat requests; ours does neither, counts what it
sends, and raises our errors before the client reads a refusal, whose text may name people.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec
import stripe

from indexer.config import StripeSettings
from indexer.sidecar.providers.errors import Terminal, unset
from indexer.sidecar.providers.http import Http
from indexer.sidecar.providers.protocols import CardOnFile

if TYPE_CHECKING:
    from stripe.params.checkout import SessionCreateParams

_CUSTOMERS_A_SEARCH = 10
# The one whose words we use: names of parameters change, and each release of the package would take its own.
_API_VERSION = "2026-10-28.endive"


class _Transport(stripe.HTTPClient):
    """How the official client sends what it has made."""

    name = "aiohttp"

    def __init__(self, http: Http) -> None:
        super().__init__()
        self._http = http

    async def request_async(
        self, method: str, url: str, headers: Mapping[str, str], post_data: str | None = None
    ) -> tuple[bytes, int, Mapping[str, str]]:
        body = post_data.encode() if post_data else None
        # Of the address only what is no id.
        what = url.partition("?")[0].removeprefix(self._http.path("v1")).strip("/").partition("/")[0]
        answer = await self._http.ask(what, msgspec.Raw, method.upper(), url, headers=headers, body=body)
        return bytes(answer.value), answer.status, answer.headers

    async def close_async(self) -> None:
        await self._http.close()


class Stripe:
    """A Payments."""

    def __init__(self, settings: StripeSettings) -> None:
        self._settings = settings
        self._http = Http("stripe", settings.base_url, timeout_seconds=settings.timeout_seconds)
        key = settings.api_key
        # What the package would tell of this machine, and log of addresses and bodies, is nobody's business.
        stripe.enable_telemetry = False
        logging.getLogger("stripe").setLevel(logging.WARNING)
        self._client = None if key is None else stripe.StripeClient(
            key.get_secret_value(), stripe_version=_API_VERSION,
            base_addresses={"api": settings.base_url.rstrip("/")},
            http_client=_Transport(self._http), max_network_retries=0,
        )  # fmt: skip

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    @property
    def _api(self) -> stripe.StripeClient:
        if self._client is None:
            raise unset("stripe", "api_key")
        return self._client

    async def card_on_file(self, account: str, customer: str | None = None) -> CardOnFile:
        found = [] if customer is None else await self._known(customer)
        found = found or await self._searched(account)
        for one in found:
            if await self._has_card(one):
                return CardOnFile(one.id, True)
        return CardOnFile(found[0].id if found else None, False)

    async def _known(self, customer: str) -> list[stripe.Customer]:
        """The customer, unless it was deleted."""
        try:
            with self._read("customers"):
                one = await self._api.v1.customers.retrieve_async(customer)
                return [] if getattr(one, "deleted", False) else [one]
        except Terminal as error:
            if error.status != 404:
                raise
            return []

    async def _searched(self, account: str) -> list[stripe.Customer]:
        """Those that bear the account; the search lags behind by a minute or more. The oldest first."""
        with self._read("customers"):
            query = f"metadata['account']:'{_quoted(account)}'"
            page = await self._api.v1.customers.search_async({"query": query, "limit": _CUSTOMERS_A_SEARCH})
            return sorted(page.data, key=lambda one: (one.created, one.id))

    async def _has_card(self, customer: stripe.Customer) -> bool:
        with self._read("customers"):
            chosen = customer.invoice_settings
            if chosen is not None and chosen.default_payment_method is not None:
                return True
            # A card that Checkout took is attached, but not the default.
            cards = await self._api.v1.customers.payment_methods.list_async(customer.id, {"type": "card", "limit": 1})
            return len(cards.data) > 0

    async def setup_url(self, account: str, customer: str | None = None) -> str:
        success, cancel = self._settings.success_url, self._settings.cancel_url
        if success is None:
            raise unset("stripe", "success_url")
        customer = customer or await self._created(account)
        wanted: SessionCreateParams = {
            "mode": "setup", "allowed_payment_method_types": ["card"], "customer": customer,
            "client_reference_id": account, "metadata": {"account": account},
            "success_url": success.get_secret_value(),
        }  # fmt: skip
        if cancel is not None:
            wanted["cancel_url"] = cancel.get_secret_value()
        with self._read("checkout"):
            session = await self._api.v1.checkout.sessions.create_async(wanted)
            if not session.url:
                raise self._http.unreadable("checkout")
            return session.url

    async def _created(self, account: str) -> str:
        """A customer for the account: the same one for all who ask within an hour, since the search lags behind.

        Not for longer, because an answer of 500 is repeated with the key, too.
        """
        key = sha256(f"customer of {account} at {time.time() // 3600:.0f}".encode()).hexdigest()
        with self._read("customers"):
            customer = await self._api.v1.customers.create_async(
                {"metadata": {"account": account}}, {"idempotency_key": key}
            )
            return customer.id

    @contextmanager
    def _read(self, what: str) -> Iterator[None]:
        """Whatever the package makes of an answer that it can't use."""
        try:
            yield
        except (stripe.StripeError, AttributeError, KeyError, TypeError, ValueError, IndexError):
            raise self._http.unreadable(what) from None


def _quoted(text: str) -> str:
    """A value within the quotes of a search."""
    return text.replace("\\", "\\\\").replace("'", "\\'")
