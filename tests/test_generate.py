"""Generation: as transformers generates, and steered as a loop of whole interventions would."""

from __future__ import annotations

import builders
import pytest
import torch
import transformers
from builders import KINDS, replacement
from test_intervene import active

import pycircuit as pc
from pycircuit.interventions.generate import Sampling
from pycircuit.model.capture import attention_by

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
        given = torch.tensor([ids])
        how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        with attention_by(model.hf_model, "eager"):  # other attentions drop scales and caps in some versions
            out = model.hf_model.generate(given, attention_mask=torch.ones_like(given), **how)
        expected.append(out[0, len(ids) :].tolist())
    assert pc.generate(model, prompts(), max_new_tokens=12) == expected
    assert pc.generate(model, prompts()[1], max_new_tokens=12) == expected[1]


def loop(model: pc.ReplacementModel, ids: list[int], steer: list[pc.Intervention], place: int) -> list[int]:
    """The same without a cache: every token sampled after a whole intervention on all before it."""
    start, generator = len(ids), torch.Generator().manual_seed((7 << 24) + place)
    for _ in range(COUNT):
        acting = [one for one in steer if len(one.places(len(ids), len(ids)))]
        logits = pc.intervene(model, ids, acting, "none").logits if acting else model.freeze(ids).model.logits()
        ids = [*ids, int(Sampling(1.5, None, None).pick(logits[-1:], [generator]))]
        if ids[-1] == EOS:
            break
    return ids[start:]


def steering(model: pc.ReplacementModel) -> list[pc.Intervention]:
    """Open-ended and closed, over all and over generated tokens alone; set, scaled, ablated; two in one place."""
    (a, b, c, d) = active(model, 4)
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
    steer, how = steering(model), {"max_new_tokens": COUNT, "temperature": 1.5, "seed": 7}
    expected = [loop(model, ids, steer, place) for place, ids in enumerate(prompts())]
    assert pc.generate(model, prompts(), steer, **how) == expected
    assert pc.generate(model, prompts()[0], steer, **how) == expected[0]
    assert any(e != free for e, free in zip(expected, pc.generate(model, prompts(), **how), strict=True))


def test_a_text_ends() -> None:
    """At any of the tokens that the model's generation config names; other prompts of the batch go on."""
    model = replacement("llama", "plt", torch.float32)
    free = pc.generate(model, prompts(), max_new_tokens=COUNT)
    model.hf_model.generation_config.eos_token_id = [60, free[0][2]]
    found = pc.generate(model, prompts(), max_new_tokens=COUNT)
    cut = [row[: row.index(free[0][2]) + 1] if free[0][2] in row else row for row in free]
    assert found == cut and len(found[0]) <= 3 < max(map(len, found))


def test_sampling_keeps_what_transformers_keeps() -> None:
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 40, generator=g, dtype=torch.float64)
    for top_k, top_p in ((5, None), (None, 0.7), (9, 0.5), (100, 1.0)):
        kept = Sampling(0.8, top_k, top_p)._kept(logits / 0.8)
        expected = logits / 0.8
        if top_k is not None:
            expected = transformers.TopKLogitsWarper(top_k)(None, expected)
        if top_p is not None:
            expected = transformers.TopPLogitsWarper(top_p)(None, expected)
        assert torch.equal(kept.isinf(), expected.isinf())
        assert kept.isinf().any() or top_k == 100


def test_sampling_is_by_probability() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    counts = torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        counts[Sampling(2.0, 3, None).pick(logits, [generator])] += 1
    expected = (logits[0, :3] / 2).softmax(-1)
    assert float((counts[:3] / 4000 - expected).abs().max()) < 0.03 and counts[3] == 0


def test_samples() -> None:
    """The same again with the same seed, another with another, and one for each place in the list."""
    model = replacement("llama", "plt", torch.float32)
    ids, how = prompts()[1], {"max_new_tokens": 12, "temperature": 2.0}
    found = pc.generate(model, [ids] * 3, **how)
    assert found == pc.generate(model, [ids] * 3, **how) and found[0] == pc.generate(model, torch.tensor(ids), **how)
    assert found[0] != found[1] != found[2] and found[0] != pc.generate(model, ids, seed=1, **how)
    assert pc.generate(model, [ids], top_k=1, **how) == pc.generate(model, [ids], max_new_tokens=12)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
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
def test_arguments(how: dict[str, object], kind: type[Exception], message: str) -> None:
    model = replacement("llama", "plt", torch.float32)
    with pytest.raises(kind, match=f"^generate: {message}"):
        pc.generate(model, prompts()[0], **how)
    with pytest.raises(TypeError, match=r"^generate: prompts must be a prompt or a list of prompts, got int"):
        pc.generate(model, 3)
