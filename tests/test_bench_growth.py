"""Benchmark of growing prompts: what is measured, measured again, fitted and drawn."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from pycircuit.bench import sections
from pycircuit.bench.shapes import Shape

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = Shape("long", 3, 32, 4, 2, 8, 128, 6, 12, 8, "cpu")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("growth", monkeypatch)
    monkeypatch.setattr(module, "SHAPE", TINY)
    monkeypatch.setattr(module, "WARM", 4)
    return module


def point(tokens: int, seconds: float) -> dict[str, Any]:
    phases = {"forward": seconds / 4, "sweep": seconds / 2, "ranking": seconds / 8, "graph": seconds / 8}
    figures = {
        "active": 10 * tokens,
        "rows": 8,
        "operations": 1e9 * tokens,
        "certificate": 2e-7,
        "load": 0.1,
        "others": 0.0,
    }
    memory = {"base": 10**9, "peak": 10**9 + tokens * 10**6}
    what = {"shape": "long", "what": "native", "threads": 1, "times": [seconds], "timings": phases}
    return {"positions": tokens, "dropped": 0.0, **what, **figures, **memory}


def options(folder: Path, *shapes: str, again: bool = False) -> argparse.Namespace:
    return argparse.Namespace(threads=1, rounds=1, shape=list(shapes), json=folder / "g.json", again=again)


def test_a_prompt_is_measured(growth: ModuleType) -> None:
    measured = growth.measure(10, 1, rounds=2)
    assert measured["positions"] == 10 and len(measured["times"]) == 2 and measured["dropped"] == 0
    assert list(measured["timings"]) == ["forward", "sweep", "ranking", "graph"]
    assert measured["certificate"] < 1e-5 and measured["active"] > 9 * TINY.layers
    row = growth._row(measured)
    assert row[0] == "10" and len(row) == len(growth.HEADER)


def test_points_of_the_same_conditions_stay(
    growth: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another commit, processor or number of threads measures all of them anew, and so does code without a commit."""
    measured: list[int] = []

    def fake(tokens: int, options: argparse.Namespace) -> dict[str, Any]:
        measured.append(tokens)
        return point(tokens, 1.0)

    monkeypatch.setattr(growth, "measure_apart", fake)
    monkeypatch.setattr(growth, "code_version", lambda: "abc")
    growth.run(options(tmp_path, "64", "128"))
    results = growth.run(options(tmp_path, "128", "256"))
    assert measured == [64, 128, 256] and [p["positions"] for p in results["points"]] == [64, 128, 256]
    assert json.loads((tmp_path / "g.json").read_text()) == results
    growth.run(options(tmp_path, "64", again=True))
    assert measured == [64, 128, 256, 64]
    document = json.loads((tmp_path / "g.json").read_text())
    document["points"][1]["others"] = growth.QUIET + 0.1
    (tmp_path / "g.json").write_text(json.dumps(document))
    growth.run(options(tmp_path, "64", "128", "256"))
    assert measured.pop() == 128  # other programs were busy
    monkeypatch.setattr(growth, "code_version", lambda: "def")
    assert [p["positions"] for p in growth.run(options(tmp_path, "64"))["points"]] == [64]
    for _ in range(2):
        monkeypatch.setattr(growth, "code_version", lambda: None)
        growth.run(options(tmp_path, "64"))
    assert measured == [64, 128, 256, 64, 64, 64, 64]


def test_a_process_that_ends_early_is_named(growth: ModuleType, tmp_path: Path) -> None:
    arguments = options(tmp_path, "64")
    arguments.prefix = f"{sys.executable} -c 'raise SystemExit(3)'"
    with pytest.raises(SystemExit, match="64 tokens need a process that ends with 0, got 3; run it again"):
        growth.run(arguments)


def test_exponents_and_the_section(growth: ModuleType, tmp_path: Path) -> None:
    tokens = growth.POSITIONS
    assert growth.exponent(tokens, [3e-4 * t**1.5 for t in tokens]) == pytest.approx(1.5)
    assert growth.exponent(tokens[:2], [1.0, 2.0]) is None
    times = [t if t <= growth.SPLIT else t**2 / growth.SPLIT for t in tokens]
    points = [point(t, s) for t, s in zip(tokens, times, strict=True)]
    where = {"commit": "abc", "cpu": "one", "threads": 2}
    text = growth.markdown({"machine": {"torch": "2"}, "conditions": where, "points": points}, "growth.svg")
    for name in ("forward", "sweep", "ranking", "graph", "in all"):
        assert f"| {name} | 1.00 | 2.00 |" in text
    assert "| memory, trace | 1.00 | 1.00 |" in text and "no entry was cut" in text and "](growth.svg)" in text
    assert "| 8,192 | 81,920 | 1 | 65536.00 |" in text and "9.19 / 8.19" in text
    points[-1]["dropped"] = 0.5
    cut = growth.markdown({"machine": {"torch": "2"}, "conditions": where, "points": points}, "growth.svg")
    assert "entries were cut at 8,192 tokens" in cut
    sections.put(tmp_path / "RESULTS.md", "growth", text)
    assert sections.read(tmp_path / "RESULTS.md") == {"growth": text}


def test_memory_is_left_out_where_the_system_reports_none(growth: ModuleType) -> None:
    points = [{**point(t, float(t)), "peak": None, "base": None} for t in growth.POSITIONS]
    assert growth.gigabytes(points) == {} and "memory" not in growth.picture(points)
    where = {"commit": None, "cpu": "one", "threads": 1}
    text = growth.markdown({"machine": {"torch": "2"}, "conditions": where, "points": points}, "growth.svg")
    assert "memory, " not in text.split("| exponent")[1] and "commit none" in text and "1 thread\n" in text


def test_powers_are_straight_lines(growth: ModuleType) -> None:
    """Points of t and t squared: equal steps, the second twice as steep as the first."""
    lines = {name: [(t, t**power / 1e3) for t in growth.POSITIONS] for name, power in (("linear", 1), ("square", 2))}
    panel = growth.LogPanel("seconds & phases", "tokens", lines, growth.POSITIONS)
    drawn = growth.chart([panel])
    ElementTree.fromstring(drawn)
    assert "seconds &amp; phases" in drawn and ">8,192<" in drawn
    steps = []
    for polyline in re.findall(r'polyline points="([^"]+)"', drawn):
        places = [tuple(map(float, pair.split(","))) for pair in polyline.split()]
        moves = [(b[0] - a[0], a[1] - b[1]) for a, b in pairwise(places)]
        assert all(move == pytest.approx(moves[0], abs=0.3) for move in moves)
        steps.append(moves[0])
    assert steps[1][1] == pytest.approx(2 * steps[0][1], abs=0.3) and steps[0][0] == pytest.approx(steps[1][0])
    many = replace(panel, lines={str(n): lines["linear"] for n in range(7)})
    with pytest.raises(ValueError, match="must have at most 6 lines, got 7"):
        growth.chart([many])


def test_labels_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = script("log_plot", monkeypatch).spread_labels
    assert spread([50.0, 10.0, 52.0, 51.0], 14) == [50.0, 10.0, 78.0, 64.0]
