"""Steady states: where f(t, y, p) = 0, and their derivatives by the implicit function theorem.

dy/dp = -J^{-1} f_p,    J = f_y:    dL/dp = -f_p^T w  with  J^T w = dL/dy,    one transposed solve for all parameters
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from adjoint.captured import transformed
from adjoint.names import named
from adjoint.sparse import Products, iterated
from adjoint.tensors import State, Structure, differentiable, refuse_writing, versions_of
from adjoint.timeline import SolveError

METHODS = ("pseudo_transient", "newton")
MOST_DENSE = 500
"""Numbers in a state up to which the Jacobian is made as a matrix, unless it is said how."""


@dataclass(frozen=True)
class SteadyState:
    """``y``: a tree like y0, on torch's graph as a function of all that f depends on (but not of y0)."""

    y: Any
    residual: float
    """The root mean square of f there."""
    iterations: int
    evaluations: int
    """Calls of f."""
    growth: float | None
    """The largest real part of J's eigenvalues: the state is stable if it is negative. None if J was never made."""


def steady_state(
    f: Callable[..., Any],
    y0: Any,
    *,
    args: tuple[Any, ...] = (),
    t: float = 0.0,
    method: str = "pseudo_transient",
    linear: str | None = None,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    max_steps: int = 200,
) -> SteadyState:
    """A state at which dy/dt = f(t, y, *args) stands still, near y0, with exact gradients in all that f depends on.

    Args:
        f: as in :func:`adjoint.solve`; t stays what it is.
        y0: where to begin, a tree of tensors. An isolated steady state does not depend on it: its gradient is nothing.
        method: "pseudo_transient" (implicit steps in time that grow as f falls, and end as Newton's: it follows the
            solution roughly, so a stable state is what it finds, as a rule) or "newton" (with a line search: the nearest
            root, stable or not).
        linear: "dense" (J as a matrix) or "krylov" (GMRES, with products alone); None: dense up to 500 numbers.
        rtol, atol: how small Newton's last correction is, beside y.
        max_steps: of either method.

    Raises:
        SolveError: if no steady state is found, or J is singular there (states are not isolated: eliminate a conserved
            quantity), so that it has no derivative.

    Source: Kelley & Keyes (1998), SIAM J. Numer. Anal. 35(2), 508-523 (pseudo-transient continuation, by "switched
    evolution relaxation").
    """
    named("method", method, dict.fromkeys(METHODS))
    if transformed():
        raise NotImplementedError("steady_state cannot be had inside a torch.func transform; use torch.autograd.grad")
    if not isinstance(args, tuple):
        raise TypeError(f"args={args!r} must be a tuple; for a single argument write args=(x,)")
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol={rtol}, atol={atol}: give positive tolerances, such as rtol=1e-10, atol=1e-12")
    structure, state = Structure.of(y0, "y0")
    for x in state:
        if not differentiable(x) or x.real.dtype != state[0].real.dtype or x.device != state[0].device:
            raise TypeError("the leaves of y0 must be real or complex numbers of one precision, on one device")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("y0 holds a NaN or an infinity; give finite numbers to begin with")
    field = _Field(f, args, structure, state, t)
    size = field.begin.numel()
    kinds: dict[str, type[_Linear]] = {"dense": _Dense, "krylov": _Krylov}
    kind = named("linear", linear or ("dense" if size <= MOST_DENSE else "krylov"), kinds)
    x, iterations = _found(field, kind, method == "newton", rtol, atol, max_steps)
    system = kind(field, x)
    residual = field.value_of(x)
    if torch.is_grad_enabled():
        value = field.on_graph(x)
        if value.requires_grad:
            system.check_regular(x)
            x = _Root.apply(value, x, system)
    y = structure.unflatten(field.leaves(x))
    return SteadyState(y, _rms(residual), iterations, field.evaluations, system.growth())


