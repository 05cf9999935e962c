"""What a Core node says about blocks, as protobuf's JSON mapping writes it, and the events that are in it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from indexer.model import Block, BlockRef, Event, Quarantined
from indexer.sources import trace
from indexer.sources.endpoint import Impossible

PLAYED, MANAGE_ENTITY = "Played", "ManageEntity"
EVENTS: Mapping[str, frozenset[str]] = {
    PLAYED: frozenset({"trackId", "userId", "playedAt", "signature", "city", "region", "country"}),
    MANAGE_ENTITY: frozenset(
        {"userId", "entityType", "entityId", "action", "metadata", "signature", "signer", "nonce"}
    ),
}  # fmt: skip
# Events decoded before other tasks (the commit under way) get their turn.
_EVENTS_A_TURN = 1_000


class Play(msgspec.Struct, gc=False, rename="camel"):
    user_id: str = ""
    track_id: str = ""
    timestamp: str = ""
    signature: str = ""
    city: str = ""
    region: str = ""
    country: str = ""


class Plays(msgspec.Struct, gc=False):
    plays: list[Play] = []


class ManageEntity(msgspec.Struct, gc=False, rename="camel"):
    user_id: str = ""
    entity_type: str = ""
    entity_id: str = ""
    action: str = ""
    metadata: str = ""
    signature: str = ""
    signer: str = ""
    nonce: str = ""


class Message(msgspec.Struct, gc=False, rename="camel"):
    """A transaction's content, as far as it is of ours: at most one of these is there."""

    plays: Plays | None = None
    manage_entity: ManageEntity | None = None


class Envelope(msgspec.Struct, gc=False):
    messages: list[Message] = []


class Enveloped(Message, gc=False):
    """The newer form: the content itself, or messages in an envelope."""

    envelope: Envelope | None = None


class Transaction(msgspec.Struct, gc=False):
    hash: str = ""
    transaction: Message | None = None
    transactionv2: Enveloped | None = None

    def messages(self) -> Iterator[Message]:
        if self.transaction is not None:
            yield self.transaction
        if self.transactionv2 is not None:
            yield self.transactionv2
            if self.transactionv2.envelope is not None:
                yield from self.transactionv2.envelope.messages


class _Head(msgspec.Struct, gc=False, rename="camel"):
    height: str | int = 0
    hash: str = ""
    chain_id: str = ""
    timestamp: str = ""


class CoreBlock(_Head, gc=False, rename="camel"):
    transactions: list[Transaction] = []


class RawBlock(_Head, gc=False, rename="camel"):
    """A block one of whose transactions is not of the form that it should be."""

    transactions: list[msgspec.Raw] | None = None


class Blocks(msgspec.Struct, gc=False, rename="camel"):
    """The answer of GetBlocks."""

    blocks: dict[str, CoreBlock] = {}
    current_height: str | int = -1


class RawBlocks(msgspec.Struct, gc=False, rename="camel"):
    blocks: dict[str, RawBlock] = {}
    current_height: str | int = -1


class OneBlock(msgspec.Struct, gc=False, rename="camel"):
    """The answer of GetBlock."""

    block: CoreBlock | None = None
    current_height: str | int = -1


class RawOneBlock(msgspec.Struct, gc=False, rename="camel"):
    block: RawBlock | None = None
    current_height: str | int = -1


class Decoded(NamedTuple):
    """Consecutive blocks: those with events, what could not be decoded, and the last block's ref and time."""

    blocks: tuple[Block, ...]
    quarantined: tuple[Quarantined, ...]
    end: BlockRef
    end_timestamp: int
    events: int


def height(given: str | int) -> int:
    """A height, of which protobuf's JSON makes a text; raises Impossible."""
    try:
        return int(given)
    except ValueError:
        raise Impossible("no height where one belongs") from None


async def decoded(blocks: Sequence[CoreBlock | RawBlock]) -> Decoded:
    """The blocks' events, a turn at a time, so that the commit under way keeps going; raises Impossible."""
    found: list[Block] = []
    quarantined: list[Quarantined] = []
    total, turn, started = 0, _EVENTS_A_TURN, time.perf_counter()
    for one in blocks:
        ref, timestamp = BlockRef(height(one.height), _hash(one.hash)), seconds(one.timestamp)
        events = _events(one, ref, quarantined)
        if events:
            found.append(Block(ref.number, ref.hash, None, timestamp, tuple(events)))
            total += len(events)
        if total >= turn:
            turn = total + _EVENTS_A_TURN
            await asyncio.sleep(0)
    if noted := trace.current():
        noted.decoded(sum(len(one.transactions or ()) for one in blocks), time.perf_counter() - started)
    return Decoded(tuple(found), tuple(quarantined), ref, timestamp, total)


