"""circuit-tracer's algorithm beside ours: the same model, features, card and precision class."""

from __future__ import annotations

import time
from typing import Any

import taped
import torch
from gpu_card import synchronise
from gpu_files import Section, attempt
from gpu_trace import COMPARED, dense_row, free_memory, precisions, replacement, shape_of, traced
from torch import Tensor

import pycircuit as pc
from pycircuit.bench import models
from pycircuit.bench.shapes import Shape
from pycircuit.graph import Graph
from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops.torch_settings import full_float32, tf32_products

ROWS, BATCHES = 512, (128, 64, 256)
DISTANCE, EQUAL = "largest distance of a row from ours", 1e-4
EXTRAPOLATED = "not measured: the sweep at these rows a second, a ranking's time in proportion to the rows so far"


def tape(section: Section) -> None:
    """Rows a second of the taped algorithm over rows that pc.attribute chose, in float32 and tf32."""
    shape = shape_of(section, "gemma2b")
    with replacement(section, shape) as model:
        targets = min(ROWS, shape.targets or ROWS)
        for warmth in ("first", "again"):
            graph, run = traced(section, model, shape, precisions(section.device)[0], targets)
            section.save(f"pycircuit {targets} rows {warmth}", run)
        local = model.freeze(models.prompt(shape.positions), stored=True)
        for batch in BATCHES if not section.dry else (4,):
            for name, products in (("float32", full_float32), ("tf32", tf32_products)):
                title = f"taped batch {batch} {name}"
                if section.skip(title, 4):
                    continue
                with products():
                    result = attempt(lambda b=batch: measured(section, model, local, graph, b, shape))
                section.save(title, result)
                if name == "float32" and result.get(DISTANCE, 0.0) > EQUAL:
                    section.mark(f"{title}: rows are {result[DISTANCE]:.1e} from ours")
                free_memory(section)


def measured(
    section: Section,
    model: pc.ReplacementModel,
    local: LocalReplacement,
    graph: Graph,
    batch: int,
    shape: Shape,
) -> dict[str, Any]:
    """Seconds of the taped algorithm over the feature rows of a graph, and the distance of its rows from ours."""
    nodes = graph.row_node[graph.row_node < graph.first_error].cpu()
    layer, position, feature = graph.features.cpu()[nodes].T.tolist()
    vectors = torch.stack([model.transcoders.w_enc[depth][f] for depth, f in zip(layer, feature, strict=True)])
    synchronise(section.device)
    begin = time.perf_counter()
    baseline = taped.TapedModel(local, batch)
    synchronise(section.device)
    setup = time.perf_counter() - begin
    baseline.rows(layer[:batch], position[:batch], vectors[:batch])  # warm
    begin, rows = time.perf_counter(), []
    for start in range(0, len(nodes), batch):
        end = start + batch
        rows.append(baseline.rows(layer[start:end], position[start:end], vectors[start:end]))
        if section.left() < 3:
            break
    sweep, edges = time.perf_counter() - begin, torch.cat(rows)
    ranking = ranking_seconds(section, edges, nodes[: len(edges)])
    rate, targets = len(edges) / sweep, shape.targets or len(graph.features)
    rankings = max(1, targets // (taped.BATCHES_A_RANKING * batch))
    longer = {"rows": targets, "sweep": targets / rate, "rankings": rankings * ranking * targets / len(edges) / 2}
    return {
        "rows": len(edges),
        "setup seconds": setup,
        "sweep seconds": sweep,
        "rows a second": rate,
        "ranking seconds": ranking,
        DISTANCE: distance(graph, nodes, edges),
        "extrapolated seconds": {**longer, "basis": EXTRAPOLATED},
    }


def distance(graph: Graph, nodes: Tensor, edges: Tensor) -> float:
    """The largest distance of a taped row from the graph's, over the graph's norm."""
    distances = []
    for r in range(0, len(edges), max(1, len(edges) // COMPARED)):
        ours = dense_row(graph, int(nodes[r]))[: edges.shape[1]]
        distances.append(float((edges[r].double() - ours).norm() / ours.norm()))
    return max(distances)


def ranking_seconds(section: Section, edges: Tensor, nodes: Tensor) -> float:
    """Seconds of one ranking of these rows on the card, influence entering at the first ten."""
    rows, node = edges.to(section.device), nodes.to(section.device)
    weight = torch.zeros(edges.shape[1], device=section.device)
    weight[node[:10]] = 0.1
    synchronise(section.device)
    begin = time.perf_counter()
    taped.ranking(rows, node, weight)
    synchronise(section.device)
    return time.perf_counter() - begin
