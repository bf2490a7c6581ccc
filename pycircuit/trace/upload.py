"""Whole numbers of the host on the device of a trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def upload(numbers: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return numbers on a device, int64; from pinned memory, for a host need not wait for a GPU's earlier work then."""
    host = torch.from_numpy(np.asarray(numbers, np.int64))
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
