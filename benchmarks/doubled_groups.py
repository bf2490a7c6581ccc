"""Effects of doubled supernodes: by the graph, by transcoders in place of the MLPs, and by the model.

The graph predicts along its paths. A forward with transcoders in place of the MLPs, and errors, attention patterns and
norms as on the prompt, adds what features do beyond their present activation, those included that were silent. The
model adds what its MLPs do and transcoders do not.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from grouping import KINDS, SEED, statements

import pycircuit as pc
from pycircuit import ops
from pycircuit.graph.supernodes import supernodes
from pycircuit.interventions.changed_graph import with_values
from pycircuit.interventions.graph_effects import RowReader
from pycircuit.interventions.intervention_run import State
from pycircuit.interventions.steering import FeatureChanges, activations_at, changes_by_layer
from pycircuit.model.replacement import LocalReplacement

FACTORS = (0.0, 2.0)


def replaced(
    model: pc.ReplacementModel, local: LocalReplacement, changes: dict[int, FeatureChanges], factor: float
) -> State:
    """Run the prompt with transcoders in place of the MLPs while features have `factor` times their activation."""
    transcoders, frozen = model.transcoders, local.model
    stream, reads, written = frozen.first_stream(), [], local.errors.clone()
    for layer, parameters in enumerate(frozen.layers):
        stream = stream + parameters.attention_out(stream)
        norm = parameters.read_norm(transcoders.reads)
        reads.append(stream if norm is None else norm.forward(stream))
        features = transcoders.encode(layer, reads[-1], local.ignore_positions)
        if layer in changes:
            change, size = changes[layer], transcoders.size(layer)
            own = activations_at(local.features[layer], change.position[change.place()], change.index, size)
            features = with_values(features, change, factor * own, size)
        decoded = ops.decode(features, transcoders.w_dec[layer])
        decoded = decoded[None] if decoded.ndim == 2 else decoded
        written[layer : layer + len(decoded)] += decoded
        bias = transcoders.bias(layer)
        if bias is not None:
            written[layer, local.ignore_positions :] += bias
        stream = stream + parameters.mlp_added(written[layer])
    return State(model, 0, torch.stack(reads), frozen.final_norm.forward(stream))


def compare(kind: str, prompts: int) -> dict[float, np.ndarray]:
    """Effects by factor: predicted by the graph, with transcoders, and measured: [3, effects]."""
    model = pc.load("demo", transcoders=kind)
    effects: dict[float, list[np.ndarray]] = {factor: [] for factor in FACTORS}
    for statement in statements(SEED, prompts):
        graph = pc.attribute(model, statement.prompt, progress=False)
        groups = supernodes(graph.prune(0.8), "structure")
        if not groups:
            continue
        result = pc.validate(model, graph, groups=groups, factors=FACTORS, freeze="attention")
        local, rows = model.freeze(graph.tokens.ids), RowReader(model, graph)
        before = replaced(model, local, {}, 1.0)
        compared = np.isin(graph.row_node.numpy(), result.nodes) & rows.readable.numpy()
        for i, group in enumerate(result.groups):
            for j, factor in enumerate(FACTORS):
                places = [graph.features[node].tolist() for node in group.nodes]
                placed = [(0, place[1], pc.Intervention(*place, factor=factor)) for place in places]
                after = replaced(model, local, changes_by_layer(placed, before.final), factor)
                change = rows.changes(after, before).numpy()[compared]
                effects[factor].append(np.stack([result.predicted[i, j], change, result.measured[i, j]]))
    joined = {factor: np.concatenate(arrays, 1) for factor, arrays in effects.items()}
    return {factor: array[:, np.isfinite(array).all(0)] for factor, array in joined.items()}


def main() -> None:
    """Print a line for each set and factor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4)
    torch.set_num_threads(1)
    count = parser.parse_args().prompts
    for kind in KINDS:
        for factor, array in compare(kind, count).items():
            c = np.corrcoef(array)
            print(
                f"{kind}, x{factor:g}, {array.shape[1]} effects: graph and transcoders {c[0, 1]:.3f}, "
                f"transcoders and model {c[1, 2]:.3f}, graph and model {c[0, 2]:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