class _Field:
    """f as a function of one real vector."""

    def __init__(
        self, f: Callable[..., Any], args: tuple[Any, ...], structure: Structure, like: State, t: float
    ) -> None:
        self.f, self.args, self.structure, self.like = f, args, structure, like
        self.begin = self._flat(tuple(x.detach() for x in like))
        self.t = torch.tensor(t, dtype=self.begin.dtype, device=self.begin.device)
        self.evaluations = 0

    def _flat(self, leaves: State) -> Tensor:
        return torch.cat([(torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).reshape(-1) for x in leaves])

    def leaves(self, x: Tensor) -> State:
        found, begin = [], 0
        for like in self.like:
            size = like.numel() * (2 if like.is_complex() else 1)
            part, begin = x[begin : begin + size], begin + size
            part = torch.view_as_complex(part.reshape(-1, 2).contiguous()) if like.is_complex() else part
            found.append(part.reshape(like.shape))
        return tuple(found)

    def on_graph(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        state = self.leaves(x)
        versions = versions_of(state)
        leaves = self.structure.flatten(self.f(self.t, self.structure.unflatten(state), *self.args), "the value of f")
        if versions_of(state) != versions:
            refuse_writing("f changed its state")
        for a, b in zip(leaves, self.like, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ValueError(
                    f"f returned shape {tuple(a.shape)} and {a.dtype} for a state of shape {tuple(b.shape)} and {b.dtype}"
                )
        return self._flat(leaves)

    def value_of(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.on_graph(x)

    def graph_at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A point and f there, with the graph between them and none beyond."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            value = self.on_graph(point)
        if not value.requires_grad:
            value = value + 0 * point
        return point, value


class _Linear(Protocol):
    """J at a point, and solves with it."""

    def __init__(self, field: _Field, x: Tensor) -> None: ...

    value: Tensor
    """f there."""

    def solve(self, b: Tensor, shift: float) -> Tensor:
        """s with (shift - J) s = b."""
        ...

    def transposed(self, b: Tensor) -> Tensor:
        """w with J^T w = b."""
        ...

    def check_regular(self, x: Tensor) -> None: ...

    def growth(self) -> float | None: ...


class _Dense:
    def __init__(self, field: _Field, x: Tensor) -> None:
        point, value = field.graph_at(x)
        self.value = value.detach()
        seeds = torch.eye(len(value), dtype=value.dtype, device=value.device).unbind()
        rows = [torch.autograd.grad(value, point, e, retain_graph=True, allow_unused=True)[0] for e in seeds]
        self.jacobian = torch.stack([torch.zeros_like(point) if r is None else r for r in rows])

    def solve(self, b: Tensor, shift: float) -> Tensor:
        one = torch.eye(len(b), dtype=b.dtype, device=b.device)
        found, singular = torch.linalg.solve_ex(shift * one - self.jacobian, b)
        return torch.full_like(b, torch.nan) if int(singular) else found

    def transposed(self, b: Tensor) -> Tensor:
        return torch.linalg.solve(self.jacobian.T, b)

    def check_regular(self, x: Tensor) -> None:
        sizes = torch.linalg.svdvals(self.jacobian)
        if not float(sizes[-1]) > 10 * len(sizes) * torch.finfo(sizes.dtype).eps * float(sizes[0]):
            raise _singular(f"its singular values go from {float(sizes[0]):.2e} down to {float(sizes[-1]):.2e}")

    def growth(self) -> float | None:
        return float(torch.linalg.eigvals(self.jacobian).real.max())


class _Krylov:
    def __init__(self, field: _Field, x: Tensor) -> None:
        point, graph = field.graph_at(x)
        self.value = graph.detach()
        self._products = Products(graph, point)

    def push(self, v: Tensor) -> Tensor:
        """J v"""
        return self._products.along(v)

    def solve(self, b: Tensor, shift: float) -> Tensor:
        return iterated(lambda v: shift * v - self.push(v), b, 1e-4, min(len(b), 100), 20)[0]

    def transposed(self, b: Tensor) -> Tensor:
        tolerance = 100 * torch.finfo(b.dtype).eps
        w, _ = iterated(self._products.transposed, b, tolerance, min(len(b), 100), 20)
        off = float((self._products.transposed(w) - b).norm()) / max(float(b.norm()), torch.finfo(b.dtype).tiny)
        if not off <= 1e4 * tolerance:
            raise _singular(f"GMRES leaves {off:.1e} of the right-hand side in J^T w = dL/dy")
        return w

    def check_regular(self, x: Tensor) -> None:
        """That is seen when the transposed system is solved."""

    def growth(self) -> float | None:
        return None


def _singular(how: str) -> SolveError:
    return SolveError(
        "singular",
        f"the Jacobian is singular at the steady state ({how}): states are not isolated, and have no derivative. Put a "
        f"conserved quantity (a total amount, say) in place of one of the equations",
        t=math.nan,
        step=-1,
    )


def _found(field: _Field, kind: type[_Linear], newton: bool, rtol: float, atol: float, most: int) -> tuple[Tensor, int]:
    """The steady state as a vector, and in how many steps."""
    x = field.begin
    size = before = _rms(field.value_of(x))
    step = math.inf if newton else 0.1 * max(_rms(x), 1e-3) / max(size, 1e-300)
    for k in range(most):
        if size == 0.0:
            return x, k
        system = kind(field, x)
        change = system.solve(system.value, 0.0 if newton else 1 / step)
        share, moved, after = 1.0, x + change, math.nan
        for _ in range(20 if newton else 1):
            moved = x + share * change
            after = _rms(field.value_of(moved))
            if after < size:
                break
            share /= 2
        small = share * _rms(change) <= atol + rtol * _rms(moved)
        if not math.isfinite(after) or (newton and after >= size and not small):
            step /= 10
            if newton or step < 1e-14:
                break
            continue
        x, before, size = moved, size, after
        if small and (newton or step * 1e-3 > 1 / max(_scale(system), 1e-300)):
            return x, k + 1
        step *= min(max(1.5 * before / max(after, 1e-300), 0.5), 1e3)
    raise SolveError(
        "no_steady_state",
        f"no steady state found in {most} steps of {'newton' if newton else 'pseudo_transient'}: the root mean square of f "
        f"is still {size:.3g}; begin nearer, solve in time first and begin from there, or try the other method",
        t=field.t.item(),
        step=most,
        state=field.leaves(x),
    )


def _scale(system: Any) -> float:
    """The rate at which things change: of pseudo-time, to tell a long step."""
    value = system.value
    v = torch.ones_like(value) / len(value) ** 0.5
    product = system.jacobian @ v if isinstance(system, _Dense) else system.push(v)
    return float(product.norm())


def _rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


class _Root(torch.autograd.Function):
    """The root x of a function as a function of its value there: dx = -J^{-1} d(value)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, x: Tensor, system: _Linear) -> Tensor:
        ctx.system = system
        ctx.save_for_backward(value)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        (value,) = ctx.saved_tensors
        return _Transposed.apply(cotangent, value, ctx.system), None, None


class _Transposed(torch.autograd.Function):
    """It depends on ``value`` too, so that a second derivative comes here and is refused."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, value: Tensor, system: _Linear) -> Tensor:
        return -system.transposed(cotangent)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "the gradient of steady_state has no derivative itself; take finite differences of it"
        )
