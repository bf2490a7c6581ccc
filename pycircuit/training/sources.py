"""What training and evaluation are given, made one: a model with its family's row, texts as token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pycircuit.model import ReplacementModel
from pycircuit.model.families import family_of
from pycircuit.model.weights import read_weights
from pycircuit.ops.checks import is_int

from .stream import Source

Texts = Iterable[Any] | Tensor


def source_of(op: str, model: Any, reads: str, writes: str, ignore: int | None) -> Source:
    """model: a transformers causal model, or a ReplacementModel that holds one. ignore: None takes the family's."""
    if isinstance(model, ReplacementModel):
        ignored = model.ignore_positions if ignore is None else ignore
        return Source(model.hf_model, model.family, model.weights, reads, writes, ignored)
    family = family_of(model)
    if ignore is None:
        name = str(getattr(model.config, "_name_or_path", "")).rstrip("/")
        ignore = family.chat_ignore_positions if name.endswith("-it") else 1
    if not is_int(ignore) or ignore < 0:
        raise ValueError(f"{op}: ignore_positions must be a whole number, zero or more, got {ignore!r}")
    return Source(model.eval(), family, read_weights(model, family), reads, writes, int(ignore))


def token_ids(op: str, texts: Texts, model: Any, tokenizer: Any, vocabulary: int) -> list[Tensor]:
    """One tensor of int64 ids a text. texts: strings, lists of ids, tensors, or one tensor [texts, positions]."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{op}: texts must be a list of texts or of token ids, got {type(texts).__name__}")
    tokenizer = tokenizer or (model.tokenizer if isinstance(model, ReplacementModel) else None)
    found = []
    for number, text in enumerate(texts):
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError(f"{op}: tokenizer must be given where texts are strings, got None")
            encoded = tokenizer.encode(text)
            text = getattr(encoded, "ids", encoded)
        ids = torch.as_tensor(text)
        if ids.ndim != 1 or (len(ids) and ids.is_floating_point()):  # of no numbers at all the type says nothing
            raise TypeError(f"{op}: text {number} must be a string or a list of token ids, got shape {list(ids.shape)}")
        ids = ids.cpu().long()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            got = f"{int(ids.min())} to {int(ids.max())}"
            raise ValueError(f"{op}: text {number} must hold ids from 0 to {vocabulary - 1}, got {got}")
        found.append(ids)
    if not found:
        raise ValueError(f"{op}: texts must hold at least one text, got none")
    return found


def pieces(op: str, sequences: list[Tensor], context: int, ignore: int) -> list[Tensor]:
    """Token ids cut to the context; what is too short to leave a token is left out."""
    cut = [piece for ids in sequences for piece in ids.split(context)]
    kept = [piece for piece in cut if len(piece) > ignore]
    if not kept:
        longest = max(len(p) for p in cut)
        raise ValueError(f"{op}: texts must be longer than the {ignore} ignored positions, got at most {longest}")
    return kept
