"""Plan of a trace's memory: the fastest way to run it within a bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path

import psutil
import torch

from pycircuit.files.sizes import parse_bytes
from pycircuit.model.replacement import PATTERN_BYTES, ReplacementModel

from .memory_model import MemoryModel, TraceSize

TILE_BYTES = 32 << 20  # of a tile's state and its projections: larger tiles gain nothing
GPU_TILE_BYTES = 12 << 30  # on a GPU, where every tile takes the host tens of milliseconds
TILE_TARGETS = 24  # of full length: smaller tiles would read decoders and recompute patterns too often
FEWEST_ENTRIES = 256  # of a row, under any bound
_READABLE_UNITS = (("GiB", 1 << 30, 2), ("MiB", 1 << 20, 1), ("KiB", 1 << 10, 1), ("B", 1, 0))  # unit, bytes, figures
_CGROUP = Path("/sys/fs/cgroup")
_FREE_SHARE = 0.8  # of the free memory, the bound where none is given


class MemoryBoundError(MemoryError):
    """A trace cannot fit its memory bound; the message names one that it would fit."""


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a run could take now, within a container's own limit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's own allocator
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = int(psutil.virtual_memory().available)
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (limit_text := limit.read_text().strip()) != "max":
        free = min(free, int(limit_text) - int(used.read_text()))
    return max(free, 0)


def tile_bytes(device: torch.device) -> int:
    """Return the bytes of a tile that is large enough for its device."""
    return TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES


def pattern_bytes(device: torch.device) -> float:
    """Return the bytes of attention patterns above which they are recomputed: a GPU stores what its bound allows."""
    return PATTERN_BYTES if device.type == "cpu" else inf


def readable(size: float, up: bool = False) -> str:
    """Return a size in its unit. up: rounded up, so that it is enough as a bound."""
    unit, step, digits = next(u for u in _READABLE_UNITS if size >= u[1] or u[1] == 1)
    shown = size / step
    return f"{ceil(shown * 10**digits) / 10**digits if up else shown:.{digits}f} {unit}"


@dataclass(frozen=True)
class Bound:
    """Bytes that a trace may take beside its model. by_user: set by the user, otherwise most of the free memory.

    bytes: on the model's device; host: for packed rows on the host beside a GPU, most of its free memory.
    """

    bytes: int
    by_user: bool
    host: float = inf

    @classmethod
    def of(cls, memory: str | int | None, device: torch.device) -> Bound:
        size = None if memory is None else parse_bytes(memory, "memory")
        host = inf if device.type == "cpu" else free_bytes(torch.device("cpu")) * _FREE_SHARE
        return cls(int(free_bytes(device) * _FREE_SHARE), False, host) if size is None else cls(size, True, host)

    def __str__(self) -> str:
        return f"{readable(self.bytes)} ({'memory=' if self.by_user else f'{_FREE_SHARE:.0%} of what is free'})"


@dataclass(frozen=True)
class MemoryPlan:
    """Way to run a trace within a memory bound.

    stored: attention patterns are stored, otherwise recomputed; dense: rows stay dense while they are ranked; keep: how
    many entries of a row stay, None for all; tile_bytes: of the sweep's state and edges; targets: how many of full
    length make a tile; edge_bytes: of the edges of one target; entries: of all rows together, at the most; batch: rows
    of a round; ranked_on_device: a GPU keeps packed rows and ranks them itself; phase, needs: the phase that takes the
    most, and its bytes by purpose, at most `memory` together.
    """

    memory: int
    stored: bool
    dense: bool
    keep: int | None
    tile_bytes: int
    targets: int = 1
    edge_bytes: int = 0
    entries: int = 0
    batch: int = 0
    ranked_on_device: bool = False
    phase: str = ""
    needs: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.needs.values())


@dataclass(frozen=True)
class Fixed:
    """Choices of a plan that are made already, by stored patterns or by the rows of a checkpoint."""

    stored: bool | None = None
    rows: tuple[bool, int | None] | None = None  # dense, keep

    def choices(self, ranked: bool) -> Iterator[tuple[bool, int | None]]:
        """Yield (dense, keep) of rows with all entries, fastest first; dense rows are of use only if ranked."""
        if self.rows is None:
            yield from [(True, None)] * ranked
            yield False, None
        else:
            yield self.rows


def plan_memory(model: ReplacementModel, trace: TraceSize, bound: Bound, fixed: Fixed = Fixed()) -> MemoryPlan:
    """Return the fastest plan that fits, or raise MemoryBoundError with the smallest bound that would."""
    models = _models(model, trace, bound.bytes, fixed)
    for comfortable in (True, False):  # all entries in tiles of a good size, or else in smaller tiles
        for memory in models:
            for dense, keep in fixed.choices(trace.ranked):
                plan = _plan_with_rows(memory, dense, keep, bound, comfortable)
                if plan is not None:
                    return plan
    for comfortable in (True, False):
        for memory in sorted(models, key=MemoryModel.attention):
            plan = _plan_of_cut_rows(memory, bound, comfortable) if fixed.rows is None else None
            if plan is not None:
                return plan
    smallest = smallest_bound(model, trace, fixed)
    if smallest <= bound.bytes and bound.host < inf:
        raise MemoryBoundError(
            f"attribute: {readable(bound.host)} of the host must hold {trace.rows} packed rows, which take at least "
            f"{readable(_min_packed_bytes(models[-1], fixed), up=True)}; free some, or lower max_features"
        )
    raise MemoryBoundError(refusal_message(trace, smallest, bound, fixed))


def _min_packed_bytes(memory: MemoryModel, fixed: Fixed) -> int:
    """Return the host's bytes for rows cut to the fewest entries, or as a checkpoint has them."""
    return memory.host(FEWEST_ENTRIES if fixed.rows is None else fixed.rows[1])


