"""Training on real weights: the preset's texts, and massive outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pycircuit.training.massive import find_massive
from pycircuit.training.presets import SMOLLM2_TURN
from pycircuit.training.sources import source_of

pytestmark = pytest.mark.usefixtures("one_thread")

SEQUENCES, LENGTH, MASSIVE = 16, 64, [11, 28]


def test_turns_are_in_the_models_own_template(tokenizer: Any) -> None:
    question, answer = "What does the word 'circuit' mean?", "A path that closes."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = SMOLLM2_TURN.format(question=question, answer=answer)
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    assert tokenizer.encode(text)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_massive_outputs_are_those_of_a_feature(
    hf_model: Any, windows: torch.Tensor, figure: Callable[[str], None]
) -> None:
    """Fitted to sixteen opening positions: sixteen others are explained, and no ordinary token activates it."""
    fitted, unseen = windows[: 2 * SEQUENCES, :LENGTH].split(SEQUENCES)
    source = source_of("test", hf_model, "mlp_in", "mlp_out", 1)
    features = find_massive(source, list(fitted), *source.activations(list(fitted)), 50.0, False)
    assert list(features) == MASSIVE
    x, y = source_of("test", hf_model, "mlp_in", "mlp_out", 0).activations(list(unseen))
    opening = torch.arange(x.shape[1]) % LENGTH == 0
    for layer, feature in features.items():
        massive = y[layer].norm(dim=1) > feature.norm
        assert massive[opening].all()
        value = (x[layer] @ feature.w_enc + feature.b_enc).clamp_min(0)
        error = y[layer] - value[:, None] * feature.w_dec
        unexplained = float(error[massive].square().sum() / y[layer, massive].square().sum())
        figure(f"massive outputs of layer {layer}: {int(massive.sum())}, {unexplained:.1e} unexplained")
        assert unexplained < 1e-2 and not value[~massive].any()
