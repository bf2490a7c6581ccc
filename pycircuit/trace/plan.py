"""What a trace will need, before any of it is spent, and how it is cut to fit a bound."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from pycircuit.model.frozen import BLOCK as ATTENTION_BLOCK
from pycircuit.model.replacement import PATTERN_BYTES, ReplacementModel
from pycircuit.ops.checks import is_int

TILE_BYTES = 32 << 20  # of a tile's state and its projections: larger ones gain nothing
TILE_TARGETS = 24  # of full length: fewer would read decoders and make patterns again too often
FEWEST = 256  # entries of a row that are kept under any bound
_UNITS = {"": 1, "b": 1}
_UNITS.update((p + s, n**e) for s, n in (("", 1000), ("b", 1000), ("ib", 1024)) for e, p in enumerate("kmgt", 1))
_CGROUP = Path("/sys/fs/cgroup")
_CHECKED = 1.5  # of the bytes of rows: what making a graph of them takes at its peak
_SHARE = 0.8  # of the memory that is free, taken where no bound is given


class MemoryBoundError(MemoryError):
    """A trace cannot fit its bound; the message says what would."""


def parse_bytes(value: str | int | None) -> int | None:
    """ "8GiB", "500 MB" or a number of bytes."""
    if value is None or (is_int(value) and value > 0):
        return None if value is None else int(value)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value) if isinstance(value, str) else None
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or not float(found[1]):
        raise ValueError(f"memory must be bytes or a size such as '8GiB' or '500MB', got {value!r}")
    return int(float(found[1]) * unit)


def free_bytes(device: torch.device) -> int:
    """What a run could take now; a container's own limit counts."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit, used = (_CGROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return max(free, 0)


def readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


@dataclass(frozen=True)
class Work:
    """The size of a trace. entries: of all its rows together, at the most; decoders: bytes of rows left in files."""

    positions: int
    features: int
    rows: int
    entries: int
    layers: int
    ranked: bool
    decoders: int = 0

    @property
    def columns(self) -> int:
        return self.features + (self.layers + 1) * self.positions


@dataclass(frozen=True)
class Plan:
    """How a trace runs. needs: bytes by part, which add up to at most `memory`.

    stored: attention patterns are kept, otherwise recomputed; dense: rows are kept dense while they are ranked;
    keep: how many entries of a row stay, None for all; tile_bytes: of the sweep's state at a time.
    """

    memory: int
    stored: bool
    dense: bool
    keep: int | None
    tile_bytes: int
    needs: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.needs.values())


class Needs:
    """Bytes of the parts of a trace of one model, as counted from its shapes."""

    def __init__(self, model: ReplacementModel, work: Work) -> None:
        self.model, self.work, self.size = model, work, model.dtype.itemsize

    def forward(self) -> int:
        """Streams that are kept, and what one layer of the model's own forward works on."""
        p, d, layers = self.work.positions, self.model.width, self.model.depth
        config = self.model.hf_model.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", None) or 4 * d)
        heads = max(w.heads for w in self.model.weights.layers)
        block = min(heads * p * p, max(ATTENTION_BLOCK, heads * p))
        kept = (2 * layers + 4) * p * d
        return self.size * (kept + 4 * p * inner + 6 * p * d + 5 * block) + 4 * p * p

    def patterns(self) -> int:
        return self.size * sum(w.heads for w in self.model.weights.layers) * self.work.positions**2

    def attention(self, stored: bool) -> int:
        if stored:
            return self.patterns()
        per = sum((w.heads + w.kv_heads) * (w.w_o.shape[1] // w.heads) + w.heads for w in self.model.weights.layers)
        return self.size * per * self.work.positions

    def features(self) -> int:
        return self.work.features * (2 * 8 + 2 * self.size + 6 * 8)

    def one_target(self) -> int:
        """Of a tile that holds a single target of full length."""
        wide = max(w.w_o.shape[1] + w.w_v.shape[0] + w.heads for w in self.model.weights.layers)
        return self.size * self.work.positions * (self.model.width + wide)

    def dense(self) -> int:
        return self.size * self.work.rows * self.work.columns if self.work.ranked else 0

    def packed(self, keep: int | None) -> int:
        """CSR of all rows, and what checking and summing them takes."""
        entries = self.work.entries if keep is None else min(self.work.entries, self.work.rows * keep)
        return int(_CHECKED * entries * (4 + self.size)) + 64 * self.work.rows

    def room(self, tile_bytes: int) -> int:
        """Rows of one tile that are not kept dense."""
        return max(self.size * self.work.columns, tile_bytes)


def decide(model: ReplacementModel, work: Work, memory: int | None) -> Plan:
    """The fastest way that fits; MemoryBoundError, with the number that would do, if none does."""
    bound = int(free_bytes(model.device) * _SHARE) if memory is None else memory
    needs = Needs(model, work)
    stored = needs.patterns() <= min(PATTERN_BYTES, bound // 4)
    fixed = {"forward": needs.forward(), "attention": needs.attention(stored), "features": needs.features()}
    if work.decoders:
        fixed["decoder rows"] = work.decoders
    left = bound - sum(fixed.values())
    tile = max(needs.one_target(), min(max(TILE_BYTES, TILE_TARGETS * needs.one_target()), left // 8))
    fixed["tile"] = 2 * tile
    left -= fixed["tile"]
    for dense, keep in ((True, None), (False, None)):
        rows = needs.packed(keep) + (needs.dense() if dense else needs.room(tile))
        if rows <= left and (work.ranked or not dense):
            return Plan(bound, stored, dense, keep, tile, {**fixed, "rows": rows})
    least = needs.packed(FEWEST) + needs.room(tile)
    if least > left:
        raise MemoryBoundError(_refusal(work, sum(fixed.values()) + least, bound, memory is None))
    keep = int((left - needs.room(tile)) / (_CHECKED * (4 + needs.size) * max(work.rows, 1))) - 16
    keep = max(keep, FEWEST)
    return Plan(bound, stored, False, keep, tile, {**fixed, "rows": needs.packed(keep) + needs.room(tile)})


def _refusal(work: Work, least: int, bound: int, free: bool) -> str:
    which = f"{_SHARE:.0%} of what is free" if free else "memory="
    return (
        f"attribute: memory must be at least {readable(least)} for {work.positions} positions, {work.features} active "
        f"features and {work.rows} rows, got {readable(bound)} ({which}); allow more, shorten the prompt or lower "
        "max_features"
    )
