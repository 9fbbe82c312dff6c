"""Solves and scans that are continued: whatever lies in the folder when the process dies, the bits are the same."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adjoint_cases import assert_same_bits, numbers
from torch import Tensor

import adjoint
from adjoint import Device, Files, Host
from revolve import Binomial, Cast, Disk, Journal, Online, StoreError

FREE = {"write": 0.0, "read": 0.0}
TIERS = [Device(slots=1), Host(slots=1, **FREE), Files(slots=2, **FREE)]


Run = Callable[..., list[Tensor]]
RUNS: dict[str, Run] = {}


def run(make: Run) -> Run:
    RUNS[make.__name__] = make
    return make


def solved(before: Callable[[], None], t: Any, journal: Any, times_too: bool = False, **how: Any) -> list[Tensor]:
    """Values and gradients of a small network's solve."""
    weights, y0 = (0.4 * numbers(5, 5, seed=1)).requires_grad_(), numbers(2, 5, seed=2).requires_grad_()
    t = torch.tensor(t, dtype=torch.float64, requires_grad=times_too)

    def f(s: Tensor, y: Tensor) -> Tensor:
        before()
        return torch.tanh(y @ weights) + torch.sin(3 * s)

    ys = adjoint.solve(f, y0, t, journal=journal, **how).ys
    wanted = [weights, y0, t] if times_too else [weights, y0]
    return [ys.detach(), *torch.autograd.grad((ys * torch.cos(ys)).sum(), wanted)]


@run
def fixed_steps(before: Callable[[], None], journal: Any, **memory: Any) -> list[Tensor]:
    return solved(before, [0.0, 0.3, 1.0], journal, True, method="midpoint", dt=0.1, **memory)


@run
def controlled_steps(before: Callable[[], None], journal: Any, **memory: Any) -> list[Tensor]:
    return solved(before, [0.0, 0.3, 0.35, 1.5], journal, True, method="bosh3", rtol=1e-3, atol=1e-5, **memory)


@run
def several_slopes(before: Callable[[], None], journal: Any, **memory: Any) -> list[Tensor]:
    return solved(before, [0.0, 0.3, 1.0], journal, True, method="implicit_adams", dt=0.1, rtol=1e-3, **memory)


