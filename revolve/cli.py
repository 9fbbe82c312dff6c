"""The command ``revolve``: price a plan, sweep slots against recomputation, draw a schedule."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any, NoReturn

from revolve import binomial, plot
from revolve.actions import both_sweeps
from revolve.budget import Plan, UniformSweep, counted, format_bytes, parse_bytes, sweep, uniform_sweep
from revolve.choose import add_options, schedule_of
from revolve.compare import LENGTHS, aligned, uniform_table, uniform_text, ways, ways_text
from revolve.planner import plan
from revolve.schedules import Binomial
from revolve.trace import letters, trace

DESCRIPTION = """\
Reverse a chain of n steps with few kept states: what to keep, what to redo, and what it costs.

Slots (-c) count the states kept at once, that of the first state included. Sizes are bytes, or text such as 512MiB
(powers of 1024) and 1.5GB (powers of 1000)."""
EXAMPLES = {
    "revolve": """\
  revolve plan -n 100 -c 3
  revolve sweep -n 1000 -c 1:50 --out sweep.png
  revolve draw -n 20 -c 3 --out schedule.png""",
    "plan": """\
  revolve plan -n 100 -c 3
  revolve plan -n 100 -c 3 --state 8MB --tape 40MB
  revolve plan -n 1000 --budget 512MiB --state 8MB --tape 40MB --json""",
    "sweep": """\
  revolve sweep -n 1000 -c 1:50
  revolve sweep -n 1000 -c 1,2,4,8,16 --state 8MB --tape 40MB --out sweep.png
  revolve sweep --uniform -n 100 --state 100MB --out uniform.png""",
    "draw": """\
  revolve draw -n 20 -c 3
  revolve draw -n 100 -c 5 --out schedule.png
  revolve draw -n 50 --schedule periodic --every 10
  revolve draw -n 60 --schedule hrevolve --tiers 2,4:5:5 --out tiers.png""",
    "table": """\
  revolve table
  revolve table -n 48,100,10000
  revolve table --json""",
    "compare": """\
  revolve compare -n 48 --block 4 --slots 12
  revolve compare -n 100 --block 10 --slots 10
  revolve compare -n 100 --block 10 --slots 10 --json""",
}
WIDEST_TEXT = 200
WIDEST_PICTURE = 2000


class Parser(argparse.ArgumentParser):
    """Bad input is one sentence and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    command = COMMANDS[options.command]
    try:
        print(command(options), flush=True)
    except BrokenPipeError:  # the reader has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        print(f"revolve {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="revolve",
        description=DESCRIPTION,
        epilog=f"examples:\n{EXAMPLES['revolve']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="plan | sweep | draw | table | compare")

    def command(name: str, text: str, *, steps: bool = True) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if steps:
            made.add_argument("-n", "--steps", type=int, required=True, help="steps in the chain")
        made.add_argument("--json", action="store_true", help="print JSON instead of text")
        return made

    one = command("plan", "price one plan before it runs")
    one.add_argument("-c", "--slots", help="slots, or 'all' to keep every tape")
    one.add_argument("--budget", help="memory instead of slots; needs --state and --tape")
    _sizes(one)

    many = command("sweep", "recomputation against slots, or memory against the number of uniform checkpoints")
    many.add_argument("-c", "--slots", help="1:50 (both ends included), 1:50:5 (every fifth) or 1,2,4,8")
    many.add_argument("--uniform", action="store_true", help="checkpoints at equal distances: k + n/k states")
    many.add_argument("--out", type=Path, metavar="FILE", help="write a picture as well (png, pdf, svg)")
    _sizes(many)

    drawn = command("draw", "a schedule in time: steps across, time downward, and the life of each slot")
    add_options(drawn)
    drawn.add_argument("--out", type=Path, metavar="FILE", help="write a picture instead of text (png, pdf, svg)")

    listed = command("table", "uniform checkpoints at their best, with binomial ones beside", steps=False)
    listed.add_argument("-n", "--steps", help="lengths, as 16,64,144 (default: the literature's)")

    fitted = command("compare", "ways to fit a chain into so many slots: uniform, blocks, selective, budget, binomial")
    fitted.add_argument("-c", "--slots", type=int, required=True, help="slots")
    fitted.add_argument("--block", type=int, required=True, help="steps in a block, for checkpoints at its boundaries")
    return parser


