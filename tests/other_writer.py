"""Another writer of plays, as a process of its own: plain inserts without ON CONFLICT, in every way that there is.

Its argument is a file with {"url", "plays", "seed", "pauses", "open"}. It inserts the plays in their order, cut into
statements and transactions at random, and prints how that went as a line of JSON. A statement that fails ends it.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg

COLUMNS = ["user_id", "play_item_id", "created_at", "signature", "city", "region", "country", "source", "slot"]
ONE = f"insert into plays ({', '.join(COLUMNS)}) values ($1, $2, $3, $4, $5, $6, $7, $8, $9)"
MANY = f"""
    insert into plays ({", ".join(COLUMNS)})
    select * from unnest($1::bigint[], $2::bigint[], $3::timestamp[], $4::text[], $5::text[], $6::text[], $7::text[],
                         $8::text[], $9::bigint[])
"""


class Writer:
    def __init__(self, connection: asyncpg.Connection, asked: dict[str, Any]) -> None:
        self.connection, self.chance = connection, random.Random(asked["seed"])
        self.pauses, self.open = asked["pauses"], asked["open"]
        self.longest, self.statements = 0.0, 0

    async def write(self, rows: list[tuple[Any, ...]]) -> None:
        while rows:
            way = self.chance.choice([self.each, self.each, self.many, self.copy, self.several, self.change_of_mind])
            size = self.chance.choice([1, 3, 10, 40, 120])
            await way(rows[:size])
            rows = rows[size:]
            if self.chance.random() < 0.3:
                await asyncio.sleep(self.chance.random() * self.pauses)

    async def timed(self, work: Any) -> None:
        began = time.perf_counter()
        await work
        self.longest = max(self.longest, time.perf_counter() - began)
        self.statements += 1

    async def each(self, rows: list[tuple[Any, ...]]) -> None:
        for row in rows:
            await self.timed(self.connection.execute(ONE, *row))

    async def many(self, rows: list[tuple[Any, ...]]) -> None:
        await self.timed(self.connection.execute(MANY, *map(list, zip(*rows, strict=True))))

    async def copy(self, rows: list[tuple[Any, ...]]) -> None:
        await self.timed(self.connection.copy_records_to_table("plays", records=rows, columns=COLUMNS))

    async def several(self, rows: list[tuple[Any, ...]]) -> None:
        """A transaction of several statements, which stays open for a moment."""
        async with self.connection.transaction():
            await self.each(rows[:5])
            await asyncio.sleep(self.chance.random() * self.open)
            if rows[5:]:
                await self.many(rows[5:])

    async def change_of_mind(self, rows: list[tuple[Any, ...]]) -> None:
        """Rolled back at first."""
        transaction = self.connection.transaction()
        await transaction.start()
        await self.many(rows)
        await asyncio.sleep(self.chance.random() * self.open)
        await transaction.rollback()
        await self.many(rows)


async def main(asked: dict[str, Any]) -> None:
    connection = await asyncpg.connect(asked["url"], timeout=30)
    writer = Writer(connection, asked)
    rows = [(*row[:2], datetime.fromisoformat(row[2]), *row[3:]) for row in asked["plays"]]
    try:
        await writer.write(rows)
    finally:
        print(json.dumps({"longest": writer.longest, "statements": writer.statements}), flush=True)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
