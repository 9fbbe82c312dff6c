"""The command ``adjoint``: what it prints, what it draws, what it says of bad input; and the problems it speaks of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from adjoint import cli, demo, solve
from adjoint.cli import main
from adjoint.compare import Comparison, Row, reference
from adjoint.measure import RESIDENT, TENSORS, Recipe, Scales, how_weighed
from adjoint.problems import PROBLEMS, pelts
from revolve import Online, extra_steps

Capture = pytest.CaptureFixture[str]
SMALL = {"gray_scott": 16}
"""Sizes for a test."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in an empty folder, and without colours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")


def said(capsys: Capture, command: str) -> str:
    """What a command that succeeds prints."""
    assert main(command.split()) == 0
    return capsys.readouterr().out


def told(capsys: Capture, command: str, code: int = 0) -> Any:
    """The same as JSON, and nothing on standard error but the sentence of a failure."""
    assert main([*command.split(), "--json"]) == code
    out, err = capsys.readouterr()
    assert bool(err) == bool(code)
    return json.loads(out)


def drawn(path: Path) -> None:
    """A picture with something in it, and margins."""
    picture = imread(path)
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    assert 0.001 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5


# the problems


def test_the_pelts_are_those_of_the_hudson_bay_company() -> None:
    hare = "30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6 16.2 24.7"
    lynx = "4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6"
    data = pelts()
    assert data.year == list(range(1900, 1921))
    assert data.hare == [float(x) for x in hare.split()]
    assert data.lynx == [float(x) for x in lynx.split()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if not problem.stiff])
def test_every_problem_has_a_finite_gradient_in_every_input(name: str, dtype: torch.dtype) -> None:
    recipe = Recipe(name, SMALL.get(name), dtype=dtype, options={"rtol": 1e-5, "atol": 1e-6})
    case = recipe.case()
    result = recipe(case)
    assert result.gradient.keys() == case.inputs.keys()
    for given, gradient in zip(case.inputs.values(), result.gradient.values(), strict=True):
        assert given.dtype == gradient.dtype == dtype
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("name", [name for name, problem in PROBLEMS.items() if problem.size])
def test_a_problem_with_sizes_has_the_smallest_one_it_names(name: str) -> None:
    problem = PROBLEMS[name]
    case = problem.case(problem.least)
    assert torch.isfinite(
        case.loss(solve(case.f, case.y0, case.t, args=case.args, method="rk4", dt=problem.dt or 0.1).ys)
    )
    with pytest.raises(ValueError, match=rf"give at least {problem.least}"):
        problem.case(problem.least - 1)


def test_a_gray_scott_state_is_a_mebibyte() -> None:
    y0 = PROBLEMS["gray_scott"].case().y0
    assert y0.numel() * y0.element_size() == 2**20


def test_one_problem_is_called_dissipative() -> None:
    assert [name for name, problem in PROBLEMS.items() if problem.dissipative] == ["gene_ring"]


# gradient


def test_a_gradient_is_printed_by_name_with_its_plan_and_its_proof(capsys: Capture) -> None:
    text = said(capsys, "gradient lotka_volterra --slots 3")
    for name in ("y0", "log_alpha", "log_beta", "log_gamma", "log_delta"):
        assert re.search(rf"^ {name} +(scalar|2) +-?[\d.]+", text, re.MULTILINE)
    assert "Binomial(slots=3) reverses 100 steps with 490 plain runs" in re.sub(r"\s+", " ", text)
    assert re.search(r"plain runs +490\b", text)
    assert re.search(r"Taylor test +slope (1\.99|2\.00)", text)


def test_a_gradient_as_json_does_not_depend_on_slots_or_budget(capsys: Capture) -> None:
    few = told(capsys, "gradient lotka_volterra --slots 5")
    everything = told(capsys, "gradient lotka_volterra --slots all")
    budget = told(capsys, "gradient lotka_volterra --budget 46KiB")
    assert few["gradient"] == everything["gradient"] == budget["gradient"]
    assert few["stats"]["plain_runs"] == extra_steps(steps=100, slots=5)
    assert everything["stats"]["plain_runs"] == 0 < budget["stats"]["plain_runs"]
    assert budget["plan"]["bytes"] <= 46 * 1024
    assert abs(few["taylor_slope"] - 2) < 0.05


def test_a_backsolve_on_a_dissipative_problem_fails_the_taylor_test(capsys: Capture) -> None:
    facts = told(capsys, "gradient gene_ring --gradient backsolve --rtol 1e-4 --atol 1e-4")
    assert facts["plan"] is None
    assert abs(facts["taylor_slope"] - 1) < 0.05


