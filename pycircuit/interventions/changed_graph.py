"""The graph of a prompt under interventions: what the model computes once features have other activations.

1. The prompt runs with the interventions, and nothing keeps the value it had: attention patterns, norms and MLPs are
   those of the changed run.
2. A changed feature has the activation that it was given. What an MLP writes is then its features, the changed ones
   included, and an error that makes the sum exact, so that the conservation law holds for every row.
3. A changed feature has no row: nothing in the prompt causes its activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pycircuit.graph import Graph
from pycircuit.labels.automatic import Labels, add_labels, check_labels
from pycircuit.model.prompts import Prompt
from pycircuit.model.replacement import LocalReplacement, ReplacementModel, check_model
from pycircuit.model.transcoder_hooks import transcoder_hooks
from pycircuit.ops import SparseFeatures
from pycircuit.ops.torch_settings import full_float32, without_autocast
from pycircuit.progress import Progress, Report
from pycircuit.trace.attribute import trace_frozen
from pycircuit.trace.precision import Precision
from pycircuit.trace.targets import TargetList
from pycircuit.trace.trace_options import MaxFeatures

from .intervention import Intervention, checked_interventions, checked_positions
from .intervention_run import run_baseline
from .steering import FeatureChanges, Steering, changes_by_layer

OP = "attribute_changed"
KEY = "interventions"  # in the provenance: [layer, position, feature, activation] of every changed feature


@without_autocast()
@full_float32()
def attribute_changed(
    model: ReplacementModel,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    *,
    targets: TargetList = None,
    max_features: MaxFeatures = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    precision: Precision = "float32",
    progress: bool | Report = True,
    labels: Labels = True,
) -> Graph:
    """Return the graph of a prompt whose features are set, scaled or ablated, to compare with the graph without.

    It is the graph of the changed run: attention patterns, norms and all other features are those that follow from the
    interventions, as with `freeze="none"` in `pc.intervene`. A changed feature is a node with its new activation and
    without a row; one that is ablated is no node. The other arguments are those of `pc.attribute`.
    """
    check_model(OP, model)
    check_labels(OP, labels)
    checked = checked_interventions(OP, "interventions", interventions, model)
    if not checked:
        raise ValueError(f"{OP}: interventions must have at least one entry, got none")
    line = Progress(progress)
    try:
        local, changed = _freeze_changed(model, model.tokens(prompt), checked)
        graph = trace_frozen(
            model, local, targets=targets, max_features=max_features, position=position, probability=probability,
            max_targets=max_targets, precision=precision, progress=line,
        )  # fmt: skip
        graph = _without_rows(graph, changed)
        graph.provenance[KEY] = [[*key, value] for key, value in changed.items()]
        if labels is not False and not graph.provenance["interrupted"]:
            add_labels(model, graph, labels, line)
        return graph
    finally:
        line.close()


Changed = dict[tuple[int, int, int], float]  # activation by (layer, position, feature)


def _freeze_changed(
    model: ReplacementModel, ids: Tensor, interventions: tuple[Intervention, ...]
) -> tuple[LocalReplacement, Changed]:
    """Run and freeze the prompt under interventions; return it with the changed features."""
    count, depth = len(ids), model.depth
    placed = [
        (0, position, intervention)
        for intervention in interventions
        for position in checked_positions(OP, intervention, count, count, model.ignore_positions)
    ]
    with model.forward_lock:
        baseline = run_baseline(model, ids, patterns=False)
        changes = changes_by_layer(placed, baseline.state.final)
        steering = Steering(model.transcoders, changes, baseline.original, range(0), range(depth))
        transcoders = model.transcoders
        with transcoder_hooks(
            model.hf_model, model.family, model.weights, transcoders.reads, transcoders.writes, steering.read,
            steering.write,
        ):  # fmt: skip
            local = model.freeze(ids)
    changed: Changed = {}
    features = list(local.features)
    for layer, change in changes.items():
        value = change.value + change.factor * baseline.original(layer, change, baseline.state.final)
        features[layer] = _with_values(local.features[layer], change, value, transcoders.size(layer))
        position = change.position[change.place()].tolist()
        for key in zip(position, change.index.tolist(), value.tolist(), strict=True):
            changed[layer, key[0], key[1]] = key[2]
    errors = local.errors.clone()
    transcoders.add_to(errors, local.features, local.reads, local.ignore_positions)
    transcoders.add_to(errors, features, local.reads, local.ignore_positions, sign=-1.0)
    if not bool(errors.isfinite().all()):
        raise ValueError(f"{OP}: interventions must leave the stream finite, got an overflow; lower value or factor")
    return replace(local, features=tuple(features), errors=errors), changed


def _with_values(features: SparseFeatures, change: FeatureChanges, value: Tensor, size: int) -> SparseFeatures:
    """Return the features of a layer with these activations in place of their own; none where it is zero."""
    own = features.position() * size + features.index
    new = change.position[change.place()] * size + change.index
    unchanged = ~torch.isin(own, new)
    active = value != 0
    key = torch.cat([own[unchanged], new[active]])
    order = key.argsort()
    key, values = key[order], torch.cat([features.value[unchanged], value[active].to(features.value)])[order]
    counts = torch.bincount(key // size, minlength=len(features.row_ptr) - 1)
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(features.row_ptr)
    return SparseFeatures(row_ptr, (key % size).to(features.index), values)


def _without_rows(graph: Graph, changed: Changed) -> Graph:
    """Return the graph without the rows of the changed features."""
    nodes = {tuple(key): node for node, key in enumerate(graph.features.tolist())}
    cut = torch.tensor([nodes[key] for key in changed if key in nodes], dtype=torch.int64)
    keep = ~torch.isin(graph.row_node, cut)
    if bool(keep.all()):
        return graph
    entries = keep.repeat_interleave(graph.rows.row_ptr.diff())
    names = ("row_node", "bias", "preactivation", "dropped", "dropped_mass", "product_norm")
    fields = {name: getattr(graph, name)[keep] for name in names}
    return replace(graph, rows=graph.rows.select(entries.numpy(), keep.numpy()), **fields)
