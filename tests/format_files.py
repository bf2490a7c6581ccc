"""Transcoders written exactly as each format lays them out, by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_transcoders import LAYERS, SIZE, WIDTH, random_set
from safetensors.torch import save_file
from torch import Tensor

import pycircuit as pc


def theta(t: Any, layer: int) -> Tensor | None:
    rule = t.activation[layer]
    return rule.theta if isinstance(rule, pc.JumpReLU) else None


def contiguous(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t.contiguous().clone() for name, t in tensors.items() if t is not None}


def transposed(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.T


def config_yaml(folder: Path, kind: str, t: Any, more: str = "") -> None:
    reads = {"resid_mid": "hook_resid_mid", "mlp_normed": "ln2.hook_normalized", "mlp_in": "mlp.hook_in"}[t.reads]
    writes = {"mlp_out": "hook_mlp_out", "mlp_raw": "mlp.hook_out"}[t.writes]
    hooks = f"feature_input_hook: {reads}\nfeature_output_hook: {writes}\n"
    (folder / "config.yaml").write_text(f"model_name: tiny\nmodel_kind: {kind}\n{hooks}{more}")


def circuit_tracer(folder: Path, t: Any, more: str = "") -> None:
    for layer in range(LAYERS):
        tensors = contiguous(
            W_enc=t.w_enc[layer],
            W_dec=t.w_dec[layer],
            b_enc=t.b_enc[layer],
            b_dec=t.b_dec[layer],
            W_skip=transposed(t.w_skip[layer]),
        )
        limits = theta(t, layer)
        if limits is not None:
            tensors["activation_function.threshold"] = limits
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    config_yaml(folder, "transcoder_set", t, more)


def circuit_tracer_cross(folder: Path, t: Any) -> None:
    for layer in range(LAYERS):
        tensors = contiguous(
            W_enc=t.w_enc[layer],
            b_enc=t.b_enc[layer],
            b_dec=t.b_dec[layer],
            threshold=theta(t, layer),
            W_skip=t.w_skip[layer],
        )
        save_file({f"{name}_{layer}": v for name, v in tensors.items()}, folder / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": t.w_dec[layer]}, folder / f"W_dec_{layer}.safetensors")
    config_yaml(folder, "cross_layer_transcoder", t)


def gemma_scope(folder: Path, t: Any, compressed: bool = False) -> None:
    for layer in range(LAYERS):
        inner = folder / f"layer_{layer}" / "width_16k" / f"average_l0_{7 + layer}"
        inner.mkdir(parents=True)
        tensors = contiguous(
            W_enc=t.w_enc[layer].T,
            W_dec=t.w_dec[layer],
            b_enc=t.b_enc[layer],
            b_dec=t.b_dec[layer],
            threshold=theta(t, layer),
        )
        save = np.savez_compressed if compressed else np.savez
        save(inner / "params.npz", **{name: v.numpy() for name, v in tensors.items()})


def _scope_2(t: Any, layer: int, w_dec: Tensor) -> dict[str, Tensor]:
    return contiguous(
        w_enc=t.w_enc[layer].T,
        w_dec=w_dec,
        b_enc=t.b_enc[layer],
        b_dec=t.b_dec[layer],
        threshold=theta(t, layer),
        affine_skip_connection=t.w_skip[layer],
    )


def gemma_scope_2(folder: Path, t: Any) -> None:
    affine = t.w_skip[0] is not None
    for layer in range(LAYERS):
        inner = folder / "transcoder_all" / f"layer_{layer}_width_16k_l0_small{'_affine' * affine}"
        inner.mkdir(parents=True)
        save_file(_scope_2(t, layer, t.w_dec[layer]), inner / "params.safetensors")
        config = {
            "architecture": "jump_relu",
            "model_name": "google/tiny",
            "width": SIZE,
            "l0": 10,
            "hf_hook_point_in": f"model.layers.{layer}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{layer}.post_feedforward_layernorm.output",
            "affine_connection": affine,
            "type": "transcoder",
        }
        (inner / "config.json").write_text(json.dumps(config))


def gemma_scope_2_cross(folder: Path, t: Any) -> None:
    """Slots below a layer's own hold numbers that nothing may read."""
    inner = folder / "clt" / f"width_16k_l0_small{'_affine' * (t.w_skip[0] is not None)}"
    inner.mkdir(parents=True)
    for layer in range(LAYERS):
        slots = torch.cat([torch.full((SIZE, layer, WIDTH), 1e6), t.w_dec[layer]], 1)
        save_file(_scope_2(t, layer, slots), inner / f"params_layer_{layer}.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "google/tiny",
        "hf_hook_point_in": "model.layers.0.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.0.post_feedforward_layernorm.output",
    }
    (inner / "config.json").write_text(json.dumps(config))


