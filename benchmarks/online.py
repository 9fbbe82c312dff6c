"""How near an online schedule comes to the offline optimum: worst and mean ratio over every length up to --steps.

    python benchmarks/online.py                      # c = 3 .. 50, n to 100,000: some minutes
    python benchmarks/online.py --slots 3,10 --steps 2000

Three rules, all reversed by the offline optimum inside each gap, all priced without the last step's run:

- ``revolve``: ``revolve.Online``, decided after a step proved not to be the last;
- ``greedy``: the same choice, the state whose loss costs least, decided before (the known rule);
- ``levels``: Wang, Moin & Iaccarino (2009), SIAM J. Sci. Comput. 31(4), algorithm of section 3, decided before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from revolve import Advance, Drop, Online, Save, beta
from revolve.online import cost


class Kept:
    """Kept states, and the plain runs of the reverse sweep from them."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.starts: list[int] = []
        self.below = [0]

    def add(self, step: int) -> None:
        self.starts.append(step)

    def remove(self, step: int) -> None:
        at = self.starts.index(step)
        del self.starts[at], self.below[at:]
        if not self.below:
            self.below.append(0)

    def runs(self, steps: int) -> int:
        starts, below, slots = self.starts, self.below, self.slots
        for j in range(len(below), len(starts)):
            below.append(below[-1] + cost(starts[j] - starts[j - 1], slots - j + 1))
        last = steps - 1 - starts[-1]
        return steps - 1 + below[-1] + (cost(last, slots - len(starts) + 1) if last else 0)


def delayed(slots: int) -> Iterator[tuple[int, int]]:
    """(plain runs of ``revolve`` for n = k + 1, plain runs of ``greedy`` for n = k), for k = 1, 2, ...

    The sets are the same, held one step apart.
    """
    held = Kept(slots)
    for action in Online(slots).forward(None):
        match action:
            case Advance(step, stop):
                if step:
                    yield held.runs(stop), held.runs(step)
            case Save(step):
                held.add(step)
            case Drop(step):
                held.remove(step)


def levels(slots: int) -> Iterator[int]:
    """Plain runs of the rule of levels for n = 2, 3, ..."""
    held, level = Kept(slots), {0: sys.maxsize}
    held.add(0)
    step = 0
    while True:
        step += 1
        if len(held.starts) < slots:
            level[step] = 0
        else:
            highest, dispensable = -1, -1
            for kept in reversed(held.starts):
                if level[kept] < highest:
                    dispensable = kept
                highest = max(highest, level[kept])
            if dispensable < 0:
                dispensable = held.starts[-1]
                level[step] = level[dispensable] + 1
            else:
                level[step] = 0
            held.remove(dispensable)
            del level[dispensable]
        held.add(step)
        yield held.runs(step + 1)


def measured(slots: int, steps: int) -> dict[str, tuple[float, float]]:
    """Worst and mean ratio of each rule to the offline optimum over n = 2 .. steps."""
    ours = np.array(list(islice(delayed(slots), steps)))
    theirs = np.array(list(islice(levels(slots), steps - 1)))
    best = np.array([cost(n, slots) for n in range(2, steps + 1)])
    runs = {"revolve": ours[:-1, 0], "greedy": ours[1:, 1], "levels": theirs}
    return {rule: ((ratio := values / best).max(), ratio.mean()) for rule, values in runs.items()}


TITLE = "Online: the end found on the way"
TEXT = (
    "Plain runs over the offline optimum's, worst and mean over every length n = 2 .. 100,000. `revolve`: `Online`, which "
    "decides whether to keep a state when the step after it has proved not to be the last, and gives up the state whose loss "
    "costs least; it is the optimum up to the n in the second column. `greedy`: the same choice, decided before the step (the "
    "known rule). `levels`: Wang, Moin & Iaccarino (2009), decided before the step."
)
HEADER = ("slots", "optimal to n =", "revolve, worst", "mean", "greedy, worst", "mean", "levels, worst", "mean")


def table(slots: Iterable[int], steps: int) -> Iterator[tuple[str, ...]]:
    """A row for each number of slots; checked: ours is never above the others, neither the worst nor the mean."""
    for number in slots:
        ratios = measured(number, steps)
        for rule in ("greedy", "levels"):
            assert all(a <= b for a, b in zip(ratios["revolve"], ratios[rule], strict=True)), (number, ratios)
        cells = (f"{ratio:.4f}" for pair in ratios.values() for ratio in pair)
        yield str(number), str(beta(slots=number, repetitions=2) + 1), *cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default=",".join(map(str, range(3, 51))), help="for instance 3,10,50")
    parser.add_argument("--steps", type=int, default=100_000)
    options = parser.parse_args()
    print("ratio to the offline optimum, n = 2 ..", options.steps)
    print("   c  optimal to   revolve worst    mean    greedy worst    mean    levels worst    mean")
    for slots, reach, *cells in table(map(int, options.slots.split(",")), options.steps):
        print(
            f"{slots:>4}{reach:>12}",
            *(f"{cell:>{16 if k % 2 == 0 else 8}}" for k, cell in enumerate(cells)),
            flush=True,
        )


if __name__ == "__main__":
    main()
