"""Tests of the drop-in for circuit-tracer: arguments and models that it rejects."""

from __future__ import annotations

from typing import Any

import pair
import pytest
import torch
from drop_in_cases import ACTIVE, SETTINGS, ids, made, plain, same
from torch import Tensor

from pycircuit.integrations import circuit_tracer as drop_in
from pycircuit.integrations.circuit_tracer import (
    accelerate,
    attribute,
    edge_rows,
)
from pycircuit.trace import MemoryBoundError

# What is refused


def test_refusals() -> None:
    model, none = plain("lens llama"), torch.tensor([], dtype=torch.long)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "batch_size must be at least 1", {"batch_size": 0}),
        (TypeError, "batch_size must be an int", {"batch_size": 1.5}),
        (ValueError, "update_interval must be at least 1", {"update_interval": 0}),
        (ValueError, "max_feature_nodes must be zero or positive", {"max_feature_nodes": -1}),
        (ValueError, "offload must be 'cpu', 'disk' or None", {"offload": "gpu"}),
        (ValueError, "vec must have shape", {"attribution_targets": [("x", 1.0, torch.ones(3))]}),
        (ValueError, "cannot be empty", {"attribution_targets": []}),
        (
            ValueError,
            r"must leave a target, got tensor\(\[\]",
            {"attribution_targets": none},
        ),
        (ValueError, "must leave a target, got None and 0", {"max_n_logits": 0}),
    ]
    for kind, message, settings in cases:
        with pytest.raises(kind, match=message):
            attribute(ids(), model, **settings)
    with pytest.raises(TypeError, match="model must be a circuit_tracer"):
        attribute(ids(), torch.nn.Linear(2, 2))


def test_an_unknown_activation_or_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("lens llama", "plt")
    monkeypatch.setattr(model.transcoders, "feature_input_hook", "hook_resid_post")
    with pytest.raises(ValueError, match=r"feature_input_hook .* 'hook_resid_post'"):
        attribute(ids(), model)
    monkeypatch.undo()
    model.transcoders[1].activation_function = torch.nn.GELU()
    with pytest.raises(TypeError, match=r"got torch\.nn\..*GELU in layer 1"):
        attribute(ids(), model)


class TopK(torch.nn.Module):
    """As another library's: the same name, another rule."""

    k = ACTIVE

    def forward(self, x: Tensor) -> Tensor:
        value, index = x.topk(self.k)
        return torch.zeros_like(x).scatter_(-1, index, (value - 1).relu())


def test_an_activation_is_not_known_by_its_name() -> None:
    model = made("lens llama", "plt")
    model.transcoders[2].activation_function = TopK()
    with pytest.raises(
        TypeError, match=r"circuit-tracer's JumpReLU or TopK, got .*test_drop_in_arguments\.TopK in layer 2"
    ):
        attribute(ids(), model)


def test_a_threshold_of_any_shape() -> None:
    model = made("lens llama", "plt")
    with torch.no_grad():
        for transcoder, shape in zip(model.transcoders, ((-1,), (1, -1), (-1,)), strict=True):
            rule = transcoder.activation_function
            rule.threshold = torch.nn.Parameter(rule.threshold.reshape(shape))
    same(pair.by(attribute, model, ids(), **SETTINGS), pair.trace_circuit_tracer(model, ids(), **SETTINGS))


def test_their_matrix_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_rows, "free_bytes", lambda _: 1000)
    with pytest.raises(MemoryBoundError, match="lower max_feature_nodes"):
        attribute(ids(), plain("lens llama"))


def test_without_circuit_tracer_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in.generations, "find_spec", lambda _: None)
    for call in (lambda: attribute(ids(), None), accelerate):
        with pytest.raises(ImportError, match="pip install circuit-tracer"):
            call()
