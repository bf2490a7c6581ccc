"""Automatic labels of features: their text, the tokens they are made of, where they come from and where they go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import builders
import graphs
import numpy as np
import pytest
import torch
from commands import Run

import pycircuit as pc
from pycircuit.labels import label_cache, raised_tokens
from pycircuit.labels.label_text import LONGEST, label_text
from pycircuit.labels.output_tokens import OutputTokens
from pycircuit.labels.plain_tokens import PlainTokens, columns
from pycircuit.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(9)
TEXT = "the capital of the state containing Dallas is"


class Words:
    """A tokenizer of fixed tokens, stored as byte-level tokenizers store them."""

    def __init__(self, stored: list[str], decoded: list[str]) -> None:
        self.stored, self.decoded = stored, decoded

    def decode(self, ids: list[int]) -> str:
        return "".join(self.decoded[i] for i in ids)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.stored[i] for i in ids]


TOKENS = [  # stored, decoded, shown
    ("ĠTexas", " Texas", "Texas"),
    ("ing", "ing", "-ing"),
    ("The", "The", "The"),
    ("Ċ", "\n", "⏎"),
    ("ĠĠĠĠ", "    ", "␣×4"),
    ("ĊĊĉ", "\n\n\t", "⏎×2⇥"),
    ("âĢ", "\ufffd", "<E2 80>"),
    ("ĠâĢ", " \ufffd", "<E2 80>"),
    ("<0xE2>", "\ufffd", "<E2>"),
    ("âĢĭ", "\u200b", "<U+200B>"),
    ("æĿ±äº¬", "東京", "東京"),
    ("ĠÐľÐ¾Ñģ", " Мос", "Мос"),
    ("Ìģ", "\u0301", "◌\u0301"),
    (",", ",", ","),
    ("<|im_end|>", "<|im_end|>", "<|im_end|>"),
    ("Ġa" + "b" * 30, " a" + "b" * 30, "a" + "b" * 14 + "…"),
    ("end\\n", "end\n", "-end⏎"),
]


def test_tokens_are_legible() -> None:
    plain = PlainTokens(Words([t[0] for t in TOKENS], [t[1] for t in TOKENS]), len(TOKENS))
    assert [plain(i) for i in range(len(TOKENS))] == [t[2] for t in TOKENS]
    assert PlainTokens(None, 9)(7) == "7"
    same = PlainTokens(Words(["Ġis", "is", "ĠIS", "a"], [" is", "is", " IS", "a"]), 4)
    assert same.distinct([1, 0, 2, 3], 3) == ["-is", "-a"]


@pytest.mark.parametrize(
    ("raised", "active", "everywhere", "text"),
    [
        (["Texas", "Dallas", "TX"], [], False, "raises Texas, Dallas, TX"),
        ([], ["capital"], False, 'on "capital"'),
        (["Texas", "TX"], ["capital", "city"], False, 'raises Texas, TX · on "capital"'),
        (["Jerusalem", "Constantinople", "Vienna"], ["Jerusalem"], False, 'raises Jerusalem · on "Jerusalem"'),
        (["Jerusalem", "Constantinople", "Vienna"], [], False, "raises Jerusalem, Constantinople, Vienna"),
        ([], ["a", "b", "c", "d"], False, 'on "a", "b", "c"'),
        ([], ["a"], True, "on most tokens"),
        (["a", ","], ["b"], True, 'raises a, ","'),
        ([], ['"'], False, "on '\"'"),
        ([], ["東" * 7, "京" * 7, "都" * 7], False, f'on "{"東" * 7}", "{"京" * 7}"'),
        ([], [], False, ""),
    ],
)
def test_label_texts(raised: list[str], active: list[str], everywhere: bool, text: str) -> None:
    assert label_text(raised, active, everywhere) == text
    assert columns(text) <= LONGEST


def speaking(kind: str, dtype: torch.dtype = torch.float32, family: str = "llama") -> pc.ReplacementModel:
    """A model whose features raise one token each: feature f of every layer token f + 1."""
    model = builders.replacement(family, kind, dtype)
    weights = model.weights
    rows = (weights.unembedding - weights.unembedding_mean)[1 : model.transcoders.size(0) + 1]
    with torch.no_grad():
        for decoder in model.transcoders.w_dec:
            row = rows / weights.final_norm.gain
            decoder.copy_(row if decoder.ndim == 2 else row[:, None].expand_as(decoder))
    return model


def raised_of(model: pc.ReplacementModel, pairs: list[tuple[int, int]]) -> tuple[list[list[int]], np.ndarray, float]:
    """(tokens of each pair, their scores, the score above which they are clear)."""
    entries, clear = raised_tokens.raised_tokens(model, np.array(pairs), Progress(False))
    return entries.tokens.tolist(), entries.score, clear


@pytest.mark.parametrize(("family", "kind"), [("llama", "plt"), ("gpt2", "plt_skip"), ("olmo2", "clt")])
def test_raised_tokens_are_those_that_an_intervention_raises(family: str, kind: str) -> None:
    model = builders.replacement(family, kind, torch.float64)
    layer, last = model.depth - 1, len(PROMPT) - 1  # nothing but norm and unembedding comes after its features
    for feature in (3, 11):
        changed = pc.intervene(model, PROMPT, [pc.Intervention(layer, last, feature, 50.0)], freeze="all")
        change = changed.logits[-1] - changed.logits_before[-1]
        present = changed.effect([(layer, last, feature)])  # zero: its own input does not change
        assert float(present.abs()) < 1e-9
        (tokens,), score, _ = raised_of(model, [(layer, feature)])
        assert tokens == change.topk(len(tokens)).indices.tolist()
        deviation = float((change.max() - change.mean()) / change.std(unbiased=False))
        assert float(score[0]) == pytest.approx(deviation, rel=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), [("plt", torch.float32), ("clt", torch.float32), ("clt", torch.bfloat16)])
def test_features_that_speak_are_clear_and_random_ones_are_not(kind: str, dtype: torch.dtype) -> None:
    pairs = [(layer, feature) for layer in range(builders.LAYERS) for feature in range(24)]
    tokens, score, clear = raised_of(speaking(kind), pairs)
    assert [ids[0] for ids in tokens] == [feature + 1 for _, feature in pairs]
    assert (score > clear).mean() > 0.9
    model = pc.ReplacementModel(builders.build("llama", dtype), builders.transcoders(kind, torch.float32))
    _, score, clear = raised_of(model, pairs)
    assert (score > clear).mean() < 0.1


def test_lazy_decoders_give_the_same_labels(tmp_path: Path) -> None:
    model = speaking("clt")
    model.transcoders.save(tmp_path / "set")
    lazy = pc.ReplacementModel(model.hf_model, pc.transcoders.io.load(tmp_path / "set", lazy=True))
    assert not isinstance(lazy.transcoders.w_dec[0], torch.Tensor)
    traced = [pc.attribute(m, PROMPT, progress=False) for m in (model, lazy)]
    assert traced[0].automatic_labels == traced[1].automatic_labels
    assert any("raises" in text for text in traced[0].automatic_labels.values())


def test_every_feature_of_a_trace_has_a_label() -> None:
    model = speaking("plt")
    model.labels = {(1, 2): "a name"}
    graph = pc.attribute(model, PROMPT, progress=False)
    keys = {(layer, feature) for layer, _, feature in graph.features.tolist()}
    assert graph.automatic_labels.keys() == keys - {(1, 2)}
    assert all(columns(text) <= LONGEST for text in graph.automatic_labels.values())
    for node, (layer, _, feature) in enumerate(graph.features.tolist()):
        text, automatic = graph.label(layer, feature)
        assert text and automatic == ((layer, feature) != (1, 2))
        description = graph.describe(node)
        assert (description["label"], description["automatic"]) == (text, automatic)
    assert graph.label(0, 10**6) == ("", False)
    assert graph.timings["labels"] > 0
    assert not pc.attribute(model, PROMPT, progress=False, labels=False).automatic_labels
    labelled = pc.label(model, replace(graph, labels={}, automatic_labels={}), progress=False)
    assert labelled.labels == {key: text for key, text in model.labels.items() if key in keys}
    assert labelled.automatic_labels.keys() == graph.automatic_labels.keys()


def test_labels_of_the_prompt_name_the_strongest_tokens() -> None:
    features = [[0, 0, 5], [0, 1, 5], [0, 2, 5], [1, 2, 6]]
    graph = graphs.assemble(torch.zeros(17, 17), features, builders.LAYERS, 3, [1.0])
    graph = replace(graph, values=torch.tensor([1.0, 4.0, 2.5, 1.0]), vocab_size=0)
    model = builders.replacement("llama", "plt", torch.float32)
    labels = pc.label(model, graph, progress=False).automatic_labels
    assert labels == {(0, 5): 'on "8", "9"', (1, 6): 'on "9"'}


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of vectors multiplied by the unembedding, and every trace worth caching."""
    counts: list[int] = []
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    original = OutputTokens.raised
    monkeypatch.setattr(raised_tokens, "WORTH_CACHING", 0.0)
    monkeypatch.setattr(OutputTokens, "raised", lambda self, rows: (counts.append(len(rows)), original(self, rows))[1])
    return counts


