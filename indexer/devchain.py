"""A development chain: anvil as a child process, and a small client to drive it. For tests, benchmarks and the demo."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import msgspec

from indexer.errors import IndexerError, RpcUnavailable, UsageError

if TYPE_CHECKING:
    from eth_typing import ABIFunction

_PATTERN = "node_modules/@foundry-rs/anvil-*/bin/anvil"
_INSTALL = "npm install --no-save --no-package-lock --ignore-scripts --prefix .dev @foundry-rs/anvil@1.7.1"
_PR_SET_PDEATHSIG = 1
_START_SECONDS = 20.0
_POLL_SECONDS = 0.01


class DevChainError(IndexerError):
    """The dev chain refused a call (`code`, else None) or reverted a transaction."""

    def __init__(self, message: str, code: int | None = None, data: Any = None) -> None:
        super().__init__(message)
        self.code, self.data = code, data


def find_anvil() -> Path | None:
    """The anvil binary: $ANVIL_BIN, then PATH, then the npm package in .dev/ here or in the source checkout.

    The native binary is wanted, not npm's wrapper: that one is a node process which does not pass on its death.
    """
    if configured := os.environ.get("ANVIL_BIN"):
        return Path(configured) if os.access(configured, os.X_OK) else None
    if found := shutil.which("anvil"):
        return Path(found)
    for base in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if candidates := sorted((base / ".dev").glob(_PATTERN)):
            return candidates[-1]
    return None


class Anvil:
    """An anvil that runs while its context is entered; `url`, `ws_url` and `process` are set then.

    `port` 0 takes a free one. `slots_in_an_epoch` puts safe so many blocks behind the head and finalized twice as
    many. `block_time` mines every so many seconds, not on each transaction; `mixed_mining` does both. `args` are
    further arguments of anvil's; its output goes to `log_path`, if that is given. Raises UsageError where no anvil
    is installed and RpcUnavailable where it does not start.
    """

    def __init__(
        self,
        port: int = 0,
        *,
        slots_in_an_epoch: int = 32,
        block_time: float | None = None,
        mixed_mining: bool = False,
        args: Sequence[str] = (),
        log_path: Path | None = None,
        binary: Path | None = None,
    ) -> None:
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None
        self._any_port = port == 0
        self._log_path = log_path
        self._binary = binary
        self._args = ["--slots-in-an-epoch", str(slots_in_an_epoch)]
        if block_time is not None:
            self._args += ["--block-time", f"{block_time:g}"]
        self._args += [*(["--mixed-mining"] if mixed_mining else []), *args]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Anvil:
        for attempt in range(3):
            try:
                self.process = self._spawn()
                await self._wait_until_up(self.process)
                return self
            except BaseException as error:
                self._stop()
                # Somebody else may have taken the port between our look and anvil's bind.
                if not (isinstance(error, RpcUnavailable) and self._any_port and attempt < 2):
                    raise
        raise AssertionError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # In a thread, which finishes its work even where we are cancelled.
        await asyncio.to_thread(self._stop)

    def _spawn(self) -> subprocess.Popen[bytes]:
        binary = self._binary or find_anvil()
        if binary is None:
            raise UsageError(f"no anvil: set ANVIL_BIN to one, put it on PATH, or run: {_INSTALL}")
        if self._any_port:
            self.port = _free_port()
        output = self._log_path.open("ab") if self._log_path else None
        try:
            return subprocess.Popen(
                [binary, "--host", "127.0.0.1", "--port", str(self.port), *self._args],
                stdin=subprocess.DEVNULL,
                stdout=output or subprocess.DEVNULL,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent(),
                process_group=0,  # a terminal's Ctrl-C is for us, who end it in order
            )
        finally:
            if output:
                output.close()

    async def _wait_until_up(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_SECONDS
        async with DevClient(self.url) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise RpcUnavailable(f"anvil ended at once, with exit code {process.returncode}")
                try:
                    await client.rpc("eth_chainId")
                    return
                except (RpcUnavailable, DevChainError):
                    await asyncio.sleep(_POLL_SECONDS)
        raise RpcUnavailable(f"anvil did not answer within {_START_SECONDS:g} seconds")

    def _stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> Callable[[], None] | None:
    """What makes a child end with us even after kill -9, on Linux. It follows the thread that starts the child."""
    if not sys.platform.startswith("linux"):
        return None
    # All look-ups before the fork: between fork and exec only the bare calls are safe.
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return arrange


class DevClient:
    """Drives a dev chain by raw JSON-RPC; its accounts are the unlocked ones of the node.

    Hashes, addresses and call data are 0x hex; timestamps are unix seconds. Every method raises DevChainError where
    the node says no, and RpcUnavailable where there is none.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._session: aiohttp.ClientSession | None = None
        self._accounts: list[str] = []
        self._id = 0

    async def __aenter__(self) -> DevClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def rpc(self, method: str, *params: Any) -> Any:
        """The `result` of one call, as JSON says it."""
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300))
        self._id += 1
        call = {"jsonrpc": "2.0", "id": self._id, "method": method, "params": params}
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self.url, data=msgspec.json.encode(call), headers=headers) as response:
                reply = msgspec.json.decode(await response.read())
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as error:
            raise RpcUnavailable(f"{method}: no answer from the dev chain: {error}") from error
        if refusal := reply.get("error"):
            raise DevChainError(f"{method}: {refusal['message']}", refusal.get("code"), refusal.get("data"))
        return reply["result"]

    async def accounts(self) -> list[str]:
        """The node's accounts; the first one sends where no other is named."""
        if not self._accounts:
            self._accounts = await self.rpc("eth_accounts")
        return self._accounts

    async def deploy(self, artifact: Mapping[str, Any]) -> str:
        """Create the contract of an artifact ({"bytecode", ...}, no constructor arguments) and wait; its address."""
        receipt = await self.wait_receipt(await self.send(None, artifact["bytecode"]))
        return str(receipt["contractAddress"])

    async def send(self, to: str | None, data: str, gas: int | None = None, sender: str | None = None) -> str:
        """Hand in a transaction; its hash. It is not mined yet when this returns: see wait_receipt and mine.

        Without `gas` the node estimates it, which means running the call once more.
        """
        transaction = {"from": sender or (await self.accounts())[0], "data": data}
        if to is not None:
            transaction["to"] = to
        if gas is not None:
            transaction["gas"] = hex(gas)
        return str(await self.rpc("eth_sendTransaction", transaction))

    async def wait_receipt(self, tx_hash: str, timeout_seconds: float = 30) -> dict[str, Any]:
        """The receipt, once the transaction is mined; DevChainError if it reverted or is not mined in time."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            receipt: dict[str, Any] | None = await self.rpc("eth_getTransactionReceipt", tx_hash)
            if receipt is not None:
                if receipt["status"] != "0x1":
                    raise DevChainError(f"transaction {tx_hash} was reverted")
                return receipt
            await asyncio.sleep(_POLL_SECONDS)
        raise DevChainError(f"transaction {tx_hash} was not mined within {timeout_seconds:g} seconds")

    async def send_in_one_block(
        self, to: str, calls: Sequence[str], *, gas: int | None = None, timestamp: int | None = None
    ) -> list[dict[str, Any]]:
        """Put one transaction for each of `calls` into one block, in order; their receipts.

        For a chain that mines on each transaction, which it does again afterwards.
        """
        await self.set_automine(False)
        try:
            hashes = [await self.send(to, data, gas) for data in calls]
            if timestamp is not None:
                await self.set_next_timestamp(timestamp)
            await self.mine()
        finally:
            await self.set_automine(True)
        return [await self.wait_receipt(tx_hash) for tx_hash in hashes]

    async def mine(self, n: int = 1, seconds: int | None = None) -> None:
        """Mine `n` blocks now, `seconds` apart if given."""
        if n == 1 and seconds is None:
            await self.rpc("evm_mine")
        else:
            await self.rpc("anvil_mine", hex(n), *([] if seconds is None else [hex(seconds)]))

    async def reorg(self, depth: int, transactions: Sequence[tuple[Mapping[str, str], int]] = ()) -> None:
        """Replace the last `depth` blocks with as many new ones, empty but for `transactions`.

        Each of these is a request ({"from", "to", "data"}) and the index of the new block that it goes into.
        """
        await self.rpc("anvil_reorg", depth, list(transactions))

    async def set_automine(self, on: bool) -> None:
        await self.rpc("evm_setAutomine", on)

    async def set_next_timestamp(self, timestamp: int) -> None:
        """The next block's time; it must be later than the head's."""
        await self.rpc("evm_setNextBlockTimestamp", timestamp)

    async def block_number(self) -> int:
        return int(await self.rpc("eth_blockNumber"), 16)


def load_artifact(path: Path) -> dict[str, Any]:
    """A compiled contract: {"contractName", "abi", "bytecode"}."""
    artifact: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    return artifact


def encode_call(artifact_abi: Sequence[Mapping[str, Any]], name: str, *args: Any) -> str:
    """The call data of a contract's function as 0x hex; a struct is a tuple. LookupError if there is no such function.

    Of overloaded functions the first with so many arguments is taken.
    """
    from eth_abi.abi import encode
    from eth_utils.abi import collapse_if_tuple, function_abi_to_4byte_selector

    for entry in artifact_abi:
        if entry.get("type") == "function" and entry["name"] == name and len(entry["inputs"]) == len(args):
            types = [collapse_if_tuple(argument) for argument in entry["inputs"]]
            return "0x" + (function_abi_to_4byte_selector(cast("ABIFunction", entry)) + encode(types, args)).hex()
    raise LookupError(f"no function {name} with {len(args)} arguments in this ABI")
