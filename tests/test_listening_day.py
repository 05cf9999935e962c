"""Some hours of the simulated day, with kills; `make day` lives through a whole one of 5,000 people."""

from __future__ import annotations

import listening_day
import pytest


@pytest.mark.timeout(120)
async def test_a_quarter_of_a_day_with_two_sidecars_of_which_one_is_killed_at_random(database_url: str) -> None:
    found = await listening_day.run(database_url, people=150, hours=5, seed=3, kill_chance=0.25)
    assert found["polls"] >= 600 and found["plays"] > 5_000
    assert found["kills"] >= 2 and found["failures"] >= 3
    assert found["people without failures whose every play is there"] > 100
