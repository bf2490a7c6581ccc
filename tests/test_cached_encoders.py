"""Files that are made once, in the cache folder: encoders, norms, unpacked archives."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from damage import change_json, count_calls, edit
from disks import disk_full
from format_files import ROWS, crosslayer, llamascopium_by_norms, write
from random_transcoders import LAYERS, SIZE, WIDTH, random_set
from safetensors.torch import load_file
from transcoder_checks import assert_same, assert_same_activity

import pycircuit as pc
from pycircuit.files import cache_folder
from pycircuit.files.memory_maps import mapped_bytes
from pycircuit.transcoders.formats import cached_encoder, npz, stored_tensors

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.mark.parametrize("name", ["gemma_scope", "gemma_scope_2", "saelens_skip", "llamascopium_cross", "crosslayer"])
def test_transposed_encoders_are_cached_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The cache's pages then serve; a file that changed is transposed anew."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 1)
    monkeypatch.setattr(cached_encoder, "_STEP", 7 * WIDTH * 4)
    expected, row = write(name, tmp_path / "set"), ROWS[name]
    for _ in range(2):
        got = pc.transcoders.load(tmp_path / "set", **row.overrides)
        assert_same(got, expected)
        assert_same_activity(got, expected)
        paths = sorted((tmp_path / "cache" / "encoders").iterdir())
        assert len(paths) == LAYERS and all(p.suffix == ".safetensors" for p in paths)
    assert_same(pc.transcoders.load(tmp_path / "set", lazy=False, **row.overrides), expected)
    assert_same(pc.transcoders.load(tmp_path / "set", dtype=torch.float64, **row.overrides), expected.to(torch.float64))
    assert sorted((tmp_path / "cache" / "encoders").iterdir()) == paths
    first = next(p for p in sorted((tmp_path / "set").rglob("*")) if p.suffix in (".npz", ".safetensors"))
    os.utime(first, ns=(1, 1))
    assert_same(pc.transcoders.load(tmp_path / "set", **row.overrides), expected)
    assert len(list((tmp_path / "cache" / "encoders").iterdir())) > LAYERS


def test_a_cached_encoder_that_is_not_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 1)
    write("gemma_scope_2", tmp_path / "set")
    path = next((tmp_path / "set").rglob("*.safetensors"))
    weights = load_file(path)["w_enc"]
    weights[3, 5] = torch.nan
    edit(path, w_enc=weights)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"params\.safetensors.*must hold finite numbers, got nan at \[5, 3\]"):
            pc.transcoders.load(tmp_path / "set")


def test_one_thread_makes_a_cached_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Threads that all want a file wait for the one that makes it, as processes do."""
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 1)
    expected = write("gemma_scope_compressed", tmp_path / "set")
    made_by = [count_calls(monkeypatch, npz, "_unpack"), count_calls(monkeypatch, cached_encoder, "_write")]
    start = threading.Barrier(6)

    def loads(_: int) -> Any:
        start.wait()
        return pc.transcoders.load(tmp_path / "set")

    with ThreadPoolExecutor(6) as pool:
        for got in pool.map(loads, range(6)):
            assert_same(got, expected)
    assert [len(calls) for calls in made_by] == [LAYERS, LAYERS]
    assert all(p.suffix == ".safetensors" and not p.name.startswith(".") for p in own_cache.rglob("*.*"))


def test_threads_wait_for_the_one_that_writes(tmp_path: Path, own_cache: Path) -> None:
    """The lock of a finished file is removed while others wait for it, at any time."""
    source, done = tmp_path / "source", []
    source.write_text("x")

    def writes(file: BinaryIO) -> None:
        done.append(file)
        file.write(b"made")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for turn in range(60):
            start = threading.Barrier(8)

            def makes(_: int, turn: int = turn, start: threading.Barrier = start) -> Path:
                start.wait()
                return cache_folder.cached_file("kind", [source], str(turn), 1, writes)

            with ThreadPoolExecutor(8) as pool:
                assert len(set(pool.map(makes, range(8)))) == 1
    finally:
        sys.setswitchinterval(before)
    assert len(done) == 60


def test_abandoned_drafts_in_the_cache_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """Drafts of a killed process are removed; a process that is alive is waited for."""
    expected = write("gemma_scope_compressed", tmp_path / "set")
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)
    paths = sorted((own_cache / "npz").iterdir())
    for path in paths:
        path.with_name(f".{path.name}.partial").write_bytes(path.read_bytes()[:100])
        path.unlink()
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)
    assert sorted((own_cache / "npz").iterdir()) == paths


def test_an_archive_that_changes_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """The cache's file of the old archive must not hold the new one's numbers."""
    write("gemma_scope_compressed", tmp_path / "set")
    unpack = npz._unpack

    def changes(path: Path, *args: Any) -> None:
        path.write_bytes(path.read_bytes() + bytes(2))
        unpack(path, *args)

    monkeypatch.setattr(npz, "_unpack", changes)
    with pytest.raises(ValueError, match=r"params\.npz must not change while in use"):
        pc.transcoders.load(tmp_path / "set")
    assert not list(own_cache.rglob("*.*"))


