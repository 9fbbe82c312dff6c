"""``odeint`` and its family with torchdiffeq's signatures: change the import, and the exact gradient is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adjoint.call import Call
from adjoint.events import EventFunction
from adjoint.gradients import gradient_named, is_backprop
from adjoint.interpolate import DenseSolution
from adjoint.options import METHODS
from adjoint.problem import Gradient
from adjoint.scipy_solver import Scipy
from adjoint.transforms import leaves_of_tree, mapped, through_transforms, tree_of_leaves


def _follows_transforms(arguments: dict[str, Any]) -> bool:
    """Torch's own graph does; but events, scipy, controlled steps and convergence ask for numbers, which vmap has none of."""
    method = arguments["method"]
    numbers = arguments["event_fn"] is not None or method == Scipy.name or (mapped() and not _plain(method))
    return is_backprop(arguments["gradient"]) and not numbers


def _plain(method: str | None) -> bool:
    """Whether its steps depend on no numbers."""
    found = METHODS.get(method or "dopri5")
    return found is not None and not found.adaptive and not getattr(found, "implicit", False)


@through_transforms(leaves_of_tree, tree_of_leaves, _follows_transforms)
def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunction | None = None,
    args: tuple[Any, ...] = (),
    slots: int | str | None = None,
    budget: int | str | None = None,
    gradient: str | Gradient = "backprop",
) -> Any:
    """The solution of dy/dt = func(t, y, *args) at the times ``t``, like torchdiffeq's: a tree like y0 with the times
    as the leading dimension of its leaves, on torch's own graph, so that derivatives of any order work.

    Besides torchdiffeq's arguments: ``args``, and ``gradient``, ``slots``, ``budget`` as in :func:`adjoint.solve`.
    ``rtol`` and ``atol`` are numbers, tensors that fit y0, or one of these for each leaf. Attributes ``callback_step``,
    ``callback_accept_step`` and ``callback_reject_step`` of func are called with (t, y, dt). Options:

    - fixed steps: ``step_size``, ``grid_constructor``, ``interp``, ``perturb``; for Adams methods also ``max_order``,
      ``max_iters``, ``implicit``;
    - controlled ones: ``first_step``, ``safety``, ``ifactor``, ``dfactor``, ``max_num_steps``, ``min_step``,
      ``max_step``, ``jump_t``, ``step_t``, ``dtype``, ``norm``;
    - ``method="scipy_solver"``: ``solver`` ("LSODA", "RK45", "RK23", "DOP853", "Radau", "BDF" or a class), ``min_step``,
      ``max_step``. Its gradient is the continuous adjoint along scipy's own interpolant, solved backwards by scipy too: first
      derivatives only, and as exact as the tolerances.

    With ``event_fn`` the solve runs from t[0], in the direction of t[1] and beyond it, until event_fn(t, y) changes its
    sign, and the result is (time of the event, solution at t[0] and there): see :func:`odeint_event`.
    """
    call = Call.of(func, y0, args, method, options, (slots, budget), gradient_named(gradient))
    return call.values(t, rtol, atol) if event_fn is None else call.until(t, rtol, atol, event_fn)


@through_transforms(leaves_of_tree, tree_of_leaves, _follows_transforms)
def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    event_fn: EventFunction | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
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
    nothing, unless ``gradient="backsolve"`` asks for the continuous adjoint; ``adjoint_options={"norm": "seminorm"}``
    then leaves the parameters out of its error. ``adjoint_params`` is not needed: the tensors that func holds are
    found. They, and those given there, get zeros as gradients if func does not use them. Attributes
    ``callback_step_adjoint``, .. of func are called with (t, (0, y, its cotangent, those of the parameters ..), dt).
    """
    how = gradient_named(gradient)
    declared = tuple(x for x in adjoint_params or () if x.requires_grad)
    call = Call.of(func, y0, args, method, options, (slots, budget), how, zeros=True, declared=declared)
    call = call.backwards(adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options)
    return call.values(t, rtol, atol) if event_fn is None else call.until(t, rtol, atol, event_fn)


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Any,
    *,
    event_fn: EventFunction,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """The time at which event_fn(t, y) first changes its sign after t0 (before it with ``reverse_time``), and the
    solution at t0 and at that time, as the leading dimension of its leaves.

    Signs are compared at the ends of steps; where there are several components, the first that changes its sign is the
    event, and one that is zero at t0 is one at once. Both results are exact functions of everything that the solution
    and event_fn depend on: the derivative of the time is that of the root of event_fn along the interpolant that was
    computed. ``odeint_interface`` is :func:`odeint` or :func:`odeint_adjoint`, or a partial of them; ``kwargs`` go to
    it. Fixed steps need ``options={"step_size": ..}``. Raises SolveError if no event is met in 20,000 fixed steps, or in
    ``max_num_steps`` controlled ones (100,000).
    """
    inner = getattr(odeint_interface, "func", odeint_interface)
    if (getattr(inner, "__module__", "") or "").partition(".")[0] == "torchdiffeq":
        raise ValueError(
            f"odeint_interface={inner.__name__} of torchdiffeq gives event times without derivatives; "
            f"give adjoint.odeint or adjoint.odeint_adjoint"
        )
    start = t0.reshape(-1) if isinstance(t0, Tensor) else torch.tensor([float(t0)], dtype=torch.float64)
    if len(start) != 1:
        raise ValueError(f"t0 has shape {tuple(t0.shape)}; give a single time")
    t = torch.cat((start, start.detach() + (-1.0 if reverse_time else 1.0)))
    time, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    return time, solution


def odeint_dense(
    func: Callable[..., Any],
    y0: Any,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    args: tuple[Any, ...] = (),
    slots: int | str | None = None,
    budget: int | str | None = None,
    gradient: str | Gradient = "backprop",
) -> DenseSolution:
    """The solution of dy/dt = func(t, y, *args) from t0 to t1 as a function of time, with gradients to everything.

    Call the result with times of any shape between t0 and t1: it gives a tree like y0, the times' shape leading. Any
    method of :func:`odeint` serves; fixed steps need ``step_size`` or ``grid_constructor``, and are joined by cubics
    unless ``interp="linear"``.
    """
    if mapped() and not _plain(method):
        raise NotImplementedError(
            f"odeint_dense cannot give a function of time for each member under vmap with method={method!r}; ask "
            f"odeint for the times, or take a method of fixed steps such as 'rk4'"
        )
    options = dict(options or {})
    if method in METHODS and not METHODS[method].adaptive:
        options.setdefault("interp", "cubic")
    call = Call.of(func, y0, args, method, options, (slots, budget), gradient_named(gradient))
    return call.dense(t0, t1, rtol, atol)
