"""Every op's Triton form against the float64 reference: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

import pycircuit as pc
from pycircuit.ops import cases
from pycircuit.ops.registry import OPS

EVERY = [(op, case) for op in OPS for case in cases.CASES[op]]
HAS_GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="a CUDA device is here: Triton compiles for it")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "case"), EVERY, ids=[f"{op}-{case}" for op, case in EVERY])
def test_equals_float64(op: str, case: str, device: str) -> None:
    args = cases.CASES[op][case](cases.generator(1))
    truth = cases.exact(op, args)
    with pc.use("triton"):
        got = getattr(pc.ops, op)(*args)
    assert pc.last_run() == pc.ops.Ran(op, "triton", None)
    assert cases.error(op, got, truth, args) < 3e-6
