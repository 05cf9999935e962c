"""The simulated chain, seen by clients that are not ours: web3, plain HTTP, and anvil as the model to compare with."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from web3 import AsyncHTTPProvider, AsyncWeb3, WebSocketProvider
from web3.exceptions import BlockNotFound, Web3RPCError

from indexer.devchain import Anvil, DevChainError, DevClient, encode_call, find_anvil, load_artifact
from indexer.fakechain import (
    FakeChain,
    FakeLog,
    FakeNode,
    Fault,
    empty_logs,
    encode_event,
    event_abi,
    garbage,
    http_error,
    limit_range,
    limit_results,
    missing_block,
    null_blocks,
    old_head,
    rate_limited,
    slow,
    wrong_chain,
)

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = load_artifact(ROOT / "hooks" / "play_registry.json")
SLIM = load_artifact(ROOT / "tests" / "contracts" / "slim_registry.json")
ADDRESS, OTHER = "0x" + "ab" * 20, "0x" + "cd" * 20
PLAYED = event_abi(REGISTRY["abi"], "Played")
REGISTERED = event_abi(REGISTRY["abi"], "TrackRegistered")
SLIM_PLAYED = event_abi(SLIM["abi"], "Played")


def play(track: int, address: str = ADDRESS, city: str = "Köln") -> FakeLog:
    texts = {"trackId": str(track), "userId": "7", "playedAt": "1700000000", "signature": "0x12"}
    return encode_event(PLAYED, {**texts, "city": city, "region": "", "country": "DE"}, address)


def slim(track: int, user: int = 7, address: str = ADDRESS) -> FakeLog:
    args = {"trackId": track, "userId": user, "playedAt": 1_700_000_000, "country": "DE"}
    return encode_event(SLIM_PLAYED, args, address)


def web3_of(node: FakeNode | Anvil) -> AsyncWeb3[Any]:
    # One try a request: the faults are counted.
    return AsyncWeb3(AsyncHTTPProvider(node.url, exception_retry_configuration=None))


async def post(url: str, payload: Any) -> tuple[int, Any]:
    """Status, and the JSON that came (or the bytes, where it is none)."""
    async with aiohttp.ClientSession() as session, session.post(url, json=payload) as response:
        raw = await response.read()
        try:
            return response.status, await response.json(content_type=None)
        except ValueError:
            return response.status, raw


def request(method: str, *params: Any, number: int = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": list(params)}


async def call(node: FakeNode | Anvil, method: str, *params: Any) -> Any:
    """The result, or the error object."""
    _, reply = await post(node.url, request(method, *params))
    return reply.get("error", reply.get("result"))


# What web3 sees


async def test_web3_reads_blocks_and_decodes_what_was_encoded() -> None:
    chain = FakeChain(genesis_timestamp=1_000)
    mined = chain.mine([play(1), play(2)], [play(3, city="")])
    async with FakeNode(chain) as node:
        w3 = web3_of(node)
        assert await w3.eth.chain_id == 31337
        assert await w3.eth.block_number == 1
        block = await w3.eth.get_block("latest")
        assert (block["number"], block["timestamp"]) == (1, 1_002)
        assert block["hash"] == mined.hash == mined.ref.hash
        assert block["parentHash"] == chain.blocks[0].hash
        contract = w3.eth.contract(w3.to_checksum_address(ADDRESS), abi=REGISTRY["abi"])
        logs = await w3.eth.get_logs({"fromBlock": 0, "toBlock": "latest"})
        assert [log["logIndex"] for log in logs] == [0, 1, 2]
        assert [log["transactionIndex"] for log in logs] == [0, 0, 1]
        assert {log["blockHash"] for log in logs} == {mined.hash}
        assert [log["transactionHash"] for log in logs] == [block["transactions"][i] for i in (0, 0, 1)]
        decoded = [contract.events.Played().process_log(log)["args"] for log in logs]
        assert [(args["trackId"], args["city"]) for args in decoded] == [("1", "Köln"), ("2", "Köln"), ("3", "")]
        await w3.provider.disconnect()


def test_indexed_arguments_become_topics_as_web3_computes_them() -> None:
    args = {"trackId": 5, "ownerId": 2**256 - 1, "title": "Ö", "genre": ""}
    log = encode_event(REGISTERED, args, ADDRESS.upper().replace("0X", "0x"))
    assert log.address == ADDRESS
    raw = {
        "address": AsyncWeb3.to_checksum_address(log.address),
        "topics": [bytes.fromhex(topic[2:]) for topic in log.topics],
        "data": bytes.fromhex(log.data[2:]),
        **dict.fromkeys(("blockNumber", "blockHash", "transactionHash", "transactionIndex", "logIndex"), 0),
    }
    event = AsyncWeb3().eth.contract(abi=REGISTRY["abi"]).events.TrackRegistered()
    assert dict(event.process_log(raw)["args"]) == args


def test_indexed_texts_and_arrays_are_hashed_in_place() -> None:
    inputs = [
        {"name": "text", "type": "string", "indexed": True},
        {"name": "numbers", "type": "uint8[]", "indexed": True},
        {"name": "pair", "type": "tuple", "indexed": True, "components": [{"type": "address"}, {"type": "bytes"}]},
    ]
    args = {"text": "hé", "numbers": [1, 2], "pair": (ADDRESS, b"x" * 33)}
    log = encode_event({"name": "E", "type": "event", "inputs": inputs}, args, ADDRESS)
    keccak = AsyncWeb3.keccak
    assert log.topics[0] == "0x" + keccak(text="E(string,uint8[],(address,bytes))").hex()
    assert log.topics[1] == "0x" + keccak(text="hé").hex()
    assert log.topics[2] == "0x" + keccak((1).to_bytes(32, "big") + (2).to_bytes(32, "big")).hex()
    assert log.topics[3] == "0x" + keccak(bytes(12) + bytes.fromhex(ADDRESS[2:]) + b"x" * 33 + bytes(31)).hex()
    assert log.data == "0x"


def bloom_contains(bloom: bytes, item: str) -> bool:
    """As the yellow paper has it: bits counted from the right, written anew; anvil's is compared with ours below."""
    digest = AsyncWeb3.keccak(hexstr=item)
    places = [(digest[i] * 256 + digest[i + 1]) % 2048 for i in (0, 2, 4)]
    return all(bloom[255 - place // 8] & (1 << place % 8) for place in places)


async def test_bloom_is_real() -> None:
    chain = FakeChain()
    chain.mine([play(1), slim(5, 6)])
    async with FakeNode(chain) as node:
        w3 = web3_of(node)
        bloom = bytes((await w3.eth.get_block(1))["logsBloom"])
        assert len(bloom) == 256
        for log in chain.head.logs:
            for item in (log["address"], *log["topics"]):
                assert bloom_contains(bloom, item)
        assert not bloom_contains(bloom, OTHER)
        assert bytes((await w3.eth.get_block(0))["logsBloom"]) == bytes(256)
        await w3.provider.disconnect()


async def test_newheads_over_websocket_follow_mining_and_forks() -> None:
    chain = FakeChain()
    async with FakeNode(chain) as node, AsyncWeb3(WebSocketProvider(node.ws_url)) as w3:
        assert await w3.eth.chain_id == 31337
        subscription = await w3.eth.subscribe("newHeads")
        heads = w3.socket.process_subscriptions()

        async def heard() -> bytes:
            return bytes((await asyncio.wait_for(anext(heads), 5))["result"]["hash"])

        first = chain.mine([play(1)])
        assert await heard() == first.hash
        second = await asyncio.to_thread(chain.mine_empty, 1)
        assert await heard() == second.hash
        new = chain.fork(2, [[], [[play(2)]], []])
        assert [await heard() for _ in new] == [block.hash for block in new]
        node.muted = True
        chain.mine_empty()
        assert await w3.eth.block_number == 4  # an ordinary call on the same socket
        node.muted = False
        last = chain.mine_empty()
        assert await heard() == last.hash
        assert await w3.eth.unsubscribe(subscription)
        assert node.sockets == 1
        await node.drop_sockets()
    assert node.requests["eth_subscribe"] == node.requests["eth_unsubscribe"] == 1


# Methods


async def test_tags_and_unknown_blocks() -> None:
    chain = FakeChain(final_lag=4)
    chain.mine_empty(10)
    async with FakeNode(chain) as node, FakeNode(chain, supports_finalized=False, ws=False) as old:
        numbers = {}
        for tag in ("latest", "pending", "safe", "finalized", "earliest"):
            numbers[tag] = int((await call(node, "eth_getBlockByNumber", tag, False))["number"], 16)
        assert numbers == {"latest": 10, "pending": 10, "safe": 8, "finalized": 6, "earliest": 0}
        header = chain.blocks[3].header
        assert await call(node, "eth_getBlockByHash", header["hash"], False) == header
        assert await call(node, "eth_getBlockByNumber", "0xb", False) is None
        assert await call(node, "eth_getBlockByHash", "0x" + "12" * 32, False) is None
        assert await call(node, "net_version") == "31337"
        assert (await call(old, "eth_getBlockByNumber", "finalized", False))["code"] == -32602
        w3 = web3_of(node)
        with pytest.raises(BlockNotFound):
            await w3.eth.get_block(11)
        await w3.provider.disconnect()
        async with aiohttp.ClientSession() as session, session.get(old.url) as response:
            assert response.status == 405
        assert node.requests["eth_getBlockByNumber"] == 7


@pytest.mark.parametrize(
    ("query", "tracks"),
    [
        ({"fromBlock": "0x0"}, [1, 2, 3, 4]),
        ({"fromBlock": "0x2", "toBlock": "0x99"}, [3, 4]),
        ({"fromBlock": "0x0", "toBlock": "0x1"}, [1, 2]),
        ({"fromBlock": "0x2", "toBlock": "0x1"}, []),
        ({}, [3, 4]),
        ({"fromBlock": "0x0", "address": OTHER}, [2]),
        ({"fromBlock": "0x0", "address": [OTHER.upper().replace("0X", "0x"), ADDRESS]}, [1, 2, 3, 4]),
        ({"fromBlock": "0x0", "address": []}, [1, 2, 3, 4]),
        ({"fromBlock": "0x0", "topics": ["SLIM"]}, [1, 2, 3]),
        ({"fromBlock": "0x0", "topics": [["SLIM", "PLAYED"]]}, [1, 2, 3, 4]),
        ({"fromBlock": "0x0", "topics": ["SLIM", None, ["0x" + f"{7:064x}", "0x" + f"{8:064x}"]]}, [1, 2]),
        ({"fromBlock": "0x0", "topics": [None, "0x" + f"{3:064x}"]}, [3]),
        ({"fromBlock": "0x0", "topics": [None, None, None]}, [1, 2, 3]),
        ({"fromBlock": "0x0", "topics": []}, [1, 2, 3, 4]),
    ],
)
async def test_getlogs_filters(query: dict[str, Any], tracks: list[int]) -> None:
    chain = FakeChain()
    chain.mine([slim(1, 7), slim(2, 8, OTHER)])
    chain.mine([slim(3, 9)], [play(4)])
    signatures = {"SLIM": slim(0).topics[0], "PLAYED": play(0).topics[0]}

    def real(topic: Any) -> Any:
        return [real(one) for one in topic] if isinstance(topic, list) else signatures.get(topic, topic)

    if "topics" in query:
        query = {**query, "topics": real(query["topics"])}
    async with FakeNode(chain) as node:
        logs = await call(node, "eth_getLogs", query)
        assert logs == [log for log, track in zip(chain.logs(), (1, 2, 3, 4), strict=True) if track in tracks]
    async with FakeNode(chain, block_timestamp_in_logs=False) as node:
        assert not any("blockTimestamp" in log for log in await call(node, "eth_getLogs", query))


async def test_getlogs_by_hash_errors_and_receipts() -> None:
    chain = FakeChain()
    orphan = chain.mine([slim(1)])
    async with FakeNode(chain) as node:
        assert await call(node, "eth_getLogs", {"blockHash": orphan.header["hash"]}) == orphan.logs
        receipts = await call(node, "eth_getBlockReceipts", "latest")
        assert [log for receipt in receipts for log in receipt["logs"]] == orphan.logs
        assert receipts[0]["logsBloom"] == orphan.header["logsBloom"]
        chain.fork(1, [[], []])
        unknown = {"code": -32000, "message": "unknown block"}
        assert await call(node, "eth_getLogs", {"blockHash": orphan.header["hash"]}) == unknown
        assert await call(node, "eth_getBlockReceipts", "0x9") is None
        for query in (
            {"fromBlock": "0x3", "toBlock": "0x9"},
            {"fromBlock": "zz"},
            {"blockHash": chain.head.header["hash"], "fromBlock": "0x0"},
            {"address": 5},
            {"topics": [5]},
        ):
            assert (await call(node, "eth_getLogs", query))["code"] == -32602


async def test_batches_and_bad_requests() -> None:
    chain = FakeChain()
    chain.mine_empty(3)
    async with FakeNode(chain, keep_log=True) as node:
        batch = [request("eth_getBlockByNumber", hex(n), False, number=n) for n in range(5)] + [request("eth_nope")]
        status, replies = await post(node.url, batch)
        assert status == 200
        assert [reply["id"] for reply in replies] == [0, 1, 2, 3, 4, 1]
        assert [reply["result"] for reply in replies[:5]] == [*(block.header for block in chain.blocks), None]
        assert replies[5]["error"] == {"code": -32601, "message": "Method not found"}
        node.reverse_batches = True
        _, replies = await post(node.url, batch[:2])
        assert [reply["id"] for reply in replies] == [1, 0]
        assert node.http_requests == 2
        assert node.requests == {"eth_getBlockByNumber": 7, "eth_nope": 1}
        assert node.log[0] == ("eth_getBlockByNumber", ["0x0", False])
        for payload in ([], {"id": 1}, "text", [5]):
            _, reply = await post(node.url, payload)
            assert (reply[0] if isinstance(reply, list) else reply)["error"]["code"] == -32600


async def test_two_nodes_serve_one_chain_and_one_goes_away() -> None:
    chain = FakeChain()
    async with FakeNode(chain) as one, FakeNode(chain) as two:
        two.faults.append(old_head(1))
        chain.mine_empty(3)
        assert [await call(node, "eth_blockNumber") for node in (one, two)] == ["0x3", "0x2"]
        url = one.url
        await one.stop()
        with pytest.raises(aiohttp.ClientConnectionError):
            await call(one, "eth_blockNumber")
        await one.start()
        assert one.url == url
        assert await call(one, "eth_blockNumber") == "0x3"


# Forks


def test_forks_replace_blocks_and_keep_what_lies_below() -> None:
    chain = FakeChain()
    chain.mine([slim(1)])
    chain.mine([slim(2)], [slim(3)])
    before = list(chain.blocks)
    for depth, new, head in ((1, [[[slim(2)]]], 2), (2, [[]], 1), (1, [[], [], []], 3), (0, [[]], 4), (3, [], 1)):
        below = list(chain.blocks[: len(chain.blocks) - depth])
        added = chain.fork(depth, new)
        assert chain.blocks == below + added
        assert chain.head.number == head
    for parent, block in zip(chain.blocks, chain.blocks[1:], strict=False):
        assert block.parent_hash == parent.hash
        assert block.number == parent.number + 1
    assert before[2].hash not in {block.hash for block in chain.blocks}
    assert chain.by_hash(before[2].header["hash"]) is None
    assert chain.by_hash(chain.head.header["hash"]) is chain.head
    for depth in (2, -1):
        with pytest.raises(ValueError, match="block 0 stays"):
            chain.fork(depth, [])


def test_hashes_are_deterministic_and_follow_parent_content_and_fork() -> None:
    def build(*tracks: int) -> FakeChain:
        chain = FakeChain()
        for track in tracks:
            chain.mine([slim(track)])
        return chain

    first, again, other = build(1, 2), build(1, 2), build(3, 2)
    assert first.blocks == again.blocks
    assert first.head.hash != other.head.hash
    orphan = first.head
    (same_content,) = first.fork(1, [[[slim(2)]]])
    assert same_content.hash != orphan.hash
    # A transaction that is mined again keeps its hash, and one that merely has the same content does not share it.
    assert same_content.header["transactions"] == orphan.header["transactions"]
    assert first.mine([slim(2)]).header["transactions"] != orphan.header["transactions"]


def test_a_long_chain_is_quick() -> None:
    chain, logs = FakeChain(), [slim(track) for track in range(20)]
    began = time.monotonic()
    for _ in range(1_000):
        chain.mine(logs)
    assert len(chain.logs()) == 20_000
    assert time.monotonic() - began < 5


# Faults


async def getlogs(node: FakeNode, first: int, last: int) -> Any:
    return await call(node, "eth_getLogs", {"fromBlock": hex(first), "toBlock": hex(last)})


async def test_limits_name_a_range_that_works() -> None:
    chain = FakeChain()
    for n in range(1, 10):
        chain.mine([slim(n), slim(n)])
    async with FakeNode(chain) as node:
        node.faults = [limit_range(5, -32602, lambda first, _last: f"try [{hex(first)}, {hex(first + 4)}]")]
        assert (await getlogs(node, 1, 6))["message"] == "try [0x1, 0x5]"
        assert len(await getlogs(node, 1, 5)) == 10
        assert (await call(node, "eth_getLogs", {"fromBlock": "0x1"}))["code"] == -32602  # latest counts as a number
        node.faults = [
            limit_results(7, -32005, lambda first, last: f"retry with the range {first}-{last}", data={"n": 1})
        ]
        answer = await getlogs(node, 2, 9)
        assert answer == {"code": -32005, "message": "retry with the range 2-4", "data": {"n": 1}}
        assert len(await getlogs(node, 2, 4)) == 6
        w3 = web3_of(node)
        with pytest.raises(Web3RPCError, match="retry with the range"):
            await w3.eth.get_logs({"fromBlock": 0, "toBlock": 9})
        await w3.provider.disconnect()


async def test_http_faults() -> None:
    chain = FakeChain()
    async with FakeNode(chain) as node:
        node.faults = [rate_limited(1, retry_after=2), rate_limited(1, status=200), http_error(503, 1, b"down")]
        node.faults += [garbage(2), slow(0.05, 1)]
        batch = [request("eth_chainId")]
        async with aiohttp.ClientSession() as session, session.post(node.url, json=batch) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "2")
            assert (await response.json())["error"]["code"] == -32005
        assert (await call(node, "eth_chainId"))["code"] == -32005
        assert await post(node.url, request("eth_chainId")) == (503, b"down")
        assert (await post(node.url, request("eth_chainId")))[1].startswith(b'{"jsonrpc"')
        assert (await post(node.url, request("eth_chainId")))[1].startswith(b"<html>")
        began = time.monotonic()
        assert await call(node, "eth_chainId") == "0x7a69"
        assert time.monotonic() - began >= 0.05
        assert await call(node, "eth_chainId") == "0x7a69"


async def test_lies() -> None:
    chain = FakeChain(final_lag=4)
    for n in range(1, 11):
        chain.mine([slim(n)])
    async with FakeNode(chain) as node:
        node.faults = [null_blocks(1), empty_logs(1, number=3), wrong_chain(5)]
        assert await call(node, "eth_getBlockByNumber", "latest", False) is not None
        assert await call(node, "eth_getBlockByNumber", "0x3", False) is None
        assert await call(node, "eth_getBlockByNumber", "0x3", False) == chain.blocks[3].header
        assert len(await getlogs(node, 4, 5)) == 2
        assert await getlogs(node, 3, 3) == []
        assert len(await getlogs(node, 3, 3)) == 1
        assert await call(node, "eth_chainId") == "0x5"
        node.faults = [missing_block(4)]
        assert await call(node, "eth_getBlockByNumber", "0x4", False) is None
        assert await call(node, "eth_getBlockByHash", chain.blocks[4].header["hash"], False) is None
        assert (await getlogs(node, 1, 9))["message"] == "header not found"
        assert (await call(node, "eth_getLogs", {"blockHash": chain.blocks[4].header["hash"]}))["code"] == -32000
        assert len(await getlogs(node, 5, 9)) == 5


async def test_a_node_that_lags_is_consistent() -> None:
    chain = FakeChain(final_lag=4)
    for n in range(1, 11):
        chain.mine([slim(n)])
    async with FakeNode(chain) as node:
        node.faults = [old_head(3, times=2)]
        assert len(await getlogs(node, 1, 10)) == 7
        assert (await getlogs(node, 8, 10))["code"] == -32602
        assert await call(node, "eth_getBlockByNumber", "0x8", False) is None
        assert await call(node, "eth_blockNumber") == "0x7"
        assert (await call(node, "eth_getBlockByNumber", "finalized", False))["number"] == "0x3"
        assert await call(node, "eth_blockNumber") == "0xa"
        assert len(await getlogs(node, 1, 10)) == 10


async def test_own_faults_apply_in_order_and_over_websocket() -> None:
    chain = FakeChain()
    async with FakeNode(chain) as node, aiohttp.ClientSession() as session, session.ws_connect(node.ws_url) as ws:
        node.faults = [
            lambda _method, _params: Fault(delay_seconds=0.01),
            lambda method, _params: Fault(result="0x2a") if method == "eth_blockNumber" else None,
            rate_limited(1),
        ]
        answers = []
        for method in ("eth_blockNumber", "eth_chainId", "eth_chainId"):
            await ws.send_json(request(method))
            answers.append(await ws.receive_json(timeout=5))
        assert answers[0]["result"] == "0x2a"  # and the rate limit is still unspent
        assert answers[1]["error"]["code"] == -32005
        assert answers[2]["result"] == "0x7a69"


# anvil


@pytest.fixture
def anvil_needed() -> None:
    if find_anvil() is None:
        message = "anvil is not installed: set ANVIL_BIN or install @foundry-rs/anvil into .dev"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)


