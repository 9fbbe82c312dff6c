"""Real processes, really killed: the next one ends with the same bits."""

from __future__ import annotations

import os
from pathlib import Path

import killed_runs
import pytest

KILLS = int(os.environ.get("KILLS", "4"))
"""How many points are tried here; ``python tests/killed_runs.py`` tries fifty."""


@pytest.mark.parametrize("name", killed_runs.RUNS)
def test_a_killed_process_is_continued_by_another_with_the_same_bits(name: str, folder: Path) -> None:
    done = killed_runs.check(name, KILLS, folder, seed=KILLS)
    assert len(done) == KILLS
