"""``python -m benchmarks [NAME ...] [--device cuda] [--out docs/benchmarks.md]``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

from benchmarks import (
    attention,
    batched,
    compared,
    eager,
    engines,
    memory,
    online,
    plans,
    stiff_accuracy,
    techniques,
    undone,
)
from benchmarks.measure import Section, machine
from benchmarks.networks import report as networks
from benchmarks.peers import report as peers
from benchmarks.sequences import report as sequences
from benchmarks.stiff import report as stiff

HEAD = "# Benchmarks\n"


def online_run(device: str) -> Section:
    """Every number of slots from 3 to 50, n to 100,000: some minutes."""
    return Section(online.TITLE, online.TEXT, online.HEADER, tuple(online.table(range(3, 51), 100_000)))


SECTIONS = {
    "eager": eager.run,
    "engines": engines.run,
    "batched": batched.run,
    "memory": memory.run,
    "plans": plans.run,
    "online": online_run,
    "peers": peers.run,
    "networks": networks.run,
    "attention": attention.run,
    "techniques": techniques.run,
    "sequences": sequences.run,
    "undone": undone.run,
    "compared": compared.run,
    "stiff": stiff.run,
    "stiff_accuracy": stiff_accuracy.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, and write a page of tables.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument(
        "--out", type=Path, help="write the sections into this page, in place of those of the same name"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    made = [run(options.device) for name, run in SECTIONS.items() if not options.names or name in options.names]
    measured = f"Measured by `python -m benchmarks` on: {machine(options.device)}."
    texts = {section.title: f"{section.markdown()}\n{measured}\n" for section in made}
    if options.out is None:
        print(HEAD, *texts.values(), sep="\n")
    else:
        options.out.write_text(merged(options.out.read_text() if options.out.exists() else "", texts))
        for file, picture in (pair for section in made for pair in section.pictures):
            picture.savefig(options.out.parent / file, dpi=110)


def merged(page: str, texts: dict[str, str]) -> str:
    """The page with these sections, by title; the others stay as they are."""
    head, *sections = re.split(r"^(?=## )", page or HEAD, flags=re.MULTILINE)
    found = {text.split("\n", 1)[0].removeprefix("## "): text.rstrip() + "\n" for text in sections}
    return "\n".join([head.rstrip() + "\n", *(found | texts).values()])


if __name__ == "__main__":
    main()
