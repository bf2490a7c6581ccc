"""The model in the box: a small Llama that joins facts, its transcoders, and what their features stand for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from pycircuit.model import ReplacementModel
from pycircuit.transcoders import io

from .facts import BOX, Facts
from .tokenizer import Names

KINDS = ("clt", "plt")
SUMS = "SHA256SUMS"


def load_box(
    kind: str = "clt", device: Any = None, dtype: torch.dtype | None = None, box: Path = BOX
) -> ReplacementModel:
    """A ReplacementModel with names for its features. kind: "clt" or "plt"; dtype: None for float32."""
    if kind not in KINDS:
        raise ValueError(f"load: transcoders of 'demo' must be one of {', '.join(KINDS)}, got {kind!r}")
    verify(box)
    dtype = dtype or torch.float32
    model, names = load_model(box)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    transcoders = io.load(box / kind, device, wide, lazy=False)
    return ReplacementModel(model.to(device=device, dtype=dtype), transcoders, names, labels=load_labels(kind, box))


def load_model(box: Path = BOX) -> tuple[Any, Names]:
    """(the transformers model in float32, its tokenizer)."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(box))
    held = {name: t.float() for name, t in load_file(box / "model.safetensors").items()}
    held["lm_head.weight"] = held["model.embed_tokens.weight"]
    model.load_state_dict(held)
    return model.eval(), Names(Facts.load(box / "facts.json").words())


def load_labels(kind: str, box: Path = BOX) -> dict[tuple[int, int], str]:
    """(layer, feature) to what it stands for."""
    held = json.loads((box / "labels.json").read_text(encoding="utf-8"))[kind]
    return {(layer, int(f)): name for layer, names in enumerate(held) for f, name in names.items()}


def save_labels(labels: dict[str, dict[tuple[int, int], str]], depth: int, box: Path) -> None:
    """labels: by kind of transcoder."""
    held = {
        kind: [{str(f): name for (at, f), name in sorted(named.items()) if at == layer} for layer in range(depth)]
        for kind, named in labels.items()
    }
    (box / "labels.json").write_text(json.dumps(held, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def digests(box: Path) -> dict[str, str]:
    """sha256 of every file of the box but their list."""
    files = sorted(p for p in box.rglob("*") if p.is_file() and p.name != SUMS)
    return {p.relative_to(box).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def seal(box: Path) -> None:
    """Write down the sums, in the form that sha256sum checks."""
    (box / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in digests(box).items()))


def verify(box: Path = BOX) -> None:
    """Every file is the one that was committed."""
    if not (box / SUMS).is_file():
        raise FileNotFoundError(f"load: the box must be installed with the package, got no {SUMS}; reinstall pycircuit")
    lines = (line.split("  ", 1) for line in (box / SUMS).read_text().splitlines())
    written = {name: digest for digest, name in lines}
    found = digests(box)
    wrong = sorted(name for name in written | found if written.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"load: files of the box must be as committed, got others: {', '.join(wrong)}; reinstall it")
