"""The gallery: ``python docs/gallery.py`` draws every schedule and writes gallery.md and its pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from matplotlib.figure import Figure

from revolve import (
    Binomial,
    Bisection,
    Differing,
    DiskRevolve,
    HRevolve,
    Mixed,
    Multistage,
    Online,
    Periodic,
    PeriodicDisk,
    Prices,
    Schedule,
    Segments,
    Selected,
    Stages,
    StoreAll,
    StoreNothing,
    Tier,
    plot,
    sweep,
    uniform_sweep,
)
from revolve.compare import priced_sweep

HEAD = """\
# Gallery

Every schedule, drawn: the steps run across and time runs downward. A blue line is plain runs, an orange one recorded
runs, a green one transposes. A grey or coloured bar is a kept state, from its save to its drop, and a pale orange one a
kept tape; on the right are the slots, each with the states that it held. Where moving a state costs something, the chain
waits: black for a write, dark red for a read.

Made by `python docs/gallery.py`, which the tests run. `revolve draw` draws any of them at any length.
"""


class Drawn(NamedTuple):
    """A schedule, how long a chain it is shown on, and what to look at."""

    name: str
    schedule: Schedule
    steps: int
    text: str
    prices: Prices | None = None

    @property
    def title(self) -> str:
        return self.name.replace("-", " ").capitalize()


DISK = Prices(1.0, write=(0.0, 4.0), read=(0.0, 4.0))
"""A write or a read that takes as long as four steps."""

SHOWN = (
    Drawn("store-all", StoreAll(), 30, "Backpropagation: one recorded run of every step, and every tape kept till then."),
    Drawn("store-nothing", StoreNothing(), 20, "One state and one tape: each step is run to from the beginning."),
    Drawn("periodic-keep", Periodic(), 36, "A checkpoint every sqrt(n) steps; to reverse a segment its states are kept too."),
    Drawn("periodic-rerun", Periodic(6, "rerun"), 36, "The same spacing, and each state of a segment is run to again."),
    Drawn("selected", Selected((6, 14, 25)), 36, "States chosen by name: the boundaries of blocks, for instance."),
    Drawn("segments", Segments((0, 6, 14, 25)), 36, "The same states; each segment is recorded again as a whole, as networks "
          "are: every step runs twice at most, and the tapes of one segment are held together."),
    Drawn("bisection", Bisection(), 36, "Keep the middle, reverse the upper half, then the lower."),
    Drawn("binomial", Binomial(3), 36, "Least recomputation in three slots. The triangles repeat at every scale."),
    Drawn("online", Online(4), 36, "The end was not known: kept states are given up as the chain grows, and the reverse "
          "sweep is optimal between those that are left."),
    Drawn("multistage", Multistage(2, 3), 48, "As little recomputation as five slots allow, and the least traffic to the "
          "three on disk: what is used most lies in memory, and moves there once there is room.", DISK),
    Drawn("hrevolve", HRevolve((Tier(2), Tier(2, 1.0, 1.0), Tier(3, 4.0, 4.0))), 60, "Three tiers with prices: the "
          "optimum. The dearest holds few states for long, the cheapest many for a moment.",
          Prices(1.0, write=(0.0, 1.0, 4.0), read=(0.0, 1.0, 4.0))),
    Drawn("disk", DiskRevolve(2, 4.0, 4.0), 48, "As many files as one likes, at a price; a file may be read again.", DISK),
    Drawn("periodic-disk", PeriodicDisk(2, 4.0, 4.0), 48, "A file at a period, read once: near the optimum, at any "
          "length.", DISK),
    Drawn("mixed", Mixed(5), 36, "A slot holds a state or a tape: at the right of each part tapes take over."),
    Drawn("mixed-ends", Mixed(6, 1, 2, True), 36, "Tapes as large as two states, which hold the state at the end of "
          "their step: such a state is kept for nothing, in a tier of its own."),
    Drawn("stages", Stages(8, 2), 50, "The stages of a Runge-Kutta step, two of them, share the slots with states."),
    Drawn("differing", Differing((4, 1, 1, 6, 6, 1, 1, 1, 8, 2, 2, 2), (1, 3, 5, 5, 2, 2, 1, 4, 4, 3, 1, 1), 9,
          (4, 4, 6, 6, 3, 3, 2, 6, 6, 4, 2, 2)), 12, "Steps of different cost, states and tapes of different size, a "
          "budget of 9: where to keep what is a matter of both."),
)  # fmt: skip


class Plotted(NamedTuple):
    """A picture of what memory buys."""

    name: str
    title: str
    text: str
    figure: Figure


def bought() -> tuple[Plotted, ...]:
    plans = sweep(1000, [*range(1, 51), 60, 80, 100], 8_000_000, 40_000_000)
    priced = priced_sweep(250, range(1, 26), write=10.0, read=10.0, disk=7)
    return (
        Plotted("sweep", "Recomputation against memory", "`revolve sweep -n 1000 -c 1:50 --state 8MB --tape 40MB`: the first "
                "slots buy most.", plot.sweep(plans, decimal=True)),
        Plotted("priced", "Time against memory", "`revolve sweep -n 250 -c 1:25 --write-cost 10 --read-cost 10 --disk 7`: "
                "with prices for writes and reads a disk pays while slots are few; a schedule that ignores them pays more "
                "than it saves.", plot.priced(priced, 250)),
        Plotted("uniform", "Uniform checkpoints", "`revolve sweep --uniform -n 100 --state 100MB`: k + n/k states, least at "
                "2 sqrt(n).", plot.uniform(uniform_sweep(100, 100_000_000), decimal=True)),
    )  # fmt: skip


def main(out: Path) -> None:
    """Write gallery.md and the folder gallery beside it."""
    folder = out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    page = [HEAD]
    for shown in SHOWN:
        save(plot.draw(shown.schedule, shown.steps, shown.prices), folder / f"{shown.name}.png")
        page.append(section(shown.title, f"`{shown.schedule}`. {shown.text}", shown.name))
    page.append("## What memory buys\n\nThe sweeps of the command line.\n")
    for plotted in bought():
        save(plotted.figure, folder / f"{plotted.name}.png")
        page.append(section(plotted.title, plotted.text, plotted.name))
    (out / "gallery.md").write_text("\n".join(page))


def section(title: str, text: str, name: str) -> str:
    return f"## {title}\n\n{fill(text, 120)}\n\n![{title}](gallery/{name}.png)\n"


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=80, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder (default: beside this file)")
    main(parser.parse_args().out)
