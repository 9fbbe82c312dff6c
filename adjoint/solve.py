"""``solve``: an ODE in, its solution out, differentiable with respect to everything it depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjoint.adaptive_timeline import CONTROLLERS, Controller
from adjoint.again import call_of, is_known, known, remember
from adjoint.engines.choose import EAGER, ENGINES
from adjoint.eventful import carried_out, check_events, of_states_alone, program_with_events, put_in_order
from adjoint.events import At, Event, Occurrences
from adjoint.failures import failure_of
from adjoint.gradients import gradient_named, is_backprop
from adjoint.implicit_method import Implicit, divided
from adjoint.implicit_tableau import ImplicitTableau
from adjoint.interpolating import CONTINUOUS
from adjoint.linear import Dense
from adjoint.members import MemberStats, Wishes, refuse_moving_jumps, solve_members
from adjoint.methods import NAMED, Method, program_of
from adjoint.names import named
from adjoint.observing import seen_afterwards, seen_of_members, with_cost, with_integral
from adjoint.problem import Gradient, Problem, Stats, check_memory
from adjoint.progress import Progress, progress_ticker
from adjoint.rosenbrock_tableaus import RosenbrockTableau
from adjoint.steppers.control import Control, Tolerance
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.observed import PLACES, Observed
from adjoint.steppers.symplectic import Splitting, split_function
from adjoint.tableaus import Tableau
from adjoint.tensors import State, Structure, check_dense, differentiable, map_tree
from adjoint.tiers import Kind
from adjoint.timeline import SolveError
from adjoint.transforms import leaves_of_tree, mapped, through_transforms, tree_of_leaves
from revolve import Journal, Plan, Schedule


@dataclass(frozen=True)
class Solution:
    """``ys[j]`` is the state at ``ts[j]``: a tree like y0 whose leaves have one more, leading dimension."""

    ts: Tensor
    ys: Any
    status: str | tuple[str, ...]
    """"success", "event" if a terminal one ended the solve, or why it failed: "max_steps", "underflow", "nonfinite",
    "newton", "events". Of a batch, that of each member."""
    stats: Stats | MemberStats
    plan: Plan | None
    """The schedule of the discrete adjoint and its price; None if none is used."""
    engine: str
    """Which engine took the steps, and why."""
    observed: Any = None
    """What ``observe`` returned at ``observed_ts[j]``, with one more, leading dimension; ``ys`` is the last state then."""
    observed_ts: Tensor | None = None
    last_t: float | Tensor | None = None
    last_y: Any = None
    """Of a solve that failed (``throw=False``): the last good state, without gradient, and its time; in a batch, each
    member's."""
    costs: Tensor | None = None
    """The integral of ``cost`` from t[0] on, at every time in ``ts`` (in ``observed_ts`` with ``observe``)."""
    events: tuple[Occurrences, ...] = ()
    """When each of ``events`` happened, and the states there before and after."""


def _values(solution: Solution) -> list[Tensor]:
    return leaves_of_tree(_parts(solution))


def _parts(solution: Solution) -> Any:
    happened = [(x.ts, x.before, x.after) for x in solution.events]
    return solution.ys, solution.observed, solution.costs, happened


def _with_values(
    solution: Solution, every: list[Solution], values: list[Tensor], arguments: dict[str, Any]
) -> Solution:
    """A solution with other values; of a mapped solve the first member's, with the status of each."""
    t = arguments["t"]
    times = t if isinstance(t, Tensor) and t.is_floating_point() else solution.ts
    status: Any = solution.status if len(every) == 1 else tuple(x.status for x in every)
    times = times[..., : len(solution.ts)] if solution.events else times
    ys, observed, costs, happened = tree_of_leaves(_parts(solution), [], values, {})
    events = tuple(Occurrences(*x) for x in happened)
    return replace(solution, ts=times, ys=ys, observed=observed, costs=costs, status=status, events=events)


def _follows(arguments: dict[str, Any]) -> bool:
    """Whether torch's own graph can be had under the transforms that are on: vmap cannot ask whether a step will do."""
    method = method_asked_for(arguments["method"])
    asks = method.adaptive or getattr(method, "implicit", False)
    return is_backprop(arguments["gradient"]) and not (mapped() and asks)


