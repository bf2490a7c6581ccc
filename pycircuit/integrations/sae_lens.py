"""SAELens transcoders on our operations: its Transcoder, SkipTranscoder and their JumpReLU forms.

    with sae_lens.accelerate(transcoder):  # or handle = accelerate(transcoder) ... handle.undo()
        written = transcoder(x)

Results and gradients are those of SAELens, up to the order of sums; the positions x features matrix is made only by
what returns it. NaN is an error, and so is a hook on pre-activations, which nobody makes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycircuit import ops
from pycircuit.ops import Features, JumpReLU, ReLU
from pycircuit.train import sparse
from pycircuit.train.sparse import Entries

from .handle import Accelerated

KINDS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")


def accelerate(transcoder: Any) -> Accelerated:
    """Its encode, decode, forward and forward_with_activations run ours, in place, until `undo()` or a `with` ends.

    The encoder lies feature by feature in the meantime, the same parameter with the same values; what state_dict gives
    lies as ever.
    """
    _check("accelerate", transcoder)
    methods = (encode, decode, forward, forward_with_activations)
    held: list[Any] = []

    def restore() -> None:
        held.pop().remove()
        transcoder.W_enc.data = transcoder.W_enc.data.contiguous()

    handle = Accelerated(transcoder, {f.__name__: f for f in methods}, restore)
    held.append(transcoder.register_state_dict_post_hook(_as_ever))
    transcoder.W_enc.data = transcoder.W_enc.data.T.contiguous().T
    return handle


def _as_ever(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Files of tensors want each in one piece."""
    state[f"{prefix}W_enc"] = state[f"{prefix}W_enc"].contiguous()


def encode(transcoder: Any, x: Tensor) -> Tensor:
    """What `transcoder.encode(x)` returns: [..., features]. x: [..., d_in]."""
    _check("encode", transcoder)
    entries, values, shape = _found(transcoder, x)
    dense = Features(entries.row_ptr, entries.index, values).dense(entries.size).to(transcoder.W_enc.dtype)
    acts: Tensor = transcoder.hook_sae_acts_post(dense.view(*shape, entries.size))
    return acts


def decode(transcoder: Any, feature_acts: Tensor) -> Tensor:
    """What `transcoder.decode(feature_acts)` returns: [..., d_out]. feature_acts: [..., features], mostly zeros.

    Its gradient is that of every entry, those that are zero included.
    """
    _check("decode", transcoder)
    w_dec = transcoder.W_dec
    if feature_acts.shape[-1:] != w_dec.shape[:1]:
        rule = f"end with the {len(w_dec)} features of W_dec"
        raise ValueError(f"decode: feature_acts must {rule}, got shape {list(feature_acts.shape)}")
    flat = _DecodeDense.apply(feature_acts.reshape(-1, len(w_dec)), w_dec)
    return _finished(transcoder, flat, tuple(feature_acts.shape[:-1]))


def forward(transcoder: Any, x: Tensor) -> Tensor:
    """What `transcoder(x)` returns: [..., d_out]. The activations are made only for a hook that looks at them."""
    _check("forward", transcoder)
    if _hooked(transcoder.hook_sae_acts_post):
        return forward_with_activations(transcoder, x)[0]
    entries, values, shape = _found(transcoder, x)
    written = sparse.decode(values, transcoder.W_dec[None], entries)[0]
    return _with_skip(transcoder, x, _finished(transcoder, written, shape))


def forward_with_activations(transcoder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `transcoder.forward_with_activations(x)` returns: [..., d_out] and [..., features]."""
    acts = encode(transcoder, x)
    return _with_skip(transcoder, x, decode(transcoder, acts)), acts


def _check(op: str, transcoder: Any) -> None:
    try:
        theirs = import_module("sae_lens.saes.transcoder")
    except ImportError as error:
        raise ImportError(f"{op}: sae-lens must be installed, got {error}; pip install sae-lens") from None
    if type(transcoder) not in [getattr(theirs, name) for name in KINDS]:
        known, got = ", ".join(KINDS), type(transcoder).__name__
        raise TypeError(f"{op}: transcoder must be one of SAELens's {known}, got {got}")
    if type(transcoder.activation_fn) is not torch.nn.ReLU:
        got = type(transcoder.activation_fn).__name__
        raise ValueError(f"{op}: transcoder.activation_fn must be the ReLU that SAELens gives it, got {got}")


def _hooked(point: Any) -> bool:
    return bool(point._forward_pre_hooks or point._forward_hooks or point._backward_pre_hooks or point._backward_hooks)


def _found(transcoder: Any, x: Tensor) -> tuple[Entries, Tensor, tuple[int, ...]]:
    """(active entries, their values with gradients: [n], the shape before features)."""
    if _hooked(transcoder.hook_sae_acts_pre):
        raise ValueError(
            "encode: hook_sae_acts_pre must have no hook, got one, and pre-activations are never made; "
            "remove it, or undo() the acceleration"
        )
    x = transcoder.process_sae_in(x)
    flat, w_enc, b_enc = x.reshape(-1, x.shape[-1]).contiguous(), transcoder.W_enc.T, transcoder.b_enc
    w_enc = w_enc if w_enc.stride(-1) == 1 else w_enc.contiguous()
    rule: ReLU | JumpReLU = ReLU()
    if "threshold" in transcoder._parameters:
        rule = JumpReLU(transcoder.threshold.detach().clamp_min(0.0))  # theirs comes after a ReLU
    with torch.no_grad():
        entries = Entries.of(ops.encode(flat, w_enc, b_enc, rule), len(w_enc))
    return entries, sparse.values(flat, w_enc, b_enc, entries), tuple(x.shape[:-1])


def _finished(transcoder: Any, written: Tensor, shape: tuple[int, ...]) -> Tensor:
    """written: [positions, d_out]; with the bias, in their type and shape."""
    out = (written + transcoder.b_dec).to(transcoder.W_dec.dtype).view(*shape, -1)
    seen: Tensor = transcoder.hook_sae_recons(out)
    return seen


def _with_skip(transcoder: Any, x: Tensor, written: Tensor) -> Tensor:
    if "W_skip" not in transcoder._parameters:
        return written
    skip: Tensor = x @ transcoder.W_skip.T.to(x.device)
    return written + skip


class _DecodeDense(torch.autograd.Function):
    """acts [positions, features] @ w_dec [features, width] over the entries that are not zero."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, w_dec: Tensor) -> Tensor:
        entries = _entries(acts)
        ctx.entries = entries
        ctx.save_for_backward(w_dec)
        return ops.decode(entries.at_positions(entries.pre), w_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (w_dec,), entries, grad = ctx.saved_tensors, ctx.entries, grads[0].contiguous()
        grad_acts = grad.to(w_dec.dtype) @ w_dec.T if ctx.needs_input_grad[0] else None
        grad_w = ops.decode(entries.at_features(entries.pre), grad) if ctx.needs_input_grad[1] else None
        return grad_acts, grad_w


def _entries(acts: Tensor) -> Entries:
    position, index = acts.nonzero(as_tuple=True)
    row_ptr = position.new_zeros(len(acts) + 1)
    row_ptr[1:] = torch.bincount(position, minlength=len(acts)).cumsum(0)
    value = acts[position, index]
    return Entries(row_ptr, index, value if value.dtype == torch.float64 else value.float(), acts.shape[1])
