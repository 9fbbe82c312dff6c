"""Pleiades and the pulse of a CNOT gate against references that share no code with the solver."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint.measure import differentiate
from adjoint.problems import PROBLEMS, reference_of

D = torch.float64


def test_pleiades_at_the_end_is_that_of_the_reference() -> None:
    case, known = PROBLEMS["pleiades"].case(), reference_of("pleiades")
    assert known is not None
    with torch.no_grad():
        how = {"method": "dopri8", "rtol": 1e-13, "atol": 1e-13}
        ours = adjoint.solve(case.f, case.y0, [0.0, 3.0], args=case.args, **how).ys[-1]
    torch.testing.assert_close(ours, known.state, rtol=1e-9, atol=1e-9)


def test_the_fidelity_and_its_gradient_are_those_of_exponentials() -> None:
    case = PROBLEMS["cnot"].case(4)
    pulse = case.parameters["pulse"]
    one, x = torch.eye(2, dtype=torch.complex128), torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
    y, z = 1j * torch.tensor([[0, -1], [1, 0]], dtype=torch.complex128), torch.diag(torch.tensor([1, -1])).to(one)
    controls = torch.stack([torch.kron(x, one), torch.kron(y, one), torch.kron(one, x), torch.kron(one, y)])
    u = torch.eye(4, dtype=torch.complex128)
    for row in pulse:
        u = torch.matrix_exp(-0.55j * (torch.kron(z, z) + (row[:, None, None] * controls).sum(0))) @ u
    gate = torch.eye(4, dtype=torch.complex128)[[0, 1, 3, 2]]
    expected = 1 - (gate.T @ u).trace().abs() ** 2 / 16
    how = {"method": "rk4", "dt": 0.55 / 40, "jumps": case.t.tolist(), "slots": 10}
    found = differentiate(lambda c: adjoint.solve(c.f, c.y0, c.t, args=c.args, **how), case)
    assert found.loss == pytest.approx(expected.item(), abs=1e-7)
    known = torch.autograd.grad(expected, pulse)[0]
    torch.testing.assert_close(found.gradient["pulse"], known, rtol=1e-6, atol=1e-7)