@through_transforms(_values, _with_values, _follows)
def solve(
    f: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    args: tuple[Any, ...] = (),
    method: str | Method = "tsit5",
    dt: float | Tensor | None = None,
    rtol: float | Tensor = 1e-6,
    atol: float | Tensor = 1e-9,
    slots: int | str | None = None,
    budget: int | str | None = None,
    tiers: Sequence[Kind] | None = None,
    schedule: Schedule | None = None,
    journal: str | Path | Journal | None = None,
    gradient: str | Gradient = "discrete",
    max_steps: int = 100_000,
    controller: str | Controller = "PI",
    norm: Callable[[Any], Any] | None = None,
    jumps: Sequence[float] | Tensor = (),
    time_dtype: torch.dtype | None = None,
    throw: bool = True,
    progress: bool | Progress = False,
    batched: bool = False,
    check: bool = False,
    observe: Callable[[Tensor, Any], Any] | None = None,
    observe_at: str = "times",
    cost: Callable[..., Tensor] | None = None,
    engine: str = "auto",
    events: Sequence[Event | At] = (),
) -> Solution:
    """Solve dy/dt = f(t, y, *args) from y(t[0]) = y0 and return the states at every time in ``t``.

    Gradients reach y0, the times (if ``t`` requires grad), ``args``, and every tensor that f holds in a closure, a
    module, a container, a partial, an object or a global. What cannot be followed is refused by name.

    Args:
        f: dy/dt; gets t as a 0-dim tensor and y shaped like y0, and returns a tree shaped and typed like y. For the
            methods "kencarp3", "kencarp4", "kencarp5" also a pair of functions (explicit, implicit), whose sum dy/dt is.
        y0: a tensor or a tree of tensors, of any shapes.
        t: at least one time, strictly increasing or strictly decreasing.
        method: one of ``METHODS``, ``MULTISTEP``, ``IMPLICIT`` or ``ROSENBROCK``, a Tableau, an Adams or an Implicit. "euler",
            "midpoint", "rk4" and Adams methods take fixed steps that land on every time in ``t``; "dopri5", "tsit5" control
            their steps and interpolate. For stiff equations: "kvaerno5", "radau5", "trbdf2", ..
        dt: the longest fixed step (default: one step between two times), or the first step of an adaptive method.
        rtol, atol: local error allowed per step, relative and absolute; adaptive methods only.
        slots: how many states may be kept for the gradient, that of t[0] included; or "all": recompute nothing.
        budget: bytes that the gradient may use, as a number or like "512 MiB". Without slots or budget, nothing is
            recomputed while tapes and states fit a quarter of the memory that is free.
        tiers: several kinds of memory instead, the device first: ``[Device("2 GiB"), Host("16 GiB"), Files("1 TiB")]``.
            The cheapest plan over all of them is taken, by the times that a step, a write and a read are measured to
            need.
        schedule: a schedule of your own instead of a planned one; its k-th tier is the k-th of ``tiers``.
        journal: a folder (or a :class:`revolve.Journal`) in which progress is kept. If the process dies, the same call
            and the same ``backward()`` in another process go on from there, and end with the same bits.
        gradient: "discrete" (exact, by checkpoints), "backprop" (torch's graph), "tangent" (exact, carried forwards;
            for few parameters), "backsolve" (continuous), or an object such as ``Backsolve(rtol=1e-8)``.
        max_steps: of an adaptive solve.
        controller: "I", "PI", "PID", or a :class:`Controller` with limits of its own (min_step, max_step, safety, ...).
        norm: how large a scaled error is, as a function of a tree like y0; the default is the root mean square. A norm
            that looks at some components alone makes a seminorm.
        jumps: times at which f is not smooth; steps end there, and f is called a hair to either side.
        time_dtype: in which f sees the time, and to which the ends of controlled steps are rounded. The default shows f
            the dtype of ``t`` and keeps times in double precision.
        check: compute every step twice, and compare the bits of every state that is computed again; raises
            :class:`ReproducibilityError`, which names the first step that is not reproducible.
        throw: raise SolveError when the solve fails; otherwise return what was reached, NaN beyond, and the status.
        progress: True for a progress bar, or a function of (steps done, steps in all or None).
        batched: the first dimension of every leaf of y0 counts members, each solved with its own steps, errors and
            status, in lock-step. f gets t of shape (members,); ``t`` may have a row for each member (that may end in
            NaN), and so may ``jumps``; rtol, atol and dt may be tensors with one number for each.
        observe: g(t, y), a tree of tensors, seen in place of the states, which are let go: a loss on a few receivers
            holds no fields. Gradients reach what g holds. In a batch g gets t of shape (members,) and gives a row for
            each member; the states are looked at when the solve is over.
        observe_at: "times" (those in ``t``) or "steps" (t[0], and after every step).
        cost: a running cost L(t, y, *args), a tensor; ``solution.costs`` is its integral. It is integrated as one more
            part of the state, by the same steps and to the same tolerances.
        engine: who takes the steps: "eager" (torch operations, one at a time), "native" (f and its transpose compiled,
            for small states on the CPU; where that cannot be, eager), or "auto": native from 1000 fixed steps on.
            ``solution.engine`` says which, and why.
        events: what happens where a function of the solution crosses zero (:class:`Event`) or at known times
            (:class:`At`): the state is reset, the solve ends, or it is only noted. ``solution.events[i]`` says when
            ``events[i]`` happened; gradients reach these times, and go through resets. An asked time at which the
            state changes shows it before the change; a terminal event leaves the times behind it out.

    Raises:
        ValueError, TypeError: for arguments that cannot be meant.
        ReproducibilityError: if ``check`` finds a step that gives other bits when it is computed again.
        SolveError: if the solve fails and ``throw`` is set.
        UntrackedTensorError: if f uses a tensor that requires grad and cannot be followed.
    """
    structure, state = Structure.of(y0, "y0")
    plain = gradient == "discrete" and observe_at == "times" and {type(jumps), type(events), type(args)} == {tuple}
    rest = (tiers, journal, norm, time_dtype, observe, cost, *jumps, *events) if plain else (gradient,)
    plain = plain and all(x is None for x in rest) and not (progress or batched or check)
    said = (method, dt, rtol, atol, slots, budget, schedule, max_steps, controller, engine)
    call = call_of(f, structure, state, t, said) if plain and engine != "eager" else None
    if call is not None and is_known(call):
        times = checked_times(t, state)
        outcome = known(call, (f, args), state, times)
        if outcome is not None:
            ys = structure.unflatten(outcome.outputs)
            return Solution(times, ys, "success", outcome.stats, outcome.plan, outcome.engine or EAGER)
    named("engine", engine, dict.fromkeys(ENGINES))
    tableau = method_asked_for(method)
    if cost is not None and isinstance(tableau, Splitting):
        raise ValueError(
            f"cost= is one more part of the state, and method={tableau.name!r} has two; give 'rk4' or 'tsit5'"
        )
    if isinstance(tableau, Splitting):
        f = split_function(tableau, f, y0)
    else:
        f, tableau = divided(f, tableau, cost is not None or batched)
    _check_observing(observe, observe_at, cost, batched)
    if cost is not None:
        f, y0 = with_cost(f, cost, y0, _start(t, state, batched), args)
        structure, state = Structure.of(y0, "y0")
        norm = None if norm is None else partial(_of_the_first, norm)
        observe = None if observe is None else with_integral(observe)
        events = of_states_alone(events) if events else ()
    check_memory(slots, budget, tiers, schedule)
    memory: dict[str, Any] = {
        "slots": slots,
        "budget": budget,
        "tiers": tiers,
        "schedule": schedule,
        "journal": journal,
        "check": check,
        "engine": engine,
    }
    how = gradient_named(gradient)
    check_call(args, max_steps)
    if events:
        refused = {"batched=True": batched, "observe_at='steps'": observe_at == "steps"}
        refused[f"gradient={gradient!r}"] = isinstance(how, CONTINUOUS)
        events = check_events(events, tableau, checked_times(t, state) if not batched else torch.zeros(2), refused)
    if batched:
        single = _for_batches(tableau, controller, time_dtype)
        wishes = Wishes(single, rtol, atol, dt, max_steps, _controller(controller), norm, jumps)
        each = solve_members((f, tuple(args)), structure, state, t, wishes, how, memory, progress)
        if throw and each.failure is not None:
            raise each.failure
        found = structure.unflatten(each.outputs)
        solution = Solution(each.times, found, each.status, each.stats, each.plan, f"{EAGER}, in lock-step")
        solution = _with_last(solution, each.failure)
        if observe is not None:
            last, seen = map_tree(lambda x: x[-1:], found), seen_of_members(observe, each.times, found, y0)
            solution = replace(solution, ys=last, observed=seen, observed_ts=each.times)
        return solution if cost is None else _apart(solution)
    times = checked_times(t, state)
    control = control_asked_for(
        structure, state, tableau, rtol, atol, dt, max_steps, controller, norm, jumps, time_dtype
    )
    if len(times) == 1:
        ys = structure.unflatten([x[None] for x in state])
        solution = Solution(times, ys, "success", Stats(_Nothing()), None, EAGER)  # type: ignore[arg-type]
        return _looked_at(solution, observe, cost is not None)
    function: Any = (f, tuple(args))
    start = tuple(x.detach().contiguous() for x in state)
    if events:
        eventful = program_with_events(tableau, times, structure, start, control, events)
        state = eventful.settled(function, times[0], state, "y0")
        with progress_ticker(progress, None) as tick:
            outcome = carried_out(eventful, function, times, state, how, memory, tick)
        reached, ys, happened, ending = put_in_order(eventful, outcome, times, structure)
        if throw and outcome.failure is not None:
            raise outcome.failure
        solution = Solution(reached, ys, ending, outcome.stats, outcome.plan, outcome.engine or EAGER, events=happened)
        return _looked_at(_with_last(solution, outcome.failure), observe, cost is not None)
    solver = program_of(tableau, times, structure, start, control)
    state = solver.settled(function, times[0], state, "y0")
    afterwards = observe is None or isinstance(how, CONTINUOUS)
    program: Any = solver
    shape: list[Structure] = []
    if not afterwards:
        program, function = Observed(solver, observe_at == "steps", shape), (*function, observe)
    elif observe_at == "steps":
        raise ValueError("observe_at='steps' needs gradient='discrete' or 'backprop'; give the times in t instead")
    steps = steps_of(solver)
    with progress_ticker(progress, steps) as tick:
        problem = Problem(
            program, function, solver.first(state), steps, wants_final=not afterwards, **memory, tick=tick
        )
        outcome = how(problem)
    if call is not None and outcome.native is not None:
        remember(call, outcome.native, outcome)
    seen_at = _step_times(solver) if observe_at == "steps" else times
    failure = failure_of(outcome, seen_at.tolist(), solver, (f, tuple(args)), start, not afterwards)
    if failure is not None and cost is not None and failure.y is not None:
        failure.y = failure.y[0]
    if throw and failure is not None:
        raise failure
    ending = "success" if failure is None else failure.status
    carried = outcome.engine or f"{EAGER}; gradient={gradient!r} is made of torch operations"
    if afterwards:
        ys = structure.unflatten(outcome.outputs)
        solution = _with_last(Solution(times, ys, ending, outcome.stats, outcome.plan, carried), failure)
        return _looked_at(solution, observe, cost is not None)
    assert outcome.final is not None
    last = structure.unflatten([x[None] for x in outcome.final[: len(state)]])
    observed = shape[0].unflatten(outcome.outputs) if outcome.outputs else None
    solution = Solution(times, last, ending, outcome.stats, outcome.plan, carried, observed, seen_at)
    solution = _with_last(solution, failure)
    return solution if cost is None else _apart(solution)


