"""The simulated chain itself: blocks, mining, forks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from indexer.fakechain.encoding import EMPTY_BLOOM, FakeLog, as_texts, logs_bloom
from indexer.model import BlockRef

_ZERO_HASH = "0x" + "00" * 32
_EMPTY_ROOT = "0x56e81f171bcc55a6ff8345e692c0f86e5b48e01b996cadc001622fb5e363b421"
# What an indexer has no use for, with the keys that anvil sends.
_FILLING = {
    "sha3Uncles": "0x1dcc4de8dec75d7aab85b567b6ccd41ad312451b948a7413f0a142fd40d49347",
    "miner": "0x" + "00" * 20,
    "stateRoot": _EMPTY_ROOT,
    "difficulty": "0x0",
    "gasLimit": "0x1c9c380",
    "extraData": "0x",
    "mixHash": _ZERO_HASH,
    "nonce": "0x0000000000000000",
    "baseFeePerGas": "0x3b9aca00",
    "withdrawalsRoot": _EMPTY_ROOT,
    "blobGasUsed": "0x0",
    "excessBlobGas": "0x0",
    "parentBeaconBlockRoot": _ZERO_HASH,
    "requestsHash": _ZERO_HASH,
    "totalDifficulty": "0x0",
    "uncles": [],
    "withdrawals": [],
}


class FakeBlock(msgspec.Struct, frozen=True):
    """A mined block. Hashes are 32 bytes, `timestamp` is unix seconds.

    `header` and `logs` are what the node answers to eth_getBlockByNumber and eth_getLogs, ready for JSON: not to be
    changed. `transactions` are the transactions' logs as they were given to mine().
    """

    number: int
    hash: bytes
    parent_hash: bytes
    timestamp: int
    header: dict[str, Any]
    logs: list[dict[str, Any]]
    transactions: tuple[tuple[FakeLog, ...], ...]

    @property
    def ref(self) -> BlockRef:
        return BlockRef(self.number, self.hash)


class FakeChain:
    """A chain that exists in memory only; block 0 is there from the start, empty.

    `block_seconds` lie between blocks; `final_lag` blocks lie between the head and the finalised block (half as many
    between the head and the safe one). Hashes are deterministic: two chains that were treated alike are alike. A
    block's hash follows from its parent, its content and the number of forks so far; a transaction's from its logs
    alone (and how often the same logs were mined before), so that one that is mined again after a fork keeps its hash.
    Hashes are SHA-256, as nobody outside recomputes them; blooms are real.
    """

    def __init__(
        self,
        chain_id: int = 31337,
        block_seconds: int = 2,
        genesis_timestamp: int = 1_700_000_000,
        final_lag: int = 64,
    ) -> None:
        self.chain_id = chain_id
        self.block_seconds = block_seconds
        self.final_lag = final_lag
        self.forks = 0
        self.blocks: list[FakeBlock] = []
        self._by_hash: dict[str, FakeBlock] = {}
        self._seen: Counter[bytes] = Counter()
        self._listeners: list[Callable[[Sequence[FakeBlock]], None]] = []
        self._append((), genesis_timestamp)

    @property
    def head(self) -> FakeBlock:
        return self.blocks[-1]

    def by_hash(self, block_hash: str) -> FakeBlock | None:
        """The block with this hash (0x hex), None for one that is unknown or was orphaned by a fork."""
        return self._by_hash.get(block_hash.lower())

    def logs(self, first: int = 0, last: int | None = None) -> list[dict[str, Any]]:
        """All logs of the blocks `first` to `last` (the head), as eth_getLogs answers them."""
        end = None if last is None else last + 1
        return [log for block in self.blocks[first:end] for log in block.logs]

    def mine(self, *txs: Sequence[FakeLog], timestamp: int | None = None) -> FakeBlock:
        """Add a block; each argument is one transaction's logs. `timestamp`: unix seconds, else the parent's plus
        `block_seconds`."""
        block = self._append(txs, timestamp)
        self._announce((block,))
        return block

    def mine_empty(self, n: int = 1) -> FakeBlock:
        """Add `n` blocks without transactions; the last of them."""
        self._announce([self._append((), None) for _ in range(n)])
        return self.head

    def fork(self, depth: int, blocks: Sequence[Sequence[Sequence[FakeLog]]]) -> list[FakeBlock]:
        """Replace the last `depth` blocks with `blocks`, each of them a sequence of transactions as for mine().

        There may be fewer, as many or more of them than `depth`. ValueError if block 0 would go. Subscribers hear of
        the new blocks.
        """
        if not 0 <= depth < len(self.blocks):
            raise ValueError(f"can't replace {depth} blocks of {len(self.blocks)}: block 0 stays")
        for _ in range(depth):
            orphan = self.blocks.pop()
            del self._by_hash[orphan.header["hash"]]
            self._seen.subtract(_digest(as_texts(tx)) for tx in orphan.transactions)
        self.forks += 1
        added = [self._append(txs, None) for txs in blocks]
        self._announce(added)
        return added

    def listen(self, listener: Callable[[Sequence[FakeBlock]], None]) -> Callable[[], None]:
        """Call `listener` with the new blocks after each mine, mine_empty and fork, in the caller's thread.

        Calling what is returned ends it.
        """
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _announce(self, blocks: Sequence[FakeBlock]) -> None:
        for listener in tuple(self._listeners):
            listener(blocks)

    def _append(self, txs: Sequence[Sequence[FakeLog]], timestamp: int | None) -> FakeBlock:
        number = len(self.blocks)
        parent = self.blocks[-1] if self.blocks else None
        parent_hash = parent.header["hash"] if parent else _ZERO_HASH
        if timestamp is None:
            timestamp = (parent.timestamp if parent else 0) + self.block_seconds
        transactions = tuple(map(tuple, txs))
        tx_hashes = [self._transaction_hash(tx) for tx in transactions]
        identity = f"{self.chain_id} {self.forks} {number} {parent_hash} {timestamp} {' '.join(tx_hashes)}"
        block_hash = "0x" + _digest(identity).hex()
        logs = _json_logs(transactions, tx_hashes, block_hash, number, timestamp)
        header = _json_header(number, block_hash, parent_hash, timestamp, tx_hashes, logs)
        hash_bytes, parent_bytes = bytes.fromhex(block_hash[2:]), bytes.fromhex(parent_hash[2:])
        block = FakeBlock(number, hash_bytes, parent_bytes, timestamp, header, logs, transactions)
        self.blocks.append(block)
        self._by_hash[block_hash] = block
        return block

    def _transaction_hash(self, tx: tuple[FakeLog, ...]) -> str:
        content = _digest(as_texts(tx))
        self._seen[content] += 1
        return "0x" + _digest(f"{self.chain_id} {content.hex()} {self._seen[content]}").hex()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _json_logs(
    transactions: Sequence[Sequence[FakeLog]], tx_hashes: Sequence[str], block_hash: str, number: int, timestamp: int
) -> list[dict[str, Any]]:
    # Texts that all logs of a block share are made once: it is most of the memory of a long chain.
    number_hex, timestamp_hex = hex(number), hex(timestamp)
    logs: list[dict[str, Any]] = []
    for tx_index, (tx, tx_hash) in enumerate(zip(transactions, tx_hashes, strict=True)):
        for log in tx:
            if not isinstance(log, FakeLog):
                raise TypeError("each argument of mine() is one transaction: a sequence of FakeLog")
            logs.append(
                {
                    "address": log.address,
                    "topics": list(log.topics),
                    "data": log.data,
                    "blockHash": block_hash,
                    "blockNumber": number_hex,
                    "blockTimestamp": timestamp_hex,
                    "transactionHash": tx_hash,
                    "transactionIndex": hex(tx_index),
                    "logIndex": hex(len(logs)),
                    "removed": False,
                }
            )
    return logs


def _json_header(
    number: int,
    block_hash: str,
    parent_hash: str,
    timestamp: int,
    tx_hashes: Sequence[str],
    logs: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    root = "0x" + _digest(" ".join(tx_hashes)).hex() if tx_hashes else _EMPTY_ROOT
    return {
        "hash": block_hash,
        "parentHash": parent_hash,
        "number": hex(number),
        "timestamp": hex(timestamp),
        "logsBloom": logs_bloom(logs) if logs else EMPTY_BLOOM,
        "transactionsRoot": root,
        "receiptsRoot": root,
        "gasUsed": hex(21_000 * len(tx_hashes)),
        "size": hex(600 + 110 * len(tx_hashes)),
        "transactions": list(tx_hashes),
        **_FILLING,
    }
