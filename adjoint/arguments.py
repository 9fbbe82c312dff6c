"""What may be said to the command ``adjoint``, and what its words mean; ValueError for what cannot be meant."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from adjoint.measure import Recipe
from adjoint.methods import NAMED
from adjoint.problems import PROBLEMS, problem_named
from revolve.cli import Parser

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
  adjoint estimate --layers 48 --sequence 2048 --width 4096
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
  adjoint compare neural_ode --method tsit5 --json
  adjoint compare robertson --tolerances 1e-6""",
    "engines": """\
  adjoint engines lorenz
  adjoint engines lotka_volterra --size 1000 --dt 0.01 --slots 20
  adjoint engines pendulum --method dopri5 --json""",
    "estimate": """\
  adjoint estimate
  adjoint estimate --layers 48 --sequence 2048 --width 4096 --budget 8GiB
  adjoint estimate --layers 12 --width 768 --heads 12 --dtype float32 --json""",
    "examples": """\
  adjoint examples
  adjoint examples --json""",
}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def make_parser() -> Parser:
    parser = Parser(
        prog="adjoint",
        description=DESCRIPTION,
        epilog=f"problems:\n{_problem_list()}\n\nexamples:\n{EXAMPLES['adjoint']}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar=" | ".join(COMMANDS))
    for name, (text, add_arguments) in COMMANDS.items():
        listed = "" if name in ("demo", "estimate", "examples") else f"problems:\n{_problem_list()}\n\n"
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"{listed}examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command)
        command.add_argument("--threads", type=int, default=1, help="of torch; more than 1 pay for large states only")
        command.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    return parser


def _for_demo(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("adjoint-demo"),
        help="folder for pictures (default: %(default)s)",
    )


def _for_gradient(command: argparse.ArgumentParser) -> None:
    _problem(command)
    command.add_argument("--slots", help="states kept at once, or 'all'")
    command.add_argument("--budget", help="memory instead of slots, such as 64MiB")
    known = "discrete (default), backprop, tangent, backsolve, interpolating, quadrature or gauss"
    command.add_argument("--gradient", default="discrete", help=known)
    _steps(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="draw the schedule (png, pdf, svg)")


def _for_sweep(command: argparse.ArgumentParser) -> None:
    _problem(command)
    slots = "1,2,3,5,8,13,20,35,50"
    command.add_argument(
        "--slots", default=slots, help=f"1:50 (both ends included), 1:50:5 or 1,2,4,8 (default: {slots})"
    )
    _steps(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="draw memory against recomputation (png, pdf, svg)")


def _for_compare(command: argparse.ArgumentParser) -> None:
    _problem(command)
    command.add_argument("--tolerances", default="1e-4,1e-6,1e-8", help="relative and absolute (default: %(default)s)")
    command.add_argument("--slots", type=int, default=8, help="of the discrete gradient that recomputes (default: 8)")
    command.add_argument("--method", help="an adaptive method (default: dopri5; for a stiff problem what suits it)")
    command.add_argument("--out", type=Path, metavar="FILE", help="draw errors, times and memory (png, pdf, svg)")


def _for_engines(command: argparse.ArgumentParser) -> None:
    _problem(command)
    command.add_argument("--slots", help="states kept at once, or 'all'")
    _steps(command)


def _for_estimate(command: argparse.ArgumentParser) -> None:
    sizes = {"layers": 48, "sequence": 2048, "width": 4096, "heads": 32, "batch": 1}
    for name, size in sizes.items():
        command.add_argument(f"--{name}", type=int, default=size, help="(default: %(default)s)")
    command.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    command.add_argument("--budget", help="for activations, such as 8GiB")
    command.set_defaults(out=None)


def _for_examples(command: argparse.ArgumentParser) -> None:
    command.set_defaults(out=None)


def _problem(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="which problem")
    command.add_argument("--size", type=int, help="of a problem that has sizes: cells, genes, populations")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    command.add_argument("--dtype", choices=list(DTYPES), default="float64", help="default: %(default)s")


def _problem_list() -> str:
    width = max(map(len, PROBLEMS))
    return "\n".join(f"  {problem.name:<{width}}  {problem.description}" for problem in PROBLEMS.values())


def _steps(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", help="a method (default: what suits the problem)")
    command.add_argument("--dt", type=float, help="longest fixed step, or the first adaptive one")
    command.add_argument("--rtol", type=float, help="relative tolerance of an adaptive method")
    command.add_argument("--atol", type=float, help="absolute tolerance of an adaptive method")


def recipe_of(options: argparse.Namespace, *names: str) -> Recipe:
    """What the options ask for; ValueError for what cannot be had."""
    problem = problem_named(options.name)
    chosen = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "method" in chosen and "dt" not in chosen:
        chosen["dt"] = None if chosen["method"] != problem.method else problem.dt
    recipe = Recipe(options.name, options.size, str(device_named(options.device)), DTYPES[options.dtype], chosen)
    try:
        recipe.case()
    except TypeError as error:  # some devices have no double precision
        raise ValueError(f"--dtype {options.dtype} on --device {options.device}: {error}") from None
    return recipe


def device_named(name: str) -> torch.device:
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


def slots_in(text: str | None) -> int | str | None:
    if text is None or text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--slots {text} is not a number; give for instance 5, or all") from None


def tolerances_in(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < 1 for number in numbers):
        raise ValueError(f"--tolerances {text} are no tolerances; give for instance 1e-4,1e-6,1e-8")
    return numbers


def check_adaptive(method: str) -> None:
    known = [name for name, tableau in NAMED.items() if tableau.adaptive]
    if method not in known:
        raise ValueError(f"--method {method} does not control its steps; give one of {', '.join(known)}")


def check_writable(path: Path | None) -> None:
    """Say that a picture cannot be written before the work is done, not after."""
    if path is None:
        return
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(f"--out {path} is no kind of picture; end it in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}; give a file in a folder that exists")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("a model fitted to data, slots against recomputation, discrete against continuous", _for_demo),
    "gradient": ("one gradient, its plan, a Taylor test of it, and what was counted", _for_gradient),
    "sweep": ("recomputation, memory and time against slots, predicted and measured", _for_sweep),
    "compare": ("errors of discrete and continuous gradients against tolerance, and their price", _for_compare),
    "engines": ("which engine takes the steps, why, and how long each of them takes", _for_engines),
    "estimate": ("what training a language model takes, plan by plan, sized without its numbers", _for_estimate),
    "examples": ("the example scripts, and how to run them", _for_examples),
}
