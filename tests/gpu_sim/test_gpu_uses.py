"""Targets of all kinds, checkpoints, interventions, generation and training on the pretended device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from backward_pass import backward
from gpu_models import compare, replacement_model

import pycircuit as pc
from pycircuit.training import Recipe, Trainer

PROMPT = builders.prompt(9)
OPTIONS: dict[str, Any] = {"max_targets": 2, "max_features": 10, "progress": False}


def first_feature(local: Any, layer: int) -> pc.Feature:
    active = local.features[layer]
    return pc.Feature(layer, int(active.position()[0]), int(active.index[0]))


@pytest.fixture
def cpu_model() -> pc.ReplacementModel:
    return replacement_model("llama", "plt", "cpu")


@pytest.fixture
def gpu_model() -> pc.ReplacementModel:
    return replacement_model("llama", "plt", "cuda")


def test_targets(cpu_model: pc.ReplacementModel, gpu_model: pc.ReplacementModel) -> None:
    direction = ("a direction", 1.0, torch.randn(builders.WIDTH, generator=torch.Generator().manual_seed(4)))
    targets = [3, direction, first_feature(cpu_model.freeze(PROMPT), 2)]
    truth = pc.attribute(cpu_model, PROMPT, targets=targets, position=-1, max_features=10, progress=False)
    compare(pc.attribute(gpu_model, PROMPT, targets=targets, position=-1, max_features=10, progress=False), truth)


def test_checkpoint_goes_on_with_its_rows(
    cpu_model: pc.ReplacementModel, gpu_model: pc.ReplacementModel, tmp_path: Path
) -> None:
    truth = pc.attribute(cpu_model, PROMPT, **OPTIONS)
    for _ in range(2):
        compare(pc.attribute(gpu_model, PROMPT, checkpoint=tmp_path, **OPTIONS), truth)


def test_estimate_and_many(cpu_model: pc.ReplacementModel, gpu_model: pc.ReplacementModel) -> None:
    prompts = [PROMPT, PROMPT[:5]]
    truths = list(pc.attribute_many(cpu_model, prompts, **OPTIONS))
    assert pc.estimate(gpu_model, PROMPT, max_features=10).rows > 10
    assert [len(features) for features in gpu_model.activations(prompts)] == [builders.LAYERS] * 2
    graphs = list(pc.attribute_many(gpu_model, prompts, **OPTIONS))
    for graph, truth in zip(graphs, truths, strict=True):
        compare(graph, truth)


@pytest.mark.parametrize("freeze", ["all", "patterns", "attention", "none"])
def test_intervene(freeze: str, cpu_model: pc.ReplacementModel, gpu_model: pc.ReplacementModel) -> None:
    feature = first_feature(cpu_model.freeze(PROMPT), 1)
    change = pc.Intervention(feature.layer, feature.position, feature.feature, 2.5)
    truth = pc.intervene(cpu_model, PROMPT, [change], freeze=freeze)
    changed = pc.intervene(gpu_model, PROMPT, [change], freeze=freeze)
    logits = changed.logits.cpu(), changed.logits_before.cpu()
    torch.testing.assert_close(logits, (truth.logits, truth.logits_before), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*logits)


def test_generate(cpu_model: pc.ReplacementModel, gpu_model: pc.ReplacementModel) -> None:
    steer = [pc.Intervention(1, slice(2, None), first_feature(cpu_model.freeze(PROMPT), 1).feature, 3.0)]
    for options in ({}, {"steer": steer}, {"steer": steer, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 1}):
        expected = pc.generate(cpu_model, [PROMPT.tolist()], max_new_tokens=3, **options)
        assert pc.generate(gpu_model, [PROMPT.tolist()], max_new_tokens=3, **options) == expected


def test_validate(cpu_model: pc.ReplacementModel, gpu_model: pc.ReplacementModel) -> None:
    truth = pc.validate(cpu_model, pc.attribute(cpu_model, PROMPT, **OPTIONS), samples=4)
    report = pc.validate(gpu_model, pc.attribute(gpu_model, PROMPT, **OPTIONS), samples=4)
    assert report.nodes == truth.nodes
    assert report.overall("all").error < 1e-4


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu"])
def test_training(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    recipe = Recipe(
        features=32, steps=3, k=6, start=12, batch=16, buffer=64, context=12, warmup=1, activation=activation, revive=2
    )
    texts = torch.randint(0, builders.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(2))
    on_cpu = Trainer(builders.build("llama"), texts, recipe)
    on_cpu.run(progress=False)
    on_gpu = Trainer(builders.build("llama").to("cuda"), texts, recipe)
    trained = on_gpu.run(progress=False)
    assert all(w.is_cuda for w in trained.w_enc)
    torch.testing.assert_close(on_gpu.history.loss, on_cpu.history.loss, atol=1e-4, rtol=1e-4)
