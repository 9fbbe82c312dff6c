"""The command ``revolve``: price a plan, sweep slots against recomputation, draw a schedule."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from revolve import binomial, plot
from revolve.actions import both_sweeps
from revolve.budget import Plan, Prices, counted, format_bytes, parse_bytes, prices_of, sweep, uniform_sweep
from revolve.choose import add_options, prices_given, schedule_of, storages, unused
from revolve.compare import LENGTHS, aligned, priced_sweep, priced_text, uniform_table, uniform_text, ways, ways_text
from revolve.planner import plan
from revolve.schedules import Binomial, StoreAll
from revolve.texts import beside_others, checkpoints, explained, facts, row, uniform_lines
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
  revolve plan -n 1000 --budget 512MiB --state 8MB --tape 40MB --json
  revolve plan -n 1000 --memories 128MB,2GB:0.004:0.004 --state 8MB --tape 40MB --step-seconds 0.01
  revolve plan -n 100 --schedule bisection
  revolve plan -n 250 --schedule hrevolve --tiers 3,7:10:10""",
    "sweep": """\
  revolve sweep -n 1000 -c 1:50
  revolve sweep -n 1000 -c 1,2,4,8,16 --state 8MB --tape 40MB --out sweep.png
  revolve sweep -n 250 -c 1:30 --write-cost 10 --read-cost 10 --disk 7 --out priced.png
  revolve sweep --uniform -n 100 --state 100MB --out uniform.png""",
    "draw": """\
  revolve draw -n 20 -c 3
  revolve draw -n 100 -c 5 --out schedule.png
  revolve draw -n 50 --schedule periodic --every 10
  revolve draw -n 60 --schedule hrevolve --tiers 2,4:5:5 --out tiers.png
  revolve draw -n 60 --schedule multistage --memory 2 --disk 4 --write-cost 5 --read-cost 5 --out priced.png""",
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
    one.add_argument("--budget", metavar="SIZE", help="memory instead of slots; needs --state and --tape")
    one.add_argument("--mixed", action="store_true", help="tapes may share the budget with states")
    one.add_argument(
        "--memories",
        metavar="SIZE:WRITE:READ,...",
        help="several memories, the fastest first, with the seconds of a write and a read: 128MB,2GB:0.004:0.004 "
        "('any' is a size without a bound)",
    )
    one.add_argument(
        "--step-seconds", type=float, metavar="SECONDS", help="what a run takes, with --memories (default: 1)"
    )
    _sizes(one)
    add_options(one.add_argument_group("a schedule of your choice, in place of the cheapest"), but=("slots", "budget"))

    many = command("sweep", "recomputation against slots, or memory against the number of uniform checkpoints")
    many.add_argument("-c", "--slots", help="1:50 (both ends included), 1:50:5 (every fifth) or 1,2,4,8")
    many.add_argument("--uniform", action="store_true", help="checkpoints at equal distances: k + n/k states")
    many.add_argument(
        "--write-cost", type=float, metavar="PRICE", help="time against memory: the price of a write to disk"
    )
    many.add_argument("--read-cost", type=float, metavar="PRICE", help="the price of a read from disk")
    many.add_argument("--step-cost", type=float, metavar="PRICE", help="the price of a run (default: 1)")
    many.add_argument("--disk", type=int, metavar="N", help="slots on disk (default: as many as one likes)")
    many.add_argument("--out", type=Path, metavar="FILE", help="write a picture as well (png, pdf, svg)")
    _sizes(many)

    drawn = command("draw", "a schedule in time: steps across, time downward, and the life of each slot")
    add_options(drawn, schedule="binomial")
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
    state, tape = _size("--state", options.state), _size("--tape", options.tape)
    if options.schedule is not None:
        options.field_slots = None if options.slots is None else _integer("--slots", options.slots)
        options.field_budget = _size("--budget", options.budget)
        made = Plan(options.steps, schedule_of(options), state or 0, tape or 0)
    else:
        unused(options)
        made = _cheapest(options, state, tape)
    if options.json:
        return json.dumps(facts(made), indent=2)
    if options.schedule is None and isinstance(made.schedule, (Binomial, StoreAll)):
        return explained(made, _decimal(options.budget, options.state, options.tape))
    return beside_others(made)


