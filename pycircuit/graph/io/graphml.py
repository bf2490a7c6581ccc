"""GraphML, which Gephi, Cytoscape, yEd, igraph and networkx read; written a line at a time, with no library."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO
from xml.sax.saxutils import escape

import numpy as np

from pycircuit.files.atomic import replace_file, writable

from .tables import Table, tables

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

_OP = "Graph.to_graphml"
_TYPES = {"b": "boolean", "i": "long", "f": "double"}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML cannot hold
_REPLACEMENT = "\ufffd"
_ENDS = ("node", "source", "target")  # columns that are the ends of edges, not data
_LINES = 4096  # written together


def to_graphml(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write a graph as GraphML, atomically."""
    path = writable(_OP, path)
    columns = tables(graph)
    replace_file(_OP, path, lambda file: _write(file, _lines(columns["nodes"], columns["edges"])))


def _write(file: BinaryIO, lines: Iterator[str]) -> None:
    block: list[str] = []
    for line in lines:
        block.append(line)
        if len(block) >= _LINES:
            file.write("".join(block).encode())
            block.clear()
    file.write("".join(block).encode())


def _lines(nodes: Table, edges: Table) -> Iterator[str]:
    yield '<?xml version="1.0" encoding="UTF-8"?>\n<graphml xmlns="http://graphml.graphdrawing.org/xmlns">\n'
    for owner, table in (("node", nodes), ("edge", edges)):
        for name, values in table.items():
            if name not in _ENDS:
                kind = "string" if isinstance(values, list) else _TYPES[values.dtype.kind]
                yield f'<key id="{owner}_{name}" for="{owner}" attr.name="{name}" attr.type="{kind}"/>\n'
    yield '<graph edgedefault="directed">\n'
    for number, data in zip(nodes["node"], _data("node", nodes), strict=True):
        yield f'<node id="n{number}">{data}</node>\n'
    for source, target, data in zip(edges["source"], edges["target"], _data("edge", edges), strict=True):
        yield f'<edge source="n{source}" target="n{target}">{data}</edge>\n'
    yield "</graph>\n</graphml>\n"


def _data(owner: str, table: Table) -> Iterator[str]:
    """Data elements of each row, those aside that it does not have."""
    names = [name for name in table if name not in _ENDS]
    columns = [table[name] if isinstance(table[name], list) else _texts(table[name]) for name in names]
    for texts in zip(*columns, strict=True):
        yield "".join(
            f'<data key="{owner}_{name}">{escape(_NO_XML.sub(_REPLACEMENT, text))}</data>'
            for name, text in zip(names, texts, strict=True)
            if text
        )


def _texts(values: np.ndarray | list[str]) -> list[str]:
    """Numbers as texts, "" for those that stand for none."""
    array = np.asarray(values)
    if array.dtype.kind == "b":
        return ["true" if value else "false" for value in array]
    absent = array < 0 if array.dtype.kind == "i" else array != array
    return ["" if missing else repr(value) for value, missing in zip(array.tolist(), absent.tolist(), strict=True)]