@pytest.mark.parametrize("name", ["gemma_scope_compressed", "gemma_scope_2"])
def test_a_cache_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, name: str) -> None:
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 1)
    expected = write(name, tmp_path / "set")
    message = (
        r"load: .* must be converted once into a file of \d+ bytes in .*; set PYCIRCUIT_CACHE to a folder that can"
    )
    with disk_full(2000), pytest.raises(OSError, match=r"got File too large; set PYCIRCUIT_CACHE to a folder"):
        pc.transcoders.load(tmp_path / "set")
    assert not list(own_cache.rglob("*.*"))
    with monkeypatch.context() as patched:
        patched.setattr(cache_folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))  # type: ignore[attr-defined]
        with pytest.raises(OSError, match=message):
            pc.transcoders.load(tmp_path / "set")
    assert not list(own_cache.rglob("*.*"))
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("gemma_scope_compressed", tmp_path / "set")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"load: .*params\.npz must be converted once .*; set PYCIRCUIT_CACHE to"):
        pc.transcoders.load(tmp_path / "set")
    monkeypatch.delenv("PYCIRCUIT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match=r"load: a folder must be known .*, got no home; set PYCIRCUIT_CACHE"):
        pc.transcoders.load(tmp_path / "set")


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_folded_encoders_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, cross: bool, kind: str
) -> None:
    """Encoders folded by a dataset's norm and the decoder's equal those in memory; norms are computed once."""
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 1)
    monkeypatch.setattr(cached_encoder, "_STEP", 7 * WIDTH * 4)
    llamascopium_by_norms(tmp_path / "set", cross, kind)
    expected, norms = (
        pc.transcoders.load(tmp_path / "set", lazy=False),
        count_calls(monkeypatch, cached_encoder, "_norms"),
    )
    assert not own_cache.exists()
    for _ in range(2):
        got = pc.transcoders.load(tmp_path / "set")
        assert_same(got, expected)
        assert_same_activity(got, expected)
        assert all(isinstance(rule, type(expected.activation[0])) for rule in got.activation)
        assert len(norms) == len(list((own_cache / "norms").iterdir())) == LAYERS
        assert len(list((own_cache / "encoders").iterdir())) == LAYERS
        assert all(mapped_bytes(w) for w in got.w_enc)
    wide = pc.transcoders.load(tmp_path / "set", lazy=False, dtype=torch.float64)
    assert_same(pc.transcoders.load(tmp_path / "set", dtype=torch.float64), wide)
    path = next((tmp_path / "set").rglob("*.safetensors"))
    names = [name for name in load_file(path) if name.startswith("W_D")]
    edit(path, **{name: 2 * load_file(path)[name] for name in names})
    os.utime(path, ns=(1, 1))
    expected = pc.transcoders.load(tmp_path / "set", lazy=False)
    assert_same(pc.transcoders.load(tmp_path / "set"), expected)
    assert_same_activity(pc.transcoders.load(tmp_path / "set"), expected)


@pytest.mark.parametrize("cross", [False, True], ids=["plt", "clt"])
def test_standardized_encoders_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path, cross: bool
) -> None:
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 1)
    monkeypatch.setattr(stored_tensors, "_CHUNK", 5 * SIZE * 4)
    t, g = random_set(cross, skip=False, bias=cross), torch.Generator().manual_seed(4)
    standardizers = {
        f"{side}_standardizer.{name}": torch.rand((LAYERS, WIDTH), generator=g) + 0.5
        for side in ("input", "output")
        for name in ("mean", "std")
    }
    (tmp_path / "set").mkdir()
    crosslayer(tmp_path / "set", t, standardizers, "Dimensionwise")
    expected = pc.transcoders.load(tmp_path / "set", lazy=False, reads="mlp_in", writes="mlp_out")
    for _ in range(2):
        got = pc.transcoders.load(tmp_path / "set", reads="mlp_in", writes="mlp_out")
        assert_same(got, expected)
        assert_same_activity(got, expected)
        assert len(list((own_cache / "encoders").iterdir())) == LAYERS
        assert all(mapped_bytes(w) for w in got.w_enc)


def test_conversions_and_reports_cache_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    """A conversion or an inspection would fill the cache with files that nobody reads again."""
    monkeypatch.setattr(cached_encoder, "LEAST_BYTES", 1)
    write("gemma_scope_2", tmp_path / "set")
    assert pc.transcoders.inspect(tmp_path / "set").warnings == []
    pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    assert not own_cache.exists()


def test_a_decoder_whose_norm_is_no_number_is_refused(tmp_path: Path) -> None:
    """Its feature's threshold would be none either, and the feature never active."""
    write("llamascopium", tmp_path / "set")
    change_json(tmp_path / "set", "config.json", 1, lambda c: c.update(sparsity_include_decoder_norm=True))
    path = sorted((tmp_path / "set").rglob("*.safetensors"))[1]
    weights = load_file(path)["W_D"]
    weights[3, 4] = torch.nan
    edit(path, W_D=weights)
    with pytest.raises(ValueError, match=r"W_D must hold finite numbers, got others in row 3"):
        pc.transcoders.load(tmp_path / "set")
