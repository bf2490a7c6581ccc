"""Checkpoints: two runs with one folder, kills in the middle of a write, damage, full disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import builders
import pytest
import torch
from builders import replacement
from disks import disk_full
from trace_helpers import in_small_tiles, same_graph

import pycircuit as pc
from pycircuit.trace.collect import RowCollector

TESTS = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_tiles(monkeypatch)


def traced(folder: Path | None, **changes: Any) -> pc.Graph:
    options = {"max_features": 12, "round_size": 4, "progress": False, "checkpoint": folder, **changes}
    return pc.attribute(replacement("llama", "plt", torch.float32), builders.prompt(), **options)


def tiles(folder: Path) -> list[Path]:
    return sorted(folder.glob("rows-*"))


# Two runs, one folder


def test_pairs_of_processes_and_kills(tmp_path: Path) -> None:
    """Every run that is not killed ends with the identical graph, and leaves no draft of a killed one."""
    command = [sys.executable, str(TESTS / "checkpoint_pairs.py"), str(tmp_path), "3", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert set(counts) <= {"identical", "killed"} and counts["identical"] >= 6, done.stderr


def test_runs_that_begin_during_the_first_write_wait_and_report_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writes, waits, goes_on, flush = (*(threading.Event() for _ in range(3)), os.fsync)

    def pause(file: int) -> None:
        if not writes.is_set():
            writes.set()
            assert goes_on.wait(60)
        flush(file)

    def report(phase: str, done: int, total: int) -> None:
        if phase == "waiting":
            waits.set()

    monkeypatch.setattr(os, "fsync", pause)
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        runs = [pool.submit(traced, tmp_path)]
        assert writes.wait(60)
        try:
            runs += [pool.submit(traced, tmp_path, progress=progress) for progress in (report, True)]
            printed, until = "", time.monotonic() + 60
            while not (waits.is_set() and printed) and not any(r.done() for r in runs) and time.monotonic() < until:
                printed += capsys.readouterr().err
                time.sleep(0.01)
        finally:
            goes_on.set()
        graphs = [run.result() for run in runs]
    assert f"another run has {tmp_path}; this one waits until it ends" in printed
    assert all(same_graph(graph, traced(None)) for graph in graphs)


def test_a_run_that_fails_frees_its_folder(tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if done > 3:
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped") as caught:
        traced(tmp_path, progress=stop)
    assert caught.value.__traceback__ is not None  # which refers to every object of the run
    assert len(tiles(tmp_path)) > 0 and same_graph(traced(tmp_path), traced(None))


def test_drafts_of_killed_runs(tmp_path: Path) -> None:
    """A kill in the first write leaves a folder in which a run can begin; files of others stay."""
    for name in (".run.json.1234.partial", ".rows-000000004.safetensors.0123456789ab.partial"):
        (tmp_path / name).write_bytes(b"{")
    assert same_graph(traced(tmp_path), traced(None)) and not list(tmp_path.glob(".*"))
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    (tmp_path / ".notes.partial").write_bytes(b"{")
    with pytest.raises(pc.CheckpointError, match=r"with other files in it, such as \.notes\.partial"):
        traced(tmp_path)
    assert os.listdir(tmp_path) == [".notes.partial"]


# Damage


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_plan(folder: Path) -> None:
    plan = json.loads((folder / "run.json").read_text())["plan"]
    edit(folder, plan={**plan, "keep": 3})


def from_another_run(folder: Path) -> None:
    other = folder.with_name("other")
    traced(other, max_features=13)
    shutil.copy(tiles(other)[1], tiles(folder)[1])


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda f: flip(tiles(f)[1], -40), r"rows-0\S+ .*differs in digest; delete it"),
    "last": (lambda f: flip(tiles(f)[-1], -1), r"rows-0\S+ .*differs in digest; delete it"),
    "header": (lambda f: flip(tiles(f)[1], 20), "rows-0"),
    "cut": (lambda f: os.truncate(tiles(f)[2], 700), r"hold whole files, got .*rows-0.*delete it"),
    "empty": (lambda f: os.truncate(tiles(f)[0], 0), r"hold whole files, got .*rows-000000000\S+:.*delete it"),
    "folder": (lambda f: become_folder(tiles(f)[1]), r"hold whole files, got .*rows-0.*delete it"),
    "swapped": (lambda f: swap(tiles(f)[1], tiles(f)[2]), r"rows-0\S+ .*differs in row; delete it"),
    "copied": (lambda f: shutil.copy(tiles(f)[1], tiles(f)[2]), r"rows-0\S+ .*differs in row; delete it"),
    "other run": (from_another_run, r"rows-0\S+ .*differs in run; delete it"),
    "plan": (change_plan, r"run\.json with another digest; remove"),
    "feature count": (lambda f: edit(f, max_features=13), r"run\.json with another digest"),
    "no digest": (lambda f: (f / "run.json").write_text('{"max_features": 12}'), r"readable run\.json, got .*'digest'"),
    "list": (lambda f: (f / "run.json").write_text("[]"), r"readable run\.json"),
    "no run": (lambda f: (f / "run.json").unlink(), r"run\.json beside its rows, got .*rows-000000000\S+ without"),
}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complete") / "run"
    with pytest.MonkeyPatch.context() as patch:
        in_small_tiles(patch)
        traced(folder)
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(complete: Path, tmp_path: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    folder = tmp_path / "run"
    shutil.copytree(complete, folder)
    damage(folder)
    with pytest.raises(pc.CheckpointError, match=message):
        traced(folder)


@pytest.mark.parametrize("deleted", [slice(1, 2), slice(0, 3), slice(None)])
def test_deleted_rows_are_swept_again(complete: Path, tmp_path: Path, deleted: slice) -> None:
    folder = tmp_path / "run"
    shutil.copytree(complete, folder)
    for tile in tiles(folder)[deleted]:
        tile.unlink()
    (folder / "notes.txt").write_text("not ours")
    assert same_graph(traced(folder), traced(complete)) and len(tiles(folder)) == len(tiles(complete))


def test_rows_of_other_features_are_refused(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may round influences otherwise, and so choose other features than the folder has rows of."""
    folder, ranked = tmp_path / "run", RowCollector.most_influential
    shutil.copytree(complete, folder)
    monkeypatch.setattr(RowCollector, "most_influential", lambda self, count: ranked(self, count + 1)[1:])
    with pytest.raises(pc.CheckpointError, match=r"features that this run comes to, got .*rows-0\S+ with others"):
        traced(folder)


# Disks


@pytest.mark.parametrize(("size", "file"), [(0, r"run\.json"), (3000, "rows-000000000.safetensors")])
def test_a_full_disk_is_named_with_its_path(tmp_path: Path, size: int, file: str) -> None:
    with disk_full(size), pytest.raises(OSError, match=rf"attribute: {tmp_path}/{file} must be possible") as caught:
        traced(tmp_path)
    assert caught.value.errno == errno.EFBIG
    assert same_graph(traced(tmp_path), traced(None))
