"""Tests of the drop-in for circuit-tracer: the graphs of both `attribute` functions are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pair
import pytest
import torch
from circuit_tracer.attribution.targets import CustomTarget
from drop_in_cases import (
    ACTIVE,
    FEW,
    KINDS,
    LAZY,
    MOST,
    POSITIONS,
    SETTINGS,
    SIZE,
    SIZES,
    both,
    ids,
    made,
    off,
    plain,
    same,
    trace_by_circuit_tracer,
)

from pycircuit.integrations.circuit_tracer import (
    attribute,
    transformer_lens,
)

CASES = [
    *((f"{backend} llama", kind, "") for backend in ("lens", "nnsight") for kind in KINDS if "normed" not in kind),
    *((f"{b} llama", kind, lazy) for b in ("lens", "nnsight") for kind in ("plt", "clt") for lazy in LAZY if lazy),
    ("lens gemma2", "plt_normed", ""), ("lens gpt2", "plt_topk_skip", ""), ("lens gpt2", "clt", ""),
    ("nnsight gemma2", "plt_normed", ""), ("nnsight gemma2", "clt", ""), ("nnsight gemma3", "plt", ""),
    ("nnsight gemma3_vision", "plt", ""), ("nnsight gemma3_vision", "clt", ""),
    ("nnsight qwen3", "plt_raw", ""), ("nnsight gpt_oss", "plt_raw", ""),
]  # fmt: skip


EVERY = pytest.mark.parametrize(("where", "kind", "lazy"), CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transcoders")


@EVERY
def test_the_same_graph(where: str, kind: str, lazy: str, folder: Path) -> None:
    """Graphs of all features, and of the most influential in rounds, are equal."""
    model = made(where, kind, folder, lazy)
    for settings in ({"batch_size": 16}, SETTINGS):
        theirs = pair.trace_circuit_tracer(model, ids(), **settings)
        ours = pair.by(attribute, model, ids(), **settings)
        assert len(theirs.active_features) > 100
        assert (len(theirs.selected_features) == MOST) == (settings is SETTINGS)
        same(ours, theirs)


@pytest.mark.parametrize(("where", "kind"), [("lens llama", "plt"), ("lens gemma2", "clt"), ("lens gpt2", "clt")])
def test_the_same_with_patterns_recomputed(where: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for prompts whose patterns are too large to keep: rotary, windows and a cap, learned positions."""
    theirs, stored = both(where, kind)
    recomputed, layers = transformer_lens._recomputed, set()

    def counted(model: Any, layer: int, recorded: Any) -> Any:
        layers.add(layer)
        return recomputed(model, layer, recorded)

    monkeypatch.setattr(transformer_lens, "PATTERN_BYTES", 0)
    monkeypatch.setattr(transformer_lens, "_recomputed", counted)
    ours = pair.by(attribute, plain(where, kind), ids(), **SETTINGS)
    assert layers == set(range(SIZE.layers))
    same(ours, stored, 1e-5)
    same(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_with_norms_folded_into_weights(family: str) -> None:
    size, kind = SIZES.get(family, SIZE), KINDS["plt"]
    transcoders = pair.circuit_tracer_transcoders(
        kind, pair.transcoder_weights(kind, size, torch.float32, ACTIVE), size, torch.float32
    )
    model = pair.lens_of(
        family, pair.language_model(family, size, torch.float32), transcoders, size, torch.float32, fold=True
    )
    assert type(model.ln_final).__name__.endswith("Pre") and not hasattr(model.blocks[0].ln1, "w")
    same(pair.by(attribute, model, ids(), **SETTINGS), pair.trace_circuit_tracer(model, ids(), **SETTINGS))


def test_the_same_where_several_positions_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As theirs does for the chat models of Gemma 3."""
    for where in ("lens llama", "nnsight llama"):
        model = made(where, "plt")
        model.zero_positions = slice(0, 4)
        theirs = pair.trace_circuit_tracer(model, ids(), **SETTINGS)
        assert int(theirs.active_features[:, 1].min()) == 4
        same(pair.by(attribute, model, ids(), **SETTINGS), theirs)


@FEW
def test_the_same_for_any_opening_positions(where: str) -> None:
    """None of them, all of them, and more than there are."""
    model = made(where, "plt")
    for zero_positions, prompt in (
        (slice(0, 0), ids()),
        (slice(None, 2), ids()),
        (slice(0, None), ids()),
        (slice(0, 4), [0, 5]),
    ):
        model.zero_positions = zero_positions
        same(pair.by(attribute, model, prompt, **SETTINGS), pair.trace_circuit_tracer(model, prompt, **SETTINGS))
    for zero_positions in (slice(1, 3), slice(0, 4, 2)):
        model.zero_positions = zero_positions
        with pytest.raises(ValueError, match=r"zero_positions must be the first ones, slice\(0, n\), got slice"):
            attribute(ids(), model, **SETTINGS)


@FEW
def test_the_same_beyond_the_positions_a_config_names(where: str) -> None:
    longer = torch.cat([ids(), pair.prompt(SIZE.longest, SIZE.vocabulary)[1:]])
    options = {**SETTINGS, "max_feature_nodes": 10}
    same(
        pair.by(attribute, plain(where), longer, **options), pair.trace_circuit_tracer(plain(where), longer, **options)
    )


@pytest.mark.parametrize("kind", ["plt_topk_skip", "clt"])
def test_in_float64_the_same_to_rounding(kind: str) -> None:
    model = made("lens gpt2", kind, dtype=torch.float64)
    ours, theirs = pair.by(attribute, model, ids(), **SETTINGS), pair.trace_circuit_tracer(model, ids(), **SETTINGS)
    assert theirs.adjacency_matrix.dtype == torch.float64
    same(ours, theirs, 1e-10)
    assert (
        attribute(ids(), model, **SETTINGS).adjacency_matrix.dtype == torch.float32
    )  # theirs takes torch's default too


@FEW
def test_half_precision_is_traced_as_closely_as_theirs(where: str) -> None:
    """Against a float32 model of the same rounded weights, on what is active in all three: patterns in half precision
    move the edges of both by a few percent."""
    exact, half = made(where, "plt"), made(where, "plt", dtype=torch.bfloat16)
    transcoders = getattr(exact.transcoders, "_module", exact.transcoders)
    with torch.no_grad():
        for parameter in (*getattr(exact, "_module", exact).parameters(), *transcoders.parameters()):
            parameter.copy_(parameter.to(torch.bfloat16))
    options = {"batch_size": 16, "attribution_targets": torch.tensor([7, 3])}
    graphs = (
        attribute(ids(), exact, **options),
        attribute(ids(), half, **options),
        trace_by_circuit_tracer(half, **options),
    )
    assert graphs[1].activation_values.dtype == graphs[2].activation_values.dtype == torch.bfloat16
    assert graphs[1].adjacency_matrix.dtype == graphs[2].adjacency_matrix.dtype == torch.float32
    indices = [{tuple(f): i for i, f in enumerate(graph.active_features.tolist())} for graph in graphs]
    common = sorted(set(indices[0]) & set(indices[1]) & set(indices[2]))
    assert len(common) > 0.9 * len(indices[0])
    edges = [graph.adjacency_matrix[-2:, [of[f] for f in common]] for graph, of in zip(graphs, indices, strict=True)]
    assert off(edges[1], edges[0]) < 0.06 and off(edges[2], edges[0]) < 0.06


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("where", "kind"), [("lens gemma2", "plt_normed"), ("nnsight gemma2", "plt_normed")])
def test_in_half_precision_the_same_targets(where: str, kind: str, dtype: torch.dtype) -> None:
    """Logits that half precision cannot tell apart come in its order, and their probabilities in its type."""
    model = made(where, kind, dtype=dtype)
    ours, theirs = attribute(ids(), model, **SETTINGS), trace_by_circuit_tracer(model, **SETTINGS)
    assert ours.logit_targets == theirs.logit_targets and len(theirs.logit_targets) == 10
    for name in ("logit_probabilities", "activation_values", "adjacency_matrix"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert torch.allclose(ours.logit_probabilities, theirs.logit_probabilities, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("lens llama", "plt"),
        ("lens llama", "clt"),
        ("lens llama", "plt_topk_skip"),
        ("lens gemma2", "plt_normed"),
        ("nnsight llama", "plt"),
        ("nnsight llama", "clt"),
        ("nnsight gemma3", "plt"),
    ],
)
def test_in_half_precision_the_same_features(where: str, kind: str, dtype: torch.dtype) -> None:
    """Also where a pre-activation rounds to the threshold: theirs compares in the model's type."""
    model = made(where, kind, dtype=dtype)
    for seed in range(4):
        prompt = pair.prompt(32, SIZE.vocabulary, seed)
        options = {**SETTINGS, "max_feature_nodes": 4}
        ours, theirs = attribute(prompt, model, **options), trace_by_circuit_tracer(model, prompt, **options)
        assert len(theirs.active_features) > 300
        assert torch.equal(ours.active_features, theirs.active_features)
        assert torch.equal(ours.activation_values, theirs.activation_values)


@pytest.mark.parametrize("kind", ["plt_raw", "clt"])
def test_in_float64_on_nnsight_the_model_keeps_its_own_norms(kind: str) -> None:
    """They go through float32, and activations follow."""
    model = made("nnsight gpt_oss", kind, dtype=torch.float64)
    ours, theirs = pair.by(attribute, model, ids(), **SETTINGS), pair.trace_circuit_tracer(model, ids(), **SETTINGS)
    same(ours, theirs, 1e-6)
    assert torch.allclose(ours.activation_values, theirs.activation_values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([7, 3, 11]),
        ["5", "9"],
        [
            ("5 - 9", 0.75, torch.linspace(-1, 1, SIZE.width)),
            CustomTarget("x", -0.25, torch.ones(SIZE.width).cumsum(0)),
        ],
    ],
    ids=["tensor", "strings", "directions"],
)
@FEW
def test_the_same_for_targets_of_any_form(where: str, targets: Any) -> None:
    settings = {**SETTINGS, "attribution_targets": targets}
    same(
        pair.by(attribute, plain(where), ids(), **settings), pair.trace_circuit_tracer(plain(where), ids(), **settings)
    )