def _models(model: ReplacementModel, trace: TraceSize, bound: int, fixed: Fixed) -> list[MemoryModel]:
    """Return memory models with patterns stored, if a quarter of the bound is enough for them, and recomputed."""
    stored, recomputed = (MemoryModel(model, trace, stored) for stored in (True, False))
    if fixed.stored is not None:
        return [stored if fixed.stored else recomputed]
    small = stored.patterns() <= min(pattern_bytes(model.device), bound // 4)
    return [stored, recomputed] if small else [recomputed]


def _plan_with_rows(
    memory: MemoryModel, dense: bool, keep: int | None, limit: Bound, comfortable: bool
) -> MemoryPlan | None:
    """Return the plan with these rows, if one fits: a GPU ranks packed rows where it has memory for them."""
    plan = None
    if memory.on_gpu and memory.trace.ranked and not dense:
        plan = _plan_with_tile(memory, dense, keep, limit, comfortable, on_device=True)
    return _plan_with_tile(memory, dense, keep, limit, comfortable) if plan is None else plan


def _plan_with_tile(
    memory: MemoryModel, dense: bool, keep: int | None, limit: Bound, comfortable: bool, on_device: bool = False
) -> MemoryPlan | None:
    """Return the plan with these rows and the largest tile that is of use, if one fits."""
    if memory.host(keep) > limit.host:
        return None
    bound, edges = limit.bytes, memory.edges(dense, keep)
    full_target = memory.full_target(edges)
    targets = min(max(TILE_TARGETS, tile_bytes(memory.model.device) // memory.full_target(0)), memory.trace.batch)
    left = bound - sum(memory.phases(dense, keep, 0, on_device)["sweep"].values())
    floor = min(targets * full_target, max(full_target, bound // 16)) if comfortable else full_target
    if left < floor:
        return None
    tile = min(targets * full_target, left)
    phases = memory.phases(dense, keep, tile, on_device)
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    needs = {purpose: size for purpose, size in phases[name].items() if size}
    plan = MemoryPlan(
        bound,
        memory.stored,
        dense,
        keep,
        tile,
        tile // full_target,
        edges,
        memory.entries(keep),
        memory.trace.batch,
        on_device,
        name,
        needs,
    )
    return plan if plan.total <= bound else None


def _plan_of_cut_rows(memory: MemoryModel, bound: Bound, comfortable: bool) -> MemoryPlan | None:
    """Return the plan that keeps the most entries of every row, if one fits."""
    low, high = FEWEST_ENTRIES, max(FEWEST_ENTRIES, memory.trace.columns)
    best = _plan_with_tile(memory, False, low, bound, comfortable)
    while best is not None and high - low > 16:
        middle = (low + high) // 2
        plan = _plan_with_tile(memory, False, middle, bound, comfortable)
        low, high, best = (middle, high, plan) if plan is not None else (low, middle, best)
    return best and _plan_with_rows(memory, False, best.keep, bound, comfortable)


def smallest_bound(model: ReplacementModel, trace: TraceSize, fixed: Fixed = Fixed()) -> int:
    """Return the smallest bound that `plan_memory` finds a plan for."""
    dense, keep = (False, FEWEST_ENTRIES) if fixed.rows is None else fixed.rows
    smallest = []
    for stored in (True, False) if fixed.stored is None else (fixed.stored,):
        memory = MemoryModel(model, trace, stored)
        full_target = memory.full_target(memory.edges(dense, keep))
        peak = max(sum(parts.values()) for parts in memory.phases(dense, keep, full_target).values())
        if fixed.stored is not None or not stored:
            smallest.append(peak)
        elif memory.patterns() <= pattern_bytes(model.device):
            smallest.append(max(peak, 4 * memory.patterns()))
    return min(smallest)


def refusal_message(trace: TraceSize, smallest: int, bound: Bound, fixed: Fixed) -> str:
    """Return the message of a MemoryBoundError: the smallest bound that would do, and how to need less."""
    needed = readable(smallest, up=True)
    if fixed.rows is not None:
        dense, keep = fixed.rows
        entries = "whole rows" if keep is None else f"{keep} entries of a row"
        ranked = "ranked dense" if dense else "ranked packed"
        return (
            f"attribute: memory must be at least {needed} to go on with this checkpoint, which holds {entries}, "
            f"{ranked}, got {bound}; allow more, or begin again in another folder"
        )
    return (
        f"attribute: memory must be at least {needed} for {trace.positions} positions, {trace.features} active "
        f"features and {trace.rows} rows, got {bound}; allow more, shorten the prompt or lower max_features"
    )
