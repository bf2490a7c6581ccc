"""Report of a folder of transcoders: its contents, and warnings about them."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pycircuit.transcoders.types import Reads, Writes

from .config_files import activation_config
from .contents import Contents, Layer
from .reader import LayerReader
from .stored_tensors import StoredTensor

_SHOWN_NUMBERS = 5


@dataclass(frozen=True)
class Report:
    """Contents of a folder of transcoders.

    features: of each layer, None without a transcoder. bytes: of all tensors. warnings: one sentence each.
    """

    path: str
    format: str
    evidence: str
    kind: str
    model: str | None
    reads: Reads
    writes: Writes
    features: list[int | None]
    width: int
    activation: list[dict[str, Any]]
    skip: bool
    dtypes: dict[str, int]
    bytes: int
    warnings: list[str] = field(default_factory=list)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        sizes = Counter(size for size in self.features if size is not None)
        absent = sum(size is None for size in self.features)
        features = ", ".join(f"{count} x {size}" for size, count in sizes.items())
        rules = Counter(" ".join(str(v) for v in rule.values()) for rule in self.activation)
        lines = [
            f"format      {self.format} ({self.evidence})",
            f"kind        {self.kind}{', with a skip' if self.skip else ''}",
            f"model       {self.model or 'not said'}",
            f"layers      {len(self.features)}{f', {absent} without a transcoder' if absent else ''}",
            f"features    {features}, width {self.width}",
            f"activation  {', '.join(rules)}",
            f"places      {self.reads} -> {self.writes}",
            f"stored as   {', '.join(self.dtypes)}, {self.bytes / 1e6:.1f} MB",
        ]
        return "\n".join([*lines, *(f"warning     {text}" for text in self.warnings)])


def report(format_name: str, evidence: str, contents: Contents, weights: bool) -> Report:
    """Report of these contents. weights: read all of them and look for damage."""
    tensors = [t for layer in contents.layers for t in layer.stored().values()]
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors)
    first = next(layer for layer in contents.layers if layer.w_enc is not None)
    assert first.w_enc is not None
    rules = [
        {"activation": "jumprelu"} if layer.theta is not None else activation_config(layer.rule)
        for layer in contents.layers
    ]
    return Report(
        path=str(contents.path),
        format=format_name,
        evidence=evidence,
        kind="cross-layer" if contents.cross else "per layer",
        model=contents.model,
        reads=contents.reads,
        writes=contents.writes,
        features=[layer.size for layer in contents.layers],
        width=first.w_enc.shape[0 if first.transposed else 1],
        activation=[rule for rule, layer in zip(rules, contents.layers, strict=True) if layer.w_enc is not None],
        skip=any(layer.w_skip is not None for layer in contents.layers),
        dtypes=dict(dtypes),
        bytes=sum(t.bytes for t in tensors),
        warnings=[w for i, layer in enumerate(contents.layers) for w in _warnings(i, layer)] if weights else [],
    )


def _warnings(index: int, layer: Layer) -> list[str]:
    if layer.w_enc is None:
        return []
    warnings = [f"layer {index}: {damage}" for t in layer.stored().values() for damage in _damage(t)]
    if warnings:
        return warnings
    reader = LayerReader(layer, None, None, True)
    w_enc, b_enc, rule = reader.w_enc(), reader.b_enc(), reader.rule()
    assert w_enc is not None and b_enc is not None
    silent = (
        (w_enc == 0).all(1) & ~rule.active(b_enc.float()) if activation_config(rule)["activation"] != "topk" else None
    )
    dead = _zero_rows(layer) if silent is None else _zero_rows(layer) | silent
    if bool(dead.any()):
        warnings.append(f"layer {index}: {int(dead.sum())} features are dead: they are never active or write nothing")
    repeated = _repeated(w_enc, b_enc)
    if repeated:
        warnings.append(f"layer {index}: {len(repeated)} features repeat another one's encoder, {_shown(repeated)}")
    return warnings


def _damage(stored: StoredTensor) -> list[str]:
    bad = sum(int((~chunk.isfinite()).sum()) for chunk in stored.chunks()) if stored.shape else 0
    return [f"{stored} holds {bad} numbers that are NaN or infinite"] if bad else []


def _zero_rows(layer: Layer) -> Tensor:
    """True for features that write nothing anywhere: [F]."""
    zero = [torch.cat([(chunk == 0).flatten(1).all(1) for chunk in plane.chunks()]) for plane in layer.planes()]
    return torch.stack(zero).all(0)


def _repeated(w_enc: Tensor, b_enc: Tensor) -> list[int]:
    """Features whose encoder row and bias equal an earlier one's, bit by bit."""
    seen: set[bytes] = set()
    repeated = []
    for feature in range(len(w_enc)):
        row = torch.cat([w_enc[feature], b_enc[feature : feature + 1]]).view(torch.uint8).numpy().tobytes()
        key = hashlib.blake2b(row, digest_size=16).digest()
        if key in seen:
            repeated.append(feature)
        seen.add(key)
    return repeated


def _shown(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN_NUMBERS])) + (", ..." if len(numbers) > _SHOWN_NUMBERS else "")
