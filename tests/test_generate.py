"""Generation: as transformers generates, and steered as a loop of interventions without a cache."""

from __future__ import annotations

import builders
import pytest
import torch
import transformers
from active_features import active_features
from builders import KINDS, replacement

import pycircuit as pc
from pycircuit.interventions.generate import Sampling
from pycircuit.model.attention_choice import use_attention

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, EOS = 8, 2


def prompts() -> list[list[int]]:
    """Two of one length, one longer."""
    return [builders.prompt(n, seed).tolist() for n, seed in ((6, 3), (9, 4), (6, 5))]


@pytest.mark.parametrize("family", builders.CONFIGS)
def test_without_steering_as_transformers_does(family: str) -> None:
    """Greedy, prompt by prompt and as a batch, and never past a token that ends the text."""
    model = replacement(family, "plt", torch.float32)
    expected = []
    for ids in prompts():
        prompt = torch.tensor([ids])
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        with use_attention(model.hf_model, "eager"):  # other attentions drop scales and caps in some versions
            out = model.hf_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        expected.append(out[0, len(ids) :].tolist())
    assert pc.generate(model, prompts(), max_new_tokens=12) == expected
    assert pc.generate(model, prompts()[1], max_new_tokens=12) == expected[1]


def loop(model: pc.ReplacementModel, ids: list[int], steer: list[pc.Intervention], index: int) -> list[int]:
    """Tokens generated without a cache, each after an intervention on all positions before it."""
    start, generator = len(ids), torch.Generator().manual_seed((7 << 24) + index)
    for _ in range(COUNT):
        active = [intervention for intervention in steer if len(intervention.positions(len(ids), len(ids)))]
        logits = pc.intervene(model, ids, active, freeze="none").logits if active else model.freeze(ids).model.logits()
        ids = [*ids, int(Sampling(1.5, None, None).pick(logits[-1:], [generator]))]
        if ids[-1] == EOS:
            break
    return ids[start:]


def steering(model: pc.ReplacementModel) -> list[pc.Intervention]:
    """Open-ended and closed, over all and over generated tokens alone; set, scaled, ablated; two at one position."""
    a, b, c, d = active_features(model, builders.prompt(9), 4)
    return [
        pc.Intervention(a[0], None, a[2], 6.0),
        pc.Intervention(b[0], slice(3, None), b[2], factor=-2),
        pc.Intervention(c[0], slice(None), c[2], 0),
        pc.Intervention(c[0], slice(2, None, 2), c[2] + 1, 3.0),
        pc.Intervention(d[0], slice(11, None), d[2], -4.0),
        pc.Intervention(d[0], slice(2, 12), d[2], factor=-3),  # of a layer that the others change
        pc.Intervention(a[0], 4, a[2], factor=3),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_steered_as_a_loop_of_interventions(family: str, kind: str) -> None:
    model = replacement(family, kind, torch.float32)
    steer, options = steering(model), {"max_new_tokens": COUNT, "temperature": 1.5, "seed": 7}
    expected = [loop(model, ids, steer, i) for i, ids in enumerate(prompts())]
    assert pc.generate(model, prompts(), steer, **options) == expected
    assert pc.generate(model, prompts()[0], steer, **options) == expected[0]
    assert any(e != free for e, free in zip(expected, pc.generate(model, prompts(), **options), strict=True))


def test_a_text_ends_at_an_end_token() -> None:
    """At any of the tokens that the model's generation config names; other prompts of the batch go on."""
    model = replacement("llama", "plt", torch.float32)
    free = pc.generate(model, prompts(), max_new_tokens=COUNT)
    model.hf_model.generation_config.eos_token_id = [60, free[0][2]]
    ended = pc.generate(model, prompts(), max_new_tokens=COUNT)
    cut = [row[: row.index(free[0][2]) + 1] if free[0][2] in row else row for row in free]
    assert ended == cut and len(ended[0]) <= 3 < max(map(len, ended))


def test_sampling_has_the_candidates_of_transformers() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=g, dtype=torch.float64)
    for top_k, top_p in ((5, None), (None, 0.7), (9, 0.5), (100, 1.0)):
        candidates = Sampling(0.8, top_k, top_p).candidates(logits / 0.8)
        expected = logits / 0.8
        if top_k is not None:
            expected = transformers.TopKLogitsWarper(top_k)(None, expected)
        if top_p is not None:
            expected = transformers.TopPLogitsWarper(top_p)(None, expected)
        assert torch.equal(candidates.isinf(), expected.isinf())
        assert candidates.isinf().any() or top_k == 100


def test_sampling_is_by_probability() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    counts = torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        counts[Sampling(2.0, 3, None).pick(logits, [generator])] += 1
    expected = (logits[0, :3] / 2).softmax(-1)
    assert float((counts[:3] / 4000 - expected).abs().max()) < 0.03 and counts[3] == 0


def test_samples_depend_on_the_seed_and_the_place_in_the_list() -> None:
    model = replacement("llama", "plt", torch.float32)
    ids, options = prompts()[1], {"max_new_tokens": 12, "temperature": 2.0}
    texts = pc.generate(model, [ids] * 3, **options)
    assert texts == pc.generate(model, [ids] * 3, **options)
    assert texts[0] == pc.generate(model, torch.tensor(ids), **options)
    assert texts[0] != texts[1] != texts[2] and texts[0] != pc.generate(model, ids, seed=1, **options)
    assert pc.generate(model, [ids], top_k=1, **options) == pc.generate(model, [ids], max_new_tokens=12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be a number, got NaN"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 59}, ValueError, "max_new_tokens must be at most 58 after a prompt of 6 tokens"),
        ({"seed": -1}, ValueError, "seed must be zero or positive, got -1"),
        ({"seed": 1 << 32}, ValueError, "seed must be below 2"),
        ({"steer": pc.Intervention(0, 1, 0, 1.0)}, TypeError, "steer must be a list of pc.Intervention, got Interv"),
        ({"steer": [pc.Intervention(3, 1, 0, 1.0)]}, ValueError, "layer must be from 0 to 2, got 3"),
        ({"steer": [pc.Intervention(0, 30, 0, 1.0)]}, ValueError, "position must be from 1 to 25 .*, got 30"),
        ({"steer": [pc.Intervention(0, slice(26, None), 0, 1.0)]}, ValueError, "position must name positions from"),
    ],
)
def test_arguments(options: dict[str, object], error: type[Exception], message: str) -> None:
    model = replacement("llama", "plt", torch.float32)
    with pytest.raises(error, match=f"^generate: {message}"):
        pc.generate(model, prompts()[0], **options)
    with pytest.raises(TypeError, match=r"^generate: prompts must be a prompt or a list of prompts, got int"):
        pc.generate(model, 3)
