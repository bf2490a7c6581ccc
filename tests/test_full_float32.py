"""float32 stays float32 in traces, whatever precision the user sets in torch, and the user's settings stay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import builders
import pytest
import torch
from builders import replacement

import pycircuit as pc
from pycircuit.ops.torch_settings import full_float32
from pycircuit.trace.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
MATMULS = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul] if NEW else []


@pytest.fixture(autouse=True)
def default_settings() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    if NEW:
        torch.backends.fp32_precision = "none"
        for setting in MATMULS:
            setting.fp32_precision = "none"


def settings() -> list[Any]:
    """Every setting as torch reports it, "mixed" where its two interfaces disagree."""
    values: list[Any] = [torch.backends.fp32_precision, *(s.fp32_precision for s in MATMULS)] if NEW else []
    for read in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            values.append(read())
        except RuntimeError:
            values.append("mixed")
    return values


def lowered() -> bool:
    if NEW:
        return any(s.fp32_precision not in ("none", "ieee") for s in MATMULS)
    return torch.get_float32_matmul_precision() != "highest"


def set_precision(interface: str) -> None:
    if interface in ("high", "medium"):
        torch.set_float32_matmul_precision(interface)
    elif interface == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif interface == "matmul":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.fp32_precision = "tf32"


INTERFACES = ["high", "medium", "allow_tf32", *(["matmul", "general"] if NEW else [])]


@pytest.mark.parametrize("interface", INTERFACES)
def test_settings_are_restored(interface: str) -> None:
    set_precision(interface)
    before = settings()
    assert lowered()
    with pytest.raises(KeyError), full_float32():
        assert not lowered()
        raise KeyError
    assert settings() == before
    if interface == "general":  # which stays the setting of all
        torch.backends.fp32_precision = "ieee"
        assert not lowered()


@pytest.mark.parametrize("interface", INTERFACES)
def test_a_trace_runs_in_full_float32(interface: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tile = replacement("llama", "plt", torch.float32), Sweep.tile
    lowered_in_tiles = []

    def watched(*args: Any) -> Any:
        lowered_in_tiles.append(lowered())
        return tile(*args)

    monkeypatch.setattr(Sweep, "tile", watched)
    expected = pc.attribute(model, builders.prompt(5), max_targets=2, progress=False)
    set_precision(interface)
    graph = pc.attribute(model, builders.prompt(5), max_targets=2, progress=False)
    assert lowered() and lowered_in_tiles and not any(lowered_in_tiles)
    assert torch.equal(graph.dense(), expected.dense())


def test_torch_without_a_setting_for_each_device() -> None:
    """As before 2.9; in a process of its own, whose torch loses the newer settings."""
    script = """
import torch
from pycircuit.ops import torch_settings
torch_settings._MatmulSetting.backends = staticmethod(lambda: [])
torch.set_float32_matmul_precision("medium")
with torch_settings.full_float32():
    assert torch.get_float32_matmul_precision() == "highest"
assert torch.get_float32_matmul_precision() == "medium"
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
