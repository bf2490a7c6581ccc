"""Evaluation of transcoders against exact ones and against its definition."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from builders import LAYERS, WIDTH, build
from training_cases import RECIPE, corpus, streams

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


def identity(model: Any, kind: str, features: int = 8) -> Any:
    """Exact transcoders, with silent features, of a model whose MLPs are the linear map x @ w_skip + b."""
    weights: dict[str, list[Any]] = {"w_enc": [], "b_enc": [], "w_dec": [], "b_dec": [], "w_skip": []}
    for layer in range(LAYERS):
        mlp = model.model.layers[layer].mlp
        weights["w_enc"].append(torch.zeros(features, WIDTH))
        weights["b_enc"].append(torch.full((features,), -1.0))
        weights["w_dec"].append(torch.ones(features, *(() if kind == "plt" else (LAYERS - layer,)), WIDTH))
        weights["b_dec"].append(mlp.bias.detach().clone())
        weights["w_skip"].append(mlp.weight.detach().T.clone())
    transcoders = pc.PerLayerTranscoders if kind == "plt" else pc.CrossLayerTranscoder
    return transcoders(**weights, reads="mlp_in")


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_evaluation_of_exact_transcoders(kind: str) -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp = torch.nn.Linear(WIDTH, WIDTH)
    t = identity(model, kind)
    evaluation = pc.evaluate(model, t, [*corpus(5).tolist(), [1, 2, 3, 4]])
    assert evaluation.tokens == 5 * 23 + 3
    assert min(v for v in evaluation.variance if v is not None) > 1 - 1e-6
    assert evaluation.agreement == 1.0
    assert abs(evaluation.divergence) < 1e-6 < 0.01 < evaluation.ablated
    assert evaluation.active == [0.0] * LAYERS and evaluation.dead == [1.0] * LAYERS
    assert evaluation.density == [[8, 0, 0, 0, 0, 0, 0, 0]] * LAYERS
    t.b_enc[1][:3] = 1.0  # three features of layer 1, always active, write ones: wrong from there on
    wrong = pc.evaluate(model, t, corpus(5))
    assert wrong.active == [0.0, 3.0, 0.0] and wrong.dead == [1.0, 5 / 8, 1.0]
    assert wrong.density[1] == [5, 0, 0, 0, 0, 0, 0, 3]
    assert wrong.variance[1] == pytest.approx(1.0)  # a constant explains and spoils no variance
    assert wrong.divergence > 0.01
    assert "next token agrees" in str(wrong) and str(wrong).count("\n") == LAYERS + 1


def test_evaluation_equals_its_definition() -> None:
    """Against the model with its MLPs replaced by hand, prompt by prompt, in dense products."""
    model = build("gpt2")
    t = pc.train(model, corpus(), **{**asdict(RECIPE), "kind": "clt", "progress": False})
    prompts = corpus(4)
    evaluation = pc.evaluate(model, t, prompts)
    agreed, divergence = 0, 0.0
    for ids in prompts:
        with torch.no_grad():
            own = model(ids[None]).logits[0, 1:].log_softmax(-1)
            replaced = replaced_by_hand(model, t, ids)[1:].log_softmax(-1)
        agreed += int((own.argmax(-1) == replaced.argmax(-1)).sum())
        divergence += float((own.exp() * (own - replaced)).sum())
    assert evaluation.tokens == 4 * 23
    assert evaluation.agreement == agreed / evaluation.tokens
    assert evaluation.divergence == pytest.approx(divergence / evaluation.tokens, rel=1e-3)
    expected = explained_together(t, model, prompts)
    assert evaluation.variance == pytest.approx(expected.tolist(), abs=1e-4)
    replacement = pc.ReplacementModel(model, t)
    assert pc.evaluate(replacement, t, prompts) == evaluation
    traced = pc.evaluate(model, t, prompts, graphs=2, max_features=40)
    scores = [pc.attribute(replacement, ids, max_features=40, progress=False).scores() for ids in prompts[:2]]
    assert traced.graphs == 2
    assert traced.replacement == pytest.approx(sum(s.replacement for s in scores) / 2)
    assert traced.completeness == pytest.approx(sum(s.completeness for s in scores) / 2)
    assert str(traced).count("\n") == LAYERS + 2


def replaced_by_hand(model: Any, t: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of gpt2 with its MLPs replaced, written out layer by layer: [positions, vocabulary]."""
    body, position = model.transformer, torch.arange(len(ids))
    stream = body.wte(ids) + body.wpe(position)
    written = torch.zeros(LAYERS, len(ids), WIDTH)
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for layer, block in enumerate(body.h):
        stream = stream + block.attn(block.ln_1(stream)[None], attention_mask=mask[None, None])[0][0]
        pre = stream @ t.w_enc[layer].T + t.b_enc[layer]
        value = torch.where(t.activation[layer].active(pre), pre, 0)
        written[layer:] += torch.einsum("pf,fsd->spd", value, t.w_dec[layer])
        out = written[layer] + t.b_dec[layer]
        out[:1] = block.mlp(block.ln_2(stream))[:1]
        stream = stream + out
    return model.lm_head(body.ln_f(stream))


def explained_together(t: Any, model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """Explained share of variance over all tokens together, of errors and outputs about their means: [layers]."""
    replacement = pc.ReplacementModel(model, t)
    errors = torch.cat([replacement.freeze(ids).errors[:, 1:] for ids in prompts], 1)
    outputs = torch.cat([streams(replacement, ids, t.writes)[:, 1:] for ids in prompts], 1)
    return 1 - errors.var(1).sum(1) / outputs.var(1).sum(1)


def test_evaluate_refuses_other_types_and_depths() -> None:
    with pytest.raises(TypeError, match="evaluate: transcoders must be"):
        pc.evaluate(build("llama"), None, corpus(1))
    other = pc.train(build("llama"), corpus(), **{**asdict(RECIPE), "steps": 1, "progress": False})
    with pytest.raises(ValueError, match="each of the model's 2 layers"):
        pc.evaluate(build("gpt2", n_layer=2), other, corpus(1))


def test_progress_counts_tokens_and_graphs() -> None:
    reports: list[tuple[str, int, int]] = []
    t = pc.train(build("llama"), corpus(), **{**asdict(RECIPE), "steps": 1, "progress": False})
    pc.evaluate(build("llama"), t, corpus(3), graphs=2, max_features=5, progress=lambda *report: reports.append(report))
    assert {phase for phase, _, _ in reports} == {"explained variance", "next tokens", "graphs"}
    for phase, total in (("explained variance", 3 * 24), ("next tokens", 3 * 24), ("graphs", 2)):
        counts = [(done, of) for name, done, of in reports if name == phase]
        assert counts[0] == (0, total) and counts[-1] == (total, total)
