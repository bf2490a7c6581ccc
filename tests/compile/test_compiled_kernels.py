"""Every Triton kernel compiles for three generations of cards, under the oldest triton and the newest we allow.

No spills, and wgmma where it should be on compute 9.0, which configurations are chosen for. `make compile` runs this.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pycircuit.kernels.config import prune

from pycircuit.ops.registry import OPS

OLDEST = Path(__file__).parents[2] / "build/triton-3.6"  # put there by `make compile`
COLUMNS = ("registers", "spilled", "shared", "programs", "loads", "stores", "wgmma", "mma")
SHARED = {80: 163, 90: 227, 100: 227}  # KiB a block may take

# On compute 9.0: kernels whose loads and stores are 16 bytes a thread, and programs that must fit a multiprocessor.
# Rows of `influence` begin anywhere, so it loads 4 bytes a thread, 128 a warp.
WIDE_LOADS = (
    "encode.product",
    "encode.sample",
    "encode.kth",
    "decode",
    "edge_scores",
    "split",
    "norm_back",
    "attend_back",
)
WIDE_STORES = ("split", "norm_back", "spread", "attend_back")
PROGRAMS = {
    "encode.place": 8,
    "decode": 5,
    "edge_scores.one_each": 4,
    "split": 8,
    "norm_back": 8,
    "spread": 2,
    "attend_back short": 2,
    "influence.sum": 4,
    "influence.solve": 3,
    "influence.total": 2,
}

# Known exceptions, by triton and compute capability. Configurations are tuned on compute 9.0 alone.
LONG_ON_80 = [
    "attend_back long",
    "attend_back long 2 parts",
    "attend_back long window",
    "attend_back.pattern float32",
    "attend_back.pattern float32 window",
    "attend_back.pattern float32 softcap",
    "attend_back.pattern float32 softcap window",
]
SPILLED = {
    ("3.6", 80): LONG_ON_80,
    ("3.9", 80): [
        *LONG_ON_80,
        "attend_back short",
        "influence.solve",
        "influence.solve ordered",
    ],
    ("3.9", 100): ["encode.product float32 topk", "encode.product bfloat16 number", "encode.product bfloat16 topk"],
}
NOT_COMPILED = {("3.6", 100): ["encode.product bfloat16 x too"]}


def compiled(version: str, compute: int) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    if version == "3.6":
        environment["PYTHONPATH"] = str(OLDEST)
    command = [sys.executable, str(script), str(compute)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["triton"].startswith(version)
    return result["rows"]


def programs(row: dict[str, Any]) -> int:
    """Return how many programs fit a multiprocessor of compute 9.0 at a time: registers, shared memory, threads."""
    threads = 32 * row["warps"]
    registers = threads * -(-row["registers"] // 8) * 8  # given out in eights
    return min(65536 // registers, 228 * 1024 // (row["shared"] + 1024), 2048 // threads, 32)


@pytest.mark.parametrize("compute", [90, 80, 100])
@pytest.mark.parametrize("version", ["3.9", "3.6"])
def test_kernels_compile_without_spills(version: str, compute: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {f"{row['kernel']} {row['variant']}".strip(): row for row in compiled(version, compute)}
    assert {name.split()[0].split(".")[0] for name in rows} == {*OPS, "norm_back", "split", "spread"}
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert sorted(failed) == sorted(NOT_COMPILED.get((version, compute), [])), failed
    binaries = {name: {**row, "programs": programs(row)} for name, row in rows.items() if name not in failed}
    with capsys.disabled():
        print(f"\ntriton {version}, compute {compute}{'':>24}" + "".join(f"{c:>10}" for c in COLUMNS))
        for name, row in binaries.items():
            print(f"{name:<52}" + "".join(f"{row[c]:>10}" for c in COLUMNS))
    spilled = [name for name, row in binaries.items() if row["spilled"]]
    assert sorted(spilled) == sorted(SPILLED.get((version, compute), []))
    for name, row in binaries.items():
        assert row["registers"] <= 255, name
        assert row["shared"] <= SHARED[compute] * 1024, name
        if compute == 90:  # products on the newest units, of float32 in bfloat16 parts too, and never by mma.sync
            product = row["kernel"] in ("encode.product", "encode.sample", "edge_scores")
            assert (row["wgmma"] > 0) == (product or row["kernel"].startswith("attend_back")), name
            assert row["mma"] == 0, name
            assert row["loads"] == 128 or not name.startswith(WIDE_LOADS), name
            assert row["stores"] == 128 or not name.startswith(WIDE_STORES), name
            assert row["programs"] >= max((n for start, n in PROGRAMS.items() if name.startswith(start)), default=1), (
                name
            )


@pytest.mark.parametrize("op", OPS)
def test_chosen_configurations_are_in_the_pruned_space(op: str) -> None:
    module = importlib.import_module(f"pycircuit.kernels.{op}")
    assert prune(module.SPACE, module.needs, module.MAX_ACCUMULATORS) == module.SPACE
    assert set(module.HOPPER.values()) <= set(module.SPACE)
