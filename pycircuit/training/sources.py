"""Inputs of training and evaluation: the model as a Source, texts as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from pycircuit.model import ReplacementModel
from pycircuit.model.families import family_of
from pycircuit.model.weights import read_weights
from pycircuit.ops.checks import is_int
from pycircuit.transcoders.types import Reads, Writes

from .stream import Source

Model: TypeAlias = nn.Module | ReplacementModel
Text: TypeAlias = str | Sequence[int] | Tensor | np.ndarray
Texts: TypeAlias = Iterable[Text] | Tensor


class Encoding(Protocol):
    """Token ids of a text as the tokenizers package returns them."""

    @property
    def ids(self) -> list[int]:
        """Token ids."""


class Tokenizer(Protocol):
    """A tokenizer of transformers or of tokenizers."""

    def encode(self, text: str, /) -> Sequence[int] | Encoding:
        """Return the token ids of a text, or an object that has them as `ids`."""


def source_of(op: str, model: Model, reads: Reads, writes: Writes, ignore: int | None) -> Source:
    """Return a Source on a transformers causal model, or on the one in a ReplacementModel.

    ignore: the number of opening positions left out; None: the family's.
    """
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


def token_ids(op: str, texts: Texts, model: Model, tokenizer: Tokenizer | None, vocabulary: int) -> list[Tensor]:
    """Return int64 token ids, one tensor a text.

    texts: strings, lists of ids, tensors, or one tensor [texts, positions].
    """
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{op}: texts must be a list of texts or of token ids, got {type(texts).__name__}")
    tokenizer = tokenizer or (model.tokenizer if isinstance(model, ReplacementModel) else None)
    sequences = []
    for number, text in enumerate(texts):
        ids = torch.as_tensor(_encode(op, text, tokenizer) if isinstance(text, str) else text)
        if ids.ndim != 1 or (len(ids) and ids.is_floating_point()):  # the type of an empty list says nothing
            raise TypeError(f"{op}: text {number} must be a string or a list of token ids, got shape {list(ids.shape)}")
        ids = ids.cpu().long()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            got = f"{int(ids.min())} to {int(ids.max())}"
            raise ValueError(f"{op}: text {number} must hold ids from 0 to {vocabulary - 1}, got {got}")
        sequences.append(ids)
    if not sequences:
        raise ValueError(f"{op}: texts must hold at least one text, got none")
    return sequences


def _encode(op: str, text: str, tokenizer: Tokenizer | None) -> Sequence[int]:
    """Token ids of a string."""
    if tokenizer is None:
        raise ValueError(f"{op}: tokenizer must be given where texts are strings, got None")
    encoded: Any = tokenizer.encode(text)
    ids: Sequence[int] = getattr(encoded, "ids", encoded)
    return ids


def split_to_context(op: str, sequences: list[Tensor], context: int, ignore: int) -> list[Tensor]:
    """Split token ids to the context; a sequence without a token past the ignored positions is left out."""
    chunks = [chunk for ids in sequences for chunk in ids.split(context)]
    usable = [chunk for chunk in chunks if len(chunk) > ignore]
    if not usable:
        longest = max(len(chunk) for chunk in chunks)
        raise ValueError(f"{op}: texts must be longer than the {ignore} ignored positions, got at most {longest}")
    return usable
