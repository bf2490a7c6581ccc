"""Tests of tests/gpu_sim, in a process of their own that pretends to have a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).with_name("gpu_sim")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_on_the_pretended_device() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parents[1], check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
