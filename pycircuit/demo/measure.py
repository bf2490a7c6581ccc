"""What the box is worth: what its model knows, what its transcoders explain, whether it says the same with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .facts import Statement

if TYPE_CHECKING:
    from pycircuit.model import ReplacementModel


def answers(model: ReplacementModel, statements: Sequence[Statement], replaced: bool = False) -> Tensor:
    """The likeliest completion of each prompt: [statements]. replaced: every MLP by its reconstruction, no errors."""
    from pycircuit.train.evaluate import replaced_logits

    ids = [model.tokens(statement.prompt) for statement in statements]
    out = torch.zeros(len(ids), dtype=torch.int64)
    for length in sorted({len(row) for row in ids}):
        at = [i for i, row in enumerate(ids) if len(row) == length]
        batch = torch.stack([ids[i] for i in at])
        with torch.no_grad():
            logits = replaced_logits(model, batch) if replaced else model.hf_model(batch, use_cache=False).logits
        out[at] = logits[:, -1].argmax(-1)
    return out


def accuracy(model: ReplacementModel, statements: Sequence[Statement]) -> dict[str, float]:
    """Share of right answers by kind; statements that were held out are a kind of their own."""
    said = [model.tokenizer.decode(int(token)) for token in answers(model, statements)]
    kinds: dict[str, list[bool]] = {}
    for statement, word in zip(statements, said, strict=True):
        kind = statement.kind + (", held out" if statement.held_out else "")
        kinds.setdefault(kind, []).append(word == statement.answer)
    return {kind: sum(right) / len(right) for kind, right in kinds.items()}


def agreement(model: ReplacementModel, statements: Sequence[Statement]) -> float:
    """Share of prompts that the replacement model completes as the model does."""
    return float((answers(model, statements) == answers(model, statements, replaced=True)).float().mean())
