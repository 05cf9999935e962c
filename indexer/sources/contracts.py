"""The configured contracts: what to ask the node for, and how its logs become events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence

from indexer.config import ContractSettings
from indexer.model import Block, Event, Quarantined
from indexer.sources import trace
from indexer.sources.abi import EventDecoder, Undecodable, bloom_mask, compile_contract
from indexer.sources.endpoint import Impossible
from indexer.sources.wire import Log, to_bytes

# Logs decoded before other tasks (the commit under way) get their turn.
_LOGS_A_TURN = 500


class Contracts:
    """All configured contracts together: one filter, one table of decoders.

    `addresses` (lower-case) and `topics` (0x texts) are the filter of eth_getLogs; a log that only their cross product
    let in is passed over.
    """

    def __init__(self, settings: Sequence[ContractSettings]) -> None:
        self._decoders: dict[str, dict[str, tuple[EventDecoder, int]]] = {}
        self._topics: dict[str, EventDecoder] = {}
        for contract in settings:
            decoders = compile_contract(contract)
            for address in contract.address:
                table = self._decoders.setdefault(address.lower(), {})
                for decoder in decoders:
                    topic = "0x" + decoder.topic0.hex()
                    table[topic] = (decoder, contract.start_block)
                    self._topics[topic] = decoder
        self.addresses = list(self._decoders)
        self.topics = list(self._topics)
        self.first_block = min((contract.start_block for contract in settings), default=0)
        self._address_masks = [bloom_mask(bytes.fromhex(one[2:])) for one in self.addresses]
        self._topic_masks = [bloom_mask(bytes.fromhex(one[2:])) for one in self.topics]

    @property
    def events(self) -> Mapping[str, frozenset[str]]:
        """Event names with the names of their arguments (all of them, where an event is overloaded)."""
        known: dict[str, frozenset[str]] = {}
        for table in self._decoders.values():
            for decoder, _ in table.values():
                known[decoder.name] = known.get(decoder.name, frozenset()) | frozenset(decoder.args)
        return known

    def may_be_in(self, bloom: int) -> bool:
        """Whether a block's logsBloom allows for a log of ours: an address and a topic of the filter."""
        return any(bloom & mask == mask for mask in self._address_masks) and any(
            bloom & mask == mask for mask in self._topic_masks
        )

    def wants(self, log: Log) -> bool:
        return self._decoder(log) is not None

    def _decoder(self, log: Log) -> tuple[EventDecoder, int] | None:
        """The log's decoder and its contract's first block; None where nobody asked for the log."""
        if not log.topics:
            return None
        table = self._decoders.get(log.address)
        if table is not None and log.topics[0] in table:
            return table[log.topics[0]]
        # some nodes write addresses with a checksum in upper and lower case
        return self._decoders.get(log.address.lower(), {}).get(log.topics[0].lower())

    async def blocks(
        self, logs: Sequence[Log], timestamps: Mapping[int, int]
    ) -> tuple[tuple[Block, ...], tuple[Quarantined, ...]]:
        """Logs in chain order as blocks with their events (blocks without are left out), and what can't be decoded.

        Decodes a turn at a time, so that the commit under way keeps going. Raises Impossible.
        """
        blocks: list[Block] = []
        quarantined: list[Quarantined] = []
        events: list[Event] = []
        current, started = "", time.perf_counter()
        for n, one in enumerate(logs):
            if one.block_number != current:
                if events:
                    blocks.append(_block(logs[n - 1], timestamps, events))
                    events = []
                current = one.block_number
            self._decode(one, events, quarantined)
            if n % _LOGS_A_TURN == _LOGS_A_TURN - 1:
                await asyncio.sleep(0)
        if events:
            blocks.append(_block(logs[-1], timestamps, events))
        if noted := trace.current():
            noted.decoded(len(logs), time.perf_counter() - started)
        return tuple(blocks), tuple(quarantined)

    def _decode(self, log: Log, events: list[Event], quarantined: list[Quarantined]) -> None:
        """Append the log's event to `events`, or the raw log to `quarantined`; one that nobody asked for to neither."""
        found = self._decoder(log)
        if found is None:
            return
        decoder, start_block = found
        if start_block and int(log.block_number, 16) < start_block:
            return
        tx_hash = _hash(log.transaction_hash)
        try:
            args = decoder.decode(log.topics, log.data)
        except Undecodable as error:
            quarantined.append(self._raw(log, decoder.name, tx_hash, str(error)))
            return
        events.append(Event(int(log.log_index, 16), decoder.name, args, log.address.lower(), tx_hash))

    def _raw(self, log: Log, event: str, tx_hash: bytes, error: str) -> Quarantined:
        return Quarantined(
            int(log.block_number, 16), to_bytes(log.block_hash), int(log.log_index, 16), event,
            log.address.lower(), tx_hash, tuple(_lenient(topic) for topic in log.topics), _lenient(log.data), error,
        )  # fmt: skip


def _block(log: Log, timestamps: Mapping[int, int], events: Sequence[Event]) -> Block:
    number = int(log.block_number, 16)
    return Block(number, to_bytes(log.block_hash), None, timestamps[number], tuple(events))


def _hash(text: str) -> bytes:
    try:
        raw = bytes.fromhex(text[2:])
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise Impossible("a log's transaction hash is none")
    return raw


def _lenient(text: str) -> bytes:
    """The bytes of a hex text, or the text itself where even that is broken: it is kept to be looked at."""
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        return text.encode()
