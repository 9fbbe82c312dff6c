"""How things are timed and weighed here."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One table of the report; or several, each a part, with a picture of them all."""

    title: str
    text: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    parts: tuple[Section, ...] = ()
    pictures: tuple[tuple[str, Figure], ...] = ()
    """Each with the name of its file."""

    def markdown(self, heading: str = "##") -> str:
        lines = [f"{heading} {self.title}", "", self.text, ""]
        for name, _ in self.pictures:
            lines += [f"![{self.title}]({name})", ""]
        if self.rows:
            lines += [_row(self.header), _row(["---"] * len(self.header)), *map(_row, self.rows), ""]
        return "\n".join([*lines, *(part.markdown(f"{heading}#") for part in self.parts)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@dataclass(frozen=True)
class Times:
    """Seconds of several programs, run in turn so that a slow moment of the machine meets all of them."""

    seconds: list[list[float]]

    def of(self, which: int) -> float:
        return statistics.median(self.seconds[which])

    def ratio(self, one: int, other: int) -> float:
        """The median of the ratios of the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds[one], self.seconds[other], strict=True))


def interleaved(runs: Sequence[Callable[[], object]], *, repeats: int, device: str) -> Times:
    """On the CPU the time of the processor, which other programs disturb least; elsewhere that of the clock."""
    on_device = device.startswith("cuda")
    clock = time.perf_counter if on_device else time.process_time
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    for _ in range(repeats):
        for run, found in zip(runs, times, strict=True):
            _wait(device)
            start = clock()
            run()
            _wait(device)
            found.append(clock() - start)
    return Times(times)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def machine(device: str) -> str:
    """The machine in a line: what the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor()
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
