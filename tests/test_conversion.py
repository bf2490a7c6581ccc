"""Conversions and reports of every format; conversions that were stopped, killed or started twice."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import change_json, count_calls
from disks import disk_full
from format_files import ROWS, write
from random_transcoders import LAYERS, SIZE, WIDTH, random_set
from transcoder_checks import assert_same, assert_same_activity, dense

import pycircuit as pc
from pycircuit.files import atomic_folder
from pycircuit.transcoders.formats import saving

pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


@pytest.mark.parametrize("to", ["circuit-tracer", "saelens"])
@pytest.mark.parametrize("name", ROWS)
def test_converted_sets_equal_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, to: str) -> None:
    """Transcoders read from the new files equal those of the old ones."""
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    expected, row = write(name, tmp_path / "set"), ROWS[name]
    refused = row.holds["cross"] or isinstance(expected.activation[0], pc.TopK)
    if to == "saelens" and refused:
        with pytest.raises(ValueError, match="convert: to must be circuit-tracer or pycircuit for"):
            pc.transcoders.convert(tmp_path / "set", tmp_path / "new", to, **row.overrides)
        assert not (tmp_path / "new").exists()
        return
    assert pc.transcoders.convert(tmp_path / "set", tmp_path / "new", to, **row.overrides) == tmp_path / "new"
    overrides = {"writes": "mlp_raw"} if expected.writes == "mlp_raw" else {}
    got = pc.transcoders.load(tmp_path / "new", **overrides)
    assert_same(got, expected)
    assert_same_activity(got, expected)
    assert_same(got, pc.transcoders.load(tmp_path / "set", **row.overrides))


def test_conversion_goes_on_where_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    expected, wrote, names = write("gemma_scope_2_affine", tmp_path / "set"), atomic_folder.write_safetensors, []

    def stops(path: Path, tensors: Any) -> None:
        names.append(path.name)
        if len(names) == 3:
            raise OSError("disk full")
        wrote(path, tensors)

    monkeypatch.setattr(atomic_folder, "write_safetensors", stops)
    with pytest.raises(OSError, match="disk full"):
        pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"must hold one of|config\.yaml"):
        pc.transcoders.load(next(tmp_path.glob(".new*")))
    pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    assert names == ["layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors", "layer_2.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]
    assert len(list((tmp_path / "new").iterdir())) == LAYERS + 1
    assert_same(pc.transcoders.load(tmp_path / "new"), expected)


def test_conversion_starts_anew_for_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("circuit_tracer", tmp_path / "set")
    with monkeypatch.context() as broken, pytest.raises(AttributeError, match="encode"):
        broken.setattr(saving, "_config", lambda *args: None)
        pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    expected = random_set(False, "relu")
    for path in (tmp_path / "set").iterdir():
        path.unlink()
    ROWS["circuit_tracer_relu"].write(tmp_path / "set", expected)
    pc.transcoders.convert(tmp_path / "set", tmp_path / "new", dtype=torch.float64)
    assert_same(pc.transcoders.load(tmp_path / "new"), expected.to(torch.float64))


def test_converted_types_and_arguments(tmp_path: Path) -> None:
    expected = write("circuit_tracer_bf16", tmp_path / "set")
    pc.transcoders.convert(tmp_path / "set", tmp_path / "wide", "pycircuit", dtype=torch.float32)
    assert_same(pc.transcoders.load(tmp_path / "wide"), expected.to(torch.float32))
    with pytest.raises(ValueError, match=r"convert: to must be one of circuit-tracer, pycircuit, saelens, got 'pt'"):
        pc.transcoders.convert(tmp_path / "set", tmp_path / "other", "pt")
    with pytest.raises(FileExistsError, match=r"convert: path must be a new folder"):
        pc.transcoders.convert(tmp_path / "set", tmp_path / "wide")
    with pytest.raises(ValueError, match=r"convert: dtype must be float64"):
        pc.transcoders.convert(tmp_path / "set", tmp_path / "other", dtype=torch.int8)


def test_inspect_reports_and_warns(tmp_path: Path) -> None:
    t = random_set(False, hole=1)
    t.w_enc[0][3], t.b_enc[0][3] = t.w_enc[0][7], t.b_enc[0][7]
    t.w_dec[0][5] = 0.0
    t.w_enc[2][1], t.b_enc[2][1] = 0.0, -1.0
    t.w_dec[2][4, 2] = torch.inf
    pc.transcoders.save(t, tmp_path / "set", model="tiny")
    report = pc.transcoders.inspect(tmp_path / "set")
    assert (report.format, report.kind, report.model) == ("circuit-tracer, per layer", "per layer", "tiny")
    assert (report.features, report.width, report.dtypes) == ([SIZE, None, SIZE], WIDTH, {"float32": 13})
    assert (report.reads, report.writes, report.skip) == ("mlp_in", "mlp_out", True)
    tensors = [x for x in (*t.w_enc, *t.b_enc, *t.w_dec, *t.b_dec, *t.w_skip) if x is not None]
    assert report.bytes == 4 * (sum(x.numel() for x in tensors) + 2 * SIZE)
    assert report.warnings == [
        "layer 0: 1 features are dead: they are never active or write nothing",
        "layer 0: 1 features repeat another one's encoder, 7",
        f"layer 2: {tmp_path / 'set' / 'layer_2.safetensors'}: W_dec holds 1 numbers that are NaN or infinite",
    ]
    text = str(report)
    assert "layers      3, 1 without a transcoder" in text and "features    2 x 24, width 32" in text
    assert json.loads(json.dumps(report.json()))["features"] == [SIZE, None, SIZE]
    assert pc.transcoders.inspect(tmp_path / "set", weights=False).warnings == []


@pytest.mark.parametrize("name", ROWS)
def test_every_format_inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("PYCIRCUIT_CACHE", str(tmp_path / "cache"))
    expected = write(name, tmp_path / "set")
    report = pc.transcoders.inspect(tmp_path / "set", **ROWS[name].overrides)
    assert (report.format, report.kind) == (
        ROWS[name].format,
        "cross-layer" if ROWS[name].holds["cross"] else "per layer",
    )
    assert report.features == [SIZE] * LAYERS and report.width == WIDTH and report.warnings == []
    assert (report.reads, report.writes) == (expected.reads, expected.writes)


def test_two_conversions_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is an error, and takes nothing away from the first, whatever it was to write."""
    expected, wrote = write("circuit_tracer", tmp_path / "set"), atomic_folder.write_safetensors
    begun, go_on = threading.Event(), threading.Event()

    def waits(path: Path, tensors: Any) -> None:
        wrote(path, tensors)
        begun.set()
        assert go_on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(atomic_folder, "write_safetensors", waits)
        first = pool.submit(pc.transcoders.convert, tmp_path / "set", tmp_path / "new")
        assert begun.wait(60)
        try:
            for dtype in (torch.float64, None):
                with pytest.raises(BlockingIOError, match=r"convert: .*new must be written by one process at a time"):
                    pc.transcoders.convert(tmp_path / "set", tmp_path / "new", dtype=dtype)
        finally:
            go_on.set()
        assert first.result() == tmp_path / "new"
    assert_same(pc.transcoders.load(tmp_path / "new"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]


KILLED = """
import os, sys
import pycircuit as pc
from pycircuit.files import safetensors
write, written = safetensors._write_rows, []
def dies(file, t):
    write(file, t)
    written.append(t)
    if len(written) == 9:
        file.flush()
        os.kill(os.getpid(), 9)
safetensors._write_rows = dies
pc.transcoders.convert(sys.argv[1], sys.argv[2])
"""


def kill_conversion(source: Path, target: Path) -> list[str]:
    """Names of the files that a conversion leaves when it is killed inside its second file."""
    code = subprocess.run([sys.executable, "-c", KILLED, str(source), str(target)], check=False).returncode
    assert code == -signal.SIGKILL and not target.exists()
    return sorted(p.name for p in target.with_name(f".{target.name}.resume.draft").iterdir())


def test_a_conversion_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    left = kill_conversion(tmp_path / "set", tmp_path / "new")
    assert left[1:] == ["layer_0.safetensors", "resume.json"]
    assert re.fullmatch(r"\.layer_1\.safetensors\.\w+\.partial", left[0])
    calls = count_calls(monkeypatch, atomic_folder, "write_safetensors")
    pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    assert len(calls) == LAYERS - 1 and not list((tmp_path / "new").glob(".*"))
    assert_same(pc.transcoders.load(tmp_path / "new"), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]


DIES = """
import os, sys
import pycircuit as pc
from random_transcoders import random_set
os.fsync = lambda file: os.kill(os.getpid(), 9)
pc.transcoders.save(random_set(False), sys.argv[1])
"""


def test_a_save_that_was_killed_leaves_nothing_for_good(tmp_path: Path) -> None:
    """The next one writes where it did, and takes its files away."""
    command = [sys.executable, "-c", DIES, str(tmp_path / "set")]
    code = subprocess.run(command, cwd=Path(__file__).parent, check=False).returncode
    assert code == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    pc.transcoders.save(random_set(False), tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"] and not list((tmp_path / "set").glob(".*"))


def test_a_conversion_begins_anew_where_files_are_read_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights under another configuration are other numbers."""
    write("llamascopium", tmp_path / "set")
    kill_conversion(tmp_path / "set", tmp_path / "new")
    for layer in range(LAYERS):
        change_json(tmp_path / "set", "config.json", layer, lambda c: c.update(sparsity_include_decoder_norm=True))
    calls = count_calls(monkeypatch, atomic_folder, "write_safetensors")
    pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    assert len(calls) == LAYERS
    got, expected = pc.transcoders.load(tmp_path / "new"), pc.transcoders.load(tmp_path / "set")
    assert_same(got, expected)
    for a, b in zip(got.activation, expected.activation, strict=True):
        assert torch.equal(a.theta, b.theta)


def test_a_conversion_without_room_says_so_and_goes_on(tmp_path: Path) -> None:
    expected = write("circuit_tracer", tmp_path / "set")
    message = r"convert: .*new must be possible to write, got File too large; the same call goes on where this one"
    with disk_full(4000), pytest.raises(OSError, match=message):
        pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.glob(".new*/*")] == ["resume.json"]
    pc.transcoders.convert(tmp_path / "set", tmp_path / "new")
    assert_same(pc.transcoders.load(tmp_path / "new"), expected)
    with disk_full(4000), pytest.raises(OSError, match=r"save: .*other must be possible to write, got File too large$"):
        pc.transcoders.save(expected, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "set"]


def test_a_conversion_never_lands_on_a_link(tmp_path: Path) -> None:
    write("circuit_tracer", tmp_path / "set")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("link", "nowhere", "set"):
        with pytest.raises(FileExistsError, match="convert: path must be a new folder, got"):
            pc.transcoders.convert(tmp_path / "set", tmp_path / name)
    pc.transcoders.convert(tmp_path / "set", tmp_path / "empty")
    assert dense(pc.transcoders.load(tmp_path / "link").w_dec[0]).shape == (SIZE, WIDTH)
