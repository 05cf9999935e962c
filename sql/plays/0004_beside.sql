-- lock-timeout: 300ms
-- Another writer of the same plays: what became of each play's second copy, and the guard against those to come.

alter table plays add column if not exists counterpart text;

comment on column plays.counterpart is
    'null: no other writer''s copy of the play is known; adopted: the row is another writer''s, which became ours; '
    'dropped: the row is ours, and another writer''s copy was dropped before it landed';

-- Whether a table has a good index that begins with these columns in this order, on all rows or on those of `predicate`
-- (as pg_get_expr writes it).
create function indexer.indexed(target regclass, columns text[], predicate text default null) returns boolean
language sql stable as $$
    select exists (
        select from pg_index
        where indrelid = target and indisvalid
            and (indpred is null or pg_get_expr(indpred, indrelid) = predicate)
            and columns = (
                select array_agg(coalesce(attname::text, '') order by place)
                from unnest(indkey) with ordinality as keys (attnum, place)
                left join pg_attribute on attrelid = indrelid and pg_attribute.attnum = keys.attnum and keys.attnum > 0
                where place <= least(indnkeyatts, cardinality(columns))
            )
    )
$$;

-- Have `plays` for ourselves until COMMIT: whoever inserts plays beside us holds this lock shared. Those who come while
-- we wait queue behind us, so we wait twice for 300 ms, and they get in between. No lock is waited for any longer in the
-- rest of the transaction either: somebody may hold it who waits for us, and less than deadlock_timeout (1 s) makes us
-- the one that gives way.
create function indexer.plays_lock(target regclass) returns void language plpgsql as $$
begin
    if not exists (select from pg_trigger where tgrelid = target and tgname = 'indexer_guard_drop') then
        raise exception 'the guard on % is gone: start the indexer again, with beside_writer = true in every process '
                        'that writes this table', target;
    end if;
    perform set_config('indexer.plays_writer', 'on', true), set_config('lock_timeout', '300ms', true);
    begin
        perform pg_advisory_xact_lock(hashtext('indexer.plays'), hashtext(target::oid::text));
    exception when lock_not_available then
        perform pg_advisory_xact_lock(hashtext('indexer.plays'), hashtext(target::oid::text));
    end;
end
$$;

-- The guard's first half, before each statement that inserts plays: from here to its COMMIT a foreign writer and we
-- take turns.
create function indexer.plays_guard_lock() returns trigger language plpgsql as $$
begin
    if current_setting('indexer.plays_writer', true) is distinct from 'on' then
        perform pg_advisory_xact_lock_shared(hashtext('indexer.plays'), hashtext(tg_relid::text));
    end if;
    return null;
end
$$;

-- The guard's second half, before each row without a place on the chain: a play that is there as a row of ours, whose
-- copy this is, does not land. One row of ours stops one copy; which of several equal ones does not matter. One that a
-- foreign transaction has marked just now has its copy: it is passed over and never waited for. What a reorganisation
-- puts back (indexer.restore) lands.
--
-- Without an order no plan walks the primary key, and num_nulls keeps it off the index that begins with the chain.
-- As the owner, since a writer need not have the right to update; the table is the trigger's, whatever its schema.
create function indexer.plays_guard_drop() returns trigger language plpgsql
security definer set search_path = pg_catalog, pg_temp as $$
declare
    copied boolean;
begin
    if current_setting('indexer.restoring', true) = 'on' then
        return new;
    end if;
    execute format(
        'update %1$s set counterpart = ''dropped'' where id = (select id from %1$s where created_at = $1 '
        'and play_item_id = $2 and user_id is not distinct from $3 and coalesce(signature, '''') = $4 '
        'and num_nulls(chain) = 0 and counterpart is null limit 1 for update skip locked) returning true',
        tg_relid::regclass)
    into copied using new.created_at, new.play_item_id, new.user_id, coalesce(new.signature, '');
    if copied then
        return null;
    end if;
    return new;
end
$$;

revoke execute on function indexer.plays_guard_drop() from public;

alter function indexer.restore(smallint, bigint, regclass) set indexer.restoring = 'on';

-- Put the guard on the table, or take it off. Says how it went: done, busy (others hold the table: try again, since who
-- waits for it makes them queue), denied (the table is another role's).
create function indexer.guard_plays(target regclass, wanted boolean) returns text language plpgsql
set lock_timeout = '300ms' as $$
begin
    if wanted = exists (select from pg_trigger where tgrelid = target and tgname = 'indexer_guard_drop') then
        return 'done';
    end if;
    if wanted then
        execute format('create trigger indexer_guard_lock before insert on %s for each statement '
                       'execute function indexer.plays_guard_lock()', target);
        execute format('create trigger indexer_guard_drop before insert on %s for each row '
                       'when (new.chain is null) execute function indexer.plays_guard_drop()', target);
    else
        execute format('drop trigger if exists indexer_guard_lock on %s', target);
        execute format('drop trigger indexer_guard_drop on %s', target);
    end if;
    return 'done';
exception
    when lock_not_available then return 'busy';
    when insufficient_privilege then return 'denied';
end
$$;
