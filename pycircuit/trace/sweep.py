"""The backward sweep: edge rows of many targets through the frozen model, without a tape.

State is the gradient of every target with respect to the stream, ragged: target t owns the positions it can
see, rows prefix_ptr[t] .. prefix_ptr[t + 1]. Targets come sorted from the highest layer down, so at every layer
the ones under way are the first m, and their rows the first prefix_ptr[m].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.model.frozen import FrozenLayer, FrozenNorm
from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops import Features

STATE_BYTES = 12 << 20  # of one tile: state, y and z together stay in the last-level cache


@dataclass(frozen=True, eq=False)
class Columns:
    """Where every source lies in a row: features layer by layer, errors layer by layer, tokens."""

    feature_start: tuple[int, ...]  # [layers + 1]
    layers: int
    positions: int

    @property
    def features(self) -> int:
        return self.feature_start[-1]

    @property
    def count(self) -> int:
        return self.features + (self.layers + 1) * self.positions

    def of_features(self, layer: int) -> slice:
        return slice(self.feature_start[layer], self.feature_start[layer + 1])

    def of_errors(self, layer: int) -> slice:
        start = self.features + layer * self.positions
        return slice(start, start + self.positions)

    @property
    def of_tokens(self) -> slice:
        return self.of_errors(self.layers)


@dataclass(frozen=True, eq=False)
class _Attention:
    """One layer's attention as the sweep uses it, norms folded into the weights, denominators apart."""

    w_o: Tensor  # [width, heads * head_width]
    w_v: Tensor  # [kv_heads * head_width, width], columns scaled by the norm's gain and centred
    post: FrozenNorm | None
    sigma: Tensor | None
    constant: Tensor | None  # [positions, width], what attention adds to an empty stream
    layer: FrozenLayer


def _nonzero(t: Tensor) -> Tensor | None:
    return t if bool(t.any()) else None


def _one_each(rows: Tensor) -> Features:
    """One source a position, its vector row p of `rows`."""
    count = rows.shape[0]
    return Features(
        torch.arange(count + 1, device=rows.device), torch.arange(count, device=rows.device), rows.new_ones(count)
    )


