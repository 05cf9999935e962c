"""The sidecar's API on a real port and a real database, with two accounts that must not learn of each other.

    async with serving_api(database_url, ROUTES, {"songstats": client}, auth={"cron_secret": "..."}) as api:
        told = await api.post("/api/research/measurement-jobs", {"source": "current", ...}, by=api.ann)
        assert told.status == 202 and told.json["status"] == "success"
        assert (await api.get(f"/api/tasks/runs?id={told.json['id']}", by=api.bob)).status == 404

`by=` sends the person's API key; `headers=api.ann.bearer()` sends a token instead.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID

import aiohttp
import asyncpg
import jwt

from indexer import log
from indexer.config import LogSettings, Settings
from indexer.db import Database
from indexer.migrations import migrate, sql_folder
from indexer.sidecar import keys
from indexer.sidecar.api import create_app, serving
from indexer.sidecar.routes import Route

JWT_SECRET = "a secret of thirty-two bytes, at least"
CRON_SECRET = "the scheduler's secret"


class Told(NamedTuple):
    """An answer."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> str:
        """The text of an error, which has the form of all errors."""
        found = self.json
        assert self.status >= 400 and found["status"] == "error" and isinstance(found["error"], str), self
        return str(found["error"])


class Person(NamedTuple):
    """An account with a key."""

    account: UUID
    email: str
    key: str
    key_id: str

    def token(self, secret: Any = JWT_SECRET, algorithm: str = "HS256", **claims: Any) -> str:
        """A token of the account; a claim that is None is left out."""
        all_ = {"sub": str(self.account), "exp": int(time.time()) + 600, **claims}
        kept = {name: value for name, value in all_.items() if value is not None}
        return jwt.encode(kept, secret, algorithm)

    def bearer(self, **claims: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(**claims)}"}


class Api:
    """A server and what asks it. `stream` holds the process's log."""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, database: Database, settings: Settings, stream: io.StringIO
    ) -> None:
        self.url, self.session, self.database, self.settings, self.stream = url, session, database, settings, stream
        self.ann: Person
        self.bob: Person

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    async def ask(
        self, method: str, path: str, body: Any = None, *, by: Person | None = None,
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (), data: Any = None,
    ) -> Told:  # fmt: skip
        """Send a request: `body` as JSON, or `data` as it is, without a content type of its own."""
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
        if by is not None:
            pairs.append(("x-api-key", by.key))
        if body is not None:
            pairs.append(("Content-Type", "application/json"))
            data = json.dumps(body).encode()
        async with self.session.request(
            method, self.url + path.removeprefix("/"), data=data, headers=pairs, allow_redirects=False,
            skip_auto_headers=("Content-Type",),
        ) as response:  # fmt: skip
            return Told(response.status, response.headers.copy(), await response.text())

    async def get(self, path: str, **named: Any) -> Told:
        return await self.ask("GET", path, **named)

    async def post(self, path: str, body: Any = None, **named: Any) -> Told:
        return await self.ask("POST", path, body, **named)

    async def person(self, email: str) -> Person:
        """A new account with a key."""
        async with self.database.acquire() as connection:
            account = await keys.add_account(connection, None, email)
            key, key_id = await keys.create(connection, account, "", None)
        return Person(account, email, key, key_id)


@asynccontextmanager
async def serving_api(
    database_url: str, routes: Sequence[Route] = (),
    resources: Mapping[str, Any] | Callable[[Settings, Database], Mapping[str, Any]] | None = None, **sections: Any,
) -> AsyncIterator[Api]:  # fmt: skip
    """Serve these routes on the test's database, with its [sidecar] tables; `sections` are laid over the settings.

    `resources` that need the settings or the database are made of them.
    """
    base: dict[str, dict[str, Any]] = {
        "database": {"url": database_url, "connect_timeout_seconds": 3},
        "sidecar": {"port": 0},
        "auth": {"jwt_secret": JWT_SECRET, "cron_secret": CRON_SECRET},
    }
    for name, values in sections.items():
        given = {**base.get(name, {}), **values}
        base[name] = {name: value for name, value in given.items() if value is not None}
    settings, stream = Settings(**base), io.StringIO()
    log.configure(LogSettings(level="debug", format="json"), stream)
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "public"})
    await migrate(connection, [("sidecar", sql_folder("sidecar"))])
    await connection.close()
    async with Database(database_url, settings.database).opened() as database:
        made = resources(settings, database) if callable(resources) else resources or {}
        application = create_app(settings, database, made, routes)
        async with serving(application, settings.sidecar) as url, aiohttp.ClientSession() as session:
            api = Api(url, session, database, settings, stream)
            api.ann, api.bob = await api.person("ann@example.org"), await api.person("bob@example.org")
            yield api
