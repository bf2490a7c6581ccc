"""circuit-tracer's own models, by its `attribute` and by ours: the same `Graph`, and whatever is made of it."""

from __future__ import annotations

import gc
import inspect
import json
import re
import sys
import types
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from threading import Thread, get_ident
from typing import Any

import circuit_tracer
import pair
import pytest
import torch
from circuit_tracer import attribute as peer_attribute
from circuit_tracer.attribution.targets import CustomTarget
from circuit_tracer.graph import Graph, compute_graph_scores, prune_graph
from circuit_tracer.utils import create_graph_files
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pycircuit.integrations import circuit_tracer as drop_in
from pycircuit.integrations.circuit_tracer import (
    accelerate,
    attribute,
    edge_rows,
    transcoder_weights,
    transformer_lens,
)
from pycircuit.model.replacement import ReplacementModel
from pycircuit.ops import FileRows
from pycircuit.trace import MemoryBoundError

SIZE = pair.Size()
SIZES = {"gpt2": replace(SIZE, kv_heads=SIZE.heads)}  # of the others SIZE
KINDS = {
    "plt": pair.Kind(),
    "plt_topk_skip": pair.Kind(rule="topk", skip=True),
    "plt_normed": pair.Kind(reads="mlp_normed"),
    "plt_raw": pair.Kind(writes="mlp_raw"),
    "clt": pair.Kind(cross=True, reads="resid_mid"),
    "clt_relu_skip": pair.Kind(cross=True, reads="resid_mid", rule="relu", skip=True),
}
LAZY = {"": None, "lazy": (True, True), "lazy decoder": (False, True)}
CASES = [
    *((f"{backend} llama", kind, "") for backend in ("lens", "nnsight") for kind in KINDS if "normed" not in kind),
    *((f"{b} llama", kind, lazy) for b in ("lens", "nnsight") for kind in ("plt", "clt") for lazy in LAZY if lazy),
    ("lens gemma2", "plt_normed", ""), ("lens gpt2", "plt_topk_skip", ""), ("lens gpt2", "clt", ""),
    ("nnsight gemma2", "plt_normed", ""), ("nnsight gemma2", "clt", ""), ("nnsight gemma3", "plt", ""),
    ("nnsight gemma3_vision", "plt", ""), ("nnsight gemma3_vision", "clt", ""),
    ("nnsight qwen3", "plt_raw", ""), ("nnsight gpt_oss", "plt_raw", ""),
]  # fmt: skip
EVERY = pytest.mark.parametrize(("where", "kind", "lazy"), CASES)
FEW = pytest.mark.parametrize("where", ["lens llama", "nnsight llama"])
ROW = 1e-4
ACTIVE, POSITIONS, MOST = 6, 13, 60
SOME = {"batch_size": 8, "update_interval": 2, "max_feature_nodes": MOST}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transcoders")


def made(where: str, kind: str, files: Path | None = None, lazy: str = "", dtype: torch.dtype = torch.float32) -> Any:
    backend, family = where.split()
    size = SIZES.get(family, SIZE)
    held = pair.peer_transcoders(KINDS[kind], pair.transcoder_weights(KINDS[kind], size, dtype, ACTIVE), size, dtype)
    if files is not None and LAZY[lazy] is not None:
        held = pair.lazy_transcoders(held, files / f"{where} {kind} {lazy}", *LAZY[lazy])
    language = pair.language_model(family, size, dtype)
    if backend == "nnsight":
        return pair.nnsight_of(language, held, size)
    return pair.lens_of(family, language, held, size, dtype)


@cache
def plain(where: str, kind: str = "plt") -> Any:
    return made(where, kind)


def ids() -> Tensor:
    return pair.prompt(POSITIONS, SIZE.vocabulary)


@cache
def both(where: str, kind: str = "plt") -> tuple[Graph, Graph]:
    """Theirs and ours, of 60 features."""
    model = plain(where, kind)
    return pair.trace_peer(model, ids(), **SOME), pair.by(attribute, model, ids(), **SOME)


