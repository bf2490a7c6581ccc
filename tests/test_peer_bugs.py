"""Bugs that other tracers have had, with a test for each of them."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import builders
import pytest
import torch
from builders import LAYERS, WIDTH, replacement

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = builders.prompt(9)


@pytest.fixture(scope="module")
def graph() -> pc.Graph:
    return pc.attribute(replacement("llama", "clt", torch.float64), IDS, max_targets=2)


def small(kind: type, skip: list[torch.Tensor] | None = None, b_enc: float = 0.0) -> pc.ReplacementModel:
    """Random ReLU transcoders on a tiny llama, in float64."""
    g = torch.Generator().manual_seed(3)
    w_enc = torch.randn(LAYERS, 10, WIDTH, generator=g, dtype=torch.float64)
    slots = [(LAYERS - n,) if kind is pc.CrossLayerTranscoder else () for n in range(LAYERS)]
    w_dec = [torch.randn(10, *s, WIDTH, generator=g, dtype=torch.float64) for s in slots]
    bias = torch.full((LAYERS, 10), b_enc, dtype=torch.float64)
    transcoders = kind(w_enc, bias, w_dec, activation=pc.ReLU(), w_skip=skip, reads="mlp_in")
    return pc.ReplacementModel(builders.build("llama", torch.float64), transcoders)


def test_the_last_layer_of_a_cross_layer_transcoder_is_used(graph: pc.Graph) -> None:
    """A loop to max(layers) without its end drops the features of the last layer, and the writes of others there."""
    last = graph.features[:, 0] == LAYERS - 1
    edges = graph.dense()[graph.first_target :, : len(graph.features)]
    assert last.any() and bool((edges[:, last & (graph.features[:, 1] == len(IDS) - 1)] != 0).all())
    local = small(pc.CrossLayerTranscoder).freeze(IDS)
    for source in range(LAYERS):
        alone = [f if layer == source else replace(f, value=0 * f.value) for layer, f in enumerate(local.features)]
        written = local.transcoders.reconstruct(alone).abs().amax((1, 2)) > 0
        assert written.tolist() == [target >= source for target in range(LAYERS)]


def test_a_skip_is_multiplied_from_the_right_in_both_kinds() -> None:
    """x @ w_skip, as both docstrings say; neither transposes it."""
    skip = list(torch.randn(LAYERS, WIDTH, WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    for kind in (pc.PerLayerTranscoders, pc.CrossLayerTranscoder):
        model = small(kind, skip, b_enc=-1e9)  # no feature is active: the skip alone writes
        x = torch.randn(LAYERS, 5, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        silent = [model.transcoders.encode(layer, x[layer]) for layer in range(LAYERS)]
        torch.testing.assert_close(model.transcoders.reconstruct(silent, x), x @ torch.stack(skip))
        active = small(kind, skip)
        assert pc.attribute(active, IDS, max_targets=2).certificate < 1e-10


def test_copies_of_a_cross_layer_transcoder_have_its_skip() -> None:
    skip = [None, *torch.randn(LAYERS - 1, WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))]
    model = small(pc.CrossLayerTranscoder, [None if s is None else s.double() for s in skip])
    copy = model.transcoders.to(torch.float32)
    assert [s is None for s in copy.w_skip] == [True, False, False]
    for copied, original in zip(copy.w_skip[1:], skip[1:], strict=True):
        assert original is not None and torch.equal(copied, original)


@pytest.mark.parametrize("kind", [pc.PerLayerTranscoders, pc.CrossLayerTranscoder])
def test_positions_without_features_at_the_end_are_reconstructed(kind: type) -> None:
    """The number of positions is that of the prompt, not that of the last active feature."""
    transcoders = small(kind).transcoders
    x = torch.randn(LAYERS, 6, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[:, 4:] = 0  # nothing is above zero there
    features = [transcoders.encode(layer, x[layer]) for layer in range(LAYERS)]
    assert all(f.count and int(f.position().max()) == 3 for f in features)
    out = transcoders.reconstruct(features)
    assert out.shape == (LAYERS, 6, WIDTH)
    assert not out[:, 4:].any() and bool(out[:, :4].any(-1).all())


def test_a_prompt_without_any_feature_is_traced() -> None:
    graph = pc.attribute(small(pc.PerLayerTranscoders, b_enc=-1e9), IDS, max_targets=2)
    assert len(graph.features) == 0 and graph.rows.count == len(graph.targets) == 2
    assert graph.certificate < 1e-10


def test_a_threshold_of_one_keeps_every_node_with_influence(graph: pc.Graph) -> None:
    """Pruned are features no target sees (the last layer before the last position) and edges into them."""
    pruned, count = graph.prune(1.0, 1.0), len(graph.features)
    seen = graph.influence() > 0
    seen[graph.first_target :] = True
    assert 0 < int(seen[:count].sum()) < count
    assert torch.equal(pruned.node_mask[:count], seen[:count])
    assert torch.equal(pruned.edge_mask, seen[graph.row_node].repeat_interleave(graph.rows.row_ptr.diff()))


def test_batched_activations_ignore_positions_not_prompts() -> None:
    """Every prompt's opening position is ignored; the first prompt keeps its features."""
    model = small(pc.PerLayerTranscoders)
    prompts = [builders.prompt(7, seed=s) for s in range(4)]
    single = pc.ReplacementModel(builders.build("llama"), model.transcoders.to(torch.float32))
    assert single._batches([7] * 4) == [[0, 1, 2, 3]]  # one batch of four
    for ids, layers in zip(prompts, single.activations(prompts), strict=True):
        for f, expected in zip(layers, model.freeze(ids).features, strict=True):
            assert f.row_ptr[1] == 0 and bool((f.row_ptr.diff()[1:] > 0).all())
            assert torch.equal(f.row_ptr, expected.row_ptr) and torch.equal(f.index, expected.index)


def test_ids_of_errors_are_not_ids_of_features_in_layer_0(graph: pc.Graph, tmp_path: Path) -> None:
    """circuit-tracer's 0_{layer}_{position} is feature `layer` of layer 0 as well."""
    graph.to_json(tmp_path / "g.json", node_threshold=1.0, edge_threshold=1.0)
    written = json.loads((tmp_path / "g.json").read_text())
    ids = [node["node_id"] for node in written["nodes"]]
    theirs = {f"0_{n['layer']}_{n['ctx_idx']}" for n in written["nodes"] if "error" in n["feature_type"]}
    assert theirs & set(ids)  # its ids would collide in this graph
    assert len(ids) == len(set(ids)) > 100
    assert {end for link in written["links"] for end in (link["source"], link["target"])} <= set(ids)


def test_saved_graphs_are_not_pickles(graph: pc.Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is pickled or unpickled")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    graph.save(tmp_path / "g.safetensors")
    assert torch.equal(pc.Graph.load(tmp_path / "g.safetensors").dense(), graph.dense())
    monkeypatch.undo()
    with pytest.raises((pickle.UnpicklingError, EOFError, ValueError)):
        pickle.loads((tmp_path / "g.safetensors").read_bytes())
