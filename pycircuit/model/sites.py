"""Where in a transformers model transcoders read and write, as hooks on the modules its family's row names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .capture import attention_by, running
from .families import Family
from .frozen import FrozenNorm
from .weights import LayerWeights, ModelWeights, Norm, module

Read = Callable[[int, Tensor], None]
Write = Callable[[int, Tensor], Tensor | None]
Held = Mapping[tuple[int, str], FrozenNorm]  # by layer and the name of the row's entry; the final norm's layer is -1
NORMS = ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")


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
) -> Iterator[None]:
    """While open, `read(layer, x)` and then `write(layer, y)` are called in every layer of a forward.

    x, y: [prompts, positions, width] in the weights' type. What `write` returns, if anything, takes y's place.
    held: norms that keep the denominators of one prompt, whatever passes through them; with a mapping, though empty,
    every norm of a float64 model is ours: transformers' go through float32.
    """
    with running(model):
        yield from _hooked(model, row, weights, reads, writes, read, write, held)


def _hooked(
    model: Any, row: Family, weights: ModelWeights, reads: str, writes: str, read: Read, write: Write, held: Held | None
) -> Iterator[None]:
    held, handles = held or {}, [] if held is None else _norms(model, row, weights, held)
    for at, layer in enumerate(module(model, row.layers, row).children()):
        of, shape = _read(layer, weights.layers[at], row, reads, weights.dtype, held.get((at, "mlp_norm")))

        def before(_: nn.Module, args: Any, kwargs: Any, at: int = at, shape: Any = shape) -> None:
            read(at, shape(args[0] if args else kwargs["hidden_states"]))

        def after(_: nn.Module, args: Any, kwargs: Any, out: Any, at: int = at) -> Any:
            first = out[0] if isinstance(out, tuple) else out
            fresh = write(at, first.to(weights.dtype))
            if fresh is None:
                return None
            fresh = fresh.to(first.dtype)
            return (fresh, *out[1:]) if isinstance(out, tuple) else fresh

        path = row.post_mlp_norm or row.mlp if writes == "mlp_out" else row.mlp
        handles.append(of.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module(layer, path, row).register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked(
    model: Any, row: Family, weights: ModelWeights, reads: str, writes: str, read: Read, write: Write
) -> Iterator[None]:
    """`sites` on the model as it is: nothing held, attention as its family means it."""
    with sites(model, row, weights, reads, writes, read, write), attention_by(model, "eager"):
        yield


def _norms(model: Any, row: Family, weights: ModelWeights, held: Held) -> list[Any]:
    """Hooks on every norm of the stream that put what is held in place."""
    found: list[Any] = [(-1, model, row.final_norm, "final_norm", weights.final_norm)]
    for at, layer in enumerate(module(model, row.layers, row).children()):
        found += [(at, layer, getattr(row, name), name, getattr(weights.layers[at], name)) for name in NORMS]
    return [
        module(root, path, row).register_forward_hook(_holder(norm, held.get((at, name))), with_kwargs=True)
        for at, root, path, name, norm in found
        if path is not None
    ]


def _holder(norm: Norm, held: FrozenNorm | None) -> Callable[..., Tensor | None]:
    def act(_: nn.Module, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
        x = args[0] if args else kwargs["hidden_states"]
        if held is None and x.dtype != torch.float64:
            return None
        return _normed(norm, held, x.to(norm.gain.dtype)).to(out.dtype)

    return act
