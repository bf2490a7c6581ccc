"""What a trace will need, before any of it is spent, and how it is cut to fit a bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, inf
from pathlib import Path

import psutil
import torch

from pycircuit.files.sizes import parse_bytes
from pycircuit.model.replacement import PATTERN_BYTES, ReplacementModel

from .memory_model import MemoryModel, Work

TILE_BYTES = 32 << 20  # of a tile's state and its projections: larger ones gain nothing
GPU_TILE_BYTES = 8 << 30  # the same on a GPU, where every tile costs the host thousands of launches
TILE_TARGETS = 24  # of full length: fewer would read decoders and make patterns again too often
FEWEST = 256  # entries of a row that are kept under any bound
_SHOWN = (("GiB", 1 << 30, 2), ("MiB", 1 << 20, 1), ("KiB", 1 << 10, 1), ("B", 1, 0))  # unit, bytes, figures
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.8  # of the memory that is free, taken where no bound is given


class MemoryBoundError(MemoryError):
    """A trace cannot fit its bound; the message says what would."""


def free_bytes(device: torch.device) -> int:
    """What a run could take now; a container's own limit counts."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch's own allocator
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    free = int(psutil.virtual_memory().available)
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


def tile_bytes(device: torch.device) -> int:
    """Bytes of a tile that is large enough for its device."""
    return TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES


def pattern_bytes(device: torch.device) -> float:
    """Bytes of attention patterns above which a device makes them again: a GPU keeps what its bound holds."""
    return PATTERN_BYTES if device.type == "cpu" else inf


def readable(size: float, up: bool = False) -> str:
    """A size in its unit. up: rounded up, so that it is enough when given back."""
    unit, step, digits = next(u for u in _SHOWN if size >= u[1] or u[1] == 1)
    shown = size / step
    return f"{ceil(shown * 10**digits) / 10**digits if up else shown:.{digits}f} {unit}"


@dataclass(frozen=True)
class Bound:
    """Bytes that a trace may take beside its model. given: by the user, otherwise most of what is free.

    bytes: where the model is; host: beside a GPU, on the host, for what is packed there, most of what is free.
    """

    bytes: int
    given: bool
    host: float = inf

    @classmethod
    def of(cls, memory: str | int | None, device: torch.device) -> Bound:
        size = None if memory is None else parse_bytes(memory, "memory")
        host = inf if device.type == "cpu" else free_bytes(torch.device("cpu")) * _SHARE
        return cls(int(free_bytes(device) * _SHARE), False, host) if size is None else cls(size, True, host)

    def __str__(self) -> str:
        return f"{readable(self.bytes)} ({'memory=' if self.given else f'{_SHARE:.0%} of what is free'})"


@dataclass(frozen=True)
class Plan:
    """How a trace runs. needs: bytes by part, of the phase that takes the most; they add up to at most `memory`.

    stored: attention patterns are kept, otherwise recomputed; dense: rows are kept dense while they are ranked;
    keep: how many entries of a row stay, None for all; tile_bytes: of the sweep's state and edges at a time;
    targets: how many of full length make a tile; edge_bytes: what the edges of one take; entries: of all rows
    together, at the most; batch: rows of a round; ranked_on_device: a GPU keeps packed rows to rank them itself.
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
    """Parts of a plan that are decided already: by patterns that are there, or by the rows of a checkpoint."""

    stored: bool | None = None
    rows: tuple[bool, int | None] | None = None  # dense, keep

    def choices(self, ranked: bool) -> Iterator[tuple[bool, int | None]]:
        """Rows that keep all entries, fastest first; only what is ranked is of use dense."""
        if self.rows is None:
            yield from [(True, None)] * ranked
            yield False, None
        else:
            yield self.rows


def decide(model: ReplacementModel, work: Work, bound: Bound, fixed: Fixed = Fixed()) -> Plan:
    """The fastest plan that fits; MemoryBoundError, with the bound that would do, if none does."""
    models = _models(model, work, bound.bytes, fixed)
    for comfortable in (True, False):  # all entries in tiles of a good size, or else in smaller ones
        for memory in models:
            for dense, keep in fixed.choices(work.ranked):
                plan = _placed(memory, dense, keep, bound, comfortable)
                if plan is not None:
                    return plan
    for comfortable in (True, False):
        for memory in sorted(models, key=MemoryModel.attention):
            plan = _cut(memory, bound, comfortable) if fixed.rows is None else None
            if plan is not None:
                return plan
    smallest = least(model, work, fixed)
    if smallest <= bound.bytes and bound.host < inf:
        raise MemoryBoundError(
            f"attribute: {readable(bound.host)} of the host must hold {work.rows} packed rows, which take at least "
            f"{readable(_packed_at_least(models[-1], fixed), up=True)}; free some, or lower max_features"
        )
    raise MemoryBoundError(refusal(work, smallest, bound, fixed))


def _packed_at_least(memory: MemoryModel, fixed: Fixed) -> int:
    """Bytes on the host of rows cut to the fewest entries, or to a checkpoint's."""
    return memory.host(FEWEST if fixed.rows is None else fixed.rows[1])