@run
def recurrence(before: Callable[[], None], journal: Any, **memory: Any) -> list[Tensor]:
    decay = torch.tensor([0.8, 0.9], dtype=torch.float64, requires_grad=True)
    inputs, first = numbers(9, 2, seed=1).requires_grad_(), numbers(2, seed=2).requires_grad_()

    def step(carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        before()
        carry = decay * carry + torch.sin(x)
        return carry, carry.prod()

    last, outputs = adjoint.scan(step, first, inputs, journal=journal, **memory)
    loss = (outputs * outputs).sum() + last.sum()
    return [last.detach(), outputs.detach(), *torch.autograd.grad(loss, (decay, inputs, first))]


def continued(make: Run, folder: Path, before: Callable[[], None] = lambda: None, **memory: Any) -> list[Tensor]:
    journal = Journal(folder, every=0)
    try:
        return make(before, journal, **memory)
    finally:
        journal.close()


WAYS: dict[str, dict[str, Any]] = {
    "all tapes": {},
    "slots": {"slots": 3},
    "tiers": {"tiers": TIERS},
    "files": {"schedule": Binomial(3), "tiers": [Device()]},
    "online": {"schedule": Online(3)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_anywhere_is_continued_with_the_same_bits(name: str, way: str, folder: Path) -> None:
    make, memory = RUNS[name], WAYS[way]
    expected = make(lambda: None, None, slots="all")
    copies: list[Path] = []

    def before() -> None:
        copies.append(folder / f"killed-{len(copies)}")
        shutil.copytree(folder / "run", copies[-1])

    assert_same_bits(continued(make, folder / "run", before, **memory), expected)
    assert not (folder / "run").exists()
    calls = []
    for copy in copies[:: max(1, len(copies) // 12)]:
        done: list[None] = []
        assert_same_bits(continued(make, copy, lambda: done.append(None), **memory), expected)  # noqa: B023
        assert not copy.exists()
        calls.append(len(done))
    assert way == "all tapes" or calls[-1] < calls[0] / 2  # what was done is not done again; tapes alone are lost


def test_a_folder_is_all_that_is_needed(folder: Path) -> None:
    expected = RUNS["fixed_steps"](lambda: None, None, slots="all")
    assert_same_bits(RUNS["fixed_steps"](lambda: None, folder / "run", slots=3), expected)
    assert list(folder.iterdir()) == []


def interrupted(folder: Path, call: int, **memory: Any) -> None:
    """A run that ends at its n-th call of f, with what it wrote left behind."""
    calls = 0

    def before() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        continued(RUNS["fixed_steps"], folder, before, **memory)
    assert (folder / "forward").exists()


@pytest.mark.parametrize("call", [30, 45, 60])
def test_after_an_exception_the_run_can_be_continued_too(call: int, folder: Path) -> None:
    interrupted(folder / "run", call, tiers=TIERS)
    expected = RUNS["fixed_steps"](lambda: None, None, slots="all")
    assert_same_bits(continued(RUNS["fixed_steps"], folder / "run", tiers=TIERS), expected)


def test_another_plan_may_take_over(folder: Path) -> None:
    interrupted(folder / "run", 50, tiers=TIERS)
    expected = RUNS["fixed_steps"](lambda: None, None, slots="all")
    assert_same_bits(continued(RUNS["fixed_steps"], folder / "run", slots=2), expected)


RATE = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)


def decay(folder: Path, *, stop: int = -1, rate: Tensor = RATE, y0: float = 1.0, power: int = 1, **how: Any) -> Tensor:
    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return -rate * y

    journal, start = Journal(folder, every=0), torch.full((3,), y0, dtype=torch.float64)
    try:
        options: dict[str, Any] = {"method": "rk4", "dt": 0.1, "slots": 3} | how
        ys = adjoint.solve(f, start, options.pop("t", [0.0, 1.0]), journal=journal, **options).ys
        return torch.autograd.grad((ys**power).sum(), rate)[0]
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"y0": 2.0}, "holds a run that differs in: first state, about; to begin anew delete that folder"),
        ({"rate": torch.tensor(0.6, dtype=torch.float64, requires_grad=True)}, "differs in: about"),
        ({"dt": 0.05}, "differs in: number of steps, about"),
        ({"method": "midpoint", "dt": 0.1}, "differs in: about"),
        ({"t": [0.0, 1.1], "dt": 0.11}, "differs in: about"),
        ({"method": "tsit5", "dt": None}, "differs in: number of steps, about"),
    ],
)
def test_another_run_is_refused_and_what_differs_is_named(other: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        decay(folder / "run", stop=60)
    with pytest.raises(ValueError, match=sentence):
        decay(folder / "run", **other)
    assert torch.equal(decay(folder / "run"), decay(folder / "new"))


def test_another_loss_is_refused(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        decay(folder / "run", stop=100)
    assert (folder / "run" / "reverse").exists()
    with pytest.raises(ValueError, match="began with other cotangents of the outputs: the loss is another one"):
        decay(folder / "run", power=2)
    assert torch.equal(decay(folder / "run"), decay(folder / "new"))


@pytest.mark.parametrize("name", ["forward", "reverse", "run"])
def test_a_point_that_was_altered_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        decay(folder / "run", stop=100)
    path = folder / "run" / name
    for spoilt in (path.read_bytes()[:-1], path.read_bytes()[:-1] + b"?", b""):
        path.write_bytes(spoilt)
        with pytest.raises(
            OSError, match="was cut off or altered, and this run cannot be continued; delete the folder"
        ):
            decay(folder / "run")


def test_states_that_were_altered_are_refused(folder: Path) -> None:
    how: dict[str, Any] = {"slots": None, "tiers": [Device(slots=0), Files(slots=3, **FREE)]}
    with pytest.raises(KeyboardInterrupt):
        decay(folder / "run", stop=75, **how)
    path = folder / "run" / "states-0"
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(OSError, match="states-0 was altered: the state of step"):
        decay(folder / "run", **how)
    shutil.rmtree(folder / "run")
    assert torch.equal(decay(folder / "run", **how), decay(folder / "new"))


def test_one_folder_serves_one_run_at_a_time(folder: Path) -> None:
    journal = Journal(folder / "run")
    with pytest.raises(OSError, match="is in use by a run that is still going on; give another folder"):
        adjoint.solve(lambda t, y: -RATE * y, torch.ones(2, dtype=torch.float64), [0.0, 1.0], journal=folder / "run")
    journal.close()
    with pytest.raises(OSError, match="there is no folder .*missing to make run in; make it first"):
        Journal(folder / "missing" / "run")
    with pytest.raises(ValueError, match="every=-1 is no time between two points; give seconds"):
        Journal(folder / "run", every=-1)


def test_a_journal_follows_one_run_at_a_time_and_the_next_after_that(folder: Path) -> None:
    journal, make = Journal(folder / "run", every=0), RUNS["fixed_steps"]
    calls = 0

    def before() -> None:
        nonlocal calls
        calls += 1
        if calls == 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(before, journal, tiers=TIERS)
    assert (folder / "run" / "forward").exists()
    expected = make(lambda: None, None, slots="all")
    assert_same_bits(make(lambda: None, journal, tiers=TIERS), expected)
    assert list(folder.iterdir()) == []
    assert_same_bits(make(lambda: None, journal, slots=2), expected)
    y0 = torch.ones(3, dtype=torch.float64)
    how: dict[str, Any] = {"method": "rk4", "dt": 0.1, "journal": journal}
    kept = adjoint.solve(lambda t, y: -RATE * y, y0, [0.0, 1.0], **how)
    with pytest.raises(ValueError, match=r"follows a run that is not finished; close\(\) it first, or take another"):
        adjoint.solve(lambda t, y: -RATE * y, y0, [0.0, 1.0], **how)
    kept.ys.sum().backward()
    assert list(folder.iterdir()) == []


def test_states_in_fewer_bits_and_a_journal_do_not_go_together(folder: Path) -> None:
    tiers = [Device(slots=2, codec=Cast("float32"))]
    with pytest.raises(ValueError, match="journal= promises the same bits, and a codec= that loses some cannot"):
        RUNS["fixed_steps"](lambda: None, folder / "run", tiers=tiers)
    journal = Journal(folder / "other")
    with pytest.raises(ValueError, match="beside a journal: a run continued from less exact states has other bits"):
        Disk(codec=Cast("float32"), journal=journal)
    with pytest.raises(ValueError, match="the file lies in the folder of the journal"):
        Disk(folder, journal=journal)
    journal.close()


def test_a_run_without_gradient_is_continued_too(folder: Path) -> None:
    def values(stop: int) -> Tensor:
        calls = 0

        def f(t: Tensor, y: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return torch.sin(t) * y

        journal = Journal(folder / "run", every=0)
        try:
            how: dict[str, Any] = {"method": "tsit5", "rtol": 1e-6}
            ys = adjoint.solve(f, torch.ones(3, dtype=torch.float64), [0.0, 1.0, 3.0], journal=journal, **how).ys
        finally:
            journal.close()
        counts.append(calls)
        return ys

    counts: list[int] = []
    whole = values(-1)
    with pytest.raises(KeyboardInterrupt):
        values(counts[0] // 2)
    assert torch.equal(values(-1), whole)
    assert counts[1] < 0.75 * counts[0]
    assert os.listdir(folder) == []


def test_a_program_that_cannot_be_continued_says_so(folder: Path) -> None:
    y0 = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(
        TypeError, match="batched=True takes steps that cannot be continued by another process yet; leave"
    ):
        adjoint.solve(lambda t, y: -RATE * y, y0, [0.0, 1.0], batched=True, journal=folder / "run")


def test_a_journal_that_is_no_folder_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    with pytest.raises(StoreError, match="file is no folder to keep a journal in"):
        Journal(folder / "file")
    with pytest.raises(TypeError, match="journal=3 is no folder"):
        Journal(3)  # type: ignore[arg-type]
