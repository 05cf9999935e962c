-- no-transaction
-- unless: indexer.indexed('plays', '{user_id,play_item_id,created_at}', '(user_id IS NOT NULL)')
create index concurrently if not exists plays_listener on plays (user_id, play_item_id, created_at)
where user_id is not null;
