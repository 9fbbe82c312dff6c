"""Models of sequences: parallel is recurrent, discrete is continuous in the limit, a likelihood is that of a Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_cases import assert_close, assert_same_bits, leaf, loss_of, numbers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import adjoint
from adjoint import state_space

CPU = torch.device("cpu")
BATCH, LENGTH, FEATURES = 2, 13, 3

MODELS: dict[str, Callable[[], Any]] = {
    "S4D": lambda: state_space.S4D(FEATURES, 4),
    "S4D, bilinear, inverse": lambda: state_space.S4D(FEATURES, 4, rule="bilinear", start="inverse"),
    "S4D, linear": lambda: state_space.S4D(FEATURES, 4, start="linear"),
    "S5": lambda: state_space.S5(FEATURES, 4),
    "S5, bilinear": lambda: state_space.S5(FEATURES, 4, rule="bilinear"),
    "LRU": lambda: state_space.LRU(FEATURES, 5),
    "selective": lambda: state_space.Selective(FEATURES, 4),
    "stack": lambda: state_space.Stack(state_space.LRU(FEATURES, 4) for _ in range(3)),
    "GRU": lambda: state_space.Recurrent(nn.GRUCell(FEATURES, 4), FEATURES, 4),
    "liquid": lambda: state_space.Recurrent(state_space.LiquidCell(FEATURES, 4), FEATURES, 4),
    "neural ODE": lambda: state_space.Recurrent(state_space.ODECell(FEATURES, 4, 6), FEATURES, 4),
}
every_model = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[Any, Any, Tensor]:
    """A model, a first state and inputs."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    state = pytree.tree_map(lambda zero: leaf(*zero.shape, seed=1, on=CPU, dtype=zero.dtype), model.start(BATCH))
    return model, state, leaf(BATCH, LENGTH, FEATURES, seed=2, on=CPU)


def results(model: nn.Module, u: Tensor, state: Any, run: Callable[[], tuple[Tensor, Any]]) -> list[Tensor]:
    y, last = run()
    found = torch.autograd.grad(loss_of([y, last]), [u, *pytree.tree_leaves(state), *model.parameters()])
    return [y.detach(), *(x.detach() for x in pytree.tree_leaves(last)), *found]


def by_steps(model: Any, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    rows = []
    for row in u.unbind(1):
        state, y = model.step(state, row)
        rows.append(y)
    return torch.stack(rows, 1), state


@every_model
def test_recurrent_mode_and_parallel_mode_are_the_same_with_their_gradients(name: str) -> None:
    model, state, u = made(name)
    expected = results(model, u, state, lambda: by_steps(model, u, state))
    for chunk in (5, 256):
        assert_close(results(model, u, state, lambda chunk=chunk: model(u, state, chunk=chunk)), expected)  # type: ignore[misc]


@every_model
def test_the_bits_do_not_depend_on_the_memory(name: str) -> None:
    model, state, u = made(name)
    everything = results(model, u, state, lambda: model(u, state, chunk=4, slots="all"))
    for how in ({"slots": 1}, {"slots": 2}, {"budget": "10 MB"}):
        assert_same_bits(results(model, u, state, lambda how=how: model(u, state, chunk=4, **how)), everything)  # type: ignore[misc]


@every_model
def test_a_state_goes_from_one_call_into_the_next(name: str) -> None:
    model, state, u = made(name)

    def in_two() -> tuple[Tensor, Tensor]:
        first, middle = model(u[:, :6], state)
        second, last = model(u[:, 6:], middle)
        return torch.cat((first, second), 1), last

    assert_close(results(model, u, state, in_two), results(model, u, state, lambda: model(u, state)))


@every_model
def test_a_member_ends_where_its_length_says(name: str) -> None:
    model, state, u = made(name)
    lengths = [LENGTH, 5]
    with torch.no_grad():
        u[1, 5:] = torch.nan

    def one_by_one() -> tuple[Tensor, Tensor]:
        pairs = [
            model(u[b : b + 1, :n], pytree.tree_map(lambda x: x[b : b + 1], state))  # noqa: B023
            for b, n in enumerate(lengths)
        ]
        short = pairs[1][0]
        filled = torch.cat((short, short.new_zeros(1, LENGTH - 5, short.shape[-1])), 1)
        return torch.cat((pairs[0][0], filled)), pytree.tree_map(lambda *x: torch.cat(x), *(last for _, last in pairs))

    expected = results(model, u, state, one_by_one)
    assert all(x.isfinite().all() for x in expected)
    assert_close(results(model, u, state, lambda: model(u, state, lengths=lengths, chunk=4)), expected)


@every_model
def test_single_precision_and_a_state_from_nowhere(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    u = torch.randn(BATCH, LENGTH, FEATURES)
    y, last = model(u)
    assert y.dtype == u.dtype and y.shape[:2] == u.shape[:2]
    for x, zero in zip(*map(pytree.tree_leaves, (last, model.start(BATCH))), strict=True):
        assert x.dtype == zero.dtype and x.shape == zero.shape
    exact, _ = model.double()(u.double())
    assert (y - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("S4D", "S5", "LRU"))])
