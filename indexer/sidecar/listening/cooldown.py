"""Kinds of failure, and how long a person is left alone after so many of them in a row."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum

from indexer.sidecar.providers import ProviderError, Saturated, Terminal


class FailureType(StrEnum):
    AUTH = "AUTH"
    NETWORK = "NETWORK"
    UNKNOWN = "UNKNOWN"


# the first one, and the longest
COOL_DOWNS: Mapping[FailureType, tuple[timedelta, timedelta]] = {
    FailureType.AUTH: (timedelta(minutes=30), timedelta(hours=4)),
    FailureType.NETWORK: (timedelta(minutes=10), timedelta(hours=1)),
    FailureType.UNKNOWN: (timedelta(minutes=20), timedelta(hours=3)),
}
# The person has taken the permission back, which may also be an error of theirs once.
DEACTIVATING_FAILURES = 2


def cool_down(kind: FailureType, failures: int) -> timedelta:
    """base x 2^(failures - 1), capped; `failures` in a row, this one included."""
    base, longest = COOL_DOWNS[kind]
    return min(base * 2.0 ** min(failures - 1, 16), longest)


def failure_type(error: ProviderError) -> FailureType:
    """What a provider's refusal of one person is: 5xx and no answer are the network's, 401 and 403 the person's."""
    if error.code == "invalid_grant" or (isinstance(error, Terminal) and error.status in (401, 403)):
        return FailureType.AUTH
    if isinstance(error, Saturated) or (error.status is not None and error.status >= 500):
        return FailureType.NETWORK
    return FailureType.UNKNOWN
