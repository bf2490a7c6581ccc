"""Memory of the pretended device: free memory, plans, and a tile that runs out of memory."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import builders
import pytest
import torch
from builders import transcoders
from gpu_models import compare, language_model, replacement_model
from pretended_cuda import FREE_BYTES, Counts

import pycircuit as pc
from pycircuit.ops import checks
from pycircuit.trace import memory_plan
from pycircuit.trace.collect import RowCollector
from pycircuit.trace.memory_model import TraceSize
from pycircuit.trace.memory_plan import Bound, MemoryBoundError
from pycircuit.trace.row_store import RowStore
from pycircuit.trace.sweep import Sweep

GIB = 1 << 30
PROMPT = builders.prompt(9)
OPTIONS: dict[str, Any] = {"max_targets": 2, "max_features": 20, "progress": False}
# 6 GB of dense rows; packed, as half of the entries, about as much.
SIZE = TraceSize(
    positions=128, features=200_000, rows=7_500, entries=750_000_000, layers=3, ranked=True, batch=900, busiest=80_000
)


def test_memory_that_torch_reserves_but_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 2 * GIB)
    assert memory_plan.free_bytes(torch.device("cuda", 0)) == FREE_BYTES + 5 * GIB


@pytest.mark.parametrize(
    ("device_bytes", "host_bytes", "entries", "dense", "ranked_on_device", "all_entries"),
    [
        (9, 64, 750, True, False, True),
        (3, 64, 750, False, False, True),
        (4, 64, 150, False, True, True),
        (9, 3, 750, False, True, False),
        (2, 3, 750, False, False, False),
    ],
    ids=["dense", "ranked by the host", "packed on both", "cut for the host", "cut for the host, which ranks"],
)
def test_host_and_device_have_a_bound_each(
    device_bytes: int, host_bytes: int, entries: int, dense: bool, ranked_on_device: bool, all_entries: bool
) -> None:
    """entries: of all rows, in millions."""
    trace, bound = replace(SIZE, entries=entries * 1_000_000), Bound(device_bytes * GIB, False, host_bytes * GIB)
    chosen = memory_plan.plan_memory(replacement_model("llama", "plt", "cuda"), trace, bound)
    assert (chosen.dense, chosen.ranked_on_device, chosen.keep is None) == (dense, ranked_on_device, all_entries)


def test_a_host_that_is_too_small_is_named() -> None:
    with pytest.raises(MemoryBoundError, match=r"16\.0 MiB of the host must hold 7500 packed rows"):
        memory_plan.plan_memory(replacement_model("llama", "plt", "cuda"), SIZE, Bound(40 * GIB, False, 1 << 24))


IN_TILE, BEFORE_IT = (Sweep, "tile"), (RowStore, "next_block")


@pytest.mark.parametrize(
    ("message", "method"),
    [
        ("Triton Error [CUDA]: out of memory", IN_TILE),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", IN_TILE),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", IN_TILE),
        ("CUDA out of memory. Tried to allocate 7 bytes", BEFORE_IT),
    ],
    ids=["triton", "cublas", "cublas at first", "torch, before the tile"],
)
def test_out_of_memory_halves_the_tile(message: str, method: tuple[type, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of the failed tile are freed by then."""
    truth = pc.attribute(replacement_model("llama", "plt", "cpu"), PROMPT, **OPTIONS)
    gpu_model = replacement_model("llama", "plt", "cuda")
    working, alive, shrink, run = [], [], RowCollector._shrink, getattr(*method)

    def scarce(*args: Any) -> Any:
        count = args[1] if method[1] == "next_block" else len(args[1])
        state = torch.ones(8, device="cuda")
        working.append(weakref.ref(state))
        if count > 4:
            raise RuntimeError(message)
        return run(*args)

    def shrunk(*args: Any) -> None:
        monkeypatch.setattr(*method, run)
        alive.append(working[-1]() is not None)
        shrink(*args)
        monkeypatch.setattr(*method, scarce)

    monkeypatch.setattr(RowCollector, "_shrink", shrunk)
    monkeypatch.setattr(*method, scarce)
    compare(pc.attribute(gpu_model, PROMPT, **OPTIONS), truth)
    assert alive and not any(alive)


def test_half_precision_without_a_kernel_is_refused() -> None:
    halves = transcoders("plt", torch.float16)
    with pytest.raises(TypeError, match=r"layer 0: w_enc must be float32 or bfloat16 on a GPU.*got float16; use"):
        pc.ReplacementModel(language_model("llama", "cuda"), halves.to("cuda"))
    pc.ReplacementModel(language_model("llama", "cpu"), halves)


def test_facts_of_a_tensor_are_remembered_by_question(counts: Counts) -> None:
    offsets = torch.tensor([0, 3, 5], device="cuda")
    for _ in range(2):
        assert checks.offsets("op", "offsets", offsets)[1:] == (5, 3)
        checks.bounded("op", "offsets", offsets, 0, 6, "below 6")
        with pytest.raises(ValueError, match="below 5, got 5"):
            checks.bounded("op", "offsets", offsets, 0, 5, "below 5")
    assert sum(counts.synchronisations.values()) == 2 + 2 * 2  # each error looks up the entry that it names


def test_thresholds_are_looked_at_once(counts: Counts) -> None:
    x, w, b = (torch.ones(*shape, device="cuda") for shape in ((2, 4), (3, 4), (3,)))
    rule = pc.JumpReLU(torch.tensor([0.5, 9.0, 1.0], device="cuda"))
    for waits in (1, 0):
        counts.clear()
        assert pc.ops.encode(x, w, b, rule).count == 4
        assert sum(n for where, n in counts.synchronisations.items() if "checks" in where) == waits
    with pytest.raises(ValueError, match="must not hold NaN, got 1 of them"):
        pc.ops.encode(x, w, b, pc.JumpReLU(torch.tensor([0.5, torch.nan, 1.0], device="cuda")))
