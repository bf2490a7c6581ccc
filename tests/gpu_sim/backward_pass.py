"""Tensor.backward in Python, node by node: torch's own engine asks a CUDA tensor for the streams of a real device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def backward(loss: Tensor) -> None:
    """Add the gradients of a number to its leaves."""
    gradients: dict[Any, list[Tensor | None]] = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        for node in _from_the_loss_down(loss.grad_fn):
            incoming = gradients.pop(node)
            if hasattr(node, "variable"):
                leaf, (gradient,) = node.variable, incoming
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            for (below, number), gradient in _edges(node, incoming):
                slots = gradients.setdefault(below, [None] * len(below._input_metadata))
                gradient = gradient.sum_to_size(below._input_metadata[number].shape)  # where it was broadcast
                slots[number] = gradient if slots[number] is None else slots[number] + gradient


def _edges(node: Any, incoming: list[Tensor | None]) -> list[tuple[tuple[Any, int], Tensor]]:
    """Return ((node below, number of its output), gradient) of every input that has a gradient."""
    outgoing = node.apply(*incoming) if hasattr(node, "apply") else node(*incoming)
    outgoing = outgoing if isinstance(outgoing, tuple) else (outgoing,)
    if len(outgoing) != len(node.next_functions):  # a function of the package returns None for what is no tensor
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        return list(zip(edges, (g for g in outgoing if g is not None), strict=True))
    pairs = zip(node.next_functions, outgoing, strict=True)
    return [(edge, gradient) for edge, gradient in pairs if edge[0] is not None and gradient is not None]


def _from_the_loss_down(first: Any) -> list[Any]:
    """Return the nodes, each before those that it hands its gradients to."""
    order: list[Any] = []
    seen, stack = set(), [(first, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((below, False) for below, _ in node.next_functions if below is not None)
    return order[::-1]
