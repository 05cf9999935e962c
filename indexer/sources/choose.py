"""The block source that the settings name."""

from __future__ import annotations

from indexer.config import Settings, SpanSettings
from indexer.errors import ConfigError
from indexer.model import BlockSource


def make_source(settings: Settings, *, span: SpanSettings | None = None, to_end: bool = False) -> BlockSource:
    """The block source that `chain.source` names; raises ConfigError where its settings lack something.

    `span`: limits of a span that replace the configured ones. `to_end`: a file's end ends the daemon (see there).
    """
    span = span or settings.span
    if settings.chain.source == "recorded":
        if settings.chain.file is None:
            raise ConfigError('chain.file is empty: name the file of blocks, as file = "blocks.jsonl.gz"')
        from indexer.sources.recorded import RecordedSource

        return RecordedSource(settings.chain.file, span, to_end=to_end)
    if not settings.chain.endpoints:
        raise ConfigError('chain.endpoints is empty: name a node, as endpoints = [{url = "http://127.0.0.1:8545"}]')
    if settings.chain.source == "core":
        if settings.contracts:
            raise ConfigError("contracts: a Core chain has none; take [[contracts]] out, or set chain.source to evm")
        from indexer.sources.core import CoreSource

        return CoreSource(settings.chain, span)
    if not settings.contracts:
        raise ConfigError("contracts is empty: name what to index in [[contracts]] (address, abi, start_block)")
    # imported here, since only EVM chains need web3, which takes its time
    from indexer.sources.evm import EvmSource

    return EvmSource(settings.chain, settings.contracts, span)
