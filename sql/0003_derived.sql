-- Derived tables: what a rebuild must know of its base, and how a table is compared with the rows that it must hold.

-- Tables that have lost old rows on purpose. Whoever prunes a table says so here in the transaction of the delete: what
-- was counted from the rows that are gone can't be counted again.
create table indexer.pruned (
    relation  regclass primary key,
    before    timestamp not null,      -- rows before this moment are gone
    rows      bigint not null,
    pruned_at timestamptz not null default now()
);

-- The statements that compare `target` with the rows of `query` (which gives the columns `given`, the primary key among
-- them), and make it equal. Rows of the target for which `only_rows` does not hold are none of ours.
--
--   counting    how many rows are ours
--   comparing   of each kind (missing, superfluous, different) the first $1 rows as jsonb, and how many there are
--   collecting  all of them into the temporary table indexer_difference, which the last three work off
--
-- A row of the key's columns alone can't be different, so that `changing` then changes nothing. The aliases are such
-- that no column has them: to_jsonb(alias) would otherwise mean the column.
create function indexer.derivation(
    target regclass, given text[], query text, only_rows text,
    out counting text, out comparing text, out collecting text, out deleting text, out changing text, out inserting text
) language plpgsql stable as $$
declare
    key_names text[];
    keys text;
    first_key text;
    same_key text;
    names text;         -- a, b, c
    typed text;         -- a::bigint as a, ...: as the table has them, whatever the query made of them
    wanted text;
    present text;
    collected text;     -- of a superfluous row nothing but the key is needed, and both sides of a join have that
    changes text;
    kind text;
    joined text;
begin
    select array_agg(attname::text), string_agg(format('%I', attname), ', '), min(format('%I', attname)),
           string_agg(format('indexer_target.%1$I = indexer_difference.%1$I', attname), ' and ')
    into key_names, keys, first_key, same_key
    from (
        select attname from pg_constraint join pg_attribute on attrelid = conrelid and attnum = any(conkey)
        where conrelid = target and contype = 'p'
        order by array_position(conkey, attnum)
    ) as columns;
    select string_agg(format('%I', name), ', ' order by place),
           string_agg(format('%1$I::%2$s as %1$I', name, format_type(atttypid, atttypmod)), ', ' order by place),
           string_agg(format('indexer_wanted.%I', name), ', ' order by place),
           string_agg(format('indexer_present.%I', name), ', ' order by place),
           string_agg(format(case when name = any(key_names) then '%I' else 'indexer_wanted.%I' end, name), ', '
                      order by place),
           string_agg(format('%1$I = indexer_difference.%1$I', name), ', ' order by place)
    into names, typed, wanted, present, collected, changes
    from unnest(given) with ordinality as columns (name, place)
    join pg_attribute on attrelid = target and attname = name;
    kind := format(
        $sql$case when indexer_present.%1$s is null then 'missing'
                  when indexer_wanted.%1$s is null then 'superfluous' else 'different' end$sql$, first_key);
    -- query and condition stand on lines of their own: they may end with a comment
    joined := format(
        $sql$
        from (select %s from (
        %s
        ) as indexer_given) as indexer_wanted
        full join (select %s from %s where (
        %s
        )) as indexer_present using (%s)
        where indexer_present.%9$s is null or indexer_wanted.%9$s is null or (%7$s) is distinct from (%8$s)
        $sql$, typed, query, names, target, only_rows, keys, wanted, present, first_key);
    counting := format(
        $sql$
        select count(*) from %s where (
        %s
        )
        $sql$, target, only_rows);
    comparing := format(
        $sql$
        select kind, present, wanted, total
        from (
            select %1$s as kind, count(*) over (partition by %1$s) as total,
                   row_number() over (partition by %1$s order by %2$s) as place,
                   case when indexer_present.%3$s is not null then to_jsonb(indexer_present) end as present,
                   case when indexer_wanted.%3$s is not null then to_jsonb(indexer_wanted) end as wanted
            %4$s
        ) as each
        where place <= $1 order by kind, place
        $sql$, kind, keys, first_key, joined);
    collecting := format(
        'create temporary table indexer_difference on commit drop as select %s as indexer_kind, %s %s',
        kind, collected, joined);
    deleting := format(
        $sql$
        delete from %s as indexer_target using indexer_difference where indexer_kind = 'superfluous' and %s
        $sql$, target, same_key);
    changing := format(
        $sql$
        update %s as indexer_target set %s from indexer_difference where indexer_kind = 'different' and %s
        $sql$, target, changes, same_key);
    inserting := format(
        $sql$
        insert into %s (%s) overriding system value
        select %2$s from indexer_difference where indexer_kind = 'missing' order by %3$s
        $sql$, target, names, keys);
end
$$;
