"""What a row of the family table finds in a model: plain tensors, read once, shared where types allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import Family, FamilyError
from .frozen import FrozenNorm

NORMS = ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm")
_EPS = ("eps", "variance_epsilon")


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm as the model has it: gain * C(x) / sqrt(mean(C(x)^2) + eps) + bias."""

    gain: Tensor
    bias: Tensor | None
    center: bool
    eps: float

    def freeze(self, x: Tensor) -> FrozenNorm:
        """With the denominators it has on x: [positions, width]."""
        wide = x.to(self.gain.dtype)
        if self.center:
            wide = wide - wide.mean(-1, keepdim=True)
        sigma = (wide.square().mean(-1) + self.eps).sqrt()
        return FrozenNorm(sigma, self.gain, self.bias, self.center)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """w_v: [kv_heads * head_width, width]; w_o: [width, heads * head_width]; biases or None.

    back_v, back_o: the same with gain and centring of the norm beside them, for the way back: a gradient g at the
    attention's output reaches its heads as g @ back_o, and theirs the stream as z @ back_v, denominators apart.
    """

    attention_norm: Norm | None
    w_v: Tensor
    b_v: Tensor | None
    w_o: Tensor
    b_o: Tensor | None
    back_v: Tensor
    back_o: Tensor
    post_attention_norm: Norm | None
    mlp_norm: Norm | None
    post_mlp_norm: Norm | None
    heads: int
    kv_heads: int


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """unembedding: [vocabulary, width] in the model's own type; everything else float32, or float64 as the model."""

    layers: tuple[LayerWeights, ...]
    final_norm: Norm
    unembedding: Tensor
    unembedding_bias: Tensor | None
    unembedding_mean: Tensor
    parallel: bool
    final_softcap: float
    width: int
    vocabulary: int
    longest: int
    dtype: torch.dtype
    stored: torch.dtype
    device: torch.device


def module(root: nn.Module, path: str, row: Family) -> nn.Module:
    """The module at a dotted path, or an error that names the row."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in root.named_children())
        raise FamilyError(
            f"ReplacementModel: the row of {row.model_type!r} must name modules of the model, got {path!r}, "
            f"which {type(root).__name__} has not (it has {names})"
        ) from None


def _end(model: Any, path: str | None, ask: str, row: Family) -> tuple[nn.Module, str]:
    """The embedding or the head, as the row names it or as the model knows it, and what to call it."""
    if path is not None:
        return module(model, path, row), path
    found = getattr(model, ask)()
    if found is None:
        raise FamilyError(f"ReplacementModel: {ask}() must give a module, got None; is this a causal model?")
    return found, f"{ask}()"


def _tensor(of: nn.Module, name: str, dtype: torch.dtype | None, path: str) -> Tensor | None:
    value = getattr(of, name, None)
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"ReplacementModel: {path}.{name} must hold floating-point values; dequantise the model first")
    return value.detach() if dtype is None else value.detach().to(dtype)


def _required(of: nn.Module, dtype: torch.dtype | None, path: str) -> Tensor:
    value = _tensor(of, "weight", dtype, path)
    if value is None:
        raise FamilyError(f"ReplacementModel: {path} must be a module with a weight, got {type(of).__name__}")
    return value


def _norm(root: nn.Module, path: str | None, row: Family, dtype: torch.dtype) -> Norm | None:
    if path is None:
        return None
    of = module(root, path, row)
    eps = next((getattr(of, name) for name in _EPS if hasattr(of, name)), None)
    if eps is None:
        raise FamilyError(f"ReplacementModel: {path} must be a norm with an eps, got {type(of).__name__}")
    gain = _required(of, dtype, path)
    if row.gain_offset:
        gain = gain + row.gain_offset
    return Norm(gain, _tensor(of, "bias", dtype, path), row.norm == "layer", float(eps))


def _projections(layer: nn.Module, row: Family, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The value and output projections, taken out of whatever they are fused with."""
    value, output = module(layer, row.value, row), module(layer, row.output, row)
    w_v, b_v = _required(value, None, row.value), _tensor(value, "bias", None, row.value)
    w_o = _required(output, None, row.output)
    if row.transposed:
        w_v, w_o = w_v.T, w_o.T
    heads = int(config.num_attention_heads)
    head_width = w_o.shape[1] // heads
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if row.fused == "blocks":
        w_v, b_v = w_v[-kv_heads * head_width :], None if b_v is None else b_v[-kv_heads * head_width :]
    elif row.fused == "heads":
        w_v = w_v.unflatten(0, (heads, 3, head_width))[:, 2].flatten(0, 1)
        b_v = None if b_v is None else b_v.unflatten(0, (heads, 3, head_width))[:, 2].flatten()
    if w_v.shape[0] != kv_heads * head_width or w_v.shape[1] != w_o.shape[0]:
        raise FamilyError(
            f"ReplacementModel: {row.value} must project to {kv_heads} heads of {head_width} as {row.output} takes "
            f"them ({list(w_o.shape)}), got {list(w_v.shape)}; check `fused` and `transposed` in the row of "
            f"{row.model_type!r}"
        )
    return {
        "w_v": w_v.to(dtype).contiguous(),
        "b_v": None if b_v is None else b_v.to(dtype).contiguous(),
        "w_o": w_o.to(dtype).contiguous(),
        "b_o": _tensor(output, "bias", dtype, row.output),
        "heads": heads,
        "kv_heads": kv_heads,
    }