def test_raised_tokens_are_cached(counted: list[int]) -> None:
    model, pairs = speaking("clt"), [(0, 3), (2, 1), (0, 1)]
    first = raised_of(model, pairs)
    assert counted == [67]
    path = label_cache.LabelCache(model, 8).path
    assert path.is_file()
    counted.clear()
    assert raised_of(model, pairs)[0] == first[0] and raised_of(model, pairs)[2] == first[2]
    assert not counted
    raised_of(model, [(0, 3), (0, 4)])  # another feature is added to the file
    model.transcoders.w_dec[0][3] *= -1  # and one that changed is not taken from it
    tokens, _, _ = raised_of(model, [(0, 3), (0, 4)])
    assert counted == [1, 1] and tokens[0] != first[0][1]
    path.write_bytes(b"damaged")
    counted.clear()
    assert raised_of(model, pairs[1:])[0] == [first[0][0], first[0][2]]
    assert counted == [66]
    assert label_cache.LabelCache(speaking("plt"), 8).path != path
    assert label_cache.LabelCache(speaking("clt", family="mistral"), 8).path != path


def test_a_cache_that_cannot_be_written_is_said(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "file"))
    graph = pc.attribute(speaking("plt"), PROMPT)
    assert graph.automatic_labels and counted
    assert "labels: not cached in" in capsys.readouterr().err