def sparsify(folder: Path, t: Any) -> None:
    for layer in range(LAYERS):
        inner = folder / f"layers.{layer}.mlp"
        inner.mkdir()
        tensors = contiguous(W_dec=t.w_dec[layer], b_dec=t.b_dec[layer], W_skip=transposed(t.w_skip[layer]))
        tensors |= {"encoder.weight": t.w_enc[layer], "encoder.bias": t.b_enc[layer]}
        save_file(tensors, inner / "sae.safetensors")
        config = {
            "activation": "topk",
            "k": t.activation[layer].k,
            "num_latents": SIZE,
            "expansion_factor": 32,
            "multi_topk": False,
            "skip_connection": t.w_skip[layer] is not None,
            "transcode": True,
            "normalize_decoder": True,
            "d_in": WIDTH,
        }
        (inner / "cfg.json").write_text(json.dumps(config))


def saelens(folder: Path, t: Any) -> None:
    jumps, skips = theta(t, 0) is not None, t.w_skip[0] is not None
    kind = "jumprelu_" * jumps + "skip_" * skips + "transcoder"
    for layer in range(LAYERS):
        inner = folder / f"any-name-{LAYERS - layer}"
        inner.mkdir()
        tensors = contiguous(
            W_enc=t.w_enc[layer].T,
            W_dec=t.w_dec[layer],
            b_enc=t.b_enc[layer],
            b_dec=t.b_dec[layer],
            threshold=theta(t, layer),
            W_skip=transposed(t.w_skip[layer]),
        )
        save_file(tensors, inner / "sae_weights.safetensors")
        config = {
            "architecture": kind,
            "d_in": WIDTH,
            "d_sae": SIZE,
            "d_out": WIDTH,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": False,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "model_name": "tiny",
                "hook_name": f"blocks.{layer}.ln2.hook_normalized",
                "hook_name_out": f"blocks.{layer}.hook_mlp_out",
            },
        }
        (inner / "cfg.json").write_text(json.dumps(config))


def _scopium(t: Any, **more: Any) -> dict[str, Any]:
    rule = t.activation[0]
    kind = "jumprelu" if isinstance(rule, pc.JumpReLU) else "topk" if isinstance(rule, pc.TopK) else "relu"
    return {
        "act_fn": kind,
        "top_k": getattr(rule, "k", 50),
        "d_model": WIDTH,
        "expansion_factor": SIZE / WIDTH,
        "use_decoder_bias": True,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        **more,
    }


def _logarithm(t: Any, layer: int) -> Tensor | None:
    limits = theta(t, layer)
    return None if limits is None else limits.log()


def llamascopium(folder: Path, t: Any, **more: Any) -> None:
    norms = more.pop("norms", [torch.tensor(float("nan"))] * 2)  # without meaning unless dataset-wise
    for layer in range(LAYERS):
        inner = folder / "transcoder" / "8x" / "k64" / f"layer{layer}_transcoder_8x_k64"
        inner.mkdir(parents=True)
        hooks = {
            "hook_point_in": f"blocks.{layer}.ln2.hook_normalized",
            "hook_point_out": f"blocks.{layer}.hook_mlp_out",
        }
        tensors = contiguous(W_E=t.w_enc[layer].T, W_D=t.w_dec[layer], b_E=t.b_enc[layer], b_D=t.b_dec[layer])
        limits = _logarithm(t, layer)
        if limits is not None:
            tensors["activation_function.log_jumprelu_threshold"] = limits
        for hook, norm in zip(hooks.values(), norms, strict=True):
            tensors[f"dataset_average_activation_norm.{hook}"] = norm.clone()
        save_file(tensors, inner / "sae_weights.safetensors")
        (inner / "config.json").write_text(json.dumps({"sae_type": "sae", **hooks, **_scopium(t, **more)}))


def by_target(t: Any, name: str) -> dict[str, Tensor]:
    """Decoders [l+1, F, d] by the layer written to."""
    return {
        name.format(to): torch.stack([t.w_dec[source][:, to - source] for source in range(to + 1)])
        for to in range(LAYERS)
    }


