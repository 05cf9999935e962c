"""A simulated Core chain: blocks of transactions as GetBlock answers them, mined here or taken from a recording."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from indexer.model import BlockRef

# Nodes serve a block's transactions sorted by kind; kinds that are not here come last.
KINDS = (
    "plays", "manageEntity", "validatorRegistration", "validatorDeregistration", "attestation", "slaRollup",
    "storageProof", "storageProofVerification", "release", "reward", "fileUpload",
)  # fmt: skip
# Of the blocks' times in turn: protobuf writes as many digits as are needed.
_FRACTIONS = ("", ".5", ".123456", ".123456789")


class FakeCoreBlock(msgspec.Struct, frozen=True, gc=False):
    """A block. `timestamp` is in whole seconds; `json` is the block as a node answers it, ready to be sent."""

    height: int
    hash: bytes
    timestamp: int
    chain_id: str
    json: bytes

    @property
    def ref(self) -> BlockRef:
        return BlockRef(self.height, self.hash)


class FakeCore:
    """A Core chain that exists in memory only. It begins with block `first`, and is empty at the start.

    Everything is deterministic: two chains that were treated alike are alike. A transaction's hash follows from its
    content alone, so that one that is submitted again has the same hash in another block. A changed `chain_id` goes for
    the blocks that are mined after it.
    """

    def __init__(
        self,
        chain_id: str = "core-test",
        *,
        first: int = 1,
        block_seconds: int = 1,
        genesis_timestamp: int = 1_741_989_725,
    ) -> None:
        self.chain_id, self.first, self.block_seconds = chain_id, first, block_seconds
        self.blocks: list[FakeCoreBlock] = []
        self._genesis = genesis_timestamp

    @classmethod
    def load(cls, lines: Iterable[bytes]) -> FakeCore:
        """The chain in a recording: answers of GetBlock, one a line, in order of height."""
        chain = cls()
        for line in lines:
            given = msgspec.json.decode(line, type=_Recorded).block
            facts = msgspec.json.decode(given, type=_Facts)
            if not chain.blocks:
                chain.chain_id, chain.first = facts.chain_id, int(facts.height)
            if int(facts.height) != chain.height + 1:
                raise ValueError(f"block {facts.height} comes after {chain.height}")
            timestamp = int(datetime.fromisoformat(facts.timestamp).timestamp())
            block_hash = bytes.fromhex(facts.hash)
            chain.blocks.append(
                FakeCoreBlock(int(facts.height), block_hash, timestamp, facts.chain_id, bytes(given))
            )  # fmt: skip
        return chain

    @property
    def height(self) -> int:
        """The newest block's; one below the first where there is none yet."""
        return self.first + len(self.blocks) - 1

    def block(self, height: int) -> FakeCoreBlock | None:
        """The block at this height, if the chain has it."""
        return self.blocks[height - self.first] if self.first <= height <= self.height else None

    def mine(self, *contents: Mapping[str, Any], timestamp: int | None = None) -> FakeCoreBlock:
        """Add a block; each argument is the content of a transaction: {"plays": {"plays": [...]}}.

        What stands under "transactionv2" goes there, and "hash" replaces the transaction's. `timestamp`: unix seconds,
        else `block_seconds` after the last one.
        """
        height = self.height + 1
        before = self.blocks[-1] if self.blocks else None
        if timestamp is None:
            timestamp = before.timestamp + self.block_seconds if before else self._genesis
        ordered = sorted(contents, key=_kind)
        hashes = [_digest(msgspec.json.encode(content, order="sorted")) for content in ordered]
        parent = before.hash.hex() if before else ""
        block_hash = _digest(f"{self.chain_id} {height} {parent} {timestamp} {hashes}".encode())
        time = datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%dT%H:%M:%S") + _FRACTIONS[height % 4] + "Z"
        place = {"chainId": self.chain_id, "height": str(height), "blockHash": block_hash, "timestamp": time}
        block: dict[str, Any] = {
            "height": str(height), "hash": block_hash, "chainId": self.chain_id, "proposer": block_hash[:40],
            "timestamp": time,
        }  # fmt: skip
        if contents:  # an empty list is absent
            block["transactions"] = [_json(one, digest, place) for one, digest in zip(ordered, hashes, strict=True)]
        mined = FakeCoreBlock(height, bytes.fromhex(block_hash), timestamp, self.chain_id, msgspec.json.encode(block))
        self.blocks.append(mined)
        return mined


class _Recorded(msgspec.Struct):
    block: msgspec.Raw


class _Facts(msgspec.Struct, rename="camel"):
    height: str
    hash: str
    chain_id: str
    timestamp: str


def _kind(content: Mapping[str, Any]) -> int:
    return next((n for n, kind in enumerate(KINDS) if kind in content), len(KINDS))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest().upper()


def _json(content: Mapping[str, Any], digest: str, place: Mapping[str, str]) -> dict[str, Any]:
    transaction: dict[str, Any] = {"hash": content.get("hash", digest)}
    plain = {name: value for name, value in content.items() if name not in ("hash", "transactionv2")}
    if plain:
        transaction["transaction"] = {"signature": digest.lower() * 2 + "00", **plain}
    if "transactionv2" in content:
        transaction["transactionv2"] = content["transactionv2"]
    return {**transaction, **place}


def core_play(
    track_id: str, user_id: str, timestamp: str, signature: str = "", *, city: str = "", region: str = "",
    country: str = "",
) -> dict[str, str]:  # fmt: skip
    """A play as the chain writes it: a text that is empty is absent."""
    fields = {
        "userId": user_id, "trackId": track_id, "timestamp": timestamp, "signature": signature, "city": city,
        "region": region, "country": country,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value}


def core_plays(*plays: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a transaction of plays."""
    return {"plays": {"plays": list(plays)} if plays else {}}
