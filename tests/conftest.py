"""Options and fixtures of all tests."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), help="run the laws over devices on this one only")
    parser.addoption("--programs", type=int, help="how many random programs to try (default: $PROGRAMS, or 100)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    sys.path.append(str(config.rootpath))  # for benchmarks; last, so that adjoint and revolve are the installed ones
    if config.getoption("--programs") is not None:
        os.environ["PROGRAMS"] = str(config.getoption("--programs"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``device`` runs on the CPU, and on a GPU where there is one or one is asked for."""
    if "device" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--device")
        present = torch.cuda.is_available()
        marks = (pytest.mark.cuda, pytest.mark.skipif(not present, reason="no CUDA device"))
        cpu, cuda = (
            pytest.param(torch.device("cpu"), id="cpu"),
            pytest.param(torch.device("cuda"), id="cuda", marks=marks),
        )
        everywhere = [cpu, cuda] if present else [cpu]
        metafunc.parametrize("device", everywhere if wanted is None else [cuda if wanted == "cuda" else cpu])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a run that can be continued lies: in memory if files can, since points are written through to the disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as fast:
            yield Path(fast)
