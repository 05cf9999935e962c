-- Who listens, what they have reached, and what trending reads. A database that an older indexer has filled has these
-- tables already: they keep their names and types.

create table if not exists user_distinct_play_hours (
    user_id         bigint primary key,
    hours_with_play bigint not null default 0,
    updated_at      timestamp not null
) with (fillfactor = 70);

create table if not exists user_distinct_play_tracks (
    user_id     bigint primary key,
    track_count bigint not null default 0,
    updated_at  timestamp not null
) with (fillfactor = 70);

-- [{"track_id", "timestamp", "play_count"}, ...]: the latest 1,000 tracks, latest first
create table if not exists user_listening_history (
    user_id           bigint primary key,
    listening_history jsonb not null
);

create table if not exists challenge_listen_streak (
    user_id          bigint primary key,
    last_listen_date timestamp,
    listen_streak    integer not null
) with (fillfactor = 70);

create table if not exists challenges (
    id             text primary key,
    type           text not null,
    amount         text,
    active         boolean not null,
    step_count     integer,
    starting_block integer,
    weekly_pool    integer,
    cooldown_days  integer
);

insert into challenges (id, type, amount, active, step_count, starting_block, weekly_pool, cooldown_days)
values ('e', 'aggregate', '1', false, 7, 0, 25000, 7),
       ('p1', 'numeric', '25', true, 250, 0, 2147483647, 0),
       ('p2', 'numeric', '100', true, 1000, 0, 2147483647, 0),
       ('p3', 'numeric', '1000', true, 10000, 0, 2147483647, 0)
on conflict do nothing;

create table if not exists user_challenges (
    challenge_id          text not null,
    specifier             text not null,
    user_id               bigint not null,
    current_step_count    integer,
    amount                integer not null default 0,
    is_complete           boolean not null,
    completed_blocknumber bigint,
    completed_at          timestamp,
    primary key (challenge_id, specifier)
) with (fillfactor = 80);

create table if not exists users (
    user_id        bigint primary key,
    handle         text,
    is_current     boolean not null default true,
    is_verified    boolean not null default false,
    is_deactivated boolean not null default false
);

-- What a person heard of a track in plays that were pruned: with it, "an earlier play" and "the running count" stay true.
create table if not exists pruned_listens (
    user_id      bigint not null,
    play_item_id bigint not null,
    count        bigint not null,
    latest       timestamp not null,
    primary key (user_id, play_item_id)
);

create materialized view if not exists aggregate_interval_plays as
select track_id, genre, created_at,
       coalesce(week, 0) as week_listen_counts, coalesce(month, 0) as month_listen_counts
from tracks
left join (
    select play_item_id, count(*) as month,
           count(*) filter (where created_at > (now() at time zone 'utc') - interval '7 days') as week
    from plays
    where created_at > (now() at time zone 'utc') - interval '30 days'
    group by play_item_id
) as recent on play_item_id = track_id
where is_current and not is_delete and not is_unlisted
with no data;

-- a refresh beside its readers needs it
create unique index if not exists aggregate_interval_plays_track on aggregate_interval_plays (track_id);
