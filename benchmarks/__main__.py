"""``python -m benchmarks [NAME ...] [--device cuda] [--out docs/benchmarks.md]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import eager, memory
from benchmarks.measure import machine

SECTIONS = {"eager": eager.run, "memory": memory.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, and write a page of tables.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu (one thread) or cuda")
    parser.add_argument("--out", type=Path, help="write the page here; otherwise print it")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(SECTIONS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    page = ["# Benchmarks", "", f"Made by `python -m benchmarks`. {machine(options.device)}.", ""]
    for name, run in SECTIONS.items():
        if not options.names or name in options.names:
            page.append(run(options.device).markdown())
    text = "\n".join(page)
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
