"""Saved Llama-like models that transformers 4 and 5 read alike, whichever of them wrote the files.

Version 5 writes the rotary base under a name that version 4 passes over in silence, and a tokenizer class that version
4 does not have; version 4 turns a GGUF file's byte-level tokenizer into one that opens every text with a token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PLAIN_BPE = {"unk_token": None, "fuse_unk": False, "byte_fallback": False}


def make_portable(folder: Path) -> None:
    """Rewrite config.json so that both versions find the rotary base."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"], "rope_type": "default"}
    both = {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": None}
    path.write_text(json.dumps({**config, **both}, indent=2, sort_keys=True) + "\n")


def save_byte_level_tokenizer(tokenizer: Any, folder: Path, names: dict[str, str]) -> None:
    """Save the vocabulary and merges of a byte-level tokenizer, without anything added to a text.

    names: its special tokens, by their role.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(normalizer=None, post_processor=None, pre_tokenizer=_BYTES, decoder=_BYTES)
    state["model"].update(_PLAIN_BPE)
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)
    plain.chat_template = tokenizer.chat_template
    plain.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n")