def test_the_schedule_of_a_gradient_is_drawn(capsys: Capture, tmp_path: Path) -> None:
    assert "wrote schedule.png" in said(capsys, "gradient pendulum --method rk4 --dt 0.2 --slots 4 --out schedule.png")
    drawn(tmp_path / "schedule.png")


# sweep


def test_a_sweep_counts_what_was_predicted_and_ends_with_every_tape_kept(capsys: Capture, tmp_path: Path) -> None:
    facts = told(capsys, "sweep lotka_volterra --slots 2:4,20 --out sweep.png")
    rows = facts["rows"]
    assert [row["slots"] for row in rows] == [2, 3, 4, 20, "all"]
    assert [row["extra_steps_counted"] for row in rows] == [row["extra_steps_predicted"] for row in rows]
    assert rows[1]["extra_steps_counted"] == 490 and rows[1]["repetitions"] == 7
    assert rows[-1]["extra_steps_counted"] == 0 and rows[-1]["repetitions"] == 0
    assert all(row["seconds"] > 0 for row in rows)
    if facts["memory"] == RESIDENT:  # of torch's graph, so within the quarter by which a prediction of it can be off
        assert rows[-1]["bytes_measured"] == pytest.approx(rows[-1]["bytes_predicted"], rel=0.25)
        assert all(row["bytes_measured"] < rows[-1]["bytes_measured"] / 4 for row in rows[:-1])
    drawn(tmp_path / "sweep.png")


def test_a_sweep_over_found_steps_counts_the_run_that_found_the_last(capsys: Capture) -> None:
    facts = told(capsys, "sweep pendulum --method tsit5 --rtol 1e-3 --atol 1e-3 --slots 3,8")
    assert [row["extra_steps_counted"] for row in facts["rows"]] == [
        Online(3).price(facts["steps"]).plain_runs + 1,
        Online(8).price(facts["steps"]).plain_runs + 1,
        0,
    ]


def test_tensors_of_large_states_weigh_at_most_a_tenth_more_than_predicted(capsys: Capture) -> None:
    facts = told(capsys, "sweep gray_scott --size 128 --slots 5,20")
    assert facts["memory"] == TENSORS
    for row in facts["rows"]:
        assert 0.8 * row["bytes_predicted"] < row["bytes_measured"] < 1.1 * row["bytes_predicted"]


def test_a_sweep_is_a_table_with_a_line_for_each_number_of_slots(capsys: Capture) -> None:
    lines = said(capsys, "sweep neural_ode --slots 2,3").splitlines()
    assert re.match(r" +2 +\d+ +(\d+) +\1 ", next(line for line in lines if re.match(r" +2 ", line)))
    assert any(re.match(r" store all +0 +0 +0 ", line) for line in lines)
    assert lines[-1].startswith("Memory measured: ")


@pytest.mark.skipif(how_weighed(PROBLEMS["pendulum"].case()) != RESIDENT, reason="no high-water mark on this system")
def test_a_child_that_fails_says_why() -> None:
    with Scales() as scales, pytest.raises(RuntimeError, match="ValueError: slots=0"):
        scales.peak(Recipe("pendulum", options={"slots": 0}), Recipe("pendulum"))


# compare


def test_backsolve_is_a_thousand_times_as_wrong_on_a_dissipative_problem(capsys: Capture, tmp_path: Path) -> None:
    facts = told(capsys, "compare gene_ring --tolerances 1e-3,1e-5 --slots 4 --out compare.png")
    assert facts["least_ratio"] > 1000
    assert facts["reference_agreement"] < 1e-7
    rows = {(row["way"], row["tolerance"]): row for row in facts["rows"]}
    for tolerance in (1e-3, 1e-5):
        exact, few = rows["discrete", tolerance], rows["discrete, 4 slots", tolerance]
        assert exact["error"] == few["error"] < tolerance
        assert few["evaluations"] > exact["evaluations"]
        for continuous in ("backsolve", "torchdiffeq adjoint"):
            assert rows[continuous, tolerance]["error"] > 1000 * exact["error"]
        for along in ("interpolating", "quadrature", "gauss"):
            assert rows[along, tolerance]["error"] < 100 * tolerance
        for own in ("backprop", "tangent"):
            assert rows[own, tolerance]["error"] == pytest.approx(exact["error"], rel=1e-6)
    tightest = [row for row in facts["rows"] if row["tolerance"] == 1e-5]
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in tightest)
    assert rows["discrete, 4 slots", 1e-5]["bytes"] < rows["discrete", 1e-5]["bytes"] / 2
    drawn(tmp_path / "compare.png")


