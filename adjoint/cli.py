"""The command ``adjoint``: a demonstration, and gradients of named problems."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from adjoint import check, plot, tables
from adjoint.compare import compare, ways
from adjoint.demo import demonstrate
from adjoint.measure import Recipe, Scales, finite, sweep
from adjoint.problems import PROBLEMS, problem_named
from adjoint.progress import bar
from adjoint.timeline import SolveError
from revolve.cli import WIDEST_PICTURE, Parser, slot_numbers
from revolve.plot import draw

DESCRIPTION = """\
Gradients of ODE solves within a memory budget: a demonstration on real data, and named problems to try things out on.

Slots count the states kept at once, that of the first time included; 'all' keeps every tape. Sizes are bytes, or text
such as 512MiB (powers of 1024) and 1.5GB (powers of 1000)."""
EXAMPLES = {
    "adjoint": """\
  adjoint demo
  adjoint gradient lorenz --slots 5
  adjoint sweep lotka_volterra --slots 1:20 --out sweep.png
  adjoint compare gene_ring --out compare.png
  adjoint examples""",
    "demo": """\
  adjoint demo
  adjoint demo --out /tmp/pictures
  adjoint demo --json > demo.json""",
    "gradient": """\
  adjoint gradient lotka_volterra
  adjoint gradient lorenz --method dopri5 --rtol 1e-8 --slots 5
  adjoint gradient gray_scott --size 64 --budget 4MiB --out schedule.png
  adjoint gradient gene_ring --gradient backsolve --json""",
    "sweep": """\
  adjoint sweep lotka_volterra --slots 1:50
  adjoint sweep lotka_volterra --size 1000 --slots 2,4,8,16 --out sweep.png
  adjoint sweep gray_scott --size 64 --slots 2:20:6 --json""",
    "compare": """\
  adjoint compare gene_ring
  adjoint compare pendulum --tolerances 1e-4,1e-6 --slots 5 --out compare.png
  adjoint compare neural_ode --method tsit5 --json""",
    "examples": """\
  adjoint examples
  adjoint examples --json""",
}
SCRIPTS = {
    "lynx_hare": "a predator-prey model fitted to the fur trade",
    "repressilator": "the rates of a gene network from its proteins alone",
    "lorenz": "when gradients stop meaning anything",
    "long_memory": "a state-space model of a long sequence, by scan",
    "numpy_simulation": "a numpy simulation with a transpose of its own, driven by revolve alone",
}
"""The first examples, for an installation without the repository."""
DTYPES = {"float64": torch.float64, "float32": torch.float32}
WIDTH = 100
"""Columns of a table that is not printed to a terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0: it succeeded, 1: what it found is wrong, 2: bad input, 130: interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads} computes nothing; give at least 1")
        torch.set_num_threads(options.threads)
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _complain(options, "interrupted", 130)
    except SolveError as error:
        return _complain(options, str(error), 1)
    except ValueError as error:
        return _complain(options, str(error), 2)
    return code


def _complain(options: argparse.Namespace, sentence: str, code: int) -> int:
    print(f"adjoint {options.command}: {sentence}", file=sys.stderr)
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="adjoint",
        description=DESCRIPTION,
        epilog=f"problems:\n{_problem_list()}\n\nexamples:\n{EXAMPLES['adjoint']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar=" | ".join(COMMANDS))

    def command(name: str, text: str, *, problem: bool) -> argparse.ArgumentParser:
        listed = f"problems:\n{_problem_list()}\n\n" if problem else ""
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"{listed}examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=COMMANDS[name])
        made.add_argument("--json", action="store_true", help="print JSON, and nothing else")
        made.add_argument("--threads", type=int, default=1, help="of torch (default: 1; more pay for large states only)")
        if problem:
            made.add_argument("name", metavar="NAME", help="which problem")
            made.add_argument("--size", type=int, help="of a problem that has sizes: points, cells, populations")
            made.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
            made.add_argument("--dtype", choices=list(DTYPES), default="float64", help="default: %(default)s")
        return made

    demo = command("demo", "a model fitted to data, slots against recomputation, discrete against continuous", problem=False)
    demo.add_argument("--out", type=Path, metavar="DIR", default=Path("adjoint-demo"), help="folder for pictures (default: ./%(default)s)")

    one = command("gradient", "one gradient, its plan, a Taylor test of it, and what was counted", problem=True)
    one.add_argument("--slots", help="states kept at once, or 'all'")
    one.add_argument("--budget", help="memory instead of slots, such as 64MiB")
    one.add_argument("--gradient", default="discrete", help="discrete (default), backprop or backsolve")
    _steps(one)
    one.add_argument("--out", type=Path, metavar="FILE", help="draw the schedule (png, pdf, svg)")

    many = command("sweep", "recomputation, memory and time against slots, predicted and measured", problem=True)
    many.add_argument("--slots", default="1,2,3,5,8,13,20,35,50", help="1:50 (both ends included), 1:50:5 or 1,2,4,8 (default: %(default)s)")
    _steps(many)
    many.add_argument("--out", type=Path, metavar="FILE", help="draw memory against recomputation (png, pdf, svg)")

    against = command("compare", "errors of discrete and continuous gradients against tolerance, and their price", problem=True)
    against.add_argument("--tolerances", default="1e-4,1e-6,1e-8", help="relative and absolute (default: %(default)s)")
    against.add_argument("--slots", type=int, default=8, help="of the discrete gradient that recomputes (default: 8)")
    against.add_argument("--method", default="dopri5", help="adaptive (default: %(default)s); torchdiffeq uses dopri5")
    against.add_argument("--out", type=Path, metavar="FILE", help="draw errors, times and memory (png, pdf, svg)")

    command("examples", "the example scripts, and how to run them", problem=False)
    return parser


