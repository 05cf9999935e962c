-- no-transaction
-- unless: indexer.indexed('plays', '{signature}')
create index concurrently if not exists plays_signature on plays using hash (signature) where signature <> '';
