"""A process that pretends to have a GPU. Other tests cannot run in it: `make test-gpu`."""

from __future__ import annotations

import launched_ops
import pretended_cuda
import pytest
import torch
from pretended_cuda import COUNTS, Counts

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    pretended_cuda.install()
    launched_ops.install()
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip every test on a machine with a device: nothing needs to be pretended there."""
    for item in items:
        item.add_marker(pytest.mark.skipif(HAS_GPU, reason="a CUDA device is here"))


@pytest.fixture(autouse=True)
def counts() -> Counts:
    """Counts of launches and synchronisations in a test, from zero."""
    COUNTS.clear()
    return COUNTS
