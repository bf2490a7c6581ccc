"""Hooks on the two places of each layer that transcoders read and write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pycircuit.transcoders.types import Reads, Writes

from .attention_choice import use_attention
from .families import Family
from .forward_lock import forward_lock
from .frozen import FrozenNorm
from .hooks import Hooks, require_calls, stream_into, stream_out
from .linear_layers import fast_linear_layers
from .weights import NORMS, LayerWeights, ModelWeights, Norm, submodule

Read = Callable[[int, Tensor], None]
Write = Callable[[int, Tensor], Tensor | None]
FrozenNorms = Mapping[tuple[int, str], FrozenNorm]  # by layer and the family's name of it; the final norm's layer is -1
Site = tuple[str, int]  # what is read or written, as `transcoders.reads` and `.writes` say it, and the layer


@contextmanager
def transcoder_hooks(
    model: Any,
    family: Family,
    weights: ModelWeights,
    reads: Reads,
    writes: Writes,
    read: Read,
    write: Write,
    frozen_norms: FrozenNorms | None = None,
    first_layer: int = 0,
) -> Iterator[None]:
    """Call `read(layer, x)` and then `write(layer, y)` in every layer of a forward in this thread.

    x, y: [prompts, positions, width] in the weights' type. What `write` returns, unless None, takes y's place.
    frozen_norms: norms that keep the denominators of one prompt, whatever passes through them; with a mapping, though
    empty, every norm of a float64 model is ours: transformers' go through float32. first_layer: the first that runs.
    """
    called: set[Site] = set()
    with forward_lock(model), fast_linear_layers(weights.device), Hooks() as hooks, torch.no_grad():
        if frozen_norms is not None:
            _replace_norms(hooks, model, family, weights, frozen_norms)
        for i, layer in enumerate(submodule(model, family.layers, family).children()):
            norm = (frozen_norms or {}).get((i, "mlp_norm"))
            owner, convert = _reader(layer, weights.layers[i], family, reads, weights.dtype, norm)
            hooks.before(owner, _reading((reads, i), convert, read, called))
            path = family.post_mlp_norm or family.mlp if writes == "mlp_out" else family.mlp
            hooks.after(submodule(layer, path, family), _writing((writes, i), weights.dtype, write, called))
        yield
    layers = range(first_layer, len(weights.layers))
    require_calls(family, {reads: layers, writes: layers}, called)


@contextmanager
def eager_transcoder_hooks(
    model: Any, family: Family, weights: ModelWeights, reads: Reads, writes: Writes, read: Read, write: Write
) -> Iterator[None]:
    """`transcoder_hooks` on the model as it is: nothing frozen, attention as its family means it."""
    with transcoder_hooks(model, family, weights, reads, writes, read, write), use_attention(model, "eager"):
        yield


def read_batch(model: Any, family: Family, weights: ModelWeights, ids: Tensor, reads: Reads) -> Tensor:
    """Run prompts and return what transcoders read: ids [prompts, positions] -> [layers, prompts, positions, width].

    Prompts may be padded on the right: what comes later changes nothing in a causal model.
    """
    out = torch.empty(len(weights.layers), *ids.shape, weights.width, dtype=weights.dtype, device=weights.device)
    called: set[Site] = set()
    with forward_lock(model), fast_linear_layers(weights.device), Hooks() as hooks:
        for i, layer in enumerate(submodule(model, family.layers, family).children()):
            owner, convert = _reader(layer, weights.layers[i], family, reads, weights.dtype, None)
            hooks.before(owner, _reading((reads, i), convert, out.__setitem__, called))
        with torch.no_grad(), use_attention(model, "eager"):
            model.base_model(input_ids=ids, use_cache=False)
    require_calls(family, {reads: range(len(weights.layers))}, called)
    return out


def _reader(
    layer: nn.Module,
    weights: LayerWeights,
    family: Family,
    reads: Reads,
    dtype: torch.dtype,
    frozen_norm: FrozenNorm | None,
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The module whose input transcoders read, and the map from that input to what they read."""
    norm = weights.mlp_norm if reads == "mlp_normed" else None

    def convert(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return x if norm is None else _normed(norm, frozen_norm, x, with_gain=False)

    path = family.mlp if reads == "mlp_in" or family.mlp_norm is None else family.mlp_norm
    return submodule(layer, path, family), convert


def _normed(norm: Norm, frozen_norm: FrozenNorm | None, x: Tensor, with_gain: bool = True) -> Tensor:
    """x: [prompts, positions, width] through a norm, by the frozen denominators or else by x's own."""
    if frozen_norm is not None:
        return (frozen_norm if with_gain else frozen_norm.without_gain()).forward(x)
    flat = x.flatten(0, -2)
    frozen_norm = norm.freeze(flat)
    return (frozen_norm if with_gain else frozen_norm.without_gain()).forward(flat).view_as(x)


def _reading(
    site: Site, convert: Callable[[Tensor], Tensor], read: Read, called: set[Site]
) -> Callable[[Any, Any], None]:
    def hook(args: Any, kwargs: Any) -> None:
        called.add(site)
        read(site[1], convert(stream_into(args, kwargs)))

    return hook


def _writing(site: Site, dtype: torch.dtype, write: Write, called: set[Site]) -> Callable[[Any, Any, Any], Any]:
    def hook(args: Any, kwargs: Any, out: Any) -> Any:
        called.add(site)
        stream = stream_out(out)
        replacement = write(site[1], stream.to(dtype))
        if replacement is None:
            return None
        replacement = replacement.to(stream.dtype)
        return (replacement, *out[1:]) if isinstance(out, tuple) else replacement

    return hook


def _replace_norms(hooks: Hooks, model: Any, family: Family, weights: ModelWeights, frozen_norms: FrozenNorms) -> None:
    """Put hooks on every norm of the stream that compute its output by the frozen denominators."""
    norms: list[tuple[int, Any, str | None, str, Norm]] = [
        (-1, model, family.final_norm, "final_norm", weights.final_norm)
    ]
    for i, layer in enumerate(submodule(model, family.layers, family).children()):
        norms += [(i, layer, getattr(family, name), name, getattr(weights.layers[i], name)) for name in NORMS]
    for i, root, path, name, norm in norms:
        if path is not None:
            hooks.after(submodule(root, path, family), _norming(norm, frozen_norms.get((i, name))))


def _norming(norm: Norm, frozen_norm: FrozenNorm | None) -> Callable[[Any, Any, Tensor], Tensor | None]:
    def hook(args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        x = stream_into(args, kwargs)
        if frozen_norm is None and x.dtype != torch.float64:
            return None
        return _normed(norm, frozen_norm, x.to(norm.gain.dtype)).to(out.dtype)

    return hook
