"""Interventions: laws that need no second program, the frozen witness, and arguments."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from typing import Any

import builders
import pytest
import torch
from builders import EVERY, KINDS, replacement, transcoders
from frozen_hf import HeldModel
from torch import Tensor

import pycircuit as pc
import pycircuit.model.replacement
from pycircuit.interventions import FREEZE
from pycircuit.model.capture import attention_by, relative

intervening = import_module("pycircuit.interventions.intervene")  # the package's name is the function's
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(9)


def active(model: pc.ReplacementModel, count: int, at_least: int = 0) -> list[tuple[int, int, int, float]]:
    """Active features spread over layers and positions: (layer, position, feature, value)."""
    found = [
        (layer, p, i, v)
        for layer, f in enumerate(model.activations([PROMPT])[0])
        if layer >= at_least
        for p, i, v in zip(f.position().tolist(), f.index.tolist(), f.value.tolist(), strict=True)
    ]
    return found[:: max(1, len(found) // count)][:count]


def doubled(model: pc.ReplacementModel, count: int) -> list[pc.Intervention]:
    return [pc.Intervention(layer, p, f, factor=2) for layer, p, f, _ in active(model, count)]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_the_value_that_a_feature_has_changes_nothing(family: str, kind: str) -> None:
    """Exactly in float64; in float32 to its rounding, which the skips of random transcoders enlarge in every layer."""
    rounding = 1e-4 if "skip" in kind else 1e-5
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, rounding)):
        model = replacement(family, kind, dtype)
        found = active(model, 7)
        same = [pc.Intervention(layer, p, f, value) for layer, p, f, value in found[::2]]
        same += [pc.Intervention(layer, p, f, factor=1) for layer, p, f, _ in found[1::2]]
        with torch.no_grad(), attention_by(model.hf_model, "eager"):
            expected = model.hf_model(input_ids=PROMPT[None]).logits[0]
        for freeze in FREEZE:
            result = pc.intervene(model, PROMPT, same, freeze)
            assert relative(result.logits_before, expected) < 1e-5
            assert relative(result.logits, result.logits_before) < bound
            moved, values = result.effect([f[:3] for f in found]), torch.tensor([f[3] for f in found])
            assert relative(values + moved, values) < bound


class Witness(HeldModel):
    """transformers' own forward with patterns and denominators held, MLPs too where `frozen`."""

    frozen = True

    def _writer(self, at: int) -> Any:
        held = super()._writer(at)

        def act(module: Any, args: Any, out: Any) -> Any:
            if self.added is None or self.frozen:
                return held(module, args, out)
            first = (out[0] if isinstance(out, tuple) else out) + self.added[:, at]
            return (first, *out[1:]) if isinstance(out, tuple) else first

        return act


def written(model: pc.ReplacementModel, layer: int, feature: int) -> Tensor:
    """Decoder rows of one feature: [layers, width], zero where it does not write."""
    out = torch.zeros(model.depth, model.width, dtype=model.dtype)
    row = model.transcoders.w_dec[layer][feature]
    out[layer : layer + (1 if row.ndim == 1 else len(row))] = row
    return out


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_the_witness_is_moved_alike(family: str, kind: str) -> None:
    """One feature a variant, ablated, doubled or set: every read and the logits, MLPs held and running."""
    model = replacement(family, kind, torch.float64)
    transcoders, found = model.transcoders, active(model, 6)
    new = [value * (0, 2, -1.5)[i % 3] for i, (*_, value) in enumerate(found)]
    variants = [[pc.Intervention(*f[:3], v)] for f, v in zip(found, new, strict=True)]
    witness = Witness(model.hf_model, PROMPT, transcoders.reads, transcoders.writes, transcoders.w_skip)
    added = torch.zeros(len(found), model.depth, len(PROMPT), model.width, dtype=model.dtype)
    for run, (layer, p, feature, value) in enumerate(found):
        added[run, :, p] = (new[run] - value) * written(model, layer, feature)
    for freeze in ("all", "attention"):
        witness.frozen = freeze == "all"
        read, logits = witness.run(added, torch.zeros(len(found), len(PROMPT)))
        results = pc.intervene_many(model, PROMPT, variants, freeze)
        for run, result in enumerate(results):
            ours = torch.stack([result.after.reads(layer) for layer in range(model.depth)])
            assert relative(ours, read[:, run]) < 1e-9
            assert relative(result.logits, capped(model, logits[run])) < 1e-9
            assert relative(result.logits, result.logits_before) > 1e-4


