"""Helpers for tests of traces."""

from __future__ import annotations

from typing import Any

import builders
import pytest
import torch
from torch import Tensor

import pycircuit as pc
from pycircuit.model.replacement import LocalReplacement
from pycircuit.trace.estimate import sample_prompt
from pycircuit.trace.memory_model import TraceSize
from pycircuit.trace.sweep import Sweep
from pycircuit.trace.trace_options import MaxFeatures, TraceOptions


def same_graph(a: pc.Graph, b: pc.Graph) -> bool:
    """Compare two graphs bit for bit, timings aside."""
    tensors = ("features", "values", "row_node", "bias", "dropped", "preactivation")
    pairs = [(getattr(a, name), getattr(b, name)) for name in tensors]
    pairs += [(getattr(a.rows, name), getattr(b.rows, name)) for name in ("row_ptr", "column", "weight")]
    return all(torch.equal(x, y) for x, y in pairs)


def in_small_tiles(monkeypatch: pytest.MonkeyPatch, targets: int = 3) -> None:
    monkeypatch.setattr(Sweep, "fitting", lambda self, layer, *_: min(targets, len(layer)))


def expected_size(model: pc.ReplacementModel, ids: Any, max_features: MaxFeatures, max_targets: int = 10) -> TraceSize:
    """Return the size of a trace, extrapolated from the prompt's first positions."""
    options = TraceOptions.checked("estimate", model, None, max_features, -1, 0.95, max_targets, "float32", None)
    return sample_prompt(model, torch.as_tensor(ids), options).size(model, options)


def assert_agrees_with_reference(implementation: str, kind: str) -> None:
    """A trace by an implementation keeps the law and has the edges of plain PyTorch."""
    model, graphs = builders.replacement("llama", kind, torch.float32), {}
    for name in ("reference", implementation):
        with pc.use(name):
            graphs[name] = pc.attribute(model, builders.prompt(4), max_targets=2)
            assert pc.last_run().implementation == name
        assert graphs[name].certificate < 1e-5
    truth = graphs["reference"].dense()
    assert float((graphs[implementation].dense() - truth).norm() / truth.norm()) < 1e-5


def by_autograd(local: LocalReplacement, layer: list[int], position: list[int], vectors: Tensor) -> Tensor:
    """Return the rows by autograd: each target differentiated by a factor of one on every source."""
    model, features = local.model, local.features
    on_feature = [torch.ones(f.count, dtype=model.dtype, requires_grad=True) for f in features]
    on_error = torch.ones(len(features), model.positions, dtype=model.dtype, requires_grad=True)
    on_token = torch.ones(model.positions, dtype=model.dtype, requires_grad=True)
    stream = model.embeddings * on_token[:, None]
    if model.position_part is not None:
        stream = stream + model.position_part
    read = []
    for target_layer, block in enumerate(model.layers):
        attended = block.attention_out(stream)
        middle = stream if block.parallel else stream + attended
        norm = block.read_norm(local.transcoders.reads)
        read.append(middle if norm is None else norm.forward(middle))
        stream = stream + attended + _written(local, target_layer, on_feature, on_error, read[target_layer])
    read.append(model.final_norm.forward(stream))
    rows = []
    for t, (target_layer, target_position) in enumerate(zip(layer, position, strict=True)):
        sources = (*on_feature, on_error, on_token)
        target = vectors[t] @ read[target_layer][target_position]
        gradients = torch.autograd.grad(target, sources, retain_graph=True, allow_unused=True)
        full = [torch.zeros_like(s) if g is None else g for s, g in zip(sources, gradients, strict=True)]
        rows.append(torch.cat([f.flatten() for f in full]))
    return torch.stack(rows)


def _written(local: LocalReplacement, layer: int, on_feature: list[Tensor], on_error: Tensor, read: Tensor) -> Tensor:
    transcoders, out = local.transcoders, local.errors[layer] * on_error[layer][:, None]
    for source in transcoders.sources(layer):
        f = local.features[source]
        if f.count:
            strength = (f.value * on_feature[source])[:, None]
            out = out.index_add(0, f.position(), strength * transcoders.decoder(source, layer)[f.index])
    bias, skip = transcoders.bias(layer), transcoders.w_skip[layer]
    if bias is not None:
        out = out + torch.cat([torch.zeros(local.ignore_positions, len(bias)), bias.expand(len(out), -1)])[: len(out)]
    if skip is not None:
        out = out + read @ skip
    norm = local.model.layers[layer].write_norm(transcoders.writes)
    return out if norm is None else norm.forward(out)
