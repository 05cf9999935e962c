-- Songs, what was measured of them, who ordered it, and what was asked of the providers for it. Tables of the search
-- path, as those of the hooks: other programs of the same product read and write them, too.

create table songs (
    isrc        text primary key,
    name        text,
    album       text,
    searched_at timestamptz             -- when a catalogue was last asked for the song's albums
);

create table song_identifiers (
    song            text not null references songs on delete cascade,
    platform        text not null,      -- 'spotify', 'chain', ...
    identifier_type text not null check (identifier_type in ('track_id', 'album_id')),
    value           text not null,
    primary key (platform, identifier_type, value, song)
);
create index song_identifiers_song on song_identifiers (song, platform, identifier_type);

create table catalogs (
    id      uuid primary key default gen_random_uuid(),
    account uuid not null references accounts on delete cascade,
    name    text not null default ''
);
create index catalogs_account on catalogs (account);

create table catalog_songs (
    catalog uuid not null references catalogs on delete cascade,
    song    text not null references songs on delete cascade,
    primary key (catalog, song)
);
create index catalog_songs_song on catalog_songs (song);

create table song_measurements (
    id          bigint generated always as identity primary key,
    song        text not null references songs,
    platform    text not null,
    metric      text not null default 'platform_displayed_play_count',
    value       bigint not null,
    captured_at timestamptz not null,
    data_source text not null check (data_source in ('songstats', 'apify_spotify_playcount', 'chain')),
    raw_ref     text,                   -- the call or run that it came from
    snapshot    uuid,                   -- no reference: measurements outlive the account that has ordered them
    unique (song, platform, metric, captured_at)
);
create index song_measurements_songstats on song_measurements (song) where data_source = 'songstats';

-- A capture is never overwritten, whoever tries.
create function song_measurements_keep() returns trigger language plpgsql as $$
begin
    raise exception 'song_measurements is append-only';
end $$;
create trigger song_measurements_keep before update on song_measurements
    for each statement execute function song_measurements_keep();

create table playcount_snapshots (
    id                 uuid primary key default gen_random_uuid(),
    account            uuid not null references accounts on delete cascade,
    catalog            uuid references catalogs on delete set null,
    album_ids          text[] not null,  -- sorted, each once, as the two below
    isrcs              text[] not null,
    platforms          text[] not null,
    schedule           text not null default 'once' check (schedule in ('once', 'monthly')),
    state              text not null default 'queued' check (state in ('queued', 'running', 'done', 'failed')),
    album_count        integer not null,
    estimated_cost_usd numeric not null,
    created_at         timestamptz not null default now(),
    updated_at         timestamptz not null default now()
);
create index playcount_snapshots_account on playcount_snapshots (account, created_at);
create index playcount_snapshots_monthly on playcount_snapshots (created_at) where schedule = 'monthly';

-- The parts of a snapshot, each a run of the actor.
create table playcount_chunks (
    id         uuid primary key default gen_random_uuid(),
    snapshot   uuid not null references playcount_snapshots on delete cascade,
    number     integer not null,
    album_ids  text[] not null,
    state      text not null default 'queued' check (state in ('queued', 'running', 'done', 'failed')),
    runs       integer not null default 0,  -- that were started, or may have been: each is paid for
    asked_at   timestamptz,                 -- a run was asked for, and its id is not known yet
    run_id     text,
    started_at timestamptz,
    unique (snapshot, number)
);

-- Every call that costs. Written before the call is made: one without a status is under way, or its worker died.
create table provider_calls (
    id       bigint generated always as identity primary key,
    provider text not null,
    isrc     text,
    status   integer,                    -- of the answer; null also where none came
    outcome  text,                       -- '2xx', '4xx', 'timeout', ...
    final    boolean not null default false,  -- not to be asked again
    at       timestamptz not null default now()
);
create index provider_calls_final on provider_calls (provider, isrc) where final;
create index provider_calls_at on provider_calls (at);

create table provider_budgets (
    provider text not null,
    month    date not null,              -- its first day, UTC
    calls    bigint not null,
    primary key (provider, month)
) with (fillfactor = 50);

create table maintenance_runs (
    id                uuid primary key default gen_random_uuid(),
    at                timestamptz not null default now(),
    reclaimed         integer not null,
    waiting           bigint not null,   -- jobs of the drain
    snapshots_started integer not null
);