def test_an_impulse_gives_the_powers_of_the_system(name: str) -> None:
    model, _, _ = made(name)
    a, b = (x.detach() for x in model.system())
    c, two = torch.view_as_complex(model.c).detach(), 1 if name == "LRU" else 2
    u = torch.zeros(1, 6, FEATURES, dtype=torch.float64)
    u[0, 0, 1] = 1.0
    y = model(u)[0][0]
    for k in range(6):
        if name.startswith("S4D"):
            response = torch.zeros(FEATURES, dtype=torch.complex128)
            response[1] = (c[1] * a[1] ** k * b[1]).sum()
        else:
            response = c @ (a**k * b[:, 1])
        expected = two * response.real + (model.d.detach() * u[0, 0] if k == 0 else 0)
        assert_close([y[k].detach()], [expected])


def test_a_selective_model_is_the_recurrence_of_its_paper() -> None:
    model, state, u = made("selective")
    h, rows = state, []
    for x in u.unbind(1):
        low, b, c = model.select(x).split((model.rank, model.states, model.states), -1)
        dt = torch.log1p(torch.exp(model.widen(low)))
        h = torch.exp(-dt[..., None] * model.log_decay.exp()) * h + dt[..., None] * b[:, None] * x[..., None]
        rows.append((h * c[:, None]).sum(-1) + model.d * x)
    expected = results(model, u, state, lambda: (torch.stack(rows, 1), h))
    assert_close(results(model, u, state, lambda: model(u, state)), expected)


def system(states: int = 3, inputs: int = 2) -> tuple[Tensor, Tensor]:
    return numbers(states, states, seed=1) - 2 * torch.eye(states, dtype=torch.float64), numbers(states, inputs, seed=2)


def test_both_rules_say_the_same_of_a_diagonal_and_of_its_matrix() -> None:
    a, b = -numbers(4, seed=1).exp(), numbers(4, 1, seed=2)
    dt = torch.tensor(0.3, dtype=torch.float64)
    for diagonal, dense in (
        (state_space.zero_order_hold, state_space.zero_order_hold_of_matrices),
        (state_space.bilinear, state_space.bilinear_of_matrices),
    ):
        one, two = diagonal(a, b[:, 0], dt), dense(torch.diag(a), b, dt)
        assert_close([torch.diag(one[0]), one[1]], [two[0], two[1][:, 0]])


