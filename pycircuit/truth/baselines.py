"""Baselines of a set of transcoders: random ones, the model's own neurons, and the gradient of the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.model import ReplacementModel
from pycircuit.model.attention_choice import use_attention
from pycircuit.model.families import FamilyError
from pycircuit.model.hooks import Hooks
from pycircuit.model.weights import submodule
from pycircuit.ops import SparseFeatures, TopK
from pycircuit.trace.attribute import trace_frozen
from pycircuit.transcoders import CrossLayerTranscoder, PerLayerTranscoders, Transcoders


def random_transcoders(transcoders: Transcoders, active: list[float], seed: int = 0) -> Transcoders:
    """Transcoders of the same shape with random rows, as long as the originals, as many active at a token.

    active: features at a token, one number a layer. Biases and skips are the originals'.
    """
    generator = torch.Generator().manual_seed(seed)
    if not isinstance(transcoders, CrossLayerTranscoder | PerLayerTranscoders):
        raise TypeError(f"benchmark-truth: transcoders must be in memory, got {type(transcoders).__name__}")

    def drawn(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        direction = torch.randn(rows.shape, generator=generator)
        length = rows.norm(dim=-1, keepdim=True)
        return direction / direction.norm(dim=-1, keepdim=True) * length

    return type(transcoders)(
        [drawn(rows) for rows in transcoders.w_enc],
        [None if bias is None else torch.zeros_like(bias) for bias in transcoders.b_enc],
        [drawn(None if rows is None else _in_memory(rows)) for rows in transcoders.w_dec],
        transcoders.b_dec,
        [TopK(max(1, round(count))) for count in active],
        transcoders.w_skip,
        transcoders.reads,
        transcoders.writes,
    )


def _in_memory(rows: Any) -> Tensor:
    """Decoder rows as a tensor, wherever they are."""
    return rows if isinstance(rows, Tensor) else rows[torch.arange(rows.shape[0])]


class NeuronTranscoders(PerLayerTranscoders):
    """A gated MLP's own neurons on one prompt, as transcoders without any error.

    Feature position * neurons + neuron stands for that neuron at that position, with the sign that makes its
    activation there positive: its encoder row is the neuron's gradient there, its decoder row the neuron's own.
    """

    def __init__(self, model: ReplacementModel, reads: Tensor) -> None:
        mlps = [_gated_mlp(model, layer) for layer in range(model.depth)]
        signs, encoders, biases, decoders = [], [], [], []
        for layer, mlp in enumerate(mlps):
            value, gate, up = _neurons(mlp, reads[layer])
            sign = torch.where(value < 0, -1.0, 1.0)
            gate_slope, up_slope = _slopes(mlp, gate, up)
            rows = gate_slope[..., None] * mlp.gate_proj.weight + up_slope[..., None] * mlp.up_proj.weight
            rows *= sign[..., None]
            linear = (rows @ reads[layer][..., None])[..., 0]
            signs.append(sign)
            encoders.append(rows.flatten(0, 1))
            biases.append((sign * value - linear).flatten())
            decoders.append((sign[..., None] * mlp.down_proj.weight.T).flatten(0, 1))
        super().__init__(encoders, biases, decoders, reads="mlp_in", writes="mlp_out")
        self.mlps = mlps
        self.signs = signs

    def encode(self, layer: int, x: Tensor, ignore: int = 0) -> SparseFeatures:
        """The neurons' true values at each row of x, under the index of every position: [rows, width] -> features."""
        value = _neurons(self.mlps[layer], x)[0]
        copies = (value[:, None] * self.signs[layer]).flatten(1)
        row_ptr = (torch.arange(len(x) + 1) - ignore).clamp(min=0) * copies.shape[1]
        index = torch.arange(copies.shape[1]).repeat(max(0, len(x) - ignore))
        return SparseFeatures(row_ptr, index, copies[ignore:].flatten())

    def features(self, reads: Tensor, ignore: int) -> tuple[SparseFeatures, ...]:
        """Each position's own neurons, one entry a layer; none at the first `ignore` positions."""
        out = []
        for layer, mlp in enumerate(self.mlps):
            value = (self.signs[layer] * _neurons(mlp, reads[layer])[0])[ignore:]
            positions, neurons = self.signs[layer].shape
            row_ptr = (torch.arange(positions + 1) - ignore).clamp(min=0) * neurons
            out.append(SparseFeatures(row_ptr, torch.arange(ignore * neurons, positions * neurons), value.flatten()))
        return tuple(out)


