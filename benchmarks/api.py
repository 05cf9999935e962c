"""How many requests a second the API answers on the paths before any work: who calls, and what is sent.

    python -m benchmarks.api                     three cases, 10 s each, 32 connections
    python -m benchmarks.api --seconds 30 --connections 64

Server and client are processes of their own, one each, on the same machine, as is Postgres. The client reads whole
answers and compares the status of each; the floor is an aiohttp server that only answers, asked in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg
import uvloop
from aiohttp import web
from pydantic import Field

from indexer import log
from indexer.config import LogSettings, Settings
from indexer.db import Database
from indexer.embedded import EmbeddedPostgres
from indexer.migrations import migrate, sql_folder
from indexer.sidecar import keys
from indexer.sidecar.api import create_app, serving
from indexer.sidecar.routes import Answer, Body, Call, route

PATH = "/api/research/measurement-jobs"


class Scope(Body):
    catalog_id: UUID | None = None
    album_ids: Annotated[list[str], Field(min_length=1)] | None = None
    isrcs: Annotated[list[str], Field(min_length=1)] | None = None


class Order(Body):
    scope: Scope
    source: Literal["current", "historical"]
    platforms: list[str] = Field(default=["spotify"])


class Taken(Answer):
    status: Literal["success"] = "success"
    enqueued: int


@route("POST", PATH, answers={202: Taken})
async def order(call: Call, body: Order) -> Taken:
    """Checks what was sent, and does nothing with it."""
    return Taken(enqueued=len(body.scope.isrcs or ()))


GOOD = {"scope": {"isrcs": [f"USABC24{n:05}" for n in range(20)]}, "source": "historical"}


class Case(NamedTuple):
    name: str
    body: object
    with_key: bool
    status: int


CASES = (
    Case("good body", GOOD, True, 202),
    Case("wrong source", {**GOOD, "source": "someday"}, True, 400),
    Case("no key", GOOD, False, 401),
)


def serve(dsn: str | None, pipe: Pipe) -> None:
    """The server's process: the API, or without a database the floor; tells its port, then the CPU time it took."""

    async def main() -> None:
        if dsn is None:
            await floor(pipe)
            return
        settings = Settings(database={"url": dsn}, sidecar={"port": 0, "requests_per_minute": 10**7, "burst": 10**6})
        log.configure(LogSettings(format="json"), Path("/dev/null").open("w"))  # noqa: SIM115
        async with (
            Database(dsn, settings.database).opened() as database,
            serving(create_app(settings, database, {}, [order]), settings.sidecar) as url,
        ):
            await told(pipe, url)

    uvloop.run(main())


async def floor(pipe: Pipe) -> None:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b'{"status":"success","enqueued":20}', status=202, content_type="application/json")

    application = web.Application()
    application.router.add_post(PATH, answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    await told(pipe, f"http://127.0.0.1:{runner.addresses[0][1]}/")
    await runner.cleanup()


async def told(pipe: Pipe, url: str) -> None:
    """Answer the client's questions until it has no more: the address, then CPU seconds so far."""
    pipe.send(url)
    while await asyncio.to_thread(pipe.recv):
        used = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send(used.ru_utime + used.ru_stime)


@contextmanager
def server(dsn: str | None) -> Iterator[tuple[str, Pipe]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(dsn, theirs))
    process.start()
    try:
        yield ours.recv(), ours
        ours.send(False)
        process.join(10)
    finally:
        process.kill()


async def ask(url: str, case: Case, key: str, deadline: float, seconds: list[float], wrong: list[bytes]) -> None:
    """One connection that asks again and again; a plain socket, so that the client costs little."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    body = json.dumps(case.body).encode()
    proof = f"x-api-key: {key}\r\n" if case.with_key else ""
    head = f"POST {PATH} HTTP/1.1\r\nHost: api\r\n{proof}Content-Type: application/json\r\nContent-Length: {len(body)}"
    request, wanted = head.encode() + b"\r\n\r\n" + body, f"HTTP/1.1 {case.status} ".encode()
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        await reader.readexactly(length)
        seconds.append(time.perf_counter() - started)
        if not answer.startswith(wanted):
            wrong.append(answer[:200])
    writer.close()


async def measure(url: str, pipe: Pipe, name: str, case: Case, key: str, length: float, connections: int) -> None:
    seconds: list[float] = []
    wrong: list[bytes] = []
    pipe.send(True)
    cpu, started = pipe.recv(), time.perf_counter()
    await asyncio.gather(*(ask(url, case, key, started + length, seconds, wrong) for _ in range(connections)))
    took = time.perf_counter() - started
    pipe.send(True)
    cpu = pipe.recv() - cpu
    p99 = statistics.quantiles(seconds, n=100)[-1]
    print(f"{name:<22} {len(seconds) / took:>7,.0f} requests/s  p50 {statistics.median(seconds) * 1000:.1f} ms  "
          f"p99 {p99 * 1000:.1f} ms  server {cpu / len(seconds) * 1e6:.0f} us a request  wrong answers {len(wrong)}")


async def main(length: float, connections: int) -> None:
    with tempfile.TemporaryDirectory(prefix="indexer-bench-") as name:
        async with EmbeddedPostgres(Path(name) / "postgres") as postgres:
            connection = await asyncpg.connect(postgres.dsn, server_settings={"search_path": "public"})
            await migrate(connection, [("sidecar", sql_folder("sidecar"))])
            account = await keys.add_account(connection, None, None)
            key, _ = await keys.create(connection, account, "", None)
            await connection.close()
            print(f"{connections} connections, {length:g} s each; one server process; Postgres {postgres.version}")
            with server(None) as (url, pipe):
                await measure(url, pipe, "floor: aiohttp alone", CASES[0], key, length, connections)
            with server(postgres.dsn) as (url, pipe):
                for case in CASES:
                    await measure(url, pipe, f"{case.name} ({case.status})", case, key, length, connections)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=32)
    arguments = parser.parse_args()
    uvloop.run(main(arguments.seconds, arguments.connections))
