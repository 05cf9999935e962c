"""The configured contracts: what to ask the node for, and how its logs become events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from indexer.config import ContractSettings
from indexer.model import Event, Quarantined
from indexer.sources.abi import EventDecoder, Undecodable, bloom_mask, compile_contract

if TYPE_CHECKING:
    from indexer.sources.evm import Log


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
        return bool(log.topics) and log.topics[0] in self._decoders.get(log.address.lower(), {})

    def decode(self, log: Log, events: list[Event], quarantined: list[Quarantined]) -> None:
        """Append the log's event to `events`, or the raw log to `quarantined`; one that nobody asked for to neither."""
        table = self._decoders.get(log.address) or self._decoders.get(log.address.lower())
        if table is None or not log.topics:
            return
        found = table.get(log.topics[0])
        if found is None:
            return
        decoder, start_block = found
        tx_hash = bytes.fromhex(log.transaction_hash[2:])
        try:
            args = decoder.decode(log.topics, log.data)
        except Undecodable as error:
            quarantined.append(self._raw(log, decoder.name, tx_hash, str(error)))
            return
        if start_block and int(log.block_number, 16) < start_block:
            return
        events.append(Event(int(log.log_index, 16), decoder.name, args, log.address, tx_hash))

    def _raw(self, log: Log, event: str, tx_hash: bytes, error: str) -> Quarantined:
        return Quarantined(
            int(log.block_number, 16), bytes.fromhex(log.block_hash[2:]), int(log.log_index, 16), event,
            log.address.lower(), tx_hash, tuple(_lenient(topic) for topic in log.topics), _lenient(log.data), error,
        )  # fmt: skip


def _lenient(text: str) -> bytes:
    """The bytes of a hex text, or the text itself where even that is broken: it is kept to be looked at."""
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        return text.encode()
