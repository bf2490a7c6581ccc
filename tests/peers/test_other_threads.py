"""The application runs circuit-tracer's model in another thread while ours traces it."""

from __future__ import annotations

from threading import Thread, get_ident
from typing import Any

import pytest
import torch
from drop_in_cases import SETTINGS, ids, made

from pycircuit.integrations.circuit_tracer import attribute


def meanwhile(module: Any, act: Any) -> Any:
    """Have `act` done in another thread every time that this one calls a module."""
    thread = get_ident()

    def hook(*_: Any) -> None:
        if get_ident() == thread:
            other = Thread(target=act)
            other.start()
            other.join()

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("where", ["lens llama", "nnsight llama"])
def test_a_forward_in_another_thread(where: str) -> None:
    """It has its own numbers, and the graph is the quiet one's."""
    model = made(where, "plt")
    inner, seen = getattr(model, "_module", model), []
    layers = inner.model.layers if where.startswith("nnsight") else model.blocks

    def forward() -> None:
        with torch.no_grad():
            out = inner(ids()[None, :5])
        seen.append(getattr(out, "logits", out))

    quiet = attribute(ids(), model, **SETTINGS).adjacency_matrix
    alone = Thread(target=forward)  # a thread too: one more than this module's may be at its products
    alone.start()
    alone.join()
    handle = meanwhile(layers[1], forward)
    graph = attribute(ids(), model, **SETTINGS).adjacency_matrix
    handle.remove()
    assert len(seen) > 1 and all(torch.equal(out, seen[0]) for out in seen)
    assert torch.equal(graph, quiet)


def test_nnsights_forwards_stay_in_other_threads() -> None:
    """A module's forward is nnsight's there, all the while, and its own in the thread that traces."""
    model = made("nnsight llama", "plt")
    layer, calls, thread = model._module.model.layers[1].mlp, [], get_ident()
    before = vars(layer)["forward"]
    original = layer.__nnsight_forward__

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(get_ident())
        return original(*args, **kwargs)

    layer.__nnsight_forward__ = noted
    x = torch.zeros(1, 2, model._module.config.hidden_size)
    handle = meanwhile(model._module.model.layers[1], lambda: layer(x))
    attribute(ids(), model, **SETTINGS)
    handle.remove()
    assert calls and thread not in calls
    assert vars(layer)["forward"] is before
