"""The backward sweep: edge rows of many targets through the frozen model, without a tape.

State is the gradient of every target with respect to the stream, ragged: target t owns the positions it can
see, rows ends[t] .. ends[t + 1]. Targets come sorted from the highest layer down, so at every layer the ones
under way are the first m, and their rows the first ends[m]. A target joins by its first attention (see hop.py).
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
from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops import SparseFeatures, StoredAttention, checks
from pycircuit.ops.cross_layer import CrossLayerFeatures, cross_layer_features
from pycircuit.transcoders import CrossLayerTranscoder

from .columns import Columns
from .first_attention import Hop, TargetRows, hop, land
from .memory_model import has_kernel, tile_cost
from .memory_plan import tile_bytes
from .precision import Arithmetic, Products, arithmetic_of


class Tile:
    """Targets swept together, in this order, and what the sweep knows of each.

    own: [targets, width], the one row of those that have met no attention yet.
    state: [rows, width], the rows of the first `entered` targets, `hopped` of them past their first attention; no
    target that reads at layer 0 ever enters it.
    constants: [targets, positions], what each one's rows found in what no node adds.
    """

    def __init__(
        self, layer: Sequence[int], position: Sequence[int], own: Tensor, out: Tensor, bias: Tensor, constants: Tensor
    ) -> None:
        self.layer, self.own, self.out, self.bias, self.constants = layer, own, out, bias, constants
        self.position = torch.tensor(position, device=own.device)
        self.offsets = np.concatenate([[0], np.add.accumulate(np.array(position[: self.reading(1)], np.int64) + 1)])
        self.ends = self.offsets.tolist()
        self.prefix_ptr = torch.from_numpy(self.offsets).to(own.device)
        start = self.prefix_ptr[:-1].repeat_interleave(self.prefix_ptr.diff(), output_size=self.ends[-1])
        self.where = torch.arange(self.ends[-1], device=own.device) - start
        targets = torch.arange(len(self.ends) - 1, device=own.device)
        self.target = targets.repeat_interleave(self.prefix_ptr.diff(), output_size=self.ends[-1])
        self.last = self.prefix_ptr[1:] - 1
        self.positions = position
        self._prefixes: dict[int, Tensor] = {}
        self._rows: dict[tuple[int, int], TargetRows] = {}
        self.entered = self.hopped = 0

    def __len__(self) -> int:
        return len(self.layer)

    def reading(self, at: int) -> int:
        """How many targets read at this layer or above."""
        return bisect_right(self.layer, -at, key=neg)

    def prefix(self, count: int) -> Tensor:
        """Where the rows of the first `count` targets begin and end: [count + 1]."""
        if count not in self._prefixes:
            self._prefixes[count] = checks.known_offsets(self.prefix_ptr[: count + 1], self.offsets[: count + 1])
        return self._prefixes[count]

    def rows(self, begin: int, end: int) -> TargetRows:
        """Where the rows of targets begin .. end lie."""
        if (begin, end) not in self._rows:
            start, stop = self.ends[begin], self.ends[end]
            target, position = self.target[start:stop] - begin, self.where[start:stop]
            offsets = self.offsets[begin : end + 1] - start
            self._rows[begin, end] = TargetRows(offsets, target, position, self.last[begin:end] - start)
        return self._rows[begin, end]

    def longest(self, begin: int, end: int) -> int:
        """Positions that the farthest of targets begin .. end sees."""
        return max(self.positions[begin:end]) + 1

    def enter(self, count: int, state: Tensor) -> None:
        """Give the first `count` targets their rows: zero up to their own."""
        if count > self.entered:
            state[self.ends[self.entered] : self.ends[count]] = 0
            state[self.last[self.entered : count]] = self.own[self.entered : count]
            self.entered = count


def _nonzero(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """None for those of zeros only; all are looked at together, which a GPU waits for once."""
    flags = [t.any() for t in tensors if t is not None]
    filled = iter(torch.stack(flags).tolist() if flags else [])
    return [t if t is not None and next(filled) else None for t in tensors]


def _one_each(rows: Tensor) -> SparseFeatures:
    """One source a position, its vector row p of `rows`."""
    count = rows.shape[0]
    return SparseFeatures(
        torch.arange(count + 1, device=rows.device), torch.arange(count, device=rows.device), rows.new_ones(count)
    )


class Sweep:
    """Edges of any targets of one frozen prompt. Buffers live as long as this."""

    def __init__(self, local: LocalReplacement, arithmetic: Arithmetic | None = None) -> None:
        self.local, self.frozen, self.transcoders = local, local.model, local.transcoders
        self.columns = Columns.of(local)
        layers = range(self.columns.layers)
        constants = _nonzero([self._attention_constant(i) for i in layers] + [self._mlp_constant(i) for i in layers])
        self._attention, self._mlp_writes = constants[: len(layers)], constants[len(layers) :]
        self._each = _one_each(self.frozen.embeddings)
        self._cross_layer = self._all_layers()
        self._skips = [None if skip is None else skip.T for skip in local.transcoders.w_skip]
        if arithmetic is None:
            arithmetic = arithmetic_of("attribute", "float32", self.frozen.device, self.frozen.dtype)
        self.products = Products(arithmetic)
        self._buffers: dict[str, Tensor] = {}
        self._most_rows = self._most_targets = 0
        stored = isinstance(self.frozen.layers[0].attention, StoredAttention)
        kernel = has_kernel("attend_back", self.frozen.device, self.frozen.dtype)
        size = self.frozen.dtype.itemsize
        width = self.frozen.width
        on_gpu = self.frozen.device.type != "cpu"
        self._cost = tile_cost(
            self.frozen.layers, self.transcoders, width, size, stored, kernel, arithmetic.row_bytes, on_gpu
        )
        back_v, part = self.frozen.layers[0].back_v, self.frozen.position_part
        self._values = self.frozen.embeddings @ back_v.T
        self._position_values = None if part is None else part @ back_v.T

    def _all_layers(self) -> CrossLayerFeatures | None:
        """The features of a cross-layer transcoder for one launch a layer, where a kernel takes them so."""
        on_gpu = self.frozen.device.type == "cuda" and has_kernel("edge_scores", self.frozen.device, self.frozen.dtype)
        if not on_gpu or not isinstance(self.transcoders, CrossLayerTranscoder):
            return None
        return cross_layer_features(self.transcoders.w_dec, self.local.features)

    def _attention_constant(self, at: int) -> Tensor | None:
        """What attention adds to an empty stream: [positions, width]."""
        layer = self.frozen.layers[at]
        norms = (layer.attention_norm, layer.post_attention_norm)
        biases = [layer.b_v, layer.b_o, *(n.bias for n in norms if n is not None)]
        if all(b is None for b in biases):
            return None
        return layer.attention_out(torch.zeros_like(self.frozen.embeddings))

    def _mlp_constant(self, at: int) -> Tensor | None:
        """What the replaced MLP adds with no feature and no error: [positions, width]."""
        frozen, transcoders = self.frozen.layers[at], self.transcoders
        out = torch.zeros_like(self.frozen.embeddings)
        bias, skip = transcoders.bias(at), transcoders.w_skip[at]
        if bias is not None:
            out[self.local.ignore_positions :] += bias.to(out.dtype)
        norm = frozen.read_norm(transcoders.reads)
        if skip is not None and norm is not None:
            out += norm.forward(torch.zeros_like(out)) @ skip.to(out.dtype)
        write = frozen.write_norm(transcoders.writes)
        return out if write is None else write.forward(out)

    def read(self, layer: Sequence[int], position: Sequence[int], vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder (or unembedding) rows through the transpose of their read.

        layer, position: [targets], from the highest layer down; the model's depth stands for the end of the stream.
        vectors: [targets, width].
        Returns gradients with respect to the stream, and each read's constant: [targets, width], [targets].
        """
        gradient, constant = vectors.clone(), vectors.new_zeros(len(vectors))
        positions, begin = torch.tensor(position, device=vectors.device), 0
        for depth, targets in groupby(layer):
            mine = slice(begin, begin := begin + len(list(targets)))
            end = depth == self.columns.layers
            norm = self.frozen.final_norm if end else self.frozen.layers[depth].read_norm(self.transcoders.reads)
            if norm is None:
                continue
            if norm.bias is not None:
                constant[mine] = vectors[mine] @ norm.bias
            gradient[mine] = norm.back(vectors[mine], positions[mine])
        return gradient, constant

    def rows(self, layer: Sequence[int], position: Sequence[int], vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(edges [targets, columns], bias [targets]) of targets in any order; arguments as `read` takes them.

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
        """How many of these targets, sorted from the highest layer down, make a tile: one at the least.

        tile_bytes bounds what the tile takes at its peak, with target_bytes for the edges of each target.
        """
        seen, targets = np.array(position, np.int64) + 1, np.arange(1, len(position) + 1)
        rows = np.add.accumulate(np.where(np.array(layer) > 0, seen, 0))
        costs = self._cost.of(rows, targets, np.maximum.accumulate(seen), target_bytes)
        return max(1, int(np.searchsorted(costs, tile_bytes, side="right")))

    def reserve(self, tile_bytes: int, targets: int, target_bytes: int = 0) -> None:
        """Make room once for the largest tile of up to `targets`: a buffer that grows leaves holes where it was."""
        self._most_targets = min(targets, tile_bytes // max(1, self._cost.target + target_bytes))
        self._most_rows = min(tile_bytes // self._cost.row, targets * self.columns.positions)

    def release(self) -> None:
        """Give the buffers back."""
        self._buffers.clear()
        self.products.release()

    def _buffer(self, name: str, count: int, *shape: int, most: int = 0) -> Tensor:
        """[count, *shape], kept from one tile to the next; memory holds what was written."""
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < count * size:
            self._buffers.pop(name, None)
            self._buffers[name] = self.frozen.embeddings.new_empty(max(count, most) * size)
        return self._buffers[name][: count * size].view(count, *shape)

    def tile(self, layer: Sequence[int], position: Sequence[int], vectors: Tensor, out: Tensor) -> Tensor:
        """Adds the edges of targets sorted from the highest layer down to out [targets, columns]; returns the biases.

        vectors: [targets, width] read there, as for `read`.
        """
        gradient, bias = self.read(layer, position, vectors)
        constants = self._buffer("constants", len(layer), self.columns.positions, most=self._most_targets).zero_()
        tile, fresh = Tile(layer, position, gradient, out, bias, constants), None
        state = self._buffer("state", tile.ends[-1], self.frozen.width, most=self._most_rows)
        for at in reversed(range(min(layer[0] + 1, self.columns.layers))):
            above, parallel = tile.reading(at + 1), self.frozen.layers[at].parallel
            tile.enter(above, state)
            skipped = self._mlp(at, above, tile, state) if above else None
            if skipped is not None and not parallel:
                self._add(skipped, tile, state)
            reach = above if parallel else len(tile) if at == 0 else tile.reading(at)
            self._attend(at, fresh, tile, state)
            fresh = self._join(at, reach, tile, state)
            if skipped is not None and parallel:
                self._add(skipped, tile, state)
        self._tokens(tile, state)
        bias += constants.sum(1)
        return bias

    def _add(self, skipped: Tensor, tile: Tile, state: Tensor) -> None:
        """What a skip hands on, to the rows and to the single rows of targets that have nothing else."""
        state[: len(skipped)] += skipped
        tile.own[tile.hopped : tile.entered] = state[tile.last[tile.hopped : tile.entered]]

    def _tokens(self, tile: Tile, state: Tensor) -> None:
        """What the stream itself carries down to the embeddings."""
        rows, ptr = state[: tile.ends[tile.hopped]], tile.prefix(tile.hopped)
        tokens = tile.out[:, self.columns.of_tokens]
        ops.edge_scores(rows, ptr, self._each, self.frozen.embeddings, tokens[: tile.hopped])
        self._constants(self.frozen.position_part, ptr, rows, tile)
        own, position = tile.own[tile.hopped :], tile.position[tile.hopped :]
        at = torch.arange(tile.hopped, len(tile), device=position.device)
        tokens[at, position] += (own * self.frozen.embeddings[position]).sum(1)
        self._own_constants(self.frozen.position_part, tile, tile.hopped, len(tile))

    def _own_constants(self, constant: Tensor | None, tile: Tile, begin: int, end: int) -> None:
        if constant is not None:
            tile.bias[begin:end].add_((tile.own[begin:end] * constant[tile.position[begin:end]]).sum(1))

    def _constants(self, constant: Tensor | None, ptr: Tensor, rows: Tensor, tile: Tile) -> None:
        """constants[t] += rows . constant, position by position."""
        if constant is not None and len(ptr) > 1:
            ops.edge_scores(rows, ptr, self._each, constant, tile.constants[: len(ptr) - 1])

    def _mlp(self, at: int, count: int, tile: Tile, state: Tensor) -> Tensor | None:
        """Scores at the write point of a layer, for the targets reading above; returns what a skip hands on."""
        rows, ptr, where = state[: tile.ends[count]], tile.prefix(count), tile.where[: tile.ends[count]]
        layer, out = self.frozen.layers[at], tile.out[:count]
        self._constants(self._mlp_writes[at], ptr, rows, tile)
        write = layer.write_norm(self.transcoders.writes)
        written = rows if write is None else write.back(rows, where)
        self._features(at, written, ptr, out)
        ops.edge_scores(written, ptr, self._each, self.local.errors[at], out[:, self.columns.of_errors(at)])
        skip, norm = self._skips[at], layer.read_norm(self.transcoders.reads)
        if skip is None:
            return None
        back = self.products.project(written, skip)
        return back if norm is None else norm.back(back, where)

    def _features(self, at: int, written: Tensor, ptr: Tensor, out: Tensor) -> None:
        """Scores of the features that write to a layer; written: the gradients of what is written there."""
        if self._cross_layer is not None:
            import_module("pycircuit.kernels.edge_scores").cross_layer_scores(self._cross_layer, at, written, ptr, out)
            return
        for source in self.transcoders.sources(at):
            features = self.local.features[source]
            if features.count:
                columns = self.columns.of_features(source)
                ops.edge_scores(written, ptr, features, self.transcoders.decoder(source, at), out[:, columns])

    def _attend(self, at: int, fresh: Hop | None, tile: Tile, state: Tensor) -> None:
        """G += norm^T W_V^T A^T W_O^T post-norm^T G for targets past their first attention.

        fresh: the state of the last of them, as long as it is no more than what their first attention left.
        """
        if not tile.hopped:
            return
        layer, ptr = self.frozen.layers[at], tile.prefix(tile.hopped)
        rows, where = state[: tile.ends[tile.hopped]], tile.where[: tile.ends[tile.hopped]]
        self._constants(self._attention[at], ptr, rows, tile)
        y = self._buffer("y", len(rows), layer.back_o.shape[1], most=self._most_rows)
        first = tile.hopped - (0 if fresh is None else len(fresh.own))
        mixed = tile.ends[first]
        self.products.project(rows[:mixed], layer.back_o, y[:mixed])
        if fresh is not None:
            through = fresh.through(layer.back_o, self.products)
            through.fill(y[mixed:], tile.rows(first, tile.hopped))
        if layer.post_attention_norm is not None:
            y /= layer.post_attention_norm.sigma[where, None]
        z = self._buffer("z", len(rows), layer.kv_heads, layer.head_width, most=self._most_rows)
        ops.attend_back(y.unflatten(1, (layer.heads, -1)), ptr, layer.attention, z)
        flat = z.flatten(1)
        if layer.attention_norm is not None:
            flat /= layer.attention_norm.sigma[where, None]
        if at:
            self.products.add(rows, flat, layer.back_v)
        else:  # nothing below but tokens: their values are few, the rows of the state many
            ops.edge_scores(flat, ptr, self._each, self._values, tile.out[: tile.hopped, self.columns.of_tokens])
            self._constants(self._position_values, ptr, flat, tile)

    def _join(self, at: int, reach: int, tile: Tile, state: Tensor) -> Hop | None:
        """The first attention of the targets up to `reach`; returns their state if the next attention may use it."""
        begin, end = tile.hopped, reach
        if begin == end:
            return None
        layer, own, position = self.frozen.layers[at], tile.own[begin:end], tile.position[begin:end]
        longest = tile.longest(begin, end)
        self._own_constants(self._attention[at], tile, begin, end)
        if at == 0:
            tokens = tile.out[begin:end, self.columns.of_tokens]
            tokens[:, :longest] += land(layer, own, position, self._values[:longest], self.products)
            if self._position_values is not None:
                values = self._position_values[:longest]
                tile.bias[begin:end] += land(layer, own, position, values, self.products).sum(1)
            return None
        joined = hop(layer, own, position, longest, self.products)
        joined.fill(state[tile.ends[begin] : tile.ends[end]], tile.rows(begin, end))
        tile.hopped = tile.entered = end
        return joined if all(skip is None for skip in self._skips) else None