def control_asked_for(
    structure: Structure,
    state: State,
    method: Method,
    rtol: Any,
    atol: Any,
    dt: Any,
    max_steps: int,
    controller: str | Controller,
    norm: Callable[[Any], Any] | None,
    jumps: Sequence[float] | Tensor,
    time_dtype: torch.dtype | None,
) -> Control:
    """How long the steps are to be; raises for what cannot be meant."""
    _check_numbers(state, rtol, atol, dt, method)
    measure = None if norm is None else lambda leaves: norm(structure.unflatten(leaves))
    tolerance = Tolerance(rtol, atol, measure)
    control = Control(tolerance, dt, max_steps, _controller(controller), _jumps(jumps))
    if time_dtype is None:
        return control
    return replace(control, time_dtype=_time_dtype(time_dtype), rounding=time_dtype)


def _with_last(solution: Solution, failure: SolveError | None) -> Solution:
    """A solution that says where it stopped, if it did."""
    if failure is None:
        return solution
    reached = solution.stats.reached if isinstance(solution.stats, MemberStats) else failure.t
    return replace(solution, last_t=reached, last_y=failure.y)


def _check_observing(observe: Any, observe_at: str, cost: Any, batched: bool) -> None:
    named("observe_at", observe_at, dict.fromkeys(PLACES))
    for name, function in (("observe", observe), ("cost", cost)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r} must be a function of (t, y)")
    if observe_at == "steps" and batched:
        raise ValueError("observe_at='steps': members have steps of their own; with batched=True give the times in t")
    if observe is None and observe_at != "times":
        raise ValueError(f"observe_at={observe_at!r} says when to look, and observe= is missing")