def test_zero_order_hold_is_exact_and_the_bilinear_rule_of_second_order() -> None:
    a, b = system()
    u, x = numbers(2, seed=3), numbers(3, seed=4)
    one = torch.tensor(1.0, dtype=torch.float64)
    exact = torch.linalg.matrix_exp(a) @ x + torch.linalg.solve(
        a, (torch.linalg.matrix_exp(a) - torch.eye(3)) @ (b @ u)
    )

    def after_one(rule: Any, steps: int) -> Tensor:
        da, db = rule(a, b, one / steps)
        h = x
        for _ in range(steps):
            h = da @ h + db @ u
        return h

    for steps in (1, 2, 5):
        assert_close([after_one(state_space.zero_order_hold_of_matrices, steps)], [exact])
    errors = [(after_one(state_space.bilinear_of_matrices, n) - exact).norm() for n in (40, 80)]
    assert float(errors[0] / errors[1]) == pytest.approx(4, rel=0.02)


def test_a_mode_without_decay_is_integrated_and_its_derivative_keeps_its_digits() -> None:
    """(exp(z) - 1) / z and its derivative against their series in exact fractions, over the switch between two formulas."""
    for size in (0.0, 1e-12, 1e-4, 0.03, 0.0999, 0.1001, 0.3):
        z = torch.tensor([complex(-size, 0.7 * size)], dtype=torch.complex128, requires_grad=True)
        _, held = state_space.zero_order_hold(
            z, torch.ones(1, dtype=torch.complex128), torch.ones(1, dtype=torch.float64)
        )
        value, slope, term = 0j, 0j, 1.0
        w = complex(-size, 0.7 * size)
        for k in range(25):
            term = term / (k + 1)  # 1 / (k+1)!
            value += w**k * term
            slope += k * w ** (k - 1) * term if k else 0
        (found,) = torch.autograd.grad(held.real.sum(), z)
        assert abs(complex(held.detach()) - value) < 1e-15 * 4
        assert abs(complex(found.conj()) - slope) < 1e-14


@pytest.mark.parametrize("states", [1, 2, 5, 8])
def test_hippo_is_a_normal_matrix_and_one_of_rank_one(states: int) -> None:
    a, b = state_space.hippo_legs(states)
    values, vectors = state_space.hippo_normal(states)
    p = b / 2**0.5
    normal = (vectors * values) @ vectors.mH
    assert_close([normal], [(a + torch.outer(p, p)).to(normal.dtype)])
    assert_close([vectors.mH @ vectors], [torch.eye(states, dtype=vectors.dtype)])
    assert torch.equal(values.real, torch.full((states,), -0.5, dtype=torch.float64))
    assert_close([values.imag], [-values.imag.flip(0)])
    assert torch.equal(torch.tril(a, -1).T.triu(1), -torch.outer(b, b).triu(1))


def test_hippo_remembers_a_signal_by_its_legendre_polynomials() -> None:
    """dx/dt = (A x + B u) / t keeps the coefficients of u on [0, t] in Legendre polynomials: those of t^2 are known."""
    a, b = state_space.hippo_legs(4)
    end = 2.0
    x = adjoint.solve(
        lambda t, x: (a @ x + b * t**2) / t,
        torch.zeros(4, dtype=torch.float64),
        [1e-6, end],
        method="dopri5",
        rtol=1e-10,
    ).ys[-1]
    # u(s) = s^2 = end^2 (1/3 P_0 + 1/2 P_1 + 1/6 P_2)(2 s/end - 1), each P_n in units of 1/sqrt(2n+1)
    expected = end**2 * torch.tensor([1 / 3, 1 / 2 / 3**0.5, 1 / 6 / 5**0.5, 0.0], dtype=torch.float64)
    assert torch.allclose(x, expected, atol=1e-5)


