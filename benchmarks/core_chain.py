"""A long Core chain for benchmarks: made once as a file of blocks, and served by a node that only copies bytes.

    python -m benchmarks.core_chain FOLDER 500000       make it (a minute or two, about 1 GB)

Blocks have the shape of the public chain's: 1.6 plays on average, a third of them by known people, few tracks played
much and most hardly; entities, proofs and attestations between them.
"""

from __future__ import annotations

import array
import asyncio
import json
import mmap
import random
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import msgspec
from aiohttp import web

CHAIN_ID = "bench-core-1"
START = 1_735_000_000  # the end of 2024: months and challenge years change on the way
BLOCK_SECONDS = 2
USERS, TRACKS = 60_000, 150_000
PLACES = (("Berlin", "Berlin", "Germany"), ("São Paulo", "", "Brazil"), ("", "", "Iceland"), ("Austin", "Texas", "USA"))
# How many plays transactions a block has (1.05 on average), and how many plays each of them (1.55).
TRANSACTIONS, OF_PLAYS = ((0, 1, 2, 3, 4), (36, 36, 17, 8, 3)), ((1, 2, 3, 4, 13), (67, 22, 6, 4, 1))


class Request(msgspec.Struct):
    height: list[str] | str = []


class Maker:
    """Makes one block after another, the same ones each time."""

    def __init__(self) -> None:
        self.chance = random.Random(7)
        self.users = list(accumulate(1 / (rank + 20) for rank in range(USERS)))
        self.tracks = list(accumulate(1 / (rank + 50) for rank in range(TRACKS)))
        self.plays = 0

    def block(self, height: int) -> str:
        """A block as JSON, as it stands in GetBlocks' map."""
        chance, seconds = self.chance, START + BLOCK_SECONDS * height
        time, stamp = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), f"{height:064X}"
        bodies = [self._plays(time) for _ in range(chance.choices(*TRANSACTIONS)[0])]
        if chance.random() < 0.4:
            bodies.append(self._entity())
        if chance.random() < 0.2:
            bodies.append(f'"storageProof":{{"height":"{height}","address":"A1A1","proverAddresses":["B2B2"]}}')
        transactions = ",".join(
            f'{{"hash":"{chance.getrandbits(256):064X}",'
            f'"transaction":{{"signature":"{chance.getrandbits(520):0130x}",{body}}},'
            f'"chainId":"{CHAIN_ID}","height":"{height}","blockHash":"{stamp}","timestamp":"{time}"}}'
            for body in bodies
        )
        listed = f',"transactions":[{transactions}]' if transactions else ""
        return (
            f'{{"height":"{height}","hash":"{stamp}","chainId":"{CHAIN_ID}",'
            f'"proposer":"A1A1A1A1A1A1A1A1A1A1A1A1A1A1A1A1A1A1A1A1","timestamp":"{time}"{listed}}}'
        )

    def _plays(self, time: str) -> str:
        chance, count = self.chance, self.chance.choices(*OF_PLAYS)[0]
        self.plays += count
        users = chance.choices(range(1, USERS + 1), cum_weights=self.users, k=count)
        tracks = chance.choices(range(1, TRACKS + 1), cum_weights=self.tracks, k=count)
        plays = []
        for user, track in zip(users, tracks, strict=True):
            listener = str(user) if chance.random() < 0.33 else f"0x{chance.getrandbits(160):040x}"
            city, region, country = chance.choice(PLACES)
            where = f'"city":"{city}",' * bool(city) + f'"region":"{region}",' * bool(region)
            plays.append(
                f'{{"userId":"{listener}","trackId":"{track}","timestamp":"{time}",'
                f'"signature":"0x{chance.getrandbits(520):0130x}",{where}"country":"{country}"}}'
            )
        return f'"plays":{{"plays":[{",".join(plays)}]}}'

    def _entity(self) -> str:
        chance = self.chance
        track = chance.choices(range(1, TRACKS + 1), cum_weights=self.tracks)[0]
        owner = track % (USERS // 10) + 1
        data = {"title": f"Track {track}", "genre": "House", "is_unlisted": False, "mood": "Easygoing", "tags": "a,b,c",
                "field_visibility": {"mood": True, "tags": True, "genre": True, "share": True, "play_count": True}}
        kind, entity, action = "Track", track, "Create"
        draw = chance.random()
        if draw < 0.3:
            kind, entity, data = "User", owner, {"handle": f"artist{owner}", "is_verified": owner % 20 == 0}
        elif draw < 0.7:
            kind, action = "Track", "Save"
        entity_text = json.dumps(json.dumps({"cid": "", "data": data}))
        return (
            f'"manageEntity":{{"userId":"{owner}","entityType":"{kind}","entityId":"{entity}","action":"{action}",'
            f'"metadata":{entity_text},"signature":"0x{chance.getrandbits(520):0130x}","signer":"0x{owner:040x}",'
            f'"nonce":"0x{chance.getrandbits(256):064x}"}}'
        )


def make(folder: Path, blocks: int) -> None:
    """Write the blocks 1 to `blocks` one after another, and where each begins."""
    folder.mkdir(parents=True, exist_ok=True)
    maker, offsets = Maker(), array.array("Q", [0])
    with (folder / "blocks").open("wb") as file:
        for height in range(1, blocks + 1):
            file.write(maker.block(height).encode())
            offsets.append(file.tell())
    (folder / "offsets").write_bytes(offsets.tobytes())
    (folder / "plays").write_text(str(maker.plays))


class Node:
    """Serves the file as a Core node does."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / "blocks").open("rb")
        self._blocks = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = array.array("Q", (folder / "offsets").read_bytes())
        self.head = len(self._offsets) - 1
        self._decoder = msgspec.json.Decoder(Request)

    def _block(self, height: int) -> bytes:
        return self._blocks[self._offsets[height - 1] : self._offsets[height]]

    def _parts(self, heights: list[str]) -> Iterator[bytes]:
        for text in heights:
            if 0 < int(text) <= self.head:
                yield b'"%s":%s' % (text.encode(), self._block(int(text)))

    async def answer(self, request: web.Request) -> web.Response:
        asked = self._decoder.decode(await request.read() or b"{}")
        head = b'"currentHeight":"%d"' % self.head
        match request.match_info["method"]:
            case "GetBlocks":
                body = b'{"blocks":{%s},%s}' % (b",".join(self._parts(list(asked.height))), head)
            case "GetBlock":
                body = b'{"block":%s,%s}' % (self._block(int(str(asked.height))), head)
            case "GetNodeInfo":
                body = b'{"chainid":"%s","synced":true,%s}' % (CHAIN_ID.encode(), head)
            case "GetStatus":
                chain = b'{"chainId":"%s",%s}' % (CHAIN_ID.encode(), head)
                body = b'{"live":true,"ready":true,"chainInfo":%s,"pruningInfo":{"earliestHeight":"1"}}' % chain
            case _:
                return web.json_response({"code": "unimplemented", "message": "not here"}, status=404)
        return web.Response(body=body, content_type="application/json")


async def serve(folder: Path) -> None:
    """Serve until killed; the first line on stdout is the address."""
    application = web.Application()
    application.router.add_post("/core.v1.CoreService/{method}", Node(folder).answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve(Path(sys.argv[2])))
    else:
        make(Path(sys.argv[1]), int(sys.argv[2]))
