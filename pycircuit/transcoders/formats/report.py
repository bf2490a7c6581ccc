"""What a folder of transcoders holds, and what is wrong with it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .files import Stored
from .parts import Contents, Layer, Reader, describe

_SHOWN = 5


@dataclass(frozen=True)
class Report:
    """features: of each layer, None without a transcoder. bytes: of all tensors. warnings: one sentence each."""

    path: str
    format: str
    saw: str
    kind: str
    model: str | None
    reads: str
    writes: str
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
            f"format      {self.format} ({self.saw})",
            f"kind        {self.kind}{', with a skip' if self.skip else ''}",
            f"model       {self.model or 'not said'}",
            f"layers      {len(self.features)}{f', {absent} without a transcoder' if absent else ''}",
            f"features    {features}, width {self.width}",
            f"activation  {', '.join(rules)}",
            f"places      {self.reads} -> {self.writes}",
            f"stored as   {', '.join(self.dtypes)}, {self.bytes / 1e6:.1f} MB",
        ]
        return "\n".join([*lines, *(f"warning     {text}" for text in self.warnings)])


def report(format_name: str, saw: str, contents: Contents, weights: bool) -> Report:
    """weights: read all of them and look for what is wrong."""
    held = [layer.stored() for layer in contents.layers]
    kinds = Counter(str(t.dtype).removeprefix("torch.") for one in held for t in one.values())
    first = next(layer for layer in contents.layers if layer.w_enc is not None)
    assert first.w_enc is not None
    rules = [{"activation": "jumprelu"} if one.theta is not None else describe(one.rule) for one in contents.layers]
    return Report(
        path=str(contents.path),
        format=format_name,
        saw=saw,
        kind="cross-layer" if contents.cross else "per layer",
        model=contents.model,
        reads=contents.reads,
        writes=contents.writes,
        features=[one.size for one in contents.layers],
        width=first.w_enc.shape[0 if first.transposed else 1],
        activation=[rule for rule, one in zip(rules, contents.layers, strict=True) if one.w_enc is not None],
        skip=any(one.w_skip is not None for one in contents.layers),
        dtypes=dict(kinds),
        bytes=sum(t.bytes for one in held for t in one.values()),
        warnings=[w for at, one in enumerate(contents.layers) for w in _warnings(at, one)] if weights else [],
    )


def _warnings(at: int, layer: Layer) -> list[str]:
    if layer.w_enc is None:
        return []
    found = [f"layer {at}: {said}" for t in layer.stored().values() for said in _damage(t)]
    if found:
        return found
    reader = Reader(layer, None, None, True)
    w_enc, b_enc, rule = reader.w_enc(), reader.b_enc(), reader.rule()
    assert w_enc is not None and b_enc is not None
    silent = (w_enc == 0).all(1) & ~rule.active(b_enc.float()) if describe(rule)["activation"] != "topk" else None
    dead = _zero_rows(layer) if silent is None else _zero_rows(layer) | silent
    if bool(dead.any()):
        found.append(f"layer {at}: {int(dead.sum())} features are dead: they are never active or write nothing")
    twice = _twice(w_enc, b_enc)
    if twice:
        found.append(f"layer {at}: {len(twice)} features repeat another one's encoder, {_some(twice)}")
    return found


def _damage(stored: Stored) -> list[str]:
    bad = sum(int((~chunk.isfinite()).sum()) for chunk in stored.chunks()) if stored.shape else 0
    return [f"{stored} holds {bad} numbers that are NaN or infinite"] if bad else []


def _zero_rows(layer: Layer) -> Tensor:
    """Features that write nothing anywhere: [F]."""
    zero = [torch.cat([(chunk == 0).flatten(1).all(1) for chunk in plane.chunks()]) for plane in layer.planes()]
    return torch.stack(zero).all(0)


def _twice(w_enc: Tensor, b_enc: Tensor) -> list[int]:
    """Features whose encoder row and bias came before, bit by bit."""
    seen: set[bytes] = set()
    twice = []
    for at in range(len(w_enc)):
        row = torch.cat([w_enc[at], b_enc[at : at + 1]]).view(torch.uint8).numpy().tobytes()
        key = hashlib.blake2b(row, digest_size=16).digest()
        if key in seen:
            twice.append(at)
        seen.add(key)
    return twice


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
