"""What an H100 should take for every kernel and every GPU shape, from counts and named rates: writes PREDICTIONS.md.

Nothing here was measured on a GPU by this project. The first run of `make gpu` is held against it, line by line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_shapes import GEMMA2B, Size, ragged
from torch import Tensor

from pycircuit.bench.shapes import SHAPES, Shape

PATH = Path(__file__).with_name("PREDICTIONS.md")

# Operations and bytes a second of an H100 SXM, all assumed. bf16 and copy are what others reach on such a card with
# square products and large copies; fp32 without tensor cores and tf32 come from its data sheet, at the share that
# libraries reach; the stacked products run at 700e12 over their number; pinned transfers at a PCIe 5 slot's rate.
RATES = {"fp32": 50e12, "tf32": 420e12, "bf16": 790e12, "bf16x3": 700e12 / 3, "bf16x6": 700e12 / 6}
COPY, PINNED = 3.0e12, 50e9

# Shares of its floor that a kernel should reach, from the registers, loads and barriers of its compiled code.
SHARES = {"encode": 0.55, "decode": 0.75, "attend_back": 0.25, "edge_scores": 0.17, "influence": 0.27}
SHARES_BFLOAT16 = {"encode": 0.32}
PRECISIONS = {"float32": "bf16x6", "float32-fast": "bf16x3", "tf32": "tf32", "no tensor cores": "fp32"}
SELECTED = 0.4  # operations of the rows that influence selects, over those of an even selection; seen on the CPU
ROUNDS = 8  # rankings of a trace
OUTPUTS = 10
STORED_BYTES = 12 << 30  # patterns of all layers above this, a quarter of a trace's bound, are made again


@dataclass(frozen=True)
class Work:
    """Operations at a rate and bytes of an op, or of a share of a trace."""

    name: str
    shape: str
    operations: float
    bytes: float
    rate: str = "fp32"

    def floor(self, rate: str | None = None) -> float:
        """Seconds: the larger of operations over their rate and bytes over the copy rate."""
        return max(self.operations / RATES[rate or self.rate], self.bytes / COPY)

    @property
    def share(self) -> float:
        bfloat16 = SHARES_BFLOAT16 if self.rate == "bf16" else {}
        return bfloat16.get(self.name, SHARES[self.name])


def rows_read(features: int, active: int, positions: int) -> float:
    """Decoder rows that are active anywhere in a prompt, expected: they are read once."""
    return features * (1 - (1 - active / features) ** positions)


def kernels(size: Size = GEMMA2B) -> Iterator[Work]:
    """Every op at the inputs of gpu_shapes, in float32 and with bfloat16 weights."""
    d, f, active = size.width, size.features, size.active
    for p in size.prompts:
        for rate, itemsize in (("fp32", 4), ("bf16", 2)):
            moved = f * d * itemsize + 4 * p * d + 16 * p * active
            yield Work("encode", f"P {p} {rate}", 2.0 * p * f * d, moved, rate)
    p = size.prompts[0]
    for slots in (1, size.layers // 2):
        read = rows_read(f, active, p) * slots * d * 4
        yield Work("decode", f"P {p} slots {slots} fp32", 2.0 * p * active * slots * d, read + 4 * p * slots * d)
    for p, targets in zip(size.prompts, size.targets, strict=True):
        yield attend_back(size, p, targets)
    for p, targets in list(zip(size.prompts, size.targets, strict=True))[:2]:
        rows = int(ragged(targets, p, "cpu")[-1])
        moved = 4.0 * rows * d + rows_read(f, active, p) * d * 4 + 8.0 * rows * active
        yield Work("edge_scores", f"P {p} T {targets} fp32", 2.0 * rows * active * d, moved)
    count, columns = size.rows, size.columns
    shape = f"K {count} columns {columns}"
    yield Work("influence", shape, 2.0 * count * columns, 4.0 * count * columns + 4 * columns)


def attend_back(size: Size, p: int, targets: int) -> Work:
    """Stored patterns while a card keeps them, else what makes them again as well."""
    lengths = ragged(targets, p, "cpu").diff().double()
    width = size.heads * size.head
    useful, y = float((lengths * (lengths + 1)).sum()) * width, 4.0 * float(lengths.sum()) * width
    moved = y * (1 + size.groups / size.heads)
    if p < 4096:
        return Work("attend_back", f"P {p} B {targets} stored", useful, moved + 2.0 * size.heads * p * p)
    read = 4 * p * (size.heads + size.groups) * size.head
    return Work("attend_back", f"P {p} B {targets} recomputed fp32", useful + p * (p + 1.0) * width, moved + read)


def grid(shape: Shape) -> tuple[Tensor, Tensor]:
    """(layer, position) of a feature in every layer at every position past the first: [layers * (positions - 1)]."""
    layer, position = torch.meshgrid(torch.arange(shape.layers), torch.arange(1, shape.positions), indexing="ij")
    return layer.flatten(), position.flatten()


def targets(shape: Shape) -> int:
    """Feature rows of a trace."""
    active = shape.layers * (shape.positions - 1) * shape.active
    return active if shape.targets is None else min(shape.targets, active)


def sweep(shape: Shape, layer: Tensor, position: Tensor) -> list[Work]:
    """Products, attend_back and edge_scores of the targets at (layer, position), their first attention left out."""
    n, below = (position + 1).double(), layer.double()
    crossed = layer.clamp(max=shape.layers - 1).double()
    query, value, d = shape.heads * shape.head_width, shape.kv_heads * shape.head_width, shape.width
    writing = below * (below + 1) / 2 if shape.cross_layer else below
    again = 1 if shape.layers * shape.heads * shape.positions**2 * 4 <= STORED_BYTES else 2
    counts = {
        "products": (2 * n * d * (query + value) * crossed, 4 * n * (3 * d + query + value) * crossed),
        "attend_back": (again * query * n * (n + 1) * crossed, 4 * n * (query + value) * crossed),
        "edge_scores": (2 * n * d * (writing * shape.active + below + 1), 4 * n * d * (below + 1)),
    }
    return [Work(name, shape.name, float(o.sum()), float(b.sum())) for name, (o, b) in counts.items()]


def columns_seen(shape: Shape, layer: Tensor, position: Tensor) -> float:
    """Mean columns inside the cone of these targets."""
    features = layer.double() * shape.active * position.double()
    return float((features + (layer.double() + 1) * (position.double() + 1)).mean())


def trace(shape: Shape) -> list[Work]:
    """The card's work of a whole trace, every target's share of an even selection; the rankings read rows densely."""
    layer, position = grid(shape)
    count = targets(shape)
    works = []
    for work in sweep(shape, layer, position):
        scale = count / len(layer) * (1.0 if shape.targets is None else SELECTED)
        works.append(Work(work.name, shape.name, work.operations * scale, work.bytes * scale))
    columns = shape.layers * (shape.positions - 1) * shape.active + (shape.layers + 1) * shape.positions
    ranked = 0 if shape.targets is None else count * (ROUNDS - 1) / 2
    works.append(Work("influence", shape.name, 2.0 * ranked * columns, 4.0 * ranked * columns))
    f, d, p = shape.features, shape.width, shape.positions
    works.append(Work("encode", shape.name, shape.layers * 2.0 * p * f * d, shape.layers * 4.0 * f * d))
    return works


def export(shape: Shape) -> float:
    """Bytes of the finished rows, a column and a weight an entry, at most what an even selection has."""
    layer, position = grid(shape)
    scale = 1.0 if shape.targets is None else SELECTED
    return 8.0 * scale * (targets(shape) * columns_seen(shape, layer, position))


def seconds(shape: Shape, rate: str) -> float:
    """Expected seconds of a trace's work on the card, products at `rate`, and of its export."""
    total = export(shape) / PINNED
    for work in trace(shape):
        total += work.floor(rate) if work.name == "products" else work.floor() / SHARES[work.name]
    return total


