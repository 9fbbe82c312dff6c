"""Long runs in processes of their own, killed at random points and continued by another process.

As a script: ``python tests/killed_runs.py --kills 50`` tries 50 points of each run, and prints where they fell.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import torch

import adjoint
from adjoint import Device, Files, Host
from revolve import Disk, Journal, Memory, Multistage, Run

STEPS = 60
SERVER = multiprocessing.get_context("forkserver")
"""Makes processes that have the libraries loaded, and nothing else in common."""


def start_server() -> None:
    """Once: the process that the others are copied from; it is to find this file."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    SERVER.set_forkserver_preload(["killed_runs"])
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


class Sine:
    """x_{k+1} = x_k + h sin(w x_k), a field and its weights; the gradient of w is added up on the way back."""

    def __init__(self, weights: np.ndarray, tick: Callable[[], None]) -> None:
        self.weights, self.tick = weights, tick
        self.of_weights = np.zeros_like(weights)

    def advance(self, x: np.ndarray, start: int, stop: int) -> np.ndarray:
        for _ in range(start, stop):
            self.tick()
            x = x + 0.05 * np.sin(self.weights * x)
        return x

    def record(self, x: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, list[np.ndarray]]:
        tape = []
        for k in range(start, stop):
            tape.append(x)
            x = self.advance(x, k, k + 1)
        return x, tape

    def reverse(self, tape: list[np.ndarray], cotangent: np.ndarray) -> np.ndarray:
        for x in reversed(tape):
            self.tick()
            slope = 0.05 * np.cos(self.weights * x) * cotangent
            self.of_weights = self.of_weights + slope * x
            cotangent = cotangent + slope * self.weights
        return cotangent

    def last(self, step: int) -> bool:
        return step == STEPS - 1

    def snapshot(self) -> np.ndarray:
        return self.of_weights

    def restore(self, snapshot: np.ndarray) -> None:
        self.of_weights = snapshot


def simulation(folder: Path, tick: Callable[[], None]) -> list[np.ndarray]:
    """revolve alone: two states in memory, four in a file."""
    weights, state = np.linspace(0.5, 2.0, 3000), np.linspace(-1.0, 1.0, 3000)
    journal = Journal(folder, about=weights, every=0)
    stepper = Sine(weights, tick)
    run = Run(Multistage(2, 4), stepper, {0: Memory(), 1: Disk(slots=4, journal=journal)}, journal=journal)
    end = run.forward(state, STEPS)
    first = run.backward(np.cos(end))
    return [end, first, stepper.of_weights]


def solve(folder: Path, tick: Callable[[], None]) -> list[np.ndarray]:
    """A solve with controlled steps: a state on the device, one in the host's memory, three in a file."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weights = (0.3 * torch.randn(20, 20, generator=generator, dtype=torch.float64)).requires_grad_()
    y0 = torch.randn(5, 20, generator=generator, dtype=torch.float64, requires_grad=True)

    def f(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        tick()
        return torch.tanh(y @ weights) + torch.sin(t)

    tiers = [Device(slots=1), Host(slots=1, write=0.0, read=0.0), Files(slots=3, write=0.0, read=0.0)]
    t = torch.linspace(0, 3, 7, dtype=torch.float64, requires_grad=True)
    ys = adjoint.solve(f, y0, t, method="dopri5", rtol=1e-7, tiers=tiers, journal=Journal(folder, every=0)).ys
    gradients = torch.autograd.grad(torch.sin(ys).sum(), (weights, y0, t))
    return [ys.detach().numpy(), *(x.numpy() for x in gradients)]


def scan(folder: Path, tick: Callable[[], None]) -> list[np.ndarray]:
    """A recurrence, four states in a file."""
    torch.set_num_threads(1)
    decay = torch.linspace(0.8, 0.99, 30, dtype=torch.float64, requires_grad=True)
    inputs = torch.sin(torch.arange(1500.0, dtype=torch.float64)).reshape(50, 30).requires_grad_()

    def step(carry: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tick()
        carry = decay * carry + torch.tanh(x)
        return carry, carry.square()

    tiers = [Device(slots=0), Files(slots=4, write=0.0, read=0.0)]
    start = torch.zeros(30, dtype=torch.float64)
    last, outputs = adjoint.scan(step, start, inputs, tiers=tiers, journal=Journal(folder, every=0))
    gradients = torch.autograd.grad(last.sum() + outputs.sum(), (decay, inputs))
    return [last.detach().numpy(), outputs.detach().numpy(), *(x.numpy() for x in gradients)]


RUNS: dict[str, Callable[[Path, Callable[[], None]], list[np.ndarray]]] = {
    "simulation": simulation,
    "solve": solve,
    "scan": scan,
}


def process(name: str, folder: Path, result: Path, deadly: int | None) -> None:
    """One run; at its ``deadly``-th call of a step the process is killed, as by the system."""
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    arrays = RUNS[name](folder, tick)
    np.savez(result, *arrays, calls=np.array(calls))


def finished(name: str, folder: Path, deadly: int | None = None, seconds: float | None = None) -> Any:
    """What a process of its own gives; None if it was killed, at a call or after so many seconds."""
    start_server()
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.npz"
        child = SERVER.Process(target=process, args=(name, folder, result, deadly))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
        if child.exitcode == -signal.SIGKILL:
            return None
        assert child.exitcode == 0, child.exitcode
        with np.load(result) as arrays:
            return dict(arrays)


def check(name: str, kills: int, place: Path, seed: int = 0) -> list[tuple[float, float]]:
    """Kill at random points and continue. For each: how much had been done, and how much the second process did.

    Every other point is a call of the step, chosen at random; the others are moments, which may lie in the middle of a
    write.
    """
    chosen = random.Random(seed)
    whole = finished(name, place / "whole")
    began = time.perf_counter()
    assert finished(name, place / "timed") is not None
    duration = time.perf_counter() - began
    calls, done = int(whole.pop("calls")), []
    for number in range(kills):
        folder = place / f"run-{number}"
        if number % 2:
            point = chosen.randrange(1, calls + 1) / calls
            left = finished(name, folder, deadly=round(point * calls))
        else:
            point = chosen.random()
            left = finished(name, folder, seconds=point * duration)
        if left is None:
            left = finished(name, folder)
        second = int(left.pop("calls"))
        assert left.keys() == whole.keys()
        assert all(left[key].tobytes() == whole[key].tobytes() for key in whole), (name, number, point)
        assert not folder.exists(), sorted(folder.iterdir())
        done.append((point, second / calls))
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each run (default: %(default)s)")
    parser.add_argument("--run", choices=list(RUNS), help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs lie (default: where temporary files do)")
    options = parser.parse_args()
    for name in [options.run] if options.run else RUNS:
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            done = check(name, options.kills, Path(place), options.seed)
        print(f"{name}: killed at {len(done)} points, continued with the same bits each time")
        for point, rest in sorted(done):
            print(f"  killed after {point:6.1%} of the run; the second process made {rest:6.1%} of its steps")


if __name__ == "__main__":
    sys.modules["killed_runs"] = sys.modules["__main__"]
    main()
