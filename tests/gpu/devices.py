"""Devices that a kernel's test runs on: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(HAS_GPU, reason="a CUDA device is here: Triton compiles for it, see the gpu tests")
needs_gpu = (pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device"))
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=needs_gpu)]
)
