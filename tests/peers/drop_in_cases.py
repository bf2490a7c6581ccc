"""circuit-tracer models for tests of the drop-in, and comparisons of graphs."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from circuit_tracer import attribute as circuit_tracer_attribute
from circuit_tracer.graph import Graph
from torch import Tensor

from pycircuit.integrations.circuit_tracer import (
    attribute,
)

SIZE = pair.Size()


SIZES = {"gpt2": replace(SIZE, kv_heads=SIZE.heads)}  # of the others SIZE


KINDS = {
    "plt": pair.Kind(),
    "plt_topk_skip": pair.Kind(rule="topk", skip=True),
    "plt_normed": pair.Kind(reads="mlp_normed"),
    "plt_raw": pair.Kind(writes="mlp_raw"),
    "clt": pair.Kind(cross=True, reads="resid_mid"),
    "clt_relu_skip": pair.Kind(cross=True, reads="resid_mid", rule="relu", skip=True),
}


LAZY = {"": None, "lazy": (True, True), "lazy decoder": (False, True)}


FEW = pytest.mark.parametrize("where", ["lens llama", "nnsight llama"])


ROW = 1e-4


ACTIVE, POSITIONS, MOST = 6, 13, 60


SETTINGS = {"batch_size": 8, "update_interval": 2, "max_feature_nodes": MOST}


def made(where: str, kind: str, files: Path | None = None, lazy: str = "", dtype: torch.dtype = torch.float32) -> Any:
    backend, family = where.split()
    size = SIZES.get(family, SIZE)
    transcoders = pair.circuit_tracer_transcoders(
        KINDS[kind], pair.transcoder_weights(KINDS[kind], size, dtype, ACTIVE), size, dtype
    )
    if files is not None and LAZY[lazy] is not None:
        transcoders = pair.lazy_transcoders(transcoders, files / f"{where} {kind} {lazy}", *LAZY[lazy])
    language = pair.language_model(family, size, dtype)
    if backend == "nnsight":
        return pair.nnsight_of(language, transcoders, size)
    return pair.lens_of(family, language, transcoders, size, dtype)


@cache
def plain(where: str, kind: str = "plt") -> Any:
    return made(where, kind)


def ids() -> Tensor:
    return pair.prompt(POSITIONS, SIZE.vocabulary)


@cache
def both(where: str, kind: str = "plt") -> tuple[Graph, Graph]:
    """Theirs and ours, of 60 features."""
    model = plain(where, kind)
    return pair.trace_circuit_tracer(model, ids(), **SETTINGS), pair.by(attribute, model, ids(), **SETTINGS)


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two rows over the norm of circuit-tracer's; rows without edges must be zero in both."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    norm = theirs.norm(dim=1)
    assert not ours[norm == 0].any()
    return float(((ours - theirs).norm(dim=1)[norm > 0] / norm[norm > 0]).max())


def same(ours: Graph, theirs: Graph, close: float = ROW) -> None:
    """Every attribute of a graph: what is named or counted equal, what is measured close."""
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    for name in ("active_features", "selected_features", "input_tokens"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    for name in ("input_string", "logit_targets", "vocab_size", "scan", "n_pos", "cfg"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("activation_values", "logit_probabilities"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert off(ours.adjacency_matrix, theirs.adjacency_matrix) < close


def trace_by_circuit_tracer(model: Any, prompt: Tensor | None = None, **options: Any) -> Graph:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        return circuit_tracer_attribute(ids() if prompt is None else prompt, model, **options)
