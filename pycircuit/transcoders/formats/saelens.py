"""SAELens 6: a folder a layer with `sae_weights.safetensors` and `cfg.json`; its name may be anything.

W_enc [d, F], W_dec [F, d], b_enc, b_dec; threshold [F] for a JumpReLU; W_skip [d, d] is used as x @ W_skip.T. The
configuration's metadata say the hook points, and with them the layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pycircuit.transcoders.types import Reads, Writes

from . import hooks
from .config_files import read_json, same_in_every_layer
from .contents import Contents, Layer, require_tensors
from .select import Overrides, find_files, matching, read_layers, require_configs
from .stored_tensors import open_tensors

NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec")
KINDS = {  # architecture -> (JumpReLU, skip)
    "transcoder": (False, False),
    "skip_transcoder": (False, True),
    "jumprelu_transcoder": (True, False),
    "jumprelu_skip_transcoder": (True, True),
}
_PLAIN = {  # settings that must be off -> values that mean so
    "normalize_activations": ("none", None),
    "apply_b_dec_to_input": (False, None),
    "reshape_activations": ("none", None),
}


def detect(folder: Path) -> str | None:
    names = _names(folder)
    return f"{len(names)} files sae_weights.safetensors, each with cfg.json" if names else None


def _names(folder: Path) -> list[str]:
    names = find_files(folder, "sae_weights.safetensors")
    return [name for name in names if (folder / name).with_name("cfg.json").is_file()]


def read(folder: Path, overrides: Overrides) -> Contents:
    require_configs(folder, find_files(folder, "sae_weights.safetensors"), overrides, "cfg.json")
    paths: dict[int, Path] = {}
    configs: dict[Path, dict[str, Any]] = {}
    for name in matching(_names(folder), overrides.variant):
        path = folder / name
        config_path = path.with_name("cfg.json")
        config = read_json(config_path)
        metadata = _metadata(config_path, config)
        layer = hooks.layer_of(str(metadata.get("hook_name")))
        if layer is None:
            got = metadata.get("hook_name")
            raise ValueError(
                f"load: {config_path}: metadata.hook_name must name a layer such as blocks.3., got {got!r}"
            )
        if layer in paths:
            raise ValueError(f"load: variant must leave one file for layer {layer}, got {paths[layer]} and {path}")
        hooks.require_layer(config_path, "metadata.hook_name_out", metadata.get("hook_name_out"), layer)
        paths[layer], configs[config_path] = path, config
    if not paths:
        raise ValueError(f"load: variant must leave some folders of {folder}, got {overrides.variant!r}")
    layers = read_layers(folder, paths, lambda layer: read_layer(paths[layer]), overrides)
    metadata_by_path = {path: _metadata(path, config) for path, config in configs.items()}
    reads, writes = _hook_points(metadata_by_path, overrides)
    model = hooks.model_name(metadata_by_path.values())
    return Contents(folder, layers, False, reads, writes, model, next(iter(configs.values())))


def _hook_points(metadata: dict[Path, dict[str, Any]], overrides: Overrides) -> tuple[Reads, Writes]:
    """Hook points that every layer reads and writes."""
    reads, writes = overrides.reads, overrides.writes
    if not reads:
        ins = {p: hooks.reads(p, "metadata.hook_name", m.get("hook_name")) for p, m in metadata.items()}
        reads = same_in_every_layer("reads", ins)
    if not writes:
        outs = {p: hooks.writes(p, "metadata.hook_name_out", m.get("hook_name_out")) for p, m in metadata.items()}
        writes = same_in_every_layer("writes", outs)
    assert reads is not None and writes is not None  # there is at least one configuration
    return reads, writes


def _metadata(config_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The metadata; before version 6 they stood among the other entries."""
    metadata = config.get("metadata", config)
    if not isinstance(metadata, dict):
        raise ValueError(f"load: {config_path}: metadata must be names and values, got {metadata!r}")
    return metadata


def read_layer(path: Path) -> Layer:
    config_path = path.with_name("cfg.json")
    config, tensors = read_json(config_path), open_tensors(path)
    kind = config.get("architecture")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"load: {config_path}: architecture must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise ValueError(
                f"load: {config_path}: {name} must be {plain[0]!r}, got {config[name]!r}; fold it in first"
            )
    jumps, skips = KINDS[kind]
    require_tensors(path, tensors, (*NEEDED, *(["threshold"] * jumps), *(["W_skip"] * skips)))
    w_enc, w_dec, b_enc, b_dec = (tensors[name] for name in NEEDED)
    theta, w_skip = tensors.get("threshold"), tensors.get("W_skip")
    return Layer(w_enc, b_enc, w_dec, b_dec, theta, w_skip, transposed=True, skip_transposed=True, positive=True)
