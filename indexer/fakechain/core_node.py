"""The server: a FakeCore as a Core node that speaks Connect over HTTP, with what goes wrong with such nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import msgspec
from aiohttp import web

from indexer.fakechain.core import FakeCore, FakeCoreBlock
from indexer.fakechain.faults import Fault, FaultSource, Strikes, consult
from indexer.fakechain.server import Server

_JSON = {"Content-Type": "application/json"}
_STATUS = {
    "invalid_argument": 400, "unauthenticated": 401, "permission_denied": 403, "not_found": 404, "unimplemented": 501,
    "resource_exhausted": 429, "internal": 500, "unknown": 500, "unavailable": 503, "deadline_exceeded": 504,
}  # fmt: skip


class ConnectError(Exception):
    """An error reply of Connect: `code` and `message`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class FakeCoreNode(Server):
    """A node that serves `chain` on a free port of 127.0.0.1 while its context is entered. Several may serve one chain.

    How it differs from a good one can be set at any time: `lag` blocks behind, `earliest` (older blocks are pruned),
    `missing` heights, `lacks` methods ("404" or "unimplemented", by name), a `chain_id` of its own, `most_heights` a
    call. `faults` are consulted before each call, as a FakeNode's are, with the message as the one parameter; a Fault's
    `after` sees the bytes of the true answer. `requests` counts calls by method, and `log` lists (method, message) if
    `keep_log`.
    """

    def __init__(self, chain: FakeCore, *, port: int = 0, keep_log: bool = False) -> None:
        super().__init__(port)
        self.chain = chain
        self.lag, self.earliest, self.most_heights = 0, 0, 500
        self.missing: set[int] = set()
        self.lacks: dict[str, str] = {}
        self.chain_id: str | None = None
        self.faults: list[FaultSource] = []
        self.requests: Counter[str] = Counter()
        self.log: list[tuple[str, Any]] = []
        self._keep_log = keep_log
        self._methods: dict[str, Callable[[Any, int], bytes]] = {
            "GetNodeInfo": self._node_info, "GetStatus": self._status, "GetBlock": self._get_block,
            "GetBlocks": self._get_blocks,
        }  # fmt: skip

    def routes(self, router: web.UrlDispatcher) -> None:
        router.add_post("/{path:.*}core.v1.CoreService/{method}", self._post)

    async def _post(self, request: web.Request) -> web.Response:
        method = request.match_info["method"]
        try:
            message = msgspec.json.decode(await request.read())
        except msgspec.DecodeError:
            return _error(ConnectError("invalid_argument", "the message is not JSON"))
        self.requests[method] += 1
        if self._keep_log:
            self.log.append((method, message))
        fault, behind, judges = await consult(self.faults, method, [message])
        if fault is None:
            if self.lacks.get(method) == "404" or method not in self._methods:
                return web.Response(status=404, text="404 page not found")
            try:
                if method in self.lacks:
                    raise ConnectError("unimplemented", f"core.v1.CoreService.{method} is not implemented")
                answer = self._methods[method](message, behind)
            except ConnectError as error:
                return _error(error)
            fault = next((found for judge in judges if (found := judge(answer))), None)
            if fault is None:
                return web.Response(body=answer, headers=_JSON)
        body = fault.body
        if body is None:
            body = msgspec.json.encode(fault.error if fault.result is msgspec.UNSET else fault.result)
        return web.Response(status=fault.status, body=body, headers=_JSON | dict(fault.headers))

    def _height(self, behind: int) -> int:
        return max(self.chain.first - 1, self.chain.height - max(behind, self.lag))

    def _name(self) -> str:
        newest = self.chain.blocks[-1].chain_id if self.chain.blocks else self.chain.chain_id
        return self.chain_id or newest

    def _node_info(self, _message: Any, behind: int) -> bytes:
        height = str(self._height(behind))
        return msgspec.json.encode({"chainid": self._name(), "synced": True, "currentHeight": height})

    def _status(self, _message: Any, behind: int) -> bytes:
        return msgspec.json.encode(
            {
                "live": True, "ready": True,
                "chainInfo": {"chainId": self._name(), "currentHeight": str(self._height(behind))},
                "pruningInfo": {"enabled": True, "earliestHeight": str(self.earliest)} if self.earliest else {},
            }
        )  # fmt: skip

    def _block(self, height: int, behind: int) -> bytes | None:
        if height > self._height(behind) or height < self.earliest or height in self.missing:
            return None
        block: FakeCoreBlock | None = self.chain.block(height)
        if block is None:
            return None
        if self.chain_id is None:
            return block.json
        ours, theirs = (b'"chainId":' + msgspec.json.encode(one) for one in (block.chain_id, self.chain_id))
        return block.json.replace(ours, theirs)

    def _get_block(self, message: Any, behind: int) -> bytes:
        height = self._height(behind)
        block = self._block(int(message.get("height", 0)), behind)
        if block is None:
            return b'{"block":{"height":"-1"}}'
        return b'{"block":%s,"currentHeight":"%d"}' % (block, height)

    def _get_blocks(self, message: Any, behind: int) -> bytes:
        asked = [int(one) for one in message.get("height", [])]
        if len(asked) > self.most_heights:
            raise ConnectError("invalid_argument", f"too many heights: {len(asked)}, at most {self.most_heights}")
        found = ((height, self._block(height, behind)) for height in asked)
        blocks = b",".join(b'"%d":%s' % (height, block) for height, block in found if block is not None)
        return b'{"blocks":{%s},"currentHeight":"%d"}' % (blocks, self._height(behind))


def _error(error: ConnectError) -> web.Response:
    body = msgspec.json.encode({"code": error.code, "message": error.message})
    return web.Response(status=_STATUS[error.code], body=body, headers=_JSON)


def connect_error(
    code: str,
    times: int | None,
    message: str = "simulated",
    *,
    retry_after: float | None = None,
    methods: Collection[str] | None = None,
) -> FaultSource:
    """The next `times` calls fail with this error of Connect, and Retry-After in seconds if it is given."""
    strikes = Strikes(times, methods)
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    fault = Fault(_STATUS[code], {"code": code, "message": message}, headers=headers)
    return lambda method, _params: fault if strikes.strike(method) else None


def cut_short(times: int | None, methods: Collection[str] | None = None) -> FaultSource:
    """The next `times` answers break off in the middle, with status 200."""
    strikes = Strikes(times, methods)
    fault = Fault(after=lambda answer: Fault(body=answer[: len(answer) // 2]))
    return lambda method, _params: fault if strikes.strike(method) else None
