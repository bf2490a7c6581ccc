"""SAELens's transcoders and sparse autoencoders on pycircuit's operations.

    with sae_lens.accelerate(sae):  # or handle = accelerate(sae) ... handle.undo()
        written = sae(x)

Supported are the classes of KINDS: transcoders (ReLU or JumpReLU, with or without a skip connection) and the
autoencoders StandardSAE, JumpReLUSAE and TopKSAE.

Results and gradients are those of SAELens, up to the order of sums. Only functions that return the positions x
features matrix and hooks that read it make it; with a hook on pre-activations SAELens's own encoder runs. Under
autocast sums stay in the weights' dtype. NaN is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycircuit import ops
from pycircuit.ops import Activation, JumpReLU, ReLU, SparseFeatures, TopK
from pycircuit.training import sparse
from pycircuit.training.sparse import Entries

from .handle import Accelerated, rows_together

TRANSCODERS = ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder")
KINDS = (*TRANSCODERS, "StandardSAE", "JumpReLUSAE", "TopKSAE")


def accelerate(sae: Any) -> Accelerated:
    """Replace encode, decode, forward and forward_with_activations of an SAE, until `undo()` or the end of a `with`.

    sae: a transcoder or a sparse autoencoder of one of KINDS. A frozen encoder (`requires_grad_(False)`) is stored
    feature by feature meanwhile, as the same parameter with the same values. A trained encoder keeps its layout, as
    its optimizer's state does, and is copied at every call.
    """
    _check("accelerate", sae)
    methods: list[Callable[..., Any]] = [encode, decode, forward, process_state_dict_for_saving]
    if _is_transcoder(sae):
        methods.append(forward_with_activations)
    w_enc = sae.W_enc
    feature_major = None if w_enc.requires_grad or w_enc.is_inference() else w_enc.data.T.contiguous().T
    was_contiguous = w_enc.is_contiguous()

    def restore() -> None:
        if feature_major is not None and was_contiguous:
            sae.W_enc.data = sae.W_enc.data.contiguous()

    handle = Accelerated(sae, {f.__name__: f for f in methods}, restore)
    if feature_major is not None:
        w_enc.data = feature_major
    return handle


def process_state_dict_for_saving(sae: Any, state_dict: dict[str, Any]) -> None:
    """Make every tensor contiguous, as files of tensors need it."""
    type(sae).process_state_dict_for_saving(sae, state_dict)
    state_dict.update({name: t.contiguous() for name, t in state_dict.items()})


def encode(sae: Any, x: Tensor) -> Tensor:
    """Result of `sae.encode(x)`: [..., features]. x: [..., d_in]."""
    _check("encode", sae)
    if not _is_idle(sae.hook_sae_acts_pre):
        original: Tensor = type(sae).encode(sae, x)
        return original
    entries, values, shape = _active(sae, x)
    dense = SparseFeatures(entries.row_ptr, entries.index, values).dense(entries.size).to(sae.W_enc.dtype)
    acts: Tensor = sae.hook_sae_acts_post(dense.view(*shape, entries.size))
    return acts


def decode(sae: Any, feature_acts: Tensor) -> Tensor:
    """Result of `sae.decode(feature_acts)`: [..., d_out]. feature_acts: [..., features], mostly zeros.

    Its gradient is that of every entry, those that are zero included.
    """
    _check("decode", sae)
    w_dec = _decoder(sae)
    if feature_acts.shape[-1:] != w_dec.shape[:1]:
        rule = f"end with the {len(w_dec)} features of W_dec"
        raise ValueError(f"decode: feature_acts must {rule}, got shape {list(feature_acts.shape)}")
    flat = _DecodeDense.apply(feature_acts.reshape(-1, len(w_dec)), w_dec)
    return _finish_output(sae, flat, tuple(feature_acts.shape[:-1]))


def forward(sae: Any, x: Tensor) -> Tensor:
    """Result of `sae(x)`: [..., d_out]. The activations are made only for a hook that reads them."""
    _check("forward", sae)
    if getattr(sae, "use_error_term", False) and not _is_transcoder(sae):
        original: Tensor = type(sae).forward(sae, x)  # encodes and decodes twice, with hooks and without
        return original
    if _is_idle(sae.hook_sae_acts_pre) and _is_idle(sae.hook_sae_acts_post):
        entries, values, shape = _active(sae, x)
        written = _finish_output(sae, sparse.decode(values, _decoder(sae)[None], entries)[0], shape)
    else:
        written = decode(sae, encode(sae, x))
    if _is_transcoder(sae):
        return _with_skip(sae, x, written)
    out: Tensor = sae.hook_sae_output(written)
    return out


def forward_with_activations(transcoder: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Result of `transcoder.forward_with_activations(x)`: [..., d_out] and [..., features]."""
    acts = encode(transcoder, x)
    return _with_skip(transcoder, x, decode(transcoder, acts)), acts