def test_labels_are_in_files_and_other_libraries(tmp_path: Path) -> None:
    graph = replace(graphs.by_hand(), labels={(1, 6): "Texas"}, automatic_labels={(0, 5): "raises (p=1), TX"})
    graph.save(tmp_path / "g.safetensors")
    loaded = pc.Graph.load(tmp_path / "g.safetensors")
    assert loaded.automatic_labels == graph.automatic_labels and loaded.labels == graph.labels
    assert loaded.prune(1.0, 1.0).graph.label(0, 5) == ("raises (p=1), TX", True)
    graph.to_json(tmp_path / "g.json", node_threshold=1.0)
    nodes = json.loads((tmp_path / "g.json").read_text())["nodes"]
    clerps = {node["node_id"]: node["clerp"] for node in nodes}
    assert (clerps["0_5_0"], clerps["1_6_0"]) == ("raises (p =1), TX (automatic)", "Texas")
    described = graph.to_networkx().nodes
    assert (described[0]["label"], described[0]["automatic"]) == ("raises (p=1), TX", True)
    assert (described[1]["label"], described[1]["automatic"]) == ("Texas", False)


def test_files_without_automatic_labels_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycircuit.graph.io import graph_file

    graph = replace(graphs.by_hand(), labels={(1, 6): "Texas"})
    with monkeypatch.context() as older:
        older.setattr(graph_file, "_LABELS", ("labels",))
        graph.save(tmp_path / "g.safetensors")
    loaded = pc.Graph.load(tmp_path / "g.safetensors")
    assert loaded.labels == {(1, 6): "Texas"} and loaded.automatic_labels == {}


