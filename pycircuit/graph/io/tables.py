"""A graph as two tables, of nodes and of edges: arrays for pandas or Polars, Parquet files for them and DuckDB."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pycircuit.files.atomic import replace_file
from pycircuit.graph.identifiers import identifier
from pycircuit.graph.influence import node_influence, scales

from .libraries import library

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

Table: TypeAlias = dict[str, "np.ndarray | list[str]"]
NAMES = ("nodes", "edges")
_OP = "Graph.to_parquet"


def tables(graph: Graph) -> dict[str, Table]:
    """Columns of the nodes and of the edges, by table; -1, NaN and "" where a node has none."""
    return {"nodes": _nodes(graph), "edges": _edges(graph)}


def _nodes(graph: Graph) -> Table:
    descriptions = [graph.describe(node) for node in range(graph.nodes)]
    columns: Table = {
        "node": np.arange(graph.nodes),
        "id": [identifier(graph, node) for node in range(graph.nodes)],
        "kind": [description["kind"] for description in descriptions],
        "label": [description.get("label", "") for description in descriptions],
        "automatic": np.array([bool(description.get("automatic")) for description in descriptions], bool),
    }
    for name in ("layer", "position", "feature", "token"):
        columns[name] = np.array([description.get(name, -1) for description in descriptions], np.int64)
    for name in ("value", "weight"):
        columns[name] = np.array([description.get(name, np.nan) for description in descriptions], np.float64)
    columns["influence"] = node_influence(graph)
    for name in ("preactivation", "bias", "dropped"):
        column = np.full(graph.nodes, np.nan)
        unknown = name == "preactivation" and graph.provenance.get("law") == "unknown"
        column[graph.row_node.numpy()] = np.nan if unknown else getattr(graph, name).numpy()
        columns[name] = column
    return columns


def _edges(graph: Graph) -> Table:
    rows = graph.rows
    row = rows.row_of_entry()
    weight = rows.weight.numpy()
    return {
        "source": rows.column.numpy().astype(np.int64),
        "target": graph.row_node.numpy()[row],
        "weight": weight,
        "share": np.abs(weight).astype(np.float64) * scales(rows)[row],
    }


def to_parquet(graph: Graph, folder: str | os.PathLike[str]) -> None:
    """Write nodes.parquet and edges.parquet into a folder, which is made if it is not there."""
    library("to_parquet", "pyarrow", "pyarrow")
    parquet = library("to_parquet", "pyarrow.parquet", "pyarrow")
    folder = Path(folder)
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{_OP}: folder must be in a folder that exists, got {folder}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{_OP}: folder must be a folder, got the file {folder}")
    about = {"prompt": graph.prompt, "layers": graph.layers, "provenance": graph.provenance}
    arrow = {name: _arrow(table, about) for name, table in tables(graph).items()}
    folder.mkdir(exist_ok=True)
    for name, table in arrow.items():
        replace_file(_OP, folder / f"{name}.parquet", lambda file, table=table: parquet.write_table(table, file))  # type: ignore[misc]


def _arrow(table: Table, about: dict[str, Any]) -> Any:
    """Table of pyarrow, with nulls where a node has none."""
    arrow = library("to_parquet", "pyarrow", "pyarrow")
    columns = {}
    for name, values in table.items():
        if isinstance(values, list):
            columns[name] = arrow.array([_encodable(text) for text in values], arrow.string())
            continue
        absent = values < 0 if values.dtype.kind == "i" else values != values
        columns[name] = arrow.array(values, mask=absent)
    return arrow.table(columns).replace_schema_metadata({"pycircuit": json.dumps(about)})


def _encodable(text: str) -> str:
    """Text without halves of characters, which UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
