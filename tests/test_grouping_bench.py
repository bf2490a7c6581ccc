"""Benchmark of groups: its measures, its prompts, and the committed figures."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SETS = ("clt", "plt")


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


def test_adjusted_rand_index(monkeypatch: pytest.MonkeyPatch) -> None:
    adjusted_rand = module("grouping", monkeypatch).adjusted_rand
    a = np.array([0, 0, 0, 1, 1, 1])
    assert adjusted_rand(a, 5 - a) == 1
    assert adjusted_rand(a, np.array([0, 0, 1, 1, 2, 2])) == pytest.approx(0.24242424)  # scikit-learn's example
    draws = np.random.default_rng(0)
    by_chance = [adjusted_rand(draws.integers(0, 4, 40), draws.integers(0, 4, 40)) for _ in range(200)]
    assert abs(np.mean(by_chance)) < 0.02


def test_facts_explain_the_activations_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    omega_squared = module("fact_classes", monkeypatch)._omega_squared
    draws = np.random.default_rng(0)
    value = np.repeat(np.arange(50), 4)
    noise, exact = draws.normal(size=200), value % 7.0
    share = omega_squared(np.column_stack([noise, exact, exact + noise]), value)
    assert abs(share[0]) < 0.1 and share[1] == pytest.approx(1) and 0.5 < share[2] < 0.95


def test_prompts_of_choices_are_not_those_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    grouping = module("grouping", monkeypatch)
    test = {s.prompt for s in grouping.test_statements()}
    development = {s.prompt for s in grouping.development_statements()}
    assert len(test) == len(development) == 100 and not test & development


@pytest.mark.parametrize("kind", SETS)
def test_committed_figures(kind: str) -> None:
    """Groups by structure fit the facts better than labels and k-means do, and foretell what ablating them does."""
    result = json.loads((BENCHMARKS / "results/grouping-cpu.json").read_text())["sets"][kind]
    page = (BENCHMARKS / "GROUPING.md").read_text()
    for threshold in ("0.8", "0.95"):
        block = result[f"node threshold {threshold}"]
        index = block["adjusted rand"]
        assert index["structure"]["fact"] > index["label"]["fact"] + 0.1
        assert index["structure"]["fact"] > index["k-means on decoders"]["fact"] + 0.05
        assert f"| structure | {index['structure']['fact']:.3f} |" in page
    ablated = result["node threshold 0.8"]["effects"]["attention, x0"]
    assert ablated["correlation"] >= 0.8 and f"| {ablated['correlation']:.3f} |" in page


def test_the_page_of_groups_has_the_committed_figures() -> None:
    text = (BENCHMARKS.parent / "docs/groups.md").read_text()
    blocks = [json.loads((BENCHMARKS / "results/grouping-cpu.json").read_text())["sets"][kind] for kind in SETS]
    for method in ("structure", "label", "position", "k-means on decoders"):
        index = [block["node threshold 0.8"]["adjusted rand"][method]["fact"] for block in blocks]
        assert f"| {index[0]:.3f} | {index[1]:.3f} |" in text
    for effect in ("attention, x0", "attention, x2"):
        correlation = [block["node threshold 0.8"]["effects"][effect]["correlation"] for block in blocks]
        assert f"| {correlation[0]:.3f} | {correlation[1]:.3f} |" in text