def _cheapest(options: argparse.Namespace, state: int | None, tape: int | None) -> Plan:
    """What slots, a budget or several memories buy."""
    seconds = options.step_seconds
    if seconds is not None and options.memories is None:
        raise ValueError(f"--step-seconds {seconds} says nothing without --memories; leave it out")
    if seconds is not None and not 0 < seconds < inf:
        raise ValueError(f"--step-seconds {seconds} is no time of a run; give seconds, more than 0")
    if sum(given is not None for given in (options.slots, options.budget, options.memories)) != 1:
        raise ValueError(
            "how much memory? give either -c, for instance -c 3, or --budget or --memories, with --state and --tape"
        )
    for name, given in (("--budget", options.budget), ("--memories", options.memories)):
        if given is not None and None in (state, tape):
            raise ValueError(f"{name} {given} needs --state and --tape: the size of a state, and of one tape")
    if options.memories is not None:
        made = plan(
            steps=options.steps,
            tiers=storages(options.memories),
            state_bytes=state,
            tape_bytes=tape,
            prices=None if seconds is None else Prices(seconds),
        )
    else:
        slots = _integer("--slots", options.slots) if options.slots not in (None, "all") else options.slots
        sizes: dict[str, Any] = {"state_bytes": state, "tape_bytes": tape}
        made = plan(steps=options.steps, slots=slots, budget=options.budget, mixed=options.mixed, **sizes)
    return made


def _sweep(options: argparse.Namespace) -> str:
    state, tape = _size("--state", options.state), _size("--tape", options.tape)
    decimal = _decimal(options.state, options.tape)
    if options.uniform:
        return _uniform(options, state, decimal)
    if options.slots is None:
        raise ValueError("which slots? give -c, for instance -c 1:50, or --uniform")
    prices = {name: getattr(options, name) for name in ("write_cost", "read_cost", "step_cost", "disk")}
    if any(price is not None for price in prices.values()):
        return _priced(options, state, decimal)
    plans = sweep(options.steps, slot_numbers(options.slots), state or 0, tape or 0)
    wrote = _write(plot.sweep(plans, decimal=decimal), options.out) if options.out else ""
    if options.json:
        return json.dumps([row(made) for made in plans], indent=2)
    sized = any(made.bytes for made in plans)
    rows = [("slots", "r", "extra steps", "runs a step", "saves", "tapes") + (("memory",) if sized else ())]
    for made in plans:
        found = row(made)
        cells = [
            found["slots"],
            found["repetitions"],
            found["extra_steps"],
            f"{found['runs'] / made.steps:.3f}",
            found["saves"],
        ]
        memory = (format_bytes(made.bytes, decimal=decimal),) if sized else ()
        rows.append((*(str(cell) for cell in cells), str(made.report.peak_tapes), *memory))
    return "\n".join([f"{counted(options.steps, 'step')}, Binomial, and last StoreAll", "", *aligned(rows)]) + wrote


def _priced(options: argparse.Namespace, state: int | None, decimal: bool) -> str:
    """Time against memory."""
    write, read, step = options.write_cost, options.read_cost, options.step_cost
    if write is None or read is None:
        raise ValueError("time against memory needs --write-cost and --read-cost, in the unit of --step-cost")
    made = priced_sweep(
        options.steps,
        slot_numbers(options.slots),
        write=write,
        read=read,
        step_cost=1.0 if step is None else step,
        disk=options.disk,
    )
    figure = plot.priced(made, options.steps, state or 0, decimal=decimal) if options.out else None
    wrote = _write(figure, options.out) if options.out else ""
    if options.json:
        rows = {way: [asdict(row) | {"schedule": str(row.schedule)} for row in rows] for way, rows in made.items()}
        return json.dumps(rows, indent=2)
    head = f"{counted(options.steps, 'step')}, {plot.prices_in_words(made['with a disk'][0].schedule)}"
    return f"{head}\n\n{priced_text(made)}{wrote}"


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
    made = uniform_sweep(steps, state or 1, checkpoints(steps))
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
    return "\n".join(uniform_lines(made, decimal and state is not None, state is not None)) + wrote


def _draw(options: argparse.Namespace) -> str:
    prices = prices_given(options)
    schedule = schedule_of(options)
    prices = prices or (prices_of(schedule) if prices_of(schedule).write else None)
    if options.out:
        if options.steps > WIDEST_PICTURE:
            raise ValueError(f"-n {options.steps} is too wide for a picture; give at most {WIDEST_PICTURE} steps")
        wrote = _write(plot.draw(schedule, options.steps, prices), options.out)
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
