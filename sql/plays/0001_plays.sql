-- The tables of the bundled hooks. Times are `timestamp without time zone` holding UTC, as their readers expect.

create table plays (
    id           bigserial primary key,
    user_id      bigint,                -- null: an anonymous listen
    source       text not null default 'relay',
    play_item_id bigint not null,
    created_at   timestamp not null,
    updated_at   timestamp not null default now(),
    slot         bigint,                -- the block's height
    signature    text not null default '',
    city         text not null default '',
    region       text not null default '',
    country      text not null default '',
    chain        smallint,              -- the last three are the play's place on the chain; null where another
    tx_hash      bytea,                 -- writer wrote the row
    event_index  bigint
);

create unique index plays_place on plays (chain, slot, tx_hash, event_index);
create index plays_listener on plays (user_id, play_item_id, created_at) where user_id is not null;
create index plays_created_at on plays (created_at);
create index plays_slot on plays (slot);
-- by hash: anybody may send a signature of any length, and a btree refuses rows of more than 2,700 bytes
create index plays_signature on plays using hash (signature) where signature <> '';

create table aggregate_plays (
    play_item_id bigint primary key,
    count        bigint not null
) with (fillfactor = 70);

create table aggregate_monthly_plays (
    play_item_id bigint not null,
    timestamp    date not null,
    country      text not null default '',
    count        bigint not null,
    primary key (play_item_id, timestamp, country)
) with (fillfactor = 70);

create table hourly_play_counts (
    hourly_timestamp timestamp primary key,
    play_count       bigint not null
) with (fillfactor = 50);

create table milestones (
    id        bigint not null,
    name      text not null,
    threshold bigint not null,
    slot      bigint,
    timestamp timestamp not null,
    primary key (id, name, threshold)
);

create table tracks (
    track_id    bigint primary key,
    owner_id    bigint not null,
    title       text,
    genre       text,
    created_at  timestamp not null,
    is_current  boolean not null default true,
    is_delete   boolean not null default false,
    is_unlisted boolean not null default false
);

create table notification (
    id        bigserial primary key,
    specifier text not null,
    group_id  text not null,
    type      text not null,
    slot      bigint,
    timestamp timestamp not null,
    data      jsonb,
    user_ids  int[],
    unique (group_id, specifier)
);
