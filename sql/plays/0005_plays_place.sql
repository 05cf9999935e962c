-- no-transaction
create unique index concurrently if not exists plays_place on plays (chain, slot, tx_hash, event_index)
where chain is not null;