def capped(model: pc.ReplacementModel, logits: Tensor) -> Tensor:
    cap = model.weights.final_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


def entering(layer: Any, act: Any) -> Any:
    """A hook on what enters a layer: `act` sees it and may return what takes its place."""

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            fresh = act(args[0])
            return None if fresh is None else ((fresh, *args[1:]), kwargs)
        fresh = act(kwargs["hidden_states"])
        return None if fresh is None else (args, {**kwargs, "hidden_states": fresh})

    return layer.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_inside_a_range_nothing_recomputes_and_beyond_it_everything(family: str, kind: str) -> None:
    """The held witness below layer 2, whose stream enters a layer 2 that is the model's own."""
    model, end = replacement(family, kind, torch.float64), 2
    transcoders, found = model.transcoders, [f for f in active(model, 9) if f[0] < end][:4]
    witness = Witness(model.hf_model, PROMPT, transcoders.reads, transcoders.writes, transcoders.w_skip)
    added = torch.zeros(len(found), model.depth, len(PROMPT), model.width, dtype=model.dtype)
    for run, (layer, p, feature, value) in enumerate(found):
        added[run, :end, p] = value * written(model, layer, feature)[:end]
    streams: list[Tensor] = []
    hook = entering(witness.layers[end], streams.append)
    witness.run(added, torch.zeros(len(found), len(PROMPT)))
    hook.remove()
    hook = entering(witness.layers[end], lambda _: streams[0])
    with torch.no_grad(), attention_by(model.hf_model, "eager"):
        expected = model.hf_model(input_ids=PROMPT.expand(len(found), -1), use_cache=False).logits
    hook.remove()
    variants = [[pc.Intervention(*f[:3], factor=2)] for f in found]
    results = pc.intervene_many(model, PROMPT, variants, "none", range(end))
    for result, logits in zip(results, expected, strict=True):
        assert relative(result.logits, logits) < 1e-5  # the witness's live norms go through float32
        assert relative(result.logits, result.logits_before) > 1e-4
    assert relative(pc.intervene(model, PROMPT, variants[0], "all").logits, expected[0]) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_with_nothing_frozen_the_model_runs_on(family: str) -> None:
    """Adding to an MLP's output in the model itself: two features of one layer and position, one of another."""
    model = replacement(family, "plt", torch.float32)
    a, b, c = (next(f for f in active(model, 500) if f[0] == layer) for layer in (0, 0, 1))
    b = next(f for f in active(model, 500) if f[:2] == a[:2] and f != a)
    given = [pc.Intervention(*a[:3], 0), pc.Intervention(*b[:3], 7), pc.Intervention(1, c[1], c[2], -3)]

    def add(layer: int, position: int, read: list[Tensor]) -> Any:
        def after(_: Any, args: Any, out: Tensor) -> Tensor:
            x, change = read[-1][0, position], torch.zeros(model.width)
            for one in given:
                if (one.layer, one.position) == (layer, position):
                    pre = float(x @ model.transcoders.w_enc[layer][one.feature])
                    pre += float(model.transcoders.b_enc[layer][one.feature])
                    present = pre if pre > 0.5 else 0.0  # JumpReLU
                    change += (one.value - present) * model.transcoders.w_dec[layer][one.feature]
            return out.index_add(1, torch.tensor([position]), change[None, None])

        return after

    layers = list(model.hf_model.base_model.children())
    blocks = next(m for m in layers if isinstance(m, torch.nn.ModuleList))
    read: list[Tensor] = []
    handles = []
    for layer, position in {(one.layer, one.position) for one in given}:
        block = blocks[layer]
        writer = getattr(block, "post_feedforward_layernorm", block.mlp)
        handles.append(block.mlp.register_forward_pre_hook(lambda _, args: read.append(args[0])))
        handles.append(writer.register_forward_hook(add(layer, position, read)))
    with torch.no_grad(), attention_by(model.hf_model, "eager"):
        expected = model.hf_model(input_ids=PROMPT[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    result = pc.intervene(model, PROMPT, given, "none")
    assert relative(result.logits, expected) < 1e-5 < 1e-3 < relative(result.logits, result.logits_before)


def states(result: pc.Intervened) -> Tensor:
    return torch.cat([*(result.after.reads(n) for n in range(result.after.model.depth)), result.after.final])


@pytest.mark.parametrize("freeze", FREEZE)
@pytest.mark.parametrize("kind", ["plt_raw_topk", "clt_skip"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_many_are_as_one_by_one(family: str, kind: str, freeze: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever batches they run, and whatever layer each begins at."""
    model = replacement(family, kind, torch.float64)
    variants = [[pc.Intervention(*f[:3], factor=2)] for f in reversed(active(model, 7))]
    variants += [doubled(model, 4), [pc.Intervention(2, slice(2, None, 3), 5, 4.0)]]
    expected = [pc.intervene(model, PROMPT, one, freeze) for one in variants]
    assert {result.after.first for result in expected} == {0, 1, 2}
    for positions in (4096, 2 * len(PROMPT), 1):
        monkeypatch.setattr(intervening, "BATCH_POSITIONS", positions)
        for one, result in zip(expected, pc.intervene_many(model, PROMPT, variants, freeze), strict=True):
            assert relative(states(result), states(one)) < 1e-12
            assert result.interventions == one.interventions
    tops = pc.intervene_many(model, PROMPT, variants, freeze, each=lambda r: int(r.logits[-1].argmax()))
    assert tops == [int(one.logits[-1].argmax()) for one in expected]


def test_patterns_recomputed_are_patterns_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gpt_oss", "gemma2"):
        model = replacement(family, "clt", torch.float64)
        stored = pc.intervene(model, PROMPT, doubled(model, 5))
        monkeypatch.setattr(pycircuit.model.replacement, "PATTERN_BYTES", 0)
        assert relative(states(pc.intervene(model, PROMPT, doubled(model, 5))), states(stored)) < 1e-10
        monkeypatch.undo()


def test_what_scales_is_the_activation_without_any_intervention() -> None:
    """Layer 2 after layer 0 has changed: the factor is of the prompt's own activation; a value is a value."""
    model = replacement("llama", "plt", torch.float64)
    first = [pc.Intervention(0, None, f, 5.0) for f in range(4)]
    layer, p, f, value = active(model, 3, at_least=2)[0]
    scaled = pc.intervene(model, PROMPT, [*first, pc.Intervention(layer, p, f, factor=3)], "none")
    valued = pc.intervene(model, PROMPT, [*first, pc.Intervention(layer, p, f, 3 * value)], "none")
    assert relative(scaled.logits, valued.logits) < 1e-12
    assert float(scaled.effect([(layer, p, f)]).abs()) > 1e-3  # by then its own activation is another
    for silent in ({"factor": 4.0}, {"value": 0.0}):
        off = next(i for i in range(24) if i not in {g for n, q, g, _ in active(model, 500) if (n, q) == (0, 3)})
        result = pc.intervene(model, PROMPT, [pc.Intervention(0, 3, off, **silent)])
        assert relative(result.logits, result.logits_before) < 1e-12


def test_positions() -> None:
    """Slices as Python takes them, without opening positions; the later of two that mean the same place holds."""
    model = replacement("llama", "plt", torch.float64)

    def logits(*given: pc.Intervention) -> Tensor:
        return pc.intervene(model, PROMPT, list(given)).logits

    def each(positions: list[int], value: float) -> list[pc.Intervention]:
        return [pc.Intervention(1, p, 3, value) for p in positions]

    last = len(PROMPT) - 1
    for position, places in (
        (None, range(1, last + 1)), (slice(None), range(1, last + 1)), (slice(3, None), range(3, last + 1)),
        (slice(-3, None), range(last - 2, last + 1)), (slice(-50, 4), range(1, 4)),
        (slice(2, -2, 2), range(2, last - 1, 2)),
        (slice(0, None, 3), range(3, last + 1, 3)), (slice(2, 100), range(2, last + 1)), (-1, range(last, last + 1)),
    ):  # fmt: skip
        assert torch.equal(logits(pc.Intervention(1, position, 3, 2.5)), logits(*each(list(places), 2.5)))
    override = logits(pc.Intervention(1, None, 3, 2.5), pc.Intervention(1, 4, 3, -1.0))
    assert torch.equal(override, logits(*each([p for p in range(1, last + 1) if p != 4], 2.5), *each([4], -1.0)))
    everywhere = pc.ReplacementModel(model.hf_model, model.transcoders, ignore_positions=0)
    first = pc.intervene(everywhere, PROMPT, each([0], 2.5))
    assert relative(first.logits[0], first.logits_before[0]) > 1e-4


def test_what_comes_back() -> None:
    model = replacement("gemma2", "clt", torch.float32)
    given = doubled(model, 6)
    result = pc.intervene(model, PROMPT, given)
    before, after = model.activations([PROMPT])[0], result.features
    assert len(after) == model.depth and result.layers is None and result.freeze == "attention"
    for layer in range(model.depth):
        assert torch.equal(result.features_before[layer].index, before[layer].index)
        wanted = [(layer, p, f) for p in range(1, len(PROMPT)) for f in range(24)]
        moved = after[layer].dense(24) - before[layer].dense(24)
        assert torch.allclose(result.effect(wanted).view(-1, 24), moved[1:], atol=1e-5)
        assert torch.equal(result.effect(torch.tensor(wanted)), result.effect([pc.Feature(*one) for one in wanted]))
    assert float(result.effect([(2, -1, f) for f in range(24)]).abs().max()) > 1e-3
    assert torch.allclose(result.probabilities, result.logits[-1].softmax(-1), atol=1e-6)
    assert torch.allclose(result.probabilities_before, result.logits_before[-1].softmax(-1), atol=1e-6)
    assert float(result.probabilities.sum()) == pytest.approx(1, abs=1e-5)
    assert repr(result) == "Intervened(6 interventions, freeze='attention', layers=None, positions=9)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for family in ("llama", "gemma2"):
        model = pc.ReplacementModel(builders.build(family, dtype), transcoders("clt", torch.float32))
        exact = pc.ReplacementModel(builders.build(family), transcoders("clt", torch.float32))
        found = active(exact, 3)
        for freeze in FREEZE:
            same = pc.intervene(model, PROMPT, [pc.Intervention(*f[:3], factor=1) for f in found], freeze)
            assert relative(same.logits, same.logits_before) < 0.05
            moved, expected = (pc.intervene(m, PROMPT, [pc.Intervention(*f[:3], 9) for f in found], freeze).logits
                               for m in (model, exact))  # fmt: skip
            assert relative(moved, expected) < 0.25 < relative(moved, same.logits)
        assert pc.generate(model, PROMPT, [pc.Intervention(0, None, 1, 4.0)], max_new_tokens=3)


def test_the_model_is_left_as_it_was() -> None:
    """After a run, and after one that fails in the middle."""
    model = replacement("llama", "plt", torch.float32)
    chosen = model.hf_model.config._attn_implementation
    given = [pc.Intervention(0, 2, 3, 1.0)]
    pc.intervene(model, PROMPT, given)

    class Broken(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Broken

    hook = model.hf_model.model.layers[2].mlp.register_forward_hook(fail)
    for act in (lambda: pc.intervene(model, PROMPT, given), lambda: pc.generate(model, PROMPT, given)):
        with pytest.raises(Broken):
            act()
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules())
    assert model.hf_model.config._attn_implementation == chosen
    with ThreadPoolExecutor(1) as other:
        assert other.submit(model.running.acquire, blocking=False).result()
        other.submit(model.running.release).result()
    assert torch.isfinite(pc.intervene(model, PROMPT, given).logits).all()


@pytest.mark.parametrize(
    ("given", "kind", "message"),
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
def test_interventions_that_are_none(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^Intervention: {message}$"):
        pc.Intervention(**{"layer": 0, "position": 1, "feature": 2, "value": 1.0, **given})


ONE = pc.Intervention(0, 2, 3, 1.0)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"interventions": []}, ValueError, "interventions must have at least one entry, got none"),
        ({"interventions": ONE}, TypeError, "interventions must be a list of pc.Intervention, got Intervention"),
        ({"interventions": [(0, 2, 3, 1.0)]}, TypeError, "interventions must hold pc.Intervention, got tuple"),
        ({"interventions": [replace(ONE, layer=3)]}, ValueError, "layer must be from 0 to 2, got 3"),
        ({"interventions": [replace(ONE, layer=1)]}, ValueError, "layer must have a transcoder, got 1, which has none"),
        ({"interventions": [replace(ONE, feature=24)]}, ValueError, "feature must be from 0 to 23 in layer 0, got 24"),
        ({"interventions": [replace(ONE, position=9)]}, ValueError, r"position must be from 1 to 8 \(.*, got 9"),
        ({"interventions": [replace(ONE, position=0)]}, ValueError, r"position must be from 1 to 8 \(.*, got 0"),
        ({"interventions": [replace(ONE, position=-9)]}, ValueError, r"position must be from 1 to 8 \(.*, got -9"),
        ({"interventions": [replace(ONE, position=slice(9, None))]}, ValueError, "position must name positions from"),
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
def test_arguments(given: dict[str, Any], kind: type[Exception], message: str | None) -> None:
    model = replacement("llama", "plt_hole", torch.float32)
    arguments = {"prompt": PROMPT, "interventions": [ONE], **given}
    with pytest.raises(kind, match=None if message is None else f"^intervene: {message}"):
        pc.intervene(model, **arguments)
    arguments["variants"] = [[ONE], arguments.pop("interventions")]
    if message is not None and "interventions" in given:
        message = message.replace("interventions must be", r"variants\[1\] must be")
        message = message.replace("interventions must hold", r"variants\[1\] must hold")
    with pytest.raises(kind, match=None if message is None else f"^intervene_many: {message}"):
        pc.intervene_many(model, **arguments)


def test_other_arguments() -> None:
    model = replacement("llama", "plt", torch.float32)
    with pytest.raises(ValueError, match=r"^intervene_many: variants must have at least one entry, got none$"):
        pc.intervene_many(model, PROMPT, [])
    with pytest.raises(TypeError, match=r"^intervene_many: variants must be a list of lists of pc.Intervention, got "):
        pc.intervene_many(model, PROMPT, ONE)
    with pytest.raises(TypeError, match=r"^intervene_many: each must be a function of a pc.Intervened, got int$"):
        pc.intervene_many(model, PROMPT, [[ONE]], each=3)
    result = pc.intervene(model, PROMPT, [ONE])
    for wanted, kind, message in (
        ([(0, 1)], TypeError, r"features must be \(layer, position, feature\) each, got \(0, 1\)"),
        ([(3, 1, 0)], ValueError, "layer must be from 0 to 2, got 3"),
        ([(0, 0, 0)], ValueError, "position must be from 1 to 8, got 0"),
        ([(0, 9, 0)], ValueError, "position must be from 1 to 8, got 9"),
        ([(0, 1, 24)], ValueError, "feature must be from 0 to 23 in layer 0, got 24"),
    ):
        with pytest.raises(kind, match=f"^effect: {message}$"):
            result.effect(wanted)
