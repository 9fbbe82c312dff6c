"""torchdiffeq's method names and options, read into a method and a control of this library.

Names and options mean what they mean in torchdiffeq 0.2.5: ``rk4`` is the 3/8 rule, fixed steps interpolate linearly
unless ``interp="cubic"``, and the step size is controlled by the error of the last step alone.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adjoint.adaptive_timeline import Controller
from adjoint.implicit_method import Implicit
from adjoint.implicit_tableaus import IMPLICIT
from adjoint.methods import Method
from adjoint.names import named
from adjoint.scipy_solver import Scipy
from adjoint.steppers.adams import MULTISTEP, Adams
from adjoint.steppers.control import Control, Tolerance
from adjoint.tableaus import METHODS as TABLEAUS
from adjoint.tableaus import Tableau
from adjoint.tensors import State, Structure, differentiable, leaves_of

METHODS: dict[str, Method] = {
    **{name: TABLEAUS[name] for name in ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")},
    **{name: TABLEAUS[name] for name in ("euler", "midpoint", "heun2", "heun3")},
    "rk4": TABLEAUS["rk4_38"],
    **{name: replace(method, restart=False) for name, method in MULTISTEP.items()},
    **{
        name: Implicit(replace(IMPLICIT[own], name=name, error=None, error_order=0, filtered=0.0))
        for name, own in (
            ("implicit_euler", "backward_euler"),
            ("implicit_midpoint", "implicit_midpoint"),
            ("trapezoid", "trapezoid"),
            ("radauIIA3", "radau3"),
            ("radauIIA5", "radau5"),
            ("gl4", "gauss4"),
            ("gl6", "gauss6"),
            ("sdirk2", "sdirk2"),
            ("trbdf2", "trbdf2"),
        )
    },
}
"""By torchdiffeq's names: those of its release, and ``tsit5`` and implicit methods (of fixed steps) of its repository."""

FIXED = frozenset("step_size grid_constructor interp perturb norm".split())
ADAMS = FIXED | {"max_order", "max_iters", "implicit"}
NEWTON = FIXED | {"max_iters"}
ADAPTIVE = frozenset(
    "first_step safety ifactor dfactor max_num_steps min_step max_step jump_t step_t dtype norm".split()
)
SCIPY = frozenset("solver min_step max_step norm".split())
CALLBACKS = {"step": "callback_step", "accept": "callback_accept_step", "reject": "callback_reject_step"}

UNTIL_EVENT, FIXED_UNTIL_EVENT = 100_000, 20_000
"""Steps at most, controlled and fixed, until an event is met."""

Norm = Callable[[Any], Any]


