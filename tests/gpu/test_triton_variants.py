"""Kernels compile once for calls that differ only in sizes that change from tile to tile or prompt to prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest

SCRIPT = """
import json
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Hopper:  # a driver that is only asked what to compile for
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0

driver.set_active(Hopper())
from pycircuit.kernels import attend_back, edge_scores, influence, norm_back, split, spread

def variants(kernel, calls):
    specialise = kernel.create_binder()[-1]
    return len({str(specialise(*args, **constants)[1]) for args, constants in calls})

buffer = torch.zeros(4096)
offsets = torch.zeros(4096, dtype=torch.int64)
launch = edge_scores.HOPPER["float32"].launch()
scores = [
    ((buffer, offsets[s:], offsets[s:], offsets[s:], offsets[s:], buffer[s:], offsets[s:], buffer, buffer[s:], targets,
      2304, shift, 2304, 2304, stride), launch | {"SEVERAL": True, "PARTS": 3})
    for s in (0, 1, 2) for targets in (1, 16, 24) for stride in (198120, 198128, 1) for shift in (0, 1, 144)
]
each = [
    ((buffer, offsets[s:], offsets[s:], buffer[s:], buffer, buffer[s:], 2304, 2304, 2304, stride),
     edge_scores.ONE_EACH.launch())
    for s in (0, 1, 2) for stride in (198120, 198128, 1)
]
numbers = [
    ((buffer, buffer[s:], offsets[s:], buffer, 2304, 2304), split.BLOCK.launch() | {"COUNT": 3, "DIVIDED": True})
    for s in (0, 1, 2)
]
normed = [
    ((buffer, buffer, buffer[s:], offsets[s:], offsets[s:], buffer, 2304, 2304),
     norm_back.BLOCK.launch() | {"HAS_GAIN": True, "HAS_LAYER": True})
    for s in (0, 1, 2)
]
spreads = [
    ((buffer, buffer[s:], offsets[s:], buffer[s:], buffer[s:], offsets[s:], buffer, 8, 2304, 2304 * targets,
      positions**2, positions, 2304),
     spread.BLOCK.launch() | dict.fromkeys(("HAS_QUERY", "HAS_COLUMN_SIGMA", "HAS_ROW_SIGMA"), True))
    for s in (0, 1, 2) for targets in (1, 7, 16) for positions in (1, 7, 128)
]
rows = influence.ROWS.launch() | {"HAS_ORDER": True}
total = influence.HOPPER["wide"].launch() | {"HAS_ORDER": True}
applied = [
    ((buffer, offsets, buffer, buffer, 8, groups, 256, 2300, 2304, first, window),
     attend_back.HOPPER["long"].launch() | {"WINDOW": True, "PARTS": 3})
    for groups in (1, 4) for first in (0, 128) for window in (1, 4096)
]
written = [
    ((buffer, buffer, buffer, offsets, buffer, targets, 8, 4, 2300, 256, 2304, first, 0.1, 50.0, 4096),
     attend_back.PATTERN[torch.float32].launch() | {"SOFTCAP": True, "WINDOW": True})
    for targets in (1, 16, 24) for first in (0, 128)
]
wide = [1, 198120, 198128]
firsts = [1, 64]
print(json.dumps({
    "attend_back": variants(attend_back.attend_back_kernel, applied),
    "attend_back.pattern": variants(attend_back.pattern_kernel, written),
    "edge_scores": variants(edge_scores.edge_scores_kernel, scores),
    "edge_scores.one_each": variants(edge_scores.one_each_kernel, each),
    "norm_back": variants(norm_back.norm_back_kernel, normed),
    "split": variants(split.split_kernel, numbers),
    "spread": variants(spread.spread_kernel, spreads),
    "influence.sum": variants(
        influence.sum_kernel, [((buffer, offsets, buffer, buffer, buffer, n, n), rows) for n in wide]
    ),
    "influence.solve": variants(
        influence.solve_kernel,
        [((buffer, offsets, offsets, *[buffer] * 3, offsets, f, f + 1, n), rows) for n in wide for f in firsts],
    ),
    "influence.total": variants(
        influence.total_kernel, [((buffer, offsets, buffer, buffer, c, n, n), total) for n in wide for c in (1, 64)]
    ),
}))
"""


KEYS = (
    SCRIPT[: SCRIPT.index("buffer =")]
    + """
from itertools import product
from pycircuit.kernels import decode
from pycircuit.kernels.launch import _parameters, _signature

numbers, halves = torch.zeros(64), torch.zeros(64, dtype=torch.bfloat16)
offsets = torch.zeros(64, dtype=torch.int64)
specialise, constants = decode.decode_kernel.create_binder()[-1], decode.HOPPER["float32"].launch() | {"HAS_BIAS": True}
specialisations = {}
for s, r, w, positions, width, stride in product((0, 1, 4), (0, 1, 2), (numbers, halves), (1, 7, 16), (1, 5, 32),
                                                 (1, 16, 24, 2**31 - 1, 2**31, 2**40)):
    arguments = (offsets[r:], offsets, numbers[s:], w[s:], numbers, numbers, positions, width, stride, 0)
    key = tuple(_signature(arguments, _parameters(decode.decode_kernel)))
    specialisations.setdefault(key, set()).add(str(specialise(*arguments, **constants)[1]))
print(json.dumps([len(specialisations), max(map(len, specialisations.values())),
                  len({v for values in specialisations.values() for v in values})]))
"""
)


def run(script: str) -> Any:
    """Return what a script prints, in a process where Triton compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_launch_key_stands_for_one_specialisation() -> None:
    keys, specialisations_a_key, specialisations = run(KEYS)
    assert specialisations_a_key == 1 and keys >= specialisations > 50


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_one_variant_of_every_kernel() -> None:
    assert set(run(SCRIPT).items()) == {
        ("attend_back", 1),
        ("attend_back.pattern", 1),
        ("edge_scores", 1),
        ("edge_scores.one_each", 1),
        ("norm_back", 1),
        ("split", 1),
        ("spread", 1),
        ("influence.sum", 1),
        ("influence.solve", 1),
        ("influence.total", 1),
    }
