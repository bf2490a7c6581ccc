"""circuit-tracer's algorithm on our frozen model: the baseline with our weights, our patterns and our features.

1. The prompt is replicated `batch` times through a taped forward; patterns and norm denominators are constants.
2. The decoder rows of all active features are copied and scaled.
3. A batch of targets is one backward, through all layers below its highest and through all positions.
4. An edge row has a column for every active feature, error node and token, and goes to the host at once.
5. Every few batches all rows are normalised again and multiplied until nothing moves, at most 128 times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from pycircuit.model.frozen import FrozenLayer
from pycircuit.model.replacement import LocalReplacement
from pycircuit.trace.columns import Columns

ITERATIONS = 128  # of the ranking, at most
BATCHES_A_RANKING = 4


def attention_out(layer: FrozenLayer, stream: Tensor) -> Tensor:
    """What a frozen attention adds to copies of the stream, on the tape: [batch, positions, width]."""
    everywhere = torch.arange(stream.shape[1], device=stream.device)
    pattern = layer.attention.pattern_rows(everywhere, len(everywhere)).unflatten(0, (layer.kv_heads, -1))
    x = stream if layer.attention_norm is None else layer.attention_norm.forward(stream)
    value = linear(x, layer.w_v, layer.b_v).unflatten(2, (layer.kv_heads, layer.head_width)).transpose(1, 2)
    mixed = (pattern @ value[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)
    raw = linear(mixed, layer.w_o, layer.b_o)
    return raw if layer.post_attention_norm is None else layer.post_attention_norm.forward(raw)


class TapedModel:
    """A taped forward of `batch` copies of one frozen prompt.

    tokens: [batch, positions, width], what enters layer 0; written: [layers] of the same shape, what each MLP adds;
    reads: [layers + 1] of the same shape, what a target of a layer reads, at last the normed end of the stream.
    """

    def __init__(self, local: LocalReplacement, batch: int) -> None:
        if any(skip is not None for skip in local.transcoders.w_skip):
            raise ValueError("TapedModel: transcoders must have no skip, got one; use a set without")
        frozen, transcoders = local.model, local.transcoders
        self.local, self.columns = local, Columns.of(local)
        self.tokens = frozen.embeddings.expand(batch, -1, -1).clone().requires_grad_()
        stream = self.tokens if frozen.position_part is None else self.tokens + frozen.position_part
        self.written, self.reads = [], []
        for layer in frozen.layers:
            attended = attention_out(layer, stream)
            middle = stream if layer.parallel else stream + attended
            norm, write = layer.read_norm(transcoders.reads), layer.write_norm(transcoders.writes)
            self.reads.append(middle if norm is None else norm.forward(middle))
            leaf = torch.zeros_like(stream, requires_grad=True)  # linear: gradients do not ask what is written
            self.written.append(leaf)
            stream = stream + attended + (leaf if write is None else write.forward(leaf))
        self.reads.append(frozen.final_norm.forward(stream))
        self.sources = [self._sources(layer) for layer in range(self.columns.layers)]

    def _sources(self, layer: int) -> list[tuple[slice, Tensor, Tensor]]:
        """(columns, positions [n], scaled decoder rows [n, width]) of the features that write to a layer."""
        sources = []
        for source in self.local.transcoders.sources(layer):
            features = self.local.features[source]
            rows = self.local.transcoders.decoder(source, layer)[features.index].to(features.value.dtype)
            rows = rows * features.value[:, None]
            sources.append((self.columns.of_features(source), features.position(), rows))
        return sources

    def rows(self, layer: Sequence[int], position: Sequence[int], vectors: Tensor) -> Tensor:
        """Edge rows of up to `batch` targets, on the host: [targets, columns].

        layer, position: [targets], the model's depth for the end of the stream; vectors: [targets, width], read there.
        """
        layers, positions = (torch.tensor(numbers, device=vectors.device) for numbers in (layer, position))
        used = sorted(set(layer))
        seeds = [torch.zeros_like(self.reads[depth]) for depth in used]
        for depth, seed in zip(used, seeds, strict=True):
            targets = (layers == depth).nonzero()[:, 0]
            seed[targets, positions[targets]] = vectors[targets]
        leaves = [*self.written[: used[-1]], self.tokens]
        reads = [self.reads[depth] for depth in used]
        *written, tokens = torch.autograd.grad(reads, leaves, seeds, retain_graph=True)
        out, count = vectors.new_zeros(len(vectors), self.columns.count), len(vectors)
        for depth, gradient in enumerate(written):
            for columns, place, rows in self.sources[depth]:
                out[:, columns] += torch.einsum("bnd,nd->bn", gradient[:count, place], rows)
            errors = self.local.errors[depth]
            out[:, self.columns.of_errors(depth)] = torch.einsum("bpd,pd->bp", gradient[:count], errors)
        embeddings = self.local.model.embeddings
        out[:, self.columns.of_tokens] = torch.einsum("bpd,pd->bp", tokens[:count], embeddings)
        return out.cpu()


def ranking(rows: Tensor, node: Tensor, weight: Tensor) -> Tensor:
    """Influence of every column by power iteration over all rows, normalised anew: [columns].

    rows: [rows, columns]; node: [rows], the column that each row is; weight: [columns], where influence enters.
    """
    shares = rows.abs()
    shares /= shares.sum(1, keepdim=True).clamp(min=1e-8)
    total, entering = torch.zeros_like(weight), weight
    for _ in range(ITERATIONS):
        entering = entering[node] @ shares
        if not entering.any():
            break
        total += entering
    return total