def _gated_mlp(model: ReplacementModel, layer: int) -> Any:
    mlp: Any = submodule(_layers(model)[layer], model.family.mlp, model.family)
    if model.family.post_mlp_norm is not None or any(
        getattr(getattr(mlp, name, None), "bias", 1) is not None for name in ("gate_proj", "up_proj", "down_proj")
    ):
        raise FamilyError("benchmark-truth: neurons must be those of gated MLPs without biases or a norm after them")
    return mlp


def _layers(model: ReplacementModel) -> list[torch.nn.Module]:
    return list(submodule(model.hf_model, model.family.layers, model.family).children())


@torch.no_grad()
def _neurons(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(value, gate before its activation, up) of every neuron: [rows, neurons] each."""
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    return mlp.act_fn(gate) * up, gate, up


def _slopes(mlp: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of the neurons' values by their gates and by their ups."""
    with torch.enable_grad():
        gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
        by_gate, by_up = torch.autograd.grad((mlp.act_fn(gate) * up).sum(), [gate, up])
    return by_gate, by_up


def neuron_graph(
    model: ReplacementModel, prompt: str, target: int, max_features: int
) -> tuple[ReplacementModel, Graph]:
    """(the model with its neurons as features, its graph of a prompt)."""
    probe = ReplacementModel(
        model.hf_model,
        PerLayerTranscoders([None] * model.depth, [None] * model.depth, [None] * model.depth),
        model.tokenizer,
        model.ignore_positions,
    )
    reads = probe.freeze(prompt).reads
    assert reads is not None
    neurons = NeuronTranscoders(model, reads)
    own = ReplacementModel(model.hf_model, neurons, model.tokenizer, model.ignore_positions)
    local = probe.freeze(prompt)
    features = neurons.features(reads, model.ignore_positions)
    neurons.add_to(local.errors, features, reads, model.ignore_positions, sign=-1.0)
    local = replace(local, transcoders=neurons, features=features)
    return own, trace_frozen(own, local, targets=[target], max_features=max_features)


def answer_gradient(model: ReplacementModel, prompt: str, token: int) -> Tensor:
    """Gradient of the answer's centred logit by what every MLP writes, everything running: [layers, positions, width].

    The writes are those that the model's transcoders replace.
    """
    ids = model.tokens(prompt)
    family, path = model.family, model.family.mlp
    if model.transcoders.writes == "mlp_out" and family.post_mlp_norm is not None:
        path = family.post_mlp_norm
    layers = _layers(model)
    changes = [torch.zeros(len(ids), model.weights.width, requires_grad=True) for _ in layers]
    parameters = [p for p in model.hf_model.parameters() if p.requires_grad]
    with model.forward_lock, Hooks() as hooks, use_attention(model.hf_model, "eager"), torch.enable_grad():
        for layer, change in zip(layers, changes, strict=True):
            hooks.after(submodule(layer, path, family), _adding(change))
        for p in parameters:
            p.requires_grad_(False)
        try:
            logits = model.hf_model(input_ids=ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]
            gradients = torch.autograd.grad(logits[token] - logits.mean(), changes)
        finally:
            for p in parameters:
                p.requires_grad_(True)
    return torch.stack(gradients)


def _adding(change: Tensor) -> Callable[[Any, Any, Any], Any]:
    def hook(args: Any, kwargs: Any, out: Any) -> Any:
        return (out[0] + change, *out[1:]) if isinstance(out, tuple) else out + change

    return hook


def feature_gradients(model: ReplacementModel, graph: Graph, gradient: Tensor) -> Tensor:
    """Gradient times activation of each feature of a graph, on the answer: [features] float64."""
    out = torch.zeros(len(graph.features), dtype=torch.float64)
    transcoders = model.transcoders
    for layer in range(model.depth):
        nodes = (graph.features[:, 0] == layer).nonzero()[:, 0]
        if not len(nodes):
            continue
        position, index = graph.features[nodes, 1:].unbind(1)
        for written in range(layer, model.depth):
            if layer in transcoders.sources(written):
                rows = transcoders.decoder(layer, written)[index]
                out[nodes] += (rows * gradient[written, position]).sum(1).double()
    return out * graph.values.double()
