"""A hook that does to its tables whatever events tell it, and tables with all that makes undo hard."""

from __future__ import annotations

from collections.abc import Sequence

import asyncpg
from hypothesis import strategies as st

from indexer import Block, Tx, hook
from indexer.testing import make_blocks

TABLES = """
create schema "Other Place";

create table thing (
    id         int primary key,
    rank       int unique,
    doubled    int generated always as (rank * 2) stored,
    flag       boolean default true,
    data       jsonb,
    plain      json,
    raw        bytea,
    list       int[],
    n          numeric,
    few        numeric(8, 2),
    f          float8,
    f4         float4,
    at         timestamptz,
    day        date,
    span       int4range,
    pad        char(5),
    "Odd ""n" text,
    updated_at timestamptz not null default clock_timestamp()
);
create table "Other Place"."Two Keys" (
    "Key A" text collate "C", "key b" bigint, value text not null default 'new', primary key ("Key A", "key b")
);
create table owner (id int primary key, name text unique);
create table pet (
    id    int generated always as identity primary key,
    name  text unique,
    owner int not null references owner,
    buddy int references pet
);
create table toy (id int primary key, pet int not null references pet on delete cascade on update cascade);
create table home (id int primary key, name text);
create table lodger (id int primary key, home int references home on delete set null on update cascade);
create table seat (place int primary key deferrable initially deferred, who text);
-- columns that are called as the engine calls its own
create table clash (
    key int primary key, before text, old text, present text, undone text, new_rows text, clash text, number int
);
create table part (id int primary key, kind int) partition by range (id);
create table part_low partition of part for values from (minvalue) to (3);
create table part_high partition of part for values from (3) to (maxvalue);
"""
NAMES = (
    "thing", '"Other Place"."Two Keys"', "owner", "pet", "toy", "home", "lodger", "seat", "clash", "part",
)  # fmt: skip

VALUES = (
    "data = 'null'", "data = null", "data = '\"null\"'", 'data = \'{"b": [1.50, null], "a": {}}\'', "data = '1e400'",
    "plain = '{\"a\": 1,  \"a\": 2}'", "plain = 'null'", "raw = '\\x00ff5c'", "raw = ''", "list = '{}'",
    "list = '[0:1]={7,8}'", "list = '{{1,2},{3,null}}'", "n = 'NaN'", "n = '-Infinity'", "n = 1.500",
    "n = 123456789012345678901234567890.000000000000000001", "few = 1.5", "f = 'NaN'", "f = '-0'", "f = '-Infinity'",
    "f = 0.1::float8 + 0.2", "f4 = 0.3", "at = 'infinity'", "at = '0044-03-15 12:00:00.000001+00 BC'",
    "day = '0044-03-15 BC'", "at = '2024-02-29 23:59:59.999999+14'", "span = 'empty'", "span = '(3,]'", "pad = 'ab'",
    "\"Odd \"\"n\" = e'\\t\\\\\"(),''\\n'",
    "\"Odd \"\"n\" = ''", "\"Odd \"\"n\" = 'null'", "\"Odd \"\"n\" = 'ÅÄÖ\U0001f3b5'", "flag = null",
)  # fmt: skip

