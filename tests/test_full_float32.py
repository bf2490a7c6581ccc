"""float32 stays float32 in traces, whatever the user asks of torch, and the user's settings are left as they were."""

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
def as_at_first() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    if NEW:
        torch.backends.fp32_precision = "none"
        for setting in MATMULS:
            setting.fp32_precision = "none"


def settings() -> list[Any]:
    """All that torch would answer, an error for a way that must not be used beside the other."""
    words: list[Any] = [torch.backends.fp32_precision, *(s.fp32_precision for s in MATMULS)] if NEW else []
    for question in (torch.get_float32_matmul_precision, lambda: torch.backends.cuda.matmul.allow_tf32):
        try:
            words.append(question())
        except RuntimeError:
            words.append("mixed")
    return words


def lowered() -> bool:
    if NEW:
        return any(s.fp32_precision not in ("none", "ieee") for s in MATMULS)
    return torch.get_float32_matmul_precision() != "highest"


def ask(way: str) -> None:
    if way in ("high", "medium"):
        torch.set_float32_matmul_precision(way)
    elif way == "allow_tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif way == "matmul":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    else:
        torch.backends.fp32_precision = "tf32"


WAYS = ["high", "medium", "allow_tf32", *(["matmul", "general"] if NEW else [])]


@pytest.mark.parametrize("way", WAYS)
def test_settings_come_back(way: str) -> None:
    ask(way)
    before = settings()
    assert lowered()
    with pytest.raises(KeyError), full_float32():
        assert not lowered()
        raise KeyError
    assert settings() == before
    if way == "general":  # which stays the setting of all
        torch.backends.fp32_precision = "ieee"
        assert not lowered()


@pytest.mark.parametrize("way", WAYS)
def test_a_trace_runs_in_full(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, tile = replacement("llama", "plt", torch.float32), [], Sweep.tile

    def watched(*args: Any) -> Any:
        seen.append(lowered())
        return tile(*args)

    monkeypatch.setattr(Sweep, "tile", watched)
    truth = pc.attribute(model, builders.prompt(5), max_targets=2, progress=False)
    ask(way)
    graph = pc.attribute(model, builders.prompt(5), max_targets=2, progress=False)
    assert lowered() and seen and not any(seen)
    assert torch.equal(graph.dense(), truth.dense())


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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
