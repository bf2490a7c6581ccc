"""First use of the Python interface: types, errors, copies, pickles and PyTorch's defaults."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

import pycircuit as pc
from pycircuit.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> pc.ReplacementModel:
    return pc.load("demo")


def test_functions_say_what_they_return() -> None:
    """`Any` would hide every name behind it from completion and from a type checker."""
    functions = [f for name in pc.__all__ if isinstance(f := getattr(pc, name), types.FunctionType)]
    assert pc.load in functions
    for function in functions:
        assert function.__doc__ and get_type_hints(function).get("return", Any) is not Any, function.__name__


def test_own_transcoders_on_the_demo(model: pc.ReplacementModel, tmp_path: Path) -> None:
    pc.transcoders.save(model.transcoders, tmp_path / "mine")
    expected = pc.attribute(model, PROMPT, progress=False)
    for transcoders in (tmp_path / "mine", str(tmp_path / "mine"), model.transcoders):
        graph = pc.attribute(pc.load("demo", transcoders), PROMPT, progress=False)
        assert torch.equal(graph.features, expected.features) and torch.equal(graph.values, expected.values)


@pytest.mark.parametrize("wrong", [None, PROMPT, "hf"])
def test_the_model_comes_first(model: pc.ReplacementModel, wrong: Any, tmp_path: Path) -> None:
    not_a_model: Any = model.hf_model if wrong == "hf" else wrong
    graph = pc.attribute(model, PROMPT, progress=False)
    calls = {
        "attribute": lambda: pc.attribute(not_a_model, model),  # type: ignore[arg-type]
        "attribute_many": lambda: pc.attribute_many(not_a_model, [PROMPT]),
        "estimate": lambda: pc.estimate(not_a_model, PROMPT),
        "validate": lambda: pc.validate(not_a_model, graph),
        "write_examples": lambda: pc.write_examples(not_a_model, [PROMPT], tmp_path, "x"),
    }
    for op, call in calls.items():
        with pytest.raises(TypeError, match=rf"{op}: model must be a pc.ReplacementModel, .* before the prompt"):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": "Austin"}, TypeError, "targets must be a list or None, got str; put it in a list"),
        ({"targets": 5}, TypeError, "targets must be a list or None, got int"),
        ({"targets": pc.Feature(0, 7, 20)}, TypeError, "targets must be a list or None, got Feature"),
        ({"targets": [("x", 1.0, torch.full((128,), torch.nan))]}, ValueError, "a direction must be finite"),
        ({"position": None}, TypeError, "position must be an int or a list of them, got NoneType"),
        ({"position": "last"}, TypeError, "position must be an int or a list of them, got str"),
        ({"position": []}, ValueError, "position must name at least one position, got none"),
    ],
)
def test_slips_in_targets(model: pc.ReplacementModel, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"attribute: {message}"):
        pc.attribute(model, PROMPT, progress=False, **arguments)


@pytest.mark.parametrize("ids", [torch.tensor([116, 17]), np.array([116, 17]), (116, 17)])
def test_targets_as_an_array(model: pc.ReplacementModel, ids: Any) -> None:
    assert pc.attribute(model, PROMPT, targets=ids, progress=False).targets.ids.tolist() == [116, 17]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_gives_the_same_graph(model: pc.ReplacementModel, copied: Any) -> None:
    ours, theirs = (pc.attribute(m, PROMPT, progress=False) for m in (model, copied(model)))
    assert torch.equal(ours.features, theirs.features) and torch.equal(ours.dense(), theirs.dense())
    assert ours.labels == theirs.labels


def test_slips_in_a_model(model: pc.ReplacementModel) -> None:
    hf_model, transcoders = copy.deepcopy(model.hf_model), model.transcoders
    with pytest.raises(TypeError, match=r"ReplacementModel: tokenizer must have a method encode\(text\), got int"):
        pc.ReplacementModel(hf_model, transcoders, 3)
    with pytest.raises(TypeError, match="ReplacementModel: ignore_positions must be an int, got str"):
        pc.ReplacementModel(hf_model, transcoders, ignore_positions="x")  # type: ignore[arg-type]
    training = pc.ReplacementModel(hf_model, transcoders, model.tokenizer)
    hf_model.train()
    with pytest.raises(ValueError, match=r"must be in evaluation mode, .* call model\.hf_model\.eval\(\)"):
        pc.attribute(training, PROMPT, progress=False)
    with torch.no_grad():
        hf_model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="ReplacementModel: model must give finite logits, got NaN or inf"):
        pc.ReplacementModel(hf_model, transcoders)


def test_pictures_are_svg(model: pc.ReplacementModel, tmp_path: Path) -> None:
    graph = pc.attribute(model, PROMPT, progress=False)
    with pytest.raises(ValueError, match=r"plot: path must end in \.svg, got .*dallas\.png"):
        graph.plot(tmp_path / "dallas.png")
    assert not list(tmp_path.iterdir())


def test_an_estimate_of_a_short_trace(model: pc.ReplacementModel) -> None:
    text = str(replace(pc.estimate(model, PROMPT), seconds=0.00123, operations=5.4e7))
    assert text.endswith("time    about 0.001 s for 0.05 GFLOP")
    assert str(replace(pc.estimate(model, PROMPT), seconds=8.26, operations=1.2e12)).endswith("8.3 s for 1200 GFLOP")


def test_progress_to_a_stream_that_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cell:
        """Stand-in of a notebook or a logger for stderr."""

        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    cell = Cell()
    monkeypatch.setattr(sys, "stderr", cell)
    show = Progress(True)
    show.next = 0.0
    show.step("sweep", 0, 3)
    assert cell.text == "pycircuit: sweep: 0 of 3 rows\n"


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Default type or device that a script has set; meta stands for a GPU, whose memory the CPU cannot read."""
    try:
        if isinstance(request.param, str):
            torch.set_default_device(request.param)
        else:
            torch.set_default_dtype(request.param)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("defaults")
def test_defaults_of_torch_do_not_change_results(model: pc.ReplacementModel, tmp_path: Path) -> None:
    graph = pc.attribute(model, PROMPT, max_features=90, progress=False)
    assert graph.certificate < 1e-5 and graph.rows.weight.dtype == torch.float32 and graph.targets.labels == ["Austin"]
    assert graph.feature_node(0, 7, 20) == graph.features.tolist().index([0, 7, 20])
    assert "Texas 0/7/20 @Dallas" in graph.tree() and graph.scores().completeness > 0.5
    assert graph.prune().node_mask.sum() < graph.nodes
    graph.save(tmp_path / "g.safetensors")
    graph.plot(tmp_path / "g.svg")
    graph.to_json(tmp_path / "g.json")
    assert torch.equal(pc.Graph.load(tmp_path / "g.safetensors").rows.weight, graph.rows.weight)
    assert pc.estimate(model, PROMPT).features == len(graph.features)
    off = [pc.Intervention(0, 7, 20, value=0.0)]
    assert pc.intervene(model, PROMPT, off).probabilities.argmax() != graph.targets.ids[0]
    assert pc.generate(model, PROMPT, max_new_tokens=1) == graph.targets.ids.tolist()
    assert pc.validate(model, graph, samples=2).agreements
