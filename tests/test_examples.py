"""Files of features: every number against a dense count by hand, files whole or not at all, ids that graphs use."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import builders
import pytest
import random_transcoders
import torch
from commands import Run, runner
from torch import Tensor

import pycircuit as pc
from pycircuit.demo import facts
from pycircuit.examples import example_files, runs
from pycircuit.model.capture import STREAMS, capture
from pycircuit.model.families import family_of
from pycircuit.model.weights import read_weights
from pycircuit.ops import SparseFeatures

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, SIZE, CONTEXT, BINS = random_transcoders.LAYERS, random_transcoders.SIZE, 20, 50
SHOWN = {"top": 4, "groups": 3, "per_group": 2, "around": 5, "logits": 6}
CASES = {  # family, transcoders
    "llama": ("llama", {"cross": False}),
    "layer_norm": ("gpt2", {"cross": True, "reads": "resid_mid"}),
    "cross": ("llama", {"cross": True, "rule": "topk", "hole": 1}),
    "negative": ("llama", {"cross": False, "rule": "topk_negative"}),
    "everywhere": ("llama", {"cross": False, "rule": "everywhere"}),
    "post_norm": ("gemma2", {"cross": False, "writes": "mlp_raw"}),
    "post_norms": ("gemma2", {"cross": True, "writes": "mlp_raw"}),
}
random_transcoders.RULES["everywhere"] = lambda g, dtype: pc.TopK(SIZE, keep_negative=True)


def build(case: str, dtype: torch.dtype = torch.float64) -> pc.ReplacementModel:
    family, settings = CASES[case]
    transcoders = random_transcoders.random_set(dtype=dtype, **settings)
    labels = {(0, 3): "a label", (2, 5): "another"}
    return pc.ReplacementModel(builders.build(family, dtype), transcoders, labels=labels)


def corpus() -> list[list[int]]:
    """Texts of many lengths, longer than the context and shorter than the ignored positions; one of them twice."""
    lengths = (13, 1, 7, 47, 20, 2, 21, 9, 15, 30)
    made = [builders.prompt(length, seed).tolist() for seed, length in enumerate(lengths)]
    return [*made, made[2], made[0]]


def cut(texts: list[list[int]]) -> list[list[int]]:
    pieces = [text[begin : begin + CONTEXT] for text in texts for begin in range(0, len(text), CONTEXT)]
    return [text_piece for text_piece in pieces if len(text_piece) > 1]  # the first position is ignored


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(a model, the folder of its files), written a few activations at a time."""
    model, folder = build(request.param), tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "ACTIVATIONS_AT_ONCE", 90)
        patch.setattr(runs, "FEATURES_AT_ONCE", 7)
        patch.setattr(example_files, "_POSITIONS", 33)
        made = pc.write_examples(model, corpus(), folder, "set", **SHOWN, context=CONTEXT, progress=False)
    assert made == folder / "features" / "set"
    return model, made


def dense(model: Any, texts: list[list[int]]) -> list[list[Tensor]]:
    """Activations by their definition: for each layer, [positions, features] of each text."""
    hf_model, t, row = model.hf_model, model.transcoders, family_of(model.hf_model)
    weights = read_weights(hf_model, row)
    read = [capture(hf_model, row, weights, torch.tensor(text), STREAMS).streams[t.reads] for text in texts]
    values_of: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for layer in range(LAYERS):
        for x in read if t.size(layer) else []:
            pre = x[layer] @ t.w_enc[layer].T + t.b_enc[layer]
            value = torch.where(t.activation[layer].active(pre), pre, 0)
            value[:1] = 0
            values_of[layer].append(value)
    return values_of


def read(folder: Path, layer: int, feature: int) -> dict[str, Any]:
    total = layer + feature
    return json.loads((folder / f"{sum(range(total + 1)) + feature}.json").read_text())


def near(actual: list[float], expected: list[float]) -> bool:
    """Files have six digits."""
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-12) for a, b in zip(actual, expected, strict=True))


def percentile(ordered: list[float], share: float) -> float:
    rank = share * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (rank - low) * (ordered[high] - ordered[low])


def check_distribution(description: dict[str, Any], every: list[float]) -> None:
    """every: of all tokens past the ignored ones, silent ones too."""
    active = sorted(v for v in every if v != 0)
    assert near([description["act_min"], description["act_max"]], [min(every), max(every)])
    assert near([description["activation_frequency"]], [len(active) / len(every)])
    if not active:
        assert description["quantile_values"] == description["histogram"] == description["examples_quantiles"] == []
        return
    assert near(description["quantile_values"], [percentile(active, n / 100) for n in range(1, 100)])
    low, high = min(every), max(every)
    counts = [0] * BINS
    for value in active:
        counts[min(BINS - 1, int((value - low) / (high - low) * BINS))] += 1
    assert description["histogram"] == counts


