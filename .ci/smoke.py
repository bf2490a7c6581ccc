"""Smoke test of an installed pycircuit: python smoke.py, in any folder but the repository's."""

from __future__ import annotations

import importlib.util

import pycircuit as pc

model = pc.load("demo")
graph = pc.attribute(model, "the capital of the state containing Dallas is", progress=False)
labels = [str(label).strip() for label in graph.targets.labels]
assert labels[0] == "Austin", labels
assert graph.certificate < 1e-5, graph.certificate
assert pc.last_run().implementation == "native", pc.last_run()
assert importlib.util.find_spec("pycircuit.pycircuit") is None
print(f"{pc.__file__}: {labels[0]}, certificate {graph.certificate:.1e}")