async def test_fake_and_anvil_answer_alike(anvil_needed: None) -> None:
    async with Anvil(slots_in_an_epoch=2) as anvil, DevClient(anvil.url) as client:
        address = await client.deploy(SLIM)
        tx_hash = await client.send(address, encode_call(SLIM["abi"], "play", 5, 7, 1_700_000_000, "DE"))
        receipt = await client.wait_receipt(tx_hash)
        chain = FakeChain(final_lag=4)
        chain.mine([])
        chain.mine([slim(5, 7, address)])
        async with FakeNode(chain) as fake:
            nodes: tuple[Anvil | FakeNode, ...] = (anvil, fake)
            (theirs,), (ours,) = [await call(node, "eth_getLogs", {"fromBlock": "0x0"}) for node in nodes]
            assert theirs.keys() == ours.keys()
            same = ("address", "topics", "data", "blockNumber", "transactionIndex", "logIndex", "removed")
            assert {key: theirs[key] for key in same} == {key: ours[key] for key in same}
            assert receipt["logs"] == [theirs]
            theirs, ours = [await call(node, "eth_getBlockByNumber", "latest", False) for node in nodes]
            assert theirs.keys() == ours.keys()
            assert theirs["logsBloom"] == ours["logsBloom"]
            assert {key: type(value) for key, value in theirs.items()} == {k: type(v) for k, v in ours.items()}
            (theirs,), (ours,) = [await call(node, "eth_getBlockReceipts", "latest") for node in nodes]
            assert ours.keys() <= theirs.keys()
            for method, *params in (
                ("eth_getBlockByNumber", "0x99", False),
                ("eth_getBlockByNumber", "foo", False),
                ("eth_getBlockByHash", "0x" + "12" * 32, False),
                ("eth_getBlockReceipts", "0x99"),
                ("eth_getLogs", {"fromBlock": "0x99", "toBlock": "0x999"}),
                ("eth_getLogs", {"fromBlock": "0x2", "toBlock": "0x1"}),
                ("eth_getLogs", {"blockHash": "0x" + "12" * 32}),
                ("eth_getLogs", {"blockHash": "0x" + "12" * 32, "fromBlock": "0x0"}),
                ("eth_getLogs", {"fromBlock": "zz"}),
                ("eth_subscribe", "newHeads"),
                ("eth_nope",),
                ("eth_chainId",),
                ("net_version",),
                ("eth_syncing",),
            ):
                theirs, ours = [await call(node, method, *params) for node in nodes]
                assert theirs == ours, (method, params)