@dataclass(frozen=True)
class Question:
    """dy/dt = func(t, y, *args) and where it starts, as options are read against it."""

    func: Callable[..., Any]
    y0: Any
    structure: Structure
    state: State

    @property
    def time_dtype(self) -> torch.dtype:
        """In which func sees the time: the real numbers of the state."""
        dtype = self.state[0].dtype
        for x in self.state[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
        return torch.empty(0, dtype=dtype).real.dtype


def scipy_named(argument: str, options: Mapping[str, Any]) -> Scipy:
    """method="scipy_solver" with those of the options that are its own."""
    unused = sorted(set(options) - SCIPY)
    if unused:
        warnings.warn(f"{argument}='scipy_solver' takes no options {unused}; it takes {sorted(SCIPY)}", stacklevel=4)
    own = {name: options[name] for name in ("solver", "min_step", "max_step") if name in options}
    return Scipy(**own)


def method_named(argument: str, method: str | None, options: Mapping[str, Any]) -> Method:
    """The method of torchdiffeq's by this name, with those of the options that are its own."""
    found = METHODS["dopri5"] if method is None else named(argument, method, METHODS)
    kinds = {Adams: ADAMS, Implicit: NEWTON}
    known = ADAPTIVE if found.adaptive else kinds.get(type(found), FIXED)
    unused = sorted(set(options) - known)
    if unused:
        warnings.warn(f"{argument}={method!r} takes no options {unused}; it takes {sorted(known)}", stacklevel=4)
    interp = options.get("interp", "linear")
    if not found.adaptive and interp not in ("linear", "cubic"):
        raise ValueError(f"options interp={interp!r} is unknown; known are 'linear', 'cubic'")
    if isinstance(found, Adams):
        own = {name: options[name] for name in ("max_order", "max_iters", "implicit") if name in options}
        return replace(found, interp=interp, **own)
    if isinstance(found, Implicit):
        return _implicit(found, interp, options)
    if not isinstance(found, Tableau) or found.adaptive or interp == "cubic":
        return found
    return replace(found, dense=tuple((b,) for b in found.b), dense_order=1)


def _implicit(method: Implicit, interp: str, options: Mapping[str, Any]) -> Implicit:
    """The implicit method with torchdiffeq's options; for interp="cubic" its own interpolant stands."""
    table, most = method.tableau, options.get("max_iters")
    if most is not None:
        method = replace(method, newton=replace(method.newton, most=most))
    if interp == "linear":
        return replace(method, method=replace(table, dense=tuple((b,) for b in table.b), dense_order=1))
    return method


def tolerance_of(question: Question, rtol: Any, atol: Any, options: Mapping[str, Any]) -> Tolerance:
    """How an error is measured: numbers or tensors for each leaf, and torchdiffeq's norm or the caller's."""
    relative, absolute = _per_leaf("rtol", rtol, question), _per_leaf("atol", atol, question)
    return Tolerance(relative, absolute, _norm(question, options))


def control_of(
    question: Question, method: Method, tolerance: Tolerance, options: Mapping[str, Any], times: Tensor | None
) -> Control:
    """How the steps are chosen. ``times``: those asked for; None for a solve whose end is not known."""
    control = Control(tolerance, time_dtype=question.time_dtype, perturb=bool(options.get("perturb", False)))
    if method.adaptive:
        if times is None:
            return _controlled(control, options, 1, UNTIL_EVENT)
        return _controlled(control, options, len(times) - 1, 2**31 - 1)
    return _gridded(control, question, options, times)


def callbacks_of(func: Callable[..., Any], method: Method, twins: bool = False) -> dict[str, Callable[..., None]]:
    """What func wants to be called at each step: its attributes ``callback_*``, or their ``_adjoint`` twins."""
    found = {}
    for what, name in CALLBACKS.items():
        name += "_adjoint" if twins else ""
        call = getattr(func, name, None)
        if call is not None and what != "step" and not method.adaptive:
            warnings.warn(f"method={method.name!r} has no use for {name}: its steps are fixed", stacklevel=4)
        elif call is not None:
            found[what] = call
    return found


def _norm(question: Question, options: Mapping[str, Any]) -> Callable[[State], Any]:
    """The root mean square of a tensor, and the largest of those of a tuple, unless the caller has another."""
    given = options.get("norm")
    if given is None:
        return mixed_norm
    if not callable(given):
        raise TypeError(f"options norm={given!r} is no function of a scaled error; give one, such as torch.linalg.norm")
    return lambda leaves: given(question.structure.unflatten(leaves))


def mixed_norm(leaves: State) -> float:
    """The largest root mean square of a leaf."""
    return max((x.abs().pow(2).mean().sqrt().item() if x.numel() else 0.0 for x in leaves), default=0.0)


def _per_leaf(name: str, tolerance: Any, question: Question) -> tuple[float | Tensor, ...]:
    """For every leaf a number or a tensor that fits; torchdiffeq takes flat ones, and a tensor with one for each leaf."""
    state = question.state
    if isinstance(tolerance, Tensor) and tolerance.ndim and not question.structure.single:
        given: list[Any] = list(tolerance)
    else:
        given = leaves_of(tolerance)
    if len(given) != len(state):
        if len(given) > 1:
            raise ValueError(f"{name} has {len(given)} entries and y0 {len(state)} leaves; give one number, or as many")
        given *= len(state)
    fitting = []
    for x, like in zip(given, state, strict=True):
        if isinstance(x, Tensor):
            if x.requires_grad:
                raise ValueError(f"{name} requires grad, and steps are chosen without; give {name}.detach()")
            x = x.to(like.device)
            x = x.reshape(like.shape) if x.numel() == like.numel() else x
        if not bool(torch.as_tensor(x >= 0).all()):
            raise ValueError(f"{name}={x} is no tolerance; give a number that is not negative")
        fitting.append(x)
    return tuple(fitting)


def _controlled(control: Control, options: Mapping[str, Any], intervals: int, most: int) -> Control:
    controller = Controller(
        proportional=0.0,
        integral=1.0,
        safety=float(options.get("safety", 0.9)),
        smallest=float(options.get("dfactor", 0.2)),
        largest=float(options.get("ifactor", 10.0)),
        min_step=float(options.get("min_step", 0.0)),
        max_step=float(options.get("max_step", math.inf)),
        force_min=True,
    )
    first = options.get("first_step")
    return replace(
        control,
        dt=None if first is None else float(first),
        max_steps=intervals * int(options.get("max_num_steps", most)),  # torchdiffeq counts for each interval
        controller=controller,
        jumps=_times("jump_t", options),
        stops=_times("step_t", options),
        rounding=torch.promote_types(_dtype(options), control.time_dtype or torch.float32),
    )


def _times(name: str, options: Mapping[str, Any]) -> tuple[float, ...]:
    given = options.get(name)
    if given is None:
        return ()
    times = torch.as_tensor(given, dtype=None if isinstance(given, Tensor) else torch.float64)
    if times.requires_grad:
        raise ValueError(f"options {name} requires grad, and no gradient comes back to it; give {name}.detach()")
    if times.ndim != 1 or not bool(torch.isfinite(times).all()):
        raise ValueError(f"options {name}={given} is no series of finite times")
    return tuple(times.tolist())


def _dtype(options: Mapping[str, Any]) -> torch.dtype:
    dtype = options.get("dtype", torch.float64)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"options dtype={dtype!r} is no dtype of times; give torch.float64 or torch.float32")
    return dtype


