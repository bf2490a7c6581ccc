"""The page with a graph inside it: a file by itself, and a widget for notebooks."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pycircuit.files.atomic import writable, write_text
from pycircuit.ops import checks

from .views import view

if TYPE_CHECKING:
    from pycircuit.graph import Graph

STATIC = Path(__file__).parent / "static"
MAX_NODES = 1000

_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div id="pycircuit-page"></div>
<script type="application/json" id="pycircuit-data">{data}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def embedded(graph: Graph, node_threshold: float, edge_threshold: float, max_nodes: int) -> dict[str, Any]:
    """Return what the page shows without a server: the graph pruned at these thresholds."""
    content = view(graph, node_threshold, edge_threshold, max_nodes)
    return {"version": version("pycircuit"), "view": {"name": "graph", **content}}


def to_html(
    graph: Graph, path: str | os.PathLike[str], node_threshold: float, edge_threshold: float, max_nodes: int
) -> None:
    """Write one HTML file that shows a graph: code, style and data inside, nothing fetched from anywhere."""
    html_path = writable("to_html", path)
    checks.whole_number("to_html", "max_nodes", max_nodes, 1)
    style, script = page_files()
    data = embedded(graph, node_threshold, edge_threshold, max_nodes)
    text = _DOCUMENT.format(
        title=escaped_text(graph.prompt or "pycircuit"), style=style, script=script, data=script_json(data)
    )
    write_text("to_html", html_path, text)


def show(graph: Graph, node_threshold: float, edge_threshold: float, max_nodes: int) -> Any:
    """Return a widget with the page for a notebook's cell."""
    try:
        import anywidget
        import traitlets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "show: anywidget must be installed, got none; pip install 'pycircuit[notebook]', or use to_html"
        ) from None
    style, script = page_files()
    # anywidget reads _esm and _css from the class.
    fields = {"_esm": script, "_css": style, "data": traitlets.Unicode().tag(sync=True)}
    widget_type = type("GraphWidget", (anywidget.AnyWidget,), fields)
    return widget_type(data=json.dumps(embedded(graph, node_threshold, edge_threshold, max_nodes), allow_nan=False))


@cache
def page_files() -> tuple[str, str]:
    """Return the page's style and script, as they stand inside an HTML element."""
    style = (STATIC / "page.css").read_text("utf-8")
    script = (STATIC / "page.js").read_text("utf-8")
    for text, closing in ((style, "</style"), (script, "</script")):
        if closing in text.lower() or "<!--" in text:
            raise RuntimeError(f"page: the built files must not contain {closing}; build them anew")
    return style, script


def script_json(content: Any) -> str:
    """Return JSON that cannot end the script element it stands in, whatever texts it has."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def escaped_text(text: str) -> str:
    """Return text as the content of an HTML element."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