@pytest.fixture(scope="module")
def unnamed() -> pc.ReplacementModel:
    """The demo model without names for its features."""
    model = pc.load("demo")
    model.labels = {}
    return model


@pytest.fixture(scope="module")
def example_folder(unnamed: pc.ReplacementModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Examples of two features: one of Texan cities, one that says Austin."""
    folder = tmp_path_factory.mktemp("graphs")
    cities = [TEXT.replace("Dallas", city) for city in ("Dallas", "Houston", "Austin", "Denver")]
    pc.write_examples(unnamed, cities, folder, features=[(0, 20), (2, 290)], progress=False)
    return folder


def test_labels_of_an_examples_folder(unnamed: pc.ReplacementModel, example_folder: Path) -> None:
    graph = pc.attribute(unnamed, TEXT, progress=False)
    assert graph.automatic_labels[0, 20] == 'on "Dallas"'
    assert graph.automatic_labels[2, 290].startswith("raises Austin, ")
    for folder in (example_folder, example_folder / "features" / "local"):
        labelled = pc.label(unnamed, graph, folder, progress=False).automatic_labels
        assert labelled[0, 20].startswith("on ") and '"Houston"' in labelled[0, 20]
        assert labelled[2, 290] == 'raises Austin · on "is"'
    assert pc.attribute(unnamed, TEXT, labels=example_folder, progress=False).automatic_labels[0, 20] == labelled[0, 20]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: folder / "gone", FileNotFoundError, "labels must be a folder of pc.write_examples, got .*gone"),
        (lambda folder: folder.parent, ValueError, "labels must .* one set of features, got .* with none; name the"),
        (lambda folder: 3, TypeError, "labels must be True, False or a folder of examples, got int"),
    ],
)
def test_folders_that_are_none(
    unnamed: pc.ReplacementModel, tmp_path: Path, change: Callable[[Path], Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(error, match=rf"^attribute: {message}"):
        pc.attribute(unnamed, TEXT, labels=change(tmp_path / "set"), progress=False)
    with pytest.raises(error, match=rf"^attribute_many: {message}"):
        pc.attribute_many(unnamed, [TEXT], labels=change(tmp_path / "set"), progress=False)


def test_example_files_of_another_form(unnamed: pc.ReplacementModel, tmp_path: Path) -> None:
    graph = pc.attribute(unnamed, TEXT, labels=False, progress=False)
    path = tmp_path / f"{(0 + 20) * (0 + 20 + 1) // 2 + 20}.json"
    for content in (
        "[]",
        "{",
        '{"index": 1}',
        '{"index": 20, "examples_quantiles": [{"examples": [{}]}]}',
        "[" * 10**5,
    ):
        path.write_text(content)
        with pytest.raises(
            ValueError, match=r"^label: labels must be a folder of pc.write_examples, got .*; write it again"
        ):
            pc.label(unnamed, graph, tmp_path, progress=False)


def test_graphs_of_another_model(unnamed: pc.ReplacementModel) -> None:
    with pytest.raises(
        ValueError, match=r"^label: graph must be of the model, which has 3 layers and .* tokens, got one of 2"
    ):
        pc.label(unnamed, graphs.by_hand())
    with pytest.raises(TypeError, match=r"^label: graph must be a pc.Graph, got str"):
        pc.label(unnamed, "graph")  # type: ignore[arg-type]


def test_labels_on_the_command_line(run: Run, example_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "g.safetensors"
    assert run("attribute", "demo", TEXT, "--labels", example_folder, "--save", saved, "--quiet").code == 0
    graph = pc.Graph.load(saved)
    assert graph.label(0, 20) == ("Texas", False) and graph.automatic_labels
    assert run("attribute", "demo", TEXT, "--no-labels", "--save", saved, "--quiet").code == 0
    assert not pc.Graph.load(saved).automatic_labels
    both = run("attribute", "demo", TEXT, "--labels", example_folder, "--no-labels")
    assert both.code == 2 and "one of --labels and --no-labels must be given, got both" in both.err
