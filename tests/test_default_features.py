"""Features that get a row where nobody names a number, "all" of them, and weights of explicit targets."""

from __future__ import annotations

import json
from pathlib import Path

import builders
import pytest
import torch
from commands import Run

import pycircuit as pc
from pycircuit.trace import default_features, trace_options

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(12)
TEXT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> pc.ReplacementModel:
    return builders.replacement("llama", "clt", torch.float32)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """A default of few features, as the tests' prompts have few."""
    monkeypatch.setattr(trace_options, "DEFAULT_FEATURES", 20)
    monkeypatch.setattr(default_features, "FEWEST", 8)
    return 20


def rows(graph: pc.Graph) -> int:
    """Number of features with a row."""
    return graph.rows.count - len(graph.targets)


def test_the_default_is_said(model: pc.ReplacementModel, few: int, capsys: pytest.CaptureFixture[str]) -> None:
    graph = pc.attribute(model, PROMPT)
    active = len(graph.features)
    assert rows(graph) == few < active
    assert f'{few} of {active} active features get a row (max_features="all" gives all' in capsys.readouterr().err
    assert graph.provenance["settings"]["max_features"] == few
    assert graph.provenance["settings"]["max_features_chosen"] is False
    assert graph.certificate <= 1e-5
    assert pc.estimate(model, PROMPT, progress=False).rows == few + 10  # targets are counted as the most there can be


@pytest.mark.parametrize(("number", "expected"), [("all", None), (5, 5), (10**6, None), (0, 0)])
def test_a_number_or_all(
    model: pc.ReplacementModel, few: int, number: int, expected: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = pc.attribute(model, PROMPT, max_features=number)
    count = len(graph.features) if expected is None else expected
    assert rows(graph) == count
    assert "active features get a row" not in capsys.readouterr().err
    assert graph.provenance["settings"]["max_features"] == number
    assert pc.estimate(model, PROMPT, max_features=number, progress=False).rows == count + 10
    (many,) = pc.attribute_many(model, [PROMPT], max_features=number, progress=False)
    assert rows(many) == count


@pytest.mark.parametrize("value", ["most", "ALL", 1.5])
def test_other_numbers_are_errors(model: pc.ReplacementModel, value: object) -> None:
    for name in ("attribute", "estimate"):
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: max_features must be an int, 'all' or None, got"):
            getattr(pc, name)(model, PROMPT, max_features=value)
    with pytest.raises(
        (TypeError, ValueError), match=r"^attribute_many: max_features must be an int, 'all' or None, got"
    ):
        pc.attribute_many(model, [PROMPT], max_features=value)  # type: ignore[arg-type]


def test_fewer_where_they_would_take_long(
    model: pc.ReplacementModel, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_features, "sweep_rate", lambda *_: 1.0)
    assert rows(pc.attribute(model, PROMPT, progress=False)) == few  # too little to be measured
    monkeypatch.setattr(default_features, "_SLOWEST", 0.0)
    assert rows(pc.attribute(model, PROMPT, progress=False)) == 8
    assert pc.estimate(model, PROMPT, progress=False).rows == 8 + 10
    assert rows(pc.attribute(model, PROMPT, max_features=15, progress=False)) == 15


def test_fewer_where_memory_is_short(model: pc.ReplacementModel, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, original = [], default_features.plan_memory

    def plan(model: object, trace: object, bound: object, fixed: object) -> object:
        planned.append(trace.rows)
        if trace.rows > 16:
            raise pc.MemoryBoundError("too many")
        return original(model, trace, bound, fixed)

    monkeypatch.setattr(default_features, "plan_memory", plan)
    graph = pc.attribute(model, PROMPT, max_targets=1, progress=False)
    assert planned == [21, 11] and rows(graph) == 10
    for number in (20, "all"):
        with pytest.raises(pc.MemoryBoundError, match="too many"):
            pc.attribute(model, PROMPT, max_features=number, progress=False)


def test_a_checkpoint_keeps_its_number(
    model: pc.ReplacementModel, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pc.attribute(model, PROMPT, checkpoint=tmp_path / "rows", progress=False)
    monkeypatch.setattr(default_features, "_SLOWEST", 0.0)
    monkeypatch.setattr(default_features, "sweep_rate", lambda *_: 1.0)
    again = pc.attribute(model, PROMPT, checkpoint=tmp_path / "rows", progress=False)
    assert rows(first) == rows(again) == few
    assert torch.equal(first.rows.weight, again.rows.weight)


def test_explicit_targets_weigh_the_same(model: pc.ReplacementModel) -> None:
    likeliest = pc.attribute(model, PROMPT, max_features=4, progress=False)
    assert len(set(likeliest.targets.weights.tolist())) > 1
    feature = pc.Feature(*likeliest.features[-1].tolist())
    direction = ("mine", 0.25, torch.ones(model.width))
    graph = pc.attribute(model, PROMPT, targets=[3, 7, direction, feature], max_features=4, progress=False)
    assert graph.targets.weights.tolist() == [1.0, 1.0, 0.25, 1.0]


def test_numbers_on_the_command_line(run: Run, few: int) -> None:
    result = json.loads(run("attribute", "demo", TEXT, "--json", "--quiet").out)
    assert result["max_features"] == few and result["rows"] == few + len(result["targets"])
    assert "(--max-features all for the others)" in run("attribute", "demo", TEXT, "--quiet").out
    every = json.loads(run("attribute", "demo", TEXT, "--max-features", "all", "--json", "--quiet").out)
    assert every["max_features"] == "all" and every["rows"] == every["features"] + len(every["targets"])
    wrong = run("attribute", "demo", TEXT, "--max-features", "most")
    assert wrong.code == 2 and "--max-features must be a number from 0, or all, got 'most'" in wrong.err