def off(ours: Tensor, theirs: Tensor) -> float:
    """The largest distance of two rows over the norm of the peer's; rows without edges must be zero in both."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    norm = theirs.norm(dim=1)
    assert not ours[norm == 0].any()
    return float(((ours - theirs).norm(dim=1)[norm > 0] / norm[norm > 0]).max())


def same(ours: Graph, theirs: Graph, close: float = ROW) -> None:
    """Every attribute of a graph: what is named or counted equal, what is measured close."""
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    for name in ("active_features", "selected_features", "input_tokens"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    for name in ("input_string", "logit_targets", "vocab_size", "scan", "n_pos", "cfg"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("activation_values", "logit_probabilities"):
        assert torch.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-6), name
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
    assert off(ours.adjacency_matrix, theirs.adjacency_matrix) < close


@EVERY
def test_the_same_graph(where: str, kind: str, lazy: str, folder: Path) -> None:
    """Of all features, and of the most influential in rounds."""
    model = made(where, kind, folder, lazy)
    for settings in ({"batch_size": 16}, SOME):
        theirs = pair.trace_peer(model, ids(), **settings)
        ours = pair.by(attribute, model, ids(), **settings)
        assert len(theirs.active_features) > 100
        assert (len(theirs.selected_features) == MOST) == (settings is SOME)
        same(ours, theirs)


@pytest.mark.parametrize(("where", "kind"), [("lens llama", "plt"), ("lens gemma2", "clt"), ("lens gpt2", "clt")])
def test_the_same_with_patterns_recomputed(where: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for prompts whose patterns are too large to keep: rotary, windows and a cap, learned positions."""
    theirs, stored = both(where, kind)
    recomputed, layers = transformer_lens._recomputed, set()

    def counted(model: Any, at: int, held: Any) -> Any:
        layers.add(at)
        return recomputed(model, at, held)

    monkeypatch.setattr(transformer_lens, "PATTERN_BYTES", 0)
    monkeypatch.setattr(transformer_lens, "_recomputed", counted)
    ours = pair.by(attribute, plain(where, kind), ids(), **SOME)
    assert layers == set(range(SIZE.layers))
    same(ours, stored, 1e-5)
    same(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_same_with_norms_folded_into_weights(family: str) -> None:
    size, kind = SIZES.get(family, SIZE), KINDS["plt"]
    held = pair.peer_transcoders(kind, pair.transcoder_weights(kind, size, torch.float32, ACTIVE), size, torch.float32)
    model = pair.lens_of(family, pair.language_model(family, size, torch.float32), held, size, torch.float32, fold=True)
    assert type(model.ln_final).__name__.endswith("Pre") and not hasattr(model.blocks[0].ln1, "w")
    same(pair.by(attribute, model, ids(), **SOME), pair.trace_peer(model, ids(), **SOME))


def test_the_same_where_several_positions_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As theirs does for the chat models of Gemma 3."""
    for where in ("lens llama", "nnsight llama"):
        model = made(where, "plt")
        model.zero_positions = slice(0, 4)
        theirs = pair.trace_peer(model, ids(), **SOME)
        assert int(theirs.active_features[:, 1].min()) == 4
        same(pair.by(attribute, model, ids(), **SOME), theirs)


@FEW
def test_the_same_for_any_opening_positions(where: str) -> None:
    """None of them, all of them, and more than there are."""
    model = made(where, "plt")
    for asked, prompt in (
        (slice(0, 0), ids()),
        (slice(None, 2), ids()),
        (slice(0, None), ids()),
        (slice(0, 4), [0, 5]),
    ):
        model.zero_positions = asked
        same(pair.by(attribute, model, prompt, **SOME), pair.trace_peer(model, prompt, **SOME))
    for asked in (slice(1, 3), slice(0, 4, 2)):
        model.zero_positions = asked
        with pytest.raises(ValueError, match=r"zero_positions must be the first ones, slice\(0, n\), got slice"):
            attribute(ids(), model, **SOME)


@FEW
def test_the_same_beyond_the_positions_a_config_names(where: str) -> None:
    longer = torch.cat([ids(), pair.prompt(SIZE.longest, SIZE.vocabulary)[1:]])
    how = {**SOME, "max_feature_nodes": 10}
    same(pair.by(attribute, plain(where), longer, **how), pair.trace_peer(plain(where), longer, **how))


@pytest.mark.parametrize("kind", ["plt_topk_skip", "clt"])
def test_in_float64_the_same_to_rounding(kind: str) -> None:
    model = made("lens gpt2", kind, dtype=torch.float64)
    ours, theirs = pair.by(attribute, model, ids(), **SOME), pair.trace_peer(model, ids(), **SOME)
    assert theirs.adjacency_matrix.dtype == torch.float64
    same(ours, theirs, 1e-10)
    assert attribute(ids(), model, **SOME).adjacency_matrix.dtype == torch.float32  # theirs takes torch's default too


@FEW
def test_half_precision_is_traced_as_closely_as_theirs(where: str) -> None:
    """Against a float32 model of the same rounded weights, on what is active in all three: patterns in half precision
    move the edges of both by a few percent."""
    exact, half = made(where, "plt"), made(where, "plt", dtype=torch.bfloat16)
    held = getattr(exact.transcoders, "_module", exact.transcoders)
    with torch.no_grad():
        for parameter in (*getattr(exact, "_module", exact).parameters(), *held.parameters()):
            parameter.copy_(parameter.to(torch.bfloat16))
    how = {"batch_size": 16, "attribution_targets": torch.tensor([7, 3])}
    graphs = attribute(ids(), exact, **how), attribute(ids(), half, **how), peer(half, **how)
    assert graphs[1].activation_values.dtype == graphs[2].activation_values.dtype == torch.bfloat16
    assert graphs[1].adjacency_matrix.dtype == graphs[2].adjacency_matrix.dtype == torch.float32
    at = [{tuple(f): i for i, f in enumerate(graph.active_features.tolist())} for graph in graphs]
    common = sorted(set(at[0]) & set(at[1]) & set(at[2]))
    assert len(common) > 0.9 * len(at[0])
    edges = [graph.adjacency_matrix[-2:, [of[f] for f in common]] for graph, of in zip(graphs, at, strict=True)]
    assert off(edges[1], edges[0]) < 0.06 and off(edges[2], edges[0]) < 0.06


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("where", "kind"), [("lens gemma2", "plt_normed"), ("nnsight gemma2", "plt_normed")])
def test_in_half_precision_the_same_targets(where: str, kind: str, dtype: torch.dtype) -> None:
    """Logits that half precision cannot tell apart come in its order, and their probabilities in its type."""
    model = made(where, kind, dtype=dtype)
    ours, theirs = attribute(ids(), model, **SOME), peer(model, **SOME)
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
        how = {**SOME, "max_feature_nodes": 4}
        ours, theirs = attribute(prompt, model, **how), peer(model, prompt, **how)
        assert len(theirs.active_features) > 300
        assert torch.equal(ours.active_features, theirs.active_features)
        assert torch.equal(ours.activation_values, theirs.activation_values)


@pytest.mark.parametrize("kind", ["plt_raw", "clt"])
def test_in_float64_on_nnsight_the_model_keeps_its_own_norms(kind: str) -> None:
    """They go through float32, and activations follow."""
    model = made("nnsight gpt_oss", kind, dtype=torch.float64)
    ours, theirs = pair.by(attribute, model, ids(), **SOME), pair.trace_peer(model, ids(), **SOME)
    same(ours, theirs, 1e-6)
    assert torch.allclose(ours.activation_values, theirs.activation_values, rtol=1e-12, atol=1e-12)


def peer(model: Any, prompt: Tensor | None = None, **how: Any) -> Graph:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        return peer_attribute(ids() if prompt is None else prompt, model, **how)


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
    settings = {**SOME, "attribution_targets": targets}
    same(pair.by(attribute, plain(where), ids(), **settings), pair.trace_peer(plain(where), ids(), **settings))


@pytest.mark.parametrize("prompt", [ids(), ids()[None], ids().tolist(), [0, 5]], ids=["1d", "2d", "list", "two"])
def test_the_same_for_any_share_of_probability_and_any_prompt(prompt: Any) -> None:
    for settings in ({"max_n_logits": 3, "desired_logit_prob": 0.99}, {"desired_logit_prob": 0.3}):
        ours = pair.by(attribute, plain("lens llama"), prompt, **SOME, **settings)
        same(ours, pair.trace_peer(plain("lens llama"), prompt, **SOME, **settings))


def test_the_same_without_any_feature() -> None:
    model = made("lens llama", "plt")
    with torch.no_grad():
        for one in model.transcoders:
            one.activation_function.threshold.fill_(1e6)
    ours, theirs = pair.by(attribute, model, ids()), pair.trace_peer(model, ids(), batch_size=8)
    assert not len(theirs.active_features)
    same(ours, theirs)


@FEW
def test_the_same_nodes_edges_and_scores(where: str) -> None:
    theirs, ours = both(where)
    for node, edge in ((0.8, 0.98), (0.95, 0.99)):
        kept = prune_graph(ours, node, edge), prune_graph(theirs, node, edge)
        assert torch.equal(kept[0].node_mask, kept[1].node_mask) and kept[0].node_mask.any()
        assert torch.equal(kept[0].edge_mask, kept[1].edge_mask)
        assert torch.allclose(kept[0].cumulative_scores, kept[1].cumulative_scores, atol=1e-5)
    assert compute_graph_scores(ours) == pytest.approx(compute_graph_scores(theirs), rel=1e-5)


@pytest.fixture
def local_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Local:
        @staticmethod
        def from_pretrained(_: Any) -> pair.Tokenizer:
            return pair.Tokenizer(SIZE.vocabulary)

    monkeypatch.setattr(sys.modules[create_graph_files.__module__], "AutoTokenizer", Local)


def written(graph: Graph, folder: Path) -> dict[str, Any]:
    create_graph_files(graph, "tiny", str(folder), scan="tiny", node_threshold=0.97, edge_threshold=0.99)
    return json.loads((folder / "tiny.json").read_text())


def alike(ours: Any, theirs: Any) -> None:
    """Files of the same structure and, to float32, of the same values."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            alike(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for pair_of in zip(ours, theirs, strict=True):
            alike(*pair_of)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    else:
        assert ours == theirs


@FEW
@pytest.mark.usefixtures("local_tokenizer")
def test_the_same_files(where: str, tmp_path: Path) -> None:
    theirs, ours = both(where)
    files = written(ours, tmp_path / "ours"), written(theirs, tmp_path / "theirs")
    assert len(files[1]["nodes"]) > 30 and len(files[1]["links"]) > 100
    for whole in files:  # those below a digit's noise may change places
        whole["nodes"].sort(key=lambda n: n["node_id"] + n["feature_type"])
        whole["links"].sort(key=lambda e: (e["source"], e["target"], e["weight"]))
    alike(*files)


def test_saved_and_loaded(tmp_path: Path) -> None:
    _, ours = both("lens llama")
    ours.to_pt(str(tmp_path / "graph.pt"))
    again = Graph.from_pt(str(tmp_path / "graph.pt"))
    same(again, ours, 1e-12)
    assert torch.equal(again.adjacency_matrix, ours.adjacency_matrix)


TUTORIAL = """
from circuit_tracer.graph import Graph, compute_graph_scores, prune_graph
from circuit_tracer.utils import create_graph_files

graph = attribute(
    prompt=prompt, model=model, max_n_logits=5, desired_logit_prob=0.9, batch_size=8, max_feature_nodes=40,
    offload=None, verbose=False,
)
graph.to_pt(folder + "/graph.pt")
create_graph_files(folder + "/graph.pt", slug="tiny", scan="tiny", output_path=folder, node_threshold=0.97)
kept = prune_graph(Graph.from_pt(folder + "/graph.pt"), node_threshold=0.97)
features = len(graph.selected_features)
strongest = int(kept.cumulative_scores[:features].argmin())
layer, position, feature = graph.active_features[graph.selected_features[strongest]].tolist()
value = graph.activation_values[graph.selected_features[strongest]]
before, _ = model.get_activations(graph.input_tokens)
after, _ = model.feature_intervention(graph.input_tokens, [(layer, position, feature, -2 * value)])
scores = compute_graph_scores(graph)
"""


@FEW
@pytest.mark.usefixtures("local_tokenizer")
def test_their_tutorial_by_one_changed_line(where: str, tmp_path: Path) -> None:
    found = []
    for at, line in enumerate(
        ("from circuit_tracer import attribute", "from pycircuit.integrations.circuit_tracer import attribute")
    ):
        names: dict[str, Any] = {"prompt": ids(), "model": plain(where), "folder": str(tmp_path / str(at))}
        Path(names["folder"]).mkdir()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            exec(compile(line + TUTORIAL, "tutorial", "exec"), names)
        found.append(names)
    theirs, ours = found
    assert ours["attribute"] is attribute and theirs["attribute"] is peer_attribute
    assert [ours[n] for n in ("layer", "position", "feature")] == [theirs[n] for n in ("layer", "position", "feature")]
    assert torch.equal(ours["kept"].node_mask, theirs["kept"].node_mask)
    assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-5)
    assert torch.allclose(ours["after"], theirs["after"], atol=1e-4)
    assert not torch.allclose(ours["after"], ours["before"], atol=1e-2)


