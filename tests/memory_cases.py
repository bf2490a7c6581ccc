"""Traces of many shapes within a memory bound, measured by the system; run as a script, in a process of its own.

Reads a list of cases as JSON and writes a JSON list of records: peaks are bytes above the process's own just before
`attribute`.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import builders
import torch

import pycircuit as pc
from pycircuit.bench import memory
from pycircuit.files.sizes import parse_bytes

LEAST = "least"  # the bound that a refusal names


@dataclass(frozen=True)
class Case:
    """memory: the bound in MiB, or LEAST."""

    family: str
    positions: int
    memory: float | str
    layers: int = 3
    width: int = 128
    heads: int = 4
    kv_heads: int = 4
    inner: int = 512
    vocabulary: int = 1024
    cross: bool = False
    skip: bool = False
    size: int = 1024
    active: int = 16
    reads: str = "mlp_in"
    max_features: int | Literal["all"] = 64
    dtype: str = "float32"
    checkpoint: bool = False
    precision: str = "float32"


def build(case: Case) -> pc.ReplacementModel:
    changes: dict[str, Any] = {
        "vocab_size": case.vocabulary, "hidden_size": case.width, "intermediate_size": case.inner,
        "num_hidden_layers": case.layers, "num_attention_heads": case.heads, "max_position_embeddings": 2048,
    }  # fmt: skip
    if case.family == "gpt2":
        changes = {"vocab_size": case.vocabulary, "n_embd": case.width, "n_layer": case.layers, "n_head": case.heads,
                   "n_positions": 2048, "n_inner": case.inner}  # fmt: skip
    elif case.family in ("llama", "gemma2"):
        changes |= {"num_key_value_heads": case.kv_heads, "head_dim": 32}
    if case.family == "gemma2":
        kinds = ("sliding_attention", "full_attention")
        changes |= {"layer_types": [kinds[n % 2] for n in range(case.layers)], "sliding_window": 64}
    dtype = getattr(torch, case.dtype)
    return pc.ReplacementModel(builders.build(case.family, dtype, **changes), transcoders(case, dtype))


def transcoders(case: Case, dtype: torch.dtype) -> Any:
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) / case.width**0.5).to(dtype)

    layers, size, width = range(case.layers), case.size, case.width
    slots = [(case.layers - n,) if case.cross else () for n in layers]
    kind = pc.CrossLayerTranscoder if case.cross else pc.PerLayerTranscoders
    return kind(
        [normal(size, width) for _ in layers], [normal(size) for _ in layers],
        [normal(size, *slots[n], width) for n in layers], [normal(width) for _ in layers],
        activation=pc.TopK(case.active), w_skip=[normal(width, width) for _ in layers] if case.skip else None,
        reads=case.reads,
    )  # fmt: skip


def refused(error: pc.MemoryBoundError) -> str:
    size = re.search(r"at least ([\d.]+ \w+)", str(error))
    assert size is not None
    return size[1]


def run(case: Case) -> dict[str, Any]:
    model, ids = build(case), torch.arange(case.positions) % case.vocabulary
    options: dict[str, Any] = {"max_features": case.max_features, "progress": False, "precision": case.precision}
    pc.attribute(model, ids[:8], max_features=4, progress=False, precision=case.precision)  # libraries allocate once
    bound, refusals = 4096 if case.memory == LEAST else int(float(case.memory) * 2**20), 0
    with TemporaryDirectory() as folder:
        options["checkpoint"] = folder if case.checkpoint else None
        while True:
            before = memory.restart_peak()
            try:
                graph = pc.attribute(model, ids, memory=bound, **options)
                break
            except pc.MemoryBoundError as error:
                assert refusals < 3, f"a bound that a refusal named was refused: {error}"
                bound, refusals = parse_bytes(refused(error)), refusals + 1
    peak = memory.peak()
    assert before is not None and peak is not None
    return {"case": asdict(case), "bound": bound, "peak": peak - before,
            "refusals": refusals, "certificate": graph.certificate}  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([run(Case(**case)) for case in json.loads(sys.argv[1])]))