def _check(op: str, sae: Any) -> None:
    try:
        sae_classes = import_module("sae_lens.saes")
    except ImportError as error:
        raise ImportError(f"{op}: sae-lens must be installed, got {error}; pip install sae-lens") from None
    if type(sae) not in [getattr(sae_classes, name) for name in KINDS]:
        known, got = ", ".join(KINDS), type(sae).__name__
        raise TypeError(f"{op}: sae must be one of SAELens's {known}, got {got}; others run as SAELens has them")
    activation = sae.activation_fn
    expected = import_module("sae_lens.saes.topk_sae").TopK if type(sae) is sae_classes.TopKSAE else torch.nn.ReLU
    if type(activation) is not expected or _hooked(activation) or getattr(activation, "use_sparse_activations", False):
        name = expected.__name__
        got = f"{name} with a hook or sparse tensors" if type(activation) is expected else type(activation).__name__
        raise ValueError(f"{op}: sae.activation_fn must be the {name} that SAELens gives it, got {got}")


def _is_transcoder(sae: Any) -> bool:
    return type(sae).__name__ in TRANSCODERS


def _hooked(point: Any) -> bool:
    return bool(point._forward_pre_hooks or point._forward_hooks or point._backward_pre_hooks or point._backward_hooks)


def _is_idle(point: Any) -> bool:
    """True if a hook point changes and reads nothing: SAELens disables a hook point by an Identity, users by others."""
    return type(point).__name__ in ("HookPoint", "Identity") and not _hooked(point)


def _activation(sae: Any) -> Activation:
    if hasattr(sae.activation_fn, "k"):
        return TopK(sae.activation_fn.k)
    threshold = getattr(sae, "threshold", None)
    return ReLU() if threshold is None else JumpReLU(threshold.detach().clamp_min(0.0))  # SAELens applies a ReLU first


def _active(sae: Any, x: Tensor) -> tuple[Entries, Tensor, tuple[int, ...]]:
    """(active entries, their values with gradients: [n], the leading dimensions of x)."""
    x = sae.process_sae_in(x)
    flat, b_enc = x.reshape(-1, x.shape[-1]).contiguous(), sae.b_enc.contiguous()
    w_enc = rows_together(sae.W_enc.T)
    if _scales_by_decoder_norm(sae):
        norm = _at_least_float32(sae.W_dec).norm(dim=-1)
        flat, w_enc, b_enc = (
            _at_least_float32(flat),
            _at_least_float32(w_enc) * norm[:, None],
            _at_least_float32(b_enc) * norm,
        )
    with torch.no_grad():
        entries = Entries.of(ops.encode(flat, w_enc, b_enc, _activation(sae)), len(w_enc))
    return entries, sparse.values(flat, w_enc, b_enc, entries), tuple(x.shape[:-1])


def _scales_by_decoder_norm(sae: Any) -> bool:
    """True if activations are multiplied by the norms of decoder rows."""
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _decoder(sae: Any) -> Tensor:
    """Decoder rows that match the scale of activations: [features, d_out]."""
    w_dec = rows_together(sae.W_dec)
    return torch.nn.functional.normalize(_at_least_float32(w_dec), dim=-1) if _scales_by_decoder_norm(sae) else w_dec


def _finish_output(sae: Any, written: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Add the bias to written, [positions, d_out], and restore SAELens's dtype, scale and shape."""
    out = (written + sae.b_dec).to(sae.W_dec.dtype).view(*shape, written.shape[-1])
    recons: Tensor = sae.hook_sae_recons(out)
    if not _is_transcoder(sae):
        recons = sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(recons), sae.d_head)
    return recons


def _with_skip(transcoder: Any, x: Tensor, written: Tensor) -> Tensor:
    w_skip = getattr(transcoder, "W_skip", None)
    if w_skip is None:
        return written
    skip: Tensor = x @ w_skip.T.to(x.device)
    return written + skip


class _DecodeDense(torch.autograd.Function):
    """Product acts [positions, features] @ w_dec [features, width] over the nonzero entries."""

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
