"""Backward sweep: edge rows of many targets through the frozen model, without autograd.

The state is the gradient of every target with respect to the residual stream, ragged: target t owns the positions that
it can see, rows ends[t] .. ends[t + 1]. Targets are sorted from the highest layer down, so at every layer the first m
of them are under way, in the first ends[m] rows. A target enters the state at its first attention
(first_attention.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from importlib import import_module
from itertools import groupby
from math import prod
from operator import neg

import numpy as np
import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.model.frozen import FrozenNorm
from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops import FileRows, SparseFeatures, StoredAttention, checks
from pycircuit.ops.cross_layer import CrossLayerFeatures, cross_layer_features
from pycircuit.transcoders import CrossLayerTranscoder

from .columns import Columns
from .constants import constant_parts
from .first_attention import FirstAttention, TargetRows, first_attention, token_edges
from .memory_model import has_kernel
from .memory_plan import tile_bytes
from .norms import norm_back, stacked
from .precision import Arithmetic, Denominators, Products, arithmetic_of, with_parts
from .tile_cost import tile_cost
from .upload import upload


class Tile:
    """Targets that are swept together, in this order.

    own: [targets, width], the one row of each target that has met no attention yet. The state [rows, width] has the
    rows of the first `entered` targets, of which `attended` are past their first attention; no target that reads at
    layer 0 ever enters it. constants: [targets, positions], products of each target's rows with what biases add.
    """

    def __init__(
        self, layer: Sequence[int], position: Sequence[int], own: Tensor, out: Tensor, bias: Tensor, constants: Tensor
    ) -> None:
        self.layer, self.own, self.out, self.bias, self.constants = layer, own, out, bias, constants
        self.position = upload(position, own.device)
        self.offsets = np.concatenate(
            [[0], np.add.accumulate(np.array(position[: self.count_reading(1)], np.int64) + 1)]
        )
        self.ends = self.offsets.tolist()
        self.prefix_ptr = upload(self.offsets, own.device)
        start = self.prefix_ptr[:-1].repeat_interleave(self.prefix_ptr.diff(), output_size=self.ends[-1])
        self.row_position = torch.arange(self.ends[-1], device=own.device) - start
        targets = torch.arange(len(self.ends) - 1, device=own.device)
        self.row_target = targets.repeat_interleave(self.prefix_ptr.diff(), output_size=self.ends[-1])
        self.last = self.prefix_ptr[1:] - 1
        self.positions = position
        self._prefixes: dict[int, Tensor] = {}
        self._rows: dict[tuple[int, int], TargetRows] = {}
        self.entered = self.attended = 0

    def __len__(self) -> int:
        return len(self.layer)

    def count_reading(self, layer: int) -> int:
        """Return the number of targets that read at this layer or above."""
        return bisect_right(self.layer, -layer, key=neg)

    def prefix(self, count: int) -> Tensor:
        """Return where the rows of the first `count` targets begin and end: [count + 1]."""
        if count not in self._prefixes:
            self._prefixes[count] = checks.known_offsets(self.prefix_ptr[: count + 1], self.offsets[: count + 1])
        return self._prefixes[count]

    def rows(self, begin: int, end: int) -> TargetRows:
        """Return the rows of targets begin .. end."""
        if (begin, end) not in self._rows:
            start, stop = self.ends[begin], self.ends[end]
            offsets, ptr = self.offsets[begin : end + 1] - start, self.prefix_ptr[begin : end + 1]
            target, position = self.row_target[start:stop], self.row_position[start:stop]
            self._rows[begin, end] = TargetRows(offsets, ptr, target, position, begin)
        return self._rows[begin, end]

    def longest(self, begin: int, end: int) -> int:
        """Return the positions that the farthest of targets begin .. end sees."""
        return max(self.positions[begin:end]) + 1

    def enter(self, count: int, state: Tensor) -> None:
        """Write the rows of the first `count` targets to the state: zero except at their own position."""
        if count > self.entered:
            state[self.ends[self.entered] : self.ends[count]] = 0
            state[self.last[self.entered : count]] = self.own[self.entered : count]
            self.entered = count


def _identity(rows: Tensor) -> SparseFeatures:
    """Return one source of value 1 at each position, whose vector is that position's row of `rows`."""
    count = rows.shape[0]
    return SparseFeatures(
        torch.arange(count + 1, device=rows.device), torch.arange(count, device=rows.device), rows.new_ones(count)
    )


