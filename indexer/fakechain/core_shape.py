"""Core blocks as the public chain's are: the mixture of a recording of March 2025, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from indexer.fakechain.core import FakeCore, core_play, core_plays

# How many transactions blocks have, how many plays a transaction of plays has, and what transactions there are, each
# with its weight.
_TRANSACTIONS = ((0, 48), (1, 101), (2, 114), (3, 45), (4, 55), (6, 40), (9, 60), (10, 4))
_PLAYS = ((1, 3186), (2, 1196), (3, 227), (4, 100), (5, 30), (6, 8), (7, 1), (8, 4), (9, 2), (12, 1), (13, 1))
_PLACES = (
    ("Köln", "North Rhine-Westphalia", "Germany"), ("São Paulo", "São Paulo", "Brazil"), ("", "", "Japan"),
    ("Łódź", "Łódź Voivodeship", "Poland"), ("New York", "New York", "United States"), ("Lagos", "", "Nigeria"),
    ("東京", "東京都", "Japan"), ("Kamianske", "Dnipropetrovsk Oblast", "Ukraine"), ("", "California", "United States"),
)  # fmt: skip
_ANONYMOUS = 0.82
_TWICE = 0.09  # a play that is there again in its transaction
_AGAIN = 0.004  # a transaction that is submitted again, byte for byte, in a later block
_TRACKS = 2_700


def recorded_shape(seed: int, blocks: int, chain_id: str = "core-test") -> FakeCore:
    """A chain of so many blocks; the same seed gives the same chain."""
    chain = FakeCore(chain_id)
    shape = _Shape(random.Random(seed))  # noqa: S311
    for _ in range(blocks):
        at = chain.blocks[-1].timestamp + 1 if chain.blocks else 1_741_989_725
        chain.mine(*shape.block(at))
    return chain


class _Shape:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._wallets = [f"0x{chance.getrandbits(160):040x}" for _ in range(75)]
        self._users = [str(chance.randint(1_700, 998_840_328)) for _ in range(140)]
        self._tracks = [str(chance.randint(2_000, 2_147_000_000)) for _ in range(_TRACKS)]
        self._sent: list[dict[str, Any]] = []
        self._kinds: tuple[tuple[Callable[[int], dict[str, Any]], int], ...] = (
            (self._plays, 4756), (self._entity, 1040), (self._proof, 545), (self._verification, 543),
            (self._attestation, 113), (self._rollup, 4), (self._unknown, 7),
        )  # fmt: skip

    def block(self, at: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for _ in range(self._drawn(_TRANSACTIONS)):
            if self._sent and self._chance.random() < _AGAIN:
                found.append(self._chance.choice(self._sent))
                continue
            content = self._drawn(self._kinds)(at)
            found.append(content)
            self._sent = [*self._sent[-50:], content]
        return found

    def _drawn(self, weighted: tuple[tuple[Any, int], ...]) -> Any:
        return self._chance.choices([one for one, _ in weighted], [weight for _, weight in weighted])[0]

    def _plays(self, at: int) -> dict[str, Any]:
        plays: list[dict[str, str]] = []
        for _ in range(self._drawn(_PLAYS)):
            if plays and self._chance.random() < _TWICE:
                plays.append(plays[-1])
                continue
            anonymous = self._chance.random() < _ANONYMOUS
            city, region, country = self._chance.choice(_PLACES)
            # favourites are played again and again
            track = self._tracks[int(len(self._tracks) * self._chance.random() ** 3)]
            plays.append(
                core_play(
                    track, self._chance.choice(self._wallets if anonymous else self._users), _time(at),
                    f"0x{self._chance.getrandbits(520):0130x}", city=city, region=region, country=country,
                )
            )  # fmt: skip
        return core_plays(*plays)

    def _entity(self, _at: int) -> dict[str, Any]:
        user, action = self._chance.choice(self._users), self._chance.choice(("Create", "Update", "Update"))
        kind = self._chance.choice(("User", "User", "Track", "Track", "Track", "Playlist", "Follow", "Comment"))
        entity, data = self._chance.choice(self._tracks), dict[str, Any]()
        if kind == "User":
            entity, data = user, {"user_id": int(user), "handle": f"listener{user}", "is_verified": False}
        elif kind == "Track":
            data = {"track_id": int(entity), "owner_id": int(user), "title": 'Zwölf "Töne"', "genre": "Electronic"}
            action = self._chance.choice(("Create", "Update", "Delete"))
        number, fields = self._chance.getrandbits(256), {"cid": f"bagaaiera{entity}", "data": data}
        return {
            "requestId": f"{number >> 128:032x}",
            "manageEntity": {
                "userId": user, "entityType": kind, "entityId": entity, "action": action,
                "metadata": "" if action == "Delete" else msgspec.json.encode(fields).decode(),
                "signature": f"0x{self._chance.getrandbits(520):0130x}", "signer": self._chance.choice(self._wallets),
                "nonce": f"0x{number:064x}",
            },
        }  # fmt: skip

    def _proof(self, at: int) -> dict[str, Any]:
        address = f"{self._chance.getrandbits(160):040X}"
        return {
            "storageProof": {
                "height": str(at), "address": address, "proverAddresses": [address], "cid": f"baeaaaiqse{address}",
                "proofSignature": "sOikdf6XRyuVX6Hk20UDqPEO934AvgakC1SjpQF2DqOryiN1Hs7lFVjAc9WoPAlx",
            }
        }  # fmt: skip

    def _verification(self, at: int) -> dict[str, Any]:
        return {"storageProofVerification": {"height": str(at), "proof": "R+rk4SPOkhhpiuHNSCWNug=="}}

    def _attestation(self, at: int) -> dict[str, Any]:
        registration = {
            "delegateWallet": self._chance.choice(self._wallets), "endpoint": "https://validator.example",
            "nodeType": "content-node", "spId": "68", "ethBlock": str(at), "power": "10", "deadline": "120",
        }  # fmt: skip
        return {"attestation": {"validatorRegistration": registration}}

    def _rollup(self, at: int) -> dict[str, Any]:
        reports = [{"address": wallet, "numBlocksProposed": n} for n, wallet in enumerate(self._wallets[:20])]
        return {"slaRollup": {"timestamp": _time(at), "blockStart": "1", "blockEnd": "2048", "reports": reports}}

    def _unknown(self, at: int) -> dict[str, Any]:
        """A kind that nobody here has heard of, now and then in the newer form."""
        news = {"somethingNew": {"plays": at, "amount": str(at)}}
        return news if at % 2 else {"transactionv2": {"envelope": {"header": {"nonce": str(at)}, "messages": [news]}}}


def _time(at: int) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
