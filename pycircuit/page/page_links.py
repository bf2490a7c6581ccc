"""Links of circuit-tracer's page and of Neuronpedia's, read as edits: pinned nodes, groups and labels.

A link is a text here: nothing behind it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pycircuit.graph import Graph
from pycircuit.graph.identifiers import is_identifier
from pycircuit.graph.io.page_json import PAGE
from pycircuit.graph.io.page_reader import unpaired

from .edit_document import LONGEST_TEXT, checked_document, empty_document

OP = "page"
LONGEST_LINK = 1 << 20  # characters
_NODE = re.compile(r"(E|\d{1,6})_(-1|\d{1,24})_(\d{1,9})", re.ASCII)
_LABEL_KEY = re.compile(r"(?:(\d{1,6})_)?(\d{1,24})(?:_(\d{1,9}))?", re.ASCII)
_FIELDS = ("pinnedIds", "supernodes", "clerps")


def document_of_link(graph: Graph, text: object, document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a document with the pins, groups and labels of a link, and notes on what the graph lacks.

    text: the link, or its query. Labels that the document has and the link lacks stay.
    """
    if not isinstance(text, str) or len(text) > LONGEST_LINK:
        raise ValueError(f"{OP}: text must be a link of at most {LONGEST_LINK} characters")
    values = _query(text.strip())
    nodes = _Nodes(graph)
    pins = nodes.all(values.get("pinnedIds", "").split(","))
    groups, seen = [], set[str]()
    for entry in _json_list(values, "supernodes"):
        if not isinstance(entry, list) or not entry or not all(isinstance(word, str) for word in entry):
            raise ValueError(f"{OP}: supernodes must be a list of [name, node, ...]")
        members = [node for node in nodes.all(entry[1:]) if node not in seen]
        seen.update(members)
        if members:
            groups.append({"name": _one_line(entry[0]), "nodes": members, "collapsed": True})
    labels = {**document["labels"], **_labels(graph, _json_list(values, "clerps"))}
    notes = [f"{nodes.missing} nodes of the link are not in this graph"] if nodes.missing else []
    changed = {**document, "labels": labels, "pins": pins, "groups": groups}
    return checked_document(changed), notes


def _query(text: str) -> dict[str, str]:
    """Fields of a link's query; circuit-tracer's page encodes them twice."""
    query = urlsplit(text).query if "?" in text else text
    fields = {name: values[-1] for name, values in parse_qs(query, max_num_fields=100).items()}
    if not fields.keys() & set(_FIELDS):
        raise ValueError(f"{OP}: text must be a link with {', '.join(_FIELDS)}, got {text[:80]!r}")
    return {name: unquote(value) if "%" in value else value for name, value in fields.items()}


def _json_list(values: Mapping[str, str], name: str) -> list[Any]:
    if not values.get(name):
        return []
    try:
        content = json.loads(values[name])
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, list):
        raise ValueError(f"{OP}: {name} must be a JSON list, got {values[name][:80]!r}")
    return content


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:LONGEST_TEXT]


class _Nodes:
    """Nodes of a graph by the ids of pages: layer_feature_position, layer_-1_position, E_token_position."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.missing = 0
        self.features = {tuple(feature) for feature in graph.features.tolist()}
        ends = zip(graph.targets.ids.tolist(), graph.targets.positions.tolist(), strict=True)
        self.targets = {end: t for t, end in reversed(list(enumerate(ends)))}

    def all(self, ids: list[str]) -> list[str]:
        """Return the identifiers of nodes, in order; counts those that the graph lacks."""
        known = []
        for text in filter(None, ids):
            identifier = self._identifier(text)
            if identifier is None:
                self.missing += 1
            else:
                known.append(identifier)
        return list(dict.fromkeys(known))

    def _identifier(self, text: str) -> str | None:
        match = _NODE.fullmatch(text)
        if match is None:
            return None
        layer, number, position = match[1], int(match[2]), int(match[3])
        graph = self.graph
        if position >= graph.positions:
            return None
        if layer == "E":
            return f"token/{position}"
        if number < 0:
            return f"error/{int(layer)}/{position}" if int(layer) < graph.layers else None
        for feature in (number, unpaired(number)[1]):
            if (int(layer), position, feature) in self.features:
                return f"{int(layer)}/{position}/{feature}"
        target = self.targets.get((number, position)) if int(layer) >= graph.layers else None
        return None if target is None else f"target/{target}"


def _labels(graph: Graph, entries: list[Any]) -> dict[str, str]:
    """Labels of [key, text]: the key is a feature's number, or layer_feature_position with either number."""
    known = {(layer, feature) for layer, _, feature in graph.features.tolist()}
    labels = {}
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise ValueError(f"{OP}: clerps must be a list of [feature, label]")
        match = _LABEL_KEY.fullmatch(str(entry[0]))
        if match is None:
            continue
        number = int(match[2])
        candidates = [unpaired(number)] if match[1] is None else [(int(match[1]), number), unpaired(number)]
        key = next((candidate for candidate in candidates if candidate in known), None)
        if key is not None and entry[1].strip():
            labels[f"{key[0]}/{key[1]}"] = _one_line(entry[1].strip())
    return labels


def document_of_file(graph: Graph) -> dict[str, Any]:
    """Return the document of a graph before its first edit: pins and groups of its file, if another page wrote it."""
    page = graph.provenance.get(PAGE)
    empty = empty_document()
    if not isinstance(page, dict):
        return empty
    pins = [node for node in page.get("pinned", []) if is_identifier(node)]
    groups, seen = [], set[str]()
    for name, *nodes in page.get("groups", []):
        members = [node for node in dict.fromkeys(nodes) if node not in seen and is_identifier(node)]
        seen.update(members)
        if members:
            groups.append({"name": _one_line(name), "nodes": members, "collapsed": True})
    return checked_document({**empty, "pins": pins, "groups": groups})
