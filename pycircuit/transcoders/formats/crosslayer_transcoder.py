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

from .files import Stored, open_tensors, read_yaml
from .llamascopium import by_target
from .parts import Asked, Contents, Fold, Layer, finite, flag, take, whole

_FILE = "checkpoint.safetensors"
_THETA, _THRESHOLD, _BANDWIDTH = (f"nonlinearity.{name}" for name in ("theta", "threshold", "bandwidth"))
_IDENTITY = ("Standardizer",)
_AFFINE = tuple(f"{how}{side}Standardizer" for how in ("Dimensionwise", "Layerwise") for side in ("Input", "Output"))


def sees(folder: Path) -> str | None:
    config = folder / "config.yaml"
    there = any((folder / (_FILE + end)).is_file() for end in ("", ".index.json"))
    if there and config.is_file() and isinstance(read_yaml(config).get("model"), dict):
        return f"{_FILE} and config.yaml of a model with its class"
    return None


def read(folder: Path, asked: Asked) -> Contents:
    said_by, config = folder / "config.yaml", read_yaml(folder / "config.yaml")
    for name, value in (("reads", asked.reads), ("writes", asked.writes)):
        if value is None:
            raise ValueError(f"load: {name} must be given for {folder}, whose files do not say it, got None")
    parts = _parts(said_by, config["model"])
    tensors = open_tensors(folder / _FILE)
    cross = parts["decoder"] != "Decoder"
    depth = _depth(tensors, folder / _FILE)
    decoders = [f"decoder.W_{at}" for at in range(depth)] + ["decoder.b"] if cross else ["decoder.W"]
    optional = (_THETA, _THRESHOLD, _BANDWIDTH, *(f"{side}_standardizer.{n}" for side in ("input", "output")
                for n in ("mean", "std")))  # fmt: skip
    take(folder / _FILE, tensors, ("encoder.W", "encoder.b", *decoders), optional)
    rules, theta = _rules(said_by, config["model"], parts["nonlinearity"], tensors, depth)
    standards = _standards(said_by, parts, tensors, depth, flag(said_by, config["model"], "is_folded", False))
    layers = []
    for at in range(depth):
        made = _layer(tensors, at, depth, cross, rules[at], _fold(standards, at, depth, cross))
        theta_at = None if theta is None else theta.entry(0).entry(at)
        layers.append(replace(made, theta=theta_at, log_theta=False, positive=True))
    return Contents(folder, layers, cross, str(asked.reads), str(asked.writes), config=config["model"])


def _parts(said_by: Path, model: dict[str, Any]) -> dict[str, str]:
    """The class of each part, without its module."""
    args = model.get("init_args")
    if not isinstance(args, dict):
        raise ValueError(f"load: {said_by}: model.init_args must be names and values, got {args!r}")
    found = {}
    for name in ("nonlinearity", "decoder", "input_standardizer", "output_standardizer"):
        part = args.get(name)
        if part is None and name.endswith("standardizer"):
            found[name] = "Standardizer"
            continue
        path = part.get("class_path") if isinstance(part, dict) else None
        if not isinstance(path, str):
            raise ValueError(f"load: {said_by}: model.init_args.{name} must have a class_path, got {part!r}")
        found[name] = path.rsplit(".", 1)[-1]
    if found["decoder"] not in ("CrosslayerDecoder", "Decoder"):
        got = found["decoder"]
        raise ValueError(f"load: {said_by}: decoder must be CrosslayerDecoder or Decoder, got {got}")
    return found


def _depth(tensors: dict[str, Stored], path: Path) -> int:
    w_enc = tensors.get("encoder.W")
    if w_enc is None or len(w_enc.shape) != 3 or not all(w_enc.shape):
        got = None if w_enc is None else list(w_enc.shape)
        raise ValueError(f"load: {path} must hold encoder.W of shape [layers, width, features], got {got}")
    return w_enc.shape[0]


