"""The constant part of a frozen model: what attention and MLPs add to its stream where no source is active."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pycircuit.model.replacement import LocalReplacement


def constant_parts(local: LocalReplacement) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return what attention and what replaced MLPs add by their biases, a layer each: [positions, width], or None."""
    layers = range(len(local.model.layers))
    parts = _nonzero([_of_attention(local, i) for i in layers] + [_of_mlp(local, i) for i in layers])
    return parts[: len(layers)], parts[len(layers) :]


def _of_attention(local: LocalReplacement, layer: int) -> Tensor | None:
    """Return attention's output for an empty stream; None without biases."""
    block = local.model.layers[layer]
    norms = (block.attention_norm, block.post_attention_norm)
    biases = [block.b_v, block.b_o, *(n.bias for n in norms if n is not None)]
    if all(b is None for b in biases):
        return None
    return block.attention_out(torch.zeros_like(local.model.embeddings))


def _of_mlp(local: LocalReplacement, layer: int) -> Tensor | None:
    """Return the replaced MLP's output without features and errors; None without biases."""
    block, transcoders = local.model.layers[layer], local.transcoders
    norm, write = block.read_norm(transcoders.reads), block.write_norm(transcoders.writes)
    bias, skip = transcoders.bias(layer), transcoders.w_skip[layer]
    if bias is None and (skip is None or norm is None) and (write is None or write.bias is None):
        return None
    out = torch.zeros_like(local.model.embeddings)
    if bias is not None:
        out[local.ignore_positions :] += bias.to(out.dtype)
    if skip is not None and norm is not None:
        out += norm.forward(torch.zeros_like(out)) @ skip.to(out.dtype)
    return out if write is None else write.forward(out)


def _nonzero(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace tensors of zeros by None; the host waits for a GPU once."""
    flags = [t.any() for t in tensors if t is not None]
    nonzero = iter(torch.stack(flags).tolist() if flags else [])
    return [t if t is not None and next(nonzero) else None for t in tensors]
