"""The benchmarks' own arithmetic, and that they refuse to time what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pycircuit as pc
from pycircuit.bench import catalog, compare, inputs, machine_rates, models, report, runner
from pycircuit.bench.catalog import MATRIX, MEMORY, READ, ROWS, Row, Target
from pycircuit.bench.machine_rates import Rates
from pycircuit.bench.report import Report
from pycircuit.bench.runner import Options, Result
from pycircuit.bench.session import Session, plan
from pycircuit.bench.shapes import SHAPES, Shape
from pycircuit.ops import cases

TINY = Shape("tiny", 3, 32, 4, 2, 8, 96, 6, 12, 40, "cpu")
RATES = Rates(threads=1, float32=1e9, bfloat16=5e8, copy=1e9, read=2e9)
BUILDS = {
    "encode-jumprelu": ("encode", lambda g: inputs.encode(g, TINY, 12, "jumprelu")),
    "encode-topk-bf16": ("encode", lambda g: inputs.encode(g, TINY, 12, "topk", torch.bfloat16)),
    "decode-plt": ("decode", lambda g: inputs.decode(g, TINY, 12, None)),
    "decode-clt": ("decode", lambda g: inputs.decode(g, TINY, 12, 3)),
    "decode-clt-bf16": ("decode", lambda g: inputs.decode(g, TINY, 12, 3, torch.bfloat16)),
    "attend-stored": ("attend_back", lambda g: inputs.attend_back(g, TINY, 5, False, True)),
    "attend-recomputed": ("attend_back", lambda g: inputs.attend_back(g, TINY, 5, True, False)),
    "scores-plt": ("edge_scores", lambda g: inputs.edge_scores(g, TINY, 5, None)),
    "scores-clt": ("edge_scores", lambda g: inputs.edge_scores(g, TINY, 5, 3)),
    "influence": ("influence", lambda g: inputs.influence(g, 3, 20, 40, 75)),
}


def tiny(name: str, *targets: Target) -> Row:
    op, build = BUILDS[name]
    return Row(op, "tiny", name, build, targets, needs=0)


@pytest.mark.parametrize("name", BUILDS)
def test_measures_every_op(name: str) -> None:
    result = runner.measure(tiny(name), 1, RATES, Options(budget=0.005))
    assert result.failed is None and result.isa == pc.ops.explain(result.op).isa
    assert len(result.times["native"]) >= 5 and len(result.times["reference"]) >= 1
    assert result.error is not None and result.error < runner.TOLERANCE
    assert result.floor > 0 and result.median > 0


@pytest.mark.parametrize("name", BUILDS)
def test_inputs_have_no_zero_weights(name: str) -> None:
    drawn = BUILDS[name][1](cases.generator(3))
    if name == "influence":
        assert bool((drawn.args[0][:, 60:] != 0).all())
    else:
        weights = {"encode": 1, "decode": 1, "attend_back": 0, "edge_scores": 3}[BUILDS[name][0]]
        assert bool((drawn.args[weights] != 0).all())


def test_jumprelu_holds_the_active_count() -> None:
    x, w_enc, b_enc, rule, _ = inputs.encode(cases.generator(3), TINY, 12, "jumprelu").args
    assert pc.ops.encode(x, w_enc, b_enc, rule).count == 12 * TINY.active


def test_useful_operations_are_the_causal_ones() -> None:
    drawn = inputs.attend_back(cases.generator(3), TINY, 5, True, True)
    by_hand = sum(2 * TINY.head_width for _ in range(5 * TINY.heads) for i in range(12) for j in range(i + 1))
    assert drawn.operations == by_hand
    scores = inputs.edge_scores(cases.generator(3), TINY, 5, None)
    lengths = scores.args[1].diff().tolist()
    assert scores.operations == sum(2 * TINY.width * TINY.active * n for n in lengths)


def test_a_wrong_answer_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pc.ops.decode
    monkeypatch.setattr(pc.ops, "decode", lambda *args: right(*args) * 1.0001)
    session = Session(Options(budget=0.005), rates={1: RATES})
    result = session.run(tiny("decode-plt"), 1)
    assert result.failed is not None and "above" in result.failed and result.times == {}
    assert "WRONG" in report.table(session.results)
    assert "WRONG" in report.markdown(session.report())


def test_a_row_too_large_is_skipped_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "available_memory", lambda: 10**9)
    result = runner.measure(replace(tiny("decode-plt"), needs=9e9), 1, RATES, Options())
    assert result.skipped == "needs 9 GB of memory, 1 GB are free"


def _result(**changes: Any) -> Result:
    times = {"native": [2.0, 1.0, 3.0], "reference": [4.0, 4.0], "product": [1.0]}
    made = Result("a/b/c", "a", "b", "c", 1, "native", "v3", times=times, operations=1e9, bytes=4e8, error=1e-7)
    return replace(made, **changes)


def test_floor_targets_and_limits() -> None:
    """Worked by hand: 1 s of operations, 0.2 s of bytes, median 2 s."""
    goals = (Target("reference", 1.5), Target("product", 0.95), Target(MATRIX, 0.6), Target(READ, 0.05))
    judged = runner.judge(SimpleNamespace(targets=goals), _result(), RATES)
    assert (judged.floor, judged.bound, judged.share, judged.spread) == (1.0, "matrix", 0.5, 1.0)
    assert [(o.got, o.met) for o in judged.outcomes] == [(2.0, True), (0.5, False), (0.5, False), (0.1, True)]
    assert judged.outcomes[3].limit == pytest.approx(0.2)
    slow = runner.judge(SimpleNamespace(targets=(Target(MATRIX, 0.6),)), _result(bytes=8e9), RATES)
    assert slow.bound == "memory" and "the floor allows 25.0%" in report.describe(slow.outcomes[0])
    scratch = runner.judge(SimpleNamespace(targets=(Target(MEMORY, most=0.05),)), _result(memory=0.06), RATES)
    assert scratch.outcomes[0].met is False and report.tally([scratch]).startswith("0 of 1 targets met, 1 missed")


def test_bfloat16_is_held_to_the_better_rate() -> None:
    fast = replace(RATES, bfloat16=4e9)
    nothing = SimpleNamespace(targets=())
    assert runner.judge(nothing, _result(bytes=1.0, bfloat16=True), fast).floor == 0.25
    assert runner.judge(nothing, _result(bytes=1.0, bfloat16=True), RATES).floor == 1.0


def test_the_best_rate_of_the_run_judges_every_row() -> None:
    session = Session(rates={1: RATES}, measured=[(tiny("decode-plt"), _result())])
    before = session.results[0].share
    session.rates[1] = RATES.raised(float32=2e9, read=1.0)
    assert session.results[0].share == before / 2


def test_report_survives_a_file(tmp_path: Path) -> None:
    saved = Report.of({1: RATES}, [runner.judge(SimpleNamespace(targets=(Target("reference", 3),)), _result(), RATES)])
    saved.save(tmp_path / "a.json")
    again = report.load(tmp_path / "a.json")
    assert again.results == saved.results and again.rates == saved.rates
    assert "reference 2.00x (>= 3.00x: MISSED)" in report.markdown(again).split("## Targets not met")[1]


def test_compare_says_which_is_faster() -> None:
    first = Report.of({1: RATES}, [_result(floor=1.0)])
    second = Report.of({1: RATES}, [_result(floor=1.0, times={"native": [1.0]})])
    assert compare.lines(first, second) == [("a/b/c", "1", "2e+03", "1e+03", "2.00x", "50%", "100%")]


def test_rows_are_unique_and_cover_what_is_promised() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for shape in ("small", "gemma2b"):
        for rule in ("jumprelu", "topk", "jumprelu-bf16", "topk-bf16"):
            assert f"encode/{shape}/{rule}" in names
    for shape in ("small", "medium", "long"):
        for targets in (16, 64, 256):
            for form in ("ragged-stored", "ragged-recomputed", "full-stored", "full-recomputed"):
                assert f"attend_back/{shape}/b{targets}-{form}" in names
    assert {"decode/gemma2b/clt13", "decode/gemma2b/clt13-bf16", "influence/gemma2b/k7500"} <= set(names)
    assert {row.op for row in catalog.select(quick=True)} == set(pc.ops.registry.OPS)


def test_plan_adds_one_thread_to_cheap_rows() -> None:
    cheap, dear = replace(tiny("decode-plt"), single=True), tiny("decode-clt")
    everything = machine_rates.all_threads()
    counts = [everything, 1] if everything > 1 else [everything]
    assert list(plan([cheap, dear])) == [(cheap, n) for n in counts] + [(dear, everything)]


def test_rates_are_those_of_a_machine() -> None:
    rates = machine_rates.measure(1, seconds=0.02)
    assert 1e8 < rates.float32 < 1e14 and 1e8 < rates.read < 1e13 and 1e8 < rates.copy < 1e13
    assert machine_rates.Others().cores() is not None


def test_copies_keep_strides() -> None:
    slot = torch.randn(5, 3, 4)[:, 1]
    (copy,) = runner.copied((slot,))
    assert copy.stride() == slot.stride() and torch.equal(copy, slot) and copy.data_ptr() != slot.data_ptr()


def test_the_model_has_the_positions_of_its_shape() -> None:
    """The longest prompts are longer than a Llama's usual 4,096 positions."""
    shape = replace(SHAPES["gemma2b-long8k"], layers=1, width=16, heads=2, kv_heads=1, head_width=8)
    assert models.language_model(shape).config.max_position_embeddings == shape.positions == 8192
