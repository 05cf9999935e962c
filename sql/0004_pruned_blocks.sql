-- The blocks whose rows a prune may have taken: to replay them would insert these again, or miss them.
create table indexer.pruned_blocks (
    relation regclass not null,
    chain    smallint not null references indexer.chain,
    last     bigint not null,           -- of later blocks nothing is gone
    primary key (relation, chain)
);
