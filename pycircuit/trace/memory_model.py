"""Bytes that a trace takes beside its model, phase by phase, counted from the shapes of its tensors.

A phase is a dictionary of parts that are in memory together; the peak is that of the largest phase. Temporary tensors
are counted as they overlap: `x = x * gain` holds both for a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pycircuit.files.memory_maps import mapped_bytes
from pycircuit.model.frozen import attention_block
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import JumpReLU, TopK
from pycircuit.ops.attention import scratch_columns
from pycircuit.ops.dispatch import Request
from pycircuit.ops.dispatch import plan as dispatched
from pycircuit.transcoders import Transcoders

from .precision import FLOAT32, Arithmetic

PROCESS = 3 << 20  # Python's own objects, and pages of the allocator that are partly used
_LIBRARY = 9 << 18  # of a thread: where the library of matrix products arranges its operands, kept once it is there
HUGE_PAGE = 2 << 20  # NumPy asks the system for pages of this size
PACK_BLOCK = 1 << 16  # entries that are packed together
DEVICE_BLOCK = 1 << 25  # of dense rows that a GPU packs together, or cuts half as many
STAGING_BYTES = 16 << 20  # of each of two pinned buffers: to pin memory takes longer than to copy as much
_SCRATCH = 192 << 10  # bytes of a thread in a native op, at the least
_WIDENED = 16384  # rows of a half-precision unembedding that are widened together
_AROUND = 64 << 10  # bytes that the system maps where a page of a file is touched
_ROW = 400  # bytes of a row's own numbers: node, sums, and Python's lists of layers and positions


@dataclass(frozen=True)
class Work:
    """The size of a trace.

    entries: of all its rows together, at the most; batch: the most rows of a round, which are swept together where a
    tile takes them; decoders: bytes of rows left in files; busiest: features of the layer that has most;
    stored_bytes: of the largest file of a checkpoint, None without one; arithmetic: of the sweep's products.
    """

    positions: int
    features: int
    rows: int
    entries: int
    layers: int
    ranked: bool
    batch: int = 1
    decoders: int = 0
    busiest: int = 0
    stored_bytes: int | None = None
    arithmetic: Arithmetic = FLOAT32

    @property
    def columns(self) -> int:
        return self.features + (self.layers + 1) * self.positions


def round_of(wanted: int, total: int, round_size: int | None) -> int:
    """How many of `wanted` features are chosen at a time: all at once where nothing has to be ranked."""
    return wanted if wanted == total else min(wanted, round_size or max(64, wanted // 8))


class LayerShape(Protocol):
    """The weights of a layer, frozen or not."""

    @property
    def w_o(self) -> torch.Tensor: ...
    @property
    def w_v(self) -> torch.Tensor: ...
    @property
    def heads(self) -> int: ...
    @property
    def post_mlp_norm(self) -> Any: ...


@dataclass(frozen=True)
class TileCost:
    """Bytes of a tile of targets: of a row of the state, of a target's position in the first attention, of a target."""

    row: int
    position: int
    target: int

    def of(self, rows: Any, targets: Any, longest: Any, target_bytes: int = 0) -> Any:
        """Of numbers, or of arrays of them. target_bytes: what each target takes besides, for the edges it writes."""
        return rows * self.row + targets * (longest * self.position + self.target + target_bytes)


