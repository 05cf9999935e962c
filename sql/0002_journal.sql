-- What a table's rows were before blocks that may still be reorganised changed them: undo belongs to the engine.

create table indexer.journal (
    id       bigint generated always as identity,
    chain    smallint not null,
    number   bigint not null,   -- the block
    relation oid not null,      -- the table
    key      jsonb not null,    -- the row's primary key
    before   jsonb,             -- the row as it was; null where it was not there
    primary key (chain, number, id)
);

-- One statement-level trigger a table and operation calls this, with the primary key's columns as arguments. It writes
-- only in a transaction that names its block (indexer.chain and indexer.block are set until COMMIT): never below
-- finality, never for other writers.
--
-- An update is the old rows that come back, and rows under a new key that go. The alias is one that no column has:
-- to_jsonb(alias) would otherwise mean the column.
create function indexer.journal() returns trigger language plpgsql as $$
declare
    at_chain smallint := nullif(current_setting('indexer.chain', true), '')::smallint;
    at_block bigint := nullif(current_setting('indexer.block', true), '')::bigint;
begin
    if at_block is null then
        return null;
    end if;
    if tg_op = 'INSERT' then
        insert into indexer.journal (chain, number, relation, key)
        select at_chain, at_block, tg_relid, indexer.key_of(to_jsonb(indexer_journal_row), tg_argv)
        from new_rows as indexer_journal_row;
    elsif tg_op = 'DELETE' then
        insert into indexer.journal (chain, number, relation, key, before)
        select at_chain, at_block, tg_relid, indexer.key_of(to_jsonb(indexer_journal_row), tg_argv),
               to_jsonb(indexer_journal_row)
        from old_rows as indexer_journal_row;
    else
        insert into indexer.journal (chain, number, relation, key)
        select at_chain, at_block, tg_relid, moved.key
        from (
            select indexer.key_of(to_jsonb(indexer_journal_row), tg_argv) as key
            from new_rows as indexer_journal_row
            except
            select indexer.key_of(to_jsonb(indexer_journal_row), tg_argv)
            from old_rows as indexer_journal_row
        ) as moved;
        insert into indexer.journal (chain, number, relation, key, before)
        select at_chain, at_block, tg_relid, indexer.key_of(to_jsonb(indexer_journal_row), tg_argv),
               to_jsonb(indexer_journal_row)
        from old_rows as indexer_journal_row;
    end if;
    return null;
end
$$;

create function indexer.key_of(content jsonb, columns text[]) returns jsonb language sql immutable parallel safe as $$
    select jsonb_object_agg(name, content -> name) from unnest(columns) as name
$$;

create function indexer.refuse_truncate() returns trigger language plpgsql as $$
begin
    if nullif(current_setting('indexer.block', true), '') is not null then
        raise exception 'truncate of % can''t be undone by a reorganisation: use delete', tg_relid::regclass;
    end if;
    return null;
end
$$;

-- Journal a table from now on. Says why not, where it has no primary key.
create function indexer.watch(target regclass) returns void language plpgsql as $$
declare
    keys text;
begin
    select string_agg(quote_literal(attname), ', ' order by array_position(conkey, attnum))
    into keys
    from pg_constraint join pg_attribute on attrelid = conrelid and attnum = any(conkey)
    where conrelid = target and contype = 'p';
    if keys is null then
        raise exception 'table % has no primary key, so that a reorganisation can''t be undone in it: give it one', target;
    end if;
    if exists (select from pg_trigger where tgrelid = target and tgname = 'indexer_journal_insert') then
        return;
    end if;
    execute format('create trigger indexer_journal_insert after insert on %s referencing new table as new_rows '
                   'for each statement execute function indexer.journal(%s)', target, keys);
    execute format('create trigger indexer_journal_update after update on %s referencing old table as old_rows '
                   'new table as new_rows for each statement execute function indexer.journal(%s)', target, keys);
    execute format('create trigger indexer_journal_delete after delete on %s referencing old table as old_rows '
                   'for each statement execute function indexer.journal(%s)', target, keys);
    execute format('create trigger indexer_journal_truncate before truncate on %s '
                   'for each statement execute function indexer.refuse_truncate()', target);
end
$$;

-- Bring a table's rows back to what they were at block `number`: of each row touched since, the oldest entry is that
-- state. Rows are taken away and put back, so that no order of unique keys matters on the way; where foreign keys point
-- at the table, rows that stay are updated in place instead. Returns the rows touched.
create function indexer.restore(of_chain smallint, to_number bigint, target regclass) returns bigint
language plpgsql as $$
declare
    columns text;
    changes text;
    keys text;
    same_key text;
    referenced boolean := exists (select from pg_constraint where confrelid = target and contype = 'f');
    touched bigint;
begin
    select string_agg(format('%I', attname), ', ' order by attnum),
           string_agg(format('%1$I = excluded.%1$I', attname), ', ' order by attnum)
    into columns, changes
    from pg_attribute where attrelid = target and attnum > 0 and not attisdropped and attgenerated = '';
    select string_agg(format('%I', attname), ', ' order by array_position(conkey, attnum)),
           string_agg(format('present.%1$I = old.%1$I', attname), ' and ')
    into keys, same_key
    from pg_constraint join pg_attribute on attrelid = conrelid and attnum = any(conkey)
    where conrelid = target and contype = 'p';
    create temporary table undone on commit drop as
        select distinct on (key) key, before from indexer.journal
        where chain = of_chain and number > to_number and relation = target
        order by key, number, id;
    execute format('delete from %1$s as present using (select (jsonb_populate_record(null::%1$s, key)).* from undone '
                   'where before is null or not $1) as old where %2$s', target, same_key) using referenced;
    execute format('insert into %1$s (%2$s) overriding system value '
                   'select %2$s from (select (jsonb_populate_record(null::%1$s, before)).* from undone '
                   'where before is not null) as old on conflict (%3$s) do update set %4$s',
                   target, columns, keys, changes);
    select count(*) into touched from undone;
    drop table undone;
    return touched;
end
$$;

-- What this transaction did to a table's rows, as journalled under block `at_number`: each row before and after.
create function indexer.changes(of_chain smallint, at_number bigint, target regclass)
returns table (key jsonb, before jsonb, after jsonb) language plpgsql as $$
declare
    same_key text;
begin
    select string_agg(format('present.%1$I = touched.%1$I', attname), ' and ')
    into same_key
    from pg_constraint join pg_attribute on attrelid = conrelid and attnum = any(conkey)
    where conrelid = target and contype = 'p';
    return query execute format(
        'select old.key, old.before, (select to_jsonb(indexer_present_row) from %1$s as indexer_present_row, '
        'lateral (select (jsonb_populate_record(null::%1$s, old.key)).*) as touched where %2$s) '
        'from (select distinct on (key) key, before from indexer.journal '
        'where chain = $1 and number = $2 and relation = $3 order by key, id) as old',
        target, replace(same_key, 'present.', 'indexer_present_row.')) using of_chain, at_number, target::oid;
end
$$;