def expected_places(columns: list[list[float]]) -> dict[str, list[tuple[int, int]]]:
    """The examples of every group, as (text, position)."""
    strongest = sorted(
        ((max(c), -t) for t, c in ((t, [v for v in c if v != 0]) for t, c in enumerate(columns)) if c), reverse=True
    )
    places = {"Top activations": [(-t, columns[-t].index(v)) for v, t in strongest[: SHOWN["top"]]]}
    ranked = sorted((-v, t, p) for t, c in enumerate(columns) for p, v in enumerate(c) if v != 0)
    names = ("Quantile 67% to 100%", "Quantile 34% to 67%", "Quantile 0% to 34%")
    for group, name in enumerate(names):
        members = ranked[len(ranked) * group // 3 : len(ranked) * (group + 1) // 3]
        share = min(SHOWN["per_group"], len(members))
        picked = [members[int((n + 0.5) / share * len(members))] for n in range(share)]
        places |= {name: [(t, p) for _, t, p in picked]} if picked else {}
    return places if ranked else {}


def check_examples(description: dict[str, Any], texts: list[list[int]], columns: list[list[float]]) -> None:
    places, seen = expected_places(columns), set()
    assert [group["quantile_name"] for group in description["examples_quantiles"]] == list(places)
    for group in description["examples_quantiles"]:
        assert len(group["examples"]) == len(places[group["quantile_name"]])
        for example, (text, position) in zip(group["examples"], places[group["quantile_name"]], strict=True):
            begin = max(0, position - SHOWN["around"])
            window = slice(begin, position + SHOWN["around"] + 1)
            assert example["train_token_ind"] == position - begin
            assert example["tokens"] == [str(token) for token in texts[text][window]]
            assert near(example["tokens_acts_list"], columns[text][window])
            key = (position - begin, *example["tokens"])
            assert example["is_repeated_datapoint"] == (key in seen)
            seen.add(key)


def test_every_number_of_every_file(case: tuple[Any, Path]) -> None:
    model, folder = case
    texts = cut(corpus())
    files, repeated, silent = 0, 0, 0
    for layer, values in enumerate(dense(model, texts)):
        for feature in range(model.transcoders.size(layer)):
            description = read(folder, layer, feature)
            columns = [v[:, feature].tolist() for v in values]
            check_distribution(description, [v for column in columns for v in column[1:]])
            check_examples(description, texts, columns)
            assert description["index"] == feature and description["transcoder_id"] == f"set/{layer}"
            assert description.get("label") == model.labels.get((layer, feature))
            files += 1
            silent += not description["histogram"]
            shown = [e for group in description["examples_quantiles"] for e in group["examples"]]
            repeated += sum(e["is_repeated_datapoint"] for e in shown)
    assert len(list(folder.iterdir())) == files and silent < files and repeated


def effects(model: Any, layer: int) -> Tensor:
    """Decoder rows, as the norms of the model's own modules scale them, times the unembedding: [features, tokens]."""
    hf_model, t = model.hf_model, model.transcoders
    w_dec = t.w_dec[layer]
    slots = [w_dec[:, slot] for slot in range(w_dec.shape[1])] if w_dec.ndim == 3 else [w_dec]
    total = torch.zeros_like(slots[0])
    for slot, rows in enumerate(slots):
        if t.writes == "mlp_raw":
            rows = rows * (1 + hf_model.model.layers[layer + slot].post_feedforward_layernorm.weight)
        total += rows
    if model.family.model_type == "gpt2":
        final = (total - total.mean(1, keepdim=True)) * hf_model.transformer.ln_f.weight
    else:
        final = total * (hf_model.model.norm.weight + (model.family.model_type == "gemma2"))
    return (final @ hf_model.get_output_embeddings().weight.T).detach()


def test_tokens_that_features_speak_for(case: tuple[Any, Path]) -> None:
    model, folder = case
    for layer in range(LAYERS):
        if not model.transcoders.size(layer):
            continue
        order = effects(model, layer).argsort(1)
        for feature in range(SIZE):
            description = read(folder, layer, feature)
            ranked = [str(token) for token in order[feature].tolist()]
            assert description["bottom_logits"] == ranked[: SHOWN["logits"]]
            assert description["top_logits"] == ranked[::-1][: SHOWN["logits"]]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_pieces_of_work_change_nothing(case: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = case
    again = pc.write_examples(model, corpus(), tmp_path, "set", **SHOWN, context=CONTEXT, progress=False)
    assert contents(again) == contents(folder)


@pytest.mark.parametrize("cross", [False, True])
def test_decoders_in_files_and_features_that_were_asked_for(cross: bool, tmp_path: Path) -> None:
    transcoders = random_transcoders.random_set(cross)
    pc.transcoders.save(transcoders, tmp_path / "transcoders")
    hf_model = builders.build("llama")
    left = pc.transcoders.load(tmp_path / "transcoders")
    assert not isinstance(left.w_dec[0], Tensor)
    every_file, chosen_files = (
        contents(
            pc.write_examples(pc.ReplacementModel(hf_model, t), corpus(), tmp_path, scan, **settings, progress=False)
        )
        for t, scan, settings in ((transcoders, "a", {}), (left, "b", {"features": [(2, 5), (0, 3), (0, 3)]}))
    )
    assert chosen_files.keys() == {"9.json", "33.json"} and len(every_file) == LAYERS * SIZE
    for name, layer in (("9.json", 0), ("33.json", 2)):
        assert json.loads(chosen_files[name]) == json.loads(every_file[name]) | {"transcoder_id": f"b/{layer}"}


def test_nothing_to_show(tmp_path: Path) -> None:
    settings = {"top": 0, "groups": 0, "logits": 0}
    made = pc.write_examples(build("llama"), corpus(), tmp_path, **settings, progress=False)
    assert made == tmp_path / "features" / "local"
    description = read(made, 1, 4)
    assert description["examples_quantiles"] == description["top_logits"] == description["bottom_logits"] == []
    assert description["activation_frequency"] > 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"texts": []}, "texts must hold at least one text"),
        ({"texts": "one text"}, "texts must be a list"),
        ({"texts": ["text"]}, "tokenizer must be given"),
        ({"texts": [[5], []]}, "texts must be longer than the 1 ignored positions, got at most 1"),
        ({"texts": [[5, 61]]}, "text 0 must hold ids from 0 to 60, got 5 to 61"),
        ({"folder": "nowhere"}, "folder must be one that exists, got nowhere"),
        ({"scan": "there"}, "path must be a new folder"),
        ({"scan": "a/b"}, "scan must be a name without slashes"),
        ({"scan": "../b"}, "scan must be a name without slashes"),
        ({"scan": ""}, "scan must be a name without slashes"),
        ({"scan": 3}, "scan must be a string, got int"),
        ({"top": -1}, "top must be zero or positive, got -1"),
        ({"per_group": 1.5}, "per_group must be an int, got float"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"model": "demo"}, "model must be a pc.ReplacementModel, got str"),
        ({"features": [(0, SIZE)]}, f"features must be of the model's transcoders, got {SIZE} of layer 0"),
        ({"features": [(0, 1, 2)]}, r"features must be pairs of layer and feature.*got shape \[1, 3\]"),
        ({"features": []}, "features must be pairs"),
        ({"progress": 3}, "progress must be"),
    ],
)
def test_errors_come_first(changes: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "features" / "there").mkdir(parents=True)
    (tmp_path / "features" / "there" / "0.json").touch()
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(pc.ReplacementModel, "activations", None)
    arguments: dict[str, Any] = {"model": build("llama"), "texts": corpus(), "folder": tmp_path, "progress": False}
    with pytest.raises((ValueError, TypeError, OSError), match=says):
        pc.write_examples(**arguments | changes)
    assert sorted(tmp_path.rglob("*")) == before


