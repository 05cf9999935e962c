-- no-transaction
create index concurrently if not exists tracks_owner on tracks (owner_id);
