"""Interventions that do less than they seem to say so, and values that overflow are errors."""

from __future__ import annotations

import json

import builders
import pytest
import torch
from commands import Run

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(9)
TEXT = "the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model() -> pc.ReplacementModel:
    return builders.replacement("llama", "clt", torch.float32)


def features_at(model: pc.ReplacementModel, layer: int, position: int) -> tuple[int, int]:
    """(an active feature, a silent one) of a layer at a position."""
    features = model.activations(PROMPT)[layer]
    begin, end = features.row_ptr[position : position + 2].tolist()
    active = features.index[begin:end].tolist()
    return active[0], next(f for f in range(model.transcoders.size(layer)) if f not in active)


def test_interventions_that_act_as_they_are_written_have_no_notes(model: pc.ReplacementModel) -> None:
    active, silent = features_at(model, 1, 4)
    result = pc.intervene(model, PROMPT, [pc.Intervention(1, 4, active, 0.0), pc.Intervention(1, 4, silent, 2.0)])
    assert result.notes == ()
    assert "notes" not in repr(result)


@pytest.mark.parametrize("freeze", ["all", "attention", "none"])
def test_a_silent_feature_that_is_scaled_or_ablated(model: pc.ReplacementModel, freeze: str) -> None:
    _, silent = features_at(model, 1, 4)
    for change in ({"value": 0.0}, {"factor": 3.0}):
        result = pc.intervene(model, PROMPT, [pc.Intervention(1, 4, silent, **change)], freeze=freeze)  # type: ignore[arg-type]
        torch.testing.assert_close(result.logits, result.logits_before, rtol=1e-4, atol=1e-5)
        assert result.notes == (f"layer 1 feature {silent}: nothing changes at 4, it is inactive there",)
        assert result.notes[0] in repr(result)


def test_a_factor_of_one(model: pc.ReplacementModel) -> None:
    active, _ = features_at(model, 1, 4)
    result = pc.intervene(model, PROMPT, [pc.Intervention(1, 4, active, factor=1.0)], freeze="all")
    assert result.notes == (f"layer 1 feature {active}: nothing changes at 4, the factor is 1",)


def test_a_slice_past_the_end(model: pc.ReplacementModel) -> None:
    result = pc.intervene(model, PROMPT, [pc.Intervention(1, slice(6, 40), 3, 2.0)])
    assert result.notes == (
        "layer 1 feature 3: position 6:40 goes past the end, the change is at 6 to 8 of 9 positions",
    )
    for position in (slice(6, None), slice(6, 9), None):
        assert not pc.intervene(model, PROMPT, [pc.Intervention(1, position, 3, 2.0)]).notes


def test_a_feature_that_is_changed_twice(model: pc.ReplacementModel) -> None:
    changes = [pc.Intervention(1, slice(2, 6), 3, 2.0), pc.Intervention(1, 4, 3, 5.0), pc.Intervention(2, 4, 3, 5.0)]
    results = pc.intervene_many(model, PROMPT, [changes[1:], changes])
    assert [result.notes for result in results] == [
        (),
        ("layer 1 feature 3: changed more than once at 4, the last change alone counts",),
    ]


@pytest.mark.parametrize("freeze", ["all", "attention", "none"])
def test_values_that_overflow(model: pc.ReplacementModel, freeze: str) -> None:
    with pytest.raises(
        ValueError, match=r"^intervene: value must be at most 3\.40282e\+38 in size in float32, got 1e\+39"
    ):
        pc.intervene(model, PROMPT, [pc.Intervention(0, 4, 3, 1e39)])
    with pytest.raises(
        ValueError, match=r"^intervene: interventions must leave the stream below 1\.8e\+19.*; lower value"
    ):
        pc.intervene(model, PROMPT, [pc.Intervention(0, 4, 3, 1e30)], freeze=freeze)  # type: ignore[arg-type]


def test_text_of_values_that_overflow(model: pc.ReplacementModel) -> None:
    for value, message in ((1e39, "value must be at most"), (1e30, "steer must leave logits finite")):
        with pytest.raises(ValueError, match=f"^generate: {message}"):
            pc.generate(model, PROMPT, [pc.Intervention(0, None, 3, value)], max_new_tokens=2)


def test_notes_on_the_command_line(run: Run) -> None:
    arguments = ("intervene", "demo", TEXT, "--ablate", "0/3/11", "--set", "0/5:99/347=2")
    notes = json.loads(run(*arguments, "--json").out)["notes"]
    assert notes == [
        "layer 0 feature 347: position 5:99 goes past the end, the change is at 5 to 8 of 9 positions",
        "layer 0 feature 11: nothing changes at 3, it is inactive there",
    ]
    printed = run(*arguments).out
    assert all(f"note: {note}" in printed for note in notes)
