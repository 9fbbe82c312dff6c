"""``odeint`` and ``odeint_adjoint`` with torchdiffeq's signatures: change the import, and the exact gradient is there.

Names mean what they mean in torchdiffeq 0.2.5 and in its repository: ``rk4`` is the 3/8 rule, fixed steps interpolate
linearly unless ``interp="cubic"``, and the step size is controlled by the error of the last step alone.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adjoint.gradients import gradient_named
from adjoint.names import named
from adjoint.problem import Gradient, Problem, check_memory
from adjoint.solve import checked_times, steps_of
from adjoint.steppers.explicit import Control, Tolerance, explicit_program
from adjoint.tableaus import METHODS as TABLEAUS
from adjoint.tableaus import Tableau
from adjoint.tensors import Structure, leaves_of
from adjoint.timeline import Controller

METHODS: dict[str, Tableau] = {
    **{name: TABLEAUS[name] for name in ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")},
    **{name: TABLEAUS[name] for name in ("euler", "midpoint", "heun2", "heun3")},
    "rk4": TABLEAUS["rk4_38"],
}

LATER = frozenset(
    [
        "explicit_adams",
        "implicit_adams",
        "fixed_adams",
        "scipy_solver",
        "implicit_euler",
        "implicit_midpoint",
        "trapezoid",
        "radauIIA3",
        "radauIIA5",
        "gl2",
        "gl4",
        "gl6",
        "sdirk2",
        "trbdf2",
    ]
)
"""Names of torchdiffeq that are not here yet."""

FIXED_OPTIONS = frozenset(("step_size", "grid_constructor", "interp", "perturb", "norm"))
ADAPTIVE_OPTIONS = frozenset(
    [
        "first_step",
        "safety",
        "ifactor",
        "dfactor",
        "max_num_steps",
        "min_step",
        "max_step",
        "jump_t",
        "step_t",
        "dtype",
        "norm",
    ]
)
CALLBACKS = {"step": "callback_step", "accept": "callback_accept_step", "reject": "callback_reject_step"}


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    args: tuple[Any, ...] = (),
    slots: int | str | None = None,
    budget: int | str | None = None,
    gradient: str | Gradient = "backprop",
) -> Any:
    """The solution of dy/dt = func(t, y, *args) at the times ``t``, like torchdiffeq's: a tree like y0 with the times
    as the leading dimension of its leaves, on torch's own graph, so that derivatives of any order work.

    Besides torchdiffeq's arguments: ``args``, and ``gradient``, ``slots``, ``budget`` as in :func:`adjoint.solve`.
    ``rtol`` and ``atol`` are numbers, tensors that fit y0, or one of these for each leaf. ``options``: for fixed steps
    ``step_size``, ``grid_constructor``, ``interp``, ``norm``; for controlled ones ``first_step``, ``safety``,
    ``ifactor``, ``dfactor``, ``max_num_steps``, ``min_step``, ``max_step``, ``jump_t``, ``step_t``, ``norm``. Time is
    kept in double precision whatever ``dtype`` says. Attributes ``callback_step``, ``callback_accept_step`` and
    ``callback_reject_step`` of func are called with (t, y, h).
    """
    structure, state = Structure.of(y0, "y0")
    times = checked_times(t, state)
    check_memory(slots, budget)
    tableau = _method(method)
    how = gradient_named(gradient)
    if len(times) == 1:
        return structure.unflatten([x[None] for x in state])
    options = dict(options or {})
    _warn_of_unused(options, tableau, method)
    tolerance = Tolerance(_per_leaf(rtol), _per_leaf(atol), _norm(options, structure))
    control = Control(tolerance, callbacks=_callbacks(func, tableau))
    if tableau.adaptive:
        control = _controlled(control, options)
    else:
        tableau = _interpolating(tableau, options.get("interp", "linear"))
        control = replace(control, grid=_grid(func, y0, times, options))
    function = (func, tuple(args))
    start = tuple(x.detach().contiguous() for x in state)
    program = explicit_program(tableau, times, structure, start, control)
    outcome = how(Problem(program, function, state, steps_of(program), slots, budget))
    if outcome.failure is not None:
        raise outcome.failure
    return structure.unflatten(outcome.outputs)


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
    args: tuple[Any, ...] = (),
    slots: int | str | None = None,
    budget: int | str | None = None,
    gradient: str | Gradient = "discrete",
) -> Any:
    """Like :func:`odeint`, with the discrete adjoint within ``slots`` or a ``budget`` as its gradient.

    Nothing is solved backwards, so ``adjoint_rtol``, ``adjoint_atol``, ``adjoint_method`` and ``adjoint_options`` say
    nothing; ``adjoint_params`` is not needed either, since the tensors that func holds are found. Pass
    ``gradient=adjoint.Backsolve(rtol=..., atol=...)`` for the continuous adjoint, with tolerances of its own.
    """
    if gradient == "backsolve" and (adjoint_rtol is not None or adjoint_atol is not None):
        gradient = replace(gradient_named(gradient), rtol=adjoint_rtol, atol=adjoint_atol)  # type: ignore[type-var]
    if adjoint_method not in (None, method):
        raise ValueError(f"adjoint_method={adjoint_method!r}: the gradient is made with the steps of method={method!r}")
    return odeint(
        func,
        y0,
        t,
        rtol=rtol,
        atol=atol,
        method=method,
        options=options,
        args=args,
        slots=slots,
        budget=budget,
        gradient=gradient,
    )


def _method(method: str | None) -> Tableau:
    if method is None:
        return METHODS["dopri5"]
    if method in LATER:
        raise NotImplementedError(f"method={method!r} is not here yet; there are {', '.join(map(repr, METHODS))}")
    return named("method", method, METHODS)


def _warn_of_unused(options: Mapping[str, Any], tableau: Tableau, method: str | None) -> None:
    unused = sorted(set(options) - (ADAPTIVE_OPTIONS if tableau.adaptive else FIXED_OPTIONS))
    if unused:
        warnings.warn(f"method={method!r} takes no options {unused}", stacklevel=3)
    if options.get("perturb"):
        raise NotImplementedError("perturb=True is not here; name the times of jumps in adjoint.solve(..., jumps=)")


def _per_leaf(tolerance: Any) -> Any:
    if isinstance(tolerance, (Tensor, float, int)):
        return tolerance
    return tuple(leaves_of(tolerance))


def _norm(options: Mapping[str, Any], structure: Structure) -> Callable[[tuple[Tensor, ...]], Any]:
    """torchdiffeq's: the root mean square of a tensor, and the largest of those of a tuple."""
    if "norm" in options:
        given = options["norm"]
        return lambda leaves: given(structure.unflatten(leaves))
    return lambda leaves: max(x.pow(2).mean().sqrt().item() if x.numel() else 0.0 for x in leaves)