def _problem_list() -> str:
    width = max(map(len, PROBLEMS))
    return "\n".join(f"  {problem.name:<{width}}  {problem.description}" for problem in PROBLEMS.values())


def _steps(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", help="a Runge-Kutta method (default: what suits the problem)")
    command.add_argument("--dt", type=float, help="longest fixed step, or the first adaptive one")
    command.add_argument("--rtol", type=float, help="relative tolerance of an adaptive method")
    command.add_argument("--atol", type=float, help="absolute tolerance of an adaptive method")


def _recipe(options: argparse.Namespace, *names: str) -> Recipe:
    """What the options ask for; ValueError for what cannot be had."""
    problem = problem_named(options.name)
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "method" in chosen and "dt" not in chosen:
        chosen["dt"] = None if chosen["method"] != problem.method else problem.dt
    recipe = Recipe(options.name, options.size, str(_device(options.device)), DTYPES[options.dtype], chosen)
    recipe.case()
    return recipe


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is no device; give cpu, cuda or cuda:1") from None
    if device.type == "meta":
        raise ValueError("--device meta holds no numbers to print; give cpu or cuda")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def _slots(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--slots {text} is not a number; give for instance 5, or all") from None


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=2, allow_nan=False))


def _write(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; give a file in a folder that exists") from error


def _writable(path: Path | None) -> None:
    """Say that a picture cannot be written before the work is done, not after."""
    if path is None:
        return
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--out {path} is no kind of picture; end it in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}; give a file in a folder that exists")


def _demo(options: argparse.Namespace) -> int:
    out: Path = options.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {out}: {error.strerror}; give another by --out") from error
    console = Console(quiet=True) if options.json else _console()
    found = demonstrate(console.print, not options.json)
    pictures = found.pictures()
    for name, figure in pictures.items():
        _write(figure, out / name)
    folder = out.resolve()
    if options.json:
        _json(found.facts() | {"folder": str(folder), "pictures": list(pictures)})
    console.print(f"{', '.join(pictures)} are in", style="bold")
    console.print(str(folder), style="bold", soft_wrap=True)
    return _judged(options, [comparison.verdict for comparison in found.compared])


def _judged(options: argparse.Namespace, verdicts: Sequence[str]) -> int:
    for verdict in filter(None, verdicts):
        _complain(options, verdict, 1)
    return 1 if any(verdicts) else 0