def value_back(norm: Norm | None, w_v: Tensor) -> Tensor:
    if norm is None:
        return w_v
    scaled = w_v * norm.gain
    return scaled - scaled.mean(1, keepdim=True) if norm.center else scaled


def output_back(norm: Norm | None, w_o: Tensor) -> Tensor:
    if norm is None:
        return w_o
    return norm.gain[:, None] * (w_o - w_o.mean(0) if norm.center else w_o)


def _layer(layer: nn.Module, row: Family, config: Any, dtype: torch.dtype) -> LayerWeights:
    before, after = (_norm(layer, n, row, dtype) for n in (row.attention_norm, row.post_attention_norm))
    projections = _projections(layer, row, config, dtype)
    return LayerWeights(
        attention_norm=before,
        post_attention_norm=after,
        mlp_norm=_norm(layer, row.mlp_norm, row, dtype),
        post_mlp_norm=_norm(layer, row.post_mlp_norm, row, dtype),
        back_v=value_back(before, projections["w_v"]),
        back_o=output_back(after, projections["w_o"]),
        **projections,
    )


def _one_device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1 or any(d.type == "meta" for d in devices):
        got = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"ReplacementModel: model must be on one device, got {got}; load it without device_map")
    return devices.pop()


def _check_experts(config: Any, dtype: torch.dtype) -> None:
    """transformers' default for experts is torch's grouped product, which float64 models cannot be run with."""
    if dtype == torch.float64 and getattr(config, "_experts_implementation", None) == "grouped_mm":
        raise ValueError(
            "ReplacementModel: model must compute its experts in its own type, got float64 and grouped_mm, which has "
            "none; call model.set_experts_implementation('eager')"
        )


def _flag(value: bool | str, config: Any) -> bool:
    return bool(getattr(config, value)) if isinstance(value, str) else value


def read_weights(model: Any, row: Family) -> ModelWeights:
    """Every tensor the frozen model needs. A model in half precision is widened, apart from its unembedding."""
    device, config = _one_device(model), model.config.get_text_config()
    head, head_name = _end(model, row.head, "get_output_embeddings", row)
    unembedding = _required(head, None, head_name)
    _check_experts(config, unembedding.dtype)
    dtype = torch.float64 if unembedding.dtype == torch.float64 else torch.float32
    final_norm = _norm(model, row.final_norm, row, dtype)
    assert final_norm is not None  # the row always names one
    layers = [_layer(layer, row, config, dtype) for layer in module(model, row.layers, row).children()]
    embedding, embedding_name = _end(model, row.embedding, "get_input_embeddings", row)
    cap = getattr(config, row.final_softcap, None) if row.final_softcap else None
    return ModelWeights(
        layers=tuple(layers),
        final_norm=final_norm,
        unembedding=unembedding,
        unembedding_bias=_tensor(head, "bias", dtype, head_name),
        unembedding_mean=unembedding.mean(0, dtype=dtype),
        parallel=_flag(row.parallel, config),
        final_softcap=float(cap or 0.0),
        width=unembedding.shape[1],
        vocabulary=_required(embedding, None, embedding_name).shape[0],
        longest=int(getattr(config, "max_position_embeddings", 0) or 0),
        dtype=dtype,
        stored=unembedding.dtype,
        device=device,
    )
