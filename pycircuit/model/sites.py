"""Where in a transformers model transcoders read and write, as hooks on the modules its family's row names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import running
from .families import Family
from .frozen import FrozenNorm
from .hooks import Hooks, attention_by, require_calls, stream_into, stream_out
from .weights import NORMS, LayerWeights, ModelWeights, Norm, module

Read = Callable[[int, Tensor], None]
Write = Callable[[int, Tensor], Tensor | None]
Held = Mapping[tuple[int, str], FrozenNorm]  # by layer and the name of the row's entry; the final norm's layer is -1


def _read(
    layer: nn.Module, weights: LayerWeights, row: Family, reads: str, dtype: torch.dtype, held: FrozenNorm | None
) -> Any:
    """(the module whose input is read, what is done to it)."""
    norm = weights.mlp_norm if reads == "mlp_normed" else None

    def shape(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return x if norm is None else _normed(norm, held, x, bare=True)

    path = row.mlp if reads == "mlp_in" or row.mlp_norm is None else row.mlp_norm
    return module(layer, path, row), shape


def _normed(norm: Norm, held: FrozenNorm | None, x: Tensor, bare: bool = False) -> Tensor:
    """x: [prompts, positions, width] through a norm, by the denominators held or else its own; bare: up to the gain."""
    if held is not None:
        return (replace(held, gain=None, bias=None) if bare else held).forward(x)
    flat = x.flatten(0, -2)
    own = norm.freeze(flat)
    return (replace(own, gain=None, bias=None) if bare else own).forward(flat).view_as(x)


@contextmanager
def sites(
    model: Any,
    row: Family,
    weights: ModelWeights,
    reads: str,
    writes: str,
    read: Read,
    write: Write,
    held: Held | None = None,
    first: int = 0,
) -> Iterator[None]:
    """While open, `read(layer, x)` and then `write(layer, y)` are called in every layer of a forward in this thread.

    x, y: [prompts, positions, width] in the weights' type. What `write` returns, if anything, takes y's place.
    held: norms that keep the denominators of one prompt, whatever passes through them; with a mapping, though empty,
    every norm of a float64 model is ours: transformers' go through float32. first: the first layer that runs.
    """
    seen: set[tuple[str, int]] = set()
    with running(model), Hooks() as hooks, torch.no_grad():
        if held is not None:
            _hold_norms(hooks, model, row, weights, held)
        for index, layer in enumerate(module(model, row.layers, row).children()):
            norm = (held or {}).get((index, "mlp_norm"))
            owner, shape = _read(layer, weights.layers[index], row, reads, weights.dtype, norm)
            hooks.before(owner, _reader((reads, index), shape, read, seen))
            path = row.post_mlp_norm or row.mlp if writes == "mlp_out" else row.mlp
            hooks.after(module(layer, path, row), _writer((writes, index), weights.dtype, write, seen))
        yield
    layers = range(first, len(weights.layers))
    require_calls(row, {reads: layers, writes: layers}, seen)


def _reader(
    site: tuple[str, int], shape: Callable[[Tensor], Tensor], read: Read, seen: set[tuple[str, int]]
) -> Callable[[Any, Any], None]:
    def act(args: Any, kwargs: Any) -> None:
        seen.add(site)
        read(site[1], shape(stream_into(args, kwargs)))

    return act


def _writer(
    site: tuple[str, int], dtype: torch.dtype, write: Write, seen: set[tuple[str, int]]
) -> Callable[[Any, Any, Any], Any]:
    def act(args: Any, kwargs: Any, out: Any) -> Any:
        seen.add(site)
        first = stream_out(out)
        fresh = write(site[1], first.to(dtype))
        if fresh is None:
            return None
        fresh = fresh.to(first.dtype)
        return (fresh, *out[1:]) if isinstance(out, tuple) else fresh

    return act


@contextmanager
def hooked(
    model: Any, row: Family, weights: ModelWeights, reads: str, writes: str, read: Read, write: Write
) -> Iterator[None]:
    """`sites` on the model as it is: nothing held, attention as its family means it."""
    with sites(model, row, weights, reads, writes, read, write), attention_by(model, "eager"):
        yield


def _hold_norms(hooks: Hooks, model: Any, row: Family, weights: ModelWeights, held: Held) -> None:
    """Hooks on every norm of the stream that put what is held in place."""
    norms: list[Any] = [(-1, model, row.final_norm, "final_norm", weights.final_norm)]
    for i, layer in enumerate(module(model, row.layers, row).children()):
        norms += [(i, layer, getattr(row, name), name, getattr(weights.layers[i], name)) for name in NORMS]
    for i, root, path, name, norm in norms:
        if path is not None:
            hooks.after(module(root, path, row), _holder(norm, held.get((i, name))))


def _holder(norm: Norm, held: FrozenNorm | None) -> Callable[[Any, Any, Tensor], Tensor | None]:
    def act(args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        x = stream_into(args, kwargs)
        if held is None and x.dtype != torch.float64:
            return None
        return _normed(norm, held, x.to(norm.gain.dtype)).to(out.dtype)

    return act
