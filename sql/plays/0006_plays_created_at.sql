-- no-transaction
-- unless: indexer.indexed('plays', '{created_at}')
create index concurrently if not exists plays_created_at on plays (created_at);
