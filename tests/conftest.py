"""Options and fixtures of all tests."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), help="run the laws over devices on this one only")
    parser.addoption("--programs", type=int, help="how many random programs to try (default: $PROGRAMS, or 100)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if config.getoption("--programs") is not None:
        os.environ["PROGRAMS"] = str(config.getoption("--programs"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``device`` runs on the CPU, and on a GPU where there is one."""
    if "device" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--device")
        absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        devices = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=(pytest.mark.cuda, absent))]
        if wanted is not None:
            devices = [devices[("cpu", "cuda").index(wanted)]]
        metafunc.parametrize("device", devices, ids=str)
