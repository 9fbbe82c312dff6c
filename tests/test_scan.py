"""``scan`` is a loop with another memory: same values, same gradients, for any tree of carries, inputs and outputs."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, assert_same_bits, leaf, loss_of, numbers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adjoint import UntrackedTensorError, check, scan

LENGTH = 7
CPU = torch.device("cpu")
SLOTS = (1, 2, 3, 5, "all", None)
slots_matter = pytest.mark.parametrize("slots", SLOTS)

Recurrence = tuple[Callable[..., Any], Any, Any, list[Tensor]]
"""A step, its first carry, its inputs, and what to differentiate with respect to."""

RECURRENCES: dict[str, Callable[[torch.device], Recurrence]] = {}


def recurrence(make: Callable[[torch.device], Recurrence]) -> Callable[[torch.device], Recurrence]:
    RECURRENCES[make.__name__] = make
    return make


def parts(on: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A parameter, a carry and inputs."""
    return leaf(3, seed=1, on=on), leaf(3, seed=2, on=on), leaf(LENGTH, 3, seed=3, on=on)


@recurrence
def plain(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (torch.tanh(c * p + x), c * x), c, x, [p, c, x]


@recurrence
def without_outputs(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (torch.tanh(c * p + x), None), c, x, [p, c, x]


@recurrence
def new_carry_as_output(on: torch.device) -> Recurrence:
    p, c, x = parts(on)

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(c * p + x)
        return new, new

    return step, c, x, [p, c, x]


@recurrence
def old_carry_as_output(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (torch.tanh(c * p + x), c), c, x, [p, c, x]


@recurrence
def input_as_output(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (torch.tanh(c * p + x), x), c, x, [p, c, x]


@recurrence
def parameter_as_output(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (torch.tanh(c * p + x), (p, p[:1])), c, x, [p, c, x]


@recurrence
def constant_as_output(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (torch.tanh(c * p + x), torch.ones(2, device=on)), c, x, [p, c, x]


@recurrence
def carry_unchanged(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (c, c * p + x), c, x, [p, c, x]


@recurrence
def carry_replaced_by_the_input(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (x, c * p + x), c, x, [p, c, x]


@recurrence
def carry_replaced_by_a_parameter(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (p, c * p + x), c, x, [p, c, x]


@recurrence
def carry_permuted(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    d = leaf(3, seed=4, on=on)
    return lambda c, x: ((c[1], c[0]), c[0] * p + x), (c, d), x, [p, c, d, x]


@recurrence
def carry_rotated_through_a_function(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    d, e = leaf(3, seed=4, on=on), leaf(3, seed=5, on=on)
    return lambda c, x: ((c[1], c[2], torch.sin(c[0] * p + x)), c[1]), (c, d, e), x, [p, c, d, e, x]


@recurrence
def the_same_tensor_twice_in_the_carry(on: torch.device) -> Recurrence:
    p, c, x = parts(on)

    def step(c: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        new = torch.tanh(c[0] * c[1] * p + x)
        return (new, new), c[0]

    return step, (c, c), x, [p, c, x]


@recurrence
def trees_everywhere(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    d, y = leaf(2, 2, seed=4, on=on), leaf(LENGTH, 1, seed=5, on=on)

    def step(c: dict[str, Any], x: tuple[Tensor, list[Tensor]]) -> tuple[dict[str, Any], dict[str, Any]]:
        a, b = c["a"], c["b"][0]
        return {"a": torch.tanh(a * p + x[0]), "b": [b * x[1][0] + a.sum()]}, {"out": (b, [a]), "more": x[0].sum()}

    return step, {"a": c, "b": [d]}, (x, [y]), [p, c, d, x, y]


@recurrence
def integers_in_the_carry(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    count, flags = torch.tensor(0, device=on), torch.tensor([True, False, True], device=on)

    def step(c: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        new = torch.where(c[2], c[0] * p + x * c[1], c[0])
        return (torch.tanh(new), c[1] + 1, c[0] > 0), (new, c[1], c[2])

    return step, (c, count, flags), x, [p, c, x]


@recurrence
def tokens(on: torch.device) -> Recurrence:
    """Integer inputs that select rows of a table."""
    p, c, _ = parts(on)
    table = leaf(4, 3, seed=6, on=on)
    return lambda c, i: (torch.tanh(c * p + table[i]), c), c, torch.arange(LENGTH, device=on) % 4, [p, c, table]


@recurrence
def inputs_without_gradient(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    y = numbers(LENGTH, 3, seed=7).to(on)
    return lambda c, x: (torch.tanh(c * p + x["a"]), x["b"] * c), c, {"a": x, "b": y}, [p, c, x]


@recurrence
def strided_inputs(on: torch.device) -> Recurrence:
    p, c, _ = parts(on)
    base = leaf(3, LENGTH, seed=3, on=on)
    return lambda c, x: (torch.tanh(c * p + x), c), c, base.T, [p, c, base]


@recurrence
def expanded_inputs(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    row = leaf(3, seed=8, on=on)
    return lambda c, x: (torch.tanh(c * p + x), c), c, row.expand(LENGTH, 3), [p, c, row]


@recurrence
def scalars(on: torch.device) -> Recurrence:
    p, c, x = leaf(seed=1, on=on), leaf(seed=2, on=on), leaf(LENGTH, seed=3, on=on)
    return lambda c, x: (torch.tanh(c * p + x), c * x), c, x, [p, c, x]


@recurrence
def the_same_tensor_everywhere(on: torch.device) -> Recurrence:
    """Carry, input and capture."""
    x = leaf(LENGTH, 3, seed=3, on=on)
    return lambda c, i: (torch.tanh(c * x[2] + i), c * x.sum()), x[0], x, [x]


@recurrence
def captured_beside_what_was_made_from_it(on: torch.device) -> Recurrence:
    log_p, c, x = parts(on)
    p = log_p.exp()
    return lambda c, x: (torch.tanh(c * p + x * log_p), c), c, x, [log_p, c, x]


@recurrence
def views_as_new_carry(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: (c.flip(0).view(3), c * p + x), c, x, [p, c, x]


@recurrence
def strided_new_carry(on: torch.device) -> Recurrence:
    p, c, x = leaf(3, 3, seed=1, on=on), leaf(3, 3, seed=2, on=on), leaf(LENGTH, 3, seed=3, on=on)
    return lambda c, x: (torch.tanh(c @ p + x).T, c.sum(0)), c, x, [p, c, x]


@recurrence
def expanded_new_carry(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    return lambda c, x: ((c * p + x).mean().expand(3), c), c, x, [p, c, x]


@recurrence
def cut_and_not(on: torch.device) -> Recurrence:
    p, c, x = parts(on)
    d = leaf(3, seed=4, on=on)
    return lambda c, x: ((c[0].detach() * p + x, torch.sin(c[1])), c[0]), (c, d), x, [p, c, d, x]


@recurrence
def complex_carry(on: torch.device) -> Recurrence:
    p, _, x = parts(on)
    c = leaf(3, seed=2, on=on, dtype=torch.complex128)
    return lambda c, x: (c * torch.exp(1j * p) * 0.9 + x, c.abs()), c, x, [p, c, x]


@recurrence
def single_precision(on: torch.device) -> Recurrence:
    p, c, x = (leaf(*s, seed=i, dtype=torch.float32, on=on) for i, s in enumerate(((3,), (3,), (LENGTH, 3))))
    return lambda c, x: (torch.tanh(c * p + x), c), c, x, [p, c, x]


@recurrence
def cell(on: torch.device) -> Recurrence:
    torch.manual_seed(0)
    gru, c, x = nn.GRUCell(3, 4).double().to(on), leaf(2, 4, seed=2, on=on), leaf(LENGTH, 2, 3, seed=3, on=on)

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new = gru(x, c)
        return new, new[:, :2]

    return step, c, x, [*gru.parameters(), c, x]


@recurrence
def other_kernels(on: torch.device) -> Recurrence:
    """A product for which torch takes another kernel when something requires grad."""
    w, c, x = leaf(6, 6, seed=1, on=on, scale=0.3), leaf(3, 6, 2, seed=2, on=on), leaf(LENGTH, 2, seed=3, on=on)
    return lambda c, x: (torch.tanh(w @ c + x), c.sum(0)), c, x, [w, c, x]


every_recurrence = pytest.mark.parametrize("name", RECURRENCES)


def run(recurrence: Recurrence, **how: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """All results, and the gradients of a loss over all of them."""
    step, carry, inputs, wanted = recurrence
    return differentiated(scan(step, carry, inputs, **how), wanted)


def differentiated(results: Any, wanted: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
    found = torch.autograd.grad(loss_of([x for x in leaves if x.requires_grad]), wanted, allow_unused=True)
    return [x.detach() for x in leaves], list(found)


def loop(recurrence: Recurrence) -> tuple[list[Tensor], list[Tensor | None]]:
    """What scan stands for."""
    step, carry, inputs, wanted = recurrence
    outputs = []
    for k in range(LENGTH):
        carry, output = step(carry, pytree.tree_map(lambda x: x[k], inputs))  # noqa: B023
        outputs.append(output)
    stacked = None if outputs[0] is None else pytree.tree_map(lambda *column: torch.stack(column), *outputs)
    return differentiated((carry, stacked), wanted)


@every_recurrence
def test_a_scan_is_a_loop(name: str, device: torch.device) -> None:
    values, found = run(RECURRENCES[name](device))
    expected_values, expected = loop(RECURRENCES[name](device))
    assert_close(values, expected_values)
    assert_close(found, expected)


@every_recurrence
def test_backpropagation_through_a_scan_is_a_loop(name: str, device: torch.device) -> None:
    values, found = run(RECURRENCES[name](device), gradient="backprop")
    expected_values, expected = loop(RECURRENCES[name](device))
    assert_close(values, expected_values)
    assert_close(found, expected)


@every_recurrence
def test_a_scan_keeps_its_bits_whatever_is_kept(name: str, device: torch.device) -> None:
    values, found = run(RECURRENCES[name](device), slots="all")
    for slots in SLOTS:
        others = run(RECURRENCES[name](device), slots=slots)
        assert_same_bits(others[0], values)
        assert_same_bits(others[1], found)


@every_recurrence
def test_a_retained_scan_gives_the_same_bits_again(name: str) -> None:
    step, carry, inputs, wanted = RECURRENCES[name](CPU)
    results = scan(step, carry, inputs, slots=2)
    loss = loss_of([x for x in pytree.tree_leaves(results) if isinstance(x, Tensor) and x.requires_grad])
    first = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    assert_same_bits(torch.autograd.grad(loss, wanted, allow_unused=True), first)


def test_a_taylor_test_passes() -> None:
    p, c, x = (v.detach() for v in parts(CPU))

    def loss(p: Tensor, c: Tensor, x: Tensor) -> Tensor:
        return loss_of(scan(lambda c, x: (torch.tanh(c * p + x), c * x), c, x, slots=2))

    assert check.taylor_test(loss, (p, c, x)).slope == pytest.approx(2, abs=0.05)


@slots_matter
def test_only_some_results_may_be_used(slots: int | str | None) -> None:
    for use in (lambda fin, out: fin.sum(), lambda fin, out: out[2].sum(), lambda fin, out: out[LENGTH - 1].sum()):
        step, carry, inputs, wanted = plain(CPU)
        found = torch.autograd.grad(use(*scan(step, carry, inputs, slots=slots)), wanted)
        step, carry, inputs, wanted = plain(CPU)
        outputs = []
        for x in inputs:
            carry, output = step(carry, x)
            outputs.append(output)
        assert_close(found, torch.autograd.grad(use(carry, torch.stack(outputs)), wanted))


def test_arguments_are_passed_on() -> None:
    p, c, x = parts(CPU)
    final, _ = scan(
        lambda c, x, a, b: (torch.tanh(c * a + x * b["k"][0]), None), c, x, args=(p, {"k": [2 * p]}), slots=2
    )
    found = torch.autograd.grad(final.sum(), (p, c, x))
    final, _ = scan(lambda c, x: (torch.tanh(c * p + x * (2 * p)), None), c, x, gradient="backprop")
    assert_close(found, torch.autograd.grad(final.sum(), (p, c, x)))


def test_a_batch_of_cotangents_gives_a_jacobian() -> None:
    p, c, x = parts(CPU)
    final, _ = scan(lambda c, x: (torch.tanh(c * p + x), None), c, x, slots=2)
    unit = torch.eye(3, dtype=torch.float64)
    batched = torch.autograd.grad(final, (p, c, x), unit, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        rows = torch.autograd.grad(final, (p, c, x), unit[i], retain_graph=True)
        assert all(torch.allclose(a[i], b, rtol=1e-12) for a, b in zip(batched, rows, strict=True))


@slots_matter
@pytest.mark.parametrize("length", [1, 2])
def test_short_sequences_work(length: int, slots: int | str | None) -> None:
    p, c, x = parts(CPU)
    final, outputs = scan(lambda c, x: (torch.tanh(c * p + x), c), c, x[:length], slots=slots)
    assert outputs.shape == (length, 3)
    found = torch.autograd.grad(final.sum() + outputs.sum(), (p, c, x))
    assert not found[2][length:].any() and found[2][:length].any()


def test_without_grad_a_scan_keeps_nothing() -> None:
    step, carry, inputs, _ = trees_everywhere(CPU)
    expected = scan(step, carry, inputs)
    with torch.no_grad():
        found = scan(step, carry, inputs)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert not a.requires_grad and torch.equal(a, b)


def test_two_threads_do_not_disturb_each_other() -> None:
    names = ["cell", "trees_everywhere"]
    alone, together = {name: run(RECURRENCES[name](CPU), slots=2)[1] for name in names}, {}
    threads = [
        threading.Thread(target=lambda name=name: together.update({name: run(RECURRENCES[name](CPU), slots=2)[1]}))  # type: ignore[misc]
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert_same_bits(together[name], alone[name])


def test_progress_is_told_once_for_each_step() -> None:
    step, carry, inputs, wanted = plain(CPU)
    told: list[tuple[int, int | None]] = []
    final, _ = scan(step, carry, inputs, slots=1, progress=lambda done, of: told.append((done, of)))
    torch.autograd.grad(final.sum(), wanted)
    assert told == [(k, LENGTH) for k in range(1, LENGTH + 1)]


MEMORY = """
import resource, sys, torch
from adjoint import scan
torch.set_num_threads(1)
length, slots = int(sys.argv[1]), int(sys.argv[2])
p = torch.full((), 0.999).requires_grad_()
c = torch.zeros(1000).requires_grad_()
x = torch.linspace(0, 1, length)[:, None].requires_grad_()
def gradient(n):
    final, outputs = scan(lambda c, x: (c * p + x, c[:1]), c, x[:n], slots=slots)
    return torch.autograd.grad(final.sum() + outputs.sum(), (p, c, x))
gradient(100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = gradient(length)
assert all(g.isfinite().all() for g in found)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def kilobytes(length: int, slots: int) -> int:
    """By how much the high-water mark of a child process rises."""
    command = [sys.executable, "-c", MEMORY, str(length), str(slots)]
    root = str(Path(__file__).parent.parent)
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


@pytest.mark.parametrize("length", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_memory_grows_only_by_inputs_and_outputs(length: int) -> None:
    """Carries of 4 kB: all of them would take 40 MB (or 400); inputs, outputs and their gradients take 16 bytes a step."""
    slots = 450
    assert kilobytes(length, slots) < 0.1 * 4 * length + 4 * slots + 2000


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"carry": 1.0}, TypeError, "carry holds 1.0.*every leaf must be a torch tensor"),
        ({"carry": ()}, TypeError, "carry=.*holds no tensor"),
        ({"inputs": ()}, TypeError, "inputs=.*holds no tensor"),
        ({"inputs": [1, 2]}, TypeError, "inputs holds 1 .int.*torch tensor"),
        ({"carry": torch.eye(3).to_sparse()}, TypeError, "carry has the layout torch.sparse_coo"),
        ({"inputs": torch.ones(())}, ValueError, "0-dim tensor.*leading dimension"),
        ({"inputs": torch.ones(0, 3)}, ValueError, "length 0; give at least one step"),
        ({"inputs": (torch.ones(3), torch.ones(4))}, ValueError, r"lengths \[3, 4\].*same number of steps"),
        ({"args": [1]}, TypeError, r"args=\[1\] must be a tuple.*args=\(x,\)"),
        ({"slots": 0}, ValueError, "slots=0 .*at least 1"),
        ({"slots": -2}, ValueError, "slots=-2 .*at least"),
        ({"slots": 2.5}, TypeError, "slots=2.5 is not an integer"),
        ({"slots": "some"}, ValueError, "slots='some' is unknown; give a number of at least 1, or 'all'"),
        ({"slots": 2, "budget": 100}, ValueError, "slots=2 and budget=100 were both given"),
        ({"budget": "lots"}, ValueError, "budget='lots' is not a size.*512 MiB"),
        ({"budget": 10}, ValueError, "budget=10 cannot reverse.*give at least"),
        ({"gradient": "discreet"}, ValueError, "gradient='discreet' is unknown; did you mean 'discrete'"),
        ({"gradient": "backsolve"}, TypeError, "gradient='backsolve' integrates an ODE; step is not one"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_call_gets_a_sentence(change: dict[str, Any], error: type[Exception], match: str) -> None:
    p, c, x = parts(CPU)
    call: dict[str, Any] = {"carry": c, "inputs": x} | change
    with pytest.raises(error, match=match):
        scan(lambda c, x, *args: (c * p, c), **call)


STEPS: dict[str, tuple[Callable[[Any, Any], Any], Any, str]] = {
    "no pair": (lambda c, x: c, TypeError, "step returned Tensor; it must return a pair"),
    "a list": (lambda c, x: [c, x], TypeError, "step returned list; it must return a pair"),
    "another structure": (lambda c, x: ((c, c), x), TypeError, "carry that step returned has the structure"),
    "another shape": (lambda c, x: (c[:2], x), ValueError, r"step 0 returned a carry of shape \(2,\)"),
    "another dtype": (lambda c, x: (c.float(), x), ValueError, "step 0 returned a carry.*float32.*float64"),
    "another shape later": (
        lambda c, x: (c if float(x.detach()[0]) < 3 else c[:2], x),
        ValueError,
        r"step 3 returned a carry of shape \(2,\)",
    ),
    "a number as output": (lambda c, x: (c, 1.0), TypeError, "output of step holds 1.0"),
    "another output later": (
        lambda c, x: (c, x if float(x.detach()[0]) < 3 else (x, x)),
        TypeError,
        "output of step has the structure",
    ),
    "another output shape later": (
        lambda c, x: (c, x if float(x.detach()[0]) < 3 else x[:1]),
        (ValueError, RuntimeError),
        r"output 3 has shape \(1,\).*earlier ones \(3,\)|stack expects",
    ),
    "no output later": (
        lambda c, x: (c, x if float(x.detach()[0]) < 3 else None),
        TypeError,
        "step 3 returned no output; every step must, or none",
    ),
    "no output at first": (
        lambda c, x: (c, None if float(x.detach()[0]) < 3 else x),
        TypeError,
        "step 3 returned an output; every step must, or none",
    ),
    "random numbers": (lambda c, x: (torch.dropout(c, 0.5, True), x), RuntimeError, "step draws random numbers"),
    "writing to the carry": (lambda c, x: (c.add_(1), x), RuntimeError, "step changed its carry|a leaf Variable"),
    "writing to the input": (
        lambda c, x: (c + x.add_(1), x),
        RuntimeError,
        "step changed its carry or its input|a leaf",
    ),
}


WRONG = [(name, gradient) for name in STEPS for gradient in ("discrete", "backprop")]
WRONG.remove(("random numbers", "backprop"))  # torch's own graph runs each step once


@pytest.mark.parametrize(("name", "gradient"), WRONG)
@pytest.mark.parametrize("slots", [1, "all"])
def test_a_wrong_step_gets_a_sentence(name: str, gradient: str, slots: int | str) -> None:
    step, error, match = STEPS[name]
    p, c, _ = parts(CPU)
    x = torch.arange(LENGTH, dtype=torch.float64)[:, None].expand(LENGTH, 3)
    with pytest.raises(error, match=match):
        scan(
            lambda c, x: step(c * p if "writing" not in name else c, x),
            c * 1,
            x.clone(),
            slots=slots,
            gradient=gradient,
        )


@pytest.mark.parametrize("slots", [1, "all"])
def test_an_input_that_is_kept_for_later_steps_is_refused(slots: int | str) -> None:
    """Its gradient would be lost: every step is handed a slice without a past."""
    p, c, x = parts(CPU)
    kept: dict[str, Tensor] = {}
    with pytest.raises(UntrackedTensorError, match="step keeps a tensor.*gradient would be lost"):
        scan(lambda c, x: (torch.tanh(c * p + kept.setdefault("first", torch.sin(x))), None), c, x, slots=slots)


def test_an_integer_in_the_carry_that_is_written_to_late_is_refused() -> None:
    """Nothing but the version of an integer tells: it is in no graph."""
    p, c, x = parts(CPU)

    def step(c: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], None]:
        return (torch.tanh(c[0] * p + x), c[1].add_(1) if c[1] > 3 else c[1] + 1), None

    for slots in SLOTS:
        with pytest.raises(RuntimeError, match="step changed its carry"):
            scan(step, (c, torch.tensor(0)), x, slots=slots)


@pytest.mark.parametrize("what", ["inputs", "tokens", "carry"])
@pytest.mark.parametrize("slots", ["all", 2])
def test_changing_what_was_given_before_the_reverse_sweep_is_noticed(what: str, slots: int | str) -> None:
    p, c = leaf(3, seed=1, on=CPU), numbers(3, seed=2)
    x, i = numbers(LENGTH, 3, seed=3), torch.arange(LENGTH) % 3
    final, _ = scan(lambda c, x: (torch.tanh(c * p + x[0] * x[1]), None), c, (x, i), slots=slots)
    {"inputs": x, "tokens": i, "carry": c}[what].add_(1)
    with pytest.raises(RuntimeError, match="changed in place between the forward and the reverse sweep"):
        torch.autograd.grad(final.sum(), p)


@pytest.mark.parametrize("slots", ["all", 2])
def test_scan_under_torch_func_equals_backpropagation(slots: int | str) -> None:
    c, x, p = numbers(3, seed=2), numbers(LENGTH, 3, seed=3), leaf(3, seed=1, on=CPU)

    def loss(p: Tensor, **how: Any) -> Tensor:
        return scan(lambda c, x: (torch.tanh(c * p + x), None), c, x, **how)[0].sum()

    (expected,) = torch.autograd.grad(loss(p, gradient="backprop"), p)
    assert_close([torch.func.grad(lambda p: loss(p, slots=slots))(p.detach())], [expected])


def test_third_derivatives_are_refused_beside_another_path() -> None:
    p, c, x = parts(CPU)
    final, _ = scan(lambda c, x: (torch.tanh(c * p + x), None), c, x)
    (first,) = torch.autograd.grad(final.sum() + (p**3).sum(), p, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(second.sum(), p)
