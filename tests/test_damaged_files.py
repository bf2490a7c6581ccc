"""Files that change in use, go away, or are mixed up with those of other layers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import change_json, edit, rewrite, swap
from format_files import ROWS, write
from random_transcoders import LAYERS, SIZE, WIDTH, random_set
from safetensors.torch import load_file, save_file
from transcoder_checks import assert_same

import pycircuit as pc
from pycircuit.transcoders.formats.stored_tensors import StoredTensor, open_safetensors

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


def load_large_set(folder: Path) -> Any:
    """Encoders of many pages each, loaded."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(3000, WIDTH, generator=g) for _ in range(LAYERS)]
    pc.transcoders.save(pc.PerLayerTranscoders(rows, [torch.ones(3000)] * LAYERS, rows), folder)
    return pc.transcoders.load(folder)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1000)


def overwrite(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def replace(path: Path) -> None:
    save_file({name: 2 * t for name, t in load_file(path).items()}, path.with_name("other"))
    path.with_name("other").replace(path)


@pytest.mark.parametrize("change_file", [truncate, overwrite, replace])
def test_a_file_that_changes_in_use_is_an_error(tmp_path: Path, change_file: Callable[[Path], None]) -> None:
    """The error comes before pages are touched: those that a mapped file has lost end the process."""
    got, x = load_large_set(tmp_path / "set"), torch.ones(2, WIDTH)
    features = got.encode(1, x)
    pc.ops.decode(features, got.w_dec[1])
    change_file(tmp_path / "set" / "layer_1.safetensors")
    with pytest.raises(ValueError, match=r"layer_1\.safetensors must not change while in use, got .*; load it again"):
        got.encode(1, x)
    again = pc.SparseFeatures(features.row_ptr, features.index.clone(), features.value)
    with pytest.raises(ValueError, match=r"layer_1\.safetensors must not change while in use"):
        pc.ops.decode(again, got.w_dec[1])
    assert got.encode(0, x).count > 0


def test_a_file_that_is_gone_is_still_mapped_but_has_no_rows(tmp_path: Path) -> None:
    got = load_large_set(tmp_path / "set")
    (tmp_path / "set" / "layer_1.safetensors").unlink()
    features = got.encode(1, torch.ones(2, WIDTH))
    assert features.count > 0
    with pytest.raises(FileNotFoundError, match=r"load: .*layer_1\.safetensors must stay readable while in use"):
        pc.ops.decode(features, got.w_dec[1])


def test_a_file_that_changes_between_its_header_and_its_numbers(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    path = tmp_path / "set" / "layer_0.safetensors"
    tensors = open_safetensors(path)
    edit(path, W_enc=torch.zeros(SIZE, WIDTH))
    os.utime(path, ns=(1, 1))
    for read in (
        StoredTensor.read,
        StoredTensor.mapped,
        lambda t: t.entry(3).read(),
        lambda t: list(t.chunks()),
    ):
        with pytest.raises(ValueError, match=r"layer_0\.safetensors must not change while in use"):
            read(tensors["W_enc"])


def linked_nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("blob"))


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (linked_nowhere, r"must be there and readable, got No such file or directory \(a link to nowhere\)"),
        (os.mkfifo, "must be a file, got a device or a pipe"),
    ],
)
@pytest.mark.parametrize("name", ["circuit_tracer", "gemma_scope_2", "gemma_scope", "saelens"])
def test_dangling_links_and_pipes_are_refused(
    tmp_path: Path, name: str, put: Callable[[Path], None], message: str
) -> None:
    """A pipe would be waited for, for ever."""
    write(name, tmp_path / "set")
    path = sorted(p for p in (tmp_path / "set").rglob("*") if p.suffix in (".safetensors", ".npz"))[1]
    path.unlink()
    put(path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        pc.transcoders.load(tmp_path / "set")
    assert str(caught.value).startswith(f"load: {path}")


@pytest.mark.parametrize("name", ["circuit_tracer", "gemma_scope", "gemma_scope_2"])
def test_a_repository_that_was_cloned_without_its_large_files(tmp_path: Path, name: str) -> None:
    write(name, tmp_path / "set")
    for path in (p for p in (tmp_path / "set").rglob("*") if p.suffix in (".safetensors", ".npz")):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1000\n")
    with pytest.raises(ValueError, match=r"load: .* must be the file itself, got git-lfs's pointer to it; run git lfs"):
        pc.transcoders.load(tmp_path / "set")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    (tmp_path / "set" / "layer_1.safetensors").unlink()
    (tmp_path / "set" / "layer_1.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"load: .*layer_1\.safetensors must be a file, got a folder"):
        pc.transcoders.load(tmp_path / "set")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("gemma_scope_2", tmp_path / "set")
    opened, walked = Path.open, os.scandir
    path = sorted((tmp_path / "set").rglob("*.safetensors"))[1]

    def refuses(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    def hides(where: Any) -> Any:
        if Path(where) == path.parent:
            raise PermissionError(13, "Permission denied", str(where))
        return walked(where)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuses)
        with pytest.raises(PermissionError, match=rf"load: {path} must be there and readable, got Permission"):
            pc.transcoders.load(tmp_path / "set")
    monkeypatch.setattr(os, "scandir", hides)
    with pytest.raises(PermissionError, match=rf"load: {path.parent} must be there and readable, got Perm"):
        pc.transcoders.load(tmp_path / "set")


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("circuit_tracer", tmp_path / "set")
    config, states = tmp_path / "set" / "config.yaml", Path.stat

    def refuses(self: Path, **kwargs: Any) -> os.stat_result:
        if self == config:
            raise PermissionError(13, "Permission denied", str(self))
        return states(self, **kwargs)

    monkeypatch.setattr(Path, "stat", refuses)
    monkeypatch.setattr(Path, "is_file", lambda self: bool(self.stat()))
    with pytest.raises(PermissionError, match=rf"^load: {config} must be there and readable, got Permission denied"):
        pc.transcoders.load(tmp_path / "set")


def test_folders_that_are_links(tmp_path: Path) -> None:
    """Links out of the folder are followed; those into it would lead to the same files again."""
    expected = write("gemma_scope_2", tmp_path / "set")
    inner = tmp_path / "set" / "transcoder_all"
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(".")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"variant must leave one file for layer 0"):
        pc.transcoders.load(tmp_path / "set")
    (tmp_path / "elsewhere" / "round").unlink()
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)