def _start(t: Any, state: State, batched: bool) -> Tensor:
    """The first time; in a batch, that of each member."""
    real = torch.empty(0, dtype=state[0].dtype).real.dtype if differentiable(state[0]) else torch.get_default_dtype()
    first = (t if isinstance(t, Tensor) else torch.tensor(t, dtype=real)).detach()[..., 0]
    return first.expand(len(state[0])) if batched else first


def _of_the_first(norm: Callable[[Any], Any], pair: Any) -> Any:
    return norm(pair[0])


def _looked_at(solution: Solution, observe: Callable[[Tensor, Any], Any] | None, costs: bool) -> Solution:
    """A solution that has all its states, observed, and with its costs apart."""
    if observe is not None:
        last = map_tree(lambda x: x[-1:], solution.ys)
        observed = seen_afterwards(observe, solution.ts, solution.ys)
        solution = replace(solution, ys=last, observed=observed, observed_ts=solution.ts)
    return _apart(solution) if costs else solution


def _apart(solution: Solution) -> Solution:
    """States and integral of the running cost, each in its place."""
    ys, costs = solution.ys
    happened = (replace(x, before=x.before[0], after=x.after[0]) for x in solution.events)
    solution = replace(solution, events=tuple(happened))
    if solution.observed_ts is None:
        return replace(solution, ys=ys, costs=costs)
    observed, costs = (None, None) if solution.observed is None else solution.observed
    return replace(solution, ys=ys, observed=observed, costs=costs)


