"""Checkpoints of a run by steps and by time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import trainer_state
from .schedule import Schedule


class CheckpointWriter:
    """Writer of a run's checkpoint, every so many steps or minutes, whichever come first. path: None for no file."""

    def __init__(self, path: Path | None, run: Mapping[str, Any], every: int, minutes: float) -> None:
        self.path, self.run, self.every, self.seconds = path, run, every, 60 * minutes
        self.written = time.monotonic()

    def is_due(self, steps: int, last: bool) -> bool:
        """Return True if the checkpoint is to be written after this many steps."""
        late = time.monotonic() - self.written >= self.seconds
        return self.path is not None and (last or late or steps % self.every == 0)

    def write(self, schedule: Schedule, state: Mapping[str, Tensor]) -> None:
        """Write the checkpoint."""
        if self.path is not None:
            trainer_state.save(self.path, self.run, schedule, state)
            self.written = time.monotonic()
