"""The deliberate exceptions, drawn as a tree. Everything else that is raised is a bug or a hook's own.

    IndexerError
    ├── UsageError        2   what the operator typed or configured can't work
    │   ├── ConfigError       a setting
    │   ├── AbiError          an ABI file or an event signature
    │   ├── HookLoadError     a hook that is not there or does not import
    │   ├── MigrationError    a migration file that was changed, or a database that is newer than we are
    │   └── WrongNetwork      the chain is not the one that was configured or first seen
    ├── Halted            3   nothing can be committed before a person has looked
    │   ├── HookFailed        a hook raised, and its policy is to halt (UndeclaredTable: it wrote a foreign table)
    │   ├── DeepReorg         the chain changed below what was final
    │   └── MissingBlock      a block that the chain has passed, and that no node gives
    └── Temporary        75   may be well again by itself
        ├── DatabaseUnavailable
        ├── RpcUnavailable
        └── LostLeadership    another process holds the lock or has moved the cursor
"""

from __future__ import annotations


class IndexerError(Exception):
    """Base of all deliberate errors. Its text is one line that says what to do; `exit_code` is the process's."""

    exit_code = 1


class UsageError(IndexerError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class AbiError(UsageError):
    pass


class HookLoadError(UsageError):
    """`details` is the traceback of the hook's own import, shown above the one line."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class MigrationError(UsageError):
    pass


class WrongNetwork(UsageError):
    pass


def accept_hint(source: str, identity: str) -> str:
    """What else can be done about another chain id: a chain of some kinds may have been started anew under it."""
    if source == "evm":
        return ""
    return f"; if the chain was started anew under that id: `indexer chain accept {identity}` takes the new chain"


class Halted(IndexerError):
    exit_code = 3


class HookFailed(Halted):
    """A hook raised on the blocks `first` to `last`; `__cause__` is what it raised."""

    def __init__(self, hook: str, first: int, last: int, cause: BaseException) -> None:
        at = f"block {first}" if first == last else f"blocks {first} to {last}"
        super().__init__(f"hook {hook} failed at {at}: {type(cause).__name__}: {cause}")
        self.hook, self.first, self.last = hook, first, last
        self.__cause__ = cause


class UndeclaredTable(Exception):
    """A hook wrote a table that it does not declare: nothing could undo that. What a HookFailed is caused by."""


class DeepReorg(Halted):
    pass


class MissingBlock(Halted):
    """A hole in the heights: block `number` is not to be had, though the chain goes on after it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Temporary(IndexerError):
    exit_code = 75


class DatabaseUnavailable(Temporary):
    pass


class RpcUnavailable(Temporary):
    pass


class LostLeadership(Temporary):
    pass
