"""The command ``adjoint``: a demonstration, and gradients of named problems."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console, RenderableType
from rich.text import Text
from torch import Tensor

from adjoint import check, plot, tables
from adjoint.arguments import check_adaptive, check_writable, make_parser, recipe_of, slots_in, tolerances_in
from adjoint.compare import compare, every_way
from adjoint.demo import demonstrate
from adjoint.engines.choose import ENGINES
from adjoint.estimate import TransformerBlock, estimate
from adjoint.measure import Recipe, Scales, sweep
from adjoint.problems import problem_named
from adjoint.progress import bar
from adjoint.race import raced
from adjoint.timeline import SolveError
from revolve.binomial import whole
from revolve.budget import format_bytes
from revolve.cli import WIDEST_PICTURE, slot_numbers
from revolve.plot import draw

SCRIPTS = {
    "lynx_hare": "Lynx and hare: a predator-prey model fitted to the fur trade",
    "repressilator": "The repressilator: the rates of a gene network from its proteins alone",
    "lorenz": "Lorenz's attractor: when gradients stop meaning anything",
    "long_memory": "A long memory: a state-space model of a long sequence",
    "numpy_simulation": "A numpy simulation with a transpose of its own, driven by revolve alone",
}
"""The first examples, for an installation without the repository."""
COUNTED = ("steps", "rejected", "evaluations", "plain_runs", "recorded_runs")
"""What a solution's statistics are asked for."""
WIDTH = 100
"""Columns of a table that is not printed to a terminal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0: it succeeded, 1: what it found is wrong, 2: bad input, 130: interrupted."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads} computes nothing; give at least 1")
        torch.set_num_threads(options.threads)
        code = COMMANDS[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; nothing is left to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _complain(options, "interrupted", 130)
    except (SolveError, torch.OutOfMemoryError) as error:
        return _complain(options, str(error), 1)
    except ValueError as error:
        return _complain(options, str(error), 2)
    return code


def _complain(options: argparse.Namespace, sentence: str, code: int) -> int:
    print(f"adjoint {options.command}: {sentence}", file=sys.stderr)
    return code


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def _json(facts: dict[str, Any]) -> None:
    print(json.dumps(_speakable(facts), indent=2, allow_nan=False))


def _speakable(value: Any) -> Any:
    """The same value without NaN and infinity, for which JSON has no word."""
    if isinstance(value, dict):
        return {name: _speakable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_speakable(part) for part in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _tell(options: argparse.Namespace, facts: dict[str, Any], *words: RenderableType) -> None:
    """What a command found: as JSON if that was asked for, else in words and tables."""
    if options.json:
        _json(facts)
        return
    console = _console()
    if "problem" in facts:
        console.print(f"[bold]{options.name}[/]: {problem_named(options.name).description}")
    for part in words:
        console.print(part, soft_wrap=isinstance(part, Text))
    if getattr(options, "out", None) is not None:  # not every command draws
        console.print(Text(f"wrote {options.out}"), soft_wrap=True)


def _write(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; give a file in a folder that exists") from error


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
    console.print(Text(f"{', '.join(pictures)} are in the folder {folder}"), style="bold", soft_wrap=True)
    return _judged(options, [comparison.verdict for comparison in found.compared])


def _judged(options: argparse.Namespace, verdicts: Sequence[str]) -> int:
    for verdict in filter(None, verdicts):
        _complain(options, verdict, 1)
    return 1 if any(verdicts) else 0


def _gradient(options: argparse.Namespace) -> int:
    recipe = recipe_of(options, "budget", "gradient", "method", "dt", "rtol", "atol")
    recipe = recipe.but(slots=slots_in(options.slots))
    check_writable(options.out)
    result = recipe(recipe.case())
    plan, stats = result.solution.plan, result.solution.stats
    if options.out is not None:
        if plan is None:
            raise ValueError(f"--out draws the schedule, and gradient={options.gradient!r} has none; leave it out")
        if plan.steps > WIDEST_PICTURE:
            raise ValueError(f"--out cannot draw {plan.steps} steps; take at most {WIDEST_PICTURE}, or leave it out")
        _write(draw(plan.schedule, plan.steps), options.out)
    slope = taylor_slope(recipe)
    counted = {name: getattr(stats, name) for name in COUNTED}
    facts = {
        "problem": options.name,
        "loss": result.loss,
        "gradient": {name: x.tolist() for name, x in result.gradient.items()},
        "plan": plan and {"schedule": str(plan.schedule), "steps": plan.steps, "bytes": plan.bytes},
        "taylor_slope": slope,
        "stats": counted,
        "seconds": result.seconds,
    }
    words = {name.replace("_", " "): f"{number:,}" for name, number in counted.items()}
    words["time"] = tables.seconds(result.seconds)
    if plan is not None:
        words["plan"] = plan.explain()
    words["Taylor test"] = f"slope {slope:.3f} of the remainders; 2 if the gradient is right, 1 if it is not"
    _tell(options, facts, tables.gradient_table(result.loss, result.gradient), tables.facts_table(words))
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
    recipe = recipe_of(options, "method", "dt", "rtol", "atol")
    check_writable(options.out)
    with Scales() as scales, bar("sweeping slots", len(slots) + 1, not options.json) as tick:
        found = sweep(recipe, slots, scales, tick=tick)
    if options.out is not None:
        _write(plot.tradeoff(found), options.out)
    _tell(options, found.facts(), tables.sweep_table(found))
    return 0


def _compare(options: argparse.Namespace) -> int:
    tolerances = tolerances_in(options.tolerances)
    recipe = recipe_of(options)
    method = options.method or (recipe.named.method if recipe.named.stiff else "dopri5")
    check_adaptive(method)
    check_writable(options.out)
    work = 1 + len(tolerances) * len(every_way(options.slots, recipe))
    with Scales() as scales, bar("comparing gradients", work, not options.json) as tick:
        found = compare(recipe, tolerances, scales, method=method, slots=options.slots, tick=tick)
    if options.out is not None:
        _write(plot.compare(found), options.out)
    _tell(options, found.facts(), tables.compare_table(found))
    return _judged(options, [found.verdict])


def _engines(options: argparse.Namespace) -> int:
    recipe = recipe_of(options, "method", "dt", "rtol", "atol").but(slots=slots_in(options.slots))
    found = [raced(recipe, engine) for engine in ENGINES]
    eager = next(race for race in found if race.engine == "eager")
    facts = {"problem": options.name, "engines": {race.engine: race.facts(eager) for race in found}}
    _tell(options, facts, tables.engines_table(found, eager))
    return 0


def _estimate(options: argparse.Namespace) -> int:
    """Sizes of a stack of transformer blocks, on the device meta."""
    for name in ("sequence", "width", "heads", "batch"):
        whole(name, getattr(options, name), least=1)
    if options.width % options.heads:
        raise ValueError(f"--heads {options.heads} does not divide --width {options.width}; give a divisor")
    kind = getattr(torch, options.dtype)
    found = estimate(
        lambda: TransformerBlock(options.width, options.heads).to(kind),
        lambda: torch.empty(options.batch, options.sequence, options.width, dtype=kind),
        options.layers,
        options.budget,
    )
    apart = {"parameters": found.parameters, "gradients": found.gradients, "optimizer": found.optimizer}
    plans = {name: plan if isinstance(plan, str) else plan.bytes for name, plan in found.plans.items()}
    lines = {name: format_bytes(size) for name, size in apart.items()}
    for name, size in plans.items():
        lines[f"activations, {name}"] = (
            size if isinstance(size, str) else f"{format_bytes(size)}, {found.runs[name]:.3g} runs a block"
        )
    _tell(options, apart | {"activations": plans, "runs": found.runs}, tables.facts_table(lines))
    return 0


def _examples(options: argparse.Namespace) -> int:
    """The scripts of a checkout beside the package or in the current folder; else the names of the first ones."""
    folders = [folder / "examples" for folder in (Path(__file__).parents[1], Path.cwd())]
    folder = next((folder for folder in folders if (folder / "lynx_hare.py").is_file()), None)
    scripts = SCRIPTS if folder is None else {path.stem: _first_line(path) for path in sorted(folder.glob("[!_]*.py"))}
    where = Path("examples") if folder is None else folder
    lines: list[RenderableType] = [tables.words_table({"example": "what it shows"} | scripts)]
    if folder is None:
        lines.append(
            tables.note("They are in the folder examples/ of the repository, which an installation leaves out.")
        )
    lines.append(Text(f"Run one: python {where / 'lynx_hare.py'} --out ."))
    _tell(options, {"folder": None if folder is None else str(folder), "examples": scripts}, *lines)
    return 0


def _first_line(script: Path) -> str:
    """What a script says of itself."""
    text = ast.get_docstring(ast.parse(script.read_text())) or ""
    return text.partition("\n")[0].rstrip(".").replace("`", "")


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "gradient": _gradient,
    "sweep": _sweep,
    "compare": _compare,
    "engines": _engines,
    "estimate": _estimate,
    "examples": _examples,
}
