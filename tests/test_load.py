"""pc.load: folders, types, tokenizers and errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from format_files import write
from random_transcoders import random_set
from tokenizers import Tokenizer

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model without a tokenizer, and transcoders for it."""
    builders.build("llama").save_pretrained(tmp_path / "model")
    pc.transcoders.save(random_set(False), tmp_path / "set")
    return tmp_path / "model", tmp_path / "set"


def test_folders(folders: tuple[Path, Path]) -> None:
    model = pc.load(folders[0], folders[1])
    assert model.dtype == torch.float32 and model.tokenizer is None
    got = pc.attribute(model, builders.prompt(7), progress=False)
    own = pc.ReplacementModel(builders.build("llama"), random_set(False))
    expected = pc.attribute(own, builders.prompt(7), progress=False)
    assert torch.equal(got.features, expected.features)
    assert torch.allclose(got.dense(), expected.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", torch.bfloat16])
def test_dtype_of_model_and_transcoders(folders: tuple[Path, Path], dtype: Any) -> None:
    model = pc.load(str(folders[0]), str(folders[1]), device="cpu", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert next(model.hf_model.parameters()).dtype == wanted
    assert model.transcoders.w_enc[0].dtype == model.transcoders.w_dec[0].dtype == wanted


def test_transcoders_in_memory(folders: tuple[Path, Path]) -> None:
    model = pc.load(folders[0], random_set(True), dtype=torch.float64)
    assert isinstance(model.transcoders, pc.CrossLayerTranscoder) and model.transcoders.w_enc[0].dtype == torch.float64


def test_arguments_reach_the_transcoders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Arguments: the name of a hook or ours; a set among several; the size of the cache."""
    write("crosslayer", tmp_path / "cross")
    with pytest.raises(ValueError, match=r"load: reads must be given for .*cross, whose files do not say it, got None"):
        pc.load(folders[0], tmp_path / "cross", writes="mlp_out")
    for reads in ("resid_mid", "hook_resid_mid", "blocks.0.hook_resid_mid"):
        model = pc.load(folders[0], tmp_path / "cross", reads=reads, writes="hook_mlp_out", cache="1 MiB")
        transcoders = model.transcoders
        assert (transcoders.reads, transcoders.writes, transcoders.w_dec[0].cache.limit) == (
            "resid_mid",
            "mlp_out",
            1 << 20,
        )
    with pytest.raises(ValueError, match=r"load: reads must be one of .*, or a hook's name, got 'hook_resid_post'"):
        pc.load(folders[0], tmp_path / "cross", reads="hook_resid_post", writes="mlp_out")
    write("gemma_scope_2", tmp_path / "scope")
    assert pc.load(folders[0], tmp_path / "scope", variant="16k").transcoders.depth == 3
    with pytest.raises(ValueError, match=r"load: variant must leave some of .* got '1m'"):
        pc.load(folders[0], tmp_path / "scope", variant="1m")
    for model, transcoders in ((folders[0], random_set(True)), ("demo", None)):
        with pytest.raises(ValueError, match=r"load: reads must be left out but for transcoders in files, got"):
            pc.load(model, transcoders, reads="mlp_in")


def word_tokenizer(folder: Path) -> None:
    """Words "0", "1", ... up to the model's vocabulary."""
    import transformers
    from tokenizers import models, pre_tokenizers

    words = Tokenizer(models.WordLevel({str(n): n for n in range(builders.VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0").save_pretrained(folder)


def test_tokenizer_comes_along(folders: tuple[Path, Path]) -> None:
    word_tokenizer(folders[0])
    model = pc.load(*folders)
    graph = pc.attribute(model, "3 1 4 1 5", max_features=0, progress=False)
    assert graph.tokens.ids.tolist() == [3, 1, 4, 1, 5]
    (folders[0] / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"load: model must have a tokenizer that transformers can open, got"):
        pc.load(*folders)


def test_wrong_arguments(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, folder = folders
    with pytest.raises(TypeError, match=r"load: model must be 'demo', 'smollm2', a folder or a hub id, got LlamaFor"):
        pc.load(builders.build("llama"), folder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"load: transcoders must be a folder, .* got None"):
        pc.load(model)
    with pytest.raises(TypeError, match=r"load: transcoders must be a folder, .* got int"):
        pc.load(model, 3)
    with pytest.raises(ValueError, match=r"load: dtype must be one of float64, .* got 'int8'"):
        pc.load(model, folder, dtype="int8")
    with pytest.raises(ValueError, match=r"load: device must be such as 'cpu' or 'cuda:0', got 'nowhere'"):
        pc.load(model, folder, device="nowhere")
    with pytest.raises(FileNotFoundError, match=r"load: path must be a folder or a hub id .* got '\./absent'"):
        pc.load(model, "./absent")
    with pytest.raises(NotADirectoryError, match=r"load: path must be a folder, got the file"):
        pc.load(model, folder / "config.yaml")
    with pytest.raises(ValueError, match=r"load: transcoders must be a folder, a hub id, 'clt' or 'plt', got 'none'"):
        pc.load("demo", "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=r"load: model must be 'demo', 'smollm2', or a folder"):
        pc.load(tmp_path / "empty", folder)


def test_copies_of_sets_left_in_files(folders: tuple[Path, Path]) -> None:
    """Copies and pickles read the same files, and cache rows of their own."""
    model = pc.load(*folders)
    graph = pc.attribute(model, builders.prompt(7), progress=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = pc.attribute(other, builders.prompt(7), progress=False)
        assert torch.equal(again.features, graph.features) and torch.equal(again.dense(), graph.dense())