def tile_cost(
    layers: Sequence[LayerShape],
    transcoders: Transcoders,
    width: int,
    size: int,
    stored: bool,
    native: bool = True,
    multiplied: int = 0,
    together: bool = False,
) -> TileCost:
    """Cost of a target in a tile; size: bytes of a number, native: attention is applied without padding.

    multiplied: bytes that a number takes besides while it is multiplied; together: the first attention of all targets
    is spread over positions at once, as if all were as long as the longest.
    """
    heads = max(layer.heads for layer in layers)
    query = max(layer.w_o.shape[1] for layer in layers)
    value = max(layer.w_v.shape[0] for layer in layers)
    inner = query + value
    written = 2 if transcoders.writes == "mlp_raw" and layers[0].post_mlp_norm is not None else 0
    skipped = 3 if any(w is not None for w in transcoders.w_skip) else 0
    padded = 0 if native else 4 * query
    return TileCost(
        row=size * (width + inner + max(written, skipped + written // 2) * width + padded)
        + 16
        + multiplied * max(width, value),
        position=size * (heads * (2 if stored else 3) + 2 + together * max(width, query)) + 9,
        target=size * (heads * (width + query) + 4 * query + 6 * width) + multiplied * heads * width,
    )


def has_kernel(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the op runs as a kernel on arguments of these types, rather than as plain PyTorch."""
    request = Request(op, device.type, tuple(dict.fromkeys(dtypes)))
    return dispatched(request).implementation != "reference"


class MemoryModel:
    """Phases of a trace of one model. stored: attention patterns are kept, otherwise recomputed."""

    def __init__(self, model: ReplacementModel, work: Work, stored: bool) -> None:
        self.model, self.work, self.stored = model, work, stored
        self.size, self.own = model.dtype.itemsize, model.weights.stored.itemsize
        self.layers, self.transcoders = model.weights.layers, model.transcoders
        self.on_gpu = model.device.type != "cpu"  # then packed rows come to the host, whose memory is counted apart
        self.plane = self.size * work.positions * model.width  # of one stream
        self.heads = max(w.heads for w in self.layers)
        self.query = max(w.w_o.shape[1] for w in self.layers)
        self.value = max(w.w_v.shape[0] for w in self.layers)
        native, multiplied = self._native("attend_back", model.dtype), work.arithmetic.row_bytes
        layers, width = self.layers, model.width
        self.cost = tile_cost(layers, self.transcoders, width, self.size, stored, native, multiplied, self.on_gpu)

    def _native(self, op: str, dtype: torch.dtype) -> bool:
        return has_kernel(op, self.model.device, self.model.dtype, dtype)

    # What stays

    def patterns(self) -> int:
        return self.size * sum(w.heads for w in self.layers) * self.work.positions**2

    def attention(self) -> int:
        if self.stored:
            return self.patterns()
        per = sum(w.w_o.shape[1] + w.w_v.shape[0] + w.heads for w in self.layers)
        return self.size * per * self.work.positions

    def streams(self) -> int:
        """Both recorded streams, the ends of the stream, and denominators of norms."""
        half = self.own != self.size
        return (2 * len(self.layers) + 4 + 2 * half) * self.plane + 4 * len(
            self.layers
        ) * self.size * self.work.positions

    def sources(self) -> int:
        """Errors, what transcoders read, the ends of the stream, and what is added where no source is active."""
        attention = _adding([[w.b_v, w.b_o, w.attention_norm, w.post_attention_norm] for w in self.layers])
        mlps = sum(self.transcoders.bias(at) is not None for at in range(len(self.layers)))
        small = (4 * len(self.layers) + 2 * self.value + 8) * self.size * self.work.positions
        return (2 * len(self.layers) + attention + mlps + 4) * self.plane + small

    def weight_parts(self) -> int:
        """Weights in parts, which the sweep's products read, and one of them while it is split."""
        sizes = [w.numel() for layer in self.layers for w in (layer.w_o, layer.w_v)]
        sizes += [w.numel() for w in self.transcoders.w_skip if w is not None]
        arithmetic = self.work.arithmetic
        split = 4 * (arithmetic.parts + 2) * max(sizes) if arithmetic.parts else 0
        return arithmetic.weight_bytes(self.on_gpu) * sum(sizes) + split

    def features(self) -> int:
        """By layer, and once more of all layers together."""
        return self.work.features * (32 + 2 * self.size) + 24 * len(self.layers) * self.work.positions

    # What comes and goes

    def block(self) -> int:
        """Attention weights that are worked on together, and the key or the value of every query head."""
        p = self.work.positions
        weights = min(self.heads * p * p, max(attention_block(self.model.device), self.heads * p))
        return self.size * (weights + p * self.query)

    def forward(self) -> int:
        """What one layer of the model's own forward works on: its attention or its MLP, and masks."""
        p, d = self.work.positions, self.model.width
        config = self.model.hf_model.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d)
        experts = int(getattr(config, "num_local_experts", None) or 0)
        wide = 8 * int(getattr(config, "num_experts_per_tok", None) or 1) if experts else 4
        projected = self.own * (self.query + 2 * self.value)
        attention = p * (2 * projected + self.size * (2 * self.query + 2 * self.value)) + 3 * self.block()
        mlp = self.own * wide * p * inner
        return p * d * (4 * self.own + 8 + 2 * self.size) + max(attention, mlp) + 5 * p * p

    def encoding(self) -> int:
        """Finding the features of the busiest layer, and decoding them."""
        n, p, d = self.work.busiest, self.work.positions, self.model.width
        return max(max(self._encode(at, n, p, d), self._decode(at, n, p, d)) for at in range(len(self.layers)))

    def _encode(self, layer: int, n: int, p: int, d: int) -> int:
        w_enc = self.transcoders.w_enc[layer]
        if w_enc is None:
            return 0
        rule, size = self.transcoders.activation[layer], w_enc.shape[0]
        theta = self.size * size if isinstance(rule, JumpReLU) else 0
        theta += mapped_bytes(w_enc)
        if self._native("encode", w_enc.dtype):
            best = p * (8 * (rule.k + max(16, rule.k // 2)) + 12 * rule.k) if isinstance(rule, TopK) else 12 * n
            return best + 24 * n + theta + self._scratch()
        widened = size * d * self.size if w_enc.dtype.itemsize < self.size else 0
        return widened + theta + p * size * (self.size + (self.size + 12 if isinstance(rule, TopK) else 3)) + 24 * n

    def _decode(self, layer: int, n: int, p: int, d: int) -> int:
        w_dec = self.transcoders.w_dec[layer]
        if w_dec is None:
            return 0
        slots = w_dec.shape[1] if len(w_dec.shape) == 3 else 1
        out = self.plane * slots
        if self._native("decode", w_dec.dtype):
            return out
        return 2 * out + n * slots * d * (w_dec.dtype.itemsize + 2 * self.size)

    def scoring(self) -> int:
        """Decoder rows of the busiest layer, where no kernel reads them in place, and patterns of a layer."""
        kinds = [w.dtype for w in self.transcoders.w_dec if w is not None]
        gathered = 0 if all(self._native("edge_scores", kind) for kind in kinds) else max(k.itemsize for k in kinds)
        if not gathered:
            return self._scratch() + self._written_pattern()
        patterns = 0 if self._native("attend_back", self.model.dtype) else (1 if self.stored else 4)
        return (
            self.work.busiest * self.model.width * (gathered + 2 * self.size)
            + patterns * self.size * self.heads * self.work.positions**2
            + self._written_pattern()
        )

    def _written_pattern(self) -> int:
        """What a kernel on a GPU writes of a layer's recomputed pattern before it applies it."""
        if self.stored or not self.on_gpu or not self._native("attend_back", self.model.dtype):
            return 0
        return 4 * self.heads * self.work.positions * scratch_columns(self.heads, self.work.positions)

    def encoder_rows(self) -> int:
        """Pages of encoders left in files, of the rows of a round; the system maps some pages around each."""
        mapped = sum(mapped_bytes(w) for w in self.transcoders.w_enc if w is not None)
        return min(mapped, self.work.batch * _AROUND)

    def _scratch(self) -> int:
        return torch.get_num_threads() * max(_SCRATCH, 256 * self.model.width)

    def targets(self) -> int:
        """Probabilities of all tokens at a position, and the final norm."""
        vocabulary, half = self.model.weights.vocabulary, self.own != self.size
        widened = min(vocabulary, _WIDENED) * self.model.width * self.size if half else 0
        return 3 * self.plane + vocabulary * (3 * self.size + 16) + widened

    def constants(self) -> int:
        """What attention adds to an empty stream, worked out layer by layer."""
        p = self.work.positions
        return 5 * self.plane + self.size * p * (2 * self.query + 2 * self.value) + 4 * self.block() + 10 * p

    # Rows

    def one_target(self, edges: int) -> int:
        """A tile that holds a single target of full length."""
        return self.cost.of(self.work.positions, 1, self.work.positions, edges)

    def edges(self, dense: bool, keep: int | None) -> int:
        """Of a target in a tile: its row where rows are not kept dense, and its packed entries."""
        entries = self.work.columns if keep is None else min(keep, self.work.columns)
        copies = 2 * (self.work.stored_bytes is not None) + (not dense or self.work.stored_bytes is not None)
        packed = 0 if self.on_gpu else copies * entries * (4 + self.size)
        return (0 if dense else self.size * self.work.columns) + packed

    def packing(self) -> int:
        return self.scoring() + (self._device_block() if self.on_gpu else self._packed_together())

    def _device_block(self) -> int:
        """Of the rows that a GPU packs at a time, and of those before them, which are on their way to the host."""
        together = min(max(DEVICE_BLOCK, 2 * self.work.columns), 2 * self.work.rows * self.work.columns)
        return together * (3 * self.size + 13)

    def _packed_together(self) -> int:
        """Of the rows that are packed at a time, and of a checkpoint's file."""
        together = min(max(PACK_BLOCK, self.work.columns), self.work.batch * self.work.columns)
        return together * (2 * (4 + self.size) + 1) + 2 * (self.work.stored_bytes or 0)

    def dense(self) -> int:
        return self.size * self.work.rows * self.work.columns

    def shares(self, dense: bool) -> int:
        """Dense rows once more, and their columns that have rows, where no kernel ranks them in place."""
        if not dense or self._native("influence", self.model.dtype):
            return 0
        return self.dense() + (self.size + 2) * self.work.rows**2

    def entries(self, keep: int | None) -> int:
        return self.work.entries if keep is None else min(self.work.entries, self.work.rows * keep)

    def packed(self, keep: int | None) -> int:
        """CSR of all rows, in arrays whose last page may be a huge one."""
        entries = self.entries(keep)
        return entries * (4 + self.size) + self._huge(4 * entries) + _ROW * self.work.rows

    def host(self, keep: int | None) -> int:
        """Beside a GPU, on the host: all packed rows, pinned buffers, the graph, and a checkpoint's rows of a tile."""
        if not self.on_gpu:
            return 0
        graph = 26 * self.work.features + 20 * self.work.columns
        saved = 0
        if self.work.stored_bytes is not None:
            entries = self.work.batch * min(self.work.columns if keep is None else keep, self.work.columns)
            saved = 2 * min(entries, self.entries(keep)) * (4 + self.size) + 2 * self.work.stored_bytes
        return self.packed(keep) + 2 * STAGING_BYTES + graph + saved

    @staticmethod
    def _huge(size: int) -> int:
        """What two arrays of about this size take beyond their ends."""
        return 2 * HUGE_PAGE if size >= 2 * HUGE_PAGE else 0

    # Phases

    def phases(self, dense: bool, keep: int | None, tile: int, on_device: bool = False) -> dict[str, dict[str, int]]:
        """Every phase's parts, in bytes. on_device: a GPU keeps packed rows to rank them."""
        work = self.work
        process = PROCESS + _LIBRARY * torch.get_num_threads()
        before = {"process": process, "attention": self.attention(), "streams": self.streams()}
        features = self.features()
        after = {**before, "streams": self.sources(), "features": features}
        if encoder_rows := self.encoder_rows():
            after["encoder rows"] = encoder_rows
        if work.decoders:
            after["decoder rows"] = work.decoders
        packed = 0 if self.on_gpu else self.packed(keep)
        rows = self.dense() + _ROW * work.rows if dense else self.packed(keep) if on_device else packed
        ranking = (32 * work.features + 24 * work.columns + self.shares(dense)) if work.ranked else 0
        return {
            "forward": {**before, "layer": self.forward()},
            "features": {**before, "features": features, "layer": self.encoding(), "decoder rows": work.decoders},
            "targets": {**after, "logits": self.targets()},
            "start": {**after, "layer": self.constants(), "choice": 64 * work.features},
            "sweep": {
                **after,
                "rows": rows,
                "tile": tile + self.packing(),
                "ranking": ranking,
                "weights": self.weight_parts(),
            },
            "packing": {**after, "rows": rows + (self._beside(keep) if dense else 0)},
            "graph": {
                **after,
                "rows": packed,
                "graph": 26 * work.features + 20 * work.columns,
                "norms": 32 * min(PACK_BLOCK, work.rows * self.model.width),
            },
        }

    def _beside(self, keep: int | None) -> int:
        """Beside dense rows, while they are packed: where they lie, or on their way from a GPU."""
        if self.on_gpu:
            return self._device_block()
        return 4 * self.entries(keep) + self._huge(self.dense()) + self.packing()


def _adding(layers: Sequence[Sequence[Any]]) -> int:
    """How many layers have a bias, or a norm with a bias, that is not zero."""
    flags = []
    for parts in layers:
        biases = [part if isinstance(part, torch.Tensor) or part is None else part.bias for part in parts]
        if filled := [bias.any() for bias in biases if bias is not None]:
            flags.append(torch.stack(filled).any())
    return int(torch.stack(flags).sum()) if flags else 0
