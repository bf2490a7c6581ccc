"""The document of a graph's edits, checked: what a browser sends becomes these fields, within bounds, or an error."""

from __future__ import annotations

import re
from math import isfinite
from typing import Any

from pycircuit.graph.identifiers import is_identifier

OP = "page"
LONGEST_TEXT = 400  # characters of a label or a name
MOST = {"labels": 20_000, "pins": 5_000, "groups": 1_000, "layout": 10_000}
_FEATURE_KEY = re.compile(r"\d{1,6}/\d{1,9}", re.ASCII)
_FIELDS = {"labels", "pins", "groups", "layout"}


def empty_document() -> dict[str, Any]:
    """Return the document before the first edit."""
    return {"labels": {}, "pins": [], "groups": [], "layout": {}}


def checked_document(document: object) -> dict[str, Any]:
    """Return a document with every field, or raise ValueError where one is not as it must be."""
    if not isinstance(document, dict):
        raise ValueError(f"{OP}: document must be an object, got {type(document).__name__}")
    unknown = sorted(set(map(str, document)) - _FIELDS)
    if unknown:
        raise ValueError(f"{OP}: document must have the fields {', '.join(sorted(_FIELDS))}, got {unknown[0][:80]!r}")
    for name, most in MOST.items():
        if len(_sized(name, document.get(name, ()))) > most:
            raise ValueError(f"{OP}: document must have at most {most} {name}, got {len(document[name])}")
    return {
        "labels": _labels(document.get("labels", {})),
        "pins": node_list("pins", document.get("pins", [])),
        "groups": _groups(document.get("groups", [])),
        "layout": _layout(document.get("layout", {})),
    }


def _sized(name: str, value: Any) -> Any:
    if not isinstance(value, list | dict | tuple):
        raise ValueError(f"{OP}: {name} must be a list or an object, got {type(value).__name__}")
    return value


def node_list(name: str, nodes: object) -> list[str]:
    """Return a list of distinct node identifiers."""
    if not isinstance(nodes, list) or not all(is_identifier(node) for node in nodes):
        raise ValueError(f"{OP}: {name} must be a list of node identifiers, such as 3/7/412")
    return list(dict.fromkeys(nodes))


def short_text(name: str, text: object) -> str:
    """Return a text of one line that is not too long."""
    if (
        not isinstance(text, str)
        or len(text) > LONGEST_TEXT
        or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in text)
    ):
        raise ValueError(f"{OP}: {name} must be one line of at most {LONGEST_TEXT} characters")
    return text


def _labels(labels: object) -> dict[str, str]:
    if not isinstance(labels, dict) or not all(_FEATURE_KEY.fullmatch(key) for key in labels):
        raise ValueError(f"{OP}: labels must be an object from LAYER/FEATURE to texts")
    return {key: short_text("a label", text) for key, text in labels.items()}


def _groups(groups: object) -> list[dict[str, Any]]:
    if not isinstance(groups, list):
        raise ValueError(f"{OP}: groups must be a list, got {type(groups).__name__}")
    checked, seen = [], set[str]()
    for group in groups:
        if not isinstance(group, dict) or not {"name", "nodes"} <= group.keys() <= {"name", "nodes", "collapsed"}:
            raise ValueError(f"{OP}: a group must have name, nodes and collapsed")
        collapsed = group.get("collapsed", False)
        if type(collapsed) is not bool:
            raise ValueError(f"{OP}: collapsed must be true or false, got {type(collapsed).__name__}")
        nodes = node_list("nodes of a group", group["nodes"])
        if len(nodes) > MOST["pins"]:
            raise ValueError(f"{OP}: a group must have at most {MOST['pins']} nodes, got {len(nodes)}")
        twice = next((node for node in nodes if node in seen), None)
        if twice is not None:
            raise ValueError(f"{OP}: a node must be in one group, got {twice} in two")
        seen.update(nodes)
        checked.append({"name": short_text("a group's name", group["name"]), "nodes": nodes, "collapsed": collapsed})
    return checked


def _layout(layout: object) -> dict[str, list[float]]:
    if not isinstance(layout, dict):
        raise ValueError(f"{OP}: layout must be an object, got {type(layout).__name__}")
    checked = {}
    for key, place in layout.items():
        short_text("a key of the layout", key)
        numbers = isinstance(place, list) and len(place) == 2 and all(type(n) in (int, float) for n in place)
        if not numbers or not all(isfinite(n) and abs(n) <= 1e9 for n in place):
            raise ValueError(f"{OP}: a place in the layout must be two numbers")
        checked[key] = [float(n) for n in place]
    return checked