def _step_times(program: ExplicitProgram) -> Tensor:
    """Where the steps started and stopped; a function of the caller's ``t`` if that requires grad."""
    timeline = program.timeline
    if program.inputs and torch.is_grad_enabled():
        return timeline.knots(program.t.to(program.wide)).to(program.dtype)
    ends = [timeline.ends(k)[1] for k in range(timeline.steps)]
    return torch.tensor([program.asked.t[0], *ends], dtype=program.dtype)


class _Nothing:
    """The program of a solve over a single time."""

    evaluations = rejected = 0


def checked_times(t: Tensor | Sequence[float], state: State) -> Tensor:
    """Times as a one-dimensional floating-point tensor; ValueError if they are not strictly monotone and finite."""
    real = torch.empty(0, dtype=state[0].dtype).real.dtype if differentiable(state[0]) else torch.get_default_dtype()
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=real)
    if times.is_meta:
        raise ValueError("t is on the meta device and holds no numbers; give the times on the CPU")
    if times.ndim != 1 or len(times) == 0:
        raise ValueError(f"t has shape {tuple(times.shape)}; give a one-dimensional series of at least one time")
    if not times.is_floating_point():
        if times.is_complex():
            raise TypeError(f"t has dtype {times.dtype}; times are real numbers")
        times = times.to(real)
    values = times.tolist()
    for j, x in enumerate(values):
        if not math.isfinite(x):
            raise ValueError(f"t[{j}]={x} is not a finite number")
    for j, (a, b) in enumerate(pairwise(values)):
        if a == b or (b > a) != (values[-1] > values[0]):
            raise ValueError(
                f"t[{j}]={a:g}, t[{j + 1}]={b:g}: times must strictly increase or strictly decrease; sort them"
            )
    return times


