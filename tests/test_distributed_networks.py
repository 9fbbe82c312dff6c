"""Networks that are run again, in two processes: the parameters are those of plain training, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

SCRIPT = Path(__file__).parent / "distributed_networks.py"


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_two_processes_train_as_plain_torch_does(tmp_path: Path) -> None:
    """Data-parallel, with sharded parameters and optimizer, and as stages of a pipeline; hooks fire once a backward pass."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), *sys.path])),
        "OMP_NUM_THREADS": "1",
    }
    calls = [[sys.executable, str(SCRIPT), str(rank), str(tmp_path)] for rank in range(2)]
    running = [
        subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for call in calls
    ]
    for process in running:
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and out == "equal\n", errors[-2000:]
