-- where: to_regclass('plays') is not null
-- lock-timeout: 300ms
-- For a database in which another writer has made these tables: they keep their columns' names and types, and `plays`
-- gets the columns of a play's place on the chain, without being rewritten. Its indexes come in files of their own.

create table if not exists aggregate_plays (
    play_item_id bigint primary key,
    count        bigint not null
) with (fillfactor = 70);

create table if not exists aggregate_monthly_plays (
    play_item_id bigint not null,
    timestamp    date not null,
    country      text not null default '',
    count        bigint not null,
    primary key (play_item_id, timestamp, country)
) with (fillfactor = 70);

create table if not exists hourly_play_counts (
    hourly_timestamp timestamp primary key,
    play_count       bigint not null
) with (fillfactor = 50);

create table if not exists milestones (
    id        bigint not null,
    name      text not null,
    threshold bigint not null,
    slot      bigint,
    timestamp timestamp not null,
    primary key (id, name, threshold)
);

create table if not exists tracks (
    track_id    bigint primary key,
    owner_id    bigint not null,
    title       text,
    genre       text,
    created_at  timestamp not null,
    is_current  boolean not null default true,
    is_delete   boolean not null default false,
    is_unlisted boolean not null default false
);

create table if not exists notification (
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

-- at the end, since from here to COMMIT nobody reads the table
alter table plays
    add column if not exists chain       smallint,
    add column if not exists tx_hash     bytea,
    add column if not exists event_index bigint;
