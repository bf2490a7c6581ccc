"""What strangers do to files: change them in use, mix them up, fill the disk, start twice, kill and start again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import disk_full
from format_files import LAYERS, ROWS, SIZE, WIDTH, crosslayer, llamascopium, llamascopium_cross, made, write
from safetensors.torch import load_file, save_file
from test_formats import archive, array, dense, edit, rewrite, same, same_activity

import pycircuit as pc
from pycircuit.transcoders import formats, resident_pages
from pycircuit.transcoders.formats import cache, cached_encoder, files, npz, writing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- files that change while they are in use


def large(folder: Path) -> Any:
    """Encoders of many pages each, loaded."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(3000, WIDTH, generator=g) for _ in range(LAYERS)]
    formats.save(pc.PerLayerTranscoders(rows, [torch.ones(3000)] * LAYERS, rows), folder)
    return formats.load(folder)


def shrinks(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1000)


def is_written_over(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + bytes(8))


def is_replaced(path: Path) -> None:
    save_file({name: 2 * t for name, t in load_file(path).items()}, path.with_name("other"))
    path.with_name("other").replace(path)


@pytest.mark.parametrize("happens", [shrinks, is_written_over, is_replaced])
def test_a_file_that_changes_in_use_is_an_error(tmp_path: Path, happens: Callable[[Path], None]) -> None:
    """Before its pages are touched: those that a mapped file has lost end the process."""
    got, x = large(tmp_path / "set"), torch.ones(2, WIDTH)
    found = got.encode(1, x)
    pc.ops.decode(found, got.w_dec[1])
    happens(tmp_path / "set" / "layer_1.safetensors")
    with pytest.raises(ValueError, match=r"layer_1\.safetensors must not change while in use, got .*; load it again"):
        got.encode(1, x)
    again = pc.SparseFeatures(found.row_ptr, found.index.clone(), found.value)
    with pytest.raises(ValueError, match=r"layer_1\.safetensors must not change while in use"):
        pc.ops.decode(again, got.w_dec[1])
    assert got.encode(0, x).count > 0


def test_a_file_that_is_gone_is_still_mapped_but_has_no_rows(tmp_path: Path) -> None:
    got = large(tmp_path / "set")
    (tmp_path / "set" / "layer_1.safetensors").unlink()
    found = got.encode(1, torch.ones(2, WIDTH))
    assert found.count > 0
    with pytest.raises(FileNotFoundError, match=r"load: .*layer_1\.safetensors must stay readable while in use"):
        pc.ops.decode(found, got.w_dec[1])


def test_a_file_that_changes_between_its_header_and_its_numbers(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    path = tmp_path / "set" / "layer_0.safetensors"
    held = files.open_safetensors(path)
    edit(path, W_enc=torch.zeros(SIZE, WIDTH))
    os.utime(path, ns=(1, 1))
    for read in (files.Stored.read, files.Stored.mapped, lambda t: t.entry(3).read(), lambda t: list(t.chunks())):
        with pytest.raises(ValueError, match=r"layer_0\.safetensors must not change while in use"):
            read(held["W_enc"])


def test_rows_that_were_kept_leave_nothing_behind(tmp_path: Path) -> None:
    formats.save(made(False), tmp_path / "set")
    rows = formats.load(tmp_path / "set").w_dec[0]
    before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for n in range(20):
        pc.ops.decode(pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([n]), torch.ones(1)), rows)
    assert len(weakref.finalize._registry) == before  # type: ignore[attr-defined]
    kept, index = rows.cache, torch.tensor([3])
    rows.gather(pc.SparseFeatures(torch.tensor([0, 1]), index, torch.ones(1)))
    assert kept.held > 0
    del rows
    assert kept.held == 0


# --- what stands where a file should


