"""Work around the arithmetic of a short trace, in calls: of torch's ops, of Python's functions, of checks."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import builders
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pycircuit as pc
from pycircuit.ops import SparseFeatures, checks, compound
from pycircuit.trace import trace_frozen
from pycircuit.trace.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "The capital of the state containing Dallas is"  # nine tokens
TORCH_OPS_OF_A_TILE, TORCH_OPS, PYTHON_CALLS = 600, 1_900, 25_000  # 442, 1,540 and 20,400 when this was written


class CountedOps(TorchDispatchMode):
    """Count of torch's ops, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_tiles(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> Iterator[None]:
    """Append the number of torch's ops of every tile to `counts`."""
    tile = Sweep.tile

    def counted(self: Sweep, *args: Any) -> torch.Tensor:
        with CountedOps() as ops:
            bias = tile(self, *args)
        counts.append(ops.count)
        return bias

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "tile", counted)
        yield


@pytest.fixture(scope="module")
def demo() -> pc.ReplacementModel:
    model = pc.load("demo")
    pc.attribute(model, PROMPT, progress=False)  # what is read once a process
    return model


def test_torch_ops_do_not_grow_with_the_targets(demo: pc.ReplacementModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []
    with counted_tiles(monkeypatch, tiles):
        graph = pc.attribute(demo, PROMPT, progress=False)
    assert graph.rows.count > 50 and max(tiles) < TORCH_OPS_OF_A_TILE
    with CountedOps() as ops:
        pc.attribute(demo, PROMPT, progress=False)
    assert ops.count < TORCH_OPS


def test_python_calls_of_a_short_trace(demo: pc.ReplacementModel) -> None:
    with cProfile.Profile() as profile:
        pc.attribute(demo, PROMPT, labels=False, progress=False)
    assert pstats.Stats(profile).total_calls < PYTHON_CALLS  # type: ignore[attr-defined]


def test_tiles_check_no_arguments(demo: pc.ReplacementModel) -> None:
    local = demo.freeze(PROMPT)
    sweep = Sweep(local)
    vectors = local.transcoders.w_enc[2][:4]
    with cProfile.Profile() as profile:
        sweep.rows([2] * 4, [1, 2, 3, 4], vectors)
    called = {(file, name) for file, _, name in pstats.Stats(profile).stats}  # type: ignore[attr-defined]
    modules = (checks.__file__, compound.__file__)
    assert {name for file, name in called if file in modules} <= {"known_offsets"}


def _broken_features(local: Any) -> dict[str, Any]:
    features = local.features[1]
    past_the_end = torch.full_like(features.index, local.transcoders.size(1))
    broken = SparseFeatures(features.row_ptr, past_the_end, features.value)
    return {"features": (local.features[0], broken, *local.features[2:])}


def _broken_errors(local: Any) -> dict[str, Any]:
    return {"errors": local.errors[:, :, 1:]}


def _broken_attention(local: Any) -> dict[str, Any]:
    layers = list(local.model.layers)
    pattern = layers[1].attention.pattern.transpose(1, 2)
    layers[1] = replace(layers[1], attention=replace(layers[1].attention, pattern=pattern))
    return {"model": replace(local.model, layers=tuple(layers))}


@pytest.mark.parametrize(
    "change, message",
    [
        (_broken_features, "edge_scores: features.index must be from 0 to below 24, the rows of w_dec, got 24"),
        (_broken_errors, "edge_scores: w_dec must have shape"),
        (_broken_attention, "attend_back: attention.pattern must be contiguous"),
    ],
)
def test_a_frozen_prompt_that_a_tool_broke_is_refused(change: Any, message: str) -> None:
    model = builders.replacement("llama", "plt", torch.float32)
    local = model.freeze(builders.prompt())
    with pytest.raises(ValueError, match=message):
        trace_frozen(model, replace(local, **change(local)))
