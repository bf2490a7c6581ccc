"""Time of a training step beside plain PyTorch's. Run it with `make bench`."""

from __future__ import annotations

from typing import Any

import train_step


def test_step_against_plain_pytorch(steps: list[dict[str, Any]]) -> None:
    steps.append(train_step.report(rounds=15))
