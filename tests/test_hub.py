"""Hub ids: sets and models in the cache of the hub, and files that a list names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from format_files import write
from random_transcoders import random_set
from transcoder_checks import assert_same, dense

import pycircuit as pc

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache_snapshot(hub: Path, repository: str, revision: str, inner: str = "") -> Path:
    """The folder where the hub's own library keeps files of a revision."""
    root = hub / f"models--{repository.replace('/', '--')}"
    commit = f"{abs(hash(revision)):040x}"[:40]
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    folder = root / "snapshots" / commit / inner
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def move_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)


@pytest.mark.parametrize(
    ("name", "inner", "revision"),
    [
        ("org/set", "", "main"),
        ("org/set/some/where", "some/where", "main"),
        ("org/set@v2", "", "v2"),
        ("org/set/deep@v2", "deep", "v2"),
    ],
)
def test_cached_hub_ids(hub: Path, tmp_path: Path, name: str, inner: str, revision: str) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    move_files(tmp_path / "set", cache_snapshot(hub, "org/set", revision, inner))
    assert_same(pc.transcoders.load(name), expected)


def test_links_of_the_hubs_cache(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache keeps files by their content, under names that say nothing, and links to them."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "made"))
    for name in ("gemma_scope_compressed", "gemma_scope_2", "circuit_tracer_cross"):
        expected = write(name, tmp_path / name)
        folder = cache_snapshot(hub, f"org/{name}", "v1")
        move_files(tmp_path / name, folder)
        blobs = folder.parent.parent / "blobs"
        blobs.mkdir()
        for n, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
            path.rename(blobs / f"{n:064x}")
            path.symlink_to(blobs / f"{n:064x}")
        assert_same(pc.transcoders.load(f"org/{name}@v1"), expected)
        pc.transcoders.convert(f"org/{name}@v1", tmp_path / f"new {name}")
        assert_same(pc.transcoders.load(tmp_path / f"new {name}"), expected)


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
def test_only_the_named_set_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, variant: str | None, weights: list[int]
) -> None:
    """The named set of a repository with many, and never files that would not be opened."""
    from huggingface_hub.utils import filter_repo_objects

    fetched: list[str] = []

    def downloads(repository: str, revision: str | None, allow_patterns: Any, ignore_patterns: Any) -> str:
        assert (repository, revision) == ("org/set", "v1")
        fetched.extend(filter_repo_objects(PUBLISHED, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        (tmp_path / "transcoder_all").mkdir()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", downloads)
    with pytest.raises(ValueError, match=r"load: .* must hold one of"):
        pc.transcoders.recognise(f"{path}@v1", variant)
    assert [name for name in fetched if name.endswith(".safetensors")] == [PUBLISHED[n] for n in weights]
    assert not any(name.endswith((".bin", ".pt")) or name.startswith("features") for name in fetched)
    assert ("config.yaml" in fetched) == (path == "org/set")


def test_a_revision_that_is_quoted(hub: Path, tmp_path: Path) -> None:
    """A revision quoted as in addresses: a pull request's has a slash."""
    write("listed", tmp_path / "set")
    folder = cache_snapshot(hub, "a/b", "v1")
    refs = folder.parent.parent / "refs" / "refs" / "pr"
    refs.mkdir(parents=True)
    (refs / "1").write_text(folder.name)
    (tmp_path / "set" / "files" / "1.safetensors").rename(folder / "1.safetensors")
    config = tmp_path / "set" / "config.yaml"
    text = config.read_text()
    for revision in ("refs%2Fpr%2F1", "refs/pr/1"):
        config.write_text(text.replace("files/1.safetensors", f"hf://a/b/1.safetensors?revision={revision}"))
        assert_same(pc.transcoders.load(tmp_path / "set"), random_set(False))


def test_listed_files_of_several_repositories_and_revisions(hub: Path, tmp_path: Path) -> None:
    """One layer each from circuit-tracer's, GemmaScope's and GemmaScope 2's files; one layer has none."""
    sets = {name: write(name, tmp_path / name) for name in ("circuit_tracer", "gemma_scope", "gemma_scope_2_affine")}
    (tmp_path / "circuit_tracer" / "layer_0.safetensors").rename(
        cache_snapshot(hub, "a/b", "v1", "x") / "one.safetensors"
    )
    inner = tmp_path / "gemma_scope" / "layer_1" / "width_16k" / "average_l0_8"
    (inner / "params.npz").rename(cache_snapshot(hub, "c/d", "main", "layer_1") / "params.npz")
    inner = tmp_path / "gemma_scope_2_affine" / "transcoder_all" / "layer_2_width_16k_l0_small_affine"
    (inner / "params.safetensors").rename(cache_snapshot(hub, "e/f", "v9", "y") / "params.safetensors")
    places = [
        "hf://a/b/x/one.safetensors?revision=v1",
        "hf://c/d/layer_1/params.npz",
        "null",
        "hf://e/f@v9/y/params.safetensors",
    ]
    lines = "".join(f"- {place}\n" for place in places)
    hooks = "feature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.yaml").write_text(f"model_kind: transcoder_set\n{hooks}transcoders:\n{lines}")
    got = pc.transcoders.load(tmp_path / "set")
    assert got.w_enc[2] is None and got.reads == "mlp_normed"
    for target, source, name in ((0, 0, "circuit_tracer"), (1, 1, "gemma_scope"), (3, 2, "gemma_scope_2_affine")):
        assert torch.equal(got.w_enc[target], sets[name].w_enc[source])
        assert torch.equal(dense(got.w_dec[target]), sets[name].w_dec[source])
        assert torch.equal(got.activation[target].theta, sets[name].activation[source].theta)
        skip = sets[name].w_skip[source]
        assert skip is None or torch.equal(got.w_skip[target], skip)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", r"path must be a folder or a hub id that can be reached or is cached, got 'org/absent'"),
        ("org/set@v8", r"\(revision v8\)"),
        ("org/set/nowhere", r"must hold the folder 'nowhere', got none"),
        ("org/set/../../x", r"path must stay inside its repository"),
        ("org", r"path must be a folder or a hub id org/repo"),
        ("../org/set", r"path must be a folder or a hub id org/repo"),
    ],
)
def test_hub_ids_that_lead_nowhere(hub: Path, tmp_path: Path, name: str, message: str) -> None:
    write("circuit_tracer", tmp_path / "set")
    move_files(tmp_path / "set", cache_snapshot(hub, "org/set", "main"))
    with pytest.raises((ValueError, OSError), match=message):
        pc.transcoders.load(name)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hf://a/b/c.safetensors", r"load: hf://a/b/c\.safetensors must be reachable or cached, got"),
        ("hf://a/b", r"locations must be hf://org/repo/path"),
        ("hf://a/b/../c", r"locations must be hf://org/repo/path"),
        ("hf://a/b/c?token=x", r"locations must be hf://org/repo/path"),
    ],
)
def test_locations_that_lead_nowhere(hub: Path, tmp_path: Path, location: str, message: str) -> None:
    write("listed", tmp_path / "set")
    config = tmp_path / "set" / "config.yaml"
    config.write_text(config.read_text().replace("files/1.safetensors", location))
    with pytest.raises((ValueError, OSError), match=message):
        pc.transcoders.load(tmp_path / "set")


def test_models_of_the_hub(hub: Path, tmp_path: Path) -> None:
    builders.build("llama").save_pretrained(cache_snapshot(hub, "org/tiny", "v3"))
    random_set(False).save(tmp_path / "set")
    assert pc.load("org/tiny@v3", tmp_path / "set").family.model_type == "llama"
    with pytest.raises(OSError, match=r"load: model must be 'demo', 'smollm2', or a folder or hub id .* got 'org/no'"):
        pc.load("org/no", tmp_path / "set")
