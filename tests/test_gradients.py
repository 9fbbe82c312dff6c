"""One gradient, however it is made: laws over every method, every problem and every plan."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_cases import (
    ADAPTIVE,
    FIXED,
    MEMORY,
    PROBLEMS,
    TIMES,
    Case,
    assert_close,
    assert_same_bits,
    gradients,
    leaf,
    loss_of,
    numbers,
    steps_of,
    times,
)
from revolve_cases import members
from torch import Tensor, nn

import adjoint.discrete
import adjoint.probe
from adjoint import CONTROLLERS, GRADIENTS, METHODS, Backsolve, Controller, Discrete, check, solve
from revolve import Mixed, Online, Schedule, Stages

CPU = torch.device("cpu")
every_method = pytest.mark.parametrize("method", METHODS)
every_problem = pytest.mark.parametrize("name", PROBLEMS)
some_methods = pytest.mark.parametrize("method", ["rk4", "tsit5"])


@every_problem
@every_method
def test_the_discrete_gradient_is_that_of_backpropagation(method: str, name: str, device: torch.device) -> None:
    how = steps_of(method)
    found, expected = (gradients(PROBLEMS[name](device), gradient=g, **how) for g in ("discrete", "backprop"))
    assert_close(found, expected)


@every_problem
@every_method
def test_the_gradient_keeps_its_bits_whatever_is_kept(method: str, name: str, device: torch.device) -> None:
    case, how = PROBLEMS[name](device), steps_of(method)
    first = gradients(case, slots="all", **how)
    for slots in (1, 3):
        assert_same_bits(gradients(case, slots=slots, **how), first)


@every_problem
@some_methods
def test_the_gradient_keeps_its_bits_for_more_slots_budgets_and_defaults(method: str, name: str) -> None:
    case, how = PROBLEMS[name](CPU), steps_of(method)
    first = gradients(case, **MEMORY[0], **how)
    for memory in MEMORY[1:]:
        assert_same_bits(gradients(case, **memory, **how), first)


def followed() -> list[Schedule]:
    """Schedules that a solve by the midpoint rule can follow: its last stage is not the end of the step."""
    return [schedule for schedule in members() if not (isinstance(schedule, Stages) and schedule.last_is_solution)]


@pytest.mark.parametrize("schedule", followed(), ids=str)
def test_the_gradient_keeps_its_bits_under_every_schedule(schedule: Schedule) -> None:
    case, how = PROBLEMS["scalar"](CPU), {"method": "midpoint", "dt": 0.1}
    expected = gradients(case, slots="all", **how)
    one = isinstance(schedule, Mixed | Stages)  # these keep all in the first tier
    tiers = [adjoint.Device()] if one else [adjoint.Device(), adjoint.Host(), adjoint.Files(), adjoint.Host()]
    assert_same_bits(gradients(case, schedule=schedule, tiers=tiers, **how), expected)


@some_methods
def test_the_gradient_keeps_its_bits_between_the_smallest_budget_and_the_largest(method: str) -> None:
    case, how = PROBLEMS["network"](CPU), steps_of(method) | ({"dt": 0.05} if method in FIXED else {"rtol": 1e-5})
    plans = [case.solve(slots=slots, **how).plan for slots in (1, 2, 4, "all")]
    expected = gradients(case, slots="all", **how)
    budgets = [plan.bytes for plan in plans if plan is not None]
    assert len(budgets) == 4
    for budget in budgets:
        plan = case.solve(budget=budget, **how).plan
        assert plan is not None and plan.bytes <= budget
        assert_same_bits(gradients(case, budget=budget, **how), expected)


@every_problem
@some_methods
def test_the_value_keeps_its_bits_whatever_is_kept_and_without_grad(method: str, name: str) -> None:
    case, how = PROBLEMS[name](CPU), steps_of(method)
    values = [case.solve(slots=slots, **how).ys for slots in ("all", 1, 3)]
    leaves = [torch.utils._pytree.tree_leaves(ys) for ys in values]
    for other in leaves[1:]:
        assert_same_bits(other, leaves[0])


@every_method
def test_remainders_fall_with_the_square_of_the_distance(method: str) -> None:
    how = steps_of(method) | ({"rtol": 1e-5} if METHODS[method].adaptive else {})

    def loss(p: Tensor, y0: Tensor, t: Tensor) -> Tensor:
        return loss_of(solve(lambda t, y: torch.sin(p * y) - t * y, y0, t, **how).ys)

    found = check.taylor_test(loss, (numbers(3, seed=1), numbers(3, seed=2), torch.tensor(TIMES, dtype=torch.float64)))
    assert found.slope == pytest.approx(2, abs=0.05)


@every_method
@pytest.mark.parametrize("slots", ["all", 1, 3, None])
def test_a_retained_graph_gives_the_same_bits_again(method: str, slots: int | str | None) -> None:
    case = PROBLEMS["network"](CPU)
    loss = loss_of(case.solve(slots=slots, **steps_of(method)).ys)
    first = torch.autograd.grad(loss, case.wanted, retain_graph=True)
    second = torch.autograd.grad(loss, case.wanted, retain_graph=True)
    third = torch.autograd.grad(loss, case.wanted)
    assert_same_bits(second, first)
    assert_same_bits(third, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, case.wanted)


@some_methods
def test_two_losses_over_one_solution_add_up(method: str) -> None:
    case = PROBLEMS["vector"](CPU)
    ys = case.solve(slots=2, **steps_of(method)).ys
    one = torch.autograd.grad(ys[1].sum(), case.wanted, retain_graph=True)
    other = torch.autograd.grad((ys[2] ** 2).sum(), case.wanted, retain_graph=True)
    both = torch.autograd.grad(ys[1].sum() + (ys[2] ** 2).sum(), case.wanted)
    assert_close([a + b for a, b in zip(one, other, strict=True)], both)


CONTROLS: dict[str, dict[str, Any]] = {
    **{f"controller {name}": {"controller": name} for name in CONTROLLERS},
    "short steps": {"controller": Controller(max_step=0.2)},
    "another norm": {"norm": lambda y: y.abs().max()},
    "a seminorm": {"norm": lambda y: y[:1].abs().max()},
    "a jump": {"jumps": (0.4,)},
    "jumps at ends and outside": {"jumps": (-1.0, 0.0, 0.5, 0.9, 7.0)},
}


@every_method
@pytest.mark.parametrize("name", CONTROLS)
def test_the_laws_hold_however_steps_are_chosen(name: str, method: str) -> None:
    how = CONTROLS[name] | steps_of(method)

    def make() -> Case:
        p, y0, t = leaf(3, seed=1, on=CPU), leaf(3, seed=2, on=CPU), times(CPU)
        return Case(lambda t, y: p * y if t < 0.4 else torch.sin(p * y) * t, y0, t, [p, y0, t])

    first = gradients(make(), slots="all", **how)
    assert_close(first, gradients(make(), gradient="backprop", **how))
    assert_same_bits(gradients(make(), slots=2, **how), first)


def other_path(case: Case) -> Tensor:
    return sum(((x.abs() ** 3).sum() for x in case.wanted), start=torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("gradient", ["backsolve", "tangent"])
@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_second_derivatives_are_refused_also_beside_another_path(gradient: str, linear: bool, beside: bool) -> None:
    case = PROBLEMS["vector"](CPU)
    ys = case.solve(gradient=gradient, **steps_of("rk4")).ys
    loss = (ys.sum() if linear else (ys**2).sum()) + (other_path(case) if beside else 0)
    p, y0, _ = case.wanted
    (first,) = torch.autograd.grad(loss, p, create_graph=True)
    for wanted in (p, y0):
        with pytest.raises(RuntimeError, match="cannot be differentiated again.*gradient='discrete' or 'backprop'"):
            torch.autograd.grad((first**2).sum(), wanted, allow_unused=True, retain_graph=True)


@every_method
def test_backpropagation_gives_second_derivatives(method: str) -> None:
    how = steps_of(method) | ({"rtol": 1e-5} if METHODS[method].adaptive else {})
    y0, p = numbers(2, seed=2), numbers(2, seed=1)

    def slope(p: Tensor) -> Tensor:
        p = p.detach().requires_grad_()
        loss = loss_of(solve(lambda t, y: torch.sin(p * y), y0, TIMES, gradient="backprop", **how).ys)
        (first,) = torch.autograd.grad(loss, p, create_graph=True)
        return first

    with check.frozen_steps() as replay:
        first = solve(lambda t, y: torch.sin(p * y), y0, TIMES, **how) and None
        replay.rewind()
        q = p.clone().requires_grad_()
        loss = loss_of(solve(lambda t, y: torch.sin(q * y), y0, TIMES, gradient="backprop", **how).ys)
        (first,) = torch.autograd.grad(loss, q, create_graph=True)
        (second,) = torch.autograd.grad(first[0], q)
        h = 1e-5
        moved = []
        for sign in (1, -1):
            replay.rewind()
            moved.append(slope(p + sign * h * torch.tensor([1.0, 0.0], dtype=torch.float64)))
    difference = (moved[0] - moved[1]) / (2 * h)
    assert torch.allclose(second, difference, rtol=1e-7, atol=1e-8)  # h^2 and eps/h, both 1e-10 or so


@some_methods
@pytest.mark.parametrize("slots", ["all", 2])
def test_a_loss_may_use_one_output_of_one_leaf(method: str, slots: int | str) -> None:
    for index in range(len(TIMES)):
        found, expected = [], []
        for gradient, result in (("discrete", found), ("backprop", expected)):
            case = PROBLEMS["pair"](CPU)
            ys = case.solve(slots=slots, gradient=gradient, **steps_of(method)).ys
            result += torch.autograd.grad(ys[1][index].sum(), case.wanted, allow_unused=True)
        assert_close(found, expected)


@some_methods
def test_a_loss_may_depend_on_parameters_and_times_directly_too(method: str) -> None:
    results = []
    for gradient in ("discrete", "backprop"):
        case = PROBLEMS["scalar"](CPU)
        solution = case.solve(gradient=gradient, slots=2, **steps_of(method))
        loss = loss_of(solution.ys) * case.wanted[0] + solution.ts[1] * solution.ys[2] + case.wanted[1] ** 2
        results.append(torch.autograd.grad(loss, case.wanted))
    assert_close(*results)


@some_methods
@pytest.mark.parametrize("slots", ["all", 1, None])
def test_what_is_captured_and_not_used_has_no_gradient(method: str, slots: int | str | None) -> None:
    used, unused, y0 = leaf(3, seed=1, on=CPU), leaf(3, seed=2, on=CPU), numbers(3, seed=3)
    held = [used, unused]
    ys = solve(lambda t, y: held[0] * y, y0, TIMES, slots=slots, **steps_of(method)).ys
    gradient, nothing = torch.autograd.grad(ys.sum(), (used, unused), allow_unused=True)
    assert gradient.any() and nothing is None


@some_methods
@pytest.mark.parametrize("slots", ["all", 1, 3])
def test_a_hook_on_a_parameter_fires_once_for_each_backward(method: str, slots: int | str) -> None:
    p, fired = leaf(3, seed=1, on=CPU), []
    p.register_hook(fired.append)
    accumulated: list[Tensor] = []
    p.register_post_accumulate_grad_hook(accumulated.append)
    loss = solve(lambda t, y: p * y, numbers(3), TIMES, slots=slots, **steps_of(method)).ys.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(fired) == len(accumulated) == 2


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize("slots", ["all", 1, 2, 3, 5, 100])
def test_the_plan_told_how_many_steps_would_run(method: str, slots: int | str) -> None:
    case = PROBLEMS["vector"](CPU)
    solution = case.solve(method=method, dt=0.05, slots=slots)
    loss_of(solution.ys).backward()
    assert solution.plan is not None
    assert solution.stats.steps == solution.plan.steps == 24
    assert solution.stats.plain_runs == solution.plan.report.plain_runs
    assert solution.stats.recorded_runs == solution.plan.report.recorded_runs


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("slots", ["all", 1, 4])
def test_rejected_steps_never_run_again(method: str, slots: int | str) -> None:
    p = torch.tensor([3.0, -2.0], dtype=torch.float64).requires_grad_()
    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        """y' = p sin(20 t) y: its steps shrink and grow."""
        nonlocal calls
        calls += 1
        return p * torch.sin(20 * t) * y

    y0 = torch.ones(2, dtype=torch.float64)
    for rtol in (1e-3, 1e-5, 1e-7):
        solution = solve(f, y0, (0.0, 0.5), method=method, rtol=rtol, atol=rtol, dt=0.2, slots=slots)
        if solution.stats.rejected:
            break
    stats, before = solution.stats, calls
    assert stats.rejected > 0
    runs = stats.plain_runs + stats.recorded_runs
    solution.ys.sum().backward()
    again = stats.plain_runs + stats.recorded_runs - runs
    assert calls - before == METHODS[method].weighted * again
    if slots == "all":
        assert again == 0
    else:
        assert solution.plan is not None and isinstance(solution.plan.schedule, Online)
        assert stats.plain_runs + stats.recorded_runs == solution.plan.report.runs + 1


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_continuous_gradient_tends_to_the_discrete_one(method: str) -> None:
    rtols = (1e-3, 3e-5) if METHODS[method].order < 4 else (1e-4, 1e-7)
    errors = []
    for rtol in rtols:
        how = {"method": method, "rtol": rtol, "atol": rtol * 1e-2}
        found, expected = (gradients(PROBLEMS["vector"](CPU), gradient=g, **how) for g in ("backsolve", "discrete"))
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)))  # type: ignore[operator, union-attr]
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 4  # at the least: low orders follow the tolerance slowly


