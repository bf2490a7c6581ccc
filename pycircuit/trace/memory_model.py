"""Memory model of a trace: bytes beside the model, phase by phase, from the shapes of its tensors.

A phase is a dictionary of byte counts that are in memory together; the peak is that of the largest phase. Temporary
tensors are counted as they overlap: `x = x * gain` has both in memory for a moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycircuit.files.memory_maps import mapped_bytes
from pycircuit.model.frozen import attention_block
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import JumpReLU, TopK
from pycircuit.ops.attention import scratch_columns
from pycircuit.ops.dispatch import Request, encode_screens
from pycircuit.ops.dispatch import plan as dispatched

from .columns import Columns
from .precision import FLOAT32, Arithmetic
from .tile_cost import tile_cost
from .trace_options import TraceOptions

PROCESS = 3 << 20  # Python's own objects, and partly used pages of the allocator
_BLAS = 9 << 18  # of a thread: where the BLAS library packs its operands, never freed
HUGE_PAGE = 2 << 20  # NumPy asks the system for pages of this size
PACK_BLOCK = 1 << 16  # entries packed at a time on the CPU
DEVICE_BLOCK = 1 << 25  # numbers of dense rows that a GPU packs at a time; it cuts half as many
STAGING_BYTES = 16 << 20  # of a pinned buffer: pinning memory takes longer than copying as much
STAGING_BUFFERS = 8  # at the most, which packing can run ahead of the copies by
_SPARE = 80  # candidates of a position beyond k that a native top-k keeps at most, or half of k
_BLOCK = 32  # positions and numbers of a row that tiles are padded to
_SCRATCH = 192 << 10  # bytes of a thread in a native op, at the least
_WIDENED = 16384  # rows of a half-precision unembedding that are widened at a time
_READ_AHEAD = 64 << 10  # bytes that the system maps where a page of a file is touched
_ROW_OVERHEAD = 400  # bytes of a row's own numbers: node, sums, and Python's lists of layers and positions


@dataclass(frozen=True)
class TraceSize:
    """Size of a trace.

    entries: of all its rows together, at the most; batch: the most rows of a round, which are swept together where a
    tile can take them; decoders: bytes of rows left in files; busiest: features of the layer that has the most;
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


def trace_size(
    columns: Columns, options: TraceOptions, layer: Tensor, position: Tensor, decoders: int, stored_bytes: int | None
) -> TraceSize:
    """Return the size of a trace: rows of the targets, and of as many features as get one, those that see the most.

    layer, position: [targets], where each target reads; decoders, stored_bytes: as `TraceSize` has them.
    """
    sizes = columns.cone_sizes(*columns.feature_positions())
    expanded = options.expanded(columns.features)
    return TraceSize(
        positions=columns.positions,
        features=columns.features,
        rows=expanded + len(layer),
        entries=int(sizes.topk(expanded).values.sum()) + int(columns.cone_sizes(layer, position).sum()),
        layers=columns.layers,
        ranked=0 < expanded < columns.features,
        batch=max(len(layer), round_length(expanded, columns.features, options.round_size)),
        decoders=decoders,
        busiest=columns.busiest,
        stored_bytes=stored_bytes,
        arithmetic=options.arithmetic,
    )