def llamascopium_cross(folder: Path, t: Any, **more: Any) -> None:
    norms = more.pop("norms", torch.full((2, LAYERS), float("nan")))
    tensors = by_target(t, "W_D.{}") | {f"b_D.{layer}": t.b_dec[layer] for layer in range(LAYERS)}
    tensors |= {"W_E": torch.stack([w.T for w in t.w_enc]), "b_E": torch.stack(t.b_enc)}
    if theta(t, 0) is not None:
        logs = torch.stack([theta(t, layer).log() for layer in range(LAYERS)])  # type: ignore[union-attr]
        tensors["activation_function.log_jumprelu_threshold"] = logs
    hooks = {
        "hook_points_in": [f"blocks.{layer}.hook_resid_mid" for layer in range(LAYERS)],
        "hook_points_out": [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)],
    }
    for names, side in zip(hooks.values(), norms, strict=True):
        tensors |= {f"dataset_average_activation_norm.{h}": n.clone() for h, n in zip(names, side, strict=True)}
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "config.json").write_text(json.dumps({"sae_type": "clt", **hooks, **_scopium(t, **more)}))


def llamascopium_by_norms(folder: Path, cross: bool, kind: str) -> tuple[Any, Tensor, Tensor]:
    """Write a random set of normed streams and decoders; return it, and each layer's norms of what it reads, writes."""
    t = random_set(cross, kind, skip=False, reads="resid_mid" if cross else "mlp_normed")
    inner, outer = torch.tensor([3.0, 5.0, 2.0]), torch.tensor([7.0, 0.5, 4.0])
    options = {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    folder.mkdir()
    if cross:
        llamascopium_cross(folder, t, norms=torch.stack([inner, outer]), **options)
        return t, inner, outer
    llamascopium(folder, t, norms=[inner[0], outer[0]], **options)
    return t, inner[:1].expand(LAYERS), outer[:1].expand(LAYERS)


def crosslayer(folder: Path, t: Any, standards: dict[str, Tensor] | None = None, axis: str = "Dimensionwise") -> None:
    """standards: mean and std of either side."""
    tensors = {"encoder.W": torch.stack([w.T for w in t.w_enc]), "encoder.b": torch.stack(t.b_enc)}
    if isinstance(t, pc.CrossLayerTranscoder):
        decoder, tensors = "CrosslayerDecoder", tensors | by_target(t, "decoder.W_{}")
        tensors["decoder.b"] = torch.stack(t.b_dec)
    else:
        decoder, tensors["decoder.W"] = "Decoder", torch.stack(t.w_dec)
    rule, k = t.activation[0], 0
    if isinstance(rule, pc.JumpReLU):
        kind = "JumpReLU"
        tensors["nonlinearity.theta"] = torch.stack([theta(t, layer) for layer in range(LAYERS)])[None]  # type: ignore[misc]
        tensors["nonlinearity.bandwidth"] = torch.tensor(1.0)
    elif isinstance(rule, pc.BatchTopK):
        kind = "PerLayerBatchTopK" if t.activation[1] != rule else "BatchTopK"
        limits = [r.threshold for r in t.activation]
        tensors["nonlinearity.threshold"] = torch.tensor(limits if kind.startswith("Per") else limits[:1])
    else:
        kind, k = ("PerLayerTopK", rule.k) if isinstance(rule, pc.TopK) else ("ReLU", 0)
    names = {
        side: f"a.{axis}{side.title()}Standardizer" if standards else "a.Standardizer" for side in ("input", "output")
    }
    sides = {f"{side}_standardizer": {"class_path": path} for side, path in names.items()}
    args = {
        "nonlinearity": {"class_path": f"a.b.{kind}", "init_args": {"k": k}},
        "decoder": {"class_path": f"a.b.{decoder}"},
        **sides,
    }
    save_file({**tensors, **(standards or {})}, folder / "checkpoint.safetensors")
    model = {"model": {"class_path": "a.b.CrossLayerTranscoder", "init_args": args}}
    (folder / "config.yaml").write_text(json.dumps(model))


def listed(folder: Path, t: Any) -> None:
    """Files of one set, named one by one."""
    circuit_tracer(folder, t)
    files = "".join(f"- files/{layer}.safetensors\n" for layer in range(LAYERS))
    (folder / "files").mkdir()
    for layer in range(LAYERS):
        (folder / f"layer_{layer}.safetensors").rename(folder / "files" / f"{layer}.safetensors")
    config_yaml(folder, "transcoder_set", t, f"transcoders:\n{files}")


@dataclass(frozen=True)
class Row:
    """A format, the function that writes it, the transcoders it can hold, and arguments that load needs."""

    format: str
    write: Callable[..., None]
    holds: dict[str, Any]
    overrides: dict[str, Any] = field(default_factory=dict)
    exact: bool = True  # every number comes back as it was


_PLACES = {"reads": "resid_mid", "writes": "mlp_out"}
_NORMED = {"reads": "mlp_normed", "skip": False}
ROWS: dict[str, Row] = {
    "circuit_tracer_relu": Row("circuit-tracer, per layer", circuit_tracer, {"cross": False, "rule": "relu"}),
    "circuit_tracer": Row("circuit-tracer, per layer", circuit_tracer, {"cross": False}),
    "circuit_tracer_bf16": Row(
        "circuit-tracer, per layer", circuit_tracer, {"cross": False, "dtype": torch.bfloat16, "reads": "resid_mid"}
    ),
    "crv": Row(
        "circuit-tracer, per layer", lambda folder, t: circuit_tracer(folder, t, "activation: topk\nk: 5\n"),
        {"cross": False, "rule": "topk_negative", "skip": False},
    ),
    "listed": Row("circuit-tracer, files elsewhere", listed, {"cross": False}),
    "circuit_tracer_cross_relu": Row(
        "circuit-tracer, cross-layer", circuit_tracer_cross, {"cross": True, "rule": "relu", "reads": "resid_mid"}
    ),
    "circuit_tracer_cross": Row("circuit-tracer, cross-layer", circuit_tracer_cross, {"cross": True}),
    "gemma_scope": Row("GemmaScope 1", gemma_scope, {"cross": False, **_NORMED}),
    "gemma_scope_compressed": Row(
        "GemmaScope 1", lambda folder, t: gemma_scope(folder, t, compressed=True), {"cross": False, **_NORMED}
    ),
    "gemma_scope_2": Row("GemmaScope 2, per layer", gemma_scope_2, {"cross": False, "skip": False}),
    "gemma_scope_2_affine": Row("GemmaScope 2, per layer", gemma_scope_2, {"cross": False}),
    "gemma_scope_2_cross": Row("GemmaScope 2, cross-layer", gemma_scope_2_cross, {"cross": True, "skip": False}),
    "gemma_scope_2_cross_affine": Row("GemmaScope 2, cross-layer", gemma_scope_2_cross, {"cross": True}),
    "sparsify": Row("sparsify", sparsify, {"cross": False, "rule": "topk", "skip": False, "writes": "mlp_raw"}),
    "sparsify_skip": Row("sparsify", sparsify, {"cross": False, "rule": "topk", "writes": "mlp_raw"}),
    "saelens": Row("SAELens", saelens, {"cross": False, "rule": "relu", **_NORMED}),
    "saelens_skip": Row("SAELens", saelens, {"cross": False, "rule": "relu", "reads": "mlp_normed"}),
    "saelens_jumprelu": Row("SAELens", saelens, {"cross": False, **_NORMED}),
    "saelens_jumprelu_skip": Row("SAELens", saelens, {"cross": False, "reads": "mlp_normed"}),
    "llamascopium": Row("Llama-Scope-2", llamascopium, {"cross": False, **_NORMED}, exact=False),
    "llamascopium_topk": Row("Llama-Scope-2", llamascopium, {"cross": False, "rule": "topk", **_NORMED}),
    "llamascopium_cross": Row(
        "Llama-Scope-2", llamascopium_cross, {"cross": True, "skip": False, "reads": "resid_mid"}, exact=False
    ),
    "llamascopium_cross_relu": Row(
        "Llama-Scope-2", llamascopium_cross, {"cross": True, "rule": "relu", "skip": False, "reads": "resid_mid"}
    ),
    "crosslayer": Row("crosslayer-transcoder", crosslayer, {"cross": True, "skip": False, **_PLACES}, _PLACES),
    "crosslayer_batchtopk": Row(
        "crosslayer-transcoder", crosslayer, {"cross": True, "rule": "batchtopk", "skip": False, **_PLACES}, _PLACES,
        exact=False,
    ),
    "crosslayer_batchtopks": Row(
        "crosslayer-transcoder", crosslayer, {"cross": True, "rule": "batchtopks", "skip": False, **_PLACES}, _PLACES
    ),
    "crosslayer_topk": Row(
        "crosslayer-transcoder", crosslayer, {"cross": True, "rule": "topk", "skip": False, **_PLACES}, _PLACES
    ),
    "crosslayer_single": Row(
        "crosslayer-transcoder", crosslayer, {"cross": False, "skip": False, "bias": False, **_PLACES}, _PLACES
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Any:
    """The files of a row in a new folder; returns the transcoders they hold."""
    folder.mkdir(parents=True)
    t = random_set(**ROWS[name].holds)
    ROWS[name].write(folder, t)
    return t
