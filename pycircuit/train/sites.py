"""Where in a transformers model transcoders read and write, as hooks on the modules its family's row names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pycircuit.model.capture import attention_by
from pycircuit.model.families import Family
from pycircuit.model.weights import LayerWeights, ModelWeights, module

Read = Callable[[int, Tensor], None]
Write = Callable[[int, Tensor], Tensor | None]


def _read(layer: nn.Module, weights: LayerWeights, row: Family, reads: str, dtype: torch.dtype) -> Any:
    """(the module whose input is read, what is done to it)."""
    norm = weights.mlp_norm if reads == "mlp_normed" else None

    def shape(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if norm is None:
            return x
        flat = x.flatten(0, -2)
        return replace(norm.freeze(flat), gain=None, bias=None).forward(flat).view_as(x)

    path = row.mlp if reads == "mlp_in" or row.mlp_norm is None else row.mlp_norm
    return module(layer, path, row), shape


@contextmanager
def hooked(
    model: Any, row: Family, weights: ModelWeights, reads: str, writes: str, read: Read, write: Write
) -> Iterator[None]:
    """While open, `read(layer, x)` and then `write(layer, y)` are called in every layer of a forward.

    x, y: [prompts, positions, width] in the weights' type. What `write` returns, if anything, takes y's place.
    """
    handles = []
    for at, layer in enumerate(module(model, row.layers, row).children()):
        of, shape = _read(layer, weights.layers[at], row, reads, weights.dtype)

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
        with torch.no_grad(), attention_by(model, "eager"):
            yield
    finally:
        for handle in handles:
            handle.remove()
