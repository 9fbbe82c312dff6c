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
from pathlib import Path
from typing import Any

import numpy as np

from revolve import Disk, Journal, Memory, Multistage, Run

STEPS = 60


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


RUNS: dict[str, Callable[[Path, Callable[[], None]], list[np.ndarray]]] = {"simulation": simulation}


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
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "result.npz"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["killed_runs"])
        child = context.Process(target=process, args=(name, folder, result, deadly))
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
    """Kill at random points and continue. For each: how much had been done, and how much the second process did."""
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
    options = parser.parse_args()
    for name in [options.run] if options.run else RUNS:
        with tempfile.TemporaryDirectory() as place:
            done = check(name, options.kills, Path(place), options.seed)
        print(f"{name}: killed at {len(done)} points, continued with the same bits each time")
        for point, rest in sorted(done):
            print(f"  killed after {point:6.1%} of the run; the second process made {rest:6.1%} of its steps")


if __name__ == "__main__":
    sys.modules["killed_runs"] = sys.modules["__main__"]
    main()