def _gridded(control: Control, question: Question, options: Mapping[str, Any], times: Tensor | None) -> Control:
    """Steps between multiples of step_size, or the caller's own grid, or (by themselves) the asked times."""
    step, construct = options.get("step_size"), options.get("grid_constructor")
    if step is not None and construct is not None:
        raise ValueError("options step_size and grid_constructor were both given; one of them makes the grid")
    if isinstance(step, Tensor) and step.requires_grad:
        raise ValueError("options step_size requires grad, and no gradient comes back to it; give step_size.detach()")
    if step is not None and not float(step) > 0:
        raise ValueError(f"options step_size={step} is not a length of time; give a positive number")
    if times is None:
        if step is None:
            raise ValueError("an event is looked for step by step; give options={'step_size': ...}, or method='dopri5'")
        return replace(control, dt=float(step), max_steps=FIXED_UNTIL_EVENT)
    if construct is not None:
        return _constructed(control, question, construct, times)
    return control if step is None else replace(control, grid=_multiples(times.tolist(), float(step)))


def _multiples(asked: list[float], length: float) -> tuple[float, ...]:
    count = max(1, math.ceil((abs(asked[-1] - asked[0])) / length * (1 - 1e-12)))
    sign = 1.0 if asked[-1] > asked[0] else -1.0
    return (*(asked[0] + sign * length * k for k in range(count)), asked[-1])


def _constructed(control: Control, question: Question, construct: Callable[..., Any], times: Tensor) -> Control:
    def grid(t: Tensor) -> Tensor:
        found = torch.as_tensor(construct(question.func, question.y0, t.to(times)))
        if found.ndim != 1 or not differentiable(found):
            raise ValueError(f"grid_constructor gave {found}; it must give a one-dimensional series of times")
        return found

    fixed = grid(times.detach())
    if fixed.requires_grad:
        raise ValueError("grid_constructor's times depend on y0 or a parameter; no gradient comes back: detach them")
    made, asked = fixed.tolist(), times.tolist()
    if made[0] != asked[0] or made[-1] != asked[-1]:
        raise ValueError(f"grid_constructor gave {made[0]} .. {made[-1]}; it must start and stop where t does")
    sign = 1.0 if asked[-1] > asked[0] else -1.0
    if any(sign * b < sign * a for a, b in itertools.pairwise(made)):
        raise ValueError("grid_constructor's times turn around; they must go on in the direction of t")
    return replace(control, grid=tuple(made), construct=grid)
