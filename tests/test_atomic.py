"""Writers of one file in threads and processes, writers that are killed, and disks that are full."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disks import disk_full
from graphs import random_graph

from pycircuit.graph import Graph

pytestmark = pytest.mark.usefixtures("one_thread")  # a forked process has no others

GRAPHS = [random_graph(count=count, layers=3, positions=4, seed=count) for count in (5, 40, 90)]
NAMES = {"save": "g.safetensors", "to_json": "g.json", "plot": "g.svg", "to_circuit_tracer": "g.pt"}


def write(graph: Graph, method: str, path: Path) -> None:
    getattr(graph, method)(path)


@pytest.mark.parametrize("method", NAMES)
def test_writers_in_threads(tmp_path: Path, method: str) -> None:
    """Readers see the file of one writer or of another, and never a part; the last one stays."""
    path, complete = tmp_path / NAMES[method], set()
    for graph in GRAPHS:
        write(graph, method, path)
        complete.add(path.read_bytes())
    done = threading.Event()

    def read() -> set[bytes]:
        contents = set()
        while not done.is_set():
            contents.add(path.read_bytes())
        return contents

    with ThreadPoolExecutor(6) as pool:
        reader = pool.submit(read)
        writers = [pool.submit(write, GRAPHS[i % 3], method, path) for i in range(18)]
        try:
            for writer in writers:
                writer.result()
        finally:
            done.set()
        contents = reader.result() | {path.read_bytes()}
    assert contents <= complete
    extra = {"graph-metadata.json"} if method == "to_json" else set()
    assert set(os.listdir(tmp_path)) == {path.name} | extra


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of newer Pythons, where threads run
def test_writers_in_processes(tmp_path: Path) -> None:
    """Forked ones, that have the same threads and, of each other, nothing but the path."""
    path = tmp_path / "g.json"
    children = []
    for i in range(6):
        child = os.fork()
        if not child:
            try:
                for _ in range(5):
                    write(GRAPHS[i % 3], "to_json", path)
                    json.loads(path.read_text())
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert sorted(os.listdir(tmp_path)) == ["g.json", "graph-metadata.json"]


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_get_the_mode_of_the_umask(tmp_path: Path, method: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(GRAPHS[0], method, tmp_path / NAMES[method])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / NAMES[method]).stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("method", NAMES)
def test_drafts_of_killed_writers_are_removed(tmp_path: Path, method: str) -> None:
    """Drafts of a writer that is alive, and those of other files, stay."""
    path = tmp_path / NAMES[method]
    dead, alive, other = (tmp_path / f".{name}.partial" for name in (f"{path.name}.0a", f"{path.name}.0b", "x.0c"))
    for draft in (dead, alive, other):
        draft.write_bytes(b"half")
    with alive.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write(GRAPHS[0], method, path)
    assert not dead.exists() and alive.read_bytes() == other.read_bytes() == b"half"


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("size", [0, 300, 5000])
def test_a_full_disk_is_named_with_its_path(tmp_path: Path, method: str, size: int) -> None:
    path = tmp_path / NAMES[method]
    write(GRAPHS[0], method, path)
    before = path.read_bytes()
    with disk_full(size), pytest.raises(OSError, match=rf"{method}: {path} must be possible to write") as caught:
        write(GRAPHS[2], method, path)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_writer_that_is_taken_for_abandoned_writes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another removes its draft in the moment between the making and the locking."""
    path, lock = tmp_path / NAMES["save"], fcntl.flock
    stolen: list[Path] = []

    def steal(file: object, operation: int) -> None:
        if not stolen:
            stolen.extend(tmp_path.glob(".*"))
            stolen[0].unlink()
        lock(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", steal)
    write(GRAPHS[0], "save", path)
    monkeypatch.undo()
    assert len(stolen) == 1 and len(Graph.load(path).features) == len(GRAPHS[0].features)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of other writers then: their drafts stay, and this one writes all the same."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    draft = tmp_path / f".{NAMES['save']}.0a.partial"
    draft.write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", refuse)
    write(GRAPHS[0], "save", tmp_path / NAMES["save"])
    assert sorted(os.listdir(tmp_path)) == sorted([draft.name, NAMES["save"]])
