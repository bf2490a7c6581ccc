"""Replacement models of circuit-tracer's TransformerLens backend, frozen on one prompt by way of their hook points.

TransformerLens has weights of its own, folded and reshaped by its settings, and a hook point for everything a frozen
model needs: one forward records patterns, denominators and streams, so model families need no code of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pycircuit.model.agreement import disagreement, relative_error
from pycircuit.model.capture import Captured
from pycircuit.model.causal_attention import attend
from pycircuit.model.families import FamilyError
from pycircuit.model.frozen import FrozenLayer, FrozenModel, FrozenNorm
from pycircuit.model.hooks import Hooks
from pycircuit.model.replacement import PATTERN_BYTES, LocalReplacement
from pycircuit.model.weights import Norm, output_back, value_back
from pycircuit.ops import RecomputedAttention, StoredAttention

from .probe_cache import probe_once, wiring
from .transcoder_weights import ignored, own_features, transcoders_of, without_zeros

NORMS = {"attention_norm": "ln1", "post_attention_norm": "ln1_post", "mlp_norm": "ln2", "post_mlp_norm": "ln2_post"}
CHECKED = {
    "resid_in": "hook_resid_pre", "attention_out": "hook_attn_out", "mlp_in": "mlp.hook_in",
    "mlp_raw": "mlp.hook_out", "mlp_out": "hook_mlp_out",
}  # fmt: skip
_TOLERANCE = {torch.float64: (1e-9, 1e-9), torch.float32: (1e-4, 1e-3)}  # parts, logits
_NOT_HALF = (torch.float32, torch.float64)
_TOLERANCE_HALF = (0.05, 0.25)


@dataclass(frozen=True, eq=False)
class LensWeights:
    """Weights of the model in the form of a frozen model: of each layer its projections, and its norms by name."""

    layers: tuple[tuple[dict[str, Any], dict[str, Norm]], ...]
    final_norm: Norm
    unembedding: Tensor
    unembedding_bias: Tensor | None
    unembedding_mean: Tensor
    dtype: torch.dtype
    device: torch.device

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        return self.unembedding.shape[1]


@dataclass(eq=False)
class _Recorder:
    """Recorder of one forward's tensors, by hooks for its thread alone that TransformerLens does not know of."""

    lens: LensWeights
    streams: dict[str, Tensor]
    recorded: dict[str, Tensor] = field(default_factory=dict)
    written: set[tuple[str, int]] = field(default_factory=set)

    def record(self, hooks: Hooks, model: Any, name: str) -> None:
        """Record the output of a hook point."""

        def hook(args: Any, kwargs: Any, out: Tensor) -> None:
            self.recorded[name] = out.detach()[0].to(self.lens.dtype)

        hooks.after(model.hook_dict[name], hook)

    def stream(self, hooks: Hooks, model: Any, name: str, layer: int, hook_name: str) -> None:
        """Record the output of a hook point as a layer of a stream."""

        def hook(args: Any, kwargs: Any, out: Tensor) -> None:
            self.streams[name][layer] = out.detach()[0]
            self.written.add((name, layer))

        hooks.after(model.hook_dict[f"blocks.{layer}.{hook_name}"], hook)

    def require(self, names: list[str]) -> None:
        """Raise if a hook point did not run."""
        missing = {name for name in names if name not in self.recorded}
        missing |= {name for name in self.streams for i in range(self.lens.depth) if (name, i) not in self.written}
        if missing:
            raise FamilyError(
                f"attribute: model must run through its hook points, got nothing at {', '.join(sorted(missing))}; put "
                "back the modules that were replaced"
            )


class _WithoutCopies(TorchFunctionMode):
    """Mode that multiplies transposed weights without TransformerLens' copy before every product, in this thread.

    Not in half precision, where the layout decides how sums are rounded.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.contiguous and not kwargs and len(args) == 1:
            weight = args[0]
            transposed = weight.ndim == 2 and weight.dtype in _NOT_HALF and weight.T.is_contiguous()
            if transposed and isinstance(weight._base, torch.nn.Parameter):
                return weight
        return function(*args, **(kwargs or {}))


def frozen(model: Any, ids: Tensor) -> LocalReplacement:
    """Freeze a prompt on a model of this backend. ids: [positions]."""
    lens, transcoders = read(model), transcoders_of(model)
    transcoders.check(lens)
    stored = _stores_patterns(model, lens, len(ids))
    probe_once(model, stored, wiring(model, model.cfg), lambda: _probe(model, lens, ids[:8], stored))
    record = {"reads": model.feature_input_hook, "writes": model.original_feature_output_hook}
    captured, _ = capture(model, lens, ids, record, stored)
    x, errors, ignore = captured.streams["reads"], captured.streams["writes"], ignored(model, len(ids))
    if lens.unembedding.dtype == lens.dtype:
        features = tuple(without_zeros(transcoders.encode(layer, x[layer], ignore)) for layer in range(lens.depth))
    else:
        features = own_features(model, x.to(lens.unembedding.dtype), ignore)
    transcoders.add_to(errors, features, x, ignore, sign=-1.0)
    errors[:, :ignore] = 0  # as circuit-tracer does
    return LocalReplacement(captured.model, transcoders, features, errors, ignore)


def read(model: Any) -> LensWeights:
    """Weights of the model; only the transposed value projection and products with a norm's gain are copies."""
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        got = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"attribute: model must be on one device, got {got}; load it with n_devices=1")
    stored = model.W_E.dtype
    dtype = torch.float64 if stored == torch.float64 else torch.float32
    unembedding = model.unembed.W_U.detach().T
    return LensWeights(
        tuple(_layer(block, dtype) for block in model.blocks),
        _norm("ln_final", model.ln_final, model.W_E, dtype),
        unembedding,
        model.unembed.b_U.detach().to(dtype),
        unembedding.mean(0, dtype=dtype),
        dtype,
        devices.pop(),
    )