def test_the_same_arguments_and_defaults() -> None:
    parameters = [inspect.signature(f).parameters.values() for f in (attribute, peer_attribute)]
    assert [(p.name, p.kind, p.default) for p in parameters[0]] == [(p.name, p.kind, p.default) for p in parameters[1]]


@FEW
def test_a_model_is_as_it_was(where: str) -> None:
    """Nothing is left on it: its own attribute gives the very same graph after ours."""
    model = made(where, "clt")
    before = pair.trace_peer(model, ids(), **SOME)
    attribute(ids(), model, **SOME)
    after = pair.trace_peer(model, ids(), **SOME)
    assert torch.equal(before.adjacency_matrix, after.adjacency_matrix)


class Copies(TorchDispatchMode):
    """Counts the copies of matrices of one shape, turned."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += function is torch.ops.aten.clone.default and out.shape == self.shape
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_of_their_mlps_are_not_copied_to_be_turned(dtype: torch.dtype) -> None:
    """In half precision they are: there the layout decides how sums are rounded, and with them which features fire."""
    model = made("lens llama", "plt", dtype=dtype)
    attribute(ids(), model, **SOME)  # probes the model
    weight = model.blocks[0].mlp.old_mlp.W_in
    before = model(ids())
    with Copies(weight.T.shape) as copies:
        attribute(ids(), model, **SOME)
    assert (copies.count == 0) == (dtype == torch.float32)
    with Copies(weight.T.shape) as copies:
        assert torch.equal(model(ids()), before)
    assert copies.count > 0, "TransformerLens does not copy any more: take this out of transformer_lens.py"


def modes(model: Any) -> list[tuple[str, bool]]:
    return [(name, m.training) for name, m in getattr(model, "_module", model).named_modules()]


def hooks(model: Any) -> list[tuple[int, int]]:
    found = getattr(model, "_module", model).modules()
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in found]


@FEW
def test_a_model_is_as_it_was_after_an_error_too(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(where, "plt")
    before = modes(model), hooks(model)
    wanted = attribute(ids(), model, **SOME).adjacency_matrix
    assert (modes(model), hooks(model)) == before
    mlp = model.blocks[0].mlp.old_mlp if "lens" in where else model._module.model.layers[0].mlp
    for name, of, error in (("forward", type(mlp), KeyboardInterrupt), ("_graph", drop_in.attribution, MemoryError)):
        with monkeypatch.context() as broken:
            broken.setattr(of, name, partial(failing, error))
            with pytest.raises(error):
                attribute(ids(), model, **SOME, offload="disk")
        assert (modes(model), hooks(model)) == before
        assert torch.equal(attribute(ids(), model, **SOME).adjacency_matrix, wanted)


def failing(error: type[BaseException], *args: Any, **kwargs: Any) -> None:
    raise error


@FEW
def test_threads_may_trace_side_by_side(where: str) -> None:
    models = made(where, "plt"), made(where, "clt")
    wanted = [attribute(ids(), model, **SOME).adjacency_matrix for model in models]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda at: attribute(ids(), models[at % 2], **SOME).adjacency_matrix, range(16)))
    assert all(torch.equal(graph, wanted[at % 2]) for at, graph in enumerate(found))


@FEW
def test_in_modes_without_gradients(where: str) -> None:
    """Where theirs cannot: it needs a tape."""
    model = plain(where)
    wanted = attribute(ids(), model, **SOME).adjacency_matrix
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = attribute(ids(), model, **SOME)
        assert torch.equal(found.adjacency_matrix, wanted)
    same(pair.trace_peer(model, ids(), **SOME), attribute(ids(), model, **SOME))


@pytest.mark.parametrize("nothing", ["", False])
def test_offload_may_be_anything_false(nothing: Any) -> None:
    graphs = [attribute(ids(), plain("lens llama"), **SOME, offload=o) for o in (None, nothing)]
    assert torch.equal(graphs[0].adjacency_matrix, graphs[1].adjacency_matrix)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("where", ["lens llama", "nnsight llama", "nnsight gemma3"])
def test_offloaded_modules_come_back(where: str, offload: Any) -> None:
    model = made(where, "plt_topk_skip")
    plainly, offloaded = attribute(ids(), model, **SOME), attribute(ids(), model, **SOME, offload=offload)
    assert torch.equal(plainly.adjacency_matrix, offloaded.adjacency_matrix)
    held = getattr(model, "_module", model)
    assert {t.device.type for t in (*held.parameters(), *held.buffers())} == {"cpu"}
    assert torch.equal(attribute(ids(), model, **SOME).adjacency_matrix, plainly.adjacency_matrix)


def test_progress_is_seen_when_asked_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.progress._BETWEEN", {True: 0.0, False: 0.0})
    attribute(ids(), plain("lens llama"), **SOME)
    assert not capsys.readouterr().err
    attribute(ids(), plain("lens llama"), **SOME, verbose=True)
    assert "sweep: 0 of" in capsys.readouterr().err


# Weights


@pytest.mark.parametrize("kind", ["plt_topk_skip", "clt_relu_skip"])
@FEW
def test_their_transcoders_are_not_copied(where: str, kind: str) -> None:
    model = plain(where, kind)
    ours, held = transcoder_weights.transcoders_of(model), getattr(model.transcoders, "_module", model.transcoders)
    own = {p.untyped_storage().data_ptr() for p in held.parameters()}
    for entries in (ours.w_enc, ours.b_enc, ours.w_dec, ours.b_dec, ours.w_skip):
        assert {t.untyped_storage().data_ptr() for t in entries} <= own


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_what_is_in_files_stays_there(kind: str, tmp_path: Path) -> None:
    ours = transcoder_weights.transcoders_of(made("lens llama", kind, tmp_path, "lazy"))
    assert all(isinstance(t, FileRows) for t in ours.w_dec)
    pages = Path("/proc/self/maps").read_text()
    assert pages.count(str(tmp_path)) >= SIZE.layers  # encoders are read from their files' pages
    del ours
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_zero_activation_is_no_feature() -> None:
    """Theirs goes through a sparse tensor: a TopK's entry of exactly zero is not there."""
    model = made("lens llama", "plt_topk_skip")
    with torch.no_grad():
        for one in model.transcoders:
            one.W_enc[::2], one.b_enc[::2] = 0, 0
            one.activation_function.k = 20
    theirs, ours = pair.trace_peer(model, ids(), **SOME), pair.by(attribute, model, ids(), **SOME)
    assert len(theirs.active_features) < 20 * SIZE.layers * (POSITIONS - 1)
    same(ours, theirs)