STATEMENTS = (
    "insert into thing (id, rank) values ({a}, {b}) on conflict do nothing",
    "insert into thing (id, rank) values ({a}, {b}) on conflict (id) do update set rank = excluded.rank",
    "insert into thing (id, rank, data) select n, n, to_jsonb(n) from generate_series({a}, {a} + {b}) as n"
    " on conflict (id) do update set flag = not thing.flag",
    "update thing set rank = rank",
    "update thing set rank = null where id = {a}",
    "update thing set rank = rank + {a} - {b}",
    "update thing set rank = -1 where rank = {a}; update thing set rank = {a} where rank = {b};"
    " update thing set rank = {b} where rank = -1",
    "update thing set id = {b} where id = {a}",
    "update thing set id = id + 100; update thing set id = 100 + {b} - id",
    "update thing set id = -1 where id = {a}; update thing set id = {a} where id = {b};"
    " update thing set id = {b} where id = -1",
    "delete from thing where id = {a}",
    "delete from thing where id <= {b}",
    "delete from thing",
    "insert into thing (id) values ({a}); delete from thing where id = {a}",
    "delete from thing where id = {a}; insert into thing (id, rank) values ({a}, {b})",
    "with gone as (delete from thing where id = {a} returning *) insert into thing (id, rank, data)"
    " select id, rank, data from gone",
    "with gone as (delete from thing where id >= {a} returning *) insert into thing (id, rank)"
    " select 20 - id, rank + {b} from gone",
    "with new as (insert into thing (id, rank) values ({a}, {b}) returning id) update thing set flag = false"
    " where id in (select id + 1 from new)",
    "merge into thing using (values ({a}, {b}), ({b}, {a})) as v (id, rank) on thing.id = v.id"
    " when matched and thing.rank = {a} then delete when matched then update set rank = v.rank"
    " when not matched then insert (id, rank) values (v.id, v.rank)",
    'insert into "Other Place"."Two Keys" values (\'{a}"x\', {b}) on conflict do nothing',
    'update "Other Place"."Two Keys" set "key b" = {b}, value = \'{a}\' where "key b" = {a}',
    'update "Other Place"."Two Keys" set "Key A" = "Key A" || \'|\'',
    'delete from "Other Place"."Two Keys" where "key b" = {a}',
    "insert into owner values ({a}, 'o{b}') on conflict do nothing",
    "insert into owner values ({a}, 'o{b}') on conflict (id) do update set name = excluded.name",
    "insert into pet (name, owner) values ('p{b}', {a}) on conflict do nothing",
    "with o as (insert into owner values ({a}, 'o{a}') returning id) insert into pet (name, owner)"
    " select 'p{b}', {a}",
    "update pet set owner = {b} where owner = {a}",
    "update pet set buddy = (select max(id) from pet where owner = {a}) where owner = {b}",
    "delete from pet where owner = {a}",
    "delete from pet where owner = {a}; delete from owner where id = {a}; insert into owner values ({b}, 'o{b}');"
    " insert into pet (name, owner) values ('p{a}', {b})",
    "delete from owner where id = {a}",
    "update owner set id = {b} where id = {a}",
    "update owner set name = 'x' where id = {a}; update owner set name = 'o{a}' where id = {b}",
    "insert into toy select {a}, min(id) from pet where owner = {b} on conflict do nothing",
    "insert into home values ({a}, 'h{b}') on conflict (id) do update set name = excluded.name",
    "update home set id = {b} where id = {a}",
    "delete from home where id = {a}",
    "insert into lodger select {a}, max(id) from home where id <= {b} on conflict do nothing",
    "delete from toy where id = {a}",
    "insert into seat values ({a}, 'w{b}'); set constraints all immediate",
    "update seat set place = 10 - place; set constraints all immediate",
    "update seat set place = {a} + {b} - place where place in ({a}, {b}); set constraints all immediate",
    "delete from seat where place = {a}",
    "insert into clash (key, before, clash) values ({a}, 'b', '{b}') on conflict (key) do update set old = 'again'",
    "update clash set key = {b}, present = 'yes', undone = 'no' where key = {a}",
    "delete from clash where key = {a}",
    "insert into part values ({a}, {b}) on conflict (id) do update set kind = excluded.kind",
    "update part set id = {b} where id = {a}",
    "update part set id = 5 - id",
    "delete from part where kind = {a}",
    *(f"update thing set {value} where id {which}" for value in VALUES for which in (">= {a}", "= {a}")),
)  # fmt: skip


@hook("nasty", listens=["Do"], tables=NAMES)
async def nasty(tx: Tx, blocks: Sequence[Block]) -> None:
    for block in blocks:
        for event in block.events:
            sql, a, b = event.args["sql"], event.args["a"], event.args["b"]
            # what the constraints refuse is undone by the hook itself, back to its savepoint
            await tx.execute("savepoint mine")
            try:
                if sql == "copy":
                    await tx.insert_new("thing", ("id", "rank"), [(a, b), (b, a), (a + b, None)], key=("id",))
                else:
                    await tx.execute(sql.replace("{a}", str(a)).replace("{b}", str(b)))
            except (asyncpg.IntegrityConstraintViolationError, asyncpg.CardinalityViolationError):
                await tx.execute("rollback to mine")


commands = st.tuples(st.sampled_from(("copy", *STATEMENTS)), st.integers(0, 4), st.integers(0, 4))
histories = st.lists(st.lists(commands, max_size=8), min_size=1, max_size=6)


def made(history: Sequence[Sequence[tuple[str, int, int]]]) -> list[Block]:
    return make_blocks(*([("Do", {"sql": sql, "a": a, "b": b}) for sql, a, b in block] for block in history))


# a row of each kind, so that random histories find something to change
FILLED: list[tuple[str, int, int]] = [
    *((f"insert into thing (id, rank) values ({n}, {n}) on conflict do nothing", n, n) for n in range(4)),
    *((f"insert into owner values ({n}, 'o{n}')", n, n) for n in range(3)),
    *((f"insert into pet (name, owner) values ('p{n}', {n})", n, n) for n in range(3)),
    ("insert into toy select id, id from pet", 0, 0),
    ("insert into home values (1, 'h1'), (2, 'h2'); insert into lodger values (1, 1), (2, 2), (3, null)", 0, 0),
    ("insert into seat values (4, 'four'), (6, 'six')", 0, 0),
    ("insert into clash (key, before, old) values (1, 'b', 'o'), (2, 'c', 'p')", 0, 0),
    ("insert into part values (1, 1), (2, 2), (4, 4)", 0, 0),
    ("insert into \"Other Place\".\"Two Keys\" values ('a', 1), ('A', 1), ('b', 2)", 0, 0),
]
