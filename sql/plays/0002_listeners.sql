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

-- A long history is written anew with each play, and packing it is the greatest part of that.
do $$
begin
    alter table user_listening_history alter listening_history set compression lz4;
exception when feature_not_supported then
    null; -- this server was built without it
end
$$;

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

-- What a challenge is worth: the amount is a text there, and anything may be in it.
create function challenge_amount(amount text) returns integer
language sql immutable as $$
    select case when amount ~ '^[0-9]{1,9}$' then amount::integer else 0 end
$$;

-- A user's id as it stands in a specifier; to_hex() of a negative number is its two's complement.
create function challenge_user_hex(user_id bigint) returns text
language sql immutable as $$
    select case when user_id >= 0 then to_hex(user_id)
                when user_id = -9223372036854775808 then '-8000000000000000'
                else '-' || to_hex(-user_id) end
$$;

-- The streak after a person's plays, one after another: what `verify` and `rebuild` hold challenge_listen_streak to.
create type listen_streak_state as (last_listen_date timestamp, listen_streak integer);

create function next_listen_streak(state listen_streak_state, listened_at timestamp) returns listen_streak_state
language plpgsql immutable as $$
begin
    if state.last_listen_date is null or listened_at - state.last_listen_date >= interval '48 hours' then
        state.last_listen_date := listened_at;
        state.listen_streak := 1;
    elsif listened_at - state.last_listen_date >= interval '16 hours' then
        state.last_listen_date := listened_at;
        state.listen_streak := state.listen_streak + 1;
    end if;
    return state;
end
$$;

create aggregate fold_listen_streak(timestamp) (sfunc = next_listen_streak, stype = listen_streak_state);

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