def _sizes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--state", metavar="SIZE", help="bytes of one kept state")
    command.add_argument("--tape", metavar="SIZE", help="bytes of the tape of one recorded step")


def _plan(options: argparse.Namespace) -> str:
    if (options.slots is None) == (options.budget is None):
        raise ValueError("how much memory? give either -c, for instance -c 3, or --budget with --state and --tape")
    if options.budget is not None and None in (options.state, options.tape):
        raise ValueError(f"--budget {options.budget} needs --state and --tape: the size of a state, and of one tape")
    slots = _integer("--slots", options.slots) if options.slots not in (None, "all") else options.slots
    state, tape = _size("--state", options.state), _size("--tape", options.tape)
    made = plan(steps=options.steps, slots=slots, budget=options.budget, state_bytes=state, tape_bytes=tape)
    if options.json:
        return json.dumps(_facts(made), indent=2)
    return _explained(made, _decimal(options.budget, options.state, options.tape))


def _facts(made: Plan) -> dict[str, Any]:
    """What ``--json`` says of one plan."""
    report = made.report
    facts = {
        "steps": made.steps,
        "schedule": str(made.schedule),
        "slots": made.slots,
        "repetitions": report.most_runs - 1,
        "extra_steps": report.plain_runs,
        "runs": report.runs,
        "most_runs": report.most_runs,
        "saves": report.saves,
        "loads": report.loads,
        "peak_tapes": report.peak_tapes,
        "bytes": made.bytes,
    }
    if isinstance(made.schedule, Binomial):
        slots = made.schedule.slots
        splits = binomial.optimal_splits(steps=made.steps, slots=slots)
        facts["slots"] = slots
        facts["longest_chain"] = binomial.beta(slots=slots, repetitions=report.most_runs - 1)
        facts["first_splits"] = [splits[0], splits[-1]] if splits else []
        facts["neighbours"] = [
            {
                "slots": c,
                "repetitions": binomial.repetitions(steps=made.steps, slots=c),
                "extra_steps": binomial.extra_steps(steps=made.steps, slots=c),
            }
            for c in _neighbours(made.steps, slots)
        ]
    return facts


def _neighbours(steps: int, slots: int) -> list[int]:
    """Slot counts around the asked one, as far as they change anything."""
    most = max(steps - 1, slots)
    return [c for c in range(max(slots - 2, min(slots, 1)), slots + 3) if c <= most]


def _explained(made: Plan, decimal: bool) -> str:
    """A plan as text that reads well."""
    report, steps = made.report, made.steps
    r = report.most_runs - 1
    lines = [f"{made.schedule} for {counted(steps, 'step')}", ""]
    facts = [
        ("repetitions", f"r = {r}", _repetitions_note(r)),
        ("extra steps", f"{report.plain_runs}", f"plain runs, {report.plain_runs / steps:.3g} a step"),
        ("all runs", f"{report.runs}", f"with the recorded run of every step, {report.runs / steps:.3g} a step"),
    ]
    if report.saves:
        facts.append(("saves", f"{report.saves}", "states written to a slot"))
        facts.append(("loads", f"{report.loads}", "states read back"))
    facts.append(("kept at once", counted(made.slots, "state"), f"and {counted(report.peak_tapes, 'tape')}"))
    if made.bytes:
        facts.append(("memory", format_bytes(made.bytes, decimal=decimal), f"{made.bytes} bytes predicted"))
    width = max(len(value) for _, value, _ in facts)
    lines += [f"  {name:<14}{value:<{width}}  {note}".rstrip() for name, value, note in facts]
    if isinstance(made.schedule, Binomial) and steps > 1:
        lines += ["", *_surroundings(steps, made.schedule.slots, r)]
    return "\n".join(lines)


def _repetitions_note(r: int) -> str:
    if r == 0:
        return "nothing is recomputed"
    return f"no step runs plainly more than {'once' if r == 1 else f'{r} times'}"