def _controlled(control: Control, options: Mapping[str, Any]) -> Control:
    controller = Controller(
        proportional=0.0,
        integral=1.0,
        safety=float(options.get("safety", 0.9)),
        smallest=float(options.get("dfactor", 0.2)),
        largest=float(options.get("ifactor", 10.0)),
        min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)),
    )
    first = options.get("first_step")
    stops = [float(x) for name in ("jump_t", "step_t") if options.get(name) is not None for x in options[name]]
    return replace(
        control,
        dt=None if first is None else float(first),
        max_steps=int(options.get("max_num_steps", 2**31 - 1)),
        controller=controller,
        jumps=tuple(stops),
    )


def _interpolating(tableau: Tableau, interp: str) -> Tableau:
    if interp == "cubic":
        return tableau
    if interp != "linear":
        raise ValueError(f"options interp={interp!r} is unknown; known are 'linear', 'cubic'")
    return replace(tableau, dense=tuple((b,) for b in tableau.b), dense_order=1)


def _grid(func: Callable[..., Any], y0: Any, t: Tensor, options: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The times between which the steps are taken: multiples of step_size, the caller's own, or (None) those asked."""
    step, construct = options.get("step_size"), options.get("grid_constructor")
    if step is not None and construct is not None:
        raise ValueError("options step_size and grid_constructor were both given; one of them makes the grid")
    asked = t.tolist()
    if construct is not None:
        grid = [float(x) for x in construct(func, y0, t.detach())]
        if grid[0] != asked[0] or grid[-1] != asked[-1]:
            raise ValueError(f"grid_constructor gave {grid[0]} .. {grid[-1]}; it must start and stop where t does")
        return tuple(grid)
    if step is None:
        return None
    length = float(step)
    if not length > 0:
        raise ValueError(f"options step_size={step} is not a length of time; give a positive number")
    count = max(1, math.ceil((abs(asked[-1] - asked[0])) / length * (1 - 1e-12)))
    sign = 1.0 if asked[-1] > asked[0] else -1.0
    return (*(asked[0] + sign * length * k for k in range(count)), asked[-1])


def _callbacks(func: Callable[..., Any], tableau: Tableau) -> dict[str, Callable[[Tensor, Any, float], None]]:
    found = {what: inspect.getattr_static(func, name, None) and getattr(func, name) for what, name in CALLBACKS.items()}
    return {what: call for what, call in found.items() if call and (what == "step" or tableau.adaptive)}
