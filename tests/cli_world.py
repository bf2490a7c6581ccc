"""A tiny model, texts and trained transcoders in files, for tests of the command line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

import builders
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import pycircuit as pc
from pycircuit import cli

PROMPT = "w5 w17 w42 w8 w23 w11 w3"  # the tokenizer puts w1 before it


class World(NamedTuple):
    """Files of a tiny model: its folder, trained transcoders, texts, and the JSON that `train` printed."""

    model: Path
    transcoders: Path
    texts: Path
    trained: str

    @property
    def opening(self) -> tuple[object, ...]:
        """Arguments that name the model and its transcoders."""
        return self.model, "--transcoders", self.transcoders


def write_model(folder: Path) -> None:
    """Write a tiny llama and a tokenizer of the words w0, w1, ..., which puts w1 first."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(builders.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("w1 $A", special_tokens=[("w1", 1)])
    builders.build("llama").save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def training(model: Path, texts: Path, out: Path) -> tuple[object, ...]:
    """Arguments of twelve steps of training with a checkpoint every five."""
    return (
        "train", model, "--texts", texts, "--out", out, "--features", 48, "--steps", 12, "--batch", 64, "--k", 4,
        "--rate", 3e-3, "--warmup", 2, "--every", 5,
    )  # fmt: skip


def make_world(folder: Path) -> World:
    """Write a model, a tokenizer and texts, and train transcoders with the command."""
    write_model(folder / "model")
    draw = torch.Generator().manual_seed(3)
    lines = [" ".join(f"w{t}" for t in torch.randint(61, (30,), generator=draw).tolist()) for _ in range(40)]
    written = folder / "texts.jsonl"
    written.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = [*training(folder / "model", written, folder / "set"), "--quiet", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pycircuit", *map(str, arguments)])
        output = io.StringIO()
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 0
    return World(folder / "model", folder / "set", written, output.getvalue())


def active(world: World) -> tuple[int, int, int]:
    """(layer, position, feature) of a feature of the first layer that is active in the middle of the prompt."""
    model = pc.load(world.model, world.transcoders)
    features = model.activations([PROMPT])[0][0]
    entry = int((features.position() == 3).nonzero()[0])
    return 0, 3, int(features.index[entry])
