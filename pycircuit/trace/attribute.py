"""From a model and a prompt to an attribution graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.graph import Graph, Rows, Targets, Tokens
from pycircuit.model.replacement import LocalReplacement, ReplacementModel

from .sweep import Sweep
from .targets import Target, choose


class _Trace:
    """Rows found so far: targets first, then features in the order they were expanded."""

    def __init__(self, local: LocalReplacement) -> None:
        self.local, self.sweep = local, Sweep(local)
        layers = range(len(local.features))
        position = [f.position() for f in local.features]
        self.layer = torch.cat([torch.full_like(p, at) for at, p in zip(layers, position, strict=True)])
        self.position = torch.cat(position)
        self.index = torch.cat([f.index for f in local.features])
        self.value = torch.cat([f.value for f in local.features])
        self.blocks: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.expanded = self.layer.new_empty(0)
        self.weights = self.value.new_empty(0)

    def add_targets(self, targets: Sequence[Target]) -> None:
        layer, position = ([getattr(t, name) for t in targets] for name in ("layer", "position"))
        vectors = torch.stack([t.vector for t in targets])
        where = self.layer.device
        self._add(torch.tensor(layer, device=where), torch.tensor(position, device=where), vectors)
        self.weights = torch.tensor([t.weight for t in targets], dtype=self.value.dtype, device=where)

    def add_features(self, chosen: Tensor) -> None:
        if len(chosen):
            vectors = self._of(self.local.transcoders.w_enc, chosen)
            self._add(self.layer[chosen], self.position[chosen], vectors)
        self.expanded = torch.cat([self.expanded, chosen])

    def _of(self, weights: Sequence[Tensor], chosen: Tensor) -> Tensor:
        """Each chosen feature's entry of its layer's encoder weights, in the order of `chosen`."""
        layer, index = self.layer[chosen], self.index[chosen]
        layers = layer.unique().tolist()
        parts = [weights[at][index[layer == at]].to(self.local.model.dtype) for at in layers]
        back = torch.cat([(layer == at).nonzero()[:, 0] for at in layers]).argsort()
        return torch.cat(parts)[back]

    def _add(self, layer: Tensor, position: Tensor, vectors: Tensor) -> None:
        rows, bias = self.sweep.rows(layer, position, vectors)
        self.blocks.append(rows)
        self.biases.append(bias)

    def rows(self) -> Tensor:
        """[rows, columns], kept as one block from now on."""
        self.blocks = [torch.cat(self.blocks)] if len(self.blocks) > 1 else self.blocks
        return self.blocks[0]

    def most_influential(self, count: int) -> Tensor:
        """Features without a row, by their influence on the targets through the rows there are; ties to the first."""
        rows, outputs = self.rows(), len(self.weights)
        falling = torch.argsort(self.layer[self.expanded], descending=True, stable=True)
        order = torch.cat([torch.arange(outputs, device=falling.device), outputs + falling])
        node = torch.cat([torch.full_like(order[:outputs], -1), self.expanded[falling]])
        weight = torch.cat([self.weights, self.weights.new_zeros(len(falling))])
        influence = ops.influence(rows[order], node, weight)[: len(self.layer)]
        influence[self.expanded] = -1
        return torch.sort(influence, descending=True, stable=True).indices[:count]

    def preactivation(self, targets: Sequence[Target]) -> Tensor:
        """What edges and bias of every row must add up to: [rows] float64."""
        found = torch.tensor([t.preactivation for t in targets], dtype=torch.float64)
        if not len(self.expanded):
            return found
        own = self._of(self.local.transcoders.b_enc, self.expanded)
        return torch.cat([found, (self.value[self.expanded].double() - own.double()).cpu()])


def attribute(
    model: ReplacementModel,
    prompt: str | Sequence[int] | Tensor,
    targets: Any = None,
    max_features: int | None = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    round_size: int | None = None,
) -> Graph:
    """The graph of direct effects on the targets and on the features that matter to them.

    targets: None takes the likeliest next tokens up to `probability`, at most max_targets; or a list of token ids,
    token strings, (label, weight, direction) or pc.Feature. position: where the outputs are read, one or several.
    max_features: how many features get a row of their own, the most influential first, chosen in rounds of
    round_size (default an eighth of them, at least 64); None: all.
    """
    begin = time.perf_counter()
    local = model.freeze(prompt)
    forward = time.perf_counter() - begin
    graph = trace_frozen(model, local, targets, max_features, position, probability, max_targets, round_size)
    graph.timings["forward"] = forward + graph.timings["forward"]
    return graph


def trace_frozen(
    model: ReplacementModel,
    local: LocalReplacement,
    targets: Any = None,
    max_features: int | None = None,
    position: int | Sequence[int] = -1,
    probability: float = 0.95,
    max_targets: int = 10,
    round_size: int | None = None,
) -> Graph:
    """The graph of a prompt that `model.freeze` has frozen; the other arguments as `attribute` takes them."""
    if max_features is not None and (isinstance(max_features, bool) or not isinstance(max_features, int)):
        raise TypeError(f"attribute: max_features must be an int or None, got {type(max_features).__name__}")
    if max_features is not None and max_features < 0:
        raise ValueError(f"attribute: max_features must not be negative, got {max_features}")
    clock = {"start": time.perf_counter()}
    chosen = choose(model, local, targets, position, probability, max_targets)
    trace = _Trace(local)
    clock["forward"] = time.perf_counter()
    trace.add_targets(chosen)
    total = len(trace.layer)
    wanted = total if max_features is None else min(max_features, total)
    ranking = 0.0
    while (left := wanted - len(trace.expanded)) > 0:
        begin = time.perf_counter()
        step = left if wanted == total else min(left, round_size or max(64, wanted // 8))
        picked = torch.arange(total) if wanted == total else trace.most_influential(step)
        ranking += time.perf_counter() - begin
        trace.add_features(picked)
    clock["sweep"] = time.perf_counter()
    timings = {
        "forward": clock["forward"] - clock["start"],
        "sweep": clock["sweep"] - clock["forward"] - ranking,
        "ranking": ranking,
    }
    return _graph(model, trace, chosen, timings, max_features)


def _graph(
    model: ReplacementModel, trace: _Trace, targets: list[Target], timings: dict[str, float], max_features: int | None
) -> Graph:
    begin, frozen = time.perf_counter(), trace.local.model
    rows, _, _ = Rows.from_dense(trace.rows())
    text = [str(t) if model.tokenizer is None else str(model.tokenizer.decode([t])) for t in frozen.tokens.tolist()]
    first_target = trace.sweep.columns.count
    nodes = torch.cat([torch.arange(len(targets)) + first_target, trace.expanded.cpu()])
    graph = Graph(
        features=torch.stack([trace.layer, trace.position, trace.index], 1),
        values=trace.value,
        rows=rows,
        row_node=nodes,
        bias=torch.cat(trace.biases),
        preactivation=trace.preactivation(targets),
        targets=Targets(
            [t.label for t in targets],
            torch.tensor([t.token for t in targets]),
            torch.tensor([t.weight for t in targets], dtype=torch.float64),
            torch.tensor([t.position for t in targets]),
        ),
        tokens=Tokens(frozen.tokens, text),
        layers=len(frozen.layers),
        prompt="".join(text),
        vocab_size=frozen.unembedding.shape[0],
        timings=timings,
        provenance={"model": model.family.model_type, "max_features": max_features, "dtype": str(frozen.dtype)},
    )
    timings["graph"] = time.perf_counter() - begin
    return graph