def _models(model: ReplacementModel, work: Work, bound: int, fixed: Fixed) -> list[MemoryModel]:
    """Patterns stored where a quarter of the bound holds them, and recomputed."""
    stored, recomputed = (MemoryModel(model, work, stored) for stored in (True, False))
    if fixed.stored is not None:
        return [stored if fixed.stored else recomputed]
    small = stored.patterns() <= min(pattern_bytes(model.device), bound // 4)
    return [stored, recomputed] if small else [recomputed]


def _placed(memory: MemoryModel, dense: bool, keep: int | None, limits: Bound, comfortable: bool) -> Plan | None:
    """The plan with these rows, if there is one: a GPU ranks packed ones where it has place for them."""
    plan = None
    if memory.on_gpu and memory.work.ranked and not dense:
        plan = _fitted(memory, dense, keep, limits, comfortable, on_device=True)
    return _fitted(memory, dense, keep, limits, comfortable) if plan is None else plan


def _fitted(
    memory: MemoryModel, dense: bool, keep: int | None, limits: Bound, comfortable: bool, on_device: bool = False
) -> Plan | None:
    """The plan with these rows and the largest tile that is of use, if there is one."""
    if memory.host(keep) > limits.host:
        return None
    bound, edges = limits.bytes, memory.edges(dense, keep)
    lone = memory.one_target(edges)
    targets = min(max(TILE_TARGETS, tile_bytes(memory.model.device) // memory.one_target(0)), memory.work.batch)
    left = bound - sum(memory.phases(dense, keep, 0, on_device)["sweep"].values())
    floor = min(targets * lone, max(lone, bound // 16)) if comfortable else lone
    if left < floor:
        return None
    tile = min(targets * lone, left)
    phases = memory.phases(dense, keep, tile, on_device)
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    needs = {part: size for part, size in phases[name].items() if size}
    plan = Plan(
        bound,
        memory.stored,
        dense,
        keep,
        tile,
        tile // lone,
        edges,
        memory.entries(keep),
        memory.work.batch,
        on_device,
        name,
        needs,
    )
    return plan if plan.total <= bound else None


def _cut(memory: MemoryModel, bound: Bound, comfortable: bool) -> Plan | None:
    """The plan that keeps the most entries of every row."""
    low, high = FEWEST, max(FEWEST, memory.work.columns)
    best = _fitted(memory, False, low, bound, comfortable)
    while best is not None and high - low > 16:
        middle = (low + high) // 2
        plan = _fitted(memory, False, middle, bound, comfortable)
        low, high, best = (middle, high, plan) if plan is not None else (low, middle, best)
    return best and _placed(memory, False, best.keep, bound, comfortable)


def least(model: ReplacementModel, work: Work, fixed: Fixed = Fixed()) -> int:
    """The smallest bound that `decide` finds a plan for."""
    dense, keep = (False, FEWEST) if fixed.rows is None else fixed.rows
    smallest = []
    for stored in (True, False) if fixed.stored is None else (fixed.stored,):
        memory = MemoryModel(model, work, stored)
        lone = memory.one_target(memory.edges(dense, keep))
        peak = max(sum(parts.values()) for parts in memory.phases(dense, keep, lone).values())
        if fixed.stored is not None or not stored:
            smallest.append(peak)
        elif memory.patterns() <= pattern_bytes(model.device):
            smallest.append(max(peak, 4 * memory.patterns()))
    return min(smallest)


def refusal(work: Work, smallest: int, bound: Bound, fixed: Fixed) -> str:
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
        f"attribute: memory must be at least {needed} for {work.positions} positions, {work.features} active features "
        f"and {work.rows} rows, got {bound}; allow more, shorten the prompt or lower max_features"
    )