def _rules(
    said_by: Path, model: dict[str, Any], kind: str, tensors: dict[str, Stored], depth: int
) -> tuple[list[Activation], Stored | None]:
    """(the rule of every layer, thresholds [1, L, F])."""
    theta, threshold = tensors.get(_THETA), tensors.get(_THRESHOLD)
    if (theta is not None) != (kind == "JumpReLU") or (threshold is not None) != kind.endswith("BatchTopK"):
        raise ValueError(f"load: {said_by} says {kind}, which must go with the tensors, got {sorted(tensors)[-4:]}")
    if theta is not None and tuple(theta.shape[:2]) != (1, depth):
        raise ValueError(f"load: {theta} must have shape [1, {depth}, features], got {list(theta.shape)}")
    if kind in ("ReLU", "JumpReLU"):
        return [ReLU()] * depth, theta
    if kind == "PerLayerTopK":
        args = model["init_args"]["nonlinearity"].get("init_args") or {}
        if not isinstance(args, dict):
            raise ValueError(f"load: {said_by}: nonlinearity.init_args must be names and values, got {args!r}")
        return [TopK(whole(said_by, "nonlinearity.k", args.get("k"), 1))] * depth, None
    if threshold is not None:
        values = finite(threshold, threshold.read()).flatten().tolist()
        if len(values) not in (1, depth):
            raise ValueError(f"load: {threshold} must have 1 or {depth} entries, got {len(values)}")
        return [BatchTopK(v) for v in (values if len(values) == depth else values * depth)], None
    known = "ReLU, JumpReLU, PerLayerTopK, BatchTopK or PerLayerBatchTopK"
    raise ValueError(f"load: {said_by}: nonlinearity must be {known}, got {kind}")


def _standards(
    said_by: Path, parts: dict[str, str], tensors: dict[str, Stored], depth: int, folded: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """side -> (mean, std), each [L, d] or [L, 1]; nothing where streams are taken as they are."""
    found = {}
    for side in ("input", "output"):
        kind = parts[f"{side}_standardizer"]
        if folded or kind in _IDENTITY:
            continue
        if kind not in _AFFINE:
            raise ValueError(f"load: {said_by}: {side}_standardizer must be one of {', '.join(_AFFINE)}, got {kind}")
        pair = []
        for name in ("mean", "std"):
            stored = tensors.get(f"{side}_standardizer.{name}")
            if stored is None or not stored.shape or stored.shape[0] != depth:
                got = None if stored is None else list(stored.shape)
                raise ValueError(
                    f"load: {said_by.parent / _FILE}: {side}_standardizer.{name} of {depth} layers, got {got}"
                )
            pair.append(finite(stored, stored.read()).double().view(depth, -1))
        if not bool((pair[1] > 0).all()):
            raise ValueError(f"load: {said_by.parent / _FILE}: {side}_standardizer.std must be positive, got some at 0")
        found[side] = (pair[0], pair[1])
    return found


def _fold(standards: dict[str, tuple[Tensor, Tensor]], at: int, depth: int, cross: bool) -> Fold:
    gain_in = shift_in = gain_out = bias_gain = bias_shift = None
    if "input" in standards:
        mean, std = standards["input"]
        gain_in, shift_in = 1 / std[at], -mean[at] / std[at]
    if "output" in standards:
        mean, std = standards["output"]
        gain_out, bias_gain, bias_shift = std[at:depth] if cross else std[at], std[at], mean[at]
    return Fold(gain_in, shift_in, gain_out, bias_gain, bias_shift)


def _layer(tensors: dict[str, Stored], at: int, depth: int, cross: bool, rule: Activation, fold: Fold) -> Layer:
    if cross:
        made = by_target(tensors, at, depth, ("encoder.W", "encoder.b", "decoder.W_{}", ""), rule, fold)
        return replace(made, b_dec=tensors["decoder.b"].entry(at))
    w_dec, b_enc = tensors["decoder.W"], tensors["encoder.b"]
    for stored in (w_dec, b_enc):
        if not stored.shape or stored.shape[0] != depth:
            raise ValueError(f"load: {stored} must have {depth} layers, got shape {list(stored.shape)}")
    w_enc = tensors["encoder.W"].entry(at)
    return Layer(w_enc, b_enc.entry(at), w_dec.entry(at), rule=rule, transposed=True, fold=fold)
