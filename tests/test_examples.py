"""Every script in examples/ runs, draws its picture, and finds what it says it finds."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if not path.stem.startswith("_"))
SLOW = {"gray_scott", "wave_lens"}

every_example = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)


@pytest.fixture
def example(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of an example, which finds its neighbours as it does when it is run as a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


@every_example
def test_an_example_recovers_its_numbers_within_the_stated_error_and_draws_them(
    name: str, example: Any, tmp_path: Path
) -> None:
    results = example.main(out=tmp_path, quick=True)
    assert results
    for what, (value, truth, within) in results.items():
        assert math.isfinite(value) and abs(value - truth) <= within, what
    json.dumps(results)  # plain numbers, for whoever wants to print them
    picture = (tmp_path / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_what_it_shows_and_is_listed_with_its_time(name: str) -> None:
    text = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text()))
    assert text is not None and re.match(r".+: .+\.$", text.splitlines()[0]), (
        "the first line reads 'Name: what it shows.'"
    )
    assert len(text.split()) > 40
    assert re.search(
        rf"^\| \[{name}\.py\]\({name}\.py\) \|.*\d s \|$", (EXAMPLES / "README.md").read_text(), re.MULTILINE
    )


def test_an_example_runs_as_a_script_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "influenza.py"), "--quick", "--out", "pictures"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "contact, published" in run.stdout and "influenza.png" in run.stdout
    assert (tmp_path / "pictures" / "influenza.png").exists()


def test_the_numpy_example_needs_no_torch() -> None:
    code = "import sys, numpy_simulation; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": f"{EXAMPLES}:{EXAMPLES.parent}"}, check=True)
