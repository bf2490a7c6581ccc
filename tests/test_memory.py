"""encode never holds positions x features: measured from outside, and its own figure is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_forms import ISAS

import pycircuit as pc
from pycircuit.ops import TopK, native
from pycircuit.ops.dispatch import encode_screens

MEASURE = """
import json, sys, torch, pycircuit as pc
from pycircuit.ops import native
positions, width, size, active, rule, dtype, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
g = torch.Generator().manual_seed(0)
x = torch.randn(positions, width, generator=g)
w = (torch.randn(size, width, generator=g) / width**0.5).to(getattr(torch, dtype))
b = torch.zeros(size)
theta = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - active / size)))
rule = pc.TopK(active) if rule == "topk" else pc.JumpReLU(torch.full((size,), theta))
reported = []
encode = native._native.encode
class Spy:
    def __getattr__(self, name): return getattr(module, name)
    def encode(self, *args):
        result = encode(*args)
        reported.append(result.workspace_bytes)
        return result
module, native._native = native._native, Spy()
def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))
# Warm up on another shape: threads, their stacks and the code are there before we look.
pc.ops.encode(x[:1], w[:8], b[:8], pc.ReLU())
reported.clear()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
features = pc.ops.encode(x, w, b, rule)
peak = status("VmHWM") - before
assert pc.last_run().implementation == "native"
result = features.row_ptr.nbytes + features.index.nbytes + features.value.nbytes
print(json.dumps({"peak": peak, "reported": reported[0], "result": result, "count": features.count}))
"""
PAGES = 2 << 20  # the interpreter's own allocations and partly used pages between the two readings

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to reset the peak of memory"
)


def measure(*shape: object) -> dict[str, int]:
    run = [sys.executable, "-c", MEASURE, json.dumps(shape)]
    return json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("rule", ["jumprelu", "topk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("positions", "width", "size", "active"),
    [(64, 512, 8192, 32), (64, 2304, 16384, 60), (4096, 64, 8192, 32)],
    ids=["small", "gemma2b", "long"],
)
def test_encode(positions: int, width: int, size: int, active: int, rule: str, dtype: str) -> None:
    measured = measure(positions, width, size, active, rule, dtype, 2)  # scratch grows with the threads
    product = positions * size * 4
    assert 0.5 * positions * active < measured["count"] < 2 * positions * active
    # The kernel's own result and Python's copy of it are alive together for a moment. Rows that lie 8 bytes
    # apart in one are 12 in the other, so allow twice the result, and pages that were only touched.
    most = 0.05 * product
    if encode_screens():  # x and a block of features for each thread, rounded, and scratch of its own
        most = 0.06 * product + (positions + 32 * 2) * width * 2
    assert measured["reported"] < most
    assert measured["peak"] < most + 2 * measured["result"] + PAGES


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != "amx"])
def test_scratch_of_a_top_k_of_every_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest shape leaves least room, and above a machine runs only the best of its ISAs."""
    reported = []
    encode = native._native.encode

    def call(*arguments: object) -> Any:
        result = encode(*arguments)
        reported.append(result.workspace_bytes)
        return result

    monkeypatch.setattr(native._native, "encode", call)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pc.use("native", isa=isa):
        native.encode(torch.randn(64, 512), torch.randn(8192, 512), torch.zeros(8192), TopK(32), 0)
    assert reported[0] < 0.05 * 64 * 8192 * 4


def test_encode_takes_the_workspace_that_it_reports() -> None:
    """At a size where the workspace is far above the noise of the measurement: neither more nor less."""
    measured = measure(8192, 64, 16384, 32, "jumprelu", "float32", 2)
    taken = measured["peak"] - 2 * measured["result"]
    assert taken < measured["reported"] + 0.5 * measured["result"] + PAGES
