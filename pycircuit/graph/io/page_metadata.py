"""Metadata of a graph in the JSON of circuit-tracer's page or Neuronpedia's: names, settings, where it comes from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from pycircuit.graph.prune import thresholds

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

Flavour: TypeAlias = Literal["circuit-tracer", "neuronpedia"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
Groups: TypeAlias = Sequence[tuple[str, Sequence[int]]]
OP = "Graph.to_json"

_SLUG = re.compile(r"[^/\\\x00-\x1f]+")
_NEURONPEDIA_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_URL = "https://github.com/pycircuit/pycircuit"
_DETAILS = ("feature_json_base_url", "neuronpedia_source_set", "neuronpedia_lorsa_source_set")


@dataclass(frozen=True)
class PageOptions:
    """Options of `Graph.to_json`, named as there."""

    slug: str | None
    node_threshold: float
    edge_threshold: float
    scan: str | None
    flavour: Flavour
    feature_details: Mapping[str, str] | None
    groups: Groups | None
    pinned: Sequence[int] | None


def page_metadata(graph: Graph, path: Path, options: PageOptions) -> dict[str, Any]:
    """Return the metadata of a graph's file, in the names of its flavour."""
    if options.flavour not in FLAVOURS:
        raise ValueError(f"{OP}: flavour must be one of {', '.join(FLAVOURS)}, got {options.flavour!r}")
    node, edge = thresholds(OP, options.node_threshold, options.edge_threshold)
    if options.flavour == "neuronpedia":
        slug, scan = _neuronpedia_names(graph, path, options)
        transcoder_list: list[str] = []
    else:
        slug = path.stem if options.slug is None else options.slug
        if not isinstance(slug, str) or not _SLUG.fullmatch(slug):
            raise ValueError(f"{OP}: slug must be a name without slashes or control characters, got {slug!r}")
        scan, transcoder_list = _transcoders(graph, options.scan)
    metadata: dict[str, Any] = {
        "slug": slug, "scan": scan, "transcoder_list": transcoder_list, "prompt_tokens": list(graph.tokens.text),
        "prompt": graph.prompt, "node_threshold": node, "schema_version": 1, "info": _info(),
        "generation_settings": _generation_settings(graph),
        "pruning_settings": {"node_threshold": node, "edge_threshold": edge},
    }  # fmt: skip
    details = _feature_details(options.feature_details)
    return metadata | ({"feature_details": details} if details else {})


def _info() -> dict[str, Any]:
    """Generator of the file. The time is left out: the same graph makes the same bytes."""
    return {"generator": {"name": "pycircuit", "version": version("pycircuit"), "url": _URL}}


def _generation_settings(graph: Graph) -> dict[str, Any]:
    """Settings of the trace under the names that pages know, and what a reader cannot tell from the nodes."""
    settings = graph.provenance.get("settings", {})
    names = {"max_n_logits": "max_targets", "desired_logit_prob": "probability", "max_feature_nodes": "max_features"}
    known = {name: settings[ours] for name, ours in names.items() if settings.get(ours) is not None}
    return known | {"layers": graph.layers, "vocab_size": graph.vocab_size}


def _feature_details(details: Mapping[str, str] | None) -> dict[str, str]:
    details = {} if details is None else details
    if not isinstance(details, Mapping):
        raise TypeError(f"{OP}: feature_details must be a dict, got {type(details).__name__}")
    for name, value in details.items():
        if name not in _DETAILS or not isinstance(value, str) or not value:
            raise ValueError(f"{OP}: feature_details must be texts of {', '.join(_DETAILS)}, got {name!r}: {value!r}")
    return dict(details)


def _transcoders(graph: Graph, scan: str | None) -> tuple[str, list[str]]:
    """(name of the transcoder set, list of several sets), as circuit-tracer's page reads them."""
    names = graph.provenance.get("scan", "local") if scan is None else scan
    if isinstance(names, list) and scan is None:
        return f"custom-{hashlib.sha256('-'.join(names).encode()).hexdigest()[:16]}", names
    if not isinstance(names, str):
        raise TypeError(f"{OP}: scan must be a string, got {type(names).__name__}")
    return names, []


def _neuronpedia_names(graph: Graph, path: Path, options: PageOptions) -> tuple[str, str]:
    """(slug, model id) in the characters that Neuronpedia takes; the model's own name without its owner by default."""
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem) if options.slug is None else options.slug
    model = str(graph.provenance.get("model", graph.provenance.get("scan", ""))).rstrip("/").rpartition("/")[2]
    names = {"slug": slug, "scan": model if options.scan is None else options.scan}
    for name, value in names.items():
        if not isinstance(value, str) or not _NEURONPEDIA_NAME.fullmatch(value):
            fix = "; name the model's id there with scan=" if name == "scan" else ""
            raise ValueError(
                f"{OP}: {name} must be letters, digits, '_', '.' and '-' for Neuronpedia, got {value!r}{fix}"
            )
    return slug, names["scan"]
