"""Shapes, dtypes, options and callbacks: what torchdiffeq's users pass means here what it means there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import adjoint
from adjoint import Implicit
from adjoint.options import METHODS

D = torch.float64
FIXED = [name for name, method in METHODS.items() if not method.adaptive and not isinstance(method, Implicit)]
ADAPTIVE = [name for name, method in METHODS.items() if method.adaptive and name != "tsit5"]
STEP = 0.13
"""No asked time is a multiple of it: torchdiffeq gives those the derivative zero."""


class Swing(nn.Module):
    """y' = sin(p y) - t y for a tensor of any shape and dtype."""

    def __init__(self, dtype: torch.dtype = D) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.7, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, t: Tensor, y: Any) -> Any:
        return torch.sin(self.p * y) - y * t


class Joined(Swing):
    """The time is joined to the state, so that it must have the state's dtype."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        together = torch.cat((y, t.expand(1)))
        assert together.dtype == y.dtype
        return torch.tanh(self.p * together)[:-1]


class Pair(Swing):
    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -self.p * y[0] + y[1].sum(), torch.cos(y[1]) * t * y[0].mean()


def some(*shape: int, dtype: torch.dtype = D) -> Tensor:
    return 0.5 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def states() -> Iterator[tuple[str, Swing, Any]]:
    for dtype in (torch.float64, torch.float32, torch.complex128, torch.complex64):
        for name, shape in (("number", ()), ("vector", (3,)), ("matrix", (2, 3)), ("empty", (0, 2))):
            yield f"{name} {dtype}", Swing(dtype), some(*shape, dtype=dtype)
        if dtype.is_floating_point:
            yield f"joined {dtype}", Joined(dtype), some(3, dtype=dtype)
            yield f"pair {dtype}", Pair(dtype), (some(3, dtype=dtype), some(2, 2, dtype=dtype))


STATES = {name: (f, y0) for name, f, y0 in states()}
TIMES = torch.tensor([0.0, 0.33, 1.0, 1.7], dtype=D)


def answer(odeint: Callable[..., Any], f: Swing, y0: Any, t: Tensor, **how: Any) -> list[Tensor]:
    """Values, and the gradients of a loss of them in y0, the parameter and the times."""
    start = [x.clone().requires_grad_() for x in (y0 if isinstance(y0, tuple) else (y0,))]
    t = t.clone().requires_grad_()
    found = odeint(f, tuple(start) if isinstance(y0, tuple) else start[0], t, **how)
    values = list(found) if isinstance(y0, tuple) else [found]
    loss = sum((x.abs() ** 2).sum().double() for x in values)
    return [x.detach() for x in values] + list(torch.autograd.grad(loss, (*start, f.p, t), materialize_grads=True))


def assert_alike(ours: list[Tensor], theirs: list[Tensor], rtol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0.0, atol=rtol * scale + 1e-300)


@pytest.mark.parametrize("back", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("method", ["rk4", "implicit_adams"])
def test_fixed_steps_agree_for_every_shape_and_dtype(method: str, state: str, back: bool) -> None:
    f, y0 = STATES[state]
    t = TIMES.flip(0) if back else TIMES
    how: dict[str, Any] = {"method": method, "options": {"step_size": STEP}, "rtol": 1e-5, "atol": 1e-6}
    # torchdiffeq's implicit_adams fails on no numbers: it takes the largest of them
    other = {"method": "rk4"} if method == "implicit_adams" and state.startswith("empty") else {}
    theirs = answer(torchdiffeq.odeint, f, y0, t, **(how | other))
    rtol = 1e-11 if "64" in str(theirs[0].abs().dtype) else 2e-5
    assert_alike(answer(adjoint.odeint, f, y0, t, **how), theirs, rtol)
    assert_alike(answer(adjoint.odeint_adjoint, f, y0, t, slots=3, **how), theirs, rtol)


@pytest.mark.parametrize("state", ["number torch.float32", "vector torch.complex128", "pair torch.float64"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_controlled_steps_agree_within_the_tolerance(method: str, state: str) -> None:
    """With the solution; torchdiffeq is held to less, since its derivatives in times are less accurate."""
    f, y0 = STATES[state]
    fine = 1e-6 if "32" in state else 1e-10
    exact = answer(torchdiffeq.odeint, f, y0, TIMES, method="dopri5", rtol=fine, atol=fine)
    how: dict[str, Any] = {"method": method, "rtol": 1e-5, "atol": 1e-6}
    ours = answer(adjoint.odeint_adjoint, f, y0, TIMES, **how)
    assert_alike(ours, exact, 5e-3)
    assert_alike(answer(torchdiffeq.odeint, f, y0, TIMES, **how), ours, 5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    f, y0 = Swing(dtype), some(3, dtype=dtype)
    how: dict[str, Any] = {"method": method, "rtol": 1e-2, "atol": 1e-2}
    exact = answer(adjoint.odeint, Swing(), y0.double(), TIMES, method="dopri5" if method == "dopri5" else method)
    for a, b in zip(answer(adjoint.odeint_adjoint, f, y0, TIMES, slots=2, **how), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.1, atol=0.1)


def grid(f: Any, y0: Any, t: Tensor) -> Tensor:
    """Uneven, and a function of the asked times."""
    s = torch.linspace(0, 1, 14, dtype=t.dtype) ** 1.5
    return torch.cat((t[:1] + (t[-1] - t[0]) * s[:-1], t[-1:]))


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "cubic": {"interp": "cubic", "step_size": STEP},
    "a grid": {"grid_constructor": grid},
    "a grid, cubic": {"grid_constructor": grid, "interp": "cubic"},
    "the asked times": {"grid_constructor": lambda f, y0, t: t},
    "perturbed": {"perturb": True, "step_size": STEP},
    "a norm that says nothing": {"norm": torch.linalg.norm, "step_size": STEP},
}


@pytest.mark.parametrize("back", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_agree_for_every_option(method: str, options: str, back: bool) -> None:
    t = TIMES.flip(0) if back else TIMES
    own = OPTIONS[options]
    if "grid_constructor" in own and back and options != "the asked times":
        own = own | {"grid_constructor": lambda f, y0, t: grid(f, y0, t)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how: dict[str, Any] = {"method": method, "options": own}
        theirs = answer(torchdiffeq.odeint, Swing(), some(3), t, **how)
        for odeint in (adjoint.odeint, adjoint.odeint_adjoint):
            assert_alike(answer(odeint, Swing(), some(3), t, **how), theirs, 1e-10)


@pytest.mark.parametrize("own", [{"max_order": 4}, {"max_order": 6}, {"max_iters": 2}, {"max_order": 2}])
@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_options_of_adams_methods(method: str, own: dict[str, int]) -> None:
    how: dict[str, Any] = {"method": method, "options": {"step_size": 0.06, **own}}
    if method == "explicit_adams" and "max_iters" in own:
        own = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = answer(torchdiffeq.odeint, Swing(), some(3), TIMES, **how)
        assert_alike(answer(adjoint.odeint_adjoint, Swing(), some(3), TIMES, slots=4, **how), theirs, 1e-8)


@pytest.mark.parametrize("perturb", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_perturbed_steps_see_their_own_side_of_a_jump(perturb: bool, back: bool) -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t < 1.0, -y, 2 * y + 1)

    t = torch.tensor([2.0, 0.0] if back else [0.0, 2.0], dtype=D)
    how: dict[str, Any] = {"method": "heun2", "options": {"step_size": 0.5, "perturb": perturb}}
    torch.testing.assert_close(adjoint.odeint(f, some(3), t, **how), torchdiffeq.odeint(f, some(3), t, **how))


def lengths_of(options: dict[str, Any], method: str = "dopri5", f: Swing | None = None, **how: Any) -> Tensor:
    """The times between which the accepted steps ran."""
    f = f or Swing()
    seen: list[float] = []
    f.callback_accept_step = lambda t, y, dt: seen.extend((float(t), float(t + dt)))  # type: ignore[assignment]
    adjoint.odeint(f, some(3), TIMES, method=method, options=options, **how)
    return torch.tensor(seen, dtype=D).reshape(-1, 2)


def test_steps_end_at_step_t_and_jump_t() -> None:
    steps = lengths_of({"step_t": torch.tensor([0.9, 0.2, 5.0]), "jump_t": torch.tensor([1.1])})
    for stop in (0.2, 0.9, 1.1):
        assert float((steps[:, 1] - stop).abs().min()) < 1e-6  # given in single precision
    assert torch.equal(steps[1:, 0], steps[:-1, 1])


def test_at_a_jump_both_sides_are_seen_and_at_a_stop_one_evaluation_is_saved() -> None:
    calls = []
    for name in ("jump_t", "step_t"):
        seen: list[float] = []

        def f(t: Tensor, y: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(float(t))
            return torch.where(t < 1.0, -y, 2 * y)

        with torch.no_grad():
            y = adjoint.odeint(f, some(3), TIMES[[0, 3]], method="dopri5", options={name: torch.tensor([1.0])})
        if name == "jump_t":
            torch.testing.assert_close(y[-1], some(3) * torch.tensor(0.4, dtype=D).exp(), rtol=1e-6, atol=0.0)
            assert 1.0 not in seen
        calls.append(len(seen))
    assert calls[1] > 1


def test_the_least_and_the_longest_step() -> None:
    assert float(lengths_of({"max_step": 0.05}).diff().max()) <= 0.05 * (1 + 1e-8)
    forced = lengths_of({"min_step": 0.4}, rtol=1e-12, atol=1e-14).diff().flatten()
    assert torch.allclose(forced[:-1], torch.full_like(forced[:-1], 0.4))
    assert len(forced) == 5


def test_the_least_step_is_not_forced_on_what_is_not_finite() -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        return y / (t < 0.5)

    with pytest.raises(adjoint.SolveError, match="min_step"):
        adjoint.odeint(f, some(3), TIMES, method="dopri5", options={"min_step": 0.3})


def test_the_dtype_of_time() -> None:
    seen: list[torch.dtype] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen.append(t.dtype)
        return -y * t

    y0 = some(3, dtype=torch.float32)
    for dtype in (torch.float32, torch.float64):
        ends: list[float] = []
        f.callback_accept_step = lambda t, y, dt, ends=ends: ends.append(float(t))  # type: ignore[attr-defined]
        adjoint.odeint(f, y0, TIMES, rtol=1e-5, atol=1e-5, method="dopri5", options={"dtype": dtype})
        assert len(ends) > 2
    assert set(seen) == {torch.float32}
    solution = adjoint.solve(f, y0.double(), TIMES, time_dtype=torch.float32, rtol=1e-5)
    assert solution.status == "success"
    assert seen[-1] is torch.float32
    with pytest.raises(TypeError, match="dtype=torch.int32 is no dtype of times"):
        adjoint.odeint(f, y0, TIMES, method="dopri5", options={"dtype": torch.int32})


def test_controlled_steps_end_on_times_of_the_dtype_asked_for() -> None:
    ends: list[float] = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -y * t

    f.callback_accept_step = lambda t, y, dt: ends.append(float(t))  # type: ignore[attr-defined]
    with torch.no_grad():
        adjoint.odeint(f, some(3, dtype=torch.float32), TIMES, method="dopri5", options={"dtype": torch.float32})
    rounded = torch.tensor(ends, dtype=torch.float32).tolist()
    assert ends == rounded and len(ends) > 3


def test_norms_see_the_callers_tree() -> None:
    shapes: list[Any] = []

    def norm(y: tuple[Tensor, Tensor]) -> Tensor:
        shapes.append((y[0].shape, y[1].shape))
        return y[0].abs().max()

    f, y0 = STATES["pair torch.float64"]
    coarse = adjoint.odeint(f, y0, TIMES, rtol=1e-3, atol=1e-3, method="dopri5", options={"norm": norm})
    assert set(shapes) == {((3,), (2, 2))}
    assert coarse[0].shape == (4, 3)


@pytest.mark.parametrize(
    "given", [(1e-6, 1e-4), (torch.full((3,), 1e-6), torch.full((4,), 1e-4)), torch.tensor([1e-6, 1e-4])]
)
def test_tolerances_for_each_leaf_and_for_each_number(given: Any) -> None:
    f, y0 = STATES["pair torch.float64"]
    how: dict[str, Any] = {"rtol": given, "atol": 1e-7, "method": "dopri5"}
    for a, b in zip(adjoint.odeint(f, y0, TIMES, **how), torchdiffeq.odeint(f, y0, TIMES, **how), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_max_num_steps_counts_for_each_interval() -> None:
    f = Swing()
    taken = len(lengths_of({}, f=f))
    adjoint.odeint(Swing(), some(3), TIMES, method="dopri5", options={"max_num_steps": -(-taken // 3)})
    with pytest.raises(adjoint.SolveError, match="max_steps=3 taken"):
        adjoint.odeint(Swing(), some(3), TIMES, method="dopri5", options={"max_num_steps": 1})


@pytest.mark.parametrize("method", ["rk4", "dopri5", "explicit_adams"])
@pytest.mark.parametrize("gradient", ["discrete", "backsolve"])
@pytest.mark.parametrize("back", [False, True])
def test_adjoint_callbacks_are_called_on_the_way_back(method: str, gradient: str, back: bool) -> None:
    f = Swing()
    there: list[tuple[float, float]] = []
    seen: list[tuple[float, float]] = []

    def twin(t: Tensor, together: tuple[Tensor, ...], dt: Tensor) -> None:
        nothing, y, of_y, *of_tensors = together
        assert nothing == 0
        assert y.shape == of_y.shape == (3,)
        assert len(of_tensors) == 2
        seen.append((float(t), float(dt)))

    f.callback_step = lambda t, y, dt: there.append((float(t), float(dt)))  # type: ignore[assignment]
    f.callback_step_adjoint = twin  # type: ignore[assignment]
    t = TIMES.flip(0) if back else TIMES
    options = {} if method == "dopri5" else {"step_size": STEP}
    answer(adjoint.odeint_adjoint, f, some(3), t, method=method, options=options, gradient=gradient, rtol=1e-3)
    times = [time for time, _ in seen]
    assert all(dt > 0 for _, dt in seen)
    assert times == sorted(times, reverse=not back)
    assert times[0] == pytest.approx(float(t[-1]))
    if gradient == "discrete" and method != "dopri5":
        sign = -1 if back else 1
        assert seen == [(pytest.approx(start + sign * dt), pytest.approx(dt)) for start, dt in reversed(there)]


def test_callbacks_change_no_gradient() -> None:
    f, g = Swing(), Swing()
    f.callback_step_adjoint = lambda *given: None  # type: ignore[assignment]
    how: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.01}}
    both = [answer(adjoint.odeint_adjoint, h, some(3), TIMES, **how) for h in (f, g)]
    assert all(map(torch.equal, *both))


@pytest.mark.parametrize("gradient", ["discrete", "backsolve"])
@pytest.mark.parametrize("times", [TIMES, TIMES[:1]])
def test_unused_parameters_get_zeros(gradient: str, times: Tensor) -> None:
    f, y0 = Swing(), some(3).requires_grad_()
    declared = torch.ones(4, requires_grad=True)
    ys = adjoint.odeint_adjoint(
        f, y0, times, method="rk4", gradient=gradient, adjoint_params=(*f.parameters(), declared)
    )
    ys.sum().backward()
    assert torch.equal(f.unused.grad, torch.zeros(2, dtype=D))  # type: ignore[arg-type]
    assert torch.equal(declared.grad, torch.zeros(4))  # type: ignore[arg-type]
    assert f.p.grad is not None and y0.grad is not None
    if len(times) == 1:
        assert torch.equal(y0.grad, torch.ones(3, dtype=D)) and f.p.grad == 0


@pytest.mark.parametrize("method", FIXED)
@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"adjoint_method": "rk4", "adjoint_options": {"step_size": 0.05}},
        {"adjoint_options": {"norm": "seminorm", "step_size": 0.2}},
    ],
)
@pytest.mark.parametrize("state", ["vector torch.float64", "pair torch.float64"])
def test_the_continuous_adjoint_of_fixed_steps_agrees_to_rounding(
    method: str, wishes: dict[str, Any], state: str
) -> None:
    """But for the derivative in the first time, which they integrate along, and which is known."""
    f, y0 = STATES[state]
    stable = {"max_order": 5} if "adams" in method else {}
    how: dict[str, Any] = {"method": method, "options": {"step_size": 0.1, **stable}, **wishes}
    if "adjoint_options" in wishes and "adjoint_method" not in wishes:
        how["adjoint_options"] = wishes["adjoint_options"] | stable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = answer(adjoint.odeint_adjoint, f, y0, TIMES, gradient="backsolve", **how)
        theirs = answer(torchdiffeq.odeint_adjoint, f, y0, TIMES, **how)
    ours[-1][0] = theirs[-1][0] = 0
    assert_alike(ours, theirs, 1e-9)


def test_seminorms_take_fewer_steps_back() -> None:
    class Large(Swing):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(some(20, 3) * 30)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return super().forward(t, y) * torch.cos(self.weights * t).mean()

    counts = []
    for norm in (None, "seminorm", lambda leaves: max(x.abs().max() for x in leaves[1:3])):
        f = Large()
        seen: list[Tensor] = []
        f.callback_step_adjoint = lambda t, y, dt, seen=seen: seen.append(t)  # type: ignore[assignment]
        own = {} if norm is None else {"adjoint_options": {"norm": norm}}
        answer(adjoint.odeint_adjoint, f, some(3), TIMES, method="dopri5", gradient="backsolve", rtol=1e-4, **own)
        counts.append(len(seen))
    assert counts[1] < 0.8 * counts[0]
    assert counts[2] < 0.8 * counts[0]


@pytest.mark.parametrize("odeint", [adjoint.odeint, adjoint.odeint_adjoint])
@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_every_kind_of_method_is_mapped(method: str, odeint: Any) -> None:
    y0, options = some(3), {} if method == "dopri5" else {"step_size": 0.1}

    def loss(p: Tensor) -> Tensor:
        return odeint(lambda t, y: torch.sin(p * y) - t, y0, TIMES, method=method, options=options).square().sum()

    rates = torch.tensor([0.5, 2.0], dtype=D)
    one_by_one = []
    for p in rates:
        x = p.clone().requires_grad_()
        one_by_one.append(torch.autograd.grad(loss(x), x)[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(rates), torch.stack(one_by_one))


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a norm by name": ({"method": "dopri5", "options": {"norm": "rms"}}, TypeError, "norm='rms' is no function"),
    "a tolerance below zero": ({"rtol": -1.0}, ValueError, "rtol=-1.0 is no tolerance"),
    "a tolerance that requires grad": ({"atol": torch.ones((), requires_grad=True)}, ValueError, "atol requires grad"),
    "too many tolerances": ({"rtol": (1.0, 2.0)}, ValueError, "rtol has 2 entries and y0 1 leaves"),
    "an event of a step": (
        {"method": "rk4", "options": {"step_size": torch.ones((), requires_grad=True)}},
        ValueError,
        "detach",
    ),
    "two grids": ({"method": "rk4", "options": {"step_size": 1.0, "grid_constructor": grid}}, ValueError, "both given"),
    "jumps that require grad": (
        {"method": "dopri5", "options": {"jump_t": torch.ones(1, requires_grad=True)}},
        ValueError,
        "jump_t requires grad",
    ),
    "a grid that turns around": (
        {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t[[0, 2, 1, 3]]}},
        ValueError,
        "turn around",
    ),
    "a number for a state": ({"y0": torch.tensor([1, 2])}, TypeError, "y0 has dtype torch.int64"),
    "no finite state": ({"y0": torch.tensor([1.0, torch.nan])}, ValueError, "y0 holds a NaN"),
    "args that are no tuple": ({"args": 3.0}, TypeError, "args=3.0 must be a tuple"),
    "an order too high": ({"method": "implicit_adams", "options": {"max_order": 13}}, ValueError, "max_order=13"),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_get_a_sentence(call: str) -> None:
    given, kind, sentence = WRONG[call]
    given = {"y0": some(3), **given}
    with pytest.raises(kind, match=sentence):
        adjoint.odeint(Swing(), t=TIMES, **given)


def test_a_grid_that_depends_on_a_parameter_is_refused() -> None:
    f = Swing()
    options = {"grid_constructor": lambda func, y0, t: torch.cat((t[:1], t[:1] + f.p * 0.1, t[-1:]))}
    with pytest.raises(ValueError, match="depend on y0 or a parameter"):
        adjoint.odeint(f, some(3), TIMES, method="rk4", options=options)


def test_a_grid_of_plain_numbers_moves_at_its_ends_only() -> None:
    t = TIMES.clone().requires_grad_()
    numbers = torch.linspace(0.0, 1.7, 9, dtype=D)
    numbers[-1] = 1.7
    options = {"grid_constructor": lambda func, y0, t: numbers}
    found = []
    for odeint in (adjoint.odeint, adjoint.odeint_adjoint):
        ys = odeint(Swing(), some(3), t, method="rk4", options=options)
        found.append(torch.autograd.grad(ys[-1].sum(), t)[0])
    assert torch.allclose(*found)
    assert found[0][1] == found[0][2] == 0 and found[0][0] != 0 and found[0][3] != 0


def test_callbacks_that_fixed_steps_never_call_are_warned_of() -> None:
    f = Swing()
    f.callback_accept_step = lambda t, y, dt: None  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="has no use for callback_accept_step"):
        adjoint.odeint(f, some(3), TIMES, method="rk4")
