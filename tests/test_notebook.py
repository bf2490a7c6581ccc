"""Views that notebooks show: tables and pictures, every text escaped."""

from __future__ import annotations

import xml.etree.ElementTree as Xml
from dataclasses import replace

import builders
import pytest
import torch
from graphs import assemble, labelled_graph

import pycircuit as pc
from pycircuit.graph.faithfulness import Agreement, Faithfulness
from pycircuit.graph.show.html_table import html_table
from pycircuit.training.evaluate import Evaluation

pytestmark = pytest.mark.usefixtures("one_thread")
HOSTILE = '</td><script>alert("x")</script>&amp;'


def tables(html: str) -> list[list[list[str]]]:
    """Cells of every table, once the text is known to be well-formed."""
    root = Xml.fromstring(f"<div>{html}</div>")
    assert not list(root.iter("script"))
    return [[["".join(cell.itertext()) for cell in row] for row in table.iter("tr")] for table in root.iter("table")]


def test_a_table() -> None:
    html = html_table(("name", "n", HOSTILE), [(HOSTILE, 0.123456, "x"), ("b", None, "y")], HOSTILE)
    assert tables(html) == [[["name", "n", HOSTILE], [HOSTILE, "0.1235", "x"], ["b", "-", "y"]]]
    sides = [cell.get("style", "").split(":")[-1] for cell in Xml.fromstring(html).iter("td")]
    assert sides == ["left", "right", "left"] * 2
    assert tables(html_table(("empty",), [])) == [[["empty"]]]


def test_a_graph_and_what_remains_of_it() -> None:
    graph = labelled_graph(count=60)
    graph = replace(graph, prompt=HOSTILE, labels=dict.fromkeys(graph.labels, HOSTILE))
    html = graph._repr_html_()
    assert dict(zip(*tables(html)[0], strict=True))["edges"] == str(graph.rows.entries)
    assert graph.plot().svg in html
    pruned = graph.prune(0.5)
    (rows,) = tables(pruned._repr_html_())
    influence = graph.influence()[: graph.first_error]
    best = [graph.feature_node(*map(int, row[1].split("/"))) for row in rows[1:]]
    assert best == influence.argsort(descending=True, stable=True)[:10].tolist()
    assert any(row[2] == HOSTILE for row in rows)


def test_a_graph_of_nothing() -> None:
    assert tables(assemble(torch.zeros(2, 2), [], 1, 1, [])._repr_html_())


def test_evaluation_and_faithfulness() -> None:
    density: list[list[int] | None] = [[3, 0, 0, 1, 2, 3, 4, 5], None]
    evaluation = Evaluation(100, [0.5, None], [3.25, None], [0.1, None], density, 0.9, 0.01, 0.2, 2, 0.6, 0.7)
    html = evaluation._repr_html_()
    (rows,) = tables(html)
    assert rows[1] == ["0", "0.5", "3.25", "0.1", "3", "0", "0", "1", "2", "3", "4", "5"]
    assert rows[2] == ["1", *["-"] * 11]
    assert "next token agrees 90.0%" in html and "replacement score 0.600" in html
    agreement = Agreement("all", None, 12, 0, 0.98765, None, 0.5)
    html = Faithfulness([1, 2], {"feature": 2, "token": 0}, 2.0, 0, [agreement])._repr_html_()
    assert tables(html)[0][1] == ["direct effects, everything frozen", "all", "12", "0", "0.9877", "-", "0.5"]
    assert "2 features, each times 2" in html


def test_interventions() -> None:
    model = builders.replacement("gpt2", "plt", torch.float32)
    features = model.activations(builders.prompt())
    layer, position = 0, 5
    begin = int(features[layer].row_ptr[position])
    feature = int(features[layer].index[begin])
    result = pc.intervene(model, builders.prompt(), [pc.Intervention(layer, position, feature, factor=9.0)])
    (rows,) = tables(result._repr_html_())
    assert len(rows) == 11 and rows[0] == ["next token", "before", "after"]
    token = int(result.probabilities.argmax())
    assert rows[1] == [
        str(token), f"{100 * float(result.probabilities_before[token]):.2f}%",
        f"{100 * float(result.probabilities[token]):.2f}%",
    ]  # fmt: skip