def _norm(name: str, module: Any, reference: Tensor, dtype: torch.dtype) -> Norm:
    """A norm of TransformerLens; folded ones have no gain. reference: [..., width], on the model's device."""
    kind = type(module).__name__
    if kind not in ("RMSNorm", "RMSNormPre", "LayerNorm", "LayerNormPre"):
        raise FamilyError(f"attribute: {name} must be an RMSNorm or a LayerNorm, folded or not, got {kind}")
    gain = module.w.detach().to(dtype) if hasattr(module, "w") else reference.new_ones(reference.shape[-1], dtype=dtype)
    bias = module.b.detach().to(dtype) if hasattr(module, "b") else None
    return Norm(gain, bias, kind.startswith("Layer"), module.eps)


def _bias(bias: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Flattened bias: [n]; None for TransformerLens' zeros of a model without one."""
    return bias.detach().to(dtype).flatten() if bool(bias.any()) else None


def _layer(block: Any, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Norm]]:
    attention = block.attn
    grouped = hasattr(attention, "_W_V")  # grouped-query attention; W_V then repeats the heads
    w_v, b_v = (attention._W_V, attention._b_V) if grouped else (attention.W_V, attention.b_V)
    norms = {
        ours: _norm(theirs, getattr(block, theirs), attention.W_O, dtype)
        for ours, theirs in NORMS.items()
        if hasattr(block, theirs)
    }
    if attention.W_O.ndim != 3:
        got = list(attention.W_O.shape)
        raise FamilyError(f"attribute: W_O must have shape [heads, head width, width], got {got}; is it in 4 bits?")
    value = w_v.detach().to(dtype).transpose(1, 2).flatten(0, 1)
    output = attention.W_O.detach().to(dtype).flatten(0, 1).T
    return {
        "w_v": value,
        "b_v": _bias(b_v, dtype),
        "w_o": output,
        "b_o": _bias(attention.b_O, dtype),
        "back_v": value_back(norms["attention_norm"], value),
        "back_o": output_back(norms.get("post_attention_norm"), output),
        "heads": attention.W_O.shape[0],
        "kv_heads": w_v.shape[0],
    }, norms


def capture(
    model: Any, lens: LensWeights, ids: Tensor, record: dict[str, str], stored: bool, full_model: bool = False
) -> tuple[Captured, Tensor]:
    """Run one forward: (the captured model, the output of the last norm, or the logits with `full_model`).

    record: the streams to record, by the hook of a block each is at. stored: record patterns, not query and key.
    """
    shape = (lens.depth, len(ids), lens.width)
    streams = {name: torch.empty(shape, dtype=lens.dtype, device=lens.device) for name in record}
    recorder = _Recorder(lens, streams)
    names = ["blocks.0.hook_resid_pre", f"blocks.{lens.depth - 1}.hook_resid_post", "ln_final.hook_scale"]
    for layer, (_, norms) in enumerate(lens.layers):
        names += [f"blocks.{layer}.{NORMS[name]}.hook_scale" for name in norms]
        names += [f"blocks.{layer}.attn.{name}" for name in (["hook_pattern"] if stored else _query_and_key(model))]
    with Hooks() as hooks:
        for name in names:
            recorder.record(hooks, model, name)
        for name, hook_name in record.items():
            for layer in range(lens.depth):
                recorder.stream(hooks, model, name, layer, hook_name)
        with _WithoutCopies():
            out = model.forward(ids[None], stop_at_layer=None if full_model else lens.depth)
        if not full_model:
            out = model.ln_final(out)
    recorder.require(names)
    return Captured(_assembled(model, lens, ids, recorder.recorded), streams), out[0].detach().to(lens.dtype)


