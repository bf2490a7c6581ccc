"""Launch configurations: an explicit space for each kernel, pruned by the resources of a Hopper multiprocessor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

SHARED_BYTES = 227 * 1024  # that a block may use at compute 9.0


@dataclass(frozen=True)
class Config:
    """Block sizes by the kernel's own names, warps per program, depth of the software pipeline."""

    blocks: tuple[tuple[str, Any], ...]
    warps: int
    stages: int

    def __getitem__(self, name: str) -> Any:
        return dict(self.blocks)[name]

    def launch(self) -> dict[str, Any]:
        # Contracted multiply-adds are wanted; Triton's default for them is changing, so it is set.
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def config(warps: int, stages: int, **blocks: Any) -> Config:
    return Config(tuple(blocks.items()), warps, stages)


Needs = Callable[[Config], tuple[int, int]]  # -> (shared bytes of a pipeline stage, accumulators of a program)


def prune(space: Iterable[Config], needs: Needs, most: int) -> tuple[Config, ...]:
    """Configurations whose pipeline fits in shared memory, with at most `most` accumulators per thread.

    The other registers of a thread differ by kernel, and so does `most`: at compute 9.0, more accumulators spill.
    """
    fitting = []
    for candidate in space:
        shared, accumulators = needs(candidate)
        fits = shared * candidate.stages <= SHARED_BYTES
        if fits and accumulators <= most * 32 * candidate.warps:
            fitting.append(candidate)
    return tuple(fitting)
