"""The model on one prompt with attention patterns and norm denominators frozen: linear, in plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pycircuit.ops import Attention
from pycircuit.ops.torch_settings import without_autocast
from pycircuit.transcoders.types import Reads, Writes

BLOCK = 1 << 19  # attention weights computed at once: a cache holds them
GPU_BLOCK = 1 << 28  # on a GPU, which has no use for small blocks


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm with frozen denominators: N(x)[p] = gain * C(x[p]) / sigma[p] + bias.

    C subtracts the mean if `center`, else it is the identity.

    sigma: [positions]; gain: [width] or None for ones; bias: [width] or None.
    """

    sigma: Tensor
    gain: Tensor | None
    bias: Tensor | None
    center: bool

    def without_gain(self) -> FrozenNorm:
        """The norm up to its gain and bias."""
        return replace(self, gain=None, bias=None)

    def forward(self, x: Tensor, begin: int = 0) -> Tensor:
        """The norm of x: [..., n, width], at positions begin .. begin + n."""
        if self.center:
            x = x - x.mean(-1, keepdim=True)
        x = x / self.sigma[begin : begin + x.shape[-2], None]
        if self.gain is not None:
            x = x * self.gain
        return x if self.bias is None else x + self.bias

    def back(self, gradient: Tensor, positions: Tensor | None = None) -> Tensor:
        """The transpose of the linear part: [rows, width] to [rows, width].

        positions: [rows] int64, where each row is; None for rows 0, 1, 2, ...
        """
        sigma = self.sigma[: gradient.shape[0]] if positions is None else self.sigma[positions]
        if self.gain is not None:
            gradient = gradient * self.gain
        gradient = gradient / sigma[:, None]
        return gradient - gradient.mean(-1, keepdim=True) if self.center else gradient


@dataclass(frozen=True, eq=False)
class FrozenLayer:
    """One layer: attention_out is added to the stream, then (or, if parallel, at once) the MLP's output.

    w_v: [kv_heads * head_width, width]; b_v: [kv_heads * head_width] or None; w_o: [width, heads * head_width];
    b_o: [width] or None. back_v, back_o: as in LayerWeights. A norm the family has not is None.
    """

    attention_norm: FrozenNorm | None
    w_v: Tensor
    b_v: Tensor | None
    w_o: Tensor
    b_o: Tensor | None
    back_v: Tensor
    back_o: Tensor
    attention: Attention
    post_attention_norm: FrozenNorm | None
    mlp_norm: FrozenNorm | None
    post_mlp_norm: FrozenNorm | None
    parallel: bool
    heads: int
    kv_heads: int

    @property
    def head_width(self) -> int:
        return self.w_o.shape[1] // self.heads

    def attention_raw(self, stream: Tensor) -> Tensor:
        """Attention's output before any post-norm.

        stream: [positions, width], the layer's input.
        """
        x = stream if self.attention_norm is None else self.attention_norm.forward(stream)
        value = x @ self.w_v.T if self.b_v is None else torch.addmm(self.b_v, x, self.w_v.T)
        value = value.unflatten(1, (self.kv_heads, self.head_width)).transpose(0, 1)
        mixed = mix(self.attention, value).transpose(0, 1).flatten(1)
        return mixed @ self.w_o.T if self.b_o is None else torch.addmm(self.b_o, mixed, self.w_o.T)

    def attention_out(self, stream: Tensor) -> Tensor:
        """The stream's change by attention: [positions, width]."""
        raw = self.attention_raw(stream)
        return raw if self.post_attention_norm is None else self.post_attention_norm.forward(raw)

    def mlp_added(self, raw: Tensor) -> Tensor:
        """The stream's change by an MLP output: [positions, width]."""
        return raw if self.post_mlp_norm is None else self.post_mlp_norm.forward(raw)

    def read_norm(self, reads: Reads) -> FrozenNorm | None:
        """The map from the stream before the MLP's norm to what transcoders read; None is the identity."""
        if reads == "resid_mid" or self.mlp_norm is None:
            return None
        return self.mlp_norm if reads == "mlp_in" else self.mlp_norm.without_gain()

    def write_norm(self, writes: Writes) -> FrozenNorm | None:
        """The map from what transcoders write to what is added to the stream; None is the identity."""
        return self.post_mlp_norm if writes == "mlp_raw" else None