def _gradient(options: argparse.Namespace) -> int:
    recipe = _recipe(options, "budget", "gradient", "method", "dt", "rtol", "atol")
    recipe = recipe.but(slots=_slots(options.slots))
    _writable(options.out)
    result = recipe(recipe.case())
    solution = result.solution
    if options.out is not None:
        if solution.plan is None:
            raise ValueError(f"--out draws the schedule, and gradient={options.gradient!r} has none; leave it out")
        if solution.plan.steps > WIDEST_PICTURE:
            raise ValueError(f"{solution.plan.steps} steps are too wide for a picture; take at most {WIDEST_PICTURE}")
        _write(draw(solution.plan.schedule, solution.plan.steps), options.out)
    slope = taylor_slope(recipe)
    stats = solution.stats
    counted = {name: getattr(stats, name) for name in ("steps", "rejected", "evaluations", "plain_runs", "recorded_runs")}
    if options.json:
        plan = None if solution.plan is None else {"schedule": str(solution.plan.schedule), "bytes": solution.plan.bytes}
        gradient = {name: x.tolist() for name, x in result.gradient.items()}
        facts = {"problem": options.name, "loss": result.loss, "gradient": gradient, "plan": plan}
        _json(facts | {"taylor_slope": finite(slope), "stats": counted, "seconds": result.seconds})
        return 0
    console = _console()
    console.print(f"[bold]{options.name}[/]: {recipe.named.description}")
    console.print(f"loss {result.loss:.8g}\n")
    console.print(tables.gradient_table(result.gradient))
    words = {name.replace("_", " "): number for name, number in counted.items()} | {"time": tables.seconds(result.seconds)}
    if solution.plan is not None:
        words["plan"] = solution.plan.explain()
    words["Taylor test"] = f"slope {slope:.4f}, of the remainders in double precision; 2 if the gradient is right, 1 if not"
    console.print(tables.facts_table(words))
    if options.out is not None:
        console.print(f"\nwrote {options.out}", soft_wrap=True)
    return 0


def taylor_slope(recipe: Recipe) -> float:
    """How fast the remainders of the loss fall, with the gradient of this recipe; in double precision."""
    case = replace(recipe, dtype=torch.float64).case()
    names = list(case.inputs)

    def loss(*values: Tensor) -> Tensor:
        moved = replace(case, y0=values[0], parameters=dict(zip(names[1:], values[1:], strict=True)))
        return case.loss(recipe.solved(moved).ys)

    return check.taylor_test(loss, list(case.inputs.values())).slope


def _sweep(options: argparse.Namespace) -> int:
    slots = slot_numbers(options.slots)
    recipe = _recipe(options, "method", "dt", "rtol", "atol")
    _writable(options.out)
    with Scales() as scales, bar("sweeping slots", len(slots) + 1, not options.json) as tick:
        found = sweep(recipe, slots, scales, tick=tick)
    if options.out is not None:
        _write(plot.tradeoff(found), options.out)
    if options.json:
        _json(found.facts())
        return 0
    console = _console()
    console.print(f"[bold]{options.name}[/]: {found.steps} steps, a state of {found.state_bytes:,} bytes")
    console.print(tables.sweep_table(found))
    if options.out is not None:
        console.print(f"wrote {options.out}", soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace) -> int:
    tolerances = _tolerances(options.tolerances)
    recipe = _recipe(options)
    _writable(options.out)
    work = 1 + len(tolerances) * len(ways(options.slots))
    with Scales() as scales, bar("comparing gradients", work, not options.json) as tick:
        found = compare(recipe, tolerances, scales, method=options.method, slots=options.slots, tick=tick)
    if options.out is not None:
        _write(plot.compare(found), options.out)
    if options.json:
        _json(found.facts())
    else:
        console = _console()
        console.print(f"[bold]{options.name}[/]: {recipe.named.description}")
        console.print(tables.compare_table(found))
        if options.out is not None:
            console.print(f"wrote {options.out}", soft_wrap=True)
    return _judged(options, [found.verdict])


def _tolerances(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1 for number in numbers):
        raise ValueError(f"--tolerances {text} are no tolerances; give for instance 1e-4,1e-6,1e-8")
    return numbers


def _examples(options: argparse.Namespace) -> int:
    """The scripts of a checkout beside the package or in the current folder; else the names of the first ones."""
    folders = [folder / "examples" for folder in (Path(__file__).parents[1], Path.cwd())]
    folder = next((folder for folder in folders if (folder / "lynx_hare.py").is_file()), None)
    scripts = SCRIPTS if folder is None else {
        path.stem: _first_line(path) for path in sorted(folder.glob("[!_]*.py"))
    }
    if options.json:
        _json({"folder": None if folder is None else str(folder), "examples": scripts})
        return 0
    console = _console()
    made = tables.table("example", "what it shows", left=2)
    for name, description in scripts.items():
        made.add_row(name, description)
    console.print(made)
    if folder is None:
        console.print("They are in the folder examples/ of the repository, which an installation leaves out.")
    where = Path("examples") if folder is None else folder
    console.print(f"Run one by: python {where / 'lynx_hare.py'} --out .", soft_wrap=True)
    return 0


def _first_line(script: Path) -> str:
    """What a script says of itself, without its name."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    first = text.partition("\n")[0].rstrip(".")
    return first.partition(": ")[2] or first


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "gradient": _gradient,
    "sweep": _sweep,
    "compare": _compare,
    "examples": _examples,
}
