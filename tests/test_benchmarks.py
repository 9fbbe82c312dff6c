"""The measuring of peers: what is measured is the same gradient, and what cannot be measured says why."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from benchmarks.peers import in_torch, measure, report
from benchmarks.peers.measure import CONTENDERS, Measured
from benchmarks.peers.problems import problems
from benchmarks.sequences import in_torch as sequences_in_torch
from benchmarks.sequences import report as sequences

SMALL = [replace(p, steps=4) for p in problems().values() if p.y0.nbytes < 2**20]


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.name)
def test_our_gradients_are_those_of_the_loop(problem) -> None:
    expected = in_torch.loop(problem)()
    for way in (in_torch.in_slots, in_torch.all_tapes, in_torch.checkpointed):
        for mine, loops in zip(way(problem)(), expected, strict=True):
            torch.testing.assert_close(mine, loops, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", problems().values(), ids=lambda p: p.name)
def test_sums_of_steps_are_exact_and_segments_divide_them(problem) -> None:
    assert sum([problem.h] * problem.steps) == problem.end
    assert problem.steps % problem.segments == 0


def test_a_child_weighs_and_times_a_gradient_and_the_table_shows_it() -> None:
    problem = problems()["Lotka-Volterra"]
    rows = measure.measured(problem, 1, CONTENDERS[:1])
    assert rows[0].why_not is None and rows[0].bytes > 2**20 and rows[0].median > 0
    assert rows[0].gradient is not None and rows[0].gradient.shape == (6,)
    assert "| torch loop |" in report.table(problem, rows).markdown()


@pytest.mark.skipif(find_spec("diffrax") is not None, reason="diffrax is installed")
def test_a_peer_that_is_not_installed_is_a_row_that_says_so() -> None:
    problem = problems()["Lotka-Volterra"]
    (row,) = measure.measured(problem, 1, [c for c in CONTENDERS if c.module == "in_diffrax"])
    assert row.why_not == "diffrax is not installed"
    assert "diffrax is not installed" in report.table(problem, [row]).markdown()


def test_a_peer_that_needs_too_much_memory_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROOM", 2**20)
    found = measure.weighed(problems()["Lotka-Volterra"], CONTENDERS[0], core=max(os.sched_getaffinity(0)))
    assert found.why_not is not None and found.why_not.startswith("needs more than")


def test_a_process_that_was_stopped_between_two_gradients_says_so() -> None:
    problem, core = problems()["Lotka-Volterra"], max(os.sched_getaffinity(0))
    with measure.Child("time", problem, CONTENDERS[0], core=core) as child:
        assert "first" in child.answer()
        child._process.kill()
        child._process.wait()
        child.ask()
        assert child.answer() == {"error": "the process ended"}


def test_a_table_without_the_loop_has_no_ratios_and_the_picture_is_drawn() -> None:
    problem = problems()["Lotka-Volterra"]
    rows = [Measured(CONTENDERS[0], why_not="takes longer than 300 s")]
    rows.append(Measured(CONTENDERS[1], 10**6, (0.5, 0.7), 1.0, np.ones(6)))
    text = report.table(problem, rows).markdown()
    assert "takes longer than 300 s" in text and "| 600 ms |  | 1.0 MB |  |  | 1.0 s |" in text
    assert report.section({problem.name: rows}).pictures[0][0] == "peers.png"


def test_every_way_through_a_long_sequence_gives_the_gradient_of_the_loop() -> None:
    length = 60
    expected = sequences_in_torch.loop(length)()
    ways = ("parallel", "every_chunk", "sequential", "any_step", "all_tapes", "all_tapes_sequential", "checkpointed")
    for way in ways:
        for mine, loops in zip(getattr(sequences_in_torch, way)(length)(), expected, strict=True):
            np.testing.assert_allclose(mine, loops, rtol=1e-11, atol=1e-13, err_msg=way)


def test_chunks_of_a_long_sequence_run_as_often_as_its_table_says_and_give_the_bits_of_all_tapes() -> None:
    label, module, function = sequences.CONTENDERS[0]
    row = sequences.measured(900, label, module, function)
    assert row.why_not is None and row.seconds > 0
    text = sequences.table(900, [row]).markdown()
    found = re.search(r"Chunks run by the plan: (\d+); counted: (\d+)", text)
    assert found is not None and found[1] == found[2] and "in parallel" in text
    for few, all_tapes in (("parallel", "all_tapes"), ("sequential", "all_tapes_sequential")):
        runs = [getattr(sequences_in_torch, way)(900)() for way in (few, all_tapes)]
        assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True))
    assert sequences.picture({900: [row]}).axes
