"""The rows of one trace: swept tile by tile, or taken from a checkpoint, and ranked between rounds."""

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
from .memory_plan import Plan
from .precision import Arithmetic
from .row_store import Part, Store
from .sweep import Sweep
from .targets import Target, product_norm

_OUT_OF_MEMORY = (  # of torch on the CPU (twice), of Triton and the driver, of cuBLAS (twice)
    "can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
)  # fmt: skip
_GPU_BLOCK = 1 << 26  # numbers of encoder rows that a GPU looks at together


class Found:
    """Targets first, then features as they are chosen; within a round from the highest layer down, by position.

    layer, position, index, value: [features], every active feature of the prompt.
    """

    store: Store

    def __init__(
        self, local: LocalReplacement, targets: Sequence[Target], arithmetic: Arithmetic | None = None
    ) -> None:
        self.local, self.sweep, self.targets = local, Sweep(local, arithmetic), targets
        layers = range(len(local.features))
        position = [f.position() for f in local.features]
        self.layer = torch.cat([torch.full_like(p, at) for at, p in zip(layers, position, strict=True)])
        self.position = torch.cat(position)
        self.index = torch.cat([f.index for f in local.features])
        self.value = torch.cat([f.value for f in local.features])
        self.order = sorted(range(len(targets)), key=lambda t: (-targets[t].layer, targets[t].position))
        self._nodes: list[Tensor] = []  # of features with rows
        self._biases: list[Tensor] = []
        self.packing = 0.0  # seconds

    def start(
        self, plan: Plan, show: Progress, checkpoint: Checkpoint | None, rows: int, store: Store | None = None
    ) -> None:
        self.plan, self.show, self.checkpoint, self.total = plan, show, checkpoint, rows
        self.tile_bytes = plan.tile_bytes
        unpacked = 0 if plan.dense else self.sweep.columns.count * self.value.element_size()
        self.target_bytes = plan.edge_bytes or unpacked
        self.batch = min(rows, plan.batch or rows)
        self.sweep.reserve(self.tile_bytes, self.batch, self.target_bytes)
        self.store = self._store(rows) if store is None else store
        show.step("sweep", 0, rows)

    def _store(self, rows: int) -> Store:
        plan, targets = self.plan, self._most_targets()
        arguments = self.sweep.columns, self.value, rows, plan.dense, plan.keep, plan.entries, targets
        return DeviceStore(*arguments, plan.ranked_on_device) if self.value.is_cuda else Store(*arguments)

    def _most_targets(self) -> int:
        """Of a tile."""
        return min(self.batch, self.tile_bytes // max(1, self.target_bytes))

    @property
    def expanded(self) -> int:
        """How many features have a row."""
        return max(0, self.store.count - len(self.targets))

    def nodes(self) -> Tensor:
        """The features with a row, in the order of rows."""
        return self.row_features()[: self.expanded]

    def row_features(self) -> Tensor:
        """The features chosen for rows, those included whose rows are still being swept."""
        return torch.cat([self.layer.new_empty(0), *self._nodes])

    def add_targets(self) -> None:
        chosen = [self.targets[t] for t in self.order]
        vectors = torch.stack([t.vector for t in chosen])
        nodes = self.sweep.columns.count + torch.tensor(self.order)
        self._add(nodes, [t.layer for t in chosen], [t.position for t in chosen], lambda a, b: vectors[a:b])

    def add_features(self, chosen: Tensor) -> None:
        falling = torch.argsort(self.position[chosen], stable=True)
        chosen = chosen[falling]
        chosen = chosen[torch.argsort(self.layer[chosen], descending=True, stable=True)]
        self._nodes.append(chosen)
        layer, position = torch.stack([self.layer[chosen], self.position[chosen]]).tolist()
        encoders = self.local.transcoders.w_enc
        self._add(chosen, layer, position, lambda a, b: self._of(encoders, chosen[a:b], layer[a:b]))
        for w_enc in encoders:
            if w_enc is not None:
                memory_maps.drop_resident_pages(w_enc)

    def _of(self, weights: Sequence[Tensor], chosen: Tensor, layer: Sequence[int] | None = None) -> Tensor:
        """Each chosen feature's entry of its layer's encoder weights, in the order of `chosen`.

        layer: of each, where the host has them.
        """
        layers = self.layer[chosen].tolist() if layer is None else layer
        order = sorted(range(len(layers)), key=layers.__getitem__)
        if not order:
            return self.value[:0]
        back = torch.tensor(order, device=chosen.device)
        index, parts, begin = self.index[chosen[back]], [], 0
        for number, same in groupby(layers[i] for i in order):
            end = begin + len(list(same))
            parts.append(weights[number][index[begin:end]].to(self.local.model.dtype))
            begin = end
        return torch.cat(parts)[back.argsort()]

    def _add(self, nodes: Tensor, layer: list[int], position: list[int], vectors: Callable[[int, int], Tensor]) -> None:
        """Rows of targets sorted from the highest layer down. Each tile is kept whole or not at all."""
        done = 0
        while done < len(layer):
            saved = None if self.checkpoint is None else self.checkpoint.load(self.store.count, nodes[done:])
            if saved is not None:
                part, bias = saved
                self._biases.append(bias.to(self.value))
                end = done + len(part)
                self.store.restore(part, layer[done:end], position[done:end])
            else:
                tile = slice(done, done + self._fitting(layer[done:], position[done:]))
                end = done + self._swept(nodes[tile], layer[tile], position[tile], vectors, done)
            done = end
            self.show.step("sweep", self.store.count, self.total)

    def _fitting(self, layer: list[int], position: list[int]) -> int:
        return self.sweep.fitting(layer, position, self.tile_bytes, self.target_bytes)

    def _edges(self, layer: list[int], position: list[int], vectors: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Rows and biases of one tile; what it works with is gone if memory ran out."""
        rows = self.store.room(len(layer))
        return rows, self.sweep.tile(layer, position, vectors(), rows)

    def _swept(
        self,
        nodes: Tensor,
        layer: list[int],
        position: list[int],
        vectors: Callable[[int, int], Tensor],
        first: int,
    ) -> int:
        """Find and keep rows of these targets, from the first on; returns of how many. vectors: theirs from `first`."""
        while True:
            try:
                edges, bias = self._edges(layer, position, partial(vectors, first, first + len(layer)))
                break
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or len(layer) == 1:
                    raise
            # Only now, as the error held on to the tensors of the tile.
            self._shrink(len(layer))
            fewer = self._fitting(layer, position)
            layer, position = layer[:fewer], position[:fewer]
        begin = time.perf_counter()
        self.store.export_settled()
        check_rows(self, edges, bias)
        part = None
        if self.checkpoint is not None:
            part = self.store.pack(edges, layer, position)
            self.checkpoint.save(self.store.count, part, bias, nodes[: len(part)])
        self._biases.append(bias)
        self.store.add(edges, layer, position, part)
        self.packing += time.perf_counter() - begin
        return len(layer)

    def _shrink(self, count: int) -> None:
        """Half the tile, from now on; `count` rows that were begun are zero again."""
        if self.store.dense:
            self.store.room(count).zero_()
        self.tile_bytes //= 2
        self.store.release()
        self.store.targets = self._most_targets()
        self.sweep.release()
        self.sweep.reserve(self.tile_bytes, self.batch, self.target_bytes)
        if self.value.is_cuda:
            torch.cuda.empty_cache()

    def most_influential(self, count: int) -> Tensor:
        """Features without a row, by their influence on the targets through the rows there are; ties to the first."""
        outputs, nodes = len(self.targets), self.nodes()
        falling = torch.argsort(self.layer[nodes], descending=True, stable=True)
        order = torch.cat([torch.arange(outputs, device=falling.device), outputs + falling])
        node = torch.cat([torch.full_like(order[:outputs], -1), nodes[falling]])
        checks.known_bounds(order, 0, len(order) - 1)
        checks.known_bounds(node, -1, len(self.layer) - 1)
        weight = self.value.new_zeros(len(order))
        weight[:outputs] = weight.new_tensor([self.targets[t].weight for t in self.order])
        influence = self.store.influence(order, node, weight)[: len(self.layer)]
        influence[nodes] = -torch.inf
        return torch.sort(influence, descending=True, stable=True).indices[:count]

    def row_node(self) -> Tensor:
        """The node of each row: [rows], on the CPU."""
        first_target = self.sweep.columns.count
        return torch.cat([torch.tensor(self.order, device="cpu") + first_target, self.nodes().cpu()])

    def row_bias(self) -> Tensor:
        return torch.cat(self._biases)[: self.store.count]

    def preactivation(self) -> Tensor:
        """What edges and bias of every row must add up to: [rows] float64."""
        given = torch.tensor([self.targets[t].preactivation for t in self.order], dtype=torch.float64, device="cpu")
        nodes = self.nodes()
        own = self._of(self.local.transcoders.b_enc, nodes)
        return torch.cat([given, (self.value[nodes].double() - own.double()).cpu()])

    def product_norm(self) -> Tensor:
        """Norms of the products that each row's pre-activation is the sum of: [rows] float64."""
        norms = [torch.tensor([self.targets[t].product_norm for t in self.order], dtype=torch.float64, device="cpu")]
        expanded = self.nodes()
        numbers = PACK_BLOCK if self.value.device.type == "cpu" else _GPU_BLOCK
        step = max(1, numbers // self.local.model.width)
        for nodes in expanded.split(step) if len(expanded) else ():
            vectors = self._of(self.local.transcoders.w_enc, nodes)
            norms.append(product_norm(self.local, self.layer[nodes], self.position[nodes], vectors).cpu())
        return torch.cat(norms)

    def finish(self) -> Part:
        """All rows; what the sweep worked with is given back."""
        self.sweep.release()
        self.store.release()
        trim()
        return self.store.finish()


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)
