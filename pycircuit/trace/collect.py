"""Rows of one trace: swept tile by tile, or read from a checkpoint, with features ranked between rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from pycircuit.files import memory_maps
from pycircuit.model.freed_memory import trim
from pycircuit.model.replacement import LocalReplacement
from pycircuit.ops import checks
from pycircuit.progress import Progress

from .checkpoint import Checkpoint
from .device_store import DeviceStore
from .finite import check_rows
from .memory_model import PACK_BLOCK
from .memory_plan import MemoryPlan
from .precision import Arithmetic
from .row_store import PackedRows, RowStore, StoreSize
from .sweep import Sweep
from .targets import Target, product_norm
from .upload import upload

_OUT_OF_MEMORY = (
    "can't allocate memory",  # torch on the CPU
    "not enough memory",  # torch on the CPU
    "out of memory",  # Triton and the driver
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)
_GPU_BLOCK = 1 << 26  # numbers of encoder rows that a GPU reads at a time


class RowCollector:
    """Edge rows of one trace: targets first, then features as they are chosen.

    Within a round, rows run from the highest layer down, by position.
    layer, position, index, value: [features], every active feature of the prompt.
    """

    def __init__(
        self,
        local: LocalReplacement,
        targets: Sequence[Target],
        plan: MemoryPlan,
        progress: Progress,
        rows: int,
        arithmetic: Arithmetic | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """rows: of targets and features together, at the most."""
        self.local, self.targets, self.plan = local, targets, plan
        self.progress, self.checkpoint, self.total = progress, checkpoint, rows
        self.sweep = Sweep(local, arithmetic)
        position = [features.position() for features in local.features]
        self.layer = torch.cat([torch.full_like(p, layer) for layer, p in enumerate(position)])
        self.position = torch.cat(position)
        self.index = torch.cat([features.index for features in local.features])
        self.value = torch.cat([features.value for features in local.features])
        self.order = sorted(range(len(targets)), key=lambda t: (-targets[t].layer, targets[t].position))
        self._nodes: list[Tensor] = []  # of features with rows
        self._biases: list[Tensor] = []
        self.packing_seconds = 0.0
        self.tile_bytes = plan.tile_bytes
        unpacked = 0 if plan.dense else self.sweep.columns.count * self.value.element_size()
        self.target_bytes = plan.edge_bytes or unpacked
        self.batch = min(rows, plan.batch or rows)
        trim()
        self.sweep.reserve(self.tile_bytes, self.batch, self.target_bytes)
        self.store = self._new_store()
        progress.step("sweep", 0, rows)

    def _new_store(self) -> RowStore:
        plan, columns = self.plan, self.sweep.columns
        size = StoreSize(self.total, plan.dense, plan.keep, plan.entries, self._max_tile_targets())
        if self.value.is_cuda:
            return DeviceStore(columns, self.value, size, plan.ranked_on_device)
        return RowStore(columns, self.value, size)

    def _max_tile_targets(self) -> int:
        return min(self.batch, self.tile_bytes // max(1, self.target_bytes))

    @property
    def expanded(self) -> int:
        """Number of features that have a row."""
        return max(0, self.store.count - len(self.targets))

    def nodes(self) -> Tensor:
        """Return the features that have a row, in the order of rows."""
        return self.row_features()[: self.expanded]

    def row_features(self) -> Tensor:
        """Return the features chosen for rows, with those whose rows are still being swept."""
        return torch.cat([self.layer.new_empty(0), *self._nodes])

    def add_targets(self) -> None:
        chosen = [self.targets[t] for t in self.order]
        vectors = torch.stack([t.vector for t in chosen])
        nodes = self.sweep.columns.count + torch.tensor(self.order)
        self._add(nodes, [t.layer for t in chosen], [t.position for t in chosen], lambda a, b: vectors[a:b])

    def add_features(self, chosen: Tensor) -> None:
        by_position = torch.argsort(self.position[chosen], stable=True)
        chosen = chosen[by_position]
        chosen = chosen[torch.argsort(self.layer[chosen], descending=True, stable=True)]
        self._nodes.append(chosen)
        layer, position = torch.stack([self.layer[chosen], self.position[chosen]]).tolist()
        encoders = self.local.transcoders.w_enc
        self._add(chosen, layer, position, lambda a, b: self._gather(encoders, chosen[a:b], layer[a:b]))
        for w_enc in encoders:
            if w_enc is not None:
                memory_maps.drop_resident_pages(w_enc)

    def _gather(self, weights: Sequence[Tensor], chosen: Tensor, layer: Sequence[int] | None = None) -> Tensor:
        """Return each chosen feature's entry of its layer's encoder weights, in the order of `chosen`.

        layer: of each feature, where the host has them.
        """
        layers = self.layer[chosen].tolist() if layer is None else layer
        by_layer = sorted(range(len(layers)), key=layers.__getitem__)
        if not by_layer:
            return self.value[:0]
        order = upload(by_layer, chosen.device)
        index = self.index[chosen[order]]
        gathered, begin = [], 0
        for number, group in groupby(layers[i] for i in by_layer):
            end = begin + len(list(group))
            gathered.append(weights[number][index[begin:end]].to(self.local.model.dtype))
            begin = end
        return torch.cat(gathered)[order.argsort()]

    def _add(self, nodes: Tensor, layer: list[int], position: list[int], vectors: Callable[[int, int], Tensor]) -> None:
        """Add rows of targets sorted from the highest layer down. Each tile is stored entirely or not at all."""
        done = 0
        while done < len(layer):
            saved = None if self.checkpoint is None else self.checkpoint.load(self.store.count, nodes[done:])
            if saved is not None:
                packed, bias = saved
                self._biases.append(bias.to(self.value))
                end = done + len(packed)
                self.store.restore(packed, layer[done:end], position[done:end])
            else:
                tile = slice(done, done + self._fitting(layer[done:], position[done:]))
                end = done + self._sweep_tile(nodes[tile], layer[tile], position[tile], vectors, done)
            done = end
            self.progress.step("sweep", self.store.count, self.total)

    def _fitting(self, layer: list[int], position: list[int]) -> int:
        return self.sweep.fitting(layer, position, self.tile_bytes, self.target_bytes)

    def _edges(self, layer: list[int], position: list[int], vectors: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Return (edges, biases) of one tile. Its temporary tensors are local, so an error frees them."""
        block = self.store.next_block(len(layer))
        return block, self.sweep.tile(layer, position, vectors(), block)

    def _sweep_tile(
        self,
        nodes: Tensor,
        layer: list[int],
        position: list[int],
        vectors: Callable[[int, int], Tensor],
        first: int,
    ) -> int:
        """Sweep and store rows of these targets, or of fewer where memory runs out; return of how many.

        vectors: of the targets from `first` on.
        """
        while True:
            try:
                edges, bias = self._edges(layer, position, partial(vectors, first, first + len(layer)))
                break
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or len(layer) == 1:
                    raise
            # After the handler, as the error refers to the tensors of the tile.
            self._shrink(len(layer))
            fewer = self._fitting(layer, position)
            layer, position = layer[:fewer], position[:fewer]
        begin = time.perf_counter()
        self.store.export_committed()
        check_rows(self, edges, bias)
        packed = None
        if self.checkpoint is not None:
            packed = self.store.pack(edges, layer, position)
            self.checkpoint.save(self.store.count, packed, bias, nodes[: len(packed)])
        self._biases.append(bias)
        self.store.add(edges, layer, position, packed)
        self.packing_seconds += time.perf_counter() - begin
        return len(layer)

    def _shrink(self, count: int) -> None:
        """Halve the tile from now on, and set the `count` rows that were begun to zero again."""
        if self.store.dense:
            self.store.next_block(count).zero_()
        self.tile_bytes //= 2
        self.store.release()
        self.store.tile_targets = self._max_tile_targets()
        self.sweep.release()
        self.sweep.reserve(self.tile_bytes, self.batch, self.target_bytes)
        if self.value.is_cuda:
            torch.cuda.empty_cache()

    def most_influential(self, count: int) -> Tensor:
        """Return the features without a row that influence the targets most through the rows; of equals the first."""
        outputs, nodes = len(self.targets), self.nodes()
        by_layer = torch.argsort(self.layer[nodes], descending=True, stable=True)
        order = torch.cat([torch.arange(outputs, device=by_layer.device), outputs + by_layer])
        node = torch.cat([torch.full_like(order[:outputs], -1), nodes[by_layer]])
        checks.known_bounds(order, 0, len(order) - 1)
        checks.known_bounds(node, -1, len(self.layer) - 1)
        weight = self.value.new_zeros(len(order))
        weight[:outputs] = weight.new_tensor([self.targets[t].weight for t in self.order])
        influence = self.store.influence(order, node, weight)[: len(self.layer)]
        influence[nodes] = -torch.inf
        return torch.sort(influence, descending=True, stable=True).indices[:count]

    def row_node(self) -> Tensor:
        """Return the node of each row: [rows], on the CPU."""
        first_target = self.sweep.columns.count
        return torch.cat([torch.tensor(self.order, device="cpu") + first_target, self.nodes().cpu()])

    def row_bias(self) -> Tensor:
        return torch.cat(self._biases)[: self.store.count]

    def preactivation(self) -> Tensor:
        """Return the sum that edges and bias of every row must have: [rows] float64."""
        outputs = [self.targets[t].preactivation for t in self.order]
        nodes = self.nodes()
        b_enc = self._gather(self.local.transcoders.b_enc, nodes)
        features = (self.value[nodes].double() - b_enc.double()).cpu()
        return torch.cat([torch.tensor(outputs, dtype=torch.float64, device="cpu"), features])

    def product_norm(self) -> Tensor:
        """Return norms of the products that each row's pre-activation is the sum of: [rows] float64."""
        norms = [torch.tensor([self.targets[t].product_norm for t in self.order], dtype=torch.float64, device="cpu")]
        expanded = self.nodes()
        numbers = PACK_BLOCK if self.value.device.type == "cpu" else _GPU_BLOCK
        step = max(1, numbers // self.local.model.width)
        for nodes in expanded.split(step) if len(expanded) else ():
            vectors = self._gather(self.local.transcoders.w_enc, nodes)
            norms.append(product_norm(self.local, self.layer[nodes], self.position[nodes], vectors).cpu())
        return torch.cat(norms)

    def finish(self) -> PackedRows:
        """Free what the sweep worked with and return all rows."""
        self.sweep.release()
        self.store.release()
        trim()
        return self.store.finish()


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