@pytest.mark.parametrize("prompt", [ids(), ids()[None], ids().tolist(), [0, 5]], ids=["1d", "2d", "list", "two"])
def test_the_same_for_any_share_of_probability_and_any_prompt(prompt: Any) -> None:
    for settings in ({"max_n_logits": 3, "desired_logit_prob": 0.99}, {"desired_logit_prob": 0.3}):
        ours = pair.by(attribute, plain("lens llama"), prompt, **SETTINGS, **settings)
        same(ours, pair.trace_circuit_tracer(plain("lens llama"), prompt, **SETTINGS, **settings))


def test_the_same_without_any_feature() -> None:
    model = made("lens llama", "plt")
    with torch.no_grad():
        for transcoder in model.transcoders:
            transcoder.activation_function.threshold.fill_(1e6)
    ours, theirs = pair.by(attribute, model, ids()), pair.trace_circuit_tracer(model, ids(), batch_size=8)
    assert not len(theirs.active_features)
    same(ours, theirs)


def test_a_zero_activation_is_no_feature() -> None:
    """Theirs goes through a sparse tensor: a TopK's entry of exactly zero is not there."""
    model = made("lens llama", "plt_topk_skip")
    with torch.no_grad():
        for transcoder in model.transcoders:
            transcoder.W_enc[::2], transcoder.b_enc[::2] = 0, 0
            transcoder.activation_function.k = 20
    theirs, ours = pair.trace_circuit_tracer(model, ids(), **SETTINGS), pair.by(attribute, model, ids(), **SETTINGS)
    assert len(theirs.active_features) < 20 * SIZE.layers * (POSITIONS - 1)
    same(ours, theirs)
