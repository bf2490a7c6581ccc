"""Every Triton kernel compiles for compute 9.0 in its chosen configuration: no spills, and wgmma where it should."""

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

COLUMNS = ("kernel", "variant", "warps", "stages", "registers", "spilled", "shared", "wgmma", "mma")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    script = Path(__file__).with_name("hopper.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_hopper_resources(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{'kernel':<16}{'variant':<36}" + "".join(f"{c:>10}" for c in COLUMNS[2:]))
        for row in rows:
            print(f"{row['kernel']:<16}{row['variant']:<36}" + "".join(f"{row[c]:>10}" for c in COLUMNS[2:]))
    assert {row["kernel"].split(".")[0] for row in rows} == {*OPS, "split"}
    for row in rows:
        name = f"{row['kernel']} {row['variant']}"
        assert row["registers"] <= 255, name
        assert row["spilled"] == 0, name
        assert row["shared"] <= 227 * 1024, name
        # Tensor cores for every product, of float32 in bfloat16 parts too, and never the older mma.sync.
        product = row["kernel"] in ("encode.product", "encode.sample", "edge_scores")
        assert (row["wgmma"] > 0) == (product or row["kernel"].startswith("attend_back")), name
        assert row["mma"] == 0, name


@pytest.mark.parametrize("op", OPS)
def test_chosen_configurations_are_in_the_pruned_space(op: str) -> None:
    module = importlib.import_module(f"pycircuit.kernels.{op}")
    assert prune(module.SPACE, module.needs, module.MOST) == module.SPACE
    assert set(module.HOPPER.values()) <= set(module.SPACE)
