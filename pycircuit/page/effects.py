"""Effects of an intervention from the page: probabilities, nodes against what the graph foretold, generated text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pycircuit.graph import Graph
from pycircuit.interventions import Intervened, generate, intervene
from pycircuit.interventions.graph_effects import RowReader
from pycircuit.interventions.steering import activations_at

from .change_request import ChangeRequest, FeatureChange
from .foretold import agreement, foretold_changes
from .graph_index import GraphIndex, finite, significant
from .node_ids import node_of
from .served_model import ServedModel

OP = "page"
_TOKENS = 10  # next tokens in an answer
_TOLERANCE = 0.02  # of the model's activations against the graph's, relative to the largest


def effects(served: ServedModel, index: GraphIndex, body: dict[str, Any], pinned: list[str]) -> dict[str, Any]:
    """Run the changes of a body, and return what they do beside what the graph foretold."""
    graph, model = index.graph, served.model
    request = ChangeRequest.of(graph, body)
    if graph.layers != model.depth:
        raise ValueError(f"{OP}: graph must be of the served model with {model.depth} layers, got {graph.layers}")
    ids = graph.tokens.ids.tolist()
    interventions = [change.intervention() for change in request.changes]
    result = intervene(model, ids, interventions, freeze=request.freeze)
    _require_same_features(graph, result)
    values, notes = _new_values(graph, request.changes)
    identifiers = list(dict.fromkeys([*pinned, *request.watched, *(f"target/{t}" for t in range(len(graph.targets)))]))
    nodes, agreed = _node_effects(index, result, values, identifiers, request.freeze != "all")
    before, after = _probabilities(served, result)
    return {
        "before": before, "after": after, "nodes": nodes, "agreement": agreed,
        "text": _texts(served, ids, request) if request.generate else None, "notes": notes,
    }  # fmt: skip


def _require_same_features(graph: Graph, result: Intervened) -> None:
    """Raise unless the graph's activations are the model's own."""
    values = torch.zeros_like(graph.values)
    transcoders = result.before.model.transcoders
    for layer in range(graph.layers):
        own = graph.features[:, 0] == layer
        position, feature = graph.features[own, 1:].unbind(1)
        if not len(feature):
            continue
        size = transcoders.size(layer)
        if int(feature.max()) >= size:
            raise ValueError(f"{OP}: graph must be of the served model, got feature {int(feature.max())} of {layer}")
        device = result.before.final.device
        present = activations_at(result.features_before[layer], position.to(device), feature.to(device), size)
        values[own] = present.to(values)
    largest = float(graph.values.abs().max()) if len(values) else 0.0
    if largest and float((values - graph.values).abs().max()) > _TOLERANCE * largest:
        raise ValueError(f"{OP}: graph must be of the served model and its transcoders, got other activations")


def _new_values(graph: Graph, changes: tuple[FeatureChange, ...]) -> tuple[dict[int, float], list[str]]:
    """Return the new activation of every changed node of the graph, and notes on what it cannot foretell."""
    values, notes = {}, []
    for change in changes:
        own = (graph.features[:, 0] == change.layer) & (graph.features[:, 2] == change.feature)
        if change.position is not None:
            own &= graph.features[:, 1] == change.position
        for node in own.nonzero()[:, 0].tolist():
            activation = float(graph.values[node])
            values[node] = activation * change.factor if change.factor is not None else float(change.value or 0.0)
        if change.position is None and change.value:
            notes.append(
                f"{change.layer}/{change.feature} is set where it was silent too, which the graph has no edges for"
            )
    unchanged = [node for node, value in values.items() if value == float(graph.values[node])]
    if unchanged:
        notes.append(f"{len(unchanged)} of {len(values)} features have the activation already that they are given")
    return values, notes


def _node_effects(
    index: GraphIndex, result: Intervened, values: dict[int, float], identifiers: list[str], through_features: bool
) -> tuple[list[dict[str, Any]], dict[str, float | None]]:
    """Describe the change of each node against what the graph foretold, and their agreement."""
    graph = index.graph
    foretold = foretold_changes(graph, values, through_features)
    nodes, names = [], []
    for identifier in identifiers:
        try:
            node = node_of(graph, identifier)
        except (KeyError, ValueError):
            continue  # an edit of an earlier state of the file
        if node < graph.first_error or node >= graph.first_target:
            nodes.append(node)
            names.append(identifier)
    changes = _measured(index, result, nodes)
    out, pairs = [], []
    for node, name, (before, after, change) in zip(nodes, names, changes, strict=True):
        row = int(index.row_of[node])
        expected = None if row < 0 or node in values else float(foretold[row])
        if expected is not None and change is not None:
            pairs.append((change, expected))
        predicted = None if expected is None or before is None else before + expected
        if node in values:
            predicted = values[node]
            after = values[node]
        elif predicted is not None and node < graph.first_error:
            predicted = max(0.0, predicted)
        numbers = {"before": before, "after": after, "predicted": predicted, "change": change, "foretold": expected}
        out.append({"id": name, "changed": node in values, **{key: _short(n) for key, n in numbers.items()}})
    measured, expected_changes = np.array(pairs, np.float64).reshape(-1, 2).T
    return out, {**agreement(measured, expected_changes), "pairs": len(pairs)}


def _short(number: float | None) -> float | None:
    return None if number is None else finite(float(significant(np.array([number]))[0]))


Change = tuple[float | None, float | None, float | None]  # before, after, change of the pre-activation


def _measured(index: GraphIndex, result: Intervened, nodes: list[int]) -> list[Change]:
    """Activation before and after of features, centred logit of targets, and the change of the pre-activation."""
    graph, reader = index.graph, RowReader(result.before.model, index.graph)
    changes, readable = reader.changes(result.after, result.before).numpy(), reader.readable.numpy()
    features = [tuple(graph.features[node].tolist()) for node in nodes if node < graph.first_error]
    moved = iter(result.effect(features).tolist() if features else [])
    pre = iter(result.effect(features, preactivation=True).tolist() if features else [])
    out: list[Change] = []
    for node in nodes:
        if node < graph.first_error:
            before = float(graph.values[node])
            out.append((before, before + next(moved), next(pre)))
        else:
            out.append(_target_change(index, node - graph.first_target, changes, readable))
    return out


def _target_change(index: GraphIndex, target: int, changes: np.ndarray, readable: np.ndarray) -> Change:
    """Change of a target that is a token or a contrast: of its logit against the mean of all, as it was traced."""
    graph = index.graph
    row = int(index.row_of[graph.first_target + target])
    if row < 0 or not readable[row]:
        return None, None, None
    before, change = float(graph.preactivation[row]), float(changes[row])
    return before, before + change, change


def _probabilities(served: ServedModel, result: Intervened) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the next tokens that are likeliest before or after, with their probabilities before, and after."""
    before, after = result.probabilities_before, result.probabilities
    if not bool(after.isfinite().all()):
        raise ValueError(f"{OP}: changes must leave the logits finite, got an overflow; use smaller values")
    likeliest = torch.maximum(before, after).topk(min(_TOKENS, len(after))).indices
    tokens = sorted(likeliest.tolist(), key=lambda token: -float(after[token]))
    texts = {token: served.text([token]) for token in tokens}
    return tuple(  # type: ignore[return-value]
        [{"id": t, "token": texts[t], "probability": _short(float(p[t]))} for t in tokens] for p in (before, after)
    )


def _texts(served: ServedModel, ids: list[int], request: ChangeRequest) -> dict[str, str]:
    """Return the text that follows the prompt with and without the changes."""
    steer = [change.intervention() for change in request.changes]
    before = generate(served.model, ids, max_new_tokens=request.generate)
    after = generate(served.model, ids, steer, max_new_tokens=request.generate)
    return {"before": served.text(before), "after": served.text(after)}
