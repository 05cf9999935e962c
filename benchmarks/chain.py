"""The chain that the benchmarks read: made once with anvil, kept as anvil's state, served again in each run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from indexer.devchain import Anvil, DevClient, encode_call, load_artifact

ARTIFACT = Path(__file__).parent.parent / "tests" / "contracts" / "slim_registry.json"
SIGNATURE = "event Played(uint256 indexed trackId, uint256 indexed userId, uint64 playedAt, string country)"
COUNTRIES = ("Germany", "United States", "Brazil", "South Korea", "")
_MINED_AT_ONCE = 500


class Made(msgspec.Struct):
    """A chain of `blocks` blocks with `events` events of the contract at `address`."""

    address: str
    blocks: int
    events: int


async def make(folder: Path, events: int, blocks: int, a_transaction: int) -> Made:
    """Mine `events` events spread over `blocks` blocks, and leave the state in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    artifact = load_artifact(ARTIFACT)
    transactions = events // a_transaction
    args = ["--dump-state", str(folder / "state.json")]
    async with Anvil(args=args, slots_in_an_epoch=1) as anvil, DevClient(anvil.url) as client:
        address = await client.deploy(artifact)
        await client.set_automine(False)
        gap = max(1, blocks // transactions)
        for n in range(transactions):
            country = COUNTRIES[n % len(COUNTRIES)]
            call = encode_call(artifact["abi"], "playMany", a_transaction, n, 1_700_000_000 + 600 * n, country)
            await client.send(address, call, gas=29_000_000)
            await client.mine(gap)
            if n % _MINED_AT_ONCE == 0:
                print(f"mined {n * gap:,} of {blocks:,} blocks", file=sys.stderr, flush=True)
        head = await client.block_number()
        if head < blocks:
            await client.mine(blocks - head)
        made = Made(address, await client.block_number(), transactions * a_transaction)
    (folder / "made.json").write_bytes(msgspec.json.encode(made))
    return made


@asynccontextmanager
async def served(folder: Path, events: int, blocks: int, a_transaction: int) -> AsyncIterator[tuple[Anvil, Made]]:
    """The chain of `folder`, made first where it is not there yet, behind a fresh anvil."""
    if not (folder / "made.json").is_file():
        await make(folder, events, blocks, a_transaction)
    made = msgspec.json.decode((folder / "made.json").read_bytes(), type=Made)
    async with Anvil(args=["--load-state", str(folder / "state.json")], slots_in_an_epoch=1) as anvil:
        yield anvil, made


if __name__ == "__main__":
    asyncio.run(make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
