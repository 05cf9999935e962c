-- What a table's rows were before blocks that may still be reorganised changed them: undo belongs to the engine.

create table indexer.journal (
    id       bigint generated always as identity,
    chain    smallint not null,
    number   bigint not null,   -- the block
    relation oid not null,      -- the table
    key      jsonb not null,    -- the row's primary key
    before   jsonb,             -- the row as it was; null where it was not there
    exact    text,              -- the same as its type writes it: JSON has no -0, no array bounds, one null for two
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
        insert into indexer.journal (chain, number, relation, key, before, exact)
        select at_chain, at_block, tg_relid, indexer.key_of(to_jsonb(indexer_journal_row), tg_argv),
               to_jsonb(indexer_journal_row), indexer_journal_row::text
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
        insert into indexer.journal (chain, number, relation, key, before, exact)
        select at_chain, at_block, tg_relid, indexer.key_of(to_jsonb(indexer_journal_row), tg_argv),
               to_jsonb(indexer_journal_row), indexer_journal_row::text
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
--
-- Its foreign keys become deferrable, though still looked at once: undo puts back rows of several tables, in no order
-- that holds at every statement. Where the table is not ours to alter they stay as they are.
create function indexer.watch(target regclass) returns void language plpgsql as $$
declare
    keys text;
    foreign_key record;
begin
    -- one starter at a time: the second finds everything there
    perform pg_advisory_xact_lock(hashtext('indexer.watch'), 0);
    select string_agg(quote_literal(attname), ', ' order by array_position(conkey, attnum))
    into keys
    from pg_constraint join pg_attribute on attrelid = conrelid and attnum = any(conkey)
    where conrelid = target and contype = 'p';
    if keys is null then
        raise exception 'table % has no primary key, so that a reorganisation can''t be undone in it: give it one', target;
    end if;
    for foreign_key in
        select conname from pg_constraint join pg_class on pg_class.oid = conrelid
        where conrelid = target and contype = 'f' and not condeferrable and conparentid = 0
            and pg_has_role(relowner, 'usage')
    loop
        execute format('alter table %s alter constraint %I deferrable initially immediate', target, foreign_key.conname);
    end loop;
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
-- state. Rows are taken away and put back, so that no order of unique keys matters on the way. Where that would set off
-- the action of a foreign key (on delete cascade), rows that stay are updated in place instead; two of them that have
-- exchanged a unique value can't be put back then. Returns the rows touched. The caller defers the foreign keys.
--
-- A row comes back from its exact text; from its JSON only where the table has other columns by now.
create function indexer.restore(of_chain smallint, to_number bigint, target regclass) returns bigint
language plpgsql as $$
declare
    names text[];
    columns text;
    contents text;
    changes text;
    same_key text;
    undone text;    -- of each row touched since: its key as JSON and as columns, and what it was
    old text;       -- of those that were there: what they were as a row of the table
    in_place boolean := exists (
        select from pg_constraint
        where confrelid = target and contype = 'f' and (not condeferrable or confdeltype <> 'a' or confupdtype <> 'a')
    );
begin
    select array_agg(attname::text order by attname::text collate "C"),
           string_agg(format('%I', attname), ', ' order by attnum) filter (where attgenerated = ''),
           string_agg(format('(old.content).%I', attname), ', ' order by attnum) filter (where attgenerated = ''),
           string_agg(format('%1$I = (old.content).%1$I', attname), ', ' order by attnum)
               filter (where attgenerated = '' and attidentity <> 'a')
    into names, columns, contents, changes
    from pg_attribute where attrelid = target and attnum > 0 and not attisdropped;
    select string_agg(format('present.%1$I = (old.place).%1$I', attname), ' and ')
    into same_key
    from pg_constraint join pg_attribute on attrelid = conrelid and attnum = any(conkey)
    where conrelid = target and contype = 'p';
    -- `offset 0`: each is made once a row, and not once a column
    undone := format('(select key, before, exact, jsonb_populate_record(null::%s, key) as place '
                     'from (select distinct on (key) key, before, exact from indexer.journal '
                     'where chain = $1 and number > $2 and relation = $3 order by key, number, id) as oldest '
                     'offset 0) as old', target);
    old := format('(select place, case when array(select jsonb_object_keys(before) collate "C" order by 1) = $4 '
                  'then exact::%1$s else jsonb_populate_record(null::%1$s, before) end as content '
                  'from %2$s where before is not null offset 0) as old', target, undone);
    execute format('delete from %s as present using %s where %s and (old.before is null or not $4)',
                   target, undone, same_key) using of_chain, to_number, target, in_place;
    if in_place and changes is not null then
        execute format('update %s as present set %s from %s where %s', target, changes, old, same_key)
            using of_chain, to_number, target, names;
    end if;
    execute format('insert into %1$s (%2$s) overriding system value select %3$s from %4$s '
                   'where not exists (select from %1$s as present where %5$s)',
                   target, columns, contents, old, same_key) using of_chain, to_number, target, names;
    return (select count(distinct key) from indexer.journal
            where chain = of_chain and number > to_number and relation = target);
end
$$;

-- What this transaction did to a table's rows, as journalled under block `at_number`: each row before and after.
create function indexer.changes(of_chain smallint, at_number bigint, target regclass)
returns table (before jsonb, after jsonb) language plpgsql as $$
declare
    same_key text;
begin
    select string_agg(format('indexer_present_row.%1$I = (old.place).%1$I', attname), ' and ')
    into same_key
    from pg_constraint join pg_attribute on attrelid = conrelid and attnum = any(conkey)
    where conrelid = target and contype = 'p';
    return query execute format(
        'select old.before, (select to_jsonb(indexer_present_row) from %1$s as indexer_present_row where %2$s) '
        'from (select before, jsonb_populate_record(null::%1$s, key) as place '
        'from (select distinct on (key) key, before from indexer.journal '
        'where chain = $1 and number = $2 and relation = $3 order by key, id) as oldest offset 0) as old',
        target, same_key) using of_chain, at_number, target;
end
$$;
