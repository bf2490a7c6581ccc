"""The demo model: a small Llama that joins facts, its transcoders, and the names of their features."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pycircuit.model import ReplacementModel
from pycircuit.transcoders import io

from .facts import DATA, Facts
from .tokenizer import NameTokenizer

KINDS = ("clt", "plt")
CHECKSUMS = "SHA256SUMS"


def load_demo(
    kind: str = "clt", device: Any = None, dtype: torch.dtype | None = None, folder: Path = DATA
) -> ReplacementModel:
    """Load the demo model as a ReplacementModel with names for its features.

    kind: "clt" or "plt"; dtype: None for float32.
    """
    if kind not in KINDS:
        raise ValueError(f"load: transcoders of 'demo' must be one of {', '.join(KINDS)}, got {kind!r}")
    verify_checksums(folder)
    dtype = dtype or torch.float32
    model, tokenizer = load_model(folder)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    transcoders = io.load(folder / kind, device, wide, lazy=False)
    labels = load_labels(kind, folder)
    return ReplacementModel(model.to(device=device, dtype=dtype), transcoders, tokenizer, labels=labels)


def load_model(folder: Path = DATA) -> tuple[Any, NameTokenizer]:
    """Load (the transformers model in float32, its tokenizer)."""
    from safetensors.torch import load_file

    with _without_collections():
        from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    weights = {name: t.float() for name, t in load_file(folder / "model.safetensors").items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval(), NameTokenizer(Facts.load(folder / "facts.json").words())


@contextmanager
def _without_collections() -> Iterator[None]:
    """Collect no garbage during an import, most of whose objects stay."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_labels(kind: str, folder: Path = DATA) -> dict[tuple[int, int], str]:
    """Load the names of features by (layer, feature)."""
    layers = json.loads((folder / "labels.json").read_text(encoding="utf-8"))[kind]
    return {(layer, int(feature)): name for layer, names in enumerate(layers) for feature, name in names.items()}


def save_labels(labels: dict[str, dict[tuple[int, int], str]], depth: int, folder: Path) -> None:
    """Write labels.json. labels: by kind of transcoder, then by (layer, feature)."""
    layers_of = {
        kind: [
            {str(feature): name for (at_layer, feature), name in sorted(names.items()) if at_layer == layer}
            for layer in range(depth)
        ]
        for kind, names in labels.items()
    }
    (folder / "labels.json").write_text(json.dumps(layers_of, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder but their list, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_checksums(folder: Path) -> None:
    """Write the list of checksums, in the form that sha256sum checks."""
    lines = (f"{digest}  {name}\n" for name, digest in checksums(folder).items())
    (folder / CHECKSUMS).write_text("".join(lines))


def verify_checksums(folder: Path = DATA) -> None:
    """Raise unless every file is the one that was committed."""
    if not (folder / CHECKSUMS).is_file():
        raise FileNotFoundError(
            f"load: the demo model must be installed with the package, got no {CHECKSUMS}; reinstall pycircuit"
        )
    lines = (line.split("  ", 1) for line in (folder / CHECKSUMS).read_text().splitlines())
    expected = {name: digest for digest, name in lines}
    actual = checksums(folder)
    wrong = sorted(name for name in expected | actual if expected.get(name) != actual.get(name))
    if wrong:
        raise ValueError(
            f"load: files of the demo model must be as committed, got others: {', '.join(wrong)}; reinstall it"
        )
