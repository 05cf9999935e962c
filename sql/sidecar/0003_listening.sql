-- People whose Spotify history is archived, and what they heard. Tables of the search path, as those of the hooks: other
-- programs of the same product read them, too.

create table listeners (
    id                   uuid primary key default gen_random_uuid(),
    spotify_id           text not null unique,
    email                text,
    display_name         text,
    access_token         bytea,             -- both encrypted by a key of the settings; null: must connect anew
    refresh_token        bytea,
    token_expires_at     timestamptz,
    token_version        integer not null default 0,  -- of the two, whatever key has encrypted them
    is_active            boolean not null default true,
    last_polled_at       timestamptz,       -- the last time that a poll succeeded
    cursor_ms            bigint,            -- of the newest play that is archived
    consecutive_failures integer not null default 0,
    last_failure_type    text check (last_failure_type in ('AUTH', 'NETWORK', 'UNKNOWN')),
    last_failed_at       timestamptz,
    cooling_until        timestamptz,       -- what follows from the three above, kept for the queries
    rate_limited_until   timestamptz,
    tier                 text not null default 'founding',
    created_at           timestamptz not null default now(),
    lease                uuid,              -- of the worker that archives the person now
    leased_until         timestamptz        -- after this the worker counts as dead
) with (fillfactor = 70);
create index listeners_polled on listeners (last_polled_at nulls first) where is_active;

-- How many places of a tier are taken: one row, so that a place is checked and taken in one statement.
create table listener_places (
    tier  text primary key,
    taken integer not null check (taken >= 0)
) with (fillfactor = 50);
insert into listener_places (tier, taken) values ('founding', 0);

create table listener_waitlist (
    spotify_id text primary key,
    email      text,
    created_at timestamptz not null default now()
);

-- What is done: archive_{listener}_{YYYY_MM_DD_HH} once that person's hour is.
create table listening_keys (
    key   text primary key,
    until timestamptz not null
);
create index listening_keys_until on listening_keys (until);

create table artists (
    spotify_id text primary key,
    name       text not null,
    genres     text[]                       -- null: not looked up
);

create table albums (
    spotify_id text primary key,
    name       text not null,
    image_url  text
);

-- Spotify's tracks: `tracks` are the chain's.
create table spotify_tracks (
    spotify_id  text primary key,
    name        text not null,
    duration_ms integer,
    isrc        text,
    album       text references albums
);
create index spotify_tracks_isrc on spotify_tracks (isrc);

create table track_artists (
    track    text not null references spotify_tracks on delete cascade,
    artist   text not null references artists,
    position smallint not null,             -- as Spotify names them, the first one first
    primary key (track, artist)
);
create index track_artists_artist on track_artists (artist);

create table play_events (
    listener  uuid not null references listeners on delete cascade,
    played_at timestamptz not null,
    track     text not null references spotify_tracks,
    primary key (listener, played_at, track)
);

-- What came as a play and could not be read as one: kept as it came, for whoever mends the reading.
create table play_rejects (
    id       bigint generated always as identity primary key,
    listener uuid not null references listeners on delete cascade,
    raw      bytea not null,
    reason   text not null,
    at       timestamptz not null default now(),
    digest   bytea not null,                -- a poll that is repeated brings the same again
    unique (listener, digest)
);
