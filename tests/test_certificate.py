"""Scale of the certificate: it accepts rows that cancel inside a dot product, and detects a wrong edge."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import builders
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

import pycircuit as pc
from pycircuit.graph import Graph, Rows
from pycircuit.trace.precision import PRECISIONS

pytestmark = pytest.mark.usefixtures("one_thread")
LAW = PRECISIONS["float32"].tolerance
# (family, seed): half of the features of a ReLU are active, and the smallest pre-activation is a millionth of its terms
CASES = [
    ("gemma2", 3), ("gemma3", 3), ("gemma3_text", 1), ("gpt_oss", 1), ("llama", 3), ("mistral", 1), ("olmo2", 3),
    ("phi3", 3), ("qwen2", 1), ("qwen3", 3), ("gemma3", 2), ("gemma3_text", 0),
]  # fmt: skip


def relu_transcoders(size: int, seed: int, dtype: torch.dtype = torch.float32) -> pc.PerLayerTranscoders:
    layers, width, g = builders.LAYERS, builders.WIDTH, torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> list[Tensor]:
        return [(torch.randn(*shape, generator=g) * scale).to(dtype) for _ in range(layers)]

    w_enc, w_dec = normal(size, width, scale=width**-0.5), normal(size, width, scale=(size * width) ** -0.5)
    return pc.PerLayerTranscoders(w_enc, [torch.zeros(size, dtype=dtype)] * layers, w_dec, activation=pc.ReLU())


def traced(
    family: str, seed: int, dtype: torch.dtype = torch.float32, size: int = 600
) -> tuple[Graph, pc.ReplacementModel]:
    """Return a graph of all rows on a model with large streams: embeddings times 30, or with a common term of 1,000."""
    language = builders.build(family, dtype)
    embeddings = language.get_input_embeddings().weight.data
    embeddings.add_(1000.0) if seed % 2 else embeddings.mul_(30.0)
    model = pc.ReplacementModel(language, relu_transcoders(size, seed, dtype))
    return pc.attribute(model, builders.prompt(3), progress=False), model


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_right_relu_graphs_keep_the_law(family: str, seed: int) -> None:
    """In some rows all terms together are less than a hundredth of the products that they are computed from."""
    graph, _ = traced(family, seed)
    assert len(graph.features) > 1500
    assert graph.certificate < LAW / 5
    assert graph.product_norm is not None
    assert float((graph.product_norm / size_of_terms(graph)).max()) > 100


def test_norms_of_products_are_those_of_the_encoder_rows_and_their_input() -> None:
    from pycircuit.trace.targets import product_norm

    graph, model = traced("llama", 3, torch.float64, size=60)
    local = model.freeze(builders.prompt(3))
    assert local.reads is not None and graph.product_norm is not None
    features = graph.features[graph.row_node[graph.row_node < graph.first_error]]
    layer, position, index = features.unbind(1)
    rows = torch.stack([local.transcoders.w_enc[source_layer][n] for source_layer, n in zip(layer, index, strict=True)])
    own = graph.row_node < graph.first_error
    torch.testing.assert_close(graph.product_norm[own], product_norm(local, layer, position, rows))
    products = local.reads[layer, position] * rows
    torch.testing.assert_close(products.sum(1), graph.preactivation[own])
    normed = local.model.final_norm.forward(local.model.final_stream)[-1]
    vectors = local.model.unembedding[graph.targets.ids] - local.model.unembedding_mean
    order = graph.row_node[~own] - graph.first_target
    torch.testing.assert_close(graph.product_norm[~own], (vectors * normed).norm(dim=1)[order])


def size_of_terms(graph: Graph) -> Tensor:
    """Return the sum of absolute values of each row's terms: [rows]."""
    edges = [float(graph.rows.row(r)[1].double().abs().sum()) for r in range(graph.rows.count)]
    return torch.tensor(edges, dtype=torch.float64) + graph.bias.abs() + graph.preactivation.abs()


@pytest.mark.parametrize(("family", "seed"), CASES[:4])
def test_a_wrong_edge_is_detected(family: str, seed: int) -> None:
    """An edge off by 1e-4 of its row's terms is detected unless these are under a tenth of the products' norm."""
    graph, _ = traced(family, seed)
    assert graph.product_norm is not None
    terms, weight = size_of_terms(graph), graph.rows.weight.clone()
    first = graph.rows.row_ptr[:-1]
    weight[first] += (1e-4 * terms).to(weight.dtype)
    off = replace(graph, rows=Rows(graph.rows.row_ptr, graph.rows.column, weight)).residual > LAW
    seen = graph.product_norm < 8 * terms
    assert off[seen].all()
    assert seen.double().mean() > 0.9 and (graph.product_norm <= terms).double().mean() > 0.5


def test_files_from_before_the_norms_still_load(tmp_path: Path) -> None:
    graph, _ = traced("llama", 3, size=60)
    graph.save(tmp_path / "g.safetensors")
    with safe_open(tmp_path / "g.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "g.safetensors")
    assert torch.equal(tensors.pop("product_norm"), graph.product_norm)
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    old = Graph.load(tmp_path / "old.safetensors")
    assert old.product_norm is not None and not old.product_norm.any()
    assert math.isclose(old.certificate, replace(graph, product_norm=None).certificate)


def test_a_subgraph_keeps_the_norms_of_its_rows() -> None:
    graph, _ = traced("llama", 3, size=60)
    every_second = graph.row_node[graph.row_node < graph.first_error][::2]
    nodes = torch.ones(graph.nodes, dtype=torch.bool)
    nodes[: graph.first_error] = False
    nodes[every_second] = True
    subgraph = graph.subgraph(nodes)
    assert subgraph.product_norm is not None and graph.product_norm is not None
    assert torch.equal(subgraph.product_norm, graph.product_norm[nodes[graph.row_node]])
    assert subgraph.certificate <= graph.certificate * 1.01