def seconds(text: str) -> int:
    """The whole seconds since 1970 of an RFC 3339 time; raises Impossible."""
    try:
        if text[-1:] in "Zz":
            return int(datetime.fromisoformat(text[:19]).replace(tzinfo=UTC).timestamp())
        time = datetime.fromisoformat(text)
    except ValueError:
        raise Impossible("no time where one belongs") from None
    if time.tzinfo is None:
        raise Impossible("a time without its offset")
    return int(time.timestamp() // 1)


def _hash(text: str) -> bytes:
    try:
        raw = bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise Impossible("no hash where one belongs")
    return raw


def _events(block: CoreBlock | RawBlock, ref: BlockRef, quarantined: list[Quarantined]) -> list[Event]:
    """The block's events in the order served; what can't be decoded goes to `quarantined`."""
    events: list[Event] = []
    # by transaction, as one may be there twice
    plays: dict[bytes, int] = {}
    entities: dict[bytes, int] = {}
    for given in block.transactions or ():
        raw = bytes(given) if isinstance(given, msgspec.Raw) else b""
        try:
            one = _salvaged(given) if isinstance(given, msgspec.Raw) else given
        except msgspec.ValidationError as error:
            event = PLAYED if b'"plays"' in raw else MANAGE_ENTITY if b'"manageEntity"' in raw else None
            if event is not None:
                quarantined.append(_quarantined(raw, event, ref, f"malformed: {error}"))
            continue
        for message in one.messages():
            if message.plays is None and message.manage_entity is None:
                continue
            try:
                tx_hash = _hash(one.hash)
            except Impossible as error:
                event = MANAGE_ENTITY if message.plays is None else PLAYED
                quarantined.append(_quarantined(raw or msgspec.json.encode(one), event, ref, f"transaction: {error}"))
                break
            if message.plays is not None:
                before = plays.get(tx_hash, 0)
                plays[tx_hash] = before + len(message.plays.plays)
                for index, play in enumerate(message.plays.plays, before):
                    events.append(Event(index, PLAYED, _played(play), "", tx_hash))
            if message.manage_entity is not None:
                index = entities[tx_hash] = entities.get(tx_hash, -1) + 1
                events.append(Event(index, MANAGE_ENTITY, _managed(message.manage_entity), "", tx_hash))
    return events


def _played(play: Play) -> dict[str, str]:
    return {
        "trackId": play.track_id, "userId": play.user_id, "playedAt": play.timestamp, "signature": play.signature,
        "city": play.city, "region": play.region, "country": play.country,
    }  # fmt: skip


def _managed(one: ManageEntity) -> dict[str, str]:
    return {
        "userId": one.user_id, "entityType": one.entity_type, "entityId": one.entity_id, "action": one.action,
        "metadata": one.metadata, "signature": one.signature, "signer": one.signer, "nonce": one.nonce,
    }  # fmt: skip


def _salvaged(raw: msgspec.Raw) -> Transaction:
    """A transaction whose texts may be written as numbers or null; raises msgspec.ValidationError."""
    return msgspec.convert(_texts(msgspec.json.decode(raw)), Transaction)


def _texts(given: Any) -> Any:
    """The same with numbers as texts, and without what is null: to protobuf that is the absent field."""
    if isinstance(given, dict):
        return {name: _texts(value) for name, value in given.items() if value is not None}
    if isinstance(given, list):
        return [_texts(one) for one in given]
    return str(given) if isinstance(given, int) and not isinstance(given, bool) else given


def _quarantined(raw: bytes, event: str, ref: BlockRef, error: str) -> Quarantined:
    """The whole transaction, to be looked at.

    Its index is drawn from its hash: nodes serve the transactions of a block in no particular order.
    """
    try:
        tx_hash = _hash(msgspec.json.decode(raw)["hash"])
    except (Impossible, KeyError, TypeError, AttributeError):
        tx_hash = b""
    index = int.from_bytes((tx_hash or hashlib.sha256(raw).digest())[:6], "big")
    return Quarantined(ref.number, ref.hash, index, event, "", tx_hash, (), raw, error)


def answered(raw: bytes) -> tuple[str, Block, tuple[Quarantined, ...]]:
    """The chain's id and the block in an answer of GetBlock that was kept; raises Impossible, msgspec.DecodeError."""
    found: CoreBlock | RawBlock | None
    try:
        found = msgspec.json.decode(raw, type=OneBlock).block
    except msgspec.ValidationError:
        found = msgspec.json.decode(raw, type=RawOneBlock).block
    if found is None or height(found.height) < 0:
        raise Impossible("an answer without a block")
    ref, quarantined = BlockRef(height(found.height), _hash(found.hash)), list[Quarantined]()
    events = _events(found, ref, quarantined)
    block = Block(ref.number, ref.hash, None, seconds(found.timestamp), tuple(events))
    return found.chain_id, block, tuple(quarantined)