def kernel_lines() -> list[str]:
    lines = ["| op | shape | GFLOP | MB | rate | floor ms | share | expected ms |", "|---|---|---|---|---|---|---|---|"]
    for w in kernels():
        cells = (f"{w.operations / 1e9:.2f}", f"{w.bytes / 1e6:.1f}", w.rate, f"{1e3 * w.floor():.3f}")
        expected = 1e3 * w.floor() / w.share
        lines.append(f"| {w.name} | {w.shape} | {' | '.join(cells)} | {w.share:.0%} | {expected:.3f} |")
    return lines


def trace_lines() -> list[str]:
    names = ("products", "attend_back", "edge_scores", "influence", "encode")
    lines = ["| shape | rows | " + " | ".join(f"{name} TFLOP / GB" for name in names) + " | export GB |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for shape in gpu_shapes():
        works = {w.name: w for w in trace(shape)}
        cells = [f"{works[n].operations / 1e12:.2f} / {works[n].bytes / 1e9:.1f}" for n in names]
        lines.append(f"| {shape.name} | {targets(shape)} | {' | '.join(cells)} | {export(shape) / 1e9:.2f} |")
    lines += ["", "| shape | " + " | ".join(f"{p} ({r}) s" for p, r in PRECISIONS.items()) + " |"]
    lines.append("|---" * (len(PRECISIONS) + 1) + "|")
    for shape in gpu_shapes():
        cells = [f"{seconds(shape, rate):.2f}" for rate in PRECISIONS.values()]
        lines.append(f"| {shape.name} | {' | '.join(cells)} |")
    return lines


def gpu_shapes() -> list[Shape]:
    return [shape for shape in SHAPES.values() if shape.device == "gpu"]


def document() -> str:
    """PREDICTIONS.md."""
    rates = ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in RATES.items())
    lines = [
        "# Predictions for an H100",
        "",
        "Written by `python benchmarks/predictions.py`; do not edit. **Nothing here was measured on a GPU**: these are "
        "counts over assumed rates, to be held against the first run of `make gpu`.",
        "",
        f"Assumed TFLOP/s: {rates}; copy {COPY / 1e12:.1f} TB/s, pinned transfers {PINNED / 1e9:.0f} GB/s. The floor "
        "is the larger of operations over their rate and bytes over the copy rate; *share* is what the compiled code "
        "lets one expect of a kernel, and expected is the floor over it.",
        "",
        "## Kernels",
        "",
        *kernel_lines(),
        "",
        "## Traces",
        "",
        f"Work on the card: the causal cones of the rows, without each target's first attention; {SELECTED} of what an "
        "even selection needs where influence selects (rows in low layers, seen on the CPU); rankings over dense rows. "
        "Seconds are the products at their rate and the kernels as above, one after another, plus the export; what the "
        "host adds, launches and Python, is not predicted.",
        "",
        *trace_lines(),
        "",
        "gemma2b-ten has the sizes of a call that circuit-tracer's notebook publishes: 4.48 s on a card that it does "
        "not name, 0.48 s of them for 6,338 rows, in bfloat16.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(document())
