"""Arguments of interventions: every error says rule, value and fix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import builders
import pytest
import torch
from builders import replacement

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(9)
INTERVENTION = pc.Intervention(0, 2, 3, 1.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer": -1}, ValueError, "layer must be zero or positive, got -1"),
        ({"layer": 1.0}, TypeError, "layer must be an int, got float"),
        ({"feature": -1}, ValueError, "feature must be zero or positive, got -1"),
        ({"feature": "3"}, TypeError, "feature must be an int, got str"),
        ({"position": 1.5}, TypeError, "position must be an int, got float"),
        ({"position": slice(1.5, None)}, TypeError, "position must be an int, got float"),
        ({"position": slice(5, 1, -1)}, ValueError, "position must step forward, got a step of -1"),
        ({"value": float("nan")}, ValueError, "value must be a number, got NaN"),
        ({"value": float("inf")}, ValueError, "value must be finite, got inf"),
        ({"value": "1"}, TypeError, "value must be a number, got str"),
        ({"value": None}, ValueError, "exactly one of value and factor must be given, got neither"),
        ({"factor": 2.0}, ValueError, "exactly one of value and factor must be given, got both"),
        ({"value": None, "factor": float("nan")}, ValueError, "factor must be a number, got NaN"),
    ],
)
def test_arguments_of_an_intervention(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^Intervention: {message}$"):
        pc.Intervention(**{"layer": 0, "position": 1, "feature": 2, "value": 1.0, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"interventions": []}, ValueError, "interventions must have at least one entry, got none"),
        (
            {"interventions": INTERVENTION},
            TypeError,
            "interventions must be a list of pc.Intervention, got Intervention",
        ),
        ({"interventions": [(0, 2, 3, 1.0)]}, TypeError, "interventions must hold pc.Intervention, got tuple"),
        ({"interventions": [replace(INTERVENTION, layer=3)]}, ValueError, "layer must be from 0 to 2, got 3"),
        (
            {"interventions": [replace(INTERVENTION, layer=1)]},
            ValueError,
            "layer must have a transcoder, got 1, which has none",
        ),
        (
            {"interventions": [replace(INTERVENTION, feature=24)]},
            ValueError,
            "feature must be from 0 to 23 in layer 0, got 24",
        ),
        (
            {"interventions": [replace(INTERVENTION, position=9)]},
            ValueError,
            r"position must be from 1 to 8 \(.*, got 9",
        ),
        (
            {"interventions": [replace(INTERVENTION, position=0)]},
            ValueError,
            r"position must be from 1 to 8 \(.*, got 0",
        ),
        (
            {"interventions": [replace(INTERVENTION, position=-9)]},
            ValueError,
            r"position must be from 1 to 8 \(.*, got -9",
        ),
        (
            {"interventions": [replace(INTERVENTION, position=slice(9, None))]},
            ValueError,
            "position must name positions from",
        ),
        ({"freeze": "mlps"}, ValueError, "freeze must be one of all, attention, patterns, none, got 'mlps'"),
        ({"layers": (0, 1)}, TypeError, "layers must be a range or None, got tuple"),
        ({"layers": range(4)}, ValueError, r"layers must be within the model's, range\(0, 3\), got range\(0, 4\)"),
        ({"layers": range(2, 2)}, ValueError, "layers must be within the model's"),
        ({"layers": range(0, 3, 2)}, ValueError, "layers must be within the model's"),
        ({"layers": range(2), "freeze": "all"}, ValueError, "layers must be None or all of them with freeze='all'"),
        ({"layers": range(2, 3)}, ValueError, "layers must hold one that the feature of layer 0 writes to, got"),
        ({"prompt": []}, ValueError, None),
    ],
)
def test_arguments_of_intervene(arguments: dict[str, Any], error: type[Exception], message: str | None) -> None:
    model = replacement("llama", "plt_hole", torch.float32)
    call = {"prompt": PROMPT, "interventions": [INTERVENTION], **arguments}
    with pytest.raises(error, match=None if message is None else f"^intervene: {message}"):
        pc.intervene(model, **call)
    call["variants"] = [[INTERVENTION], call.pop("interventions")]
    if message is not None and "interventions" in arguments:
        message = message.replace("interventions must be", r"variants\[1\] must be")
        message = message.replace("interventions must hold", r"variants\[1\] must hold")
    with pytest.raises(error, match=None if message is None else f"^intervene_many: {message}"):
        pc.intervene_many(model, **call)


def test_arguments_of_intervene_many_and_effect() -> None:
    model = replacement("llama", "plt", torch.float32)
    with pytest.raises(ValueError, match=r"^intervene_many: variants must have at least one entry, got none$"):
        pc.intervene_many(model, PROMPT, [])
    with pytest.raises(TypeError, match=r"^intervene_many: variants must be a list of lists of pc.Intervention, got "):
        pc.intervene_many(model, PROMPT, INTERVENTION)
    with pytest.raises(TypeError, match=r"^intervene_many: summarize must be a function of a pc.Intervened, got int$"):
        pc.intervene_many(model, PROMPT, [[INTERVENTION]], summarize=3)
    result = pc.intervene(model, PROMPT, [INTERVENTION])
    for features, error, message in (
        ([(0, 1)], TypeError, r"features must be \(layer, position, feature\) each, got \(0, 1\)"),
        ([(3, 1, 0)], ValueError, "layer must be from 0 to 2, got 3"),
        ([(0, 0, 0)], ValueError, "position must be from 1 to 8, got 0"),
        ([(0, 9, 0)], ValueError, "position must be from 1 to 8, got 9"),
        ([(0, 1, 24)], ValueError, "feature must be from 0 to 23 in layer 0, got 24"),
    ):
        with pytest.raises(error, match=f"^effect: {message}$"):
            result.effect(features)
