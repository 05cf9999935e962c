"""The data that flows and the protocols that join the parts. No behaviour.

A source checks and freezes what the chain said; beyond it there are no hex strings, no web3 types and no missing keys.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec

if TYPE_CHECKING:
    from indexer.transaction import Tx


class BlockRef(msgspec.Struct, frozen=True, gc=False):
    """A block's place: its number and its hash (32 bytes; empty before the first block)."""

    number: int
    hash: bytes


class Event(msgspec.Struct, frozen=True, gc=False):
    """One decoded event of a block.

    Together with `tx_hash` (32 bytes), `index` names it within its block: on EVM chains the log index; on Core the
    ordinal among the block's events of its name with that hash. Their order is that of `Block.events`. `args` maps
    argument names to plain Python values: int, str, bool, bytes, lists and tuples of them; an address is a lower-case
    0x text (on Core, a text as the chain has it).
    """

    index: int
    name: str
    args: Mapping[str, Any]
    address: str
    tx_hash: bytes


class Block(msgspec.Struct, frozen=True, gc=False):
    """A block with the events that were asked for, in chain order. `timestamp` is in seconds since 1970, UTC.

    `parent_hash` is None where it was not needed: below finality nothing hangs on it.
    """

    number: int
    hash: bytes
    parent_hash: bytes | None
    timestamp: int
    events: tuple[Event, ...] = ()

    @property
    def ref(self) -> BlockRef:
        return BlockRef(self.number, self.hash)


class Quarantined(msgspec.Struct, frozen=True, gc=False):
    """A log that matched a contract's event but could not be decoded, kept raw so that nothing is lost."""

    number: int
    block_hash: bytes
    index: int
    event: str
    address: str
    tx_hash: bytes
    topics: tuple[bytes, ...]
    data: bytes
    error: str


class Span(msgspec.Struct, frozen=True, gc=False):
    """Consecutive blocks, `first` to `last`, that are committed together: the unit of work.

    Below finality (`final`) only blocks with events are listed; above it a span is one block. `end` is the ref of
    `last`, whether listed or not.
    """

    first: int
    last: int
    blocks: tuple[Block, ...]
    end: BlockRef
    end_timestamp: int
    final: bool
    quarantined: tuple[Quarantined, ...] = ()

    @property
    def events(self) -> int:
        return sum(len(block.events) for block in self.blocks)


class Heads(msgspec.Struct, frozen=True, gc=False):
    """The newest block that the chain shows, with its hash where it came along, and the newest that is final."""

    newest: int
    final: int
    hash: bytes = b""


class EventSpec(msgspec.Struct, frozen=True):
    """An event that a hook listens to, and the arguments that it can't do without.

    `optional`: a source may lack the event, as long as it has another one that the hook listens to.
    """

    name: str
    args: tuple[str, ...] = ()
    optional: bool = False


class NodeFacts(Protocol):
    """What the status page shows of a node: its name and health, never an address. `latency` is in seconds."""

    name: str
    latency: float
    last_error: str

    @property
    def resting(self) -> float: ...


@runtime_checkable
class BlockSource(Protocol):
    """Where blocks come from. A source answers whole and checked, or waits; it never answers half.

    `events`: the events that it can give, with the names of their arguments. `first_block`: where to begin by default.
    `nodes`: those asked, for the status page. `instant`: a block is final once it exists.
    """

    instant: bool

    @property
    def events(self) -> Mapping[str, frozenset[str]]: ...

    @property
    def first_block(self) -> int: ...

    @property
    def nodes(self) -> Sequence[NodeFacts]: ...

    async def identity(self) -> str:
        """The chain id, compared with the one that the database was started with."""

    async def heads(self) -> Heads:
        """Newest and finalised block number."""

    def spans(self, first: int, last: int) -> AsyncIterator[Span]:
        """The blocks `first` to `last` in order, fetched ahead, whole and checked."""

    async def ref(self, number: int) -> BlockRef:
        """The chain's present block at `number`, to look for a fork."""

    async def wait(self, seconds: float) -> None:
        """Return when a new head is heard of, at the latest after `seconds`."""

    def took(self, seconds: float) -> None:
        """The transaction of the last span took so long: a hint for the size of the next ones."""

    async def close(self) -> None: ...


class Panel(msgspec.Struct, frozen=True):
    """A small table that a hook shows on the status page: a title and the SQL that reads it (its column names show)."""

    title: str
    sql: str


class Derived(msgspec.Struct, frozen=True):
    """A table whose rows follow from other tables, for `indexer verify` and `indexer rebuild`.

    `sql` is one select that gives exactly the rows that the table must have, computed from the tables `base`. Its
    columns are named as the table's, and the primary key is among them; columns that it leaves out are neither
    compared nor written. `only` is a condition for the rows that are the hook's: others are left alone. `shared` is a
    select of one boolean: whether another writer's rows may count in the table too, which a rebuild would lose.
    """

    table: str
    sql: str
    base: Sequence[str]
    only: str = "true"
    shared: str = ""


class Chore(msgspec.Struct, frozen=True):
    """Work on a hook's tables that is due now and then and belongs to no block: `indexer maintain`.

    `run(connection)` works in transactions of its own and returns one line that says what it did, or "" for nothing.
    """

    name: str
    run: Callable[[Any], Awaitable[str]]


@runtime_checkable
class Hook(Protocol):
    """What runs on every span, inside its transaction.

    `listens`: the events wanted. `tables`: the tables written. `after`: hooks that must have run before.

    Besides, it may have `migrations`, `panels`, `chores`; `also_after`: hooks that must have run before where they are
    enabled at all; `derived` (a sequence of Derived) with `kept`: tables of which a rebuild knows nothing, since their
    rows say what was known at the time; `brief`: somebody waits for its transactions, so they must be short; and
    `async prepare(connection)`, called at each start once the tables are there: a ConfigError from it ends the start.
    """

    name: str
    listens: Sequence[EventSpec]
    tables: Sequence[str]
    after: Sequence[str]

    async def apply(self, tx: Tx, blocks: Sequence[Block]) -> None: ...
