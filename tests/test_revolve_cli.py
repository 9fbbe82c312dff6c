"""The command ``revolve``: what it prints, what it draws, and what it says of bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from revolve_cases import members

from revolve import Binomial, Differing, Prices, Schedule, both_sweeps
from revolve.cli import main, slot_numbers
from revolve.trace import letters, trace

Capture = pytest.CaptureFixture[str]


def said(capsys: Capture, command: str) -> str:
    """What a command that succeeds prints."""
    assert main(command.split()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def told(capsys: Capture, command: str) -> Any:
    return json.loads(said(capsys, f"{command} --json"))


def test_a_plan_says_r_and_the_extra_steps(capsys: Capture) -> None:
    text = said(capsys, "plan -n 100 -c 3")
    assert text.startswith("Binomial(slots=3) for 100 steps")
    for fact in ("r = 7", "490", "590", "28", "99", "beta(3, 7) = 120", "with r = 6, 84", "x_64 to x_72"):
        assert fact in text
    assert re.search(r"> 3 +7 +490", text)


def test_a_plan_as_json_has_the_same_numbers(capsys: Capture) -> None:
    facts = told(capsys, "plan -n 100 -c 3")
    expected = {"repetitions": 7, "extra_steps": 490, "saves": 28, "loads": 99, "longest_chain": 120, "slots": 3}
    assert facts.items() >= expected.items()
    assert facts["first_splits"] == [64, 72]
    assert {"slots": 4, "repetitions": 5, "extra_steps": 374} in facts["neighbours"]


def test_a_budget_becomes_slots(capsys: Capture) -> None:
    facts = told(capsys, "plan -n 1000 --budget 512MiB --state 8MB --tape 40MB")
    assert (facts["slots"], facts["bytes"]) == (62, 536_000_000)
    assert told(capsys, "plan -n 10 --budget 1GB --state 8MB --tape 40MB")["extra_steps"] == 0
    assert "536 MB" in said(capsys, "plan -n 1000 --budget 512MiB --state 8MB --tape 40MB")
    assert "512 MiB" in said(capsys, "plan -n 1000 --budget 512MiB --state 8MiB --tape 40MiB")


def test_keeping_every_tape_recomputes_nothing(capsys: Capture) -> None:
    assert told(capsys, "plan -n 100 -c all")["extra_steps"] == 0
    assert "nothing is recomputed" in said(capsys, "plan -n 100 -c all")


def test_lengths_may_be_beyond_machine_integers(capsys: Capture) -> None:
    assert told(capsys, f"plan -n {2**63} -c 1")["extra_steps"] == 2**63 * (2**63 - 1) // 2


def test_a_sweep_has_a_row_for_each_number_of_slots_and_the_plan_that_keeps_all(capsys: Capture) -> None:
    rows = told(capsys, "sweep -n 1000 -c 1:50")
    assert [row["slots"] for row in rows] == [*range(1, 51), "all"]
    assert rows[9]["extra_steps"] == 3636 and rows[-1]["extra_steps"] == 0
    lines = said(capsys, "sweep -n 1000 -c 1:50").splitlines()
    assert len(lines) == 1 + 1 + 1 + 51
    assert lines[12].split() == ["10", "4", "3636", "4.636", "714", "1"]
    assert lines[-1].split() == ["all", "0", "0", "1.000", "0", "1000"]


def test_a_sweep_in_bytes_has_a_column_of_memory(capsys: Capture) -> None:
    text = said(capsys, "sweep -n 1000 -c 1,2,4 --state 8MB --tape 40MB")
    assert [line.split()[-2:] for line in text.splitlines()[3:]] == [
        ["48", "MB"],
        ["56", "MB"],
        ["72", "MB"],
        ["40", "GB"],
    ]


def test_uniform_checkpoints_have_their_least_at_two_square_roots(capsys: Capture) -> None:
    facts = told(capsys, "sweep --uniform -n 100 --state 100MB")
    assert facts["least"] == {"checkpoints": 10, "states": 20, "bytes": 2 * 10**9}
    assert facts["two_sqrt_steps"] == 20
    assert facts["store_all"]["bytes"] == 10**10
    assert len(facts["rows"]) == 100
    text = said(capsys, "sweep --uniform -n 100 --state 100MB")
    assert re.search(r"> 10 +20 +20.0 % +2 GB", text)
    assert re.search(r"store all +100 +100.0 % +10 GB", text)
    assert "2 sqrt(100) = 20" in text


def test_a_long_uniform_sweep_still_finds_its_least(capsys: Capture) -> None:
    assert told(capsys, "sweep --uniform -n 1000000")["least"] == {"checkpoints": 1000, "states": 2000, "bytes": 2000}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1:4", [1, 2, 3, 4]), ("2:9:3", [2, 5, 8]), ("8", [8]), ("1,2,4,8", [1, 2, 4, 8]), ("1:3,10", [1, 2, 3, 10])],
)
def test_slots_are_ranges_with_both_ends(text: str, numbers: list[int]) -> None:
    assert slot_numbers(text) == numbers


def test_a_drawing_in_letters(capsys: Capture) -> None:
    assert said(capsys, "draw -n 4 -c 2") == (
        "Binomial(slots=2), 4 steps\n"
        "\n"
        "time  0\n"
        "   0  |> >\n"
        "   2  |   |>\n"
        "   3  |   |  x\n"
        "   5  |   |x\n"
        "   7  |>\n"
        "   8  |  x\n"
        "  10  |x\n"
        "\n"
        "> plain run   o record   < reverse   x record and reverse at once   | state kept\n"
    )


def test_letters_of_a_long_chain_stay_within_its_width() -> None:
    lines = letters(trace(Binomial(6), 200)).splitlines()
    assert max(map(len, lines)) <= 200 + 10
    assert sum(line.count("x") for line in lines) == 200


def test_a_drawing_as_json_is_the_plan(capsys: Capture) -> None:
    actions = told(capsys, "draw -n 20 -c 3")["actions"]
    assert actions[:3] == [["Save", 0, 0], ["Advance", 0, 10], ["Save", 10, 0]]
    assert actions == [[type(action).__name__, *action[1:]] for action in both_sweeps(Binomial(3), 20)]


def test_a_trace_keeps_the_time_and_the_slots_of_the_price() -> None:
    for steps, slots in ((3, 1), (20, 3), (57, 6)):
        traced = trace(Binomial(slots), steps)
        assert traced.time == 2 * steps + Binomial(slots).price(steps).plain_runs
        assert traced.slots == {0: slots}
        for life in traced.lives:
            others = [other for other in traced.lives if other.slot == life.slot and other != life]
            assert all(other.end <= life.begin or life.end <= other.begin for other in others)


@pytest.mark.parametrize("schedule", [s for s in members() if not isinstance(s, Differing)], ids=str)
def test_a_trace_at_prices_takes_what_the_plan_costs(schedule: Schedule) -> None:
    prices = Prices(2.0, 3.0, 5.0, write=(0.0, 7.0, 11.0), read=(0.5, 13.0, 17.0))
    for steps in (1, 2, 13):
        assert trace(schedule, steps, prices).time == prices.seconds(schedule.price(steps))


def test_any_schedule_is_priced_counted_and_shown_beside_simpler_ones(capsys: Capture) -> None:
    text = said(capsys, "plan -n 250 --schedule hrevolve --tiers 3,7:10:10")
    assert re.search(r"priced +counted +Multistage +Binomial\(slots=3\)", text)
    assert re.search(r"cost +1290 +1290 +\d+ +\d+", text)
    text = said(capsys, "plan -n 100 --schedule bisection")
    assert re.search(r"plain runs +356 +356 +280", text) and "Binomial would make 280 plain runs" in text
    facts = told(capsys, "plan -n 60 --schedule disk -c 2 --write-cost 9 --read-cost 1")
    assert facts["tiers"]["1"] == {"saves": 5, "loads": 10, "peak_slots": 5} and facts["extra_steps"] == 150


def test_several_memories_become_the_cheapest_plan(capsys: Capture) -> None:
    sizes = "--state 8MB --tape 40MB --step-seconds 0.01"
    text = said(capsys, f"plan -n 1000 --memories 128MB,2GB:0.004:0.004 {sizes}")
    assert text.startswith("HRevolve(") and "It is the cheapest here: Binomial(slots=11) 45.5 s" in " ".join(
        text.split()
    )
    assert told(capsys, f"plan -n 100 --memories 128MB,any:0.004:0.004 {sizes}")["schedule"].startswith("DiskRevolve(")
    text = said(capsys, "plan -n 1000 --budget 512MiB --state 8MB --tape 40MB --mixed")
    assert text.startswith("Mixed(slots=62, state=1, tape=5")


def test_time_against_memory_has_the_published_optimum_in_its_row(capsys: Capture) -> None:
    rows = told(capsys, "sweep -n 250 -c 1:12 --write-cost 10 --read-cost 10 --disk 7")
    assert list(rows) == ["memory alone", "with a disk", "prices ignored"]
    assert rows["with a disk"][2]["cost"] == 1290
    for alone, best, ignorant in zip(*rows.values(), strict=True):
        assert best["cost"] <= min(alone["cost"], ignorant["cost"])
    rows = told(capsys, "sweep -n 60 -c 2 --write-cost 9 --read-cost 1")
    assert [row["cost"] for (row,) in rows.values()] == [440, 265, 280]
    assert re.search(
        r"2 +440 +265 +280 +150 +5 +5 +10 +39.8 %", said(capsys, "sweep -n 60 -c 2 --write-cost 9 --read-cost 1")
    )


def test_uniform_checkpoints_are_tabled_with_what_they_save(capsys: Capture) -> None:
    rows = {row["steps"]: row for row in told(capsys, "table")}
    assert [round(rows[n]["saved"], 1) for n in (16, 64, 144, 256, 1024)] == [50, 75, 83.3, 87.5, 93.8]
    assert all(row["binomial_runs"] <= row["uniform_runs"] for row in rows.values())
    assert all(row["binomial_slots"] < row["slots"] for row in rows.values())
    assert "93.75 %" in said(capsys, "table -n 1024")


def test_ways_to_fit_a_chain_are_compared_and_uniform_says_what_it_needs(capsys: Capture) -> None:
    ways = {way["name"]: way for way in told(capsys, "compare -n 48 --block 4 --slots 12")}
    assert list(ways) == ["uniform", "block boundaries", "selective", "budget", "binomial"]
    assert [ways[name]["states"] for name in ways] == [14, 16, 12, 12, 12]
    assert not ways["uniform"]["fits"] and ways["binomial"]["fits"]
    assert ways["budget"]["plain_runs"] < ways["binomial"]["plain_runs"]
    assert "needs 14" in said(capsys, "compare -n 48 --block 4 --slots 12")


PICTURES = [
    "draw -n 40 --schedule online -c 4",
    "draw -n 40 --schedule bisection",
    "draw -n 40 --schedule selected --kept 5,20,30",
    "draw -n 40 --schedule multistage --memory 2 --disk 2",
    "draw -n 60 --schedule hrevolve --tiers 2,3:2:2,2:5:5",
    "draw -n 40 --schedule disk -c 2 --write-cost 5 --read-cost 2",
    "draw -n 40 --schedule periodic-disk -c 2 --write-cost 5 --read-cost 2",
    "draw -n 40 --schedule mixed -c 6",
    "draw -n 40 --schedule stages -c 6 --stages 2",
    "draw -n 6 --schedule differing --costs 1,5,20,20,1,5 --states 3,1,5,8,1,5 --budget 8",
    "draw -n 40 --schedule multistage --memory 2 --disk 2 --write-cost 5 --read-cost 5",
    "draw -n 40 --schedule mixed -c 6 --tape-slots 2 --holds-end yes",
    "sweep -n 100 -c 1:20 --write-cost 5 --read-cost 5 --disk 4",
    "sweep -n 100 -c 1:20 --write-cost 5 --read-cost 5 --state 8MB",
    "sweep -n 1000 -c 1:50",
    "sweep -n 1000 -c 1:50 --state 8MB --tape 40MB",
    "sweep -n 20 -c 1:40",
    "sweep --uniform -n 100 --state 100MB",
    "sweep --uniform -n 5000",
    "draw -n 1 -c 0",
    "draw -n 3 -c 1",
    "draw -n 20 -c 3",
    "draw -n 200 -c 30",
    "draw -n 30 --schedule all",
    "draw -n 30 --schedule nothing",
    "draw -n 30 --schedule periodic --every 7",
]


@pytest.mark.parametrize("command", PICTURES)
def test_a_picture_is_drawn(capsys: Capture, tmp_path: Path, command: str) -> None:
    out = tmp_path / "picture.png"
    assert f"wrote {out}" in said(capsys, f"{command} --out {out}")
    picture = imread(out)
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    assert 0.001 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5


BAD = {
    "": "usage: revolve",
    "plan": "the following arguments are required: -n/--steps",
    "plan -n x -c 2": "argument -n/--steps: invalid int value: 'x'",
    "plan -n 100": "how much memory? give either -c, for instance -c 3, or --budget or --memories, with --state and --tape",
    "plan -n 100 -c 3 --budget 1MB": "how much memory? give either -c",
    "plan -n 100 -c 0": "slots=0 cannot reverse 100 steps; give at least 1",
    "plan -n 100 -c two": "--slots two is not a number",
    "plan -n 0 -c 2": "steps=0 is too small; give at least 1",
    "plan -n 9 --budget 1MB": "--budget 1MB needs --state and --tape",
    "plan -n 9 --budget 1MB --state x --tape 1": "--state='x' is not a size; give bytes, or text like",
    "plan -n 9 --budget 1MB --state 1MB --tape 1MB": "give at least 2000000 bytes",
    "sweep -n 100": "which slots? give -c, for instance -c 1:50, or --uniform",
    "sweep -n 100 -c 5:1": "--slots 5:1 is no range of slots; give for instance 1:50, 1:50:5 or 1,2,4,8",
    "sweep -n 100 -c 1:5:0": "--slots 1:5:0 is no range of slots",
    "sweep -n 100 -c 0:5": "slots=0 cannot reverse 100 steps; give at least 1",
    "sweep -n 100 -c 1:2 --uniform": "-c 1:2 says nothing with --uniform",
    "draw -n 10": "how many slots? give -c, for instance -c 3",
    "draw -n 10 -c 0": "slots=0 cannot reverse 10 steps; give at least 1",
    "draw -n 1000 -c 3": "-n 1000 is too wide for text; give --out FILE.png, or at most 200 steps",
    "draw -n 9999 -c 3 --out x.png": "-n 9999 is too wide for a picture; give at most 2000 steps",
    "draw -n 10 --schedule foo": "invalid choice: 'foo'",
    "draw -n 10 --schedule all -c 3": "-c 3 says nothing to the all schedule; leave it out, or take",
    "draw -n 10 -c 3 --every 3": "--every 3 says nothing to the binomial schedule; leave it out, or take periodic",
    "draw -n 10 --schedule hrevolve": "the hrevolve schedule needs --tiers: slots:write:read of each tier",
    "draw -n 10 --schedule hrevolve --tiers x": "argument --tiers: 'x' is no list of tiers; give slots:write:read",
    "draw -n 10 --schedule selected --kept a": "argument --kept: 'a' is no list of numbers; give for instance 4,8,12",
    "draw -n 10 --schedule mixed -c 3 --holds-end maybe": "argument --holds-end: 'maybe' is neither; give yes or no",
    "plan -n 10 -c 3 --every 3": "--every says nothing without --schedule; leave it out, or name a schedule",
    "plan -n 10 --memories 1MB": "--memories 1MB needs --state and --tape",
    "plan -n 10 --memories 1MB:x:2 --state 1 --tape 1": "--memories 1MB:x:2 is no memory; give a size",
    "plan -n 10 -c 3 --step-seconds 2": "--step-seconds 2.0 says nothing without --memories",
    "plan -n 10 --memories 1KB --state 1 --tape 1 --step-seconds 0": "--step-seconds 0.0 is no time of a run",
    "plan -n 10 --schedule hrevolve --tiers 1:inf:2": "write=inf of tier 0 is not a price; give 0 or more, and finite",
    "plan -n 10 --memories 1KB --state 1MB --tape 1MB": "give at least 2000000 bytes",
    "sweep -n 100 -c 1:5 --write-cost 3": "time against memory needs --write-cost and --read-cost",
    "sweep -n 100 -c 1:5 --write-cost -3 --read-cost 1": "write=-3.0 is not a price; give 0 or more",
    "compare -n 48 --block 0 --slots 12": "block=0 is too small; give at least 1",
    "compare -n 48 --block 4 --slots 0": "slots=0 cannot reverse 48 steps; give at least 1",
    "table -n 16,x": "--steps x is not a number",
    "draw -n 10 -c 3 --out nowhere/x.png": "cannot write nowhere/x.png: No such file or directory; give a file in a",
    "draw -n 10 -c 3 --out x.foo": "Format 'foo' is not supported",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: object = main(command.split())
    except SystemExit as stopped:
        code = stopped.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert BAD[command] in err
    if command:
        assert err.startswith(f"revolve {command.split()[0]}: ")
        assert len(err.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = "import sys; from revolve.cli import main; sys.exit(main('sweep -n 100000 -c 1:9999'.split()))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    "command", ["--help", "plan --help", "sweep --help", "draw --help", "table --help", "compare --help"]
)
def test_help_shows_examples_that_work(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 0
    examples = re.findall(r"^  revolve (.*)$", capsys.readouterr().out.split("examples:")[1], re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        assert main(example.split()) == 0