PAGE = Path(__file__).parents[2] / "docs" / "circuit-tracer.md"


@FEW
def test_the_page_runs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    blocks = re.findall(r"```py\n(.*?)```", text, re.S)
    names: dict[str, Any] = {"model": plain(where), "prompt": ids(), "__name__": "a_users_page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    assert len(blocks) == 2 and Graph.from_pt("graph.pt").selected_features.numel() == 40
    table = "".join(line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    assert re.findall(r"`(\w+)`", table) == [p for p in ORDER if p != "model"]
    assert sorted(ORDER) == sorted(inspect.signature(attribute).parameters)


# The page's order of the arguments.
ORDER = (
    "prompt", "model", "attribution_targets", "max_n_logits", "desired_logit_prob", "max_feature_nodes", "batch_size",
    "update_interval", "offload", "verbose",
)  # fmt: skip


# What is refused


def test_refusals() -> None:
    model, none = plain("lens llama"), torch.tensor([], dtype=torch.long)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "batch_size must be at least 1", {"batch_size": 0}),
        (TypeError, "batch_size must be an int", {"batch_size": 1.5}),
        (ValueError, "update_interval must be at least 1", {"update_interval": 0}),
        (ValueError, "max_feature_nodes must be zero or positive", {"max_feature_nodes": -1}),
        (ValueError, "offload must be 'cpu', 'disk' or None", {"offload": "gpu"}),
        (ValueError, "vec must have shape", {"attribution_targets": [("x", 1.0, torch.ones(3))]}),
        (ValueError, "cannot be empty", {"attribution_targets": []}),
        (
            ValueError,
            r"must leave a target, got tensor\(\[\]",
            {"attribution_targets": none},
        ),
        (ValueError, "must leave a target, got None and 0", {"max_n_logits": 0}),
    ]
    for kind, message, settings in cases:
        with pytest.raises(kind, match=message):
            attribute(ids(), model, **settings)
    with pytest.raises(TypeError, match="model must be a circuit_tracer"):
        attribute(ids(), torch.nn.Linear(2, 2))


