-- no-transaction
-- unless: indexer.indexed('plays', '{slot}')
create index concurrently if not exists plays_slot on plays (slot);
