-- A table by its name where it is written out: pg_dump takes the names along, but not the numbers of tables, and a
-- restored database could not undo a reorganisation. The stored bytes are the same, so nothing is rewritten.
alter table indexer.journal alter column relation type regclass;
