"""Interventions: laws that need no second program, the frozen witness, and the results."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import builders
import pytest
import torch
from active_features import active_features
from builders import EVERY, KINDS, replacement, transcoders
from frozen_hf import FrozenHFModel
from torch import Tensor

import pycircuit as pc
import pycircuit.model.replacement
from pycircuit.interventions import FREEZE
from pycircuit.model.agreement import relative_error
from pycircuit.model.attention_choice import use_attention

intervene_module = import_module("pycircuit.interventions.intervene")  # the package's attribute is the function
pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = builders.prompt(9)


def active(model: pc.ReplacementModel, count: int, first_layer: int = 0) -> list[tuple[int, int, int, float]]:
    return active_features(model, PROMPT, count, first_layer)


def doubled(model: pc.ReplacementModel, count: int) -> list[pc.Intervention]:
    return [pc.Intervention(layer, p, f, factor=2) for layer, p, f, _ in active(model, count)]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_the_value_that_a_feature_has_changes_nothing(family: str, kind: str) -> None:
    """Exactly in float64; in float32 to its rounding, which the skips of random transcoders enlarge in every layer."""
    rounding = 1e-4 if "skip" in kind else 1e-5
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, rounding)):
        model = replacement(family, kind, dtype)
        features = active(model, 7)
        same = [pc.Intervention(layer, p, f, value) for layer, p, f, value in features[::2]]
        same += [pc.Intervention(layer, p, f, factor=1) for layer, p, f, _ in features[1::2]]
        with torch.no_grad(), use_attention(model.hf_model, "eager"):
            expected = model.hf_model(input_ids=PROMPT[None]).logits[0]
        for freeze in FREEZE:
            result = pc.intervene(model, PROMPT, same, freeze=freeze)
            assert relative_error(result.logits_before, expected) < 1e-5
            assert relative_error(result.logits, result.logits_before) < bound
            values = torch.tensor([f[3] for f in features])
            assert relative_error(values + result.effect([f[:3] for f in features]), values) < bound


class Witness(FrozenHFModel):
    """transformers' own forward with patterns and denominators frozen, MLPs too if `mlps_frozen`."""

    mlps_frozen = True

    def _writer(self, index: int) -> Any:
        write_frozen = super()._writer(index)

        def hook(module: Any, args: Any, out: Any) -> Any:
            if self.added is None or self.mlps_frozen:
                return write_frozen(module, args, out)
            written = (out[0] if isinstance(out, tuple) else out) + self.added[:, index]
            return (written, *out[1:]) if isinstance(out, tuple) else written

        return hook


def witness_of(model: pc.ReplacementModel) -> Witness:
    transcoders = model.transcoders
    return Witness(model.hf_model, PROMPT, transcoders.reads, transcoders.writes, transcoders.w_skip)


def written(model: pc.ReplacementModel, layer: int, feature: int) -> Tensor:
    """Decoder rows of one feature: [layers, width], zero in layers that it does not write to."""
    out = torch.zeros(model.depth, model.width, dtype=model.dtype)
    row = model.transcoders.w_dec[layer][feature]
    out[layer : layer + (1 if row.ndim == 1 else len(row))] = row
    return out


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_interventions_change_the_witness_alike(family: str, kind: str) -> None:
    """One feature a variant, ablated, doubled or set: every read and the logits, MLPs frozen and running."""
    model = replacement(family, kind, torch.float64)
    features = active(model, 6)
    new = [value * (0, 2, -1.5)[i % 3] for i, (*_, value) in enumerate(features)]
    variants = [[pc.Intervention(*f[:3], v)] for f, v in zip(features, new, strict=True)]
    witness = witness_of(model)
    added = torch.zeros(len(features), model.depth, len(PROMPT), model.width, dtype=model.dtype)
    for run, (layer, p, feature, value) in enumerate(features):
        added[run, :, p] = (new[run] - value) * written(model, layer, feature)
    for freeze in ("all", "attention"):
        witness.mlps_frozen = freeze == "all"
        read, logits = witness.run(added, torch.zeros(len(features), len(PROMPT)))
        results = pc.intervene_many(model, PROMPT, variants, freeze=freeze)
        for run, result in enumerate(results):
            reads = torch.stack([result.after.reads(layer) for layer in range(model.depth)])
            assert relative_error(reads, read[:, run]) < 1e-9
            assert relative_error(result.logits, capped(model, logits[run])) < 1e-9
            assert relative_error(result.logits, result.logits_before) > 1e-4


def capped(model: pc.ReplacementModel, logits: Tensor) -> Tensor:
    cap = model.weights.final_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