async def test_anvil_puts_transactions_into_one_block_and_reorganises(anvil_needed: None) -> None:
    async with Anvil() as anvil, DevClient(anvil.url) as client:
        address = await client.deploy(REGISTRY)
        plays = [[str(track), "7", "1700000000", "0x12", "Köln", "", "DE"] for track in range(3)]
        timestamp = int((await client.rpc("eth_getBlockByNumber", "latest", False))["timestamp"], 16) + 1_000
        abi = REGISTRY["abi"]
        calls = [encode_call(abi, "play", *plays[0]), encode_call(abi, "playMany", [tuple(p) for p in plays[1:]])]
        calls.append(encode_call(abi, "registerTrack", 5, 6, "Title", "Jazz"))
        receipts = await client.send_in_one_block(address, calls, timestamp=timestamp)
        assert {receipt["blockNumber"] for receipt in receipts} == {"0x2"}
        logs = await client.rpc("eth_getLogs", {"blockHash": receipts[0]["blockHash"]})
        assert {int(log["blockTimestamp"], 16) for log in logs} == {timestamp}
        title = {"trackId": 5, "ownerId": 6, "title": "Title", "genre": "Jazz"}
        names = [argument["name"] for argument in PLAYED["inputs"]]
        expected = [encode_event(PLAYED, dict(zip(names, texts, strict=True)), address) for texts in plays]
        expected.append(encode_event(REGISTERED, title, address))
        assert [FakeLog(log["address"], tuple(log["topics"]), log["data"]) for log in logs] == expected
        await client.mine(3)
        assert await client.block_number() == 5
        await client.reorg(4)
        assert await client.block_number() == 5
        with pytest.raises(DevChainError, match="unknown block"):
            await client.rpc("eth_getLogs", {"blockHash": receipts[0]["blockHash"]})
        assert await client.rpc("eth_getLogs", {"fromBlock": "0x0"}) == []
        process = anvil.process
        assert process is not None
    assert process.returncode is not None


async def test_slim_registry_makes_many_plays(anvil_needed: None) -> None:
    async with Anvil() as anvil, DevClient(anvil.url) as client:
        address = await client.deploy(SLIM)
        data = encode_call(SLIM["abi"], "playMany", 2_000, 1, 1_700_000_000, "DE")
        receipt = await client.wait_receipt(await client.send(address, data, gas=16_000_000))
        tracks = {int(log["topics"][1], 16) for log in receipt["logs"]}
        assert len(receipt["logs"]) == 2_000
        assert len(tracks) > 1_000
        assert max(tracks) < 5_000
        with pytest.raises(DevChainError):
            await client.wait_receipt(await client.send(address, "0x12345678", gas=100_000))
