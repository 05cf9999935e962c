"""The server: a FakeChain as a JSON-RPC node over HTTP and WebSocket."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec
from aiohttp import WSMsgType, web

from indexer.fakechain.answers import INVALID_PARAMS, INVALID_REQUEST, METHOD_NOT_FOUND, Answers, RpcError
from indexer.fakechain.chain import FakeBlock, FakeChain
from indexer.fakechain.faults import Fault, FaultSource, consult
from indexer.fakechain.server import Server

_JSON = {"Content-Type": "application/json"}
_Reply: TypeAlias = tuple[dict[str, Any], Fault | None]  # what to say, and the fault that strikes the whole reply


class FakeNode(Server):
    """A node that serves `chain` on a free port of 127.0.0.1 while its context is entered. Several may serve one chain.

    `ws`: whether WebSocket is spoken (at the same port). `block_timestamp_in_logs`: whether logs carry blockTimestamp.
    `supports_finalized`: whether the tags finalized and safe are known, else they are error -32602.

    `faults` are consulted in order before each call: delays add up, the furthest `behind` counts, and the first that
    replaces the answer ends it. `requests` counts calls by method (each of a batch), `http_requests` counts POSTs, and
    `log` lists (method, params) if `keep_log`. `muted` silences newHeads while subscriptions stay open.
    `reverse_batches` answers batches last to first, as the standard allows.
    """

    def __init__(
        self,
        chain: FakeChain,
        *,
        ws: bool = True,
        block_timestamp_in_logs: bool = True,
        supports_finalized: bool = True,
        port: int = 0,
        keep_log: bool = False,
    ) -> None:
        super().__init__(port)
        self.chain = chain
        self.faults: list[FaultSource] = []
        self.requests: Counter[str] = Counter()
        self.http_requests = 0
        self.log: list[tuple[str, list[Any]]] = []
        self.muted = False
        self.reverse_batches = False
        self._ws, self._keep_log = ws, keep_log
        self._answers = Answers(
            chain, block_timestamp_in_logs=block_timestamp_in_logs, supports_finalized=supports_finalized
        )
        self._sockets: set[_Socket] = set()
        self._subscriptions = 0
        self._unlisten: Callable[[], None] | None = None

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def sockets(self) -> int:
        """How many WebSocket connections are open."""
        return len(self._sockets)

    def routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/", self._post)
        if self._ws:
            router.add_get("/", self._websocket)

    async def start(self) -> None:
        """Listen. After a stop() it is at the same port again."""
        await super().start()
        loop = asyncio.get_running_loop()

        def heard(blocks: Sequence[FakeBlock]) -> None:
            # Not at once: somebody may mine in another thread.
            loop.call_soon_threadsafe(self._notify, blocks)

        self._unlisten = self.chain.listen(heard)

    async def stop(self) -> None:
        """Close all connections and the port: what a client sees of a node that went away."""
        if self._unlisten:
            self._unlisten()
            self._unlisten = None
        await self.drop_sockets()
        await super().stop()

    async def drop_sockets(self) -> None:
        """Close the WebSocket connections, as a provider's restart does."""
        await asyncio.gather(*(socket.connection.close() for socket in tuple(self._sockets)))

    def _notify(self, blocks: Sequence[FakeBlock]) -> None:
        if self.muted:
            return
        for socket in self._sockets:
            for block in blocks:
                socket.announce(block)

    async def _post(self, request: web.Request) -> web.Response:
        self.http_requests += 1
        answer, fault = await self._answer(await request.read(), None)
        if fault is None:
            return web.Response(body=answer, headers=_JSON)
        return web.Response(status=fault.status, body=answer, headers=_JSON | dict(fault.headers))

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse(timeout=1, max_msg_size=64 << 20)
        await connection.prepare(request)
        socket = _Socket(connection)
        self._sockets.add(socket)
        writer = asyncio.create_task(socket.write())
        try:
            async for message in connection:
                # web3 sends its requests in binary frames; real nodes take both, and answer in text.
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    body = message.data.encode() if isinstance(message.data, str) else message.data
                    answer, _fault = await self._answer(body, socket)
                    socket.outgoing.put_nowait(answer)
        finally:
            self._sockets.discard(socket)
            writer.cancel()
        return connection

    async def _answer(self, body: bytes, socket: _Socket | None) -> tuple[bytes, Fault | None]:
        """The reply's bytes, and the fault that rules over its status and headers, if one does."""
        try:
            asked = msgspec.json.decode(body)
        except msgspec.DecodeError:
            asked = None
        batch = isinstance(asked, list) and bool(asked)
        replies: list[_Reply] = [await self._one(call, socket) for call in (asked if batch else [asked])]
        for reply, fault in replies:
            if fault is not None:
                return (msgspec.json.encode(reply) if fault.body is None else fault.body), fault
        payloads = [reply for reply, _fault in replies]
        if self.reverse_batches:
            payloads.reverse()
        return msgspec.json.encode(payloads if batch else payloads[0]), None

    async def _one(self, call: Any, socket: _Socket | None) -> _Reply:
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": call.get("id") if isinstance(call, dict) else None}
        method, params = (call.get("method"), call.get("params") or []) if isinstance(call, dict) else (None, [])
        if not isinstance(method, str) or not isinstance(params, list):
            return reply | {"error": RpcError(INVALID_REQUEST, "Invalid request").payload()}, None
        self.requests[method] += 1
        if self._keep_log:
            self.log.append((method, params))
        fault, behind, judges = await consult(self.faults, method, self._answers.explicit(method, params))
        if fault is None:
            try:
                result = self._call(method, params, behind, socket)
            except RpcError as error:
                return reply | {"error": error.payload()}, None
            fault = next((found for judge in judges if (found := judge(result))), None)
            if fault is None:
                return reply | {"result": result}, None
        if fault.error is not None:
            reply["error"] = fault.error
        else:
            reply["result"] = None if fault.result is msgspec.UNSET else fault.result
        return reply, fault if fault.whole_reply else None

    def _call(self, method: str, params: list[Any], behind: int, socket: _Socket | None) -> Any:
        if method not in ("eth_subscribe", "eth_unsubscribe"):
            return self._answers.call(method, params, behind)
        if socket is None:
            raise RpcError(METHOD_NOT_FOUND, "Method not found")
        if method == "eth_unsubscribe":
            known = bool(params) and params[0] in socket.subscriptions
            socket.subscriptions -= set(params[:1])
            return known
        if params != ["newHeads"]:
            raise RpcError(INVALID_PARAMS, "only newHeads can be subscribed to")
        self._subscriptions += 1
        subscription = f"0x{self._subscriptions:032x}"
        socket.subscriptions.add(subscription)
        return subscription


class _Socket:
    """One WebSocket connection. All that is sent goes through one queue: an answer never overtakes a notification."""

    def __init__(self, connection: web.WebSocketResponse) -> None:
        self.connection = connection
        self.subscriptions: set[str] = set()
        self.outgoing: asyncio.Queue[bytes] = asyncio.Queue()

    def announce(self, block: FakeBlock) -> None:
        for subscription in self.subscriptions:
            params = {"subscription": subscription, "result": block.header}
            message = {"jsonrpc": "2.0", "method": "eth_subscription", "params": params}
            self.outgoing.put_nowait(msgspec.json.encode(message))

    async def write(self) -> None:
        while True:
            message = await self.outgoing.get()
            try:
                await self.connection.send_str(message.decode())
            except ConnectionError:
                return
