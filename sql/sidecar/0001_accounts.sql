-- Who may call the API. Tables of the search path, as those of the hooks: other programs of the same product read them.

create table accounts (
    id                 uuid primary key default gen_random_uuid(),
    email              text,
    stripe_customer_id text
);

create unique index accounts_email on accounts (lower(email));

create table account_api_keys (
    id         text primary key,           -- the public part of the key
    account    uuid not null references accounts on delete cascade,
    name       text not null default '',
    key_hash   bytea not null,             -- sha256 of the whole key, whose secret part has 256 random bits
    created_at timestamptz not null default now(),
    last_used  timestamptz,                -- to the minute
    expires_at timestamptz                 -- null: never; a revoked key expired when it was revoked
);

create index account_api_keys_account on account_api_keys (account);
