"""The model in the box: a small Llama that joins facts, its transcoders, and what their features stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .facts import BOX, Facts
from .tokenizer import Names

if TYPE_CHECKING:
    pass

KINDS = ("clt", "plt")


def load_model(box: Path = BOX) -> tuple[Any, Names]:
    """(the transformers model in float32, its tokenizer)."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_pretrained(box))
    held = {name: t.float() for name, t in load_file(box / "model.safetensors").items()}
    held["lm_head.weight"] = held["model.embed_tokens.weight"]
    model.load_state_dict(held)
    return model.eval(), Names(Facts.load(box / "facts.json").words())
