"""The cost of `import pycircuit`, in modules, and its public names, which are imported at their first use."""

from __future__ import annotations

import ast
import json
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import pycircuit as pc

LIGHT = {"pycircuit", "pycircuit.command_interrupt"}


def _modules_after(statement: str) -> set[str]:
    """Modules that a new process has after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_leaves_everything_for_later() -> None:
    modules = _modules_after("import pycircuit")
    assert {name for name in modules if name.startswith("pycircuit")} == LIGHT
    assert not modules & {"torch", "numpy", "transformers", "importlib.metadata"}


def test_a_graph_needs_no_model() -> None:
    modules = _modules_after("import pycircuit; pycircuit.Graph")
    packages = {name.split(".")[1] for name in modules if name.startswith("pycircuit.")}
    assert "graph" in packages and not packages & {"model", "trace", "training", "interventions", "loading"}


def test_public_names_are_those_that_type_checkers_see() -> None:
    (block,) = [n for n in ast.parse(Path(pc.__file__).read_text()).body if isinstance(n, ast.If)]
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module is not None
    }
    assert imported == pc._HOME_OF
    assert set(pc.__all__) == {*imported, "graph", "ops"}


@pytest.mark.parametrize("name", pc.__all__)
def test_public_name_is_there_at_first_use(name: str) -> None:
    code = f"import pycircuit as pc; first = pc.{name}; assert first is pc.{name}"
    assert getattr(pc, name) is not None
    if name in ("load", "graph"):  # a process of its own takes seconds
        subprocess.run([sys.executable, "-c", code], check=True)


def test_help_shows_the_public_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(pc))
    assert "attribute(" in text and "class Graph" in text and "write_examples(" in text


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pycircuit' has no attribute 'atribute'"):
        pc.atribute  # type: ignore[attr-defined]  # noqa: B018