def steps_of(program: ExplicitProgram) -> int | None:
    """How many steps the solve takes, None if that is found on the way."""
    return program.timeline.steps if program.timeline.done else None


def _for_batches(method: Method, controller: str | Controller, time_dtype: torch.dtype | None) -> Tableau | Implicit:
    """The method, if nothing is asked for that is there for single solves only."""
    if isinstance(method, Implicit) and not isinstance(method.linear, Dense):
        raise ValueError(
            f"linear={type(method.linear).__name__}() solves the systems of one state; with batched=True each member has a "
            f"dense matrix of its own: leave linear= out"
        )
    if isinstance(method, Implicit) and not isinstance(method.tableau, ImplicitTableau | RosenbrockTableau):
        raise ValueError(f"method={method.name!r} solves one state at a time; with batched=True give 'kvaerno5', say")
    if isinstance(method, Implicit) and method.consistent != "check":
        raise ValueError(
            f"consistent={method.consistent!r} changes the first state of one solve; with batched=True give consistent ones"
        )
    if not isinstance(method, Tableau | Implicit):
        raise ValueError(f"method={method.name!r} solves one state at a time; with batched=True give 'rk4', say")
    if time_dtype is not None:
        raise ValueError(f"time_dtype={time_dtype}: with batched=True f sees the dtype of t; leave it out")
    if _controller(controller).force_min:
        raise ValueError("force_min=True accepts steps for all members at once; with batched=True leave it out")
    return method


def _time_dtype(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"time_dtype={dtype!r} is no dtype of times; give torch.float64 or torch.float32")
    return dtype


def _jumps(jumps: Sequence[float] | Tensor) -> tuple[float, ...]:
    refuse_moving_jumps(jumps)
    if isinstance(jumps, Real):
        raise TypeError(f"jumps={jumps!r} must be a series of times; for a single one write jumps=({jumps!r},)")
    for x in jumps:
        if not math.isfinite(x):
            raise ValueError(f"jumps holds {x}, which is not a finite time")
    return tuple(float(x) for x in jumps)


def method_asked_for(method: str | Method) -> Method:
    return method if isinstance(method, Method) else named("method", method, NAMED)


def _controller(controller: str | Controller) -> Controller:
    return controller if isinstance(controller, Controller) else named("controller", controller, CONTROLLERS)


def check_args(args: Any) -> None:
    if not isinstance(args, tuple):
        raise TypeError(f"args={args!r} must be a tuple; for a single argument write args=(x,)")


def check_call(args: Any, max_steps: Any) -> None:
    check_args(args)
    if not isinstance(max_steps, Real):
        raise TypeError(f"max_steps={max_steps!r} ({type(max_steps).__name__}) must be a number")
    if not float(max_steps) >= 1:
        raise ValueError(f"max_steps={max_steps} allows no step; give at least 1")


def checked_state(state: State) -> None:
    """Raise for what cannot be the state of an ODE."""
    for x in state:
        check_dense((x,), "y0")
        if not differentiable(x):
            raise TypeError(f"y0 has dtype {x.dtype}; an ODE state is real or complex: y0.double(), for example")
        if x.device != state[0].device:
            raise ValueError(f"y0 has leaves on {state[0].device} and on {x.device}; put them on one device")
        numbers = not x.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        if numbers and not bool(torch.isfinite(x).all()):
            raise ValueError("y0 holds a NaN or an infinity; the solve would return nothing else")


def _check_numbers(state: State, rtol: Any, atol: Any, dt: Any, tableau: Method) -> None:
    checked_state(state)
    for name, number in (("rtol", rtol), ("atol", atol), ("dt", dt)):
        if not isinstance(number, Real | None):
            raise TypeError(f"{name}={number!r} ({type(number).__name__}) must be a number, such as float({name})")
    if tableau.adaptive:
        if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
            raise ValueError(f"rtol={rtol}, atol={atol}: give positive tolerances, such as rtol=1e-6, atol=1e-9")
        if state[0].is_meta:
            raise ValueError(f"method={tableau.name!r} measures errors, and meta tensors hold none; use 'rk4' with dt=")
    if dt is not None and not (math.isfinite(dt) and dt > 0):
        raise ValueError(f"dt={dt} is not a length of time; give a positive number, also backwards in time")
