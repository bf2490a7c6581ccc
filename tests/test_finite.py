"""Errors for NaN and overflow in weights and directions, before the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import transcoders
from safetensors.torch import save_file

import pycircuit as pc
from pycircuit.trace.sweep import Sweep

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")
LAYER = 1


def model_with(weights: Any, dtype: torch.dtype = torch.float32) -> pc.ReplacementModel:
    return pc.ReplacementModel(builders.build("llama", dtype), weights)


def active_feature(kind: str) -> int:
    return int(model_with(transcoders(kind, torch.float32)).freeze(builders.prompt()).features[LAYER].index[0])


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a sweep begins."""

    def begun(*_: Any) -> None:
        pytest.fail("the sweep began")

    monkeypatch.setattr(Sweep, "tile", begun)


CASES = [
    ("plt", "w_dec", NAN, "what is written to layer 1 must be finite .* decoder row of layer 1 feature {feature};"),
    ("clt", "w_dec", INF, "what is written to layer 1 must be finite .* decoder row of layer 1 feature {feature};"),
    ("clt", "w_dec", 3e38, "what is written to layer 1 must be finite .* decoder row of layer 1 feature {feature};"),
    ("plt", "w_enc", NAN, "encode: layer 1: pre-activations must not be NaN, .* feature {feature};"),
    ("plt", "w_enc", 1e38, "activations of layer 1 must be finite .* encoder row or bias of feature {feature}, at"),
    ("clt", "b_enc", INF, "activations of layer 1 must be finite .* encoder row or bias of feature {feature}, at"),
    ("plt", "b_dec", NAN, "what is written to layer 1 must be finite .* from b_dec of layer 1;"),
    ("plt_skip", "w_skip", NAN, "what is written to layer 1 must be finite .* from w_skip of layer 1;"),
    ("plt_skip", "w_skip", 3e38, "what is written to layer 1 must be finite .* features, bias and skip;"),
]


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize(("kind", "name", "value", "message"), CASES, ids=[f"{c[0]}-{c[1]}-{c[2]}" for c in CASES])
def test_weights_are_refused_before_the_sweep(kind: str, name: str, value: float, message: str) -> None:
    weights, feature = transcoders(kind, torch.float32), active_feature(kind)
    getattr(weights, name)[LAYER][feature if name in ("w_enc", "b_enc", "w_dec") else 3] = value
    with pytest.raises(ValueError, match=message.format(feature=feature)):
        pc.attribute(model_with(weights), builders.prompt(), progress=False)


@pytest.mark.usefixtures("no_sweep")
def test_rows_in_a_file_are_refused_before_the_sweep(tmp_path: Path) -> None:
    weights, feature = transcoders("plt", torch.float32), active_feature("plt")
    weights.w_dec[LAYER][feature, 3] = INF
    save_file({"w_dec": weights.w_dec[LAYER]}, tmp_path / "d.safetensors")
    weights.w_dec[LAYER] = pc.ops.FileRows.safetensors(tmp_path / "d.safetensors", "w_dec")
    with pytest.raises(ValueError, match=f"decoder row of layer 1 feature {feature};"):
        pc.attribute(model_with(weights), builders.prompt(), progress=False)


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize("vector", [torch.full((32,), 3e38), torch.full((32,), 1e300, dtype=torch.float64)])
def test_directions_are_refused_before_the_sweep(vector: torch.Tensor) -> None:
    model = model_with(transcoders("plt", torch.float32))
    with pytest.raises(ValueError, match=r"target .away. must have a direction whose product .* fits float32"):
        pc.attribute(model, builders.prompt(), targets=[("away", 1.0, vector)], progress=False)


def test_weights_of_silent_features_may_be_anything() -> None:
    weights = transcoders("plt", torch.float32)
    silent = set(range(24)) - set(model_with(weights).freeze(builders.prompt()).features[LAYER].index.tolist())
    weights.w_dec[LAYER][sorted(silent)] = NAN
    assert silent and pc.attribute(model_with(weights), builders.prompt(), progress=False).certificate < 1e-5


def test_overflow_of_the_sweep_ends_with_the_tile_it_is_in() -> None:
    """Two skips that fit float32 multiply in the gradient to a number that does not."""
    weights, steps = transcoders("plt_skip", torch.float32), []
    for skip in weights.w_skip:
        skip.mul_(1e20)
    with pytest.raises(ValueError, match=r"the edges to target .* must be finite in float32, got (inf|-inf|nan) from "):
        pc.attribute(model_with(weights), builders.prompt(), progress=lambda *step: steps.append(step))
    assert [done for phase, done, _ in steps if phase == "sweep"] == [0]
