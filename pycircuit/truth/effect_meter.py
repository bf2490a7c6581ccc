"""Effects of features in the model, and in the one whose MLPs are transcoders and the errors of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pycircuit.graph import Graph, Supernode
from pycircuit.interventions.graph_effects import RowReader
from pycircuit.interventions.intervention import Freeze, Frozen, Intervention
from pycircuit.interventions.intervention_run import BATCH_POSITIONS, BaselineRun, InterventionRun, State, run_baseline
from pycircuit.interventions.steering import Placed, Steering, changes_by_layer
from pycircuit.model import ReplacementModel
from pycircuit.ops import SparseFeatures, decode
from pycircuit.ops.torch_settings import full_float32, without_autocast


class ReplacementRun(InterventionRun):
    """A batch of changed forwards whose MLPs are reconstructions, with the errors that the prompt had.

    errors: [layers, positions, width], what the reconstruction misses on the prompt. A forward that overflows is NaN
    from there on, and does not disturb the others of the batch.
    """

    def __init__(
        self, baseline: BaselineRun, steering: Steering, frozen: Frozen, rows: int, first: int, errors: Tensor
    ) -> None:
        super().__init__(baseline, steering, frozen, rows, first)
        self.errors = errors
        self.features: dict[int, SparseFeatures] = {}
        self.overflowed = errors.new_zeros(rows, dtype=torch.bool)

    def _read(self, layer: int, x: Tensor) -> None:
        super()._read(layer, x)
        ignore = self.baseline.model.ignore_positions
        self.overflowed |= ~x.isfinite().flatten(1).all(1)
        readable = x.masked_fill(self.overflowed[:, None, None], 0.0)
        self.features[layer] = self.baseline.model.transcoders.encode(layer, readable[:, ignore:].flatten(0, 1))

    def _write(self, layer: int, y: Tensor) -> Tensor:
        out = self.errors[layer].expand_as(y).clone()
        out[self.overflowed] = torch.nan
        transcoders, ignore = self.baseline.model.transcoders, self.baseline.model.ignore_positions
        after = out[:, ignore:]
        for source in transcoders.sources(layer):
            if source < self.first:
                after += decode(self.baseline.state.features[source], transcoders.decoder(source, layer))[ignore:]
            elif self.features[source].count:
                after += decode(self.features[source], transcoders.decoder(source, layer)).view_as(after)
        bias, skip = transcoders.bias(layer), transcoders.w_skip[layer]
        if bias is not None:
            after += bias
        if skip is not None:
            out += self.transcoder_inputs[:, layer - self.first] @ skip
        return self.steering.write(layer, out)


def _scaled(place: list[int], factor: float) -> Intervention:
    layer, position, feature = place
    return Intervention(layer, position, feature, factor=factor)


class EffectMeter:
    """Changes of a graph's rows when its features change, in the model and in the replacement model."""

    def __init__(self, model: ReplacementModel, graph: Graph) -> None:
        self.model = model
        self.places = graph.features.tolist()
        self.rows = RowReader(model, graph)
        with model.forward_lock:
            self.baseline = run_baseline(model, graph.tokens.ids, patterns=True)
        state = self.baseline.state
        self.errors = self.baseline.written.clone()
        inputs = state.transcoder_inputs
        model.transcoders.add_to(self.errors, state.features, inputs, model.ignore_positions, sign=-1.0)

    @without_autocast()
    @full_float32()
    def changes(
        self, groups: Sequence[Supernode], factors: Sequence[float], freeze: Freeze, replaced: bool = False
    ) -> np.ndarray:
        """Changes of every row when the features of a group are multiplied: [factors, groups, rows].

        replaced: in the replacement model.
        """
        frozen = Frozen.checked("benchmark-truth", freeze, None, self.model.depth)
        variants = [(group, factor) for factor in factors for group in groups]
        step = max(1, BATCH_POSITIONS // self.baseline.positions)
        out: list[np.ndarray] = []
        for begin in range(0, len(variants), step):
            batch = variants[begin : begin + step]
            placed = [
                (row, self.places[node][1], _scaled(self.places[node], factor))
                for row, (group, factor) in enumerate(batch)
                for node in group.nodes
            ]
            with self.model.forward_lock:
                states = self._run(placed, frozen, len(batch), replaced)
            out += [self.rows.changes(state, self.baseline.state).numpy() for state in states]
        return np.stack(out).reshape(len(factors), len(groups), -1)

    def _run(self, placed: list[Placed], frozen: Frozen, count: int, replaced: bool) -> list[State]:
        baseline = self.baseline
        by_layer = changes_by_layer(placed, baseline.state.final)
        steering = Steering(self.model.transcoders, by_layer, baseline.original, frozen.layers, frozen.written)
        if replaced:
            return ReplacementRun(baseline, steering, frozen, count, min(by_layer), self.errors).run()
        return InterventionRun(baseline, steering, frozen, count, min(by_layer)).run()
