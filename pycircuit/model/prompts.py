"""Prompts: text or token ids, one or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from pycircuit.ops.checks import is_int

Prompt = str | Sequence[int] | Tensor | np.ndarray


class Tokenizer(Protocol):
    """Anything with a method that turns text into token ids, or into an object whose `ids` they are."""

    def encode(self, text: str, /) -> Any: ...


def is_one_prompt(prompts: object) -> bool:
    """True for one prompt: text, an array of ids, or a list of ids that is not empty."""
    if isinstance(prompts, str) or hasattr(prompts, "tolist"):
        return True
    return isinstance(prompts, Sequence) and len(prompts) > 0 and all(map(is_int, prompts))


def prompt_list(op: str, prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, of one entry for one prompt."""
    if is_one_prompt(prompts):
        return [prompts]  # type: ignore[list-item]
    if not isinstance(prompts, Sequence):
        raise TypeError(f"{op}: prompts must be a prompt or a list of prompts, got {type(prompts).__name__}")
    return list(prompts)  # type: ignore[arg-type]


def prompt_ids(prompt: object, tokenizer: Tokenizer | None) -> list[int]:
    """The token ids of a prompt, text encoded by the tokenizer."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("prompt must be token ids, the model has no tokenizer, got text; pass tokenizer=")
        encoded = tokenizer.encode(prompt)
        return [int(token) for token in getattr(encoded, "ids", encoded)]
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple) and len(prompt) == 1 and isinstance(prompt[0], list | tuple):
        prompt = prompt[0]  # [1, positions], as tokenizers return it
    if not isinstance(prompt, list | tuple) or not all(map(is_int, prompt)):
        raise TypeError(f"prompt must be text or a list of token ids, got {type(prompt).__name__}")
    return list(map(int, prompt))
