"""Edits of graphs on the page: history that survives a kill, other pages' links and files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from graphs import by_hand, random_graph
from page_client import serving

import pycircuit as pc
from pycircuit.graph.io.page_json import feature_id
from pycircuit.page.edit_document import checked_document, empty_document
from pycircuit.page.edits import FILE, KEPT_STEPS, EditConflict, Edits
from pycircuit.page.page_links import document_of_link

pytestmark = pytest.mark.usefixtures("one_thread")

# Answers on standard output after every edit that is on disk, until it is killed.
WRITER = """
import sys
from pathlib import Path
from pycircuit.page.edit_document import empty_document
from pycircuit.page.edits import Edits
edits = Edits(Path(sys.argv[1]), lambda name: empty_document())
for revision in range(100_000):
    edits.replace("g.safetensors", revision, {"pins": [f"token/{n}" for n in range(revision % 500 + 1)]})
    print(revision + 1, flush=True)
"""


def edits_of(folder: Path) -> Edits:
    return Edits(folder, lambda name: empty_document())


def test_a_killed_writer_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(40):
            answered = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        answered = max([answered, *map(int, writer.stdout.read().split())])
    edits = edits_of(tmp_path)
    state = edits.state("g.safetensors")
    assert state["revision"] in (answered, answered + 1)
    assert len(state["document"]["pins"]) == state["revision"]
    undone = edits.undo("g.safetensors", state["revision"])
    assert len(undone["document"]["pins"]) == state["revision"] - 1
    assert edits.redo("g.safetensors", undone["revision"])["document"] == state["document"]
    assert {path.name for path in tmp_path.iterdir()} <= {FILE, f"{FILE}-journal"}


def test_history_is_bounded_and_branches_replace_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pycircuit.page.edits.KEPT_STEPS", 3)
    assert KEPT_STEPS == 500
    edits = edits_of(tmp_path)
    for n in range(6):
        state = edits.replace("a", n, {"pins": [f"token/{n}"]})
    assert edits.replace("a", 6, {"pins": ["token/5"]}) == state  # nothing new is no step
    with pytest.raises(EditConflict):
        edits.replace("a", 5, {})
    steps = 0
    while state["can_undo"]:
        state, steps = edits.undo("a", state["revision"]), steps + 1
    assert steps == 3 and state["document"]["pins"] == ["token/2"]
    state = edits.replace("a", state["revision"], {"pins": ["target/0"]})
    assert not state["can_redo"] and state["can_undo"]
    assert edits.state("b") == {"revision": 0, "document": empty_document(), "can_undo": False, "can_redo": False}


def test_the_first_edit_can_be_undone(tmp_path: Path) -> None:
    edits = edits_of(tmp_path)
    state = edits.undo("a", edits.replace("a", 0, {"pins": ["token/0"]})["revision"])
    assert state["document"] == empty_document() and state["can_redo"] and not state["can_undo"]


def test_documents_keep_what_they_hold() -> None:
    document = {
        "labels": {"0/5": "Texas → “Austin” ✓"}, "pins": ["0/0/5", "token/0", "0/0/5"],
        "groups": [{"name": "two", "nodes": ["1/0/6"], "collapsed": True}], "layout": {"two": [1, -2.5]},
    }  # fmt: skip
    checked = checked_document(document)
    assert checked == {**document, "pins": ["0/0/5", "token/0"], "layout": {"two": [1.0, -2.5]}}
    assert checked_document({}) == empty_document()


def test_links_of_both_pages_become_edits(tmp_path: Path) -> None:
    graph = by_hand()
    groups = json.dumps([["one, “two”", "0_5_0", "1_6_0", "9_9_0"], ["none", "8_8_0"]])
    clerps = json.dumps([[str(feature_id(1, 6)), "say Austin"], [f"0_{feature_id(0, 5)}_0", "capital"]])
    values = {"pinnedIds": "0_5_0,E_7_0,0_-1_0,3_40_0,5_5_0", "supernodes": groups, "clerps": clerps}
    once = "&".join(f"{name}={quote(value, safe='')}" for name, value in values.items())
    twice = "&".join(f"{name}={quote(quote(value, safe=''), safe='')}" for name, value in values.items())
    for text in (once, f"https://www.neuronpedia.org/gemma-2-2b/graph?slug=x&{once}", f"?{twice}"):
        document, notes = document_of_link(graph, text, empty_document())
        assert document["pins"] == ["0/0/5", "token/0", "error/0/0", "target/0"]
        assert document["groups"] == [{"name": "one, “two”", "nodes": ["0/0/5", "1/0/6"], "collapsed": True}]
        assert document["labels"] == {"1/6": "say Austin", "0/5": "capital"}
        assert notes == ["3 nodes of the link are not in this graph"]
    graph.save(tmp_path / "g.safetensors")
    with serving(tmp_path) as client:
        state = client.post("/api/graphs/g.safetensors/import", {"text": once})
        assert state["document"] == document and state["can_undo"]
        assert client.get("/api/graphs/g.safetensors/edits")["document"] == document


@pytest.mark.parametrize("flavour", ["circuit-tracer", "neuronpedia"])
def test_an_export_carries_groups_pins_and_labels(tmp_path: Path, flavour: str) -> None:
    random_graph().save(tmp_path / "g.safetensors")
    names = ["/".join(map(str, feature)) for feature in random_graph().features.tolist()]
    document = {
        "labels": {"/".join([names[0].split("/")[0], names[0].split("/")[2]]): "my label"}, "pins": [names[3]],
        "groups": [{"name": "mine", "nodes": names[:2], "collapsed": False}],
    }  # fmt: skip
    with serving(tmp_path) as client:
        client.post("/api/graphs/g.safetensors/edits", {"revision": 0, "document": document}, "PUT")
        _, headers, content = client.raw("GET", f"/api/graphs/g.safetensors/export.json?flavour={flavour}&scan=model")
        assert headers["content-type"] == "application/json"
        assert "g.json" in headers["content-disposition"]
        (tmp_path / "again.json").write_bytes(content)
        state = client.get("/api/graphs/again.json/edits")  # what another page would show is where its edits begin
        assert state["revision"] == 0 and state["document"]["pins"] == [*names[:2], names[3]]
        assert [(g["name"], g["nodes"]) for g in state["document"]["groups"]] == [("mine", names[:2])]
        graph = pc.Graph.from_json(tmp_path / "again.json")
        assert "my label" in graph.labels.values()
        edited = client.post("/api/graphs/again.json/edits", {"revision": 0, "document": {}}, "PUT")
        assert client.post("/api/graphs/again.json/edits/undo", edited)["document"] == state["document"]
        assert client.call("GET", "/api/graphs/g.safetensors/export.json?flavour=other")[0] == 400
    assert {path.name for path in tmp_path.iterdir()} == {"g.safetensors", "again.json", FILE}


def test_edits_outlive_a_changed_file(tmp_path: Path) -> None:
    graph = by_hand()
    graph.save(tmp_path / "g.safetensors")
    with serving(tmp_path) as client:
        document = {"pins": ["0/0/5"], "groups": [{"name": "x", "nodes": ["1/0/6"], "collapsed": False}]}
        client.post("/api/graphs/g.safetensors/edits", {"revision": 0, "document": document}, "PUT")
        assert client.get("/api/graphs/g.safetensors")["prompt"] == " w0"
        replace(graph, prompt="another").save(tmp_path / "g.safetensors")
        assert client.get("/api/graphs/g.safetensors")["prompt"] == "another"  # the file is read again
        random_graph().save(tmp_path / "g.safetensors")
        assert client.call("GET", "/api/graphs/g.safetensors/export.json")[0] == 200  # without the nodes it lacks
        assert client.get("/api/graphs/g.safetensors/edits")["document"]["pins"] == ["0/0/5"]
