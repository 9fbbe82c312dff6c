"""The first sweep of an adaptive solve, natively: times are found, values shown, and states recorded while there is room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adjoint.adaptive_timeline import AdaptiveTimeline
from adjoint.engines.native.explore import COUNTS, DONE, GOING, NO_ROOM, NUMBERS, WORDS
from adjoint.engines.native.kernel import Kernel
from adjoint.steppers.explicit import ExplicitProgram
from adjoint.steppers.rosenbrock import RosenbrockProgram
from adjoint.tensors import State

ROOM = 256
"""Steps that there is room for at first."""


@dataclass(frozen=True)
class Explored:
    """What a first sweep found, shaped as :class:`Layout` packs it."""

    outputs: Tensor
    final: Tensor
    times: np.ndarray
    """Where the steps start, and where the last one stops."""
    tape: Tensor | None
    """Every state before a step, if they were recorded to the end."""


def begin(program: ExplicitProgram, function: Any, state: State) -> None:
    """Let the compiled program choose the first step, where it can; implicit methods have other stages than slopes."""
    if type(program) is ExplicitProgram:
        program.begin_compiled()
    else:
        program.begin(function, state)


def explored(
    kernel: Kernel, program: ExplicitProgram, start: Tensor, held: dict[str, Tensor], most: int
) -> Explored | None:
    """Run to the end, and tell the program's timeline the steps; None if it cannot be reached. At most so many states are
    recorded."""
    timeline, asked = program.timeline, program.asked.t
    assert isinstance(timeline, AdaptiveTimeline) and kernel.compiled.explore is not None
    numbers, counts = _settings(program, timeline), dict.fromkeys(COUNTS, 0)
    counts |= {"next": 1, "max_steps": timeline.max_steps, "recording": int(most > 0), "asked_count": len(asked)}
    number_words = np.array([numbers[name] for name in NUMBERS])
    size, dtype = kernel.layout.numbers, kernel.dtype
    outputs = torch.empty(1, len(asked), size, 1, dtype=dtype)
    outputs[:, :1] = start
    room, tape = ROOM, torch.empty(0, dtype=dtype)
    times = np.full(room, timeline.start)
    state = start.clone()
    stages = torch.empty((program.tableau.stages + 4) * size, dtype=dtype)
    words: dict[str, Any] = {
        "y": state,
        "asked": np.array([*asked, asked[-1]]),
        "outputs": outputs,
        "slopes": stages[4 * size :],
    }
    words |= {name: stages[i * size :] for i, name in enumerate(("new", "error", "moved", "first"))}
    words |= {"numbers": number_words, **held}
    while True:
        if counts["recording"] and room > most:
            counts["recording"], tape = 0, torch.empty(0, dtype=dtype)
        if counts["recording"]:
            tape = torch.cat((tape, torch.empty(room * size - len(tape), dtype=dtype)))
        counts |= {"capacity": room, "status": GOING}
        count_words = np.array([counts[name] for name in COUNTS], dtype=np.int64)
        block = words | {"tape": tape, "times": times, "counts": count_words}
        pointers = [block[name] for name in WORDS]
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data for x in pointers]
        kernel.compiled.explore(np.array(addresses, dtype=np.int64).ctypes.data)
        counts = dict(zip(COUNTS, count_words.tolist(), strict=True))
        if counts["status"] != NO_ROOM:
            break
        room *= 2
        times = np.concatenate((times, np.empty(room - len(times))))
    steps, rejected = counts["steps"], counts["rejected"]
    program.evaluations += program.tableau.stages * (steps + rejected)
    note_systems(program, steps + rejected)
    if counts["status"] != DONE:
        return None
    outputs[:, -1:] = state
    found = dict(zip(NUMBERS, number_words.tolist(), strict=True))
    previous, length = (found["before"], found["earlier"]), found["length"]
    accepted = {"rejected": rejected, "_length": length, "_previous": previous, "_times": times[: steps + 1]}
    timeline.restore({**accepted, "_just_rejected": False})
    return Explored(outputs, state, times[: steps + 1], tape if counts["recording"] else None)


def note_systems(program: ExplicitProgram, steps: int) -> None:
    """Count the matrices of so many steps, one each."""
    if isinstance(program, RosenbrockProgram):
        program.work.jacobians += steps
        program.work.factorisations += steps


def _settings(program: ExplicitProgram, timeline: AdaptiveTimeline) -> dict[str, float]:
    control, limits = program.control, timeline.controller
    found, order = timeline.snapshot(), timeline.order
    p, i, d = limits.proportional, limits.integral, limits.derivative
    extent = abs(timeline.stop - timeline.start)
    return {
        "t": timeline.start,
        "stop": timeline.stop,
        "length": -1.0 if control.dt is None and type(program) is ExplicitProgram else found["_length"],
        "before": found["_previous"][0],
        "earlier": found["_previous"][1],
        "just_rejected": 0.0,
        "sign": 1.0 if timeline.stop >= timeline.start else -1.0,
        "power": -(p + i + d) / order,
        "power_before": (p + 2 * d) / order,
        "power_earlier": -d / order,
        "power_rejected": -1 / order,
        "safety": limits.safety,
        "smallest": limits.smallest,
        "largest": limits.largest,
        "min_step": limits.min_step,
        "max_step": limits.max_step,
        "rtol": float(control.tolerance.rtol),  # type: ignore[arg-type]
        "atol": float(control.tolerance.atol),  # type: ignore[arg-type]
        "resolution": extent * 1e-12,
    }