@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "forced"])
def test_the_continuous_gradient_is_close_for_every_problem(name: str) -> None:
    how = {"method": "tsit5", "rtol": 1e-5, "atol": 1e-7}
    found, expected = (gradients(PROBLEMS[name](CPU), gradient=g, **how) for g in (Backsolve(), Discrete()))
    assert_close(found, expected, 1e-3 / torch.finfo(torch.float32 if "precision" in name else torch.float64).eps)


@pytest.mark.parametrize("method", ["rk4", "tsit5", "dopri5"])
@pytest.mark.parametrize("cached", [True, False])
def test_autocast_gives_the_same_bits_whatever_is_kept(method: str, cached: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
    y0 = leaf(5, 4, dtype=torch.float32, on=CPU)
    results = []
    for slots in ("all", 1, 2, 3, None):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            case = Case(lambda t, y: net(y).float(), y0, (0.0, 0.5, 1.0), [y0, *net.parameters()])
            ys = case.solve(slots=slots, **steps_of(method)).ys
        results.append(torch.autograd.grad(loss_of(ys), case.wanted))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        ys = case.solve(gradient="backprop", **steps_of(method)).ys
    expected = torch.autograd.grad(loss_of(ys), case.wanted)
    assert_close(results[0], expected)  # without a cache backpropagation casts as often, and sums in float32


def test_the_default_dtype_may_change_before_the_reverse_sweep() -> None:
    p = leaf(3, seed=1, on=CPU)
    before = torch.get_default_dtype()
    results = []
    try:
        for other in (torch.float64, torch.float32):
            torch.set_default_dtype(torch.float64)
            ys = solve(lambda t, y: p * y * torch.full((3,), 0.1), numbers(3), TIMES, method="rk4", slots=1).ys
            torch.set_default_dtype(other)
            results.append(torch.autograd.grad(ys.sum(), p))
            assert torch.get_default_dtype() == other
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(*results)


@some_methods
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_without_grad_a_solve_keeps_nothing(method: str, gradient: str) -> None:
    case = PROBLEMS["network"](CPU)
    with torch.no_grad():
        solution = case.solve(gradient=gradient, **steps_of(method))
    assert not solution.ys.requires_grad and solution.plan is None
    expected = case.solve(**steps_of(method)).ys
    assert torch.allclose(solution.ys, expected, rtol=1e-13, atol=1e-13)


@some_methods
def test_nothing_to_differentiate_gives_plain_values(method: str) -> None:
    solution = solve(lambda t, y: -y, numbers(3), TIMES, **steps_of(method))
    assert not solution.ys.requires_grad and solution.plan is None


@pytest.mark.parametrize("slots", ["all", 2])
def test_two_threads_do_not_disturb_each_other(slots: int | str) -> None:
    names = ["network", "vector", "matrix", "nested"]
    alone = {name: gradients(PROBLEMS[name](CPU), slots=slots, method="rk4", dt=0.04) for name in names}
    cases = {name: PROBLEMS[name](CPU) for name in names}
    together: dict[str, Any] = {}
    barrier = threading.Barrier(len(names))

    def work(name: str) -> None:
        torch.set_num_threads(1)
        barrier.wait()
        together[name] = gradients(cases[name], slots=slots, method="rk4", dt=0.04)

    over = threading.Event()

    def draw() -> None:
        while not over.wait(0.005):
            torch.rand(3)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    another = threading.Thread(target=draw)
    for thread in (another, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    another.join()
    for name in names:
        assert_same_bits(together[name], alone[name])


@every_method
def test_every_time_has_its_own_derivative(method: str) -> None:
    """Against differences over frozen steps, one time after another."""
    how = steps_of(method) | ({"rtol": 1e-4} if METHODS[method].adaptive else {})
    p, y0, t = numbers(3, seed=1), numbers(3, seed=2), times(CPU)

    def loss(t: Tensor) -> Tensor:
        return loss_of(solve(lambda t, y: torch.sin(p * y) - t * y, y0.clone().requires_grad_(), t, **how).ys)

    (found,) = torch.autograd.grad(loss(t), t)
    for j in range(len(t)):
        direction = torch.zeros_like(t)
        direction[j] = 1
        expected = grad_enabled_difference(loss, t.detach(), direction)
        assert float(found[j]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def grad_enabled_difference(loss: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, h: float = 1e-5) -> float:
    with check.frozen_steps() as replay:
        loss(x)
        values = []
        for sign in (1.0, -1.0):
            replay.rewind()
            values.append(float(loss(x + sign * h * direction)))
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_a_number_in_single_precision_stays_one_while_times_are_differentiated(method: str) -> None:
    t = torch.tensor([0.0, 0.3, 0.8], requires_grad=True)
    y0 = torch.tensor(0.4, requires_grad=True)
    ys = solve(lambda t, y: torch.sin(y) - y * t, y0, t, **steps_of(method)).ys
    assert ys.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(ys.sum(), (t, y0)))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_single_time_gives_back_y0(gradient: str) -> None:
    y0 = {"a": leaf(3, on=CPU), "b": leaf(2, 2, seed=1, on=CPU)}
    t = torch.tensor([0.5], dtype=torch.float64).requires_grad_()
    solution = solve(lambda t, y: y, y0, t, gradient=gradient)
    assert solution.status == "success" and solution.stats.steps == 0
    assert solution.stats.evaluations == solution.stats.plain_runs == solution.stats.recorded_runs == 0
    assert torch.equal(solution.ys["a"], y0["a"][None])
    found = torch.autograd.grad(loss_of(solution.ys), (y0["a"], t), allow_unused=True)
    assert found[0] is not None and found[1] is None


@every_method
def test_a_jacobian_may_be_asked_for_in_one_batch(method: str) -> None:
    case = PROBLEMS["vector"](CPU)
    last = case.solve(slots=2, **steps_of(method)).ys[-1]
    unit = torch.eye(2, dtype=torch.float64)
    (batched,) = torch.autograd.grad(last, case.wanted[0], unit, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        (row,) = torch.autograd.grad(last, case.wanted[0], unit[i], retain_graph=True)
        assert torch.allclose(batched[i], row, rtol=1e-12)


@some_methods
def test_a_solve_inside_a_solve(method: str) -> None:
    def make() -> Case:
        p, y0 = leaf(3, seed=1, on=CPU), leaf(3, seed=2, on=CPU)

        def f(t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(solve(lambda s, z: y - p * z, y, (0.0, 0.2), slots=1, method="rk4", dt=0.1).ys[-1])

        return Case(f, y0, TIMES, [p, y0])

    expected = gradients(make(), gradient="backprop", **steps_of(method))
    first = gradients(make(), slots="all", **steps_of(method))
    assert_close(first, expected)
    assert_same_bits(gradients(make(), slots=2, **steps_of(method)), first)


@some_methods
@pytest.mark.parametrize("size", [0, 1])
def test_a_batch_may_be_empty_or_have_one_row(method: str, size: int) -> None:
    p, y0 = leaf(3, seed=1, on=CPU), numbers(size, 3).requires_grad_()
    ys = solve(lambda t, y: torch.sin(p * y), y0, TIMES, slots=2, **steps_of(method)).ys
    assert ys.shape == (len(TIMES), size, 3)
    found = torch.autograd.grad(ys.sum(), (p, y0), allow_unused=True)
    assert found[1] is not None and found[1].shape == y0.shape
    assert size or not (found[0] is not None and found[0].any())


@some_methods
def test_the_memory_of_a_gradient_is_given_back(method: str) -> None:
    """Nothing of a solve lives on in a reference cycle."""
    case = PROBLEMS["network"](CPU)
    held: list[Any] = []
    original = case.f
    case.f = lambda t, y: (held.append(weakref.ref(y)), original(t, y))[1]
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(case.solve(slots=2, **steps_of(method)).ys)
        torch.autograd.grad(loss, case.wanted)
        del loss
        alive = [ref for ref in held if ref() is not None and ref() is not case.y0]
    finally:
        gc.enable()
    assert not alive
