"""crosslayer-transcoder: `config.yaml` with `model: {class_path, init_args}`, and `checkpoint.safetensors`.

encoder.W [L, d, F], encoder.b [L, F], decoder.W_{l} [l+1, F, d] by the layer written to, decoder.b [L, d]; one layer
each with decoder.W [L, F, d]. nonlinearity.theta [1, L, F] or nonlinearity.threshold. Standardizers, unless they are
folded in already, are folded in here. Nothing in it says where it reads and writes: load(reads=, writes=) must.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pycircuit.ops import Activation, BatchTopK, ReLU, TopK

from .config_files import flag, read_yaml, whole_number
from .contents import Contents, Fold, Layer, require_tensors
from .llamascopium import layer_by_target
from .reader import require_finite
from .select import Overrides
from .stored_tensors import StoredTensor, open_tensors

_FILE = "checkpoint.safetensors"
_THETA, _THRESHOLD, _BANDWIDTH = (f"nonlinearity.{name}" for name in ("theta", "threshold", "bandwidth"))
_IDENTITY = "Standardizer"
_AFFINE = tuple(f"{axis}{side}Standardizer" for axis in ("Dimensionwise", "Layerwise") for side in ("Input", "Output"))
_STATISTICS = tuple(f"{side}_standardizer.{name}" for side in ("input", "output") for name in ("mean", "std"))


def detect(folder: Path) -> str | None:
    config = folder / "config.yaml"
    present = any((folder / (_FILE + end)).is_file() for end in ("", ".index.json"))
    if present and config.is_file() and isinstance(read_yaml(config).get("model"), dict):
        return f"{_FILE} and config.yaml of a model with its class"
    return None


def read(folder: Path, overrides: Overrides) -> Contents:
    config_path = folder / "config.yaml"
    config = read_yaml(config_path)
    model = config["model"]
    reads, writes = overrides.reads, overrides.writes
    if reads is None or writes is None:
        absent = "reads" if reads is None else "writes"
        raise ValueError(f"load: {absent} must be given for {folder}, whose files do not say it, got None")
    classes = _class_names(config_path, model)
    tensors = open_tensors(folder / _FILE)
    cross = classes["decoder"] != "Decoder"
    depth = _depth(tensors, folder / _FILE)
    decoders = [f"decoder.W_{layer}" for layer in range(depth)] + ["decoder.b"] if cross else ["decoder.W"]
    optional = (_THETA, _THRESHOLD, _BANDWIDTH, *_STATISTICS)
    require_tensors(folder / _FILE, tensors, ("encoder.W", "encoder.b", *decoders), optional)
    rules, theta = _rules(config_path, model, classes["nonlinearity"], tensors, depth)
    folded = flag(config_path, model, "is_folded", False)
    standardizers = {} if folded else _standardizers(config_path, classes, tensors, depth)
    layers = []
    for layer in range(depth):
        fold = _fold(standardizers, layer, depth, cross)
        contents = _read_layer(tensors, layer, depth, cross, rules[layer], fold)
        layer_theta = None if theta is None else theta.entry(0).entry(layer)
        layers.append(replace(contents, theta=layer_theta, log_theta=False, positive=True))
    return Contents(folder, layers, cross, reads, writes, config=model)


def _class_names(config_path: Path, model: dict[str, Any]) -> dict[str, str]:
    """The class of each component, without its module."""
    args = model.get("init_args")
    if not isinstance(args, dict):
        raise ValueError(f"load: {config_path}: model.init_args must be names and values, got {args!r}")
    classes = {}
    for name in ("nonlinearity", "decoder", "input_standardizer", "output_standardizer"):
        entry = args.get(name)
        if entry is None and name.endswith("standardizer"):
            classes[name] = _IDENTITY
            continue
        path = entry.get("class_path") if isinstance(entry, dict) else None
        if not isinstance(path, str):
            raise ValueError(f"load: {config_path}: model.init_args.{name} must have a class_path, got {entry!r}")
        classes[name] = path.rsplit(".", 1)[-1]
    if classes["decoder"] not in ("CrosslayerDecoder", "Decoder"):
        got = classes["decoder"]
        raise ValueError(f"load: {config_path}: decoder must be CrosslayerDecoder or Decoder, got {got}")
    return classes


def _depth(tensors: dict[str, StoredTensor], path: Path) -> int:
    w_enc = tensors.get("encoder.W")
    if w_enc is None or len(w_enc.shape) != 3 or not all(w_enc.shape):
        got = None if w_enc is None else list(w_enc.shape)
        raise ValueError(f"load: {path} must hold encoder.W of shape [layers, width, features], got {got}")
    return w_enc.shape[0]


def _rules(
    config_path: Path, model: dict[str, Any], kind: str, tensors: dict[str, StoredTensor], depth: int
) -> tuple[list[Activation], StoredTensor | None]:
    """The rule of every layer, and thresholds [1, L, F]."""
    theta, threshold = tensors.get(_THETA), tensors.get(_THRESHOLD)
    if (theta is not None) != (kind == "JumpReLU") or (threshold is not None) != kind.endswith("BatchTopK"):
        raise ValueError(f"load: {config_path} says {kind}, which must go with the tensors, got {sorted(tensors)[-4:]}")
    if theta is not None and tuple(theta.shape[:2]) != (1, depth):
        raise ValueError(f"load: {theta} must have shape [1, {depth}, features], got {list(theta.shape)}")
    if kind in ("ReLU", "JumpReLU"):
        return [ReLU()] * depth, theta
    if kind == "PerLayerTopK":
        args = model["init_args"]["nonlinearity"].get("init_args") or {}
        if not isinstance(args, dict):
            raise ValueError(f"load: {config_path}: nonlinearity.init_args must be names and values, got {args!r}")
        return [TopK(whole_number(config_path, "nonlinearity.k", args.get("k"), 1))] * depth, None
    if threshold is not None:
        values = require_finite(threshold, threshold.read()).flatten().tolist()
        if len(values) not in (1, depth):
            raise ValueError(f"load: {threshold} must have 1 or {depth} entries, got {len(values)}")
        return [BatchTopK(v) for v in (values if len(values) == depth else values * depth)], None
    known = "ReLU, JumpReLU, PerLayerTopK, BatchTopK or PerLayerBatchTopK"
    raise ValueError(f"load: {config_path}: nonlinearity must be {known}, got {kind}")


def _standardizers(
    config_path: Path, classes: dict[str, str], tensors: dict[str, StoredTensor], depth: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation by side, each [L, d] or [L, 1]; {} where streams are read as they are."""
    standardizers = {}
    for side in ("input", "output"):
        kind = classes[f"{side}_standardizer"]
        if kind == _IDENTITY:
            continue
        if kind not in _AFFINE:
            raise ValueError(
                f"load: {config_path}: {side}_standardizer must be one of {', '.join(_AFFINE)}, got {kind}"
            )
        mean_and_std = []
        for name in ("mean", "std"):
            stored = tensors.get(f"{side}_standardizer.{name}")
            if stored is None or not stored.shape or stored.shape[0] != depth:
                got = None if stored is None else list(stored.shape)
                raise ValueError(
                    f"load: {config_path.parent / _FILE}: {side}_standardizer.{name} of {depth} layers, got {got}"
                )
            mean_and_std.append(require_finite(stored, stored.read()).double().view(depth, -1))
        if not bool((mean_and_std[1] > 0).all()):
            raise ValueError(
                f"load: {config_path.parent / _FILE}: {side}_standardizer.std must be positive, got some at 0"
            )
        standardizers[side] = (mean_and_std[0], mean_and_std[1])
    return standardizers


