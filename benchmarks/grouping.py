"""Groups of features on the demo model: against its facts, against interventions, and how fast. `make bench-grouping`.

100 prompts, as even over kinds of question and languages as there are statements. The choices of
the method were made on 100 others (`--development`, whose prompts are left out of these).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fact_classes import fact_classes, language

import pycircuit as pc
from pycircuit.demo.facts import Statement, facts
from pycircuit.demo.swap import two_hop
from pycircuit.graph import Graph, Pruned
from pycircuit.graph.supernodes import supernodes

FOLDER = Path(__file__).parent
PROMPTS, SEED, DEVELOPMENT_SEED = 100, 16, 11
KINDS = ("clt", "plt")
THRESHOLDS = (0.8, 0.95)
FACTORS = (0.0, 0.5, 2.0)
RESTARTS = 5  # of k-means
Clustering = Callable[["Case"], np.ndarray]


@dataclass
class Case:
    """A pruned graph of a prompt. nodes: its features; fact: of each, or None; decoders: [nodes, width]."""

    statement: Statement
    graph: Graph
    pruned: Pruned
    nodes: np.ndarray
    fact: list[str | None]
    decoders: np.ndarray
    seconds: dict[str, float] = field(default_factory=dict)

    def truth(self, by_position: bool) -> np.ndarray:
        position = self.graph.features[self.nodes, 1].tolist()
        return np.array([f"{f} {p}" if by_position else str(f) for f, p in zip(self.fact, position, strict=True)])


def statements(seed: int, count: int) -> list[Statement]:
    """Statements drawn in turn from every kind and language."""
    draw, strata = random.Random(seed), {}
    for statement in facts().statements():
        strata.setdefault((statement.kind, language(statement.prompt)), []).append(statement)
    queues = [draw.sample(strata[name], len(strata[name])) for name in sorted(strata)]
    rounds = (queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue))
    return list(itertools.islice(rounds, count))


def test_statements() -> list[Statement]:
    """The prompts of the figures."""
    return statements(SEED, PROMPTS)


def development_statements() -> list[Statement]:
    """The prompts that the method's choices were made on, none of them among those of the figures."""
    used = {statement.prompt for statement in test_statements()}
    return [s for s in statements(DEVELOPMENT_SEED, 2 * PROMPTS) if s.prompt not in used][:PROMPTS]


