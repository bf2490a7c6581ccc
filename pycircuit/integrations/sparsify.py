"""sparsify's SparseCoder on our operations, as a transcoder or an autoencoder, with a skip or without.

    with sparsify.accelerate(coder):  # or handle = accelerate(coder) ... handle.undo()
        out = coder(x, y)

Results and gradients are those of sparsify, up to the order of sums and of a token's latents, which it leaves open; a
token's latents ascend. `pre_acts` are made when somebody looks at them; weights changed through `.data` in between are
not noticed. Under autocast sums stay in the weights' type. NaN is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.ops import TopK
from pycircuit.training import sparse
from pycircuit.training.sparse import Entries

from .handle import Accelerated, rows_together


def accelerate(coder: Any) -> Accelerated:
    """Its encode and decode, and with them its forward, run ours, in place, until `undo()` or a `with` ends."""
    _check("accelerate", coder)
    return Accelerated(coder, {"encode": encode, "decode": decode})


def encode(coder: Any, x: Tensor) -> Any:
    """What `coder.encode(x)` returns: its EncoderOutput of top_acts, top_indices [..., k] and pre_acts. x: [..., d_in].

    Where fewer than k latents are positive the rest are the least negative ones, with zeros. As in sparsify gradients
    reach those too, and none comes through pre_acts.
    """
    theirs = _check("encode", coder)
    x = x if coder.cfg.transcode else x - coder.b_dec
    weight, bias, k = coder.encoder.weight, coder.encoder.bias, coder.cfg.k
    if not 1 <= k <= len(weight):
        raise ValueError(f"encode: cfg.k must be from 1 to the {len(weight)} latents, got {k}")
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    rows, ends = rows_together(weight), bias.contiguous()
    with torch.no_grad():
        entries = Entries.of(ops.encode(flat, rows, ends, TopK(k, keep_negative=True)), len(weight))
    values = sparse.values(flat, rows, ends, entries)
    values = values + (values.clamp_min(0.0) - values).detach()  # zero, and yet with their gradient
    shape = (*x.shape[:-1], k)
    pre = _Later.of(x.detach(), weight.detach(), bias.detach())
    index = entries.index.clone()  # the gradients need theirs as it is
    return theirs.EncoderOutput(values.to(weight.dtype).view(shape), index.view(shape), pre)


def decode(coder: Any, top_acts: Tensor, top_indices: Tensor) -> Tensor:
    """What `coder.decode(top_acts, top_indices)` returns: [..., d_in]. Both: [..., k], latents in any order."""
    _check("decode", coder)
    if coder.W_dec is None:
        raise ValueError("decode: coder must have a decoder, got W_dec=None; load it with decoder=True")
    if top_acts.shape != top_indices.shape or top_acts.ndim == 0:
        got = f"{list(top_acts.shape)} and {list(top_indices.shape)}"
        raise ValueError(f"decode: top_acts and top_indices must have one shape [..., k], got {got}")
    shape, dtype = top_acts.shape, coder.W_dec.dtype
    ends = torch.arange(shape[:-1].numel() + 1, device=top_acts.device) * shape[-1]
    value = top_acts.to(dtype).reshape(-1)
    value = value if dtype == torch.float64 else value.float()
    index = top_indices.detach().long().reshape(-1)
    index = index.clone() if index.data_ptr() == top_indices.data_ptr() else index  # theirs may change before backward
    entries = Entries(ends, index, value.detach(), len(coder.W_dec))
    written = sparse.decode(value, rows_together(coder.W_dec)[None], entries)[0]
    return (written + coder.b_dec).to(dtype).view(*shape[:-1], written.shape[-1])


def _check(op: str, coder: Any) -> Any:
    """sparsify's module of sparse coders."""
    try:
        theirs = import_module("sparsify.sparse_coder")
    except ImportError as error:
        raise ImportError(f"{op}: eai-sparsify must be installed, got {error}; pip install eai-sparsify") from None
    if type(coder) is not theirs.SparseCoder:
        raise TypeError(f"{op}: coder must be sparsify's SparseCoder, got {type(coder).__name__}")
    if coder.cfg.activation != "topk":
        raise ValueError(f"{op}: cfg.activation must be topk, got {coder.cfg.activation!r}, which pycircuit lacks")
    return theirs


class _Later(Tensor):
    """relu(x @ weight.T + bias), made when something is done with it."""

    _parts: tuple[Tensor, Tensor, Tensor]
    _versions: list[int]
    _made: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor) -> _Later:
        later = torch.empty(0, device="meta").as_subclass(cls)
        later._parts = (x, weight, bias)
        later._versions = _versions(later._parts)
        return later

    def _now(self) -> Tensor:
        if self._made is None:
            if self._versions != _versions(self._parts):
                raise ValueError("encode: pre_acts must be looked at before x or the weights change, got a change")
            self._made = torch.relu(torch.nn.functional.linear(*self._parts))
        return self._made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*_now(args), **_now(kwargs or {}))


def _versions(parts: Sequence[Tensor]) -> list[int]:
    """How often each was written to; in inference mode nobody counts."""
    return [0 if t.is_inference() else t._version for t in parts]


def _now(value: Any) -> Any:
    """The same with every tensor made, however deep it lies."""
    if isinstance(value, _Later):
        return value._now()
    if isinstance(value, dict):
        return {key: _now(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_now(inner) for inner in value)
    return value