class Sweep:
    """Edges of any targets of one frozen prompt, in buffers that are reused from tile to tile."""

    def __init__(self, local: LocalReplacement, arithmetic: Arithmetic | None = None) -> None:
        self.local, self.frozen, self.transcoders = local, local.model, local.transcoders
        self.columns = Columns.of(local)
        if arithmetic is None:
            arithmetic = arithmetic_of("attribute", "float32", self.frozen.device, self.frozen.dtype)
        self.products = Products(arithmetic)
        layers = range(self.columns.layers)
        self._attention, self._mlp_writes = constant_parts(local)
        self._identity = _identity(self.frozen.embeddings)
        self._no_target = checks.known_offsets(self._identity.row_ptr[:1], [0])
        self._cross_layer = self._cross_layer_features()
        self._read_norms = stacked([self._norm_read_after(i) for i in range(self.columns.layers + 1)])
        self._score_positions = self._prepare_scores(self._identity, self.frozen.embeddings)
        self._score_errors = self._prepare_scores(self._identity, local.errors[0])
        self._score_features = [self._feature_scores(layer) for layer in layers]
        self._attend_back = [self._prepare_attention(layer) for layer in layers]
        self._skips = [None if skip is None else skip.T for skip in local.transcoders.w_skip]
        self._buffers: dict[str, Tensor] = {}
        self._max_rows = self._max_targets = 0
        stored = isinstance(self.frozen.layers[0].attention, StoredAttention)
        kernel = has_kernel("attend_back", self.frozen.device, self.frozen.dtype)
        size = self.frozen.dtype.itemsize
        width = self.frozen.width
        on_gpu = self.frozen.device.type != "cpu"
        self._cost = tile_cost(
            self.frozen.layers, self.transcoders, width, size, stored, kernel, arithmetic.row_bytes, on_gpu
        )
        back_v, position_part = self.frozen.layers[0].back_v, self.frozen.position_part
        self._values = self.frozen.embeddings @ back_v.T
        self._position_values = None if position_part is None else position_part @ back_v.T

    def _cross_layer_features(self) -> CrossLayerFeatures | None:
        """Return the features of a cross-layer transcoder for one launch a layer, where there is a kernel for that."""
        on_gpu = self.frozen.device.type == "cuda" and has_kernel("edge_scores", self.frozen.device, self.frozen.dtype)
        if not on_gpu or not isinstance(self.transcoders, CrossLayerTranscoder):
            return None
        return cross_layer_features(self.transcoders.w_dec, self.local.features)

    def _prepare_scores(self, features: SparseFeatures, vectors: Tensor | FileRows) -> ops.Prepared:
        """Check sources and their vectors once for all tiles, as edges to no target."""
        none = self.frozen.embeddings[:0]
        out = none.new_empty(0, features.count)
        prepared = ops.prepare(
            "edge_scores", gradient=none, prefix_ptr=self._no_target, features=features, w_dec=vectors, out=out
        )
        return with_parts(prepared, self.products.arithmetic)

    def _feature_scores(self, layer: int) -> list[tuple[slice, ops.Prepared]]:
        """Return the columns of the features that write to a layer, and the op that scores them, by source."""
        active = [] if self._cross_layer is not None else self.transcoders.sources(layer)
        return [
            (
                self.columns.of_features(source),
                self._prepare_scores(self.local.features[source], self.transcoders.decoder(source, layer)),
            )
            for source in active
            if self.local.features[source].count
        ]

    def _prepare_attention(self, layer: int) -> ops.Prepared:
        """Check a layer's frozen attention once for all tiles, on no rows."""
        block, none = self.frozen.layers[layer], self.frozen.embeddings
        y, out = (none.new_empty(0, heads, block.head_width) for heads in (block.heads, block.kv_heads))
        prepared = ops.prepare("attend_back", y=y, prefix_ptr=self._no_target, attention=block.attention, out=out)
        return with_parts(prepared, self.products.arithmetic)

    def read(self, layer: Sequence[int], position: Sequence[int], vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of targets with respect to the stream, and their constants: [targets, width], [targets].

        layer, position: [targets], from the highest layer down; the model's depth stands for the end of the stream.
        vectors: [targets, width], encoder or unembedding rows, which pass back through the norm that they read after.
        """
        positions, constant = upload(position, vectors.device), vectors.new_zeros(len(vectors))
        if self._read_norms is not None:
            return self._read_norms.back(vectors, upload(layer, vectors.device), positions), constant
        gradient, begin = vectors.clone(), 0
        for depth, targets in groupby(layer):
            group = slice(begin, begin := begin + len(list(targets)))
            norm = self._norm_read_after(depth)
            if norm is None:
                continue
            if norm.bias is not None:
                constant[group] = vectors[group] @ norm.bias
            gradient[group] = norm.back(vectors[group], positions[group])
        return gradient, constant

    def _norm_read_after(self, depth: int) -> FrozenNorm | None:
        """Return the norm before what targets read at a layer, or at the model's depth."""
        if depth == self.columns.layers:
            return self.frozen.final_norm
        return self.frozen.layers[depth].read_norm(self.transcoders.reads)

    def rows(self, layer: Sequence[int], position: Sequence[int], vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return (edges [targets, columns], bias [targets]) of targets in any order; arguments as `read` takes them.

        Edges plus bias are the target's pre-activation without its own bias.
        """
        order = sorted(range(len(layer)), key=lambda t: (-layer[t], position[t]))
        out, bias, done = vectors.new_zeros(len(vectors), self.columns.count), vectors.new_zeros(len(vectors)), 0
        while done < len(order):
            layers, positions = [layer[t] for t in order[done:]], [position[t] for t in order[done:]]
            count = self.fitting(layers, positions, tile_bytes(vectors.device))
            chosen = order[done : done + count]
            edges = out.new_zeros(count, self.columns.count)
            bias[chosen] = self.tile(layers[:count], positions[:count], vectors[chosen], edges)
            out[chosen] = edges
            done += count
        return out, bias

    def fitting(self, layer: Sequence[int], position: Sequence[int], tile_bytes: int, target_bytes: int = 0) -> int:
        """Return how many of these targets, sorted from the highest layer down, make a tile: at least one.

        tile_bytes bounds what the tile takes at its peak, with target_bytes for the edges of each target.
        """
        visible, targets = np.array(position, np.int64) + 1, np.arange(1, len(position) + 1)
        rows = np.add.accumulate(np.where(np.array(layer) > 0, visible, 0))
        costs = self._cost.of(rows, targets, np.maximum.accumulate(visible), target_bytes)
        return max(1, int(np.searchsorted(costs, tile_bytes, side="right")))

    def reserve(self, tile_bytes: int, targets: int, target_bytes: int = 0) -> None:
        """Size the buffers for the largest tile of up to `targets`: a buffer that grows leaves a hole in memory."""
        self._max_targets = min(targets, tile_bytes // max(1, self._cost.target + target_bytes))
        self._max_rows = min(tile_bytes // self._cost.row, targets * self.columns.positions)

    def release(self) -> None:
        """Free the buffers."""
        self._buffers.clear()
        self.products.release()

    def _buffer(self, name: str, count: int, *shape: int, capacity: int = 0) -> Tensor:
        """Return a buffer [count, *shape] that is reused from tile to tile. capacity: the count to reserve."""
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < count * size:
            self._buffers.pop(name, None)
            self._buffers[name] = self.frozen.embeddings.new_empty(max(count, capacity) * size)
        return self._buffers[name][: count * size].view(count, *shape)

    def tile(self, layers: Sequence[int], positions: Sequence[int], vectors: Tensor, out: Tensor) -> Tensor:
        """Add the edges of targets sorted from the highest layer down to out [targets, columns]; return the biases.

        vectors: [targets, width] read there, as for `read`.
        """
        gradient, bias = self.read(layers, positions, vectors)
        constants = self._buffer("constants", len(layers), self.columns.positions, capacity=self._max_targets).zero_()
        tile, joined = Tile(layers, positions, gradient, out, bias, constants), None
        state = self._buffer("state", tile.ends[-1], self.frozen.width, capacity=self._max_rows)
        for layer in reversed(range(min(layers[0] + 1, self.columns.layers))):
            above, parallel = tile.count_reading(layer + 1), self.frozen.layers[layer].parallel
            tile.enter(above, state)
            skipped = self._score_layer(layer, above, tile, state) if above else None
            if skipped is not None and not parallel:
                self._add_skipped(skipped, tile, state)
            reach = above if parallel else len(tile) if layer == 0 else tile.count_reading(layer)
            self._attend(layer, joined, tile, state)
            joined = self._join(layer, reach, tile, state)
            if skipped is not None and parallel:
                self._add_skipped(skipped, tile, state)
        self._add_token_edges(tile, state)
        bias += constants.sum(1)
        return bias

    def _add_skipped(self, skipped: Tensor, tile: Tile, state: Tensor) -> None:
        """Add the gradients through a skip to the state, and to the one row of targets before their first attention."""
        state[: len(skipped)] += skipped
        tile.own[tile.attended : tile.entered] = state[tile.last[tile.attended : tile.entered]]

    def _add_token_edges(self, tile: Tile, state: Tensor) -> None:
        """Add the edges of tokens through the residual stream alone."""
        rows, ptr = state[: tile.ends[tile.attended]], tile.prefix(tile.attended)
        tokens = tile.out[:, self.columns.of_tokens]
        self._score_positions(gradient=rows, prefix_ptr=ptr, out=tokens[: tile.attended])
        self._add_constants(self.frozen.position_part, ptr, rows, tile)
        own, position = tile.own[tile.attended :], tile.position[tile.attended :]
        index = torch.arange(tile.attended, len(tile), device=position.device)
        tokens[index, position] += (own * self.frozen.embeddings[position]).sum(1)
        self._add_own_constants(self.frozen.position_part, tile, tile.attended, len(tile))

    def _add_own_constants(self, constant: Tensor | None, tile: Tile, begin: int, end: int) -> None:
        if constant is not None:
            tile.bias[begin:end].add_((tile.own[begin:end] * constant[tile.position[begin:end]]).sum(1))

    def _add_constants(self, constant: Tensor | None, ptr: Tensor, rows: Tensor, tile: Tile) -> None:
        """Add rows . constant to the tile's constants, position by position."""
        if constant is not None and len(ptr) > 1:
            self._score_positions(gradient=rows, prefix_ptr=ptr, w_dec=constant, out=tile.constants[: len(ptr) - 1])

    def _score_layer(self, layer: int, count: int, tile: Tile, state: Tensor) -> Tensor | None:
        """Score a layer's features and errors for the targets that read above; return gradients through its skip."""
        rows, ptr, position = state[: tile.ends[count]], tile.prefix(count), tile.row_position[: tile.ends[count]]
        block, out = self.frozen.layers[layer], tile.out[:count]
        self._add_constants(self._mlp_writes[layer], ptr, rows, tile)
        write = block.write_norm(self.transcoders.writes)
        written = rows if write is None else norm_back(write, rows, position)
        self._score_layer_features(layer, written, ptr, out)
        errors = self.local.errors[layer]
        self._score_errors(gradient=written, prefix_ptr=ptr, w_dec=errors, out=out[:, self.columns.of_errors(layer)])
        skip, norm = self._skips[layer], block.read_norm(self.transcoders.reads)
        if skip is None:
            return None
        back = self.products.project(written, skip)
        return back if norm is None else norm_back(norm, back, position)

    def _score_layer_features(self, layer: int, written: Tensor, ptr: Tensor, out: Tensor) -> None:
        """Score the features that write to a layer. written: [rows, width], the gradients of what is written there."""
        if self._cross_layer is not None:
            import_module("pycircuit.kernels.edge_scores").cross_layer_scores(
                self._cross_layer, layer, written, ptr, out, self.products.arithmetic.kernel_parts
            )
            return
        for columns, score in self._score_features[layer]:
            score(gradient=written, prefix_ptr=ptr, out=out[:, columns])

    def _attend(self, layer: int, joined: FirstAttention | None, tile: Tile, state: Tensor) -> None:
        """Apply G += norm^T W_V^T A^T W_O^T post-norm^T G to targets past their first attention.

        joined: the state of the last of them in factors, if nothing was added since their first attention.
        """
        if not tile.attended:
            return
        block, ptr = self.frozen.layers[layer], tile.prefix(tile.attended)
        rows, position = state[: tile.ends[tile.attended]], tile.row_position[: tile.ends[tile.attended]]
        self._add_constants(self._attention[layer], ptr, rows, tile)
        head_gradients = self._buffer("y", len(rows), block.back_o.shape[1], capacity=self._max_rows)
        first = tile.attended - (0 if joined is None else joined.vectors.shape[1])
        projected, norm = tile.ends[first], block.post_attention_norm
        divisor = None if norm is None else Denominators(norm.sigma, position[:projected])
        if projected:
            self.products.project(rows[:projected], block.back_o, head_gradients[:projected], divisor)
        if joined is not None:
            factors = joined.project(block.back_o, self.products)
            sigma = None if norm is None else norm.sigma
            factors.fill(head_gradients[projected:], tile.rows(first, tile.attended), sigma)
        value_gradients = self._buffer("z", len(rows), block.kv_heads, block.head_width, capacity=self._max_rows)
        by_head = head_gradients.unflatten(1, (block.heads, -1))
        self._attend_back[layer](y=by_head, prefix_ptr=ptr, out=value_gradients)
        flat = value_gradients.flatten(1)
        divisor = None if block.attention_norm is None else Denominators(block.attention_norm.sigma, position)
        if layer:
            self.products.add(rows, flat, block.back_v, divisor)
        else:  # only tokens are below: their values are few, the rows of the state many
            if divisor is not None:
                flat /= divisor.of_rows()[:, None]
            tokens = tile.out[: tile.attended, self.columns.of_tokens]
            self._score_positions(gradient=flat, prefix_ptr=ptr, w_dec=self._values, out=tokens)
            self._add_constants(self._position_values, ptr, flat, tile)

    def _join(self, layer: int, reach: int, tile: Tile, state: Tensor) -> FirstAttention | None:
        """Apply the first attention of targets up to `reach`; return its factors if the next layer can use them."""
        begin, end = tile.attended, reach
        if begin == end:
            return None
        block, own, position = self.frozen.layers[layer], tile.own[begin:end], tile.position[begin:end]
        longest = tile.longest(begin, end)
        self._add_own_constants(self._attention[layer], tile, begin, end)
        if layer == 0:
            tokens = tile.out[begin:end, self.columns.of_tokens]
            tokens[:, :longest] += token_edges(block, own, position, self._values[:longest], self.products)
            if self._position_values is not None:
                values = self._position_values[:longest]
                tile.bias[begin:end] += token_edges(block, own, position, values, self.products).sum(1)
            return None
        joined = first_attention(block, own, position, longest, self.products)
        joined.fill(state[tile.ends[begin] : tile.ends[end]], tile.rows(begin, end))
        tile.attended = tile.entered = end
        return joined if all(skip is None for skip in self._skips) else None