def linked_nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("blob"))


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (linked_nowhere, r"must be there and readable, got No such file or directory \(a link to nowhere\)"),
        (os.mkfifo, "must be a file, got a device or a pipe"),
    ],
)
@pytest.mark.parametrize("name", ["circuit_tracer", "gemma_scope_2", "gemma_scope", "saelens"])
def test_what_is_no_file(tmp_path: Path, name: str, put: Callable[[Path], None], said: str) -> None:
    """A pipe would be waited for, for ever."""
    write(name, tmp_path / "set")
    path = sorted(p for p in (tmp_path / "set").rglob("*") if p.suffix in (".safetensors", ".npz"))[1]
    path.unlink()
    put(path)
    with pytest.raises((ValueError, OSError), match=said) as caught:
        formats.load(tmp_path / "set")
    assert str(caught.value).startswith(f"load: {path}")


@pytest.mark.parametrize("name", ["circuit_tracer", "gemma_scope", "gemma_scope_2"])
def test_a_repository_that_was_cloned_without_its_large_files(tmp_path: Path, name: str) -> None:
    write(name, tmp_path / "set")
    for path in (p for p in (tmp_path / "set").rglob("*") if p.suffix in (".safetensors", ".npz")):
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1000\n")
    with pytest.raises(ValueError, match=r"load: .* must be the file itself, got git-lfs's pointer to it; run git lfs"):
        formats.load(tmp_path / "set")


def test_a_folder_for_a_file(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    (tmp_path / "set" / "layer_1.safetensors").unlink()
    (tmp_path / "set" / "layer_1.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"load: .*layer_1\.safetensors must be a file, got a folder"):
        formats.load(tmp_path / "set")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("gemma_scope_2", tmp_path / "set")
    opened, walked = Path.open, os.scandir
    path = sorted((tmp_path / "set").rglob("*.safetensors"))[1]

    def refuses(self: Path, *args: Any, **how: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **how)

    def hides(where: Any) -> Any:
        if Path(where) == path.parent:
            raise PermissionError(13, "Permission denied", str(where))
        return walked(where)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuses)
        with pytest.raises(PermissionError, match=rf"load: {path} must be there and readable, got Permission"):
            formats.load(tmp_path / "set")
    monkeypatch.setattr(os, "scandir", hides)
    with pytest.raises(PermissionError, match=rf"load: {path.parent} must be there and readable, got Perm"):
        formats.load(tmp_path / "set")


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("circuit_tracer", tmp_path / "set")
    config, states = tmp_path / "set" / "config.yaml", Path.stat

    def refuses(self: Path, **how: Any) -> os.stat_result:
        if self == config:
            raise PermissionError(13, "Permission denied", str(self))
        return states(self, **how)

    monkeypatch.setattr(Path, "stat", refuses)
    monkeypatch.setattr(Path, "is_file", lambda self: bool(self.stat()))
    with pytest.raises(PermissionError, match=rf"^load: {config} must be there and readable, got Permission denied"):
        formats.load(tmp_path / "set")


def test_folders_that_are_links(tmp_path: Path) -> None:
    """Out of the folder they are followed; into it they would be the same files again."""
    expected = write("gemma_scope_2", tmp_path / "set")
    inner = tmp_path / "set" / "transcoder_all"
    inner.rename(tmp_path / "elsewhere")
    inner.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(".")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"variant must leave one file for layer 0"):
        formats.load(tmp_path / "set")
    (tmp_path / "elsewhere" / "round").unlink()
    same(formats.load(tmp_path / "set"), expected)


# --- layers, tensors and configurations of one another's


def said(folder: Path, name: str, at: int, change: Callable[[dict[str, Any]], Any]) -> None:
    path = sorted(folder.rglob(name))[at]
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def swap(folder: Path, name: str) -> None:
    a, b = sorted(folder.rglob(name))[:2]
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


