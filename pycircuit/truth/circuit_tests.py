"""Sufficiency and necessity of circuits: the answer with a circuit alone, without it, and without any feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph import Graph, Pruned
from pycircuit.interventions import Intervention, intervene_many
from pycircuit.model import ReplacementModel
from pycircuit.model.hooks import Hooks

from .baselines import NeuronTranscoders

Circuits = Mapping[str, np.ndarray]  # nodes by name


class Outcome(NamedTuple):
    """An answer's probability, and its logit less that of the strongest other token of the unchanged model."""

    probability: float
    margin: float


def circuits_of(pruned: Pruned, gradient: Tensor, size: int | None, seed: int) -> dict[str, np.ndarray]:
    """The pruned circuit, and as many features by gradient times activation and by chance.

    size: features of a circuit of the other set, for one of that size: the most influential; None: none such.
    """
    count = pruned.original.first_error
    nodes = pruned.node_mask[:count].nonzero()[:, 0].numpy()
    by_gradient = gradient.abs().argsort(descending=True, stable=True)[: len(nodes)].numpy()
    by_chance = np.random.default_rng(seed).permutation(count)[: len(nodes)]
    circuits = {"pruned": nodes, "gradient": by_gradient, "chance": by_chance}
    if size is not None:
        circuits["as many"] = pruned.influence[:count].argsort(descending=True, stable=True)[:size].numpy()
    return circuits


def outcomes(model: ReplacementModel, graph: Graph, token: int, circuits: Circuits) -> dict[str, Any]:
    """Outcomes of the model, without any active feature, and with and without each circuit; nothing is frozen."""
    count = graph.first_error
    masks = {"all": np.ones(count, bool), "none": np.zeros(count, bool)}
    for name, nodes in circuits.items():
        masks[f"only {name}"] = np.isin(np.arange(count), nodes)
        masks[f"without {name}"] = ~masks[f"only {name}"]
    run = _neuron_logits if isinstance(model.transcoders, NeuronTranscoders) else _feature_logits
    logits = dict(zip(masks, run(model, graph, list(masks.values())), strict=True))
    others = logits["all"].clone()
    others[token] = -torch.inf
    rival = int(others.argmax())
    return {
        "sizes": {name: len(nodes) for name, nodes in circuits.items()},
        **{name: list(_outcome(values, token, rival)) for name, values in logits.items()},
    }


def _outcome(logits: Tensor, token: int, rival: int) -> Outcome:
    share = float(logits.softmax(-1)[token])
    return Outcome(float(f"{share:.6g}"), float(f"{float(logits[token] - logits[rival]):.6g}"))


def _feature_logits(model: ReplacementModel, graph: Graph, masks: Sequence[np.ndarray]) -> list[Tensor]:
    """Logits of the last position with the features of each mask alone, the other active ones ablated."""
    places = graph.features.tolist()
    variants = [[_ablation(places[n]) for n in np.flatnonzero(~mask)] for mask in masks]
    changed = [variant for variant in variants if variant]
    ids = graph.tokens.ids
    results = intervene_many(
        model, ids, changed, freeze="none", summarize=lambda r: (r.logits_before[-1], r.logits[-1])
    )
    after = iter(results)
    return [next(after)[1] if variant else results[0][0] for variant in variants]


def _ablation(place: list[int]) -> Intervention:
    layer, position, feature = place
    return Intervention(layer, position, feature, value=0.0)


def _neuron_logits(model: ReplacementModel, graph: Graph, masks: Sequence[np.ndarray]) -> list[Tensor]:
    """`_feature_logits` for neurons, which are multiplied by the mask where they are."""
    neurons = model.transcoders
    assert isinstance(neurons, NeuronTranscoders)
    positions, width = neurons.signs[0].shape
    out = []
    for mask in masks:
        scale = torch.ones(model.depth, positions * width)
        removed = graph.features[torch.from_numpy(~mask)]
        scale[removed[:, 0], removed[:, 2]] = 0.0
        with model.forward_lock, Hooks() as hooks, torch.no_grad():
            handles = [
                mlp.down_proj.register_forward_pre_hook(_scaling(scale[layer].view(positions, width)))
                for layer, mlp in enumerate(neurons.mlps)
            ]
            try:
                logits = model.hf_model(input_ids=graph.tokens.ids[None], use_cache=False, logits_to_keep=1).logits
            finally:
                for handle in handles:
                    handle.remove()
            del hooks
        out.append(logits[0, -1])
    return out


def _scaling(scale: Tensor) -> Any:
    return lambda module, args: (args[0] * scale,)