def _fold(standardizers: dict[str, tuple[Tensor, Tensor]], layer: int, depth: int, cross: bool) -> Fold:
    gain_in = shift_in = gain_out = bias_gain = bias_shift = None
    if "input" in standardizers:
        mean, std = standardizers["input"]
        gain_in, shift_in = 1 / std[layer], -mean[layer] / std[layer]
    if "output" in standardizers:
        mean, std = standardizers["output"]
        gain_out, bias_gain, bias_shift = std[layer:depth] if cross else std[layer], std[layer], mean[layer]
    return Fold(gain_in, shift_in, gain_out, bias_gain, bias_shift)


def _read_layer(
    tensors: dict[str, StoredTensor], layer: int, depth: int, cross: bool, rule: Activation, fold: Fold
) -> Layer:
    if cross:
        contents = layer_by_target(tensors, layer, depth, ("encoder.W", "encoder.b", "decoder.W_{}", ""), rule, fold)
        return replace(contents, b_dec=tensors["decoder.b"].entry(layer))
    w_dec, b_enc = tensors["decoder.W"], tensors["encoder.b"]
    for stored in (w_dec, b_enc):
        if not stored.shape or stored.shape[0] != depth:
            raise ValueError(f"load: {stored} must have {depth} layers, got shape {list(stored.shape)}")
    w_enc = tensors["encoder.W"].entry(layer)
    return Layer(w_enc, b_enc.entry(layer), w_dec.entry(layer), rule=rule, transposed=True, fold=fold)