def test_a_liquid_cell_solves_its_equation_with_order_one() -> None:
    torch.manual_seed(0)
    cell, u, x = state_space.LiquidCell(2, 3).double(), numbers(1, 2, seed=1), numbers(1, 3, seed=2)

    def change(t: Tensor, x: Tensor) -> Tensor:
        f = torch.sigmoid(cell.of_input(u) + cell.of_state(x))
        return -(torch.exp(-cell.log_tau) + f) * x + f * cell.a

    exact = adjoint.solve(change, x, [0.0, 0.7], method="dopri5", rtol=1e-11, atol=1e-12).ys[-1].detach()
    errors = []
    for cell.substeps in (200, 400):
        errors.append(float((cell(u, x, 0.7).detach() - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("method", ["rk4", "euler"])
def test_an_ode_cell_is_a_solve_between_two_rows(method: str) -> None:
    torch.manual_seed(0)
    cell = state_space.ODECell(2, 3, method=method, substeps=5).double()
    u, x = numbers(1, 2, seed=1), numbers(1, 3, seed=2)
    exact = adjoint.solve(lambda t, x: cell.field(torch.cat((x, u), -1)), x, [0.0, 0.6], method=method, dt=0.12).ys[-1]
    assert_close([cell(u, x, torch.full((1, 1), 0.6, dtype=torch.float64))], [exact])


@pytest.mark.parametrize("name", ["liquid", "neural ODE"])
def test_time_between_rows_is_an_input_with_a_gradient(name: str) -> None:
    model, state, u = made(name)
    elapsed = leaf(BATCH, LENGTH, seed=5, on=CPU).detach().exp().requires_grad_()
    y, last = model(u, state, elapsed=elapsed, slots=2)
    found = torch.autograd.grad(loss_of([y, last]), [elapsed, u])
    h, rows = state, []
    for k in range(LENGTH):
        h = model.cell(u[:, k], h, elapsed[:, k : k + 1])
        rows.append(h)
    assert_close(found, torch.autograd.grad(loss_of([torch.stack(rows, 1), h]), [elapsed, u]))


def test_a_cell_may_have_no_parameters() -> None:
    class Fading(nn.Module):
        def forward(self, u: Tensor, h: Tensor) -> Tensor:
            return torch.tanh(u + h)

    y, last = state_space.Recurrent(Fading(), 3, 3)(torch.ones(2, 5, 3))
    assert torch.equal(y[:, -1], last)


def gaussian() -> dict[str, Tensor]:
    """A system of 3 states and 2 outputs."""

    def positive(n: int, seed: int) -> Tensor:
        x = numbers(n, n, seed=seed)
        return x @ x.T + 0.5 * torch.eye(n, dtype=torch.float64)

    made = {
        "transition": 0.4 * numbers(3, 3, seed=1),
        "observation": numbers(2, 3, seed=2),
        "process_noise": positive(3, 3),
        "observation_noise": positive(2, 4),
        "mean": numbers(3, seed=5),
        "covariance": positive(3, 6),
    }
    return {name: x.requires_grad_() for name, x in made.items()}


def joint_density(y: Tensor, m: dict[str, Tensor]) -> Tensor:
    """The density of all rows at once, of those entries that are there."""
    f, h, count = m["transition"], m["observation"], len(y)
    means, covariances = [m["mean"]], [m["covariance"]]
    for _ in range(count - 1):
        means.append(f @ means[-1])
        covariances.append(f @ covariances[-1] @ f.T + m["process_noise"])
    rows = [[torch.zeros(0)] * count for _ in range(count)]
    for i in range(count):
        power = torch.eye(3, dtype=torch.float64)
        for j in range(i, count):
            rows[j][i] = h @ power @ covariances[i] @ h.T
            rows[i][j] = rows[j][i].T
            power = f @ power
        rows[i][i] = rows[i][i] + m["observation_noise"]
    covariance = torch.cat([torch.cat(row, 1) for row in rows])
    mean = torch.cat([h @ x for x in means])
    seen = ~y.flatten().isnan()
    whole = torch.distributions.MultivariateNormal(mean[seen], covariance[seen][:, seen])
    return whole.log_prob(y.flatten()[seen])


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("how", [{}, {"slots": 2}, {"chunk": 3, "slots": 1}])
def test_the_likelihood_of_a_filter_is_that_of_all_rows_at_once(gaps: bool, how: dict[str, Any]) -> None:
    matrices = gaussian()
    y = numbers(7, 2, seed=7)
    if gaps:
        y[2, 0] = y[4] = y[6, 1] = torch.nan
    wanted = list(matrices.values())
    expected = joint_density(y, matrices)
    found = state_space.kalman_filter(y, **matrices, **how).log_likelihood
    assert_close([found], [expected])

    def symmetric(g: list[Tensor]) -> list[Tensor]:
        """A covariance has one derivative along a symmetric direction; how its halves share it is a matter of taste."""
        return [(x + x.T) / 2 if i in (2, 3, 5) else x for i, x in enumerate(g)]

    of_filter = symmetric(list(torch.autograd.grad(found, wanted)))
    assert_close(of_filter, symmetric(list(torch.autograd.grad(expected, wanted))), places=50_000)


def test_a_batch_of_series_is_filtered_at_once_and_the_mean_is_the_best_guess() -> None:
    matrices = {name: x.detach() for name, x in gaussian().items()}
    y = numbers(3, 6, 2, seed=8)
    y[1, 3] = torch.nan
    together = state_space.kalman_filter(y, **matrices)
    for b in range(3):
        alone = state_space.kalman_filter(y[b], **matrices)
        assert_close([x[b] for x in together], list(alone))
    h, r, p = (matrices[name] for name in ("observation", "observation_noise", "covariance"))
    first = matrices["mean"] + p @ h.T @ torch.linalg.solve(h @ p @ h.T + r, y[0, 0] - h @ matrices["mean"])
    assert_close([together.mean[0, 0]], [first])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: state_space.S4D(3, rule="euler"),
            ValueError,
            "rule='euler' is unknown.*'zero_order_hold', 'bilinear'",
        ),
        (lambda: state_space.S4D(3, start="lges"), ValueError, "did you mean 'legs'"),
        (lambda: state_space.S5(3, dt=(0.1, 0.01)), ValueError, r"dt=\(0.1, 0.01\) is no range of step sizes"),
        (lambda: state_space.LRU(3, ring=(0.9, 1.0)), ValueError, "inside the unit circle"),
        (
            lambda: state_space.S5(3)(torch.zeros(4, 3)),
            ValueError,
            r"u has the shape \(4, 3\); give \(batch, length, 3\)",
        ),
        (lambda: state_space.S5(3)(torch.zeros(2, 4, 3), lengths=[1, 5]), ValueError, "2 integers between 0 and 4"),
        (lambda: state_space.ODECell(2, 3, method="rk5"), ValueError, "method='rk5' is unknown"),
        (
            lambda: state_space.Recurrent(nn.GRUCell(2, 3), 2, 3)(torch.zeros(1, 4, 2), elapsed=torch.ones(4)),
            ValueError,
            r"elapsed has the shape \(4,\); give \(batch, length\), \(1, 4\)",
        ),
        (
            lambda: state_space.kalman_filter(torch.zeros(4, 2), **(gaussian() | {"observation": torch.zeros(3, 3)})),
            ValueError,
            r"observation has the shape \(3, 3\); with 3 states and 2 outputs give \(2, 3\)",
        ),
        (lambda: state_space.kalman_filter(torch.zeros(4), **gaussian()), ValueError, r"y has the shape \(4,\)"),
        (
            lambda: state_space.kalman_filter(torch.zeros(4, 2), **(gaussian() | {"mean": torch.zeros(4, 3)})),
            ValueError,
            r"mean has the shape \(4, 3\); give \(states,\) or \(batch, states\), with a batch of 1",
        ),
        (
            lambda: state_space.kalman_filter(torch.zeros(4, 2), **gaussian()),
            TypeError,
            r"mean is of torch.float64 and y of torch.float32",
        ),
    ],
)
def test_a_wrong_call_gets_a_sentence(call: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
