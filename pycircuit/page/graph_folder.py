"""A folder of graph files: their list, and the graphs that were opened last."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycircuit.graph import Graph

from .graph_index import GraphIndex

OP = "page"
KINDS = {".safetensors": "safetensors", ".json": "json", ".pt": "pt"}
_CACHED_BYTES = 1 << 30
_CACHED_VIEWS = 64
_OVERVIEW = "graph-metadata.json"
_HEAD = 1 << 16
_PROMPT = re.compile(rb'"prompt"\s*:\s*("(?:[^"\\]|\\.)*")')


@dataclass(frozen=True)
class GraphFile:
    """A graph's file. version: changes when the file does."""

    name: str
    path: Path
    kind: str
    bytes: int
    modified: float
    version: tuple[int, int, int]


class OpenGraph:
    """A graph in memory, with the views of it that were asked for last."""

    def __init__(self, index: GraphIndex) -> None:
        self.index = index
        self._views: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def graph(self) -> Graph:
        return self.index.graph

    @property
    def size(self) -> int:
        """Bytes of the edges, the largest field."""
        rows = self.graph.rows
        return int(rows.column.nbytes + rows.weight.nbytes)

    def view(self, key: tuple[Any, ...], make: Callable[[GraphIndex], bytes]) -> bytes:
        """Return a view by its thresholds and bounds, made at first use."""
        with self._lock:
            if key in self._views:
                self._views.move_to_end(key)
                return self._views[key]
            content = self._views[key] = make(self.index)
            while len(self._views) > _CACHED_VIEWS:
                self._views.popitem(last=False)
            return content


class GraphFolder:
    """Graphs of one folder by file name. Nothing outside it is read, and names are looked up in its list alone."""

    def __init__(self, path: str | os.PathLike[str], tokenizer: Any = None) -> None:
        self.density: Callable[[int, int], float | None] = lambda layer, feature: None
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise NotADirectoryError(f"serve: folder must be one that exists, got {os.fspath(path)}")
        self.tokenizer = tokenizer
        self._open: OrderedDict[tuple[Any, ...], OpenGraph] = OrderedDict()
        self._errors: dict[tuple[Any, ...], str] = {}
        self._summaries: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._lock = threading.Lock()

    def files(self) -> dict[str, GraphFile]:
        """Graph files by name; hidden files, other kinds and links that lead elsewhere are left out."""
        files = {}
        for entry in sorted(os.scandir(self.path), key=lambda entry: entry.name):
            kind = KINDS.get(Path(entry.name).suffix)
            if kind is None or entry.name.startswith(".") or entry.name == _OVERVIEW or not self._inside(entry):
                continue
            try:
                status = entry.stat()
            except OSError:
                continue
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
            files[entry.name] = GraphFile(
                entry.name, self.path / entry.name, kind, status.st_size, status.st_mtime, version
            )
        return files

    def _inside(self, entry: os.DirEntry[str]) -> bool:
        """Return True for a regular file in the folder, or a link to one."""
        try:
            if not entry.is_symlink():
                return entry.is_file(follow_symlinks=False)
            target = Path(entry.path).resolve(strict=True)
        except (OSError, RuntimeError):
            return False
        return target.is_file() and target.parent == self.path

    def file(self, name: str) -> GraphFile:
        """Return the file of a name; KeyError if the folder lists none."""
        file = self.files().get(name)
        if file is None:
            raise KeyError(f"{OP}: a graph must be one of the folder's, got {name[:200]!r}")
        return file

    def open(self, name: str) -> OpenGraph:
        """Return a graph, read at first use or when its file has changed."""
        file = self.file(name)
        key = (name, *file.version)
        with self._lock:
            if key not in self._open:
                self._open[key] = self._read(file, key)
                self._forget(key)
            self._open.move_to_end(key)
            return self._open[key]

    def _read(self, file: GraphFile, key: tuple[Any, ...]) -> OpenGraph:
        try:
            return OpenGraph(GraphIndex(Graph.open(file.path, self.tokenizer), self.density))
        except Exception as error:
            self._errors[key] = message_of(error)
            if isinstance(error, ValueError | OSError | MemoryError):
                raise
            message = f"{type(error).__name__}: {message_of(error)}"
            raise ValueError(f"{OP}: {file.name} must hold a sound graph, got {message}") from error

    def _forget(self, newest: tuple[Any, ...]) -> None:
        """Drop earlier states of the newest graph's file, and the graphs used longest ago beyond the bytes to keep."""
        for key in [key for key in self._open if key[0] == newest[0] and key != newest]:
            del self._open[key]
        while len(self._open) > 1 and sum(graph.size for graph in self._open.values()) > _CACHED_BYTES:
            self._open.popitem(last=False)

    def listing(self) -> list[dict[str, Any]]:
        """Describe every file: its name, title, size, and numbers of tokens and features where they are known."""
        return [self._describe(file) for file in self.files().values()]

    def _describe(self, file: GraphFile) -> dict[str, Any]:
        key = (file.name, *file.version)
        opened = self._open.get(key)
        if opened is not None:
            summary = {
                "title": opened.graph.prompt, "tokens": opened.graph.positions, "features": len(opened.graph.features)
            }  # fmt: skip
        else:
            if key not in self._summaries:
                self._summaries[key] = summarize(file)
            summary = self._summaries[key]
        error = self._errors.get(key)
        facts = {"name": file.name, "kind": file.kind, "bytes": file.bytes, "modified": file.modified, "error": error}
        return facts | summary | {"title": summary["title"] or Path(file.name).stem}


def summarize(file: GraphFile) -> dict[str, Any]:
    """Return the title of a file and, of safetensors, the numbers of tokens and features, from its head alone."""
    nothing: dict[str, Any] = {"title": "", "tokens": None, "features": None}
    try:
        with file.path.open("rb") as stream:
            if file.kind == "json":
                match = _PROMPT.search(stream.read(_HEAD))
                return nothing if match is None else nothing | {"title": str(json.loads(match[1]))[:500]}
            if file.kind != "safetensors":
                return nothing
            size = int.from_bytes(stream.read(8), "little")
            if not 0 < size <= min(file.bytes, 1 << 26):
                return nothing
            header = json.loads(stream.read(size))
        metadata = json.loads(header["__metadata__"]["pycircuit.graph"])
        features = int(header["features"]["shape"][0])
        return {"title": str(metadata["prompt"])[:500], "tokens": len(metadata["token_text"]), "features": features}
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return nothing


def message_of(error: Exception) -> str:
    """Message of an error in one line, at most 500 characters."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return (" ".join(text.split()) or type(error).__name__)[:500]
