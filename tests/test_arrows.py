"""Imports run one way: the order of the files is written here, and nothing imports upwards."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ORDER = {
    "revolve": (
        "actions",
        "binomial",
        "pieces",
        "schedules",
        "online",
        "selected",
        "segments",
        "hierarchy",
        "multistage",
        "disk",
        "taped",
        "mixed",
        "search",
        "sizes",
        "weigh",
        "chains",
        "catalogue",
        "trees",
        "places",
        "files",
        "codecs",
        "zfp",
        "journal",
        "stores",
        "sweeps",
        "run",
        "referee",
        "reasons",
        "budget",
        "measured",
        "tiles",
        "planner",
        "written",
        "graphs",
        "graph_search",
        "graph_plans",
        "trace",
        "interop",
        "compare",
        "plot",
        "choose",
        "texts",
        "cli",
    ),
    "adjoint": (
        "names",
        "tensors",
        "touched",
        "reach",
        "layout",
        "ambient",
        "tableaus",
        "implicit_tableau",
        "implicit_tableaus",
        "rosenbrock_tableaus",
        "bdf",
        "linear",
        "sparse",
        "timeline",
        "adaptive_timeline",
        "frozen",
        "member_times",
        "lockstep_timeline",
        "lanes",
        "stores",
        "progress",
        "memory",
        "tiers",
        "marks",
        "kept",
        "randomness",
        "captured",
        "draws",
        "transforms",
        "autograd",
        "checked",
        "tangents",
        "join",
        "problem",
        "probe",
        "continued",
        "memories",
        "interpolate",
        "steppers.stages",
        "events",
        "steppers.control",
        "steppers.explicit",
        "steppers.crossings",
        "steppers.first_event",
        "steppers.happening",
        "steppers.eventful",
        "steppers.observed",
        "steppers.member_step",
        "steppers.member_error",
        "steppers.lockstep",
        "steppers.member_sweep",
        "steppers.adams",
        "steppers.symplectic",
        "steppers.vectors",
        "steppers.jacobians",
        "steppers.newton",
        "steppers.consistent",
        "implicit_method",
        "steppers.roots",
        "steppers.implicit_stages",
        "steppers.implicit",
        "steppers.rosenbrock",
        "steppers.bdf",
        "steppers.member_newton",
        "steppers.member_implicit",
        "steppers.member_rosenbrock",
        "methods",
        "engines",
        "engines.native",
        "engines.native.program",
        "engines.native.cells",
        "engines.native.moves",
        "engines.native.operators",
        "engines.native.trace",
        "engines.native.fingerprint",
        "engines.native.pattern",
        "engines.native.compose",
        "engines.native.layout",
        "engines.native.mathematics",
        "engines.native.emit",
        "engines.native.explore",
        "engines.native.driver",
        "engines.native.jacobian",
        "engines.native.arrays",
        "engines.native.algebra",
        "engines.native.space",
        "engines.native.bodies",
        "engines.native.rosenbrock",
        "engines.native.run",
        "engines.native.kernel",
        "engines.native.rows",
        "engines.native.adaptive",
        "engines.native.sweep",
        "engines.choose",
        "staged",
        "discrete",
        "again",
        "reversible",
        "continuous",
        "interpolating",
        "sensitivity",
        "gradients",
        "members",
        "failures",
        "signals",
        "observing",
        "eventful",
        "solve",
        "stepping",
        "scipy_solver",
        "options",
        "call",
        "odeint",
        "recurrence",
        "fastest",
        "linear_scan",
        "scan",
        "state_space.discretise",
        "state_space.model",
        "state_space.linear",
        "state_space.selective",
        "state_space.stack",
        "state_space.cells",
        "state_space.kalman",
        "state_space",
        "blocks",
        "shelves",
        "selective",
        "put_away",
        "passage",
        "choices",
        "weights",
        "chain",
        "checkpointed",
        "estimate",
        "check",
        "newton",
        "steady",
        "cases",
        "stiff_problems",
        "problems",
        "measure",
        "arguments",
        "compare",
        "race",
        "tables",
        "plot",
        "demo",
        "cli",
    ),
}
"""A file imports only files that stand before it; the package's own __init__ stands last."""

MODULES = [(package, path) for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(package: str, path: Path) -> str:
    """ "steppers.explicit" for adjoint/steppers/explicit.py; "" for the package itself."""
    parts = path.relative_to(ROOT / package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, and for ``from a import b`` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_imported(package: str, tree: ast.AST) -> set[str]:
    """The files of the same package that are imported; "" if it is the package itself."""
    order = ORDER[package]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inside = node.module.removeprefix(package).removeprefix(".")
            if node.module == package or node.module.startswith(f"{package}."):
                names = {f"{inside}.{alias.name}".removeprefix(".") for alias in node.names}
                found |= (names & set(order)) or {inside}
        elif isinstance(node, ast.Import):
            within = (alias.name for alias in node.names if alias.name.split(".")[0] == package)
            found |= {name.removeprefix(package).removeprefix(".") for name in within}
    return found


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_a_file_imports_only_files_above_it(package: str, path: Path) -> None:
    name, order = name_of(package, path), ORDER[package]
    above = set(order)
    if path.name != "__init__.py":
        assert name in order, f"give {package}/{name.replace('.', '/')}.py its place in ORDER"
        above = set(order[: order.index(name)])
    for imported in files_imported(package, ast.parse(path.read_text())):
        assert imported in above, f"{package}/{name or '__init__'} imports {imported or package}"


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_no_import_hides_in_a_function_or_behind_a_condition(package: str, path: Path) -> None:
    tree = ast.parse(path.read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    everywhere = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert len(top) == len(everywhere)


def test_revolve_imports_neither_torch_nor_adjoint() -> None:
    for path in (ROOT / "revolve").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(ast.parse(path.read_text()))} & {"torch", "adjoint"}, path


def test_importing_revolve_loads_numpy_and_the_standard_library_only() -> None:
    code = "import revolve, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert not {"torch", "adjoint", "matplotlib", "scipy", "rich"} & set(loaded)


def test_a_gradient_never_knows_the_solve() -> None:
    path = ROOT / "adjoint" / "gradients.py"
    if path.exists():
        assert not {name for name in imports(ast.parse(path.read_text())) if name.startswith("adjoint.solve")}


def test_every_file_in_the_order_is_still_there() -> None:
    for name in ORDER["revolve"]:
        assert (ROOT / "revolve" / f"{name}.py").exists()


def public_programs() -> Iterator[tuple[str, str]]:
    """Examples and benchmarks, and every Python block of the documents."""
    for folder in ("examples", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text() if path.exists() else ""
        for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
            yield f"{path.relative_to(ROOT)}, block {number}", block


def test_examples_documents_and_benchmarks_use_public_names_only() -> None:
    for where, text in public_programs():
        tree = ast.parse(text)
        names = {part for name in imports(tree) if name.split(".")[0] in ORDER for part in name.split(".")}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and not own(node)}
        private = {name for name in names if name.startswith("_") and not name.endswith("__")}
        assert not private, f"{where} uses {private}"


def own(node: ast.Attribute) -> bool:
    """An attribute of self: the program's own."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
