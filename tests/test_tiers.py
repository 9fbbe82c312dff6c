"""Several kinds of memory under solve and scan: the same bits, the planned bytes, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from adjoint_cases import PROBLEMS, Case, assert_same_bits, gradients, loss_of, numbers
from torch import Tensor

import adjoint
from adjoint import Device, Files, Host
from adjoint.memory import Meter
from adjoint.stores import FileSlots, HostSlots, Slots
from revolve import (
    Action,
    Advance,
    Binomial,
    Cast,
    Drop,
    HRevolve,
    Load,
    Multistage,
    Online,
    Record,
    Report,
    Save,
    Saved,
    StoreAll,
    StoreError,
    StoreNothing,
    verify,
)
from revolve.files import SlotFile
from revolve.hierarchy import Tier
from revolve.zfp import Zfp

CPU = torch.device("cpu")
FREE = {"write": 0.0, "read": 0.0}
HOW = {"method": "rk4", "dt": 0.02}


def network(size: int = 40) -> Case:
    weights = (0.3 * numbers(size, size, seed=1)).requires_grad_()
    y0 = numbers(3, size, seed=2).requires_grad_()
    return Case(lambda t, y: torch.tanh(y @ weights), y0, [0.0, 0.5, 1.0], [weights, y0])


@pytest.fixture(scope="module")
def expected() -> list[Tensor | None]:
    return gradients(network(), slots="all", **HOW)


def choices(folder: Path) -> Iterator[dict[str, Any]]:
    """Ways to keep the states of a gradient."""
    files = Files(folder=folder, **FREE)
    yield {"tiers": [Device(slots=3)]}
    yield {"tiers": [Device(slots=0), Host(slots=3, **FREE)]}
    yield {"tiers": [Device(slots=1), Host(slots=2), Files(slots=3, folder=folder)]}
    yield {"tiers": [Device("200 KB"), files]}
    yield {"tiers": [Device("200 KB"), Host("2 KB", **FREE), Files("3 KB", folder=folder, **FREE)]}
    yield {"tiers": [Device("200 KB"), Files(folder=folder, write=1.0, read=1.0)]}
    yield {"tiers": [Device(), Host(), Files(folder=folder)]}
    yield {"schedule": Multistage(1, 3), "tiers": [Device(), files]}
    yield {"schedule": Multistage(1, 3), "tiers": [Device(), Host()]}
    yield {"schedule": HRevolve((Tier(1), Tier(1, 1.0, 1.0), Tier(2, 2.0, 2.0))), "tiers": [Device(), Host(), files]}
    yield {"schedule": Binomial(4)}
    yield {"tiers": [Device(slots=1), Files(slots=3, folder=folder, codec=Zfp())]}


def test_the_gradient_has_the_same_bits_over_every_tier(expected: list[Tensor | None], tmp_path: Path) -> None:
    for choice in choices(tmp_path):
        assert_same_bits(gradients(network(), **choice, **HOW), expected)
        assert list(tmp_path.iterdir()) == [], choice


@pytest.mark.parametrize("name", PROBLEMS)
def test_states_of_any_kind_pass_through_a_file_and_the_host(name: str, tmp_path: Path) -> None:
    case, how = PROBLEMS[name](CPU), {"method": "midpoint", "dt": 0.2}
    tiers = [Device(slots=0), Host(slots=1, **FREE), Files(slots=2, folder=tmp_path, **FREE)]
    assert_same_bits(gradients(case, tiers=tiers, **how), gradients(case, slots="all", **how))


def test_the_bits_are_the_same_on_every_device(device: torch.device, tmp_path: Path) -> None:
    """On CUDA by pinned memory and a stream of its own; the codec works on the host."""
    for method in ("rk4", "tsit5"):
        how: dict[str, Any] = {"method": method} | ({"dt": 0.02} if method == "rk4" else {"rtol": 1e-8})
        expected = gradients(PROBLEMS["network"](device), slots="all", **how)
        for codec in (None, Zfp()):
            files = Files(slots=2, folder=tmp_path, codec=codec, **FREE)
            for tiers in ([Device(slots=0), files], [Device(slots=1), Host(slots=2, **FREE), files]):
                assert_same_bits(gradients(PROBLEMS["network"](device), tiers=tiers, **how), expected)


def test_leaves_that_are_no_floats_pass_through_a_file(tmp_path: Path) -> None:
    def step(carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        value = carry["value"] * torch.where(carry["flag"], 0.9, 1.1) + x
        moved = {"value": value, "flag": value[:1] > 0, "none": carry["none"], "count": carry["count"] + 1}
        return moved | {"half": (carry["half"] * 2).to(torch.bfloat16)}, value.sum()

    def gradient(**memory: Any) -> list[Tensor]:
        inputs = numbers(12, 4, seed=3).requires_grad_()
        carry = {"value": torch.ones(4, dtype=torch.float64), "flag": torch.tensor([True]), "none": torch.zeros(0)}
        carry |= {"count": torch.tensor(0), "half": torch.tensor([0.5], dtype=torch.bfloat16)}
        last, outputs = adjoint.scan(step, carry, inputs, **memory)
        assert int(last["count"]) == 12
        return list(torch.autograd.grad(outputs.sum() + last["value"].prod(), inputs))

    for codec in (None, Zfp()):
        tiers = [Device(slots=0), Files(slots=3, folder=tmp_path, codec=codec, **FREE)]
        assert_same_bits(gradient(tiers=tiers), gradient(slots="all"))


@pytest.mark.parametrize("method", ["tsit5", "rk4"])
def test_a_graph_that_is_kept_is_reversed_again_through_files(method: str, tmp_path: Path) -> None:
    case = network()
    how = {"rtol": 1e-6} if method == "tsit5" else {"dt": 0.02}
    solution = case.solve(method=method, **how, tiers=[Device(slots=1), Files(slots=3, folder=tmp_path, **FREE)])
    loss = loss_of(solution.ys)
    first = torch.autograd.grad(loss, case.wanted, retain_graph=True)
    second = torch.autograd.grad(loss, case.wanted)
    assert_same_bits(second, first)
    assert_same_bits(first, gradients(case, slots="all", method=method, **how))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("schedule", [Online(4), StoreAll(), Multistage(1, 3)], ids=str)
def test_an_adaptive_solve_follows_a_schedule_of_ones_own(schedule: Any, tmp_path: Path) -> None:
    case, how = network(), {"method": "dopri5", "rtol": 1e-7}
    solution = case.solve(schedule=schedule, tiers=[Device(), Files(folder=tmp_path)], **how)
    assert solution.plan is not None and solution.plan.schedule == schedule
    found = torch.autograd.grad(loss_of(solution.ys), case.wanted)
    assert_same_bits(found, gradients(case, slots="all", **how))
    extra = solution.stats.plain_runs - solution.plan.report.plain_runs
    assert extra == {StoreAll(): 0, Online(4): 1}.get(schedule, solution.stats.steps)


STORES: dict[str, Callable[[Any, Path], Any]] = {
    "device": lambda like, folder: Slots(like, 2),
    "host": lambda like, folder: HostSlots(like, 2),
    "file": lambda like, folder: FileSlots(like, SlotFile(folder, slots=2)),
    "file, by way of the host": lambda like, folder: FileSlots(like, SlotFile(folder, slots=2), staged=True),
    "compressed": lambda like, folder: FileSlots(like, SlotFile(folder, slots=2), Zfp()),
    "compressed, by way of the host": lambda like, folder: FileSlots(like, SlotFile(folder), Zfp(), staged=True),
}


@pytest.mark.parametrize("name", STORES)
def test_a_store_gives_back_what_it_was_given_in_any_order(name: str, tmp_path: Path) -> None:
    """Also what is on its way in while another goes out, dropped while it is fetched, or fetched and not wanted."""
    like = (numbers(50, 3), torch.zeros((), dtype=torch.int64), numbers(2, dtype=torch.complex64))
    store, choose = STORES[name](like, tmp_path), random.Random(1)
    held: dict[int, Any] = {}
    for step in range(300):
        what = choose.choice(["save", "save", "prefetch", "load", "load", "drop"])
        if what == "save":
            state = (numbers(50, 3, seed=step), torch.tensor(step), numbers(2, seed=step, dtype=torch.complex64))
            store.save(step, state)
            held[step] = tuple(x.clone() for x in state)
        elif held:
            chosen = choose.choice(list(held))
            if what == "prefetch":
                getattr(store, "prefetch", lambda step: None)(chosen)
            elif what == "load":
                assert all(torch.equal(x, y) for x, y in zip(store.load(chosen), held[chosen], strict=True))
            else:
                store.drop(chosen)
                del held[chosen]
    for step in list(held):
        assert all(torch.equal(x, y) for x, y in zip(store.load(step), held[step], strict=True))
        store.drop(step)
    with pytest.raises(KeyError):
        store.load(0)
    store.release()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"the state at step 7 has shape \(3,\) .*, the first one \(50, 3\)"):
        store.save(7, (numbers(3), *like[1:]))


@dataclass(frozen=True)
class Demoting:
    """Moves a state from a slot of the device to a file, and uses that slot at once for another."""

    def forward(self, steps: int | None) -> Iterator[Action]:
        assert steps is not None
        yield from (Save(0, 1), Advance(0, 1), Save(1), Advance(1, 2))
        for step in range(1, steps - 2):
            yield from (Load(step), Save(step, 1), Drop(step), Advance(step, step + 1), Save(step + 1))
        yield from (Advance(steps - 2, steps - 1), Record(steps - 1, steps))

    def backward(self, steps: int, saved: Saved) -> Iterator[Action]:
        return StoreNothing().backward(steps, saved)

    def price(self, steps: int) -> Report:
        return verify(self, steps)


@pytest.mark.parametrize("below", [Files(**FREE), Host(**FREE)], ids=["file", "host"])
def test_a_slot_is_not_used_again_while_it_is_copied(below: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: Any) -> int:
        time.sleep(0.01)
        return write(*arguments)

    def copied(*arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.01)
        copy(*arguments)

    write, copy = os.pwrite, adjoint.stores.copy
    monkeypatch.setattr(os, "pwrite", slowly)
    monkeypatch.setattr(adjoint.stores, "copy", copied)
    how = {"method": "rk4", "dt": 0.1}
    expected = gradients(network(), slots="all", **how)
    assert_same_bits(gradients(network(), schedule=Demoting(), tiers=[Device(), below], **how), expected)


# -- bytes


def test_each_tier_takes_the_bytes_that_were_planned(tmp_path: Path) -> None:
    for choice in choices(tmp_path):
        case = network()
        solution = case.solve(**choice, **HOW)
        loss_of(solution.ys).backward()
        plan, stats = solution.plan, solution.stats
        assert plan is not None
        assert stats.plain_runs == plan.report.plain_runs and stats.recorded_runs == 50
        kept = {tier: report.peak_slots * plan.tier_states[tier] for tier, report in plan.tiers.items()}
        compressed = [isinstance(getattr(tier, "codec", None), Zfp) for tier in choice.get("tiers", [Device()])]
        for tier, size in stats.tier_bytes.items():
            assert size == kept.get(tier, 0) or (compressed[tier] and size < kept[tier] + 1024), choice
        assert all(plan.tier_bytes[tier] == size for tier, size in kept.items() if tier)


@pytest.mark.parametrize("slots", [(3, 0), (1, 4), (0, 6)], ids=str)
def test_what_a_gradient_holds_stays_below_what_was_planned(slots: tuple[int, int], tmp_path: Path) -> None:
    device, files = slots
    case = network(size=300)
    with Meter() as meter:
        tiers = [Device(slots=device), Files(slots=files, folder=tmp_path, **FREE)]
        solution = case.solve(tiers=tiers, **HOW)
        gc.collect()
        before = meter.restart()
        loss = loss_of(solution.ys)
        loss.backward()
        assert solution.plan is not None
        assert meter.peak - before <= solution.plan.bytes
    assert solution.stats.tier_bytes.get(1, 0) == solution.plan.tier_bytes.get(1, 0)


def test_a_budget_by_tiers_is_kept(tmp_path: Path) -> None:
    case = network(size=200)
    solution = case.solve(tiers=[Device("3 MB"), Files("30 KB", folder=tmp_path, **FREE)], **HOW)
    plan = solution.plan
    assert plan is not None
    assert plan.bytes <= 3_000_000 and plan.tier_bytes.get(1, 0) <= 30_000
    assert "seconds" not in plan.explain() and plan.seconds > 0


# -- fewer digits


@pytest.mark.parametrize("where", ["device", "host", "file"])
def test_a_lower_precision_takes_fewer_bytes_and_shows_in_the_gradient(
    where: str, expected: list[Tensor | None], tmp_path: Path
) -> None:
    sizes, errors = [], []
    for codec in (None, Cast("float32"), Cast("bfloat16")):
        tiers: list[Any] = {
            "device": [Device(slots=4, codec=codec)],
            "host": [Device(slots=0), Host(slots=4, codec=codec, **FREE)],
            "file": [Device(slots=0), Files(slots=4, folder=tmp_path, codec=codec, **FREE)],
        }[where]
        case = network()
        solution = case.solve(tiers=tiers, **HOW)
        found = torch.autograd.grad(loss_of(solution.ys), case.wanted)
        assert solution.plan is not None
        sizes.append(solution.stats.tier_bytes[len(tiers) - 1])
        assert sizes[-1] == solution.plan.tiers[len(tiers) - 1].peak_slots * solution.plan.tier_states[-1]
        errors.append(max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)))  # type: ignore[operator, union-attr]
    assert sizes[0] == 2 * sizes[1] == 4 * sizes[2]
    assert errors[0] == 0 < errors[1] < 1e-6 < errors[2] < 1e-1


def test_complex_numbers_are_kept_in_a_lower_precision_too(tmp_path: Path) -> None:
    case, how = PROBLEMS["oscillator"](CPU), {"method": "rk4", "dt": 0.1}
    exact = gradients(case, slots="all", **how)
    for tiers in ([Device(slots=2, codec=Cast("float32"))], [Device(slots=0), Files(codec=Cast("float32"), **FREE)]):
        found = gradients(case, tiers=tiers, **how)
        errors = [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)]  # type: ignore[operator]
        assert 0 < max(errors) < 1e-5


def test_a_state_too_large_for_a_lower_precision_is_refused() -> None:
    growth = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.full((3,), 5e4, dtype=torch.float64)
    with pytest.raises(OverflowError, match=r"the state at step \d+ holds .*, too large for torch.float16; keep it in"):
        tiers = [Device(slots=9, codec=Cast("float16"))]
        loss_of(adjoint.solve(lambda t, y: growth * y, y0, [0.0, 2.0], tiers=tiers, **HOW).ys).backward()


# -- faults


def altered(folder: Path) -> None:
    (file,) = folder.iterdir()
    file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))


def cut_off(folder: Path) -> None:
    (file,) = folder.iterdir()
    file.write_bytes(b"")


@pytest.mark.parametrize("spoil", [altered, cut_off])
@pytest.mark.parametrize("codec", [None, Zfp()], ids=str)
def test_a_file_that_was_spoilt_gives_an_error_and_no_gradient(
    spoil: Callable[[Path], None], codec: Any, tmp_path: Path
) -> None:
    case = network()
    tiers = [Device(slots=0), Files(slots=3, folder=tmp_path, codec=codec, **FREE)]
    solution = case.solve(tiers=tiers, **HOW)
    for store in solution.stats.stores.values():
        getattr(store, "settle", lambda: None)()  # writes go on behind the computation
    spoil(tmp_path)
    with pytest.raises(StoreError, match="was altered|was cut off"):
        loss_of(solution.ys).backward()
    assert all(x.grad is None for x in case.wanted)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_named_before_a_step_is_taken(tmp_path: Path) -> None:
    case = network()
    with pytest.raises(StoreError, match="there is no folder .*nowhere to keep states in; make it, or give another"):
        case.solve(tiers=[Device(slots=0), Files(slots=3, folder=tmp_path / "nowhere", **FREE)], **HOW)
    with pytest.raises(ValueError, match=r"tiers=.* hold no state of \d+ B; give one more room"):
        case.solve(tiers=[Device(slots=0), Files("900 B", folder=tmp_path, **FREE)], **HOW)


def test_nothing_is_left_after_an_exception_or_a_loss_that_is_not_used(tmp_path: Path) -> None:
    calls = 0
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt
        return -rate * y

    y0 = torch.ones(4, dtype=torch.float64)
    tiers = [Device(slots=0), Files(slots=3, folder=tmp_path, **FREE)]
    for call in (40, 120, 300):
        calls, limit = 0, call
        with pytest.raises(KeyboardInterrupt):
            adjoint.solve(f, y0, [0.0, 1.0], tiers=tiers, **HOW).ys.sum().backward()
        gc.collect()
        assert list(tmp_path.iterdir()) == []
    limit = -1
    solution = adjoint.solve(f, y0, [0.0, 1.0], tiers=tiers, **HOW)
    assert len(list(tmp_path.iterdir())) == 1
    del solution
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_gradients_in_several_threads_do_not_disturb_each_other(method: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": method} | ({"dt": 0.01} if method == "rk4" else {"rtol": 1e-8})
    sizes, found, gate = (30, 37, 44), {}, threading.Barrier(3)
    expected = {size: gradients(network(size), slots="all", **how) for size in sizes}

    def work(size: int) -> None:
        tiers = [Device(slots=1), Host(slots=2, **FREE), Files(slots=3, folder=tmp_path, **FREE)]
        torch.set_num_threads(1)  # each thread has a number of its own, and other numbers give other bits
        gate.wait()
        found[size] = [gradients(network(size), tiers=tiers, **how) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for size in sizes:
        for one in found[size]:
            assert_same_bits(one, expected[size])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "error", "sentence"),
    [
        ({"tiers": [Device(slots=2)], "slots": 3}, ValueError, "were both given; one of them decides"),
        ({"tiers": [Device(slots=2)], "budget": 3}, ValueError, "were both given; one of them decides"),
        ({"tiers": []}, TypeError, r"tiers=\[\] must be a series of memories"),
        ({"tiers": Device()}, TypeError, "must be a series of memories"),
        ({"tiers": [Device(), 3]}, TypeError, r"tiers\[1\]=3 is no kind of memory; give a Device, Host or Files"),
        ({"tiers": [Files()]}, ValueError, r"tiers\[0\]=Files.*the first tier, and it alone, is the Device"),
        ({"tiers": [Device(), Device()]}, ValueError, r"tiers\[1\]=Device.*the first tier, and it alone"),
        ({"tiers": [Device("1 KB")]}, ValueError, r"tiers\[0\]=Device.*cannot hold one tape .*; give at least"),
        ({"schedule": Binomial(3), "slots": 3}, ValueError, "says itself what is kept; leave slots out"),
        ({"schedule": 3}, TypeError, "schedule=3 is no schedule; give one such as"),
        ({"schedule": Multistage(1, 3)}, ValueError, r"keeps states in tier 1, and tiers= names 1; name one for each"),
        ({"tiers": [Device()], "gradient": "backprop"}, ValueError, "tiers= belongs to gradient='discrete'"),
        ({"schedule": Binomial(3), "gradient": "backsolve"}, ValueError, "schedule= belongs to gradient='discrete'"),
        ({"journal": "x", "gradient": "backprop"}, ValueError, "journal= belongs to gradient='discrete'"),
    ],
)
def test_a_wrong_wish_is_named_with_a_way_out(how: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        network().solve(**how, **HOW)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Device("1 GiB", slots=3), r"Device\(bytes='1 GiB', slots=3\): one of them decides"),
        (lambda: Host("much"), "bytes='much' is not a size"),
        (lambda: Files(slots=-1), "slots=-1 is too small; give at least 0"),
        (lambda: Files(read=float("inf")), r"Files\(read=inf\) is no time; .* and finite"),
        (lambda: Files(write=-1.0), r"Files\(write=-1.0\) is no time; give seconds for one state, 0 or more"),
    ],
)
def test_a_wrong_tier_is_named_with_a_way_out(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_states_without_numbers_are_not_written_to_files() -> None:
    rate = torch.zeros((), device="meta", requires_grad=True)
    y0 = torch.zeros(3, device="meta")
    with pytest.raises(ValueError, match="meta device and hold no numbers"):
        adjoint.solve(lambda t, y: rate * y, y0, [0.0, 1.0], tiers=[Device(slots=0), Files(slots=2, **FREE)], **HOW)