def test_where_nothing_is_dissipated_all_gradients_agree(capsys: Capture) -> None:
    text = said(capsys, "compare neural_ode --tolerances 1e-5 --method tsit5")
    for way in ("discrete", "discrete, 8 slots", "backsolve", "torchdiffeq adjoint", "torchdiffeq backprop"):
        found = re.search(rf"^ {way} +(\S+)", text, re.MULTILINE)
        assert found is not None and float(found[1]) < 1e-3


@pytest.mark.parametrize("name", ["lorenz", "pendulum"])
def test_two_references_that_share_no_code_agree(name: str) -> None:
    assert reference(Recipe(name), 1e-8).agreement < 1e-5


def comparison(problem: str, discrete: float, backsolve: float, agreement: float = 1e-12) -> Comparison:
    rows = (Row("discrete", 1e-6, discrete, 1.0, 1), Row("backsolve", 1e-6, backsolve, 1.0, 1))
    return Comparison(Recipe(problem), "dopri5", agreement, TENSORS, rows)


def test_a_comparison_that_proves_nothing_is_exit_code_1_and_a_sentence(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert comparison("gene_ring", 1e-7, 1.0).verdict == ""
    assert comparison("gene_ring", 1e-7, float("inf")).verdict == ""
    assert comparison("pendulum", 1e-7, 1e-7).verdict == ""
    assert "agree to 1.0e-05 only" in comparison("pendulum", 1e-7, 1e-7, agreement=1e-5).verdict
    monkeypatch.setattr(cli, "compare", lambda *_, **__: comparison("gene_ring", 1e-7, 1e-5))
    told(capsys, "compare gene_ring", code=1)
    assert main(["compare", "gene_ring"]) == 1
    assert "error is only 100 times the discrete one's at equal tolerance" in capsys.readouterr().err


# demo and examples


def test_the_demonstration_fits_sweeps_compares_and_draws(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "POPULATIONS", 64)
    monkeypatch.setattr(demo, "SLOTS", (5, 20))
    monkeypatch.setattr(demo, "TOLERANCES", (1e-3,))
    text = said(capsys, "demo")
    # the medians of the Bayesian fit of the Stan case study (Carpenter 2018), within its posterior's width
    for name, expected, width in (
        ("alpha", 0.55, 0.06),
        ("beta", 0.028, 0.004),
        ("gamma", 0.80, 0.09),
        ("delta", 0.024, 0.004),
    ):
        found = re.search(rf"^ {name} +([\d.]+)", text, re.MULTILINE)
        assert found is not None and abs(float(found[1]) - expected) < width
    assert re.search(r"^ 1904 +36.3 ", text, re.MULTILINE)
    assert re.search(r"^ store all +0 +0 +0 ", text, re.MULTILINE)
    folder = tmp_path / "adjoint-demo"
    assert str(folder) in text.splitlines()[-1]
    assert {path.name for path in folder.iterdir()} == {"fit.png", "memory.png", "compare.png", "schedule.png"}
    for path in folder.iterdir():
        drawn(path)


@pytest.mark.slow
def test_the_whole_demonstration_as_json(capsys: Capture, tmp_path: Path) -> None:
    facts = told(capsys, "demo --out pictures")
    assert facts["fit"]["loss"] < 0.05 < facts["fit"]["first_loss"]
    assert [row["extra_steps_counted"] for row in facts["sweep"]["rows"]][-1] == 0
    assert {each["problem"] for each in facts["compare"]} == {"lotka_volterra", "gene_ring"}
    assert facts["folder"] == str(tmp_path / "pictures")
    assert all((tmp_path / "pictures" / name).exists() for name in facts["pictures"])


def test_engines_are_timed_and_say_who_takes_the_steps(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ADJOINT_CACHE", str(tmp_path))
    words = "engines lorenz --method rk4 --dt 0.1 --slots 5"
    found = told(capsys, words)["engines"]
    assert set(found) == {"auto", "eager", "native"}
    assert found["auto"]["said"].startswith("eager") and "1000 fixed steps" in found["auto"]["said"]
    assert found["native"]["off_by"] < 1e-12 and found["eager"]["off_by"] == found["auto"]["off_by"] == 0
    assert found["native"]["said"].startswith("native") or "llvmlite" in found["native"]["said"]
    text = said(capsys, words)
    assert "steps were taken by" in text and "one at a time" in text


def test_examples_are_listed_with_the_way_to_run_them(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    text = said(capsys, "examples")
    assert "Run one: python " in text
    facts = told(capsys, "examples")
    assert set(cli.SCRIPTS) <= set(facts["examples"])
    for name in facts["examples"]:
        assert re.search(rf"^ {name} ", text, re.MULTILINE)
    monkeypatch.setattr(cli, "__file__", "/nowhere/adjoint/cli.py")
    assert told(capsys, "examples") == {"folder": None, "examples": cli.SCRIPTS}
    assert "examples/ of the repository" in said(capsys, "examples")


# what may go wrong

BAD = {
    "": "usage: adjoint",
    "dance": "invalid choice: 'dance'",
    "gradient": "the following arguments are required: NAME",
    "gradient loren": "problem 'loren' is unknown; did you mean 'lorenz'? known are lotka_volterra, gene_ring,",
    "gradient pendulum --slots 0": "slots=0 cannot reverse",
    "gradient pendulum --slots few": "--slots few is not a number; give for instance 5, or all",
    "gradient pendulum --slots 3 --budget 1MB": "slots=3 and budget='1MB' were both given; one of them decides",
    "gradient pendulum --budget 1B": "give at least",
    "gradient pendulum --size 3": "size=3 says nothing to pendulum, which has one size only; leave it out",
    "gradient gene_ring --size 1": "size=1 is too small for gene_ring (genes); give at least 2",
    "gradient pendulum --method rk5": "method='rk5' is unknown; did you mean 'rk4'",
    "gradient pendulum --gradient backslove": "gradient='backslove' is unknown; did you mean 'backsolve'?",
    "gradient pendulum --dt -1": "dt=-1.0 is not a length of time",
    "gradient pendulum --rtol -1": "rtol=-1.0",
    "gradient pendulum --dtype int8": "invalid choice: 'int8'",
    "gradient pendulum --device tpu7": "--device tpu7 is no device; give cpu, cuda or cuda:1",
    "gradient pendulum --device meta": "--device meta holds no numbers to print; give cpu or cuda",
    "gradient pendulum --threads 0": "--threads 0 computes nothing; give at least 1",
    "gradient pendulum --gradient backsolve --out x.png": "--out draws the schedule, and gradient='backsolve' has none",
    "sweep pendulum --slots 5:1": "--slots 5:1 is no range of slots; give for instance 1:50",
    "sweep pendulum --slots 0:3": "slots=0 cannot reverse",
    "sweep pendulum --out x.foo": "--out x.foo is no kind of picture; end it in .png, .pdf or .svg",
    "sweep pendulum --out nowhere/x.png": "cannot write nowhere/x.png: there is no folder nowhere; give a file in a",
    "compare pendulum --tolerances 1,2": "--tolerances 1,2 are no tolerances; give for instance 1e-4,1e-6,1e-8",
    "compare pendulum --tolerances tight": "--tolerances tight are no tolerances",
    "compare pendulum --method rk4": "--method rk4 does not control its steps; give one of",
    "demo --out /dev/null/pictures": "cannot make the folder /dev/null/pictures: Not a directory; give another by --out",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys: Capture, tmp_path: Path, command: str) -> None:
    try:
        code: object = main(command.split())
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    sentence = next((line for line in err.splitlines() if line.startswith("adjoint")), err)
    assert BAD[command] in sentence
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_bad_input(capsys: Capture) -> None:
    assert main(["gradient", "pendulum", "--device", "cuda"]) == 2
    assert "--device cuda cannot be used here: " in capsys.readouterr().err


def test_a_solve_that_fails_is_exit_code_1_and_its_sentence(capsys: Capture) -> None:
    assert main(["gradient", "van_der_pol", "--method", "euler", "--dt", "0.25"]) == 1
    assert "the solution is not finite at t=" in capsys.readouterr().err


def test_an_interrupted_command_leaves_no_traceback(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "sweep", interrupted)
    assert main(["sweep", "pendulum"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "adjoint sweep: interrupted"


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_names_problems_and_shows_examples(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"^  adjoint ", text.split("examples:")[1], re.MULTILINE)) >= 2
    if command not in ("demo", "estimate", "examples"):
        assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in PROBLEMS)


def test_no_colour_is_used_where_none_is_wanted(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\d", said(capsys, "gradient pendulum"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_sweep_on_a_gpu_is_weighed_by_its_allocator(capsys: Capture) -> None:
    facts = told(capsys, "sweep gray_scott --size 128 --slots 2,20 --device cuda")
    for row in facts["rows"]:
        assert row["bytes_measured"] < 1.1 * row["bytes_predicted"]


def test_importing_adjoint_loads_neither_matplotlib_nor_the_command_line() -> None:
    code = "import adjoint, sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "adjoint.solve" in loaded
    assert not {"matplotlib", "adjoint.cli", "adjoint.plot", "adjoint.problems", "torchdiffeq"} & set(loaded)