def _assembled(model: Any, lens: LensWeights, ids: Tensor, recorded: dict[str, Tensor]) -> FrozenModel:
    layers = tuple(_frozen_layer(model, layer, lens, recorded) for layer in range(lens.depth))
    first, embeddings = recorded["blocks.0.hook_resid_pre"], model.W_E.detach()[ids].to(lens.dtype)
    remainder = first - embeddings
    return FrozenModel(
        tokens=ids,
        embeddings=embeddings,
        position_part=remainder if bool(remainder.any()) else None,
        layers=layers,
        final_stream=recorded[f"blocks.{lens.depth - 1}.hook_resid_post"],
        final_norm=_frozen_norm(lens.final_norm, recorded["ln_final.hook_scale"], "ln_final"),
        unembedding=lens.unembedding,
        unembedding_bias=lens.unembedding_bias,
        unembedding_mean=lens.unembedding_mean,
        final_softcap=max(0.0, float(model.cfg.output_logits_soft_cap)),  # -1 for none
    )


def _frozen_layer(model: Any, layer: int, lens: LensWeights, recorded: dict[str, Tensor]) -> FrozenLayer:
    weights, norms = lens.layers[layer]
    frozen_norms: dict[str, Any] = {
        name: _frozen_norm(norms[name], recorded[f"blocks.{layer}.{lens_name}.hook_scale"], lens_name)
        if name in norms
        else None
        for name, lens_name in NORMS.items()
    }
    pattern = recorded.get(f"blocks.{layer}.attn.hook_pattern")
    attention: RecomputedAttention | StoredAttention
    if pattern is None:
        attention = _recomputed(model, layer, recorded)
    else:
        attention = StoredAttention(pattern, weights["kv_heads"])
    return FrozenLayer(
        **weights,
        **frozen_norms,
        attention=attention,
        parallel=bool(model.cfg.parallel_attn_mlp),
    )


def _query_and_key(model: Any) -> list[str]:
    """Hook points of query and key as they enter the scores."""
    rotary = model.cfg.positional_embedding_type == "rotary"
    return ["hook_rot_q", "hook_rot_k"] if rotary else ["hook_q", "hook_k"]


def _stores_patterns(model: Any, lens: LensWeights, positions: int) -> bool:
    """True if the patterns of all layers together are small, or depend on more than query and key."""
    heads = sum(weights["heads"] for weights, _ in lens.layers)
    small = heads * positions**2 * lens.dtype.itemsize <= PATTERN_BYTES
    return small or model.cfg.positional_embedding_type not in ("rotary", "standard")


def _recomputed(model: Any, layer: int, recorded: dict[str, Tensor]) -> RecomputedAttention:
    owner, cfg = model.blocks[layer].attn, model.cfg
    names = (f"blocks.{layer}.attn.{name}" for name in _query_and_key(model))
    query, key = (recorded[name].transpose(0, 1).contiguous() for name in names)
    attention = RecomputedAttention(
        query=query,
        key=key,
        log_sum_exp=query.new_empty(query.shape[:2]),
        scale=1.0 / float(owner.attn_scale),
        softcap=max(0.0, float(cfg.attn_scores_soft_cap)),
        window=int(cfg.window_size) if owner.attn_type == "local" else 0,
    )
    attend(attention, key[..., :0], None)  # for its log_sum_exp alone
    return attention


def _frozen_norm(norm: Norm, scale: Tensor, name: str) -> FrozenNorm:
    """Freeze a norm at a scale: [positions, 1], as the hook point has it."""
    if scale.ndim != 2:
        raise FamilyError(
            f"attribute: {name} must see the stream once, got {scale.ndim - 1} dimensions before its width; turn off "
            "use_attn_in and use_split_qkv_input"
        )
    return FrozenNorm(scale[:, 0], norm.gain, norm.bias, norm.center)


def _probe(model: Any, lens: LensWeights, ids: Tensor, stored: bool) -> None:
    """Raise unless the frozen model reproduces the model's streams and logits."""
    parts, logits = _TOLERANCE.get(model.W_E.dtype, _TOLERANCE_HALF)
    captured, expected = capture(model, lens, ids, CHECKED, stored, full_model=True)
    differences = {name: (worst, parts) for name, worst in disagreement(captured).items()}
    differences["logits"] = (relative_error(captured.model.logits(), expected), logits)
    wrong = [f"{name} {worst:.2g} off" for name, (worst, tolerance) in differences.items() if not worst <= tolerance]
    if wrong:
        raise FamilyError(
            f"attribute: {model.cfg.original_architecture or model.cfg.model_name} must be built as pycircuit knows "
            f"TransformerLens models to be (attention, then the MLP, or both at once, each with its norms), got "
            f"{', '.join(wrong)} on {len(ids)} tokens; try the nnsight backend, or pc.attribute"
        )
