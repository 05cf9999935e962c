"""Every metric of the process, in one place. Labels are bounded: never a contract, a track, a song or a person."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

# When each of its series came to be is of no use to Prometheus, and would be a fifth of all series.
disable_created_metrics()  # type: ignore[no-untyped-call]

registry = CollectorRegistry()
ProcessCollector(registry=registry)
PlatformCollector(registry=registry)

# From a block at the head in a few milliseconds to a span of thousands of events in seconds. Few steps: every one is a
# series more of each hook, of each route, and of each method at each endpoint.
_SECONDS = (0.002, 0.01, 0.05, 0.2, 1, 5, 30)
_REQUEST_SECONDS = (0.01, 0.05, 0.2, 1, 5)
_HTTP_SECONDS = (0.02, 0.1, 0.5, 3)
_JOB_SECONDS = (0.05, 0.5, 5, 30, 300)
_DEPTHS = (1, 2, 3, 5, 8, 13, 21, 34, 64, 128)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"indexer_{name}", text, labels, registry=registry)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"indexer_{name}", text, labels, registry=registry)


def _histogram(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
    return Histogram(f"indexer_{name}", text, labels, buckets=buckets, registry=registry)


build = Info("indexer", "Version, chain and source", registry=registry)

head_block = _gauge("head_block", "Newest block that the chain shows", "chain")
final_block = _gauge("final_block", "Newest block that can't be reorganised", "chain")
cursor_block = _gauge("cursor_block", "Newest block that we have committed", "chain")
lag_blocks = _gauge("lag_blocks", "Blocks between the head and our own cursor", "chain")
lag_seconds = _gauge("lag_seconds", "Age of the newest block that we have committed while behind, else 0", "chain")
leader = _gauge("leader", "1 while this process leads the chain, 0 while it stands by", "chain")
halted = _gauge("halted", "1 while a hook's failure holds the chain at a block", "chain", "hook")

blocks_total = _counter("blocks_total", "Blocks committed", "chain")
events_total = _counter("events_total", "Events committed", "chain")
spans_total = _counter("spans_total", "Spans (transactions) committed", "chain")
rows_total = _counter("rows_total", "Rows committed, by table and op", "table", "op")
span_seconds = _histogram("span_seconds", "Where a span's time goes: fetch, decode, apply, commit", "stage")

hook_seconds = _histogram("hook_seconds", "Time of a hook in a span", "hook")
hook_failures_total = _counter("hook_failures_total", "Failures of a hook, by what its policy did", "hook", "policy")
gap_blocks = _gauge("gap_blocks", "Blocks between start and cursor that the hook has not covered", "hook")
quarantined_total = _counter("quarantined_total", "Logs that could not be decoded", "hook", "reason")
skipped_total = _counter("skipped_total", "Events that a hook's rules pass over", "hook", "reason")
reorgs_total = _counter("reorgs_total", "Reorganisations undone", "chain")
reorg_depth = _histogram("reorg_depth", "Blocks undone by a reorganisation", "chain", buckets=_DEPTHS)
journal_rows = _gauge("journal_rows", "Rows kept to undo a reorganisation", "chain")
stalled_seconds = _gauge("stalled_seconds", "Since the head moved and nothing was committed", "on")

rpc_requests_total = _counter("rpc_requests_total", "Requests to a node", "endpoint", "method", "outcome")
rpc_seconds = _histogram("rpc_seconds", "Time of a request to a node", "endpoint", "method", buckets=_REQUEST_SECONDS)
rpc_range_blocks = _gauge("rpc_range_blocks", "Blocks asked for in one range", "endpoint")
endpoint_healthy = _gauge("endpoint_healthy", "1 while the endpoint is used, 0 while it rests", "endpoint")

jobs = _gauge("jobs", "Jobs that wait, run, are held, or wait for their block's finality", "kind", "state")
job_oldest_seconds = _gauge("job_oldest_seconds", "Age of the oldest such job that is due", "kind", "state")
job_seconds = _histogram("job_seconds", "Time of a job, by how it ended", "kind", "outcome", buckets=_JOB_SECONDS)
job_outcomes_total = _counter("job_outcomes_total", "Ends of jobs", "kind", "outcome")

gate_closed = _gauge("gate_closed", "1 while no job of the kind is begun, as while a provider rests", "kind")

provider_requests_total = _counter("provider_requests_total", "Requests to a provider", "provider", "status")
provider_seconds = _histogram("provider_seconds", "Time of a request to a provider", "provider", buckets=_JOB_SECONDS)
provider_budget_remaining = _gauge("provider_budget_remaining", "What is left of the month's budget", "provider")

listeners = _gauge("listeners", "People whose listening is archived, by how they stand", "state")
listener_oldest_poll_seconds = _gauge("listener_oldest_poll_seconds", "Longest time without a poll of who is due")
listener_failures_total = _counter("listener_failures_total", "Polls of people that failed", "type")
play_events_total = _counter("play_events_total", "Plays of people archived")
token_refreshes_total = _counter("token_refreshes_total", "Refreshes of people's tokens", "outcome")

http_requests_total = _counter("http_requests_total", "Requests to the sidecar's API", "route", "status")
http_seconds = _histogram("http_seconds", "Time of a request to the sidecar's API", "route", buckets=_HTTP_SECONDS)

db_pool_connections = _gauge("db_pool_connections", "Connections of the pool: used, idle, and their limit", "state")


def exposition() -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(registry)