def replace_input(layer: Any, function: Any) -> Any:
    """A hook on the input of a layer: `function` sees it and may return its replacement."""

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        if args:
            replaced = function(args[0])
            return None if replaced is None else ((replaced, *args[1:]), kwargs)
        replaced = function(kwargs["hidden_states"])
        return None if replaced is None else (args, {**kwargs, "hidden_states": replaced})

    return layer.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_inside_a_range_nothing_recomputes_and_beyond_it_everything(family: str, kind: str) -> None:
    """The frozen witness below layer 2, whose stream enters a layer 2 that is the model's own."""
    model, end = replacement(family, kind, torch.float64), 2
    features = [f for f in active(model, 9) if f[0] < end][:4]
    witness = witness_of(model)
    added = torch.zeros(len(features), model.depth, len(PROMPT), model.width, dtype=model.dtype)
    for run, (layer, p, feature, value) in enumerate(features):
        added[run, :end, p] = value * written(model, layer, feature)[:end]
    streams: list[Tensor] = []
    hook = replace_input(witness.layers[end], streams.append)
    witness.run(added, torch.zeros(len(features), len(PROMPT)))
    hook.remove()
    hook = replace_input(witness.layers[end], lambda _: streams[0])
    with torch.no_grad(), use_attention(model.hf_model, "eager"):
        expected = model.hf_model(input_ids=PROMPT.expand(len(features), -1), use_cache=False).logits
    hook.remove()
    variants = [[pc.Intervention(*f[:3], factor=2)] for f in features]
    results = pc.intervene_many(model, PROMPT, variants, freeze="none", layers=range(end))
    for result, logits in zip(results, expected, strict=True):
        assert relative_error(result.logits, logits) < 1e-5  # the witness's live norms go through float32
        assert relative_error(result.logits, result.logits_before) > 1e-4
    assert relative_error(pc.intervene(model, PROMPT, variants[0], freeze="all").logits, expected[0]) > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_with_nothing_frozen_the_model_runs_on(family: str) -> None:
    """Adding to an MLP's output in the model itself: two features of one layer and position, one of another."""
    model = replacement(family, "plt", torch.float32)
    a, c = (next(f for f in active(model, 500) if f[0] == layer) for layer in (0, 1))
    b = next(f for f in active(model, 500) if f[:2] == a[:2] and f != a)
    steer = [pc.Intervention(*a[:3], 0), pc.Intervention(*b[:3], 7), pc.Intervention(1, c[1], c[2], -3)]

    def add(layer: int, position: int, read: list[Tensor]) -> Any:
        def after(_: Any, args: Any, out: Tensor) -> Tensor:
            x, change = read[-1][0, position], torch.zeros(model.width)
            for intervention in steer:
                if (intervention.layer, intervention.position) == (layer, position):
                    feature = intervention.feature
                    pre = float(x @ model.transcoders.w_enc[layer][feature])
                    pre += float(model.transcoders.b_enc[layer][feature])
                    present = pre if pre > 0.5 else 0.0  # JumpReLU
                    change += (intervention.value - present) * model.transcoders.w_dec[layer][feature]
            return out.index_add(1, torch.tensor([position]), change[None, None])

        return after

    layers = list(model.hf_model.base_model.children())
    blocks = next(m for m in layers if isinstance(m, torch.nn.ModuleList))
    read: list[Tensor] = []
    handles = []
    for layer, position in {(i.layer, i.position) for i in steer}:
        block = blocks[layer]
        writer = getattr(block, "post_feedforward_layernorm", block.mlp)
        handles.append(block.mlp.register_forward_pre_hook(lambda _, args: read.append(args[0])))
        handles.append(writer.register_forward_hook(add(layer, position, read)))
    with torch.no_grad(), use_attention(model.hf_model, "eager"):
        expected = model.hf_model(input_ids=PROMPT[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    result = pc.intervene(model, PROMPT, steer, freeze="none")
    assert relative_error(result.logits, expected) < 1e-5 < 1e-3 < relative_error(result.logits, result.logits_before)


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
    expected = [pc.intervene(model, PROMPT, variant, freeze=freeze) for variant in variants]
    assert {result.after.first for result in expected} == {0, 1, 2}
    for positions in (4096, 2 * len(PROMPT), 1):
        monkeypatch.setattr(intervene_module, "BATCH_POSITIONS", positions)
        results = pc.intervene_many(model, PROMPT, variants, freeze=freeze)
        for single, result in zip(expected, results, strict=True):
            assert relative_error(states(result), states(single)) < 1e-12
            assert result.interventions == single.interventions
    tops = pc.intervene_many(model, PROMPT, variants, freeze=freeze, summarize=lambda r: int(r.logits[-1].argmax()))
    assert tops == [int(single.logits[-1].argmax()) for single in expected]


def test_patterns_recomputed_are_patterns_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gpt_oss", "gemma2"):
        model = replacement(family, "clt", torch.float64)
        stored = pc.intervene(model, PROMPT, doubled(model, 5))
        monkeypatch.setattr(pycircuit.model.replacement, "PATTERN_BYTES", 0)
        assert relative_error(states(pc.intervene(model, PROMPT, doubled(model, 5))), states(stored)) < 1e-10
        monkeypatch.undo()


def test_factors_scale_the_activation_without_any_intervention() -> None:
    """Layer 2 after layer 0 has changed: the factor is of the prompt's own activation; a value is a value."""
    model = replacement("llama", "plt", torch.float64)
    first = [pc.Intervention(0, None, f, 5.0) for f in range(4)]
    layer, p, f, value = active(model, 3, first_layer=2)[0]
    scaled = pc.intervene(model, PROMPT, [*first, pc.Intervention(layer, p, f, factor=3)], freeze="none")
    valued = pc.intervene(model, PROMPT, [*first, pc.Intervention(layer, p, f, 3 * value)], freeze="none")
    assert relative_error(scaled.logits, valued.logits) < 1e-12
    assert float(scaled.effect([(layer, p, f)]).abs()) > 1e-3  # by then its own activation is another
    for silent in ({"factor": 4.0}, {"value": 0.0}):
        off = next(i for i in range(24) if i not in {g for n, q, g, _ in active(model, 500) if (n, q) == (0, 3)})
        result = pc.intervene(model, PROMPT, [pc.Intervention(0, 3, off, **silent)])
        assert relative_error(result.logits, result.logits_before) < 1e-12


def test_slices_of_positions() -> None:
    """Slices as Python takes them, without opening positions; the later of two that mean the same place holds."""
    model = replacement("llama", "plt", torch.float64)

    def logits(*interventions: pc.Intervention) -> Tensor:
        return pc.intervene(model, PROMPT, interventions).logits

    def at_each(positions: Iterable[int], value: float) -> list[pc.Intervention]:
        return [pc.Intervention(1, p, 3, value) for p in positions]

    last = len(PROMPT) - 1
    for position, expected in (
        (None, range(1, last + 1)), (slice(None), range(1, last + 1)), (slice(3, None), range(3, last + 1)),
        (slice(-3, None), range(last - 2, last + 1)), (slice(-50, 4), range(1, 4)),
        (slice(2, -2, 2), range(2, last - 1, 2)),
        (slice(0, None, 3), range(3, last + 1, 3)), (slice(2, 100), range(2, last + 1)), (-1, range(last, last + 1)),
    ):  # fmt: skip
        assert torch.equal(logits(pc.Intervention(1, position, 3, 2.5)), logits(*at_each(expected, 2.5)))
    override = logits(pc.Intervention(1, None, 3, 2.5), pc.Intervention(1, 4, 3, -1.0))
    assert torch.equal(override, logits(*at_each([p for p in range(1, last + 1) if p != 4], 2.5), *at_each([4], -1.0)))
    everywhere = pc.ReplacementModel(model.hf_model, model.transcoders, ignore_positions=0)
    first = pc.intervene(everywhere, PROMPT, at_each([0], 2.5))
    assert relative_error(first.logits[0], first.logits_before[0]) > 1e-4


def test_results() -> None:
    model = replacement("gemma2", "clt", torch.float32)
    result = pc.intervene(model, PROMPT, doubled(model, 6))
    before, after = model.activations(PROMPT), result.features
    assert len(after) == model.depth and result.layers is None and result.freeze == "attention"
    for layer in range(model.depth):
        assert torch.equal(result.features_before[layer].index, before[layer].index)
        wanted = [(layer, p, f) for p in range(1, len(PROMPT)) for f in range(24)]
        moved = after[layer].dense(24) - before[layer].dense(24)
        assert torch.allclose(result.effect(wanted).view(-1, 24), moved[1:], atol=1e-5)
        assert torch.equal(result.effect(torch.tensor(wanted)), result.effect([pc.Feature(*entry) for entry in wanted]))
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
        features = active(exact, 3)
        for freeze in FREEZE:
            same = pc.intervene(model, PROMPT, [pc.Intervention(*f[:3], factor=1) for f in features], freeze=freeze)
            assert relative_error(same.logits, same.logits_before) < 0.05
            changes = [pc.Intervention(*f[:3], 9) for f in features]
            moved = pc.intervene(model, PROMPT, changes, freeze=freeze).logits
            expected = pc.intervene(exact, PROMPT, changes, freeze=freeze).logits
            assert relative_error(moved, expected) < 0.25 < relative_error(moved, same.logits)
        assert pc.generate(model, PROMPT, [pc.Intervention(0, None, 1, 4.0)], max_new_tokens=3)


def test_the_model_is_left_as_it_was() -> None:
    """After a run, and after one that fails in the middle."""
    model = replacement("llama", "plt", torch.float32)
    implementation = model.hf_model.config._attn_implementation
    steer = [pc.Intervention(0, 2, 3, 1.0)]
    pc.intervene(model, PROMPT, steer)

    class Broken(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Broken

    hook = model.hf_model.model.layers[2].mlp.register_forward_hook(fail)
    for call in (lambda: pc.intervene(model, PROMPT, steer), lambda: pc.generate(model, PROMPT, steer)):
        with pytest.raises(Broken):
            call()
    hook.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules())
    assert model.hf_model.config._attn_implementation == implementation
    with ThreadPoolExecutor(1) as other:
        assert other.submit(model.forward_lock.acquire, blocking=False).result()
        other.submit(model.forward_lock.release).result()
    assert torch.isfinite(pc.intervene(model, PROMPT, steer).logits).all()