MIXED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "writes_elsewhere": (
        "saelens",
        lambda f: change_json(f, "cfg.json", 0, lambda c: c["metadata"].update(hook_name_out="blocks.0.hook_mlp_out")),
        r"metadata\.hook_name_out must be of layer 2, got 'blocks\.0\.hook_mlp_out'; are files mixed up",
    ),
    "scopium_writes_elsewhere": (
        "llamascopium",
        lambda f: change_json(f, "config.json", 1, lambda c: c.update(hook_point_out="blocks.2.hook_mlp_out")),
        "hook_point_out must be of layer 1",
    ),
    "scopium_configs": (
        "llamascopium", lambda f: swap(f, "config.json"), "hook_point_in must be of layer 0 as its folder"
    ),
    "scopium_order": (
        "llamascopium_cross",
        lambda f: change_json(f, "config.json", 0, lambda c: c["hook_points_in"].reverse()),
        "hook_points_in must be of layer 0, got 'blocks.2",
    ),
    "scope_configs": ("gemma_scope_2", lambda f: swap(f, "config.json"), "hf_hook_point_in must be of layer 0"),
    "threshold": (
        "circuit_tracer",
        lambda f: edit(f / "layer_1.safetensors", **{"activation_function.threshold": None}),
        "layer 1 must hold what others do, got nothing like .*activation_function.threshold",
    ),
    "skip": ("circuit_tracer", lambda f: edit(f / "layer_2.safetensors", W_skip=None), "layer 2 must hold what others"),
    "cross_threshold": (
        "circuit_tracer_cross", lambda f: edit(f / "W_enc_1.safetensors", threshold_1=None), "layer 1 must hold what"
    ),
    "listed_threshold": (
        "listed",
        lambda f: edit(f / "files" / "1.safetensors", **{"activation_function.threshold": None}),
        "layer 1 must hold what others do",
    ),
    "affine": (
        "gemma_scope_2_cross_affine",
        lambda f: edit(next(f.rglob("params_layer_1.*")), affine_skip_connection=None),
        "layer 1 must hold what others do",
    ),
    "says_jump": (
        "circuit_tracer_relu",
        lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text() + "activation: JumpReLU\n"),
        "layer_0.safetensors must hold thresholds exactly if .* says so, got a jumprelu and none",
    ),
    "no_config": ("saelens", lambda f: (f / "any-name-1" / "cfg.json").unlink(), "must have cfg.json beside"),
    "no_config_sparsify": (
        "sparsify", lambda f: (f / "layers.2.mlp" / "cfg.json").unlink(), "must have cfg.json beside it"
    ),
    "no_config_scopium": (
        "llamascopium", lambda f: sorted(f.rglob("config.json"))[2].unlink(), "must have config.json beside it"
    ),
    "unknown_kind": (
        "llamascopium",
        lambda f: change_json(f, "config.json", 2, lambda c: c.update(sae_type="sea")),
        "sae_type must be one of sae, clt, transcoder, crosscoder, lorsa, molt, got 'sea'",
    ),
    "no_flag": (
        "llamascopium",
        lambda f: change_json(f, "config.json", 0, lambda c: c.update(sparsity_include_decoder_norm="no")),
        "sparsity_include_decoder_norm must be true or false, got 'no'",
    ),
    "no_arguments": (
        "crosslayer_topk",
        lambda f: rewrite(f / "config.yaml", '"init_args": {"k": 5}', '"init_args": 5'),
        "nonlinearity.init_args must be names and values, got 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_files_of_other_layers_are_refused(tmp_path: Path, case: str) -> None:
    name, change, message = MIXED[case]
    write(name, tmp_path / "set")
    change(tmp_path / "set")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        pc.transcoders.load(tmp_path / "set", **ROWS[name].overrides)
    assert str(caught.value).startswith("load: ")


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_saved_sets_must_match_their_configuration(tmp_path: Path, cross: bool) -> None:
    name, theta = ("W_enc_1", "threshold_1") if cross else ("layer_1", "activation_function.threshold")
    pc.transcoders.save(random_set(cross), tmp_path / "set")
    edit(tmp_path / "set" / f"{name}.safetensors", **{theta: None})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors must hold thresholds exactly if .*yaml says so"):
        pc.transcoders.load(tmp_path / "set")
    pc.transcoders.save(random_set(cross, "relu"), tmp_path / "plain")
    edit(tmp_path / "plain" / f"{name}.safetensors", **{theta: torch.ones(SIZE)})
    with pytest.raises(ValueError, match=r"must hold thresholds exactly if .*, got another activation and"):
        pc.transcoders.load(tmp_path / "plain")
    pc.transcoders.save(random_set(cross, hole=1), tmp_path / "hole")
    rewrite(tmp_path / "hole" / "config.yaml", f"- {SIZE}", f"- {SIZE + 1}")
    with pytest.raises(ValueError, match=rf"must say how many features layer 0 has, {SIZE}, got {SIZE + 1}"):
        pc.transcoders.load(tmp_path / "hole")


def test_activation_names_in_any_case(tmp_path: Path) -> None:
    for n, (name, more) in enumerate((("TopK", "k: 5\n"), ("ReLU", ""), ("Top_K", "k: 5\n"))):
        write("circuit_tracer_relu", tmp_path / f"{n}")
        config = tmp_path / f"{n}" / "config.yaml"
        config.write_text(config.read_text() + f"activation: {name}\n{more}")
        rule = pc.transcoders.load(tmp_path / f"{n}").activation[0]
        assert rule == (pc.TopK(5, keep_negative=True) if more else pc.ReLU())


def test_a_tensor_that_no_index_names(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    path = tmp_path / "set" / "layer_1.safetensors"
    where = dict.fromkeys(load_file(path), "part.safetensors")
    path.rename(tmp_path / "set" / "part.safetensors")
    index = path.with_name(path.name + ".index.json")
    index.write_text(json.dumps({"weight_map": where}))
    assert pc.transcoders.load(tmp_path / "set").depth == LAYERS
    del where["activation_function.threshold"]
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=r"must name every tensor of part\.safetensors, got none of activation_"):
        pc.transcoders.load(tmp_path / "set")
