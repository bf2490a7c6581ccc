"""Tensors on the pages of their files: dropped after use, unless somebody wrote to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pycircuit as pc
from pycircuit.bench import memory
from pycircuit.files import memory_maps
from pycircuit.transcoders.formats.stored_tensors import open_safetensors

LAYERS, FEATURES, WIDTH = 8, 4096, 512

SMAPS = Path("/proc/self/smaps")

pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux to see a process's memory")


def map_file(folder: Path, t: Tensor) -> Tensor:
    save_file({"t": t}, folder / "t.safetensors")
    return open_safetensors(folder / "t.safetensors")["t"].mapped()


def resident_kilobytes(t: Tensor) -> int:
    """The kB of a tensor's mapping that count to this process."""
    lines = iter(SMAPS.read_text().splitlines())
    for line in lines:
        ends = line.split(maxsplit=1)[0].split("-")
        if len(ends) == 2 and int(ends[0], 16) <= t.data_ptr() < int(ends[1], 16):
            return next(int(later.split()[1]) for later in lines if later.startswith("Rss:"))
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_go_and_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    t = torch.randn(1000, 300).to(dtype)
    mapped = map_file(tmp_path, t)
    assert torch.equal(mapped, t) and resident_kilobytes(mapped) > 500
    memory_maps.drop_resident_pages(mapped)
    assert resident_kilobytes(mapped) == 0
    assert torch.equal(mapped, t) and resident_kilobytes(mapped) > 500


def in_place(t: Tensor) -> None:
    t[700] = 5.0


def by_view(t: Tensor) -> None:
    t.detach()[700].fill_(5.0)


def as_parameter(t: Tensor) -> None:
    with torch.no_grad():
        torch.nn.Parameter(t)[700].fill_(5.0)


def in_inference_mode(t: Tensor) -> None:
    with torch.inference_mode():
        t[700] = 5.0


@pytest.mark.parametrize("inference", [False, True], ids=["mapped", "mapped-in-inference-mode"])
@pytest.mark.parametrize("write", [in_place, by_view, as_parameter, in_inference_mode])
def test_written_pages_stay(tmp_path: Path, write: Callable[[Tensor], None], inference: bool) -> None:
    t = torch.randn(1000, 300)
    with torch.inference_mode(inference):
        mapped = map_file(tmp_path, t)
        memory_maps.drop_resident_pages(mapped)
        assert resident_kilobytes(mapped) == 0
    write(mapped)
    write(t)
    memory_maps.drop_resident_pages(mapped)
    assert resident_kilobytes(mapped) > 0 and torch.equal(mapped, t)
    assert not torch.equal(open_safetensors(tmp_path / "t.safetensors")["t"].read(), t)


def test_tensors_without_a_file_are_left_alone() -> None:
    t = torch.ones(100_000)
    memory_maps.drop_resident_pages(t)
    assert bool((t == 1).all())


@pytest.mark.usefixtures("one_thread")
def test_encoders_are_held_one_layer_at_a_time(tmp_path: Path) -> None:
    size = FEATURES * WIDTH * 4
    g = torch.Generator().manual_seed(0)
    encoders = [torch.randn(FEATURES, WIDTH, generator=g) for _ in range(LAYERS)]
    biases, decoder = [torch.full((FEATURES,), -60.0)] * LAYERS, torch.zeros(FEATURES, WIDTH)
    pc.transcoders.save(
        pc.PerLayerTranscoders(encoders, biases, [decoder] * LAYERS, [torch.zeros(WIDTH)] * LAYERS), tmp_path / "set"
    )
    x = torch.randn(LAYERS, 4, WIDTH)
    pc.ops.encode(x[0], encoders[0], biases[0], pc.ReLU())  # what it needs itself is there
    before = memory.restart_peak()
    transcoders = pc.transcoders.load(tmp_path / "set")
    features = [transcoders.encode(layer, x[layer]) for layer in range(LAYERS)]
    assert before is not None
    assert (memory.peak() or 0) - before < 2 * size, f"{LAYERS} layers of {size} bytes"
    in_memory = pc.PerLayerTranscoders(encoders, biases, [decoder] * LAYERS)
    for layer in range(LAYERS):
        again = in_memory.encode(layer, x[layer])
        assert torch.equal(features[layer].index, again.index) and torch.equal(features[layer].value, again.value)
        assert features[layer].count > 0
