"""Worth of graphs of SmolLM2: its behaviours, and a short run with transcoders trained here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pycircuit as pc
from pycircuit.truth import Behaviour, TruthRun, behaviours, section
from pycircuit.truth.behaviours import answered

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(hf_model: Any, trained: pc.PerLayerTranscoders, tokenizer: Any) -> pc.ReplacementModel:
    return pc.ReplacementModel(hf_model, trained, tokenizer)


def test_ten_prompts_of_ten_behaviours_are_answered(model: pc.ReplacementModel) -> None:
    questions = answered(model, behaviours("smollm2"))
    assert len({q.prompt for q in questions}) == 100 == 10 * len({q.behaviour for q in questions})
    assert min(q.probability for q in questions) > 0.5


def test_a_short_run(model: pc.ReplacementModel, tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Graphs obey their law; those of neurons are nearly complete, and foretell effects while patterns and norms stay.

    A set trained for some steps may score below random transcoders.
    """
    chosen = [Behaviour(b.name, b.candidates[:2]) for b in behaviours("smollm2")[:2]]
    document = TruthRun("smollm2", {"trained": model}, chosen, tmp_path / "truth.json", 1, 256, 256, 4).run(False)
    sets = document["sets"]
    assert max(s["certificate"] for s in sets.values()) < 1e-5
    assert sets["neurons"]["completeness"][0] > 0.95 > sets["trained"]["completeness"][0]
    (neurons,) = (
        e["answer"]["graph"]
        for e in sets["neurons"]["effects"]
        if (e["kind"], e["freeze"], e["factor"]) == ("feature", "attention", 0.0)
    )
    assert neurons["correlation"][0] > 0.8
    figure(section(document))
