"""The stiff problems: written twice, solved to ten digits in two ways, and differentiated exactly by every family."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch import Tensor

import adjoint
from adjoint import check
from adjoint.cases import Case
from adjoint.compare import error, every_way, stored
from adjoint.measure import Recipe
from adjoint.problems import PROBLEMS, reference_of
from benchmarks.references import __main__ as references
from benchmarks.references.collocation import radau
from benchmarks.references.fields import FIELDS
from benchmarks.stiff import problems as stiff

STORED = json.loads((files("adjoint") / "data" / "references.json").read_text())["problems"]
CHEAP = ("robertson", "robertson_dae", "hires", "relaxation:1000", "hodgkin_huxley")
SHORT = {
    "robertson": 1e-2,
    "robertson_dae": 1e-2,
    "hires": 0.03,
    "pollution": 1e-2,
    "oregonator": 0.1,
    "relaxation": 1e-2,
    "brusselator": 0.05,
    "hodgkin_huxley": 0.1,
    "pleiades": 0.1,
}
"""Ends that a few steps reach."""
SMALLER = {"brusselator": 3}


def known(name: str) -> tuple[str, Case, adjoint.problems.Known]:
    stem, _, size = name.partition(":")
    number = int(size) if size else None
    reference = reference_of(stem, number)
    assert reference is not None
    return stem, PROBLEMS[stem].case(number), reference


@pytest.mark.parametrize("name", FIELDS)
def test_a_right_hand_side_is_that_of_a_second_writing(name: str) -> None:
    case = PROBLEMS[name].case()
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        y = case.y0.detach() + torch.rand(case.y0.shape, generator=draw, dtype=torch.float64)
        p = [x.detach() * (1 + torch.rand(x.shape, generator=draw, dtype=torch.float64)) for x in case.args]
        ours = case.f(torch.zeros(()), y, *p).flatten().numpy()
        theirs = FIELDS[name].f(y.numpy().ravel(), np.concatenate([x.numpy().ravel() for x in p]))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14 * np.abs(theirs).max())


def test_every_problem_written_twice_has_a_reference() -> None:
    assert {name.partition(":")[0] for name in STORED} == set(FIELDS)
    assert {problem.name for problem in PROBLEMS.values() if problem.stiff} <= set(FIELDS)


@pytest.mark.parametrize("name", STORED)
def test_both_ways_agree_to_ten_digits(name: str) -> None:
    of_states, of_gradients = known(name)[2].agreement
    assert of_states < 1e-10
    # with mu = 1e6 the sensitivities swell by 1e12 in each jump, of which extended precision keeps seven digits
    assert of_gradients < (1e-6 if name == "relaxation:1000000" else 1e-10)


@pytest.mark.parametrize("name", CHEAP)
def test_a_reference_is_what_its_script_computes(name: str) -> None:
    stem, case, reference = known(name)
    found = references.exactly(case, stem, stages=7, tolerance=1e-9)
    np.testing.assert_allclose(found.y.astype(float), reference.state.numpy().ravel(), rtol=1e-13)
    loss, gradient = references.of_loss(case, found.y, found.sensitivity)
    assert loss == pytest.approx(reference.loss, rel=1e-13)
    stored = np.concatenate([x.numpy().ravel() for x in reference.gradient.values()])
    scale = references.scales(case, reference.state.numpy())
    assert references.far(gradient.astype(float), stored, scale) < 1e-10


@pytest.mark.parametrize("stages", [1, 2, 3, 7, 9])
def test_collocation_meets_the_simplifying_assumptions(stages: int) -> None:
    c, a = radau(stages)
    rounding = 4 * stages * np.finfo(np.longdouble).eps
    powers = np.arange(1, 2 * stages, dtype=np.longdouble)
    np.testing.assert_allclose(a[-1] @ c[:, None] ** (powers - 1), 1 / powers, rtol=rounding)  # B(2 s - 1)
    inner = powers[:stages]
    np.testing.assert_allclose(a @ c[:, None] ** (inner - 1), c[:, None] ** inner / inner, atol=rounding)  # C(s)


@pytest.mark.parametrize("name", ["robertson", "hires", "pollution"])
def test_states_come_near_the_reference_as_the_tolerance_falls(name: str) -> None:
    stem, case, reference = known(name)
    problem = PROBLEMS[stem]
    size = reference.state.abs() + (problem.small or 1.0)
    off = []
    for rtol in (1e-3, 1e-6):
        with torch.no_grad():
            y = adjoint.solve(
                case.f, case.y0, case.t[[0, -1]], args=case.args, method=problem.method, **problem.tolerances(rtol)
            ).ys[-1]
        off.append(float(((y - reference.state).abs() / size).max()))
    assert off[1] < 10 * 1e-6
    assert off[1] < off[0] / 10


@pytest.mark.parametrize("method", ["kvaerno5", "radau5", "rodas5p"])
@pytest.mark.parametrize("name", SHORT)
def test_the_discrete_gradient_is_the_tangent_of_the_same_steps(name: str, method: str) -> None:
    problem = PROBLEMS[name]
    case = problem.case(SMALLER.get(name))
    if case.mass is not None and method == "kvaerno5":
        pytest.skip("begins with an explicit stage")
    ends = torch.tensor([0.0, SHORT[name]], dtype=torch.float64)
    reference = reference_of(name, SMALLER.get(name))
    last = torch.ones_like(case.y0) if reference is None else reference.state
    sizes = [torch.where(case.y0 == 0, last, case.y0).detach().abs(), *(x.detach().abs() for x in case.args)]
    weights = 1 / (case.y0.detach().abs() + (problem.small or 1.0))

    def loss(*changes: Tensor, gradient: str = "discrete") -> Tensor:
        """Of relative changes of the inputs."""
        pairs = zip(case.inputs.values(), changes, sizes, strict=True)
        y0, *parameters = (x.detach() + change * size for x, change, size in pairs)
        if case.mass is not None:  # the algebraic equation is to hold at first
            y0 = torch.cat((y0[:2], 1 - y0[:2].sum(0, keepdim=True)))
        how = problem.tolerances(1e-2) | {"method": strict(case, method), "gradient": gradient}
        return (adjoint.solve(case.f, y0, ends, args=tuple(parameters), **how).ys[-1] * weights).square().sum()

    changes = [torch.zeros_like(x, requires_grad=True) for x in case.inputs.values()]
    with adjoint.frozen_steps() as steps:
        found = []
        for gradient in ("discrete", "tangent"):
            slopes = torch.autograd.grad(loss(*changes, gradient=gradient), changes)
            found.append(torch.cat([x.flatten() for x in slopes]))
            steps.rewind()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10 * float(found[0].abs().max()))
    if method == "radau5":  # a loss is solved anew for each remainder
        assert check.taylor_test(loss, changes, h=1e-3, halvings=5).slope == pytest.approx(2, abs=0.05)


def strict(case: Case, method: str) -> adjoint.Implicit:
    """A method whose values are those of the equations of its stages, of which its gradient is the gradient."""
    return replace(case.suited(method), newton=adjoint.Newton(kappa=1e-8))


def test_a_recipe_takes_the_mass_matrix_and_tolerances_of_its_problem() -> None:
    recipe = Recipe("robertson_dae", options={"rtol": 1e-4})
    case = replace(recipe.case(), t=torch.tensor([0.0, 1.0], dtype=torch.float64))
    solution = recipe.solved(case)
    assert float(solution.ys[-1].detach().sum()) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="knows no mass matrix"):
        case.suited("tsit5")
    with pytest.raises(ValueError, match="did you mean 'radau5'"):
        case.suited("radau6")


def test_ten_thousand_numbers_of_the_brusselator_are_a_sparse_system() -> None:
    case = PROBLEMS["brusselator"].case(5000)
    assert case.y0.numel() == 10_000
    assert case.linear is not None
    assert case.linear.colours < 8


@pytest.mark.parametrize("name", [name for name in SHORT if name not in ("brusselator", "pleiades")])
def test_a_batch_is_its_members(name: str) -> None:
    case = PROBLEMS[name].case()
    factors = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    y = (case.y0.detach() + 0.1) * factors[:, None]
    parameters = [x.detach() * factors.reshape(3, *[1] * x.ndim) for x in case.args]
    together = case.f(factors, y, *parameters)
    each = [case.f(factors[i], y[i], *(x[i] for x in parameters)) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(each), rtol=1e-14, atol=0)


@pytest.mark.parametrize("problem", stiff.PROBLEMS.values(), ids=stiff.PROBLEMS)
def test_the_problems_of_the_peers_are_the_named_ones(problem: stiff.Stiff) -> None:
    case, (y0, p) = problem.case, problem.inputs(3)
    np.testing.assert_array_equal(y0[0], case.y0.detach().numpy())
    y = torch.tensor(y0[1] + 0.1)
    arguments = (torch.tensor(p[1]),) if problem.name == "pollution" else tuple(torch.tensor(p[1]))
    ours = case.f(torch.zeros(()), y, *arguments).numpy()
    np.testing.assert_allclose(ours, problem.f(y.tolist(), p[1].tolist()), rtol=1e-12, atol=1e-14 * abs(ours).max())
    if problem.name == "pollution":
        partners, made = stiff.reactions()
        arrays = (p[1] * np.append(y.numpy(), 1.0)[partners].prod(1)) @ made
        np.testing.assert_allclose(ours, arrays, rtol=1e-12, atol=1e-14 * abs(ours).max())
    last = y[None].requires_grad_()
    (slope,) = torch.autograd.grad(case.loss(last), last)
    seen = 1 / float(y[problem.seen]) if problem.logarithm else 1.0
    assert slope.abs().sum() == pytest.approx(seen)
    assert float(slope[0, problem.seen]) == pytest.approx(seen)


def test_a_first_guess_that_the_time_cannot_resolve_is_lengthened() -> None:
    near = torch.tensor([1 - 1e-7], dtype=torch.float64)  # so fast and so near that f is large, and its error small
    solution = adjoint.solve(lambda t, y: -1e16 * (y - 1), near, [4e6, 4e6 + 1], method="radau5")
    assert float(solution.ys[-1]) == pytest.approx(1, abs=1e-6)


def test_every_gradient_is_compared_where_it_applies() -> None:
    names = {name: [way.name for way in every_way(4, Recipe(name))] for name in ("robertson", "lorenz", "pleiades")}
    common = {
        "discrete",
        "discrete, 4 slots",
        "backsolve",
        "interpolating",
        "quadrature",
        "gauss",
        "backprop",
        "tangent",
    }
    assert set(names["robertson"]) == common
    assert set(names["lorenz"]) == common | {"torchdiffeq adjoint", "torchdiffeq backprop"}
    assert set(names["pleiades"]) - set(names["lorenz"]) == {"discrete, yoshida4", "reversible, yoshida4"}


def test_steps_that_are_undone_give_the_gradient_of_steps_that_are_kept() -> None:
    recipe = Recipe("pleiades")
    case = replace(recipe.case(), t=torch.tensor([0.0, 0.5], dtype=torch.float64))
    ways = {way.name: way for way in every_way(4, recipe)}
    kept, undone = (ways[f"{name}, yoshida4"].at("dopri8", 1e-3)(case).gradient for name in ("discrete", "reversible"))
    for name, x in kept.items():
        torch.testing.assert_close(x, undone[name], rtol=0, atol=1e-9 * float(x.abs().max()))


def test_a_stiff_problem_is_compared_with_its_stored_gradient() -> None:
    recipe = Recipe("robertson")
    true = stored(recipe)
    assert true is not None and true.agreement < 1e-10
    assert stored(Recipe("relaxation", 500)) is None
    (discrete, *_) = every_way(4, recipe)
    found = discrete.at("kvaerno5", 1e-3)(recipe.case()).gradient
    assert 1e-8 < error(found, true.gradient, true.scales) < 1e-2
