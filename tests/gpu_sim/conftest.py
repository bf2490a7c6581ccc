"""A process that pretends to have a GPU; test_gpu_sim.py runs it. Nothing else may run beside these tests."""

from __future__ import annotations

import launched_ops
import pretended_cuda
import pytest
import torch
from pretended_cuda import COUNTS, Counts

pretended_cuda.install()
launched_ops.install()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def counts() -> Counts:
    """Counts of launches and synchronisations in a test, from zero."""
    COUNTS.clear()
    return COUNTS
