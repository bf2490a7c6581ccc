"""Agreement of a frozen model with the forward that it was captured from."""

from __future__ import annotations

import torch
from torch import Tensor

from .capture import Captured


def disagreement(captured: Captured) -> dict[str, float]:
    """The largest relative error over layers of each step of the frozen model.

    captured must hold resid_in, attention_out, resid_mid, mlp_raw and mlp_out. Each step is recomputed from the
    stream that was recorded at its input, so an error says which entry of the family's row is wrong.
    """
    s = captured.streams
    worst = dict.fromkeys(("attention", "post_mlp_norm", "order", "mlp_input"), 0.0)
    frozen = captured.model
    after = [*s["resid_in"][1:], frozen.final_stream]
    for i, layer in enumerate(frozen.layers):
        middle = s["resid_in"][i] if layer.parallel else s["resid_in"][i] + s["attention_out"][i]
        norm = layer.read_norm("mlp_in")
        pairs = {
            "attention": (layer.attention_out(s["resid_in"][i]), s["attention_out"][i]),
            "post_mlp_norm": (layer.mlp_added(s["mlp_raw"][i]), s["mlp_out"][i]),
            "order": (s["resid_in"][i] + s["attention_out"][i] + s["mlp_out"][i], after[i]),
            "mlp_input": (middle if norm is None else norm.forward(middle), s["mlp_in"][i]),
        }
        worst = {name: max(worst[name], relative_error(*pair)) for name, pair in pairs.items()}
    return worst


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The largest error over the largest expected value."""
    return float((result - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