def adjusted_rand(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index of two partitions: 1 if equal, 0 on average by chance."""
    a, b = (np.unique(labels, return_inverse=True)[1] for labels in (a, b))
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, first, second, total = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), len(a) * (len(a) - 1) / 2
    expected = first * second / total if total else 0.0
    largest = (first + second) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


# Clusterings: the group of each node of a case


def by_structure(case: Case, with_decoders: bool = False) -> np.ndarray:
    graph = replace(case.graph, labels={})  # labels are not even there
    decoders = None
    if with_decoders:
        decoders = np.zeros((graph.first_error, case.decoders.shape[1]), np.float32)
        decoders[case.nodes] = case.decoders
    pruned = replace(case.pruned, original=graph)
    begin = time.perf_counter()
    groups = supernodes(pruned, "structure", decoders=decoders)
    case.seconds["structure, decoders" if with_decoders else "structure"] = time.perf_counter() - begin
    return _membership(case, groups)


def by_label(case: Case) -> np.ndarray:
    return _membership(case, supernodes(case.pruned, "label"))


def by_position(case: Case) -> np.ndarray:
    return np.asarray(case.graph.features[case.nodes, 1].numpy())


def by_decoders(case: Case) -> np.ndarray:
    """K-means on decoder directions, told the number of groups that there truly are."""
    unit = case.decoders / np.linalg.norm(case.decoders, axis=1, keepdims=True)
    count = len({f for f in case.fact if f is not None})
    generator = np.random.default_rng(0)
    best, out = np.inf, np.zeros(len(unit), np.int64)
    for _ in range(RESTARTS):
        centre = unit[generator.choice(len(unit), min(count, len(unit)), replace=False)]
        for _ in range(50):
            distance = ((unit[:, None] - centre) ** 2).sum(2)
            group = distance.argmin(1)
            centre = np.stack(
                [unit[group == g].mean(0) if (group == g).any() else centre[g] for g in range(len(centre))]
            )
        if (spread := float(distance.min(1).sum())) < best:
            best, out = spread, group
    return out


def _membership(case: Case, groups: Sequence[pc.Supernode]) -> np.ndarray:
    owner = {node: i for i, group in enumerate(groups) for node in group.nodes}
    return np.array([owner.get(node, len(groups) + i) for i, node in enumerate(case.nodes.tolist())])


METHODS: dict[str, Clustering] = {
    "structure": by_structure,
    "structure, decoders": lambda case: by_structure(case, with_decoders=True),
    "label": by_label,
    "position": by_position,
    "k-means on decoders": by_decoders,
}


# Measurements


def cases(model: pc.ReplacementModel, classes: dict[tuple[int, int], str], chosen: list[Statement]) -> list[list[Case]]:
    """Cases of every prompt at each threshold, those with three features that a fact explains."""
    out: list[list[Case]] = [[] for _ in THRESHOLDS]
    for statement in chosen:
        graph = pc.attribute(model, statement.prompt, progress=False)
        for i, threshold in enumerate(THRESHOLDS):
            pruned = graph.prune(threshold)
            nodes = pruned.node_mask[: graph.first_error].nonzero()[:, 0].numpy()
            features = graph.features[nodes].tolist()
            fact = [classes.get((layer, feature)) for layer, _, feature in features]
            rows = [model.transcoders.w_dec[layer][feature] for layer, _, feature in features]
            decoders = np.stack([(w.sum(0) if w.ndim == 2 else w).detach().float().numpy() for w in rows])
            if sum(f is not None for f in fact) >= 3:
                out[i].append(Case(statement, graph, pruned, nodes, fact, decoders))
    return out


def agreement(case_list: list[Case]) -> dict[str, dict[str, float]]:
    """Mean adjusted Rand index of each method against facts, and against facts at one position."""
    out = {}
    for name, cluster in METHODS.items():
        scores: dict[str, list[float]] = {"fact": [], "fact and position": [], "groups": []}
        for case in case_list:
            group, judged = cluster(case), np.array([f is not None for f in case.fact])
            scores["fact"].append(adjusted_rand(group[judged], case.truth(False)[judged]))
            scores["fact and position"].append(adjusted_rand(group[judged], case.truth(True)[judged]))
            scores["groups"].append(len(set(group.tolist())))
        out[name] = {measure: float(np.mean(values)) for measure, values in scores.items()}
    return out


def effects(model: pc.ReplacementModel, case_list: list[Case]) -> dict[str, dict[str, float]]:
    """Predicted against measured effects of every supernode of every case, by freeze and factor, pooled."""
    pooled: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for case in case_list:
        groups = supernodes(case.pruned, "structure")
        for freeze in ("all", "attention", "none") if groups else ():
            result = pc.validate(model, case.graph, groups=groups, factors=FACTORS, freeze=freeze)
            for i, factor in enumerate(FACTORS):
                predicted, measured = result.predicted[:, i].ravel(), result.measured[:, i].ravel()
                known = np.isfinite(predicted) & np.isfinite(measured)
                pooled.setdefault(f"{freeze}, x{factor:g}", []).append((predicted[known], measured[known]))
    return {name: _line(pairs) for name, pairs in pooled.items()}


def _line(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    predicted, measured = (np.concatenate(values) for values in zip(*pairs, strict=True))
    moved = (predicted != 0) & (measured != 0)
    return {
        "pairs": len(predicted),
        "correlation": float(np.corrcoef(predicted, measured)[0, 1]),
        "slope": float(predicted @ measured / (predicted @ predicted)),
        "signs": float((np.sign(predicted) == np.sign(measured))[moved].mean()),
    }


def dallas(model: pc.ReplacementModel) -> dict[str, Any]:
    """Groups of the Dallas prompt and the scores of their members."""
    graph = pc.attribute(model, two_hop("Dallas"), progress=False)
    out: dict[str, Any] = {"whole graph": graph.scores()._asdict(), "nothing": graph.subgraph_scores([])._asdict()}
    for threshold in THRESHOLDS:
        pruned = graph.prune(threshold)
        groups = supernodes(pruned, "structure")
        grouped = [node for group in groups for node in group.nodes]
        features = pruned.node_mask[: graph.first_error].nonzero()[:, 0].tolist()
        for name, nodes in (("groups", grouped), ("all pruned features", features)):
            scores = {**graph.subgraph_scores(nodes)._asdict(), "features": len(nodes)}
            out[f"{name}, node threshold {threshold}"] = scores
        out[f"names, node threshold {threshold}"] = {group.name: len(group.nodes) for group in groups}
    return out


def measure(kind: str, development: bool) -> dict[str, Any]:
    """All figures of the demo model with one of its transcoder sets."""
    model = pc.load("demo", transcoders=kind)
    chosen = development_statements() if development else test_statements()
    begin = time.perf_counter()
    by_threshold = cases(model, fact_classes(model, facts()), chosen)
    result: dict[str, Any] = {"preparation seconds": time.perf_counter() - begin}
    print(f"{kind}: {PROMPTS} graphs after {result['preparation seconds']:.0f} s", file=sys.stderr, flush=True)
    for threshold, case_list in zip(THRESHOLDS, by_threshold, strict=True):
        result[f"node threshold {threshold}"] = {
            "graphs": len(case_list),
            "features": float(np.mean([len(case.nodes) for case in case_list])),
            "facts": float(np.mean([len({f for f in case.fact if f}) for case in case_list])),
            "adjusted rand": agreement(case_list),
            "effects": effects(model, case_list) if threshold == THRESHOLDS[0] else {},
            "milliseconds a graph": 1e3 * float(np.mean([case.seconds["structure"] for case in case_list])),
        }
    return result | {"dallas": dallas(model)}


# Report


def report(results: dict[str, Any]) -> str:
    """Markdown of the results."""
    lines = [
        "# Groups of features, measured\n",
        "`make bench-grouping` writes this page and `grouping-cpu.json`. 100 prompts of the demo model; the method's "
        "choices were made on 100 others (`--development`). A feature's fact is measured, not read from its "
        "label: among state, country, answer, language and kind of question, the one that explains most of the "
        "variance of its activation over all statements. Adjusted Rand index, mean over prompts: 1 for the same "
        "partition, 0 for chance. K-means is told the true number of groups; no other method is.\n",
    ]
    for kind, result in results["sets"].items():
        for threshold in THRESHOLDS:
            block = result[f"node threshold {threshold}"]
            lines += [
                f"## {kind}, node threshold {threshold}\n",
                f"{block['graphs']} graphs, {block['features']:.1f} features, {block['facts']:.1f} facts on average, "
                f"{block['milliseconds a graph']:.1f} ms to group a graph.\n",
                "| method | fact | fact and position | groups |\n|---|---|---|---|",
            ]
            lines += [
                f"| {name} | {row['fact']:.3f} | {row['fact and position']:.3f} | {row['groups']:.1f} |"
                for name, row in block["adjusted rand"].items()
            ]
            if block["effects"]:
                lines.append("\n| frozen, factor | effects | correlation | slope | signs |\n|---|---|---|---|---|")
            for name, row in block["effects"].items():
                figures = f"{row['correlation']:.3f} | {row['slope']:.2f} | {100 * row['signs']:.0f}%"
                lines.append(f"| {name} | {row['pairs']} | {figures} |")
            lines.append("")
        lines.append(
            f"## {kind}, {two_hop('Dallas')}\n\n| selection | features | replacement | completeness |\n"
            "|---|---|---|---|"
        )
        lines += [
            f"| {name} | {row.get('features', '')} | {row['replacement']:.3f} | {row['completeness']:.3f} |"
            for name, row in result["dallas"].items()
            if "replacement" in row
        ]
        lines.append("")
        for threshold in THRESHOLDS:
            names = result["dallas"][f"names, node threshold {threshold}"].items()
            lines.append(f"Groups at {threshold}: " + "; ".join(f"{name} ({size})" for name, size in names) + ".\n")
    return "\n".join(lines)


def main() -> None:
    """Measure both transcoder sets and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--development", action="store_true", help="the prompts that choices are made on; writes nothing"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {"prompts": PROMPTS, "seed": SEED, "sets": {k: measure(k, arguments.development) for k in KINDS}}
    text = report(results)
    print(text)
    if not arguments.development:
        (FOLDER / "results" / "grouping-cpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (FOLDER / "GROUPING.md").write_text(text)


if __name__ == "__main__":
    main()
