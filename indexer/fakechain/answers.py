"""What a well-behaved node answers to each JSON-RPC method. Errors are anvil 1.7's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from indexer.fakechain.chain import FakeBlock, FakeChain
from indexer.fakechain.encoding import logs_bloom

INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, SERVER_ERROR = -32600, -32601, -32602, -32000
TAGS = ("latest", "pending", "finalized", "safe", "earliest")
_NOWHERE = "0x" + "00" * 20


class RpcError(Exception):
    """A JSON-RPC error reply: `code`, `message` and, where there is any, `data`."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.data = code, message, data

    def payload(self) -> dict[str, Any]:
        error = {"code": self.code, "message": self.message}
        return error if self.data is None else {**error, "data": self.data}


class Answers:
    """The methods of one node. Each gets the parameters and the number of the block that the node takes as its head."""

    def __init__(self, chain: FakeChain, *, block_timestamp_in_logs: bool, supports_finalized: bool) -> None:
        self.chain = chain
        self.block_timestamp_in_logs = block_timestamp_in_logs
        self.supports_finalized = supports_finalized
        self._methods: Mapping[str, Callable[[Sequence[Any], int], Any]] = {
            "web3_clientVersion": lambda _params, _head: "fakechain/v1",
            "eth_chainId": lambda _params, _head: hex(chain.chain_id),
            "net_version": lambda _params, _head: str(chain.chain_id),
            "eth_syncing": lambda _params, _head: False,
            "eth_blockNumber": lambda _params, head: hex(head),
            "eth_getBlockByNumber": self._block_by_number,
            "eth_getBlockByHash": self._block_by_hash,
            "eth_getLogs": self._logs,
            "eth_getBlockReceipts": self._receipts,
        }

    def call(self, method: str, params: Sequence[Any], behind: int = 0) -> Any:
        """The true answer, ready for JSON, as of `behind` blocks below the chain's head. Raises RpcError."""
        answer = self._methods.get(method)
        if answer is None:
            raise RpcError(METHOD_NOT_FOUND, "Method not found")
        return answer(params, max(0, self.chain.head.number - behind))

    def explicit(self, method: str, params: list[Any]) -> list[Any]:
        """The parameters, an eth_getLogs range in numbers instead of tags and defaults (where it is valid)."""
        if method != "eth_getLogs" or not params or not isinstance(params[0], dict) or params[0].get("blockHash"):
            return params
        head = self.chain.head.number
        try:
            first, last = (self._number(params[0].get(key) or "latest", head) for key in ("fromBlock", "toBlock"))
        except RpcError:
            return params
        return [{**params[0], "fromBlock": hex(first), "toBlock": hex(last)}, *params[1:]]

    def _number(self, text: Any, head: int) -> int:
        """The number that a block parameter means: hex or a tag. Raises RpcError for anything else."""
        match text:
            case "latest" | "pending":
                return head
            case "earliest":
                return 0
            case "finalized" | "safe" if self.supports_finalized:
                return max(0, head - self.chain.final_lag // (2 if text == "safe" else 1))
            case str() if text.startswith("0x"):
                try:
                    return int(text, 16)
                except ValueError:
                    raise RpcError(INVALID_PARAMS, f"invalid hex number {text}") from None
        raise RpcError(INVALID_PARAMS, "hex string without 0x prefix")

    def _block(self, params: Sequence[Any], head: int, expected: int) -> FakeBlock | None:
        if len(params) < expected:
            raise RpcError(INVALID_PARAMS, f"invalid length {len(params)}, expected {expected} elements")
        if expected > 1 and params[1] is not False:
            raise RpcError(INVALID_PARAMS, "whole transactions are not simulated: ask with false")
        if isinstance(params[0], str) and len(params[0]) == 66:
            block = self.chain.by_hash(params[0])
            return block if block and block.number <= head else None
        number = self._number(params[0], head)
        return self.chain.blocks[number] if number <= head else None

    def _block_by_number(self, params: Sequence[Any], head: int) -> dict[str, Any] | None:
        if params and isinstance(params[0], str) and len(params[0]) == 66:
            raise RpcError(INVALID_PARAMS, "a number is expected, not a hash")
        block = self._block(params, head, 2)
        return block.header if block else None

    def _block_by_hash(self, params: Sequence[Any], head: int) -> dict[str, Any] | None:
        if params and not (isinstance(params[0], str) and len(params[0]) == 66):
            raise RpcError(INVALID_PARAMS, "invalid string length")
        block = self._block(params, head, 2)
        return block.header if block else None

    def _logs(self, params: Sequence[Any], head: int) -> list[dict[str, Any]]:
        if len(params) != 1 or not isinstance(params[0], dict):
            raise RpcError(INVALID_PARAMS, "eth_getLogs takes one filter object")
        query = params[0]
        addresses, topics = _address_filter(query.get("address")), _topic_filter(query.get("topics"))
        logs = [
            log
            for block in self._blocks_of(query, head)
            for log in block.logs
            if (addresses is None or log["address"] in addresses) and _matches(log["topics"], topics)
        ]
        return logs if self.block_timestamp_in_logs else [_without_timestamp(log) for log in logs]

    def _blocks_of(self, query: Mapping[str, Any], head: int) -> Sequence[FakeBlock]:
        block_hash, first, last = (query.get(key) for key in ("blockHash", "fromBlock", "toBlock"))
        if block_hash is not None:
            if first is not None or last is not None:
                message = "cannot specify both blockHash and fromBlock/toBlock, choose one or the other"
                raise RpcError(INVALID_PARAMS, message)
            block = self.chain.by_hash(str(block_hash))
            if block is None or block.number > head:
                raise RpcError(SERVER_ERROR, "unknown block")
            return (block,)
        lowest, highest = self._number(first or "latest", head), self._number(last or "latest", head)
        if lowest > head:
            message = f"BlockOutOfRangeError: block height is {head} but requested was {lowest}"
            raise RpcError(INVALID_PARAMS, message)
        return self.chain.blocks[lowest : min(highest, head) + 1]

    def _receipts(self, params: Sequence[Any], head: int) -> list[dict[str, Any]] | None:
        block = self._block(params, head, 1)
        if block is None:
            return None
        by_tx: dict[str, list[dict[str, Any]]] = {tx_hash: [] for tx_hash in block.header["transactions"]}
        for log in block.logs:
            by_tx[log["transactionHash"]].append(log if self.block_timestamp_in_logs else _without_timestamp(log))
        return [_receipt(block, index, tx_hash, logs) for index, (tx_hash, logs) in enumerate(by_tx.items())]


def _receipt(block: FakeBlock, index: int, tx_hash: str, logs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "0x2",
        "status": "0x1",
        "cumulativeGasUsed": hex(21_000 * (index + 1)),
        "logs": logs,
        "logsBloom": logs_bloom(logs),
        "transactionHash": tx_hash,
        "transactionIndex": hex(index),
        "blockHash": block.header["hash"],
        "blockNumber": block.header["number"],
        "gasUsed": hex(21_000),
        "effectiveGasPrice": block.header["baseFeePerGas"],
        "from": _NOWHERE,
        "to": logs[0]["address"] if logs else _NOWHERE,
        "contractAddress": None,
    }


def _without_timestamp(log: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in log.items() if key != "blockTimestamp"}


def _address_filter(value: Any) -> frozenset[str] | None:
    """None: any. An empty list means any as well, as on real nodes."""
    given = [value] if isinstance(value, str) else value or []
    if not isinstance(given, list) or not all(isinstance(address, str) for address in given):
        raise RpcError(INVALID_PARAMS, "address must be a text or a list of texts")
    return frozenset(address.lower() for address in given) or None


def _topic_filter(value: Any) -> list[frozenset[str] | None]:
    """For each position the topics that will do (None: any)."""
    positions: list[frozenset[str] | None] = []
    for wanted in value or []:
        choices = wanted if isinstance(wanted, list) else [wanted]
        # One null among the choices is a wildcard for the whole position, and so is an empty list.
        free = not choices or None in choices
        if not free and not all(isinstance(choice, str) for choice in choices):
            raise RpcError(INVALID_PARAMS, "a topic must be a text, null or a list of them")
        positions.append(None if free else frozenset(choice.lower() for choice in choices))
    return positions


def _matches(topics: Sequence[str], wanted: Sequence[frozenset[str] | None]) -> bool:
    if len(topics) < len(wanted):
        return False
    return all(choices is None or topic in choices for topic, choices in zip(topics, wanted, strict=False))