def _surroundings(steps: int, slots: int, r: int) -> list[str]:
    """What the slots could do besides, and what one or two slots more or fewer would."""
    reach, short = binomial.beta(slots=slots, repetitions=r), binomial.beta(slots=slots, repetitions=r - 1)
    splits = binomial.optimal_splits(steps=steps, slots=slots)
    where = f"at x_{splits[0]}" if len(splits) == 1 else f"anywhere from x_{splits[0]} to x_{splits[-1]}"
    lines = [
        f"  Longest chain in {counted(slots, 'slot')}: beta({slots}, {r}) = {reach}; with r = {r - 1}, {short}.",
        f"  The first checkpoint after x_0 may lie {where}.",
    ]
    if r > 1:
        fewest = binomial.fewest_slots(steps=steps, repetitions=r - 1)
        lines.append(f"  r = {r - 1} takes {counted(fewest, 'slot')}.")
    rows = [("slots", "r", "extra steps", "a step")]
    for c in _neighbours(steps, slots):
        extra = binomial.extra_steps(steps=steps, slots=c)
        repetitions = binomial.repetitions(steps=steps, slots=c)
        rows.append((f"{'> ' if c == slots else ''}{c}", str(repetitions), str(extra), f"{extra / steps:.3g}"))
    return [*lines, "", *aligned(rows)]


def _sweep(options: argparse.Namespace) -> str:
    state, tape = _size("--state", options.state), _size("--tape", options.tape)
    decimal = _decimal(options.state, options.tape)
    if options.uniform:
        return _uniform(options, state, decimal)
    if options.slots is None:
        raise ValueError("which slots? give -c, for instance -c 1:50, or --uniform")
    plans = sweep(options.steps, slot_numbers(options.slots), state or 0, tape or 0)
    wrote = _write(plot.sweep(plans, decimal=decimal), options.out) if options.out else ""
    if options.json:
        return json.dumps([_row(made) for made in plans], indent=2)
    sized = any(made.bytes for made in plans)
    rows = [("slots", "r", "extra steps", "runs a step", "saves", "tapes") + (("memory",) if sized else ())]
    for made in plans:
        row = _row(made)
        cells = [row["slots"], row["repetitions"], row["extra_steps"], f"{row['runs'] / made.steps:.3f}", row["saves"]]
        memory = (format_bytes(made.bytes, decimal=decimal),) if sized else ()
        rows.append((*(str(cell) for cell in cells), str(made.report.peak_tapes), *memory))
    return "\n".join([f"{counted(options.steps, 'step')}, Binomial, and last StoreAll", "", *aligned(rows)]) + wrote


def _row(made: Plan) -> dict[str, Any]:
    """One line of a sweep: slots as asked, 'all' for the plan that keeps every tape."""
    facts = _facts(made)
    if not isinstance(made.schedule, Binomial):
        facts["slots"] = "all"
    for name in ("neighbours", "first_splits"):
        facts.pop(name, None)
    return facts


