"""Processes that fork, as docs/processes.md tells: a real fork in a process that has run several threads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "processes.md"
LIMIT = 120  # seconds: a child that hangs never ends
OPERATION = """
import torch
import pycircuit as pc
torch.set_num_threads(2)
x, w = torch.randn(64, 64), torch.randn(4096, 64)
def count(_=None):
    return pc.ops.encode(x, w, torch.zeros(4096), pc.TopK(8)).count
assert count() == 512 and pc.last_run().implementation == "native"
"""
POOL = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2, torch.set_num_threads, (1,)) as pool:
    assert pool.map(count, range(4)) == [512] * 4
"""
LOADER = """
class Counts(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return count()
loader = torch.utils.data.DataLoader(Counts(), num_workers=2, multiprocessing_context="fork")
assert [int(n) for n in loader] == [512] * 4
"""


def page_example() -> str:
    (example,) = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.S)
    return f"import torch\ntorch.set_num_threads(2)\n{example}"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' OpenMP can be forked, or they do not fork")
@pytest.mark.parametrize("name", ["page", "pool", "loader"])
def test_a_forked_child_traces(name: str) -> None:
    """-W ignore: later versions of Python warn of any fork beside threads."""
    script = {"page": page_example, "pool": lambda: OPERATION + POOL, "loader": lambda: OPERATION + LOADER}[name]()
    assert run(script) == 0


def run(script: str, limit: float = LIMIT) -> int | None:
    """Run a script and return its exit status, or None where it is not done in time, with its children killed."""
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
