"""The workbench that the examples share: results that must hold, pictures, the command line."""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"
GREY = "0.45"


class Recovered(NamedTuple):
    """A number that an example finds, what it should be, and how far it may be off."""

    value: float
    truth: float
    within: float


Results = dict[str, Recovered]


def confirm(results: Results) -> Results:
    """The results, every one of them within its stated error."""
    for name, (value, truth, within) in results.items():
        assert abs(value - truth) <= within, f"{name} is {value:.6g}; it should be {truth:.6g} within {within:.2g}"
    return results


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels, and no lines that say nothing."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, linewidth=0.6)


def save(figure: Figure, out: Path | str | None, name: str) -> None:
    """Write ``out/name.png``; nothing if there is no ``out``."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(out) / f"{name}.png", dpi=130)


def command_line(main: Callable[..., Results]) -> None:
    """Run an example, print what it recovered, and say where the picture is.

    Parameters of ``main`` beyond ``out`` and ``quick`` are numbers, and become options of the same name.
    """
    parser = argparse.ArgumentParser(
        description=main.__globals__["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=".", help="folder for the picture (default: here)")
    parser.add_argument("--quick", action="store_true", help="less work, as in the tests")
    for name, parameter in list(inspect.signature(main).parameters.items())[2:]:
        number = parameter.default
        parser.add_argument(f"--{name}", type=type(number), default=number, help=f"(default: {number})")
    options = vars(parser.parse_args())
    begin = time.perf_counter()
    results = main(**options)
    seconds = time.perf_counter() - begin
    width = max(map(len, results))
    for name, (value, truth, within) in results.items():
        print(f"{name:{width}}  {value:12.6g}   expected {truth:.6g} within {within:.2g}")
    picture = Path(options["out"]) / f"{Path(main.__globals__['__file__']).stem}.png"
    print(f"{picture}, after {seconds:.1f} s")
