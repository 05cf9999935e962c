// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

// Compiled into hooks/play_registry.json and tests/contracts/slim_registry.json (solc 0.8.37, optimizer on, via IR,
// EVM version paris so that any dev chain runs it). Nothing compiles it later: the artifacts are committed.

/// What the bundled hooks listen to: every field is a text, as the chain's clients write them.
contract PlayRegistry {
    struct Play {
        string trackId;
        string userId;
        string playedAt; // unix seconds in decimal, or RFC 3339
        string signature;
        string city;
        string region;
        string country;
    }

    event Played(
        string trackId,
        string userId,
        string playedAt,
        string signature,
        string city,
        string region,
        string country
    );
    event TrackRegistered(uint256 indexed trackId, uint256 indexed ownerId, string title, string genre);

    function play(
        string memory trackId,
        string memory userId,
        string memory playedAt,
        string memory signature,
        string memory city,
        string memory region,
        string memory country
    ) external {
        emit Played(trackId, userId, playedAt, signature, city, region, country);
    }

    function playMany(Play[] memory plays) external {
        for (uint256 i = 0; i < plays.length; i++) {
            Play memory p = plays[i];
            emit Played(p.trackId, p.userId, p.playedAt, p.signature, p.city, p.region, p.country);
        }
    }

    function registerTrack(uint256 trackId, uint256 ownerId, string memory title, string memory genre) external {
        emit TrackRegistered(trackId, ownerId, title, genre);
    }
}

/// Many plays for little calldata: what fills a chain for the benchmarks.
contract SlimRegistry {
    uint256 public constant TRACKS = 5000;
    uint256 public constant USERS = 20000;

    event Played(uint256 indexed trackId, uint256 indexed userId, uint64 playedAt, string country);

    function play(uint256 trackId, uint256 userId, uint64 playedAt, string memory country) external {
        emit Played(trackId, userId, playedAt, country);
    }

    /// Emits `count` plays, one second apart from `playedAt` on; track and user follow from keccak256(seed, i).
    function playMany(uint256 count, uint256 seed, uint64 playedAt, string memory country) external {
        for (uint256 i = 0; i < count; i++) {
            uint256 dice = uint256(keccak256(abi.encode(seed, i)));
            emit Played(dice % TRACKS, (dice >> 128) % USERS, playedAt + uint64(i), country);
        }
    }
}
