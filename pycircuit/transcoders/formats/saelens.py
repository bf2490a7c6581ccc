"""SAELens 6: a folder a layer with `sae_weights.safetensors` and `cfg.json`; its name may be anything.

W_enc [d, F], W_dec [F, d], b_enc, b_dec; threshold [F] for a JumpReLU; W_skip [d, d] is used as x @ W_skip.T. The
configuration's metadata say the hook points, and with them the layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import hooks
from .files import open_tensors, read_json
from .parts import Asked, Contents, Layer, same_everywhere, take
from .variants import beside, chosen, in_order, tree

NEEDED = ("W_enc", "W_dec", "b_enc", "b_dec")
KINDS = {  # architecture -> (JumpReLU, skip)
    "transcoder": (False, False),
    "skip_transcoder": (False, True),
    "jumprelu_transcoder": (True, False),
    "jumprelu_skip_transcoder": (True, True),
}


def sees(folder: Path) -> str | None:
    found = _names(folder)
    return f"{len(found)} files sae_weights.safetensors, each with cfg.json" if found else None


def _names(folder: Path) -> list[str]:
    return [name for name in tree(folder, "sae_weights.safetensors") if (folder / name).with_name("cfg.json").is_file()]


def read(folder: Path, asked: Asked) -> Contents:
    beside(folder, tree(folder, "sae_weights.safetensors"), asked, "cfg.json")
    found: dict[int, Path] = {}
    said: dict[Path, dict[str, Any]] = {}
    for name in chosen(_names(folder), asked.variant):
        path = folder / name
        config, said_by = read_json(path.with_name("cfg.json")), path.with_name("cfg.json")
        at = hooks.layer_of(str(_meta(said_by, config).get("hook_name")))
        if at is None:
            got = _meta(said_by, config).get("hook_name")
            raise ValueError(f"load: {said_by}: metadata.hook_name must name a layer such as blocks.3., got {got!r}")
        if at in found:
            raise ValueError(f"load: variant must leave one file for layer {at}, got {found[at]} and {path}")
        hooks.same_layer(said_by, "metadata.hook_name_out", _meta(said_by, config).get("hook_name_out"), at)
        found[at], said[said_by] = path, config
    if not found:
        raise ValueError(f"load: variant must leave some folders of {folder}, got {asked.variant!r}")
    layers = in_order(folder, found, lambda at: layer(found[at]), asked)
    metas = {path: _meta(path, config) for path, config in said.items()}
    read = {p: hooks.reads(p, "metadata.hook_name", m.get("hook_name")) for p, m in metas.items() if not asked.reads}
    write = {
        p: hooks.writes(p, "metadata.hook_name_out", m.get("hook_name_out"))
        for p, m in metas.items()
        if not asked.writes
    }
    model = next((m["model_name"] for m in metas.values() if isinstance(m.get("model_name"), str)), None)
    places = (asked.reads or same_everywhere("reads", read), asked.writes or same_everywhere("writes", write))
    return Contents(folder, layers, False, str(places[0]), str(places[1]), model, next(iter(said.values())))


def _meta(said_by: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The metadata; before version 6 they stood among the rest."""
    meta = config.get("metadata", config)
    if not isinstance(meta, dict):
        raise ValueError(f"load: {said_by}: metadata must be names and values, got {meta!r}")
    return meta


def layer(path: Path) -> Layer:
    said_by = path.with_name("cfg.json")
    config, tensors = read_json(said_by), open_tensors(path)
    kind = config.get("architecture")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"load: {said_by}: architecture must be one of {', '.join(KINDS)}, got {kind!r}")
    for name, plain in (("normalize_activations", ("none", None)), ("apply_b_dec_to_input", (False, None)),
                        ("reshape_activations", ("none", None))):  # fmt: skip
        if config.get(name) not in plain:
            raise ValueError(f"load: {said_by}: {name} must be {plain[0]!r}, got {config[name]!r}; fold it in first")
    jumps, skips = KINDS[kind]
    take(path, tensors, (*NEEDED, *(["threshold"] * jumps), *(["W_skip"] * skips)))
    w_enc, w_dec, b_enc, b_dec = (tensors[name] for name in NEEDED)
    return Layer(
        w_enc, b_enc, w_dec, b_dec, tensors.get("threshold"), tensors.get("W_skip"), transposed=True, skip_back=True,
        positive=True,
    )  # fmt: skip