def test_an_unknown_activation_or_hook_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("lens llama", "plt")
    monkeypatch.setattr(model.transcoders, "feature_input_hook", "hook_resid_post")
    with pytest.raises(ValueError, match=r"feature_input_hook .* 'hook_resid_post'"):
        attribute(ids(), model)
    monkeypatch.undo()
    model.transcoders[1].activation_function = torch.nn.GELU()
    with pytest.raises(TypeError, match=r"got torch\.nn\..*GELU in layer 1"):
        attribute(ids(), model)


class TopK(torch.nn.Module):
    """As another library's: the same name, another rule."""

    k = ACTIVE

    def forward(self, x: Tensor) -> Tensor:
        value, index = x.topk(self.k)
        return torch.zeros_like(x).scatter_(-1, index, (value - 1).relu())


def test_an_activation_is_not_known_by_its_name() -> None:
    model = made("lens llama", "plt")
    model.transcoders[2].activation_function = TopK()
    with pytest.raises(TypeError, match=r"circuit-tracer's JumpReLU or TopK, got .*test_drop_in\.TopK in layer 2"):
        attribute(ids(), model)


def test_a_threshold_of_any_shape() -> None:
    model = made("lens llama", "plt")
    with torch.no_grad():
        for one, shape in zip(model.transcoders, ((-1,), (1, -1), (-1,)), strict=True):
            rule = one.activation_function
            rule.threshold = torch.nn.Parameter(rule.threshold.reshape(shape))
    same(pair.by(attribute, model, ids(), **SOME), pair.trace_peer(model, ids(), **SOME))


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that a model is put to the test."""
    seen: list[str] = []

    def counted(own: Any) -> Any:
        return lambda *args: (seen.append("probe"), own(*args))[1]

    for of in (transformer_lens, ReplacementModel):
        monkeypatch.setattr(of, "_probe", counted(of._probe))
    return seen


@FEW
def test_a_model_is_put_to_the_test_once_for_its_weights(where: str, probes: list[str]) -> None:
    model = made(where, "plt")
    weight = model.blocks[1].attn.W_O if "lens" in where else model._module.model.layers[1].self_attn.o_proj.weight
    for _ in range(3):
        attribute(ids(), model, **SOME)
    assert len(probes) == 1
    with torch.no_grad():
        weight.mul_(1.5)
    attribute(ids(), model, **SOME)
    assert len(probes) == 2
    weight.data = weight.data.clone()
    attribute(ids(), model, **SOME)
    assert len(probes) == 3


@FEW
def test_no_change_of_weights_makes_a_graph_stale(where: str) -> None:
    """One through `.data` leaves no trace that torch would count."""
    model = made(where, "plt")
    before = attribute(ids(), model, **SOME).adjacency_matrix
    if "lens" in where:
        model.blocks[1].attn._W_V.data.mul_(-1.5)
    else:
        model._module.model.layers[1].self_attn.v_proj.weight.data.mul_(-1.5)
    ours = pair.by(attribute, model, ids(), **SOME)
    same(ours, pair.trace_peer(model, ids(), **SOME))
    assert ours.adjacency_matrix.shape != before.shape or not torch.allclose(ours.adjacency_matrix, before, atol=1e-3)


def test_a_model_that_is_wired_anew_is_put_to_the_test_again(probes: list[str]) -> None:
    model = made("lens llama", "plt")
    attribute(ids(), model, **SOME)
    model.blocks[1].hook_attn_out.add_hook(lambda acts, hook: 2 * acts, is_permanent=True)
    with pytest.raises(ValueError, match=r"attention .* off"):
        attribute(ids(), model, **SOME)
    assert len(probes) == 2


def test_a_forward_in_another_thread_does_not_enter_the_graph() -> None:
    """An application runs the model while it is traced, here between two layers of the trace's own forward."""
    model, other = made("lens llama", "plt"), pair.prompt(POSITIONS, SIZE.vocabulary, seed=9)
    wanted, answer = attribute(ids(), model, **SOME), model(other[None])
    answers: list[Tensor] = []

    def application(_: Any, args: Any, out: Tensor) -> None:
        if get_ident() == main:
            thread = Thread(target=lambda: answers.append(model(other[None])))
            thread.start()
            thread.join()

    main, handle = get_ident(), model.blocks[2].hook_resid_pre.register_forward_hook(application)
    try:
        graph = attribute(ids(), model, **SOME)
    finally:
        handle.remove()
    assert torch.equal(graph.adjacency_matrix, wanted.adjacency_matrix)
    assert len(answers) >= 1 and all(torch.equal(got, answer) for got in answers)


