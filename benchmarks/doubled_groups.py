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
from pycircuit.graph.supernodes import supernodes
from pycircuit.truth.effect_meter import EffectMeter

FACTORS = (0.0, 2.0)


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
        compared = np.isin(graph.row_node.numpy(), result.nodes)
        changes = EffectMeter(model, graph).changes(result.groups, FACTORS, "attention", replaced=True)[..., compared]
        for i in range(len(result.groups)):
            for j, factor in enumerate(FACTORS):
                effects[factor].append(np.stack([result.predicted[i, j], changes[j, i], result.measured[i, j]]))
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
