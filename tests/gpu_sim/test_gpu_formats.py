"""Transcoders of every format, loaded for the pretended device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import format_files
import pytest
import random_transcoders
import torch
from gpu_models import compare, language_model

import pycircuit as pc

PROMPT = builders.prompt(7)


def traced(folder: Path, device: str, **options: Any) -> pc.Graph:
    model = pc.ReplacementModel(language_model("llama", device), pc.transcoders.load(folder, device, **options))
    return pc.attribute(model, PROMPT, max_targets=2, max_features=8, progress=False)


@pytest.mark.parametrize("name", format_files.ROWS)
def test_format(name: str, tmp_path: Path) -> None:
    format_files.write(name, tmp_path / "set")
    options = format_files.ROWS[name].overrides
    truth = traced(tmp_path / "set", "cpu", **options)
    compare(traced(tmp_path / "set", "cuda", **options), truth)


def test_features_compared_by_the_norm_of_their_decoders(tmp_path: Path) -> None:
    """Decoder rows that are multiplied, feature by feature, as they are read."""
    made = random_transcoders.random_set(False, "topk", skip=False, reads="mlp_normed")
    norms = [torch.tensor(3.0), torch.tensor(7.0)]
    format_files.llamascopium(
        tmp_path, made, norms=norms, norm_activation="dataset-wise", sparsity_include_decoder_norm=True
    )
    truth = traced(tmp_path, "cpu")
    compare(traced(tmp_path, "cuda"), truth)