def round_length(expanded: int, total: int, round_size: int | None) -> int:
    """Return how many of the features that get a row are chosen at a time: all where none has to be ranked."""
    return expanded if expanded == total else min(expanded, round_size or max(64, expanded // 8))


def has_kernel(op: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Return True if the op runs as a kernel on arguments of these types, rather than as plain PyTorch."""
    request = Request(op, device.type, tuple(dict.fromkeys(dtypes)))
    return dispatched(request).implementation != "reference"


class MemoryModel:
    """Memory of the phases of a trace of one model. stored: attention patterns are stored, otherwise recomputed."""

    def __init__(self, model: ReplacementModel, trace: TraceSize, stored: bool) -> None:
        self.model, self.trace, self.stored = model, trace, stored
        self._kernels: dict[tuple[str, torch.dtype], bool] = {}
        self.itemsize, self.stored_itemsize = model.dtype.itemsize, model.weights.stored.itemsize
        self.layers, self.transcoders = model.weights.layers, model.transcoders
        self.on_gpu = model.device.type != "cpu"  # where packed rows go to the host, whose memory is counted apart
        self.plane = self.itemsize * trace.positions * model.width  # of one stream
        self.heads = max(w.heads for w in self.layers)
        self.query = max(w.w_o.shape[1] for w in self.layers)
        self.value = max(w.w_v.shape[0] for w in self.layers)
        native, multiplied = self._native("attend_back", model.dtype), trace.arithmetic.row_bytes
        layers, width = self.layers, model.width
        self.cost = tile_cost(layers, self.transcoders, width, self.itemsize, stored, native, multiplied, self.on_gpu)

    def _native(self, op: str, dtype: torch.dtype) -> bool:
        if (op, dtype) not in self._kernels:  # asked for every layer
            self._kernels[op, dtype] = has_kernel(op, self.model.device, self.model.dtype, dtype)
        return self._kernels[op, dtype]

    # Tensors that stay

    def patterns(self) -> int:
        return self.itemsize * sum(w.heads for w in self.layers) * self.trace.positions**2

    def attention(self) -> int:
        if self.stored:
            return self.patterns()
        per = sum(w.w_o.shape[1] + w.w_v.shape[0] + w.heads for w in self.layers)
        return self.itemsize * per * self.trace.positions

    def streams(self) -> int:
        """Both recorded streams, the ends of the stream, and denominators of norms."""
        widened = self.stored_itemsize != self.itemsize
        denominators = 4 * len(self.layers) * self.itemsize * self.trace.positions
        return (2 * len(self.layers) + 4 + 2 * widened) * self.plane + denominators

    def sources(self) -> int:
        """Errors, inputs of transcoders, the ends of the stream, and what biases add where no source is active."""
        attention = _biased_layers([[w.b_v, w.b_o, w.attention_norm, w.post_attention_norm] for w in self.layers])
        mlps = sum(self.transcoders.bias(layer) is not None for layer in range(len(self.layers)))
        small = (4 * len(self.layers) + 2 * self.value + 8) * self.itemsize * self.trace.positions
        return (2 * len(self.layers) + attention + mlps + 4) * self.plane + small

    def weight_parts(self) -> int:
        """Weights in the split form that the sweep's products read, and one of them while it is split."""
        sizes = [w.numel() for layer in self.layers for w in (layer.w_o, layer.w_v)]
        sizes += [w.numel() for w in self.transcoders.w_skip if w is not None]
        arithmetic = self.trace.arithmetic
        split = 4 * (arithmetic.parts + 2) * max(sizes) if arithmetic.parts and not arithmetic.native else 0
        return arithmetic.weight_bytes(self.on_gpu) * sum(sizes) + split

    def features(self) -> int:
        """Active features by layer, and once more of all layers together."""
        return self.trace.features * (32 + 2 * self.itemsize) + 24 * len(self.layers) * self.trace.positions

    # Temporary tensors

    def attention_scratch(self) -> int:
        """Attention weights that are computed at a time, and the key or the value of every query head."""
        p = self.trace.positions
        weights = min(self.heads * p * p, max(attention_block(self.model.device), self.heads * p))
        return self.itemsize * (weights + p * self.query)

    def model_layer(self) -> int:
        """One layer of the model's own forward: its attention or its MLP, and masks."""
        p, d = self.trace.positions, self.model.width
        config = self.model.hf_model.config.get_text_config()
        inner = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * d)
        experts = int(getattr(config, "num_local_experts", None) or 0)
        wide = 8 * int(getattr(config, "num_experts_per_tok", None) or 1) if experts else 4
        projected = self.stored_itemsize * (self.query + 2 * self.value)
        attention = (
            p * (2 * projected + self.itemsize * (2 * self.query + 2 * self.value)) + 3 * self.attention_scratch()
        )
        mlp = self.stored_itemsize * wide * p * inner
        return p * d * (4 * self.stored_itemsize + 8 + 2 * self.itemsize) + max(attention, mlp) + 5 * p * p

    def busiest_layer(self) -> int:
        """Encoding and decoding of the busiest layer's features."""
        n, p, d = self.trace.busiest, self.trace.positions, self.model.width
        return max(max(self._encode(layer, n, p, d), self._decode(layer, n, p, d)) for layer in range(len(self.layers)))

    def _encode(self, layer: int, n: int, p: int, d: int) -> int:
        w_enc = self.transcoders.w_enc[layer]
        if w_enc is None:
            return 0
        rule, size = self.transcoders.activation[layer], w_enc.shape[0]
        theta = self.itemsize * size if isinstance(rule, JumpReLU) else 0
        theta += mapped_bytes(w_enc)
        if self._native("encode", w_enc.dtype):
            best = 12 * n
            if isinstance(rule, TopK):
                best = p * (12 * (rule.k + max(_SPARE, rule.k // 2)) + 12 * rule.k)
            rounded = (p + _BLOCK) * (2 * (d + _BLOCK) + 8)  # x in bfloat16
            return best + 24 * n + theta + rounded * encode_screens() + self._scratch()
        widened = size * d * self.itemsize if w_enc.dtype.itemsize < self.itemsize else 0
        return (
            widened
            + theta
            + p * size * (self.itemsize + (self.itemsize + 12 if isinstance(rule, TopK) else 3))
            + 24 * n
        )

    def _decode(self, layer: int, n: int, p: int, d: int) -> int:
        w_dec = self.transcoders.w_dec[layer]
        if w_dec is None:
            return 0
        slots = w_dec.shape[1] if len(w_dec.shape) == 3 else 1
        out = self.plane * slots
        if self._native("decode", w_dec.dtype):
            return out
        return 2 * out + n * slots * d * (w_dec.dtype.itemsize + 2 * self.itemsize)

    def scoring(self) -> int:
        """Decoder rows of the busiest layer, where no kernel reads them in place, and patterns of a layer."""
        dtypes = [w.dtype for w in self.transcoders.w_dec if w is not None]
        gathered = (
            0
            if all(self._native("edge_scores", dtype) for dtype in dtypes)
            else max(dtype.itemsize for dtype in dtypes)
        )
        if not gathered:
            return self._scratch() + self._pattern_scratch()
        patterns = 0 if self._native("attend_back", self.model.dtype) else (1 if self.stored else 4)
        return (
            self.trace.busiest * self.model.width * (gathered + 2 * self.itemsize)
            + patterns * self.itemsize * self.heads * self.trace.positions**2
            + self._pattern_scratch()
        )

    def _pattern_scratch(self) -> int:
        """A layer's recomputed pattern, as a kernel on a GPU writes it before it applies it."""
        if self.stored or not self.on_gpu or not self._native("attend_back", self.model.dtype):
            return 0
        return 4 * self.heads * self.trace.positions * scratch_columns(self.heads, self.trace.positions)

    def encoder_rows(self) -> int:
        """Pages of encoders left in files, for the rows of a round; the system maps some pages around each."""
        mapped = sum(mapped_bytes(w) for w in self.transcoders.w_enc if w is not None)
        return min(mapped, self.trace.batch * _READ_AHEAD)

    def _scratch(self) -> int:
        return torch.get_num_threads() * max(_SCRATCH, 256 * self.model.width)

    def targets(self) -> int:
        """Probabilities of all tokens at a position, and the final norm."""
        vocabulary, half = self.model.weights.vocabulary, self.stored_itemsize != self.itemsize
        widened = min(vocabulary, _WIDENED) * self.model.width * self.itemsize if half else 0
        return 3 * self.plane + vocabulary * (3 * self.itemsize + 16) + widened

    def constants(self) -> int:
        """Attention's output for an empty stream, computed layer by layer."""
        p = self.trace.positions
        return (
            5 * self.plane
            + self.itemsize * p * (2 * self.query + 2 * self.value)
            + 4 * self.attention_scratch()
            + 10 * p
        )

    # Rows

    def full_target(self, edges: int) -> int:
        """A tile that holds a single target of full length."""
        return self.cost.of(self.trace.positions, 1, self.trace.positions, edges)

    def edges(self, dense: bool, keep: int | None) -> int:
        """Edges of a target in a tile: its row where rows do not stay dense, and its packed entries."""
        entries = self.trace.columns if keep is None else min(keep, self.trace.columns)
        copies = 2 * (self.trace.stored_bytes is not None) + (not dense or self.trace.stored_bytes is not None)
        packed = 0 if self.on_gpu else copies * entries * (4 + self.itemsize)
        return (0 if dense else self.itemsize * self.trace.columns) + packed

    def packing(self) -> int:
        return self.scoring() + (self._device_block() if self.on_gpu else self._packed_together())

    def _device_block(self) -> int:
        """Rows that a GPU packs at a time, and those before them, under way to the host."""
        numbers = min(max(DEVICE_BLOCK, 2 * self.trace.columns), 2 * self.trace.rows * self.trace.columns)
        return numbers * (3 * self.itemsize + 13)

    def _packed_together(self) -> int:
        """Rows that are packed at a time, and a checkpoint's file."""
        numbers = min(max(PACK_BLOCK, self.trace.columns), self.trace.batch * self.trace.columns)
        return numbers * (2 * (4 + self.itemsize) + 1) + 2 * (self.trace.stored_bytes or 0)

    def dense(self) -> int:
        return self.itemsize * self.trace.rows * self.trace.columns

    def shares(self, dense: bool) -> int:
        """Dense rows once more, and their columns that have rows, where no kernel ranks them in place."""
        if not dense or self._native("influence", self.model.dtype):
            return 0
        return self.dense() + (self.itemsize + 2) * self.trace.rows**2

    def entries(self, keep: int | None) -> int:
        return self.trace.entries if keep is None else min(self.trace.entries, self.trace.rows * keep)

    def packed(self, keep: int | None) -> int:
        """CSR of all rows, in arrays whose last page may be a huge one."""
        entries = self.entries(keep)
        return entries * (4 + self.itemsize) + self._huge(4 * entries) + _ROW_OVERHEAD * self.trace.rows

    def host(self, keep: int | None) -> int:
        """Memory of the host beside a GPU: packed rows, pinned buffers, the graph, a checkpoint's rows of a tile."""
        if not self.on_gpu:
            return 0
        graph = 26 * self.trace.features + 20 * self.trace.columns
        saved = 0
        if self.trace.stored_bytes is not None:
            entries = self.trace.batch * min(self.trace.columns if keep is None else keep, self.trace.columns)
            saved = 2 * min(entries, self.entries(keep)) * (4 + self.itemsize) + 2 * self.trace.stored_bytes
        return self.packed(keep) + STAGING_BUFFERS * STAGING_BYTES + graph + saved

    @staticmethod
    def _huge(size: int) -> int:
        """Memory that two arrays of about this size take beyond their ends."""
        return 2 * HUGE_PAGE if size >= 2 * HUGE_PAGE else 0

    # Phases

    def phases(self, dense: bool, keep: int | None, tile: int, on_device: bool = False) -> dict[str, dict[str, int]]:
        """Return the bytes of every phase by purpose. on_device: a GPU keeps packed rows and ranks them."""
        trace = self.trace
        process = PROCESS + _BLAS * torch.get_num_threads()
        recorded = {"process": process, "attention": self.attention(), "streams": self.streams()}
        features = self.features()
        frozen = {**recorded, "streams": self.sources(), "features": features}
        if encoder_rows := self.encoder_rows():
            frozen["encoder rows"] = encoder_rows
        if trace.decoders:
            frozen["decoder rows"] = trace.decoders
        packed = 0 if self.on_gpu else self.packed(keep)
        rows = self.dense() + _ROW_OVERHEAD * trace.rows if dense else self.packed(keep) if on_device else packed
        ranking = (32 * trace.features + 24 * trace.columns + self.shares(dense)) if trace.ranked else 0
        return {
            "forward": {**recorded, "layer": self.model_layer()},
            "features": {
                **recorded,
                "features": features,
                "layer": self.busiest_layer(),
                "decoder rows": trace.decoders,
            },
            "targets": {**frozen, "logits": self.targets()},
            "start": {**frozen, "layer": self.constants(), "choice": 64 * trace.features},
            "sweep": {
                **frozen,
                "rows": rows,
                "tile": tile + self.packing(),
                "ranking": ranking,
                "weights": self.weight_parts(),
            },
            "packing": {**frozen, "rows": rows + (self._while_packing(keep) if dense else 0)},
            "graph": {
                **frozen,
                "rows": packed,
                "graph": 26 * trace.features + 20 * trace.columns,
                "norms": 32 * min(PACK_BLOCK, trace.rows * self.model.width),
            },
        }

    def _while_packing(self, keep: int | None) -> int:
        """Memory beside dense rows while they are packed: in place, or under way from a GPU."""
        if self.on_gpu:
            return self._device_block()
        return 4 * self.entries(keep) + self._huge(self.dense()) + self.packing()


def _biased_layers(layers: Sequence[Sequence[Any]]) -> int:
    """Return the number of layers that have a bias, or a norm with a bias, that is not zero."""
    flags = []
    for modules in layers:
        biases = [m if isinstance(m, torch.Tensor) or m is None else m.bias for m in modules]
        if filled := [bias.any() for bias in biases if bias is not None]:
            flags.append(torch.stack(filled).any())
    return int(torch.stack(flags).sum()) if flags else 0