def attention_block(device: torch.device) -> int:
    """The number of attention weights computed at once."""
    return BLOCK if device.type == "cpu" else GPU_BLOCK


def mix(attention: Attention, value: Tensor) -> Tensor:
    """Values mixed by the pattern: out[h, i] = sum over j of A[h, i, j] value[kv of h, j].

    value: [kv_heads, positions, head_width] -> [heads, positions, head_width].
    """
    heads, positions = attention.heads, value.shape[1]
    group = heads // value.shape[0]
    out = value.new_empty(heads, positions, value.shape[2])
    step = max(1, attention_block(value.device) // max(1, heads * positions))
    for begin in range(0, positions, step):
        end = min(begin + step, positions)
        rows = torch.arange(begin, end, device=value.device)
        pattern = attention.pattern_rows(rows, end).unflatten(0, (-1, group))
        out[:, begin:end] = (pattern @ value[:, None, :end]).flatten(0, 1)
    return out


class Head(Protocol):
    """The map from the stream after the final norm to logits.

    unembedding: [vocabulary, width] in the model's own type; unembedding_bias: [vocabulary] or None; final_softcap: 0
    for none.
    """

    @property
    def unembedding(self) -> Tensor: ...
    @property
    def unembedding_bias(self) -> Tensor | None: ...
    @property
    def final_softcap(self) -> float: ...


@without_autocast()
def unembed(head: Head, normed: Tensor) -> Tensor:
    """Logits before any softcap: [n, width] -> [n, vocabulary]; half-precision weights widen in blocks."""
    weight = head.unembedding
    out = normed.new_empty(normed.shape[0], weight.shape[0])
    step = weight.shape[0] if weight.dtype == normed.dtype else 16384
    for begin in range(0, weight.shape[0], step):
        out[:, begin : begin + step] = normed @ weight[begin : begin + step].to(normed.dtype).T
    return out if head.unembedding_bias is None else out.add_(head.unembedding_bias)


def capped_logits(head: Head, normed: Tensor) -> Tensor:
    """Logits, softcap included: [n, width], the stream after the final norm -> [n, vocabulary]."""
    out = unembed(head, normed)
    return head.final_softcap * torch.tanh(out / head.final_softcap) if head.final_softcap else out


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """The model frozen on one prompt: everything that is added to the stream sums up to `final_stream`.

    tokens: [positions] ids; embeddings: [positions, width], as they enter layer 0 (scaled); position_part:
    [positions, width] of learned position embeddings, or None; final_stream: [positions, width] before
    final_norm; unembedding: [vocabulary, width] in the model's own type; unembedding_bias: [vocabulary] or
    None; unembedding_mean: [width]; final_softcap: 0 for none.
    """

    tokens: Tensor
    embeddings: Tensor
    position_part: Tensor | None
    layers: tuple[FrozenLayer, ...]
    final_stream: Tensor
    final_norm: FrozenNorm
    unembedding: Tensor
    unembedding_bias: Tensor | None
    unembedding_mean: Tensor
    final_softcap: float

    @property
    def positions(self) -> int:
        return self.embeddings.shape[0]

    @property
    def width(self) -> int:
        return self.embeddings.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    def first_stream(self) -> Tensor:
        """The input of layer 0: [positions, width]."""
        return self.embeddings if self.position_part is None else self.embeddings + self.position_part

    def streams(self, mlp_raw: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(layer input, attention's output, stream before the MLP's norm) of each layer, then the end of the stream.

        mlp_raw: [layers, positions, width], each MLP's own output. The last triple holds the final stream thrice.
        """
        stream = self.first_stream()
        for layer, raw in zip(self.layers, mlp_raw, strict=True):
            attended = layer.attention_out(stream)
            yield stream, attended, stream if layer.parallel else stream + attended
            stream = stream + attended + layer.mlp_added(raw)
        yield stream, stream, stream

    def unembed(self, normed: Tensor) -> Tensor:
        """Logits before any softcap: [n, width] -> [n, vocabulary]."""
        return unembed(self, normed)

    def logits(self, positions: Tensor | slice = slice(None)) -> Tensor:
        """The model's logits, softcap included: [n, vocabulary] at these positions."""
        return capped_logits(self, self.final_norm.forward(self.final_stream)[positions])