def slot_numbers(text: str) -> list[int]:
    """The numbers in "1:50" (both ends included), "1:50:5" (every fifth), "8", or "1,2,4,8"."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = [_integer("--slots", end) for end in part.split(":")]
        if len(ends) > 3 or ends[-1] < 1 or (len(ends) > 1 and ends[0] > ends[1]):
            raise ValueError(f"--slots {text} is no range of slots; give for instance 1:50, 1:50:5 or 1,2,4,8")
        numbers += range(ends[0], ends[-1 if len(ends) < 3 else 1] + 1, ends[2] if len(ends) == 3 else 1)
    return numbers


def _uniform(options: argparse.Namespace, state: int | None, decimal: bool) -> str:
    if options.slots is not None:
        raise ValueError(f"-c {options.slots} says nothing with --uniform: its rows are numbers of checkpoints")
    steps = binomial.whole("steps", options.steps, least=1)
    made = uniform_sweep(steps, state or 1, _checkpoints(steps))
    wrote = _write(plot.uniform(made, decimal=decimal), options.out) if options.out else ""
    least, everything = made.least, made.store_all
    if options.json:
        facts = {
            "steps": steps,
            "state_bytes": state,
            "least": least._asdict(),
            "two_sqrt_steps": made.bound,
            "store_all": everything._asdict(),
            "rows": [row._asdict() for row in made.rows],
        }
        return json.dumps(facts, indent=2)
    return "\n".join(_uniform_lines(made, decimal and state is not None, state is not None)) + wrote


def _uniform_lines(made: UniformSweep, decimal: bool, sized: bool) -> list[str]:
    least, steps = made.least, made.steps
    rows = [("checkpoints", "states", "of store-all") + (("memory",) if sized else ())]
    for row in [row for row in made.rows if row.checkpoints in _round_numbers(steps) or row == least]:
        mark = "> " if row == least else ""
        memory = (format_bytes(row.bytes, decimal=decimal),) if sized else ()
        rows.append((f"{mark}{row.checkpoints}", str(row.states), f"{100 * row.states / steps:.1f} %", *memory))
    stored = (format_bytes(made.store_all.bytes, decimal=decimal),) if sized else ()
    rows.append(("store all", str(steps), "100.0 %", *stored))
    return [
        f"{counted(steps, 'step')}, checkpoints at equal distances: k checkpoints and a segment of {steps}/k states",
        "",
        *aligned(rows),
        "",
        f"  Least: k = {least.checkpoints} with {counted(least.states, 'state')}; 2 sqrt({steps}) = {made.bound:.4g}.",
        f"  Every step then runs plainly at most twice; Binomial does that with "
        f"{counted(binomial.fewest_slots(steps=steps, repetitions=2), 'slot')}.",
    ]


def _checkpoints(steps: int) -> list[int]:
    """All of 1 .. n for a short chain; for a long one a few hundred, dense around sqrt(n)."""
    if steps <= 2000:
        return list(range(1, steps + 1))
    root = isqrt(steps)
    spread = (round(steps ** (k / 200)) for k in range(201))
    return sorted({min(steps, k) for k in spread} | {root, root + 1})


def _round_numbers(steps: int) -> set[int]:
    return {m * 10**e for e in range(len(str(steps))) for m in (1, 2, 3, 5, 7)} | {steps}


def _draw(options: argparse.Namespace) -> str:
    schedule = schedule_of(options)
    if options.out:
        if options.steps > WIDEST_PICTURE:
            raise ValueError(f"-n {options.steps} is too wide for a picture; give at most {WIDEST_PICTURE} steps")
        wrote = _write(plot.draw(schedule, options.steps), options.out)
    if options.json:
        actions = [[type(action).__name__, *action[1:]] for action in both_sweeps(schedule, options.steps)]
        return json.dumps({"schedule": str(schedule), "steps": options.steps, "actions": actions})
    if options.out:
        return wrote.strip()
    if options.steps > WIDEST_TEXT:
        raise ValueError(
            f"-n {options.steps} is too wide for text; give --out FILE.png, or at most {WIDEST_TEXT} steps"
        )
    traced = trace(schedule, options.steps)
    legend = "> plain run   o record   < reverse   x record and reverse at once   | state kept"
    return f"{schedule}, {counted(options.steps, 'step')}\n\n{letters(traced)}\n\n{legend}"


def _write(figure: Any, path: Path) -> str:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; give a file in a folder that exists") from error
    return f"\n\nwrote {path}"


def _size(name: str, text: str | None) -> int | None:
    return None if text is None else parse_bytes(text, name)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} {text} is not a number") from None


def _decimal(*sizes: str | None) -> bool:
    """Whether the caller speaks in powers of 1000."""
    return any(size.strip().upper().endswith(("KB", "MB", "GB", "TB")) for size in sizes if size)


def _table(options: argparse.Namespace) -> str:
    lengths = LENGTHS if options.steps is None else [_integer("--steps", part) for part in options.steps.split(",")]
    made = uniform_table(lengths)
    return json.dumps([asdict(row) for row in made], indent=2) if options.json else uniform_text(made)


def _compare(options: argparse.Namespace) -> str:
    made = ways(options.steps, options.slots, options.block)
    if options.json:
        return json.dumps([asdict(way) | {"schedule": str(way.schedule)} for way in made], indent=2)
    head = f"{counted(options.steps, 'step')} in {counted(options.slots, 'slot')}, blocks of {options.block}"
    return f"{head}\n\n{ways_text(made, options.steps)}"


COMMANDS = {"plan": _plan, "sweep": _sweep, "draw": _draw, "table": _table, "compare": _compare}