def test_numbers_that_are_none(tmp_path: Path) -> None:
    model = build("llama")
    model.transcoders.b_enc[1][7] = math.inf
    with pytest.raises(ValueError, match="activations must be finite, got inf of feature 7 in layer 1"):
        pc.write_examples(model, corpus(), tmp_path, progress=False)
    assert not list((tmp_path / "features").iterdir())


def test_whole_or_not_at_all(tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []

    def report(phase: str, done: int, total: int) -> None:
        steps.append((phase, done, total))
        assert not (tmp_path / "features" / "local").exists()
        if stop and (phase, done) == ("writing files", 20):
            raise KeyboardInterrupt

    stop = True
    with pytest.raises(KeyboardInterrupt):
        pc.write_examples(build("llama"), corpus(), tmp_path, progress=report)
    assert not list((tmp_path / "features").iterdir())
    stop = False
    made = pc.write_examples(build("llama"), corpus(), tmp_path, progress=report)
    files, tokens = LAYERS * SIZE, sum(len(text) for text in corpus()) - 1
    assert steps[-1] == ("writing files", files, files) and ("reading texts", tokens, tokens) in steps
    assert len(list(made.iterdir())) == files and os.listdir(made.parent) == ["local"]


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of 400,000 activations, 10 MB, is in memory at a time."""
    monkeypatch.setattr(runs, "ACTIVATIONS_AT_ONCE", 20_000)
    sorted_runs = runs.ActivationRuns(tmp_path, [torch.ones(500, dtype=torch.bool).numpy()])
    features = SparseFeatures(torch.arange(0, 2001, 20), torch.arange(2000) % 500, torch.ones(2000))
    tracemalloc.start()
    try:
        for batch in range(200):
            sorted_runs.add(100 * batch, [(features,)])
        sorted_runs.flush()
        seen = sum(len(block.token) for block in sorted_runs.blocks(0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == 400_000 and (sorted_runs.count[0] == 800).all() and len(list(tmp_path.iterdir())) == 60
    assert peak < 3 << 20, peak


# The demo model, and the command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


def test_a_graph_of_the_demo_finds_its_features(run: Run, tmp_path: Path) -> None:
    """Every feature the page can choose has a file under the node's id, with its label and this very prompt."""
    question = facts.TWO_HOP.format("Dallas")
    prompts = [question, *(s.prompt for s in list(facts.facts().statements())[::400])]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    model = pc.load("demo")
    graph = pc.attribute(model, question, progress=False)
    graph.save(tmp_path / "g.safetensors")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--out", tmp_path, "--scan", "demo", "--graph")
    code, out, err = run(
        "examples", "demo", *arguments, tmp_path / "g.safetensors", "--top", len(prompts), "--json", "-q"
    )
    assert (code, err) == (0, "")
    output = json.loads(out)
    features = {(layer, feature) for layer, _, feature in graph.features.tolist()}
    folder = tmp_path / "features" / "demo"
    assert output == {"out": str(folder), "features": len(features), "scan": "./data/features/demo"}
    graph.to_json(tmp_path / "g.json", scan=output["scan"])
    nodes = json.loads((tmp_path / "g.json").read_text())["nodes"]
    chosen = [node for node in nodes if node["feature_type"] == "cross layer transcoder"]
    assert chosen
    for node in chosen:
        description = json.loads((folder / f"{node['feature']}.json").read_text())
        assert node["node_id"].split("_")[:2] == [
            description["transcoder_id"].removeprefix("demo/"),
            str(description["index"]),
        ]
        assert description.get("label", "") == node["clerp"] and len(description["top_logits"]) == 10
        mine = [e for e in description["examples_quantiles"][0]["examples"] if e["tokens"] == graph.tokens.text]
        assert mine and mine[0]["tokens_acts_list"][node["ctx_idx"]] == pytest.approx(node["activation"], rel=1e-3)


def test_command_with_no_texts(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo takes its own statements, others are asked for some."""
    write_examples, received, sizes = pc.write_examples, [], 0

    def few(model: Any, texts: list[str], *args: Any, **options: Any) -> Path:
        nonlocal sizes
        received.append(texts)
        sizes = sum(model.transcoders.size(layer) for layer in range(model.depth))
        return write_examples(model, texts[::400], *args, **options)

    monkeypatch.setattr(pc, "write_examples", few)
    code, out, err = run("examples", "demo", "--out", tmp_path, "--quiet")
    assert received == [[s.prompt for s in facts.facts().statements()]]
    assert (code, err) == (0, "") and f"{sizes} features" in out and "--scan ./data/features/local" in out
    assert len(list((tmp_path / "features" / "local").iterdir())) == sizes
    for arguments, says in (
        (("smollm2", "--out", tmp_path), "one of --texts and --prompts must be given, got neither"),
        (("demo",), "--out must be given"),
        (("demo", "--out", tmp_path), "which exists"),
        (("demo", "--out", tmp_path / "x"), "folder must be one that exists"),
        (("demo", "--out", tmp_path, "--prompts", "a.txt", "--texts", "a.txt"), "got both"),
    ):
        code, out, err = run("examples", *arguments)
        assert (code, out) == (2, "") and says in err and err.count("\n") == 1