MIXED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "writes_elsewhere": (
        "saelens",
        lambda f: said(f, "cfg.json", 0, lambda c: c["metadata"].update(hook_name_out="blocks.0.hook_mlp_out")),
        r"metadata\.hook_name_out must be of layer 2, got 'blocks\.0\.hook_mlp_out'; are files mixed up",
    ),
    "scopium_writes_elsewhere": (
        "llamascopium",
        lambda f: said(f, "config.json", 1, lambda c: c.update(hook_point_out="blocks.2.hook_mlp_out")),
        "hook_point_out must be of layer 1",
    ),
    "scopium_configs": (
        "llamascopium", lambda f: swap(f, "config.json"), "hook_point_in must be of layer 0 as its folder"
    ),
    "scopium_order": (
        "llamascopium_cross",
        lambda f: said(f, "config.json", 0, lambda c: c["hook_points_in"].reverse()),
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
        lambda f: said(f, "config.json", 2, lambda c: c.update(sae_type="sea")),
        "sae_type must be one of sae, clt, transcoder, crosscoder, lorsa, molt, got 'sea'",
    ),
    "no_flag": (
        "llamascopium",
        lambda f: said(f, "config.json", 0, lambda c: c.update(sparsity_include_decoder_norm="no")),
        "sparsity_include_decoder_norm must be true or false, got 'no'",
    ),
    "no_arguments": (
        "crosslayer_topk",
        lambda f: rewrite(f / "config.yaml", '"init_args": {"k": 5}', '"init_args": 5'),
        "nonlinearity.init_args must be names and values, got 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_files_that_were_mixed_up(tmp_path: Path, case: str) -> None:
    name, change, message = MIXED[case]
    write(name, tmp_path / "set")
    change(tmp_path / "set")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        formats.load(tmp_path / "set", **ROWS[name].told)
    assert str(caught.value).startswith("load: ")


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_what_we_saved_must_hold_what_it_says(tmp_path: Path, cross: bool) -> None:
    name, theta = ("W_enc_1", "threshold_1") if cross else ("layer_1", "activation_function.threshold")
    formats.save(made(cross), tmp_path / "set")
    edit(tmp_path / "set" / f"{name}.safetensors", **{theta: None})
    with pytest.raises(ValueError, match=rf"{name}\.safetensors must hold thresholds exactly if .*yaml says so"):
        formats.load(tmp_path / "set")
    formats.save(made(cross, "relu"), tmp_path / "plain")
    edit(tmp_path / "plain" / f"{name}.safetensors", **{theta: torch.ones(SIZE)})
    with pytest.raises(ValueError, match=r"must hold thresholds exactly if .*, got another activation and"):
        formats.load(tmp_path / "plain")
    formats.save(made(cross, hole=1), tmp_path / "hole")
    rewrite(tmp_path / "hole" / "config.yaml", f"- {SIZE}", f"- {SIZE + 1}")
    with pytest.raises(ValueError, match=rf"must say how many features layer 0 has, {SIZE}, got {SIZE + 1}"):
        formats.load(tmp_path / "hole")


def test_names_of_activations_in_other_letters(tmp_path: Path) -> None:
    for n, (name, more) in enumerate((("TopK", "k: 5\n"), ("ReLU", ""), ("Top_K", "k: 5\n"))):
        write("circuit_tracer_relu", tmp_path / f"{n}")
        config = tmp_path / f"{n}" / "config.yaml"
        config.write_text(config.read_text() + f"activation: {name}\n{more}")
        rule = formats.load(tmp_path / f"{n}").activation[0]
        assert rule == (pc.TopK(5, keep_negative=True) if more else pc.ReLU())


@pytest.mark.parametrize("name", ["crosslayer", "llamascopium_cross"])
def test_layers_of_a_set_that_knows_them(tmp_path: Path, name: str) -> None:
    expected, told = write(name, tmp_path / "set"), ROWS[name].told
    same(formats.load(tmp_path / "set", layers=LAYERS, **told), expected)
    for layers in (LAYERS - 1, LAYERS + 4):
        with pytest.raises(ValueError, match=rf"layers must be the number that the files are for, got {layers}, an"):
            formats.load(tmp_path / "set", layers=layers, **told)
    with pytest.raises(ValueError, match=r"layers must be a whole number of at least 1 and at most 10000, got 1000"):
        formats.load(tmp_path / "set", layers=10**9, **told)


def test_a_part_that_no_index_names(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    path = tmp_path / "set" / "layer_1.safetensors"
    where = dict.fromkeys(load_file(path), "part.safetensors")
    path.rename(tmp_path / "set" / "part.safetensors")
    index = path.with_name(path.name + ".index.json")
    index.write_text(json.dumps({"weight_map": where}))
    assert formats.load(tmp_path / "set").depth == LAYERS
    del where["activation_function.threshold"]
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=r"must name every tensor of part\.safetensors, got none of activation_"):
        formats.load(tmp_path / "set")


# --- which of several sets


def test_a_set_beside_its_affine_twin(tmp_path: Path) -> None:
    """As the published folder is: names that begin alike."""
    plain, affine = made(False, skip=False), made(False)
    for t in (plain, affine):
        ROWS["gemma_scope_2"].write(tmp_path, t)
    with pytest.raises(ValueError, match=r"variant must leave one file for layer 0 .*'16k, small, not affine'"):
        formats.load(tmp_path, variant="16k,l0_small")
    assert formats.load(tmp_path, variant="16k, l0_small, not affine").w_skip == [None] * LAYERS
    assert torch.equal(formats.load(tmp_path, variant="affine").w_skip[1], affine.w_skip[1])
    for nothing in ("", "16", "not small", "w_16k"):
        with pytest.raises(ValueError, match=r"variant must leave some of"):
            formats.load(tmp_path, variant=nothing)
    with pytest.raises(TypeError, match=r"load: variant must be parts of a path, with commas, got \['16k'\]"):
        formats.load(tmp_path, variant=["16k"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["saelens", "llamascopium"])
def test_variants_are_said_in_one_way(tmp_path: Path, name: str) -> None:
    expected = write(name, tmp_path / "w8" / "k5")
    shutil.copytree(tmp_path / "w8", tmp_path / "w18")
    same(formats.load(tmp_path, variant="w8, k5"), expected)
    same(formats.load(tmp_path, variant="w8/k5"), expected)
    same(formats.load(tmp_path, variant="not w18"), expected)
    with pytest.raises(ValueError, match="variant must leave one file for layer"):
        formats.load(tmp_path, variant="k5")


# --- configurations


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("x: [" + "a, " * 60_000 + "]", "must be a configuration of at most 131072 bytes"),
        ("transcoders: {0: layer_0.safetensors, 00: layer_1.safetensors}", "a name twice, in two ways of writing it"),
        ("<<: {model_kind: cross_layer_transcoder}", "a name twice, in two ways"),
        (f"transcoders: [{'a' * 4000}, layer_0.safetensors]", r"config\.yaml names a{200}, which must be in"),
        (
            "pycircuit: {layers: 3, features: [24, 24, 24], activation: {activation: batchtopk, threshold: "
            + "9" * 400 + "}}",
            "threshold must be a finite number",
        ),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(tmp_path: Path, more: str, message: str) -> None:
    write("circuit_tracer", tmp_path / "set")
    config = tmp_path / "set" / "config.yaml"
    config.write_text(config.read_text() + more + "\n")
    with pytest.raises((ValueError, OSError), match=message) as caught:
        formats.load(tmp_path / "set")
    assert str(caught.value).startswith("load: ") and len(str(caught.value)) < 1000


def test_configurations_that_windows_wrote(tmp_path: Path) -> None:
    for name, end in (("circuit_tracer", "*.yaml"), ("saelens", "cfg.json"), ("gemma_scope_2", "config.json")):
        expected = write(name, tmp_path / name)
        for path in (tmp_path / name).rglob(end):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        same(formats.load(tmp_path / name), expected)


@pytest.mark.parametrize(("size", "width", "message"), [(0, WIDTH, "at least one feature"), (SIZE, 0, "a width of at")])
def test_sets_of_nothing(tmp_path: Path, size: int, width: int, message: str) -> None:
    write("circuit_tracer_relu", tmp_path / "set")
    none = {"W_enc": torch.zeros(size, width), "W_dec": torch.zeros(size, width), "b_enc": torch.zeros(size)}
    for at in range(LAYERS):
        skip = torch.zeros(width, width)
        edit(tmp_path / "set" / f"layer_{at}.safetensors", **none, b_dec=torch.zeros(width), W_skip=skip)
    with pytest.raises(ValueError, match=rf"load: .*layer_0\.safetensors: W_enc must have {message}"):
        formats.load(tmp_path / "set")


def test_arguments_that_are_none_of_theirs(tmp_path: Path) -> None:
    for path in (None, b"set", 3):
        with pytest.raises(TypeError, match="load: path must be a folder or a hub id"):
            formats.load(path)  # type: ignore[arg-type]
    write("circuit_tracer", tmp_path / "set")
    for how, message in (
        ({"dtype": "bfloat16"}, "load: dtype must be float64, float32, bfloat16 or float16 of torch, got 'bfloat16'"),
        ({"dtype": torch.float8_e4m3fn}, "load: dtype must be .* got torch.float8_e4m3fn"),
        ({"device": "nowhere"}, "load: device must be such as 'cpu' or 'cuda:0', got 'nowhere'"),
        ({"cache": "9" * 400}, "load: cache must be bytes or a size such as '4GiB'"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.load(tmp_path / "set", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bits_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    edit(tmp_path / "set" / "layer_1.safetensors", W_enc=expected.w_enc[1].to(kind))
    with pytest.raises(TypeError, match=r"load: .*layer_1\.safetensors: W_enc must be one of F64, .*, got F8_E"):
        formats.load(tmp_path / "set")


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "activation_function.threshold", "W_skip"])
def test_a_type_that_is_too_small_for_a_number(tmp_path: Path, name: str) -> None:
    """It would become infinite, and quietly."""
    write("circuit_tracer", tmp_path / "set")
    path = tmp_path / "set" / "layer_1.safetensors"
    weights = load_file(path)[name]
    weights.view(-1)[-1] = -1e6 if name != "activation_function.threshold" else 1e6
    edit(path, **{name: weights})
    message = rf"layer_1\.safetensors: {name} must hold numbers of torch\.float16, whose largest is 65504, got -?1e\+06"
    with pytest.raises(ValueError, match=message):
        formats.load(tmp_path / "set", dtype=torch.float16, lazy=False)
    assert formats.load(tmp_path / "set", dtype=torch.bfloat16, lazy=False).depth == LAYERS
    if name == "W_dec":
        rows = formats.load(tmp_path / "set", dtype=torch.float16).w_dec[1]
        assert rows[torch.tensor([0])].dtype == torch.float16
        with pytest.raises(ValueError, match=message):
            pc.ops.decode(pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([SIZE - 1]), torch.ones(1)), rows)


# --- archives


def test_members_that_are_a_bomb_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setattr(npz, "_SMALL", 1 << 20)
    (tmp_path / "set" / "layer_0").mkdir(parents=True)
    members = [(f"a{n}.npy", array(2**17) + bytes(2**19)) for n in range(8)]
    archive(tmp_path / "set" / "layer_0" / "params.npz", *members)
    with pytest.raises(ValueError, match=r"params\.npz must unpack to at most 64 times its size, got .*is it a bomb"):
        formats.load(tmp_path / "set")
    assert not own_cache.exists()


@pytest.mark.parametrize("how", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_archives_packed_as_numpy_never_does(tmp_path: Path, how: int) -> None:
    (tmp_path / "layer_0").mkdir()
    archive(tmp_path / "layer_0" / "params.npz", ("W_enc.npy", array(2) + bytes(8)), how=how)
    with pytest.raises(ValueError, match=rf"W_enc must be stored or deflated, got zip's method {how}"):
        formats.load(tmp_path)


# --- the cache folder


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    calls, does = [], getattr(module, name)

    def counts(*args: Any) -> Any:
        calls.append(name)
        return does(*args)

    monkeypatch.setattr(module, name, counts)
    return calls


def test_what_is_made_once_is_made_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Of threads that all want it, as of processes."""
    monkeypatch.setattr(cached_encoder, "LEAST", 1)
    expected = write("gemma_scope_compressed", tmp_path / "set")
    made_by = [counted(monkeypatch, npz, "_unpack"), counted(monkeypatch, cached_encoder, "_write")]
    start = threading.Barrier(6)

    def loads(_: int) -> Any:
        start.wait()
        return formats.load(tmp_path / "set")

    with ThreadPoolExecutor(6) as pool:
        for got in pool.map(loads, range(6)):
            same(got, expected)
    assert [len(calls) for calls in made_by] == [LAYERS, LAYERS]
    assert all(p.suffix == ".safetensors" and not p.name.startswith(".") for p in own_cache.rglob("*.*"))


def test_many_wait_for_one(tmp_path: Path, own_cache: Path) -> None:
    """A file that is finished is moved away from under those who wait for it, at any time."""
    source, done = tmp_path / "source", []
    source.write_text("x")

    def writes(fresh: Path) -> None:
        done.append(fresh)
        fresh.write_text("made")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for turn in range(60):
            start = threading.Barrier(8)

            def makes(_: int, turn: int = turn, start: threading.Barrier = start) -> Path:
                start.wait()
                return cache.made_once("kind", [source], str(turn), 1, writes)

            with ThreadPoolExecutor(8) as pool:
                assert len(set(pool.map(makes, range(8)))) == 1
    finally:
        sys.setswitchinterval(before)
    assert len(done) == 60


def test_half_of_a_file_in_the_cache_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Of a process that was killed; one that is at it is waited for."""
    expected = write("gemma_scope_compressed", tmp_path / "set")
    same(formats.load(tmp_path / "set"), expected)
    kept = sorted((own_cache / "npz").iterdir())
    for path in kept:
        path.with_name(f".{path.name}.partial").write_bytes(path.read_bytes()[:100])
        path.unlink()
    same(formats.load(tmp_path / "set"), expected)
    assert sorted((own_cache / "npz").iterdir()) == kept


def test_an_archive_that_changes_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """What is kept of the old one must not be the new one's numbers."""
    write("gemma_scope_compressed", tmp_path / "set")
    unpack = npz._unpack

    def changes(path: Path, *args: Any) -> None:
        path.write_bytes(path.read_bytes() + bytes(2))
        unpack(path, *args)

    monkeypatch.setattr(npz, "_unpack", changes)
    with pytest.raises(ValueError, match=r"params\.npz must not change while in use"):
        formats.load(tmp_path / "set")
    assert not list(own_cache.rglob("*.*"))


@pytest.mark.parametrize("name", ["gemma_scope_compressed", "gemma_scope_2"])
def test_a_cache_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, name: str) -> None:
    monkeypatch.setattr(cached_encoder, "LEAST", 1)
    expected = write(name, tmp_path / "set")
    message = (
        r"load: .* must be converted once into a file of \d+ bytes in .*; set PYCIRCUIT_CACHE to a folder that can"
    )
    with disk_full(2000), pytest.raises(OSError, match=r"got File too large; set PYCIRCUIT_CACHE to a folder"):
        formats.load(tmp_path / "set")
    assert not list(own_cache.rglob("*.*"))
    with monkeypatch.context() as patched:
        patched.setattr(cache.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
        with pytest.raises(OSError, match=message):
            formats.load(tmp_path / "set")
    assert not list(own_cache.rglob("*.*"))
    same(formats.load(tmp_path / "set"), expected)


def test_a_cache_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("gemma_scope_compressed", tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"load: .*params\.npz must be converted once .*; set PYCIRCUIT_CACHE to"):
        formats.load(tmp_path / "set")
    monkeypatch.delenv("PYCIRCUIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match=r"load: a folder must be known .*, got no home; set PYCIRCUIT_CACHE"):
        formats.load(tmp_path / "set")


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_folded_encoders_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, cross: bool, kind: str
) -> None:
    """By a dataset's norm and by the decoder's: the same numbers as in memory, from pages of a file; norms are read
    off the decoders once."""
    monkeypatch.setattr(cached_encoder, "LEAST", 1)
    monkeypatch.setattr(cached_encoder, "_STEP", 7 * WIDTH * 4)
    t = made(cross, kind, skip=False, reads="resid_mid" if cross else "mlp_normed")
    (tmp_path / "set").mkdir()
    inner, outer = torch.tensor([3.0, 5.0, 2.0]), torch.tensor([7.0, 0.5, 4.0])
    how = {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    if cross:
        llamascopium_cross(tmp_path / "set", t, norms=torch.stack([inner, outer]), **how)
    else:
        llamascopium(tmp_path / "set", t, norms=[inner[0], outer[0]], **how)
    expected, norms = formats.load(tmp_path / "set", lazy=False), counted(monkeypatch, cached_encoder, "_norms")
    assert not own_cache.exists()
    for _ in range(2):
        got = formats.load(tmp_path / "set")
        same(got, expected)
        same_activity(got, expected)
        assert all(isinstance(rule, type(expected.activation[0])) for rule in got.activation)
        assert len(norms) == len(list((own_cache / "norms").iterdir())) == LAYERS
        assert len(list((own_cache / "encoders").iterdir())) == LAYERS
        assert all(w in resident_pages._HELD for w in got.w_enc)
    wide = formats.load(tmp_path / "set", lazy=False, dtype=torch.float64)
    same(formats.load(tmp_path / "set", dtype=torch.float64), wide)
    path = next((tmp_path / "set").rglob("*.safetensors"))
    names = [name for name in load_file(path) if name.startswith("W_D")]
    edit(path, **{name: 2 * load_file(path)[name] for name in names})
    os.utime(path, ns=(1, 1))
    expected = formats.load(tmp_path / "set", lazy=False)
    same(formats.load(tmp_path / "set"), expected)
    same_activity(formats.load(tmp_path / "set"), expected)


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_standardized_encoders_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, cross: bool
) -> None:
    monkeypatch.setattr(cached_encoder, "LEAST", 1)
    monkeypatch.setattr(files, "_CHUNK", 5 * SIZE * 4)
    t, g = made(cross, skip=False, bias=cross), torch.Generator().manual_seed(4)
    standards = {
        f"{side}_standardizer.{name}": torch.rand((LAYERS, WIDTH), generator=g) + 0.5
        for side in ("input", "output")
        for name in ("mean", "std")
    }
    (tmp_path / "set").mkdir()
    crosslayer(tmp_path / "set", t, standards, "Dimensionwise")
    expected = formats.load(tmp_path / "set", lazy=False, reads="mlp_in", writes="mlp_out")
    for _ in range(2):
        got = formats.load(tmp_path / "set", reads="mlp_in", writes="mlp_out")
        same(got, expected)
        same_activity(got, expected)
        assert len(list((own_cache / "encoders").iterdir())) == LAYERS
        assert all(w in resident_pages._HELD for w in got.w_enc)


def test_what_reads_once_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """A conversion or an inspection would fill the cache with what nobody asks for again."""
    monkeypatch.setattr(cached_encoder, "LEAST", 1)
    write("gemma_scope_2", tmp_path / "set")
    assert formats.inspect(tmp_path / "set").warnings == []
    formats.convert(tmp_path / "set", tmp_path / "new")
    assert not own_cache.exists()


def test_a_decoder_whose_norm_is_no_number_is_refused(tmp_path: Path) -> None:
    """Its feature's threshold would be none either, and the feature never active."""
    write("llamascopium", tmp_path / "set")
    said(tmp_path / "set", "config.json", 1, lambda c: c.update(sparsity_include_decoder_norm=True))
    path = sorted((tmp_path / "set").rglob("*.safetensors"))[1]
    weights = load_file(path)["W_D"]
    weights[3, 4] = torch.nan
    edit(path, W_D=weights)
    with pytest.raises(ValueError, match=r"W_D must hold finite numbers, got others in row 3"):
        formats.load(tmp_path / "set")


# --- conversions


def test_two_conversions_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is told so, and takes nothing away from the first, whatever it was to write."""
    expected, wrote = write("circuit_tracer", tmp_path / "set"), writing.write_safetensors
    begun, go_on = threading.Event(), threading.Event()

    def waits(path: Path, tensors: Any) -> None:
        wrote(path, tensors)
        begun.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(writing, "write_safetensors", waits)
        first = pool.submit(formats.convert, tmp_path / "set", tmp_path / "new")
        assert begun.wait(60)
        try:
            for dtype in (torch.float64, None):
                with pytest.raises(BlockingIOError, match=r"convert: .*new must be written by one process at a time"):
                    formats.convert(tmp_path / "set", tmp_path / "new", dtype=dtype)
        finally:
            go_on.set()
        assert first.result() == tmp_path / "new"
    same(formats.load(tmp_path / "new"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]


KILLED = """
import os, sys
from pycircuit.transcoders import formats
from pycircuit.files import safetensors
write, written = safetensors._write_rows, []
def dies(file, t):
    write(file, t)
    written.append(t)
    if len(written) == 9:
        file.flush()
        os.kill(os.getpid(), 9)
safetensors._write_rows = dies
formats.convert(sys.argv[1], sys.argv[2])
"""


def killed(source: Path, target: Path) -> list[str]:
    """What is left of a conversion that was killed inside its second file."""
    code = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target)], check=False).returncode
    assert code == -signal.SIGKILL and not target.exists()
    return sorted(p.name for p in target.with_name(f".{target.name}.resume.draft").iterdir())


def test_a_conversion_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    left = killed(tmp_path / "set", tmp_path / "new")
    assert left[1:] == ["layer_0.safetensors", "resume.json"]
    assert re.fullmatch(r"\.layer_1\.safetensors\.\w+\.partial", left[0])
    calls = counted(monkeypatch, writing, "write_safetensors")
    formats.convert(tmp_path / "set", tmp_path / "new")
    assert len(calls) == LAYERS - 1 and not list((tmp_path / "new").glob(".*"))
    same(formats.load(tmp_path / "new"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]


DIES = """
import os, sys
from format_files import made
from pycircuit.transcoders import formats
os.fsync = lambda file: os.kill(os.getpid(), 9)
formats.save(made(False), sys.argv[1])
"""


def test_a_save_that_was_killed_leaves_nothing_for_good(tmp_path: Path) -> None:
    """The next one writes where it did, and takes its files away."""
    command = [sys.executable, "-c", DIES, str(tmp_path / "set")]
    code = subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode
    assert code == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    formats.save(made(False), tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"] and not list((tmp_path / "set").glob(".*"))


def test_a_conversion_begins_anew_where_files_are_read_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights under another configuration are other numbers."""
    write("llamascopium", tmp_path / "set")
    killed(tmp_path / "set", tmp_path / "new")
    for at in range(LAYERS):
        said(tmp_path / "set", "config.json", at, lambda c: c.update(sparsity_include_decoder_norm=True))
    calls = counted(monkeypatch, writing, "write_safetensors")
    formats.convert(tmp_path / "set", tmp_path / "new")
    assert len(calls) == LAYERS
    got, expected = formats.load(tmp_path / "new"), formats.load(tmp_path / "set")
    same(got, expected)
    for a, b in zip(got.activation, expected.activation, strict=True):
        assert torch.equal(a.theta, b.theta)


def test_a_conversion_without_room_says_so_and_goes_on(tmp_path: Path) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    message = r"convert: .*new must be possible to write, got File too large; the same call goes on where this one"
    with disk_full(4000), pytest.raises(OSError, match=message):
        formats.convert(tmp_path / "set", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.glob(".new*/*")] == ["resume.json"]
    formats.convert(tmp_path / "set", tmp_path / "new")
    same(formats.load(tmp_path / "new"), expected)
    with disk_full(4000), pytest.raises(OSError, match=r"save: .*other must be possible to write, got File too large$"):
        formats.save(expected, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]


def test_a_conversion_never_lands_on_a_link(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("link", "nowhere", "set"):
        with pytest.raises(FileExistsError, match="convert: path must be a new folder, got"):
            formats.convert(tmp_path / "set", tmp_path / name)
    formats.convert(tmp_path / "set", tmp_path / "empty")
    assert dense(formats.load(tmp_path / "link").w_dec[0]).shape == (SIZE, WIDTH)