class Sweep:
    """Edges of any targets of one frozen prompt. Weights are folded once; buffers live as long as this."""

    def __init__(self, local: LocalReplacement) -> None:
        self.local, self.frozen, self.transcoders = local, local.model, local.transcoders
        starts = torch.tensor([0, *(f.count for f in local.features)]).cumsum(0).tolist()
        self.columns = Columns(tuple(starts), len(self.frozen.layers), self.frozen.positions)
        self._attention = [self._fold(layer) for layer in self.frozen.layers]
        self._constant = [self._mlp_constant(at) for at in range(self.columns.layers)]
        self._each = _one_each(self.frozen.embeddings)
        self._buffers: dict[str, Tensor] = {}

    def _fold(self, layer: FrozenLayer) -> _Attention:
        norm, w_v = layer.attention_norm, layer.w_v
        if norm is not None and norm.gain is not None:
            w_v = w_v * norm.gain
        if norm is not None and norm.center:
            w_v = w_v - w_v.mean(1, keepdim=True)
        empty = torch.zeros_like(self.frozen.embeddings)
        constant = _nonzero(layer.attention_out(empty))
        sigma = None if norm is None else norm.sigma
        return _Attention(layer.w_o, w_v.contiguous(), layer.post_attention_norm, sigma, constant, layer)

    def _mlp_constant(self, layer: int) -> Tensor | None:
        """What the replaced MLP adds with no feature and no error: [positions, width]."""
        frozen, transcoders = self.frozen.layers[layer], self.transcoders
        out = torch.zeros_like(self.frozen.embeddings)
        bias, skip = transcoders.bias(layer), transcoders.w_skip[layer]
        if bias is not None:
            out[self.local.ignore_positions :] += bias.to(out.dtype)
        norm = frozen.read_norm(transcoders.reads)
        if skip is not None and norm is not None:
            out += norm.forward(torch.zeros_like(out)) @ skip.to(out.dtype)
        write = frozen.write_norm(transcoders.writes)
        return _nonzero(out if write is None else write.forward(out))

    def read(self, layer: Tensor, position: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Encoder (or unembedding) rows through the transpose of their read.

        layer, position: [targets]; the model's depth stands for the end of the stream. vectors: [targets, width].
        Returns gradients with respect to the stream, and each read's constant: [targets, width], [targets].
        """
        gradient, constant = vectors.clone(), vectors.new_zeros(len(vectors))
        for at in layer.unique().tolist():
            mine = (layer == at).nonzero()[:, 0]
            end = at == self.columns.layers
            norm = self.frozen.final_norm if end else self.frozen.layers[at].read_norm(self.transcoders.reads)
            if norm is None:
                continue
            if norm.bias is not None:
                constant[mine] = vectors[mine] @ norm.bias
            gradient[mine] = norm.back(vectors[mine], position[mine])
        return gradient, constant

    def rows(
        self, layer: Tensor, position: Tensor, vectors: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(edges [targets, columns], bias [targets]) of targets in any order; arguments as `read` takes them.

        Edges plus bias are the target's pre-activation without its own bias.
        """
        out = vectors.new_zeros(len(vectors), self.columns.count) if out is None else out.zero_()
        gradient, bias = self.read(layer, position, vectors)
        order = sorted(range(len(layer)), key=lambda t: (-int(layer[t]), int(position[t]), t))
        for tile in self._tiles(order, position):
            chosen = torch.tensor(tile, device=layer.device)
            part, extra = self._tile(layer[chosen].tolist(), position[chosen].tolist(), gradient[chosen])
            out[chosen] = part
            bias[chosen] += extra
        return out, bias

    def _tiles(self, order: list[int], position: Tensor) -> list[list[int]]:
        """Targets in order, cut so that a tile's state fits STATE_BYTES; one target at the least."""
        attention = max((a.w_o.shape[1] + a.w_v.shape[0] for a in self._attention), default=0)
        row_bytes = (self.frozen.width + attention) * self.frozen.embeddings.element_size()
        tiles: list[list[int]] = []
        room = 0
        for t in order:
            size = (int(position[t]) + 1) * row_bytes
            if size > room:
                tiles.append([])
                room = STATE_BYTES
            tiles[-1].append(t)
            room -= size
        return tiles

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Room kept from one tile to the next."""
        size = 1
        for n in shape:
            size *= n
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = self.frozen.embeddings.new_empty(size)
        return held[:size].view(shape)

    def _tile(self, layer: list[int], position: list[int], gradient: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor(position) + 1
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(gradient.device)
        state = self._buffer("state", int(lengths.sum()), self.frozen.width).zero_()
        state[ends[1:] - 1] = gradient  # a target starts at the last position it sees
        where = torch.arange(len(state), device=ends.device) - ends[:-1].repeat_interleave(lengths.to(ends.device))
        out, bias = self._buffer("out", len(layer), self.columns.count).zero_(), gradient.new_zeros(len(layer))
        for at in reversed(range(min(max(layer) + 1, self.columns.layers))):
            above = sum(read > at for read in layer)
            joined = sum(read >= at for read in layer)
            parallel = self.frozen.layers[at].parallel
            skipped = self._mlp(at, above, state, ends, where, out, bias) if above else None
            if skipped is not None and not parallel:
                state[: len(skipped)] += skipped
            self._attend(at, above if parallel else joined, state, ends, where, bias)
            if skipped is not None and parallel:
                state[: len(skipped)] += skipped
        ops.edge_scores(state, ends, self._each, self.frozen.embeddings, out[:, self.columns.of_tokens])
        self._constants(self.frozen.position_part, len(layer), state, ends, bias)
        return out, bias

    def _constants(self, constant: Tensor | None, count: int, state: Tensor, ends: Tensor, bias: Tensor) -> None:
        """bias[t] += the sum over positions of state . constant, for the first `count` targets."""
        if constant is None or not count:
            return
        part = self._buffer("part", count, self.columns.positions).zero_()
        ops.edge_scores(state[: int(ends[count])], ends[: count + 1], self._each, constant, part)
        bias[:count] += part.sum(1)

    def _mlp(
        self, at: int, count: int, state: Tensor, ends: Tensor, where: Tensor, out: Tensor, bias: Tensor
    ) -> Tensor | None:
        """Scores at the write point of a layer, for the targets reading above; returns what a skip hands on."""
        rows, ptr = int(ends[count]), ends[: count + 1]
        above, layer = state[:rows], self.frozen.layers[at]
        self._constants(self._constant[at], count, above, ptr, bias)
        write = layer.write_norm(self.transcoders.writes)
        written = above if write is None else write.back(above, where[:rows])
        for source in self.transcoders.sources(at):
            found = self.local.features[source]
            if found.count:
                columns = self.columns.of_features(source)
                ops.edge_scores(written, ptr, found, self.transcoders.decoder(source, at), out[:count, columns])
        ops.edge_scores(written, ptr, self._each, self.local.errors[at], out[:count, self.columns.of_errors(at)])
        skip, norm = self.transcoders.w_skip[at], layer.read_norm(self.transcoders.reads)
        if skip is None:
            return None
        back = written @ skip.to(written.dtype).T
        return back if norm is None else norm.back(back, where[:rows])

    def _attend(self, at: int, count: int, state: Tensor, ends: Tensor, where: Tensor, bias: Tensor) -> None:
        """G += norm^T W_V^T A^T W_O^T post-norm^T G for the first `count` targets."""
        if not count:
            return
        rows, ptr, folded = int(ends[count]), ends[: count + 1], self._attention[at]
        under = state[:rows]
        self._constants(folded.constant, count, under, ptr, bias)
        came = under if folded.post is None else folded.post.back(under, where[:rows])
        y = torch.mm(came, folded.w_o, out=self._buffer("y", rows, folded.w_o.shape[1]))
        z = self._buffer("z", rows, folded.layer.kv_heads, folded.layer.head_width)
        ops.attend_back(y.unflatten(1, (folded.layer.heads, -1)), ptr, folded.layer.attention, z)
        flat = z.flatten(1)
        if folded.sigma is not None:
            flat /= folded.sigma[where[:rows], None]
        under.addmm_(flat, folded.w_v)
