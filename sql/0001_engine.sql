-- The engine's own tables. One row a chain and process family; the hooks' tables live in the search path.

create schema if not exists indexer;

create table indexer.chain (
    id          smallint generated always as identity primary key,
    name        text not null unique,
    source      text not null,
    identity    text not null,       -- the chain id that the database was started with
    start_block bigint not null,
    created_at  timestamptz not null default now()
);

-- How far the chain is applied. Moved by compare-and-swap on (number, hash) inside the transaction of the span, so
-- that of two writers at most one commits. head, final and the rates are what its writer last saw, for `status`.
create table indexer.cursor (
    chain             smallint primary key references indexer.chain,
    number            bigint not null,
    hash              bytea not null,
    block_time        timestamptz,
    head              bigint,
    final             bigint,
    blocks_per_second real not null default 0,
    events_per_second real not null default 0,
    leader            text,
    updated_at        timestamptz not null default now(),
    seen_at           timestamptz not null default now()
) with (fillfactor = 50);

-- The window of blocks that may still be reorganised, by which a fork's common ancestor is found.
create table indexer.block (
    chain       smallint not null references indexer.chain,
    number      bigint not null,
    hash        bytea not null,
    parent_hash bytea,
    block_time  timestamptz not null,
    primary key (chain, number)
);

-- What each hook has applied: nothing is lost in silence, since a hole here shows.
create table indexer.coverage (
    chain  smallint not null references indexer.chain,
    hook   text not null,
    blocks int8multirange not null default '{}',
    primary key (chain, hook)
) with (fillfactor = 50);

-- A hook's failures: 'halt' stopped the daemon, 'skip' left a hole. Resolved once the blocks are applied after all.
create table indexer.failure (
    id          bigint generated always as identity primary key,
    chain       smallint not null references indexer.chain,
    hook        text not null,
    first       bigint not null,
    last        bigint not null,
    policy      text not null check (policy in ('halt', 'skip')),
    error       text not null,
    traceback   text not null,
    failed_at   timestamptz not null default now(),
    resolved_at timestamptz
);

create index on indexer.failure (chain, first) where resolved_at is null;

-- Logs that matched an event but could not be decoded, kept raw.
create table indexer.quarantine (
    chain       smallint not null references indexer.chain,
    number      bigint not null,
    block_hash  bytea not null,
    log_index   bigint not null,
    event       text not null,
    address     text not null,
    tx_hash     bytea not null,
    topics      bytea[] not null,
    data        bytea not null,
    error       text not null,
    seen_at     timestamptz not null default now(),
    primary key (chain, number, log_index, block_hash)
);
