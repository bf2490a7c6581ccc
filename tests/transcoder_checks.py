"""Comparison of transcoders: weights, activity, graphs."""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from random_transcoders import LAYERS, WIDTH, normal
from torch import Tensor

import pycircuit as pc
from pycircuit.transcoders.lazy import LazyRows


def dense(w: Any) -> Tensor:
    """A decoder, wherever it is."""
    return w.rows(torch.arange(w.shape[0])).to(w.dtype) if isinstance(w, LazyRows) else w


def assert_same(got: Any, expected: Any) -> None:
    """Every number, the activation's included."""
    assert type(got) is type(expected)
    assert (got.depth, got.reads, got.writes) == (expected.depth, expected.reads, expected.writes)
    for name in ("w_enc", "b_enc", "w_dec", "w_skip"):
        for layer, (a, b) in enumerate(zip(getattr(got, name), getattr(expected, name), strict=True)):
            assert (a is None) == (b is None), f"{name} of layer {layer}"
            assert a is None or torch.equal(dense(a), dense(b)), f"{name} of layer {layer}"
    for layer in range(got.depth):
        a, b = got.bias(layer), expected.bias(layer)
        assert a is b is None or torch.equal(a, torch.zeros_like(a) if b is None else b)


def assert_same_activity(got: Any, expected: Any) -> None:
    """Encode and decode, with pre-activations at the thresholds themselves."""
    g = torch.Generator().manual_seed(8)
    x = normal(g, LAYERS, 6, WIDTH, dtype=torch.float32)
    ours = [got.encode(layer, x[layer]) for layer in range(LAYERS)]
    theirs = [expected.encode(layer, x[layer]) for layer in range(LAYERS)]
    assert sum(f.count for f in theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.row_ptr, b.row_ptr) and torch.equal(a.index, b.index) and torch.equal(a.value, b.value)
    assert torch.equal(got.reconstruct(ours, x), expected.reconstruct(theirs, x))


def assert_same_graph(got: Any, expected: Any, family: str = "gemma2") -> None:
    """All of it, on a family with norms after the MLP and skips on the way."""
    model = builders.build(family)
    graphs = [
        pc.attribute(pc.ReplacementModel(model, t), builders.prompt(9), max_targets=2, labels=False)
        for t in (got, expected)
    ]
    assert len(graphs[1].features) > 10 and graphs[0].certificate < 1e-5
    assert torch.equal(graphs[0].features, graphs[1].features)
    assert torch.allclose(graphs[0].dense(), graphs[1].dense(), rtol=1e-6, atol=1e-6)


def assert_same_rule(got: Any, expected: Any, exact: bool) -> None:
    """Thresholds may have gone through a logarithm or another type."""
    assert type(got) is type(expected)
    if isinstance(got, pc.JumpReLU):
        assert torch.allclose(got.theta, expected.theta, rtol=0 if exact else 1e-6, atol=0)
    elif isinstance(got, pc.BatchTopK):
        assert got.threshold == expected.threshold if exact else got.threshold == pytest.approx(expected.threshold)
    else:
        assert got == expected
