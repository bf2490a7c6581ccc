"""The weights that a frozen model needs: plain tensors, read once, shared where types allow."""

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
        """The norm with the denominators it has on x: [positions, width]."""
        wide = x.to(self.gain.dtype)
        if self.center:
            wide = wide - wide.mean(-1, keepdim=True)
        sigma = (wide.square().mean(-1) + self.eps).sqrt()
        return FrozenNorm(sigma, self.gain, self.bias, self.center)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Attention weights and norms of one layer.

    w_v: [kv_heads * head_width, width]; w_o: [width, heads * head_width]; biases or None.
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
    """Weights of a model: float32, or float64 if the model is, apart from the unembedding.

    unembedding: [vocabulary, width] in the model's own type, `stored`; longest: the most positions, 0 for no limit.
    """

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


class HasWeights:
    """Depth, width, type and device of an object with `weights`."""

    weights: ModelWeights

    @property
    def depth(self) -> int:
        """The number of layers."""
        return len(self.weights.layers)

    @property
    def width(self) -> int:
        return self.weights.width

    @property
    def dtype(self) -> torch.dtype:
        """float64 if the model is, else float32: half precision is widened."""
        return self.weights.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.device


def submodule(root: nn.Module, path: str, family: Family) -> nn.Module:
    """The module at a dotted path, or an error that names the family."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in root.named_children())
        raise FamilyError(
            f"ReplacementModel: the row of {family.model_type!r} must name modules of the model, got {path!r}, "
            f"which {type(root).__name__} has not (it has {names})"
        ) from None


def _embedding_or_head(model: Any, path: str | None, getter: str, family: Family) -> tuple[nn.Module, str]:
    """The embedding or the head, by the family's path or the model's own getter, and its name in errors."""
    if path is not None:
        return submodule(model, path, family), path
    owner = getattr(model, getter)()
    if owner is None:
        raise FamilyError(f"ReplacementModel: {getter}() must give a module, got None; is this a causal model?")
    return owner, f"{getter}()"


def _tensor(owner: nn.Module, name: str, dtype: torch.dtype | None, path: str) -> Tensor | None:
    value = getattr(owner, name, None)
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"ReplacementModel: {path}.{name} must hold floating-point values; dequantise the model first")
    return value.detach() if dtype is None else value.detach().to(dtype)


def _weight(owner: nn.Module, dtype: torch.dtype | None, path: str) -> Tensor:
    value = _tensor(owner, "weight", dtype, path)
    if value is None:
        raise FamilyError(f"ReplacementModel: {path} must be a module with a weight, got {type(owner).__name__}")
    return value


def _norm(root: nn.Module, path: str | None, family: Family, dtype: torch.dtype) -> Norm | None:
    if path is None:
        return None
    owner = submodule(root, path, family)
    eps = next((getattr(owner, name) for name in _EPS if hasattr(owner, name)), None)
    if eps is None:
        raise FamilyError(f"ReplacementModel: {path} must be a norm with an eps, got {type(owner).__name__}")
    gain = _weight(owner, dtype, path)
    if family.gain_offset:
        gain = gain + family.gain_offset
    return Norm(gain, _tensor(owner, "bias", dtype, path), family.norm == "layer", float(eps))


def _projections(layer: nn.Module, family: Family, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The value and output projections of a layer, cut out of fused ones."""
    value, output = submodule(layer, family.value, family), submodule(layer, family.output, family)
    w_v, b_v = _weight(value, None, family.value), _tensor(value, "bias", None, family.value)
    w_o = _weight(output, None, family.output)
    if family.transposed:
        w_v, w_o = w_v.T, w_o.T
    heads = int(config.num_attention_heads)
    head_width = w_o.shape[1] // heads
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if family.fused == "blocks":
        w_v, b_v = w_v[-kv_heads * head_width :], None if b_v is None else b_v[-kv_heads * head_width :]
    elif family.fused == "heads":
        w_v = w_v.unflatten(0, (heads, 3, head_width))[:, 2].flatten(0, 1)
        b_v = None if b_v is None else b_v.unflatten(0, (heads, 3, head_width))[:, 2].flatten()
    if w_v.shape[0] != kv_heads * head_width or w_v.shape[1] != w_o.shape[0]:
        raise FamilyError(
            f"ReplacementModel: {family.value} must project to {kv_heads} heads of {head_width} as {family.output} "
            f"takes them ({list(w_o.shape)}), got {list(w_v.shape)}; check `fused` and `transposed` in the row of "
            f"{family.model_type!r}"
        )
    return {
        "w_v": w_v.to(dtype).contiguous(),
        "b_v": None if b_v is None else b_v.to(dtype).contiguous(),
        "w_o": w_o.to(dtype).contiguous(),
        "b_o": _tensor(output, "bias", dtype, family.output),
        "heads": heads,
        "kv_heads": kv_heads,
    }


def value_back(norm: Norm | None, w_v: Tensor) -> Tensor:
    """`back_v` of LayerWeights: [kv_heads * head_width, width]."""
    if norm is None:
        return w_v
    scaled = w_v * norm.gain
    return scaled - scaled.mean(1, keepdim=True) if norm.center else scaled


def output_back(norm: Norm | None, w_o: Tensor) -> Tensor:
    """`back_o` of LayerWeights: [width, heads * head_width]."""
    if norm is None:
        return w_o
    return norm.gain[:, None] * (w_o - w_o.mean(0) if norm.center else w_o)


def _layer(layer: nn.Module, family: Family, config: Any, dtype: torch.dtype) -> LayerWeights:
    before, after = (_norm(layer, path, family, dtype) for path in (family.attention_norm, family.post_attention_norm))
    projections = _projections(layer, family, config, dtype)
    return LayerWeights(
        attention_norm=before,
        post_attention_norm=after,
        mlp_norm=_norm(layer, family.mlp_norm, family, dtype),
        post_mlp_norm=_norm(layer, family.post_mlp_norm, family, dtype),
        back_v=value_back(before, projections["w_v"]),
        back_o=output_back(after, projections["w_o"]),
        **projections,
    )


def _device(model: nn.Module) -> torch.device:
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


def read_weights(model: Any, family: Family) -> ModelWeights:
    """Read every tensor that a frozen model needs; half precision is widened, apart from the unembedding."""
    device, config = _device(model), model.config.get_text_config()
    head, head_name = _embedding_or_head(model, family.head, "get_output_embeddings", family)
    unembedding = _weight(head, None, head_name)
    _check_experts(config, unembedding.dtype)
    dtype = torch.float64 if unembedding.dtype == torch.float64 else torch.float32
    final_norm = _norm(model, family.final_norm, family, dtype)
    assert final_norm is not None  # a family always names one
    layers = [_layer(layer, family, config, dtype) for layer in submodule(model, family.layers, family).children()]
    embedding, embedding_name = _embedding_or_head(model, family.embedding, "get_input_embeddings", family)
    cap = getattr(config, family.final_softcap, None) if family.final_softcap else None
    return ModelWeights(
        layers=tuple(layers),
        final_norm=final_norm,
        unembedding=unembedding,
        unembedding_bias=_tensor(head, "bias", dtype, head_name),
        unembedding_mean=unembedding.mean(0, dtype=dtype),
        parallel=_flag(family.parallel, config),
        final_softcap=float(cap or 0.0),
        width=unembedding.shape[1],
        vocabulary=_weight(embedding, None, embedding_name).shape[0],
        longest=int(getattr(config, "max_position_embeddings", 0) or 0),
        dtype=dtype,
        stored=unembedding.dtype,
        device=device,
    )
