"""The block source that the settings name."""

from __future__ import annotations

from indexer.config import Settings, SpanSettings
from indexer.errors import ConfigError
from indexer.model import BlockSource


def make_source(settings: Settings, *, span: SpanSettings | None = None) -> BlockSource:
    """The block source that `chain.source` names; raises ConfigError where its settings lack something.

    `span`: limits of a span that replace the configured ones.
    """
    span = span or settings.span
    if not settings.chain.endpoints:
        raise ConfigError('chain.endpoints is empty: name a node, as endpoints = [{url = "http://127.0.0.1:8545"}]')
    if not settings.contracts:
        raise ConfigError("contracts is empty: name what to index in [[contracts]] (address, abi, start_block)")
    # imported here, since only EVM chains need web3, which takes its time
    from indexer.sources.evm import EvmSource

    return EvmSource(settings.chain, settings.contracts, span)