def test_a_model_that_is_built_otherwise_is_refused() -> None:
    """Its parts are put to the test first: here attention's output is changed on its way to the stream."""
    model = made("lens llama", "plt")
    model.blocks[1].hook_attn_out.add_hook(lambda acts, hook: 2 * acts, is_permanent=True)
    with pytest.raises(ValueError, match=r"attention .* off"):
        attribute(ids(), model)


def test_their_matrix_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_rows, "free_bytes", lambda _: 1000)
    with pytest.raises(MemoryBoundError, match="lower max_feature_nodes"):
        attribute(ids(), plain("lens llama"))


def test_without_circuit_tracer_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drop_in.generations, "find_spec", lambda _: None)
    for call in (lambda: attribute(ids(), None), accelerate):
        with pytest.raises(ImportError, match="pip install circuit-tracer"):
            call()


# accelerate()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module that imported the function by name, twice."""
    module = types.ModuleType("a_users_script")
    exec("from circuit_tracer import attribute\nfrom circuit_tracer import attribute as run", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def test_accelerate_replaces_every_name_and_gives_it_back(script: types.ModuleType) -> None:
    theirs = sys.modules["circuit_tracer.attribution.attribute"]
    with accelerate():
        ours = circuit_tracer.attribute
        assert ours is theirs.attribute is script.attribute is script.run is not peer_attribute_of(script)
        assert globals()["peer_attribute"] is ours  # this module's name, too
        graph = script.run(ids(), plain("lens llama"), **SOME)
        exec("from circuit_tracer import attribute as late", script.__dict__)
    assert circuit_tracer.attribute is theirs.attribute is script.attribute is script.run is script.late
    assert script.attribute is peer_attribute and theirs.attribute.__module__ == theirs.__name__
    assert torch.equal(graph.adjacency_matrix, attribute(ids(), plain("lens llama"), **SOME).adjacency_matrix)


def peer_attribute_of(script: types.ModuleType) -> Any:
    """circuit-tracer's own, whatever names are bound to."""
    return script.attribute.__wrapped__


def test_accelerate_nests_repeats_and_ends_with_an_error(script: types.ModuleType) -> None:
    own = script.attribute
    first, second = accelerate(), accelerate()
    assert script.attribute is not own and script.attribute.__wrapped__ is own
    first.restore()
    first.restore()  # a second call does nothing
    assert script.attribute is not own
    second.restore()
    assert script.attribute is own is circuit_tracer.attribute
    with pytest.raises(KeyError), accelerate(), accelerate():
        raise KeyError
    assert script.attribute is own is circuit_tracer.attribute


def test_accelerate_leaves_our_own_name_alone(script: types.ModuleType) -> None:
    mine = drop_in.attribute
    with accelerate():
        script.mine = mine
    assert script.mine is mine is drop_in.attribute is not script.attribute


class Lazy(types.ModuleType):
    """As some packages have them: a look at what it holds imports all of it."""

    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise ImportError("everything at once")


def test_accelerate_wakes_no_lazy_module(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_lazy_module", Lazy("a_lazy_module"))
    monkeypatch.setitem(sys.modules, "none", None)  # as an import that is forbidden
    own = script.attribute
    with accelerate():
        assert script.attribute is not own
    assert script.attribute is own


def test_one_handle_serves_nested_blocks_and_no_later_one(script: types.ModuleType) -> None:
    own, handle = script.attribute, accelerate()
    with handle:
        with handle:
            pass
        assert script.attribute is not own
    assert script.attribute is own
    with pytest.raises(RuntimeError, match=r"entered before restore\(\), .*call it again"), handle:
        pass
    assert script.attribute is own
