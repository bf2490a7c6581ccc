"""Decoders left in their files: the rows of a prompt's active features are read once, and cached while it lives.

Memory: the distinct active rows of the features in use, at most `cache` bytes of them; above, they are read again.
"""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from threading import RLock
from typing import Any, Protocol

import torch
from torch import Tensor

from pycircuit.files.reading import FileState, read_into
from pycircuit.ops import FileRows, SparseFeatures
from pycircuit.ops.file_rows import DTYPES

THREADS = 8  # readers of one file: a disk answers several questions at once
_PARALLEL = 4 << 20  # bytes from which on threads are worth starting
_VECTOR = 512  # rows in one call of the system, which takes at most 1,024
_CHECKED = 1 << 18  # entries looked at together: they stay in the cache
_EXPONENT = {  # bits that are all ones in NaN and infinity
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


class Plane(Protocol):
    """Rows of a decoder in a file: [features, (slots,) width]."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def stride(self) -> int: ...
    @property
    def state(self) -> FileState | None: ...


@dataclass(frozen=True)
class CacheEntry:
    """Rows that were read, and the features and the decoder they belong to while those live."""

    index: weakref.ref[Tensor]
    owner: weakref.ref[LazyRows]
    compact: SparseFeatures
    rows: Tensor
    version: int


class RowCache:
    """Rows that were read, by the features they were read for; the longest unused go first above `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._lock = RLock()
        self._entries: OrderedDict[tuple[int, int], CacheEntry] = OrderedDict()

    def __reduce__(self) -> tuple[type[RowCache], tuple[int]]:
        """Copies, also in other processes, begin empty."""
        return RowCache, (self.limit,)

    def get(self, rows: LazyRows, features: SparseFeatures) -> tuple[SparseFeatures, Tensor] | None:
        """Features numbered anew over their rows, and those rows, if they were read before."""
        with self._lock:
            key = (id(rows), id(features.index))
            entry = self._entries.get(key)
            if entry is None or entry.index() is not features.index or entry.owner() is not rows:
                return None
            if entry.version != _version(features.index):
                return None
            self._entries.move_to_end(key)
            return SparseFeatures(features.row_ptr, entry.compact.index, features.value), entry.rows

    def put(self, rows: LazyRows, features: SparseFeatures, compact: SparseFeatures, read: Tensor) -> None:
        """Cache the rows that were read for these features."""
        size = read.nbytes
        if size > self.limit:
            return
        key = (id(rows), id(features.index))
        with self._lock:
            self._drop(key)
            index = weakref.ref(features.index, lambda _: self._drop(key))
            owner = weakref.ref(rows, lambda _: self._drop(key))
            self._entries[key] = CacheEntry(index, owner, compact, read, _version(features.index))
            self.size += size
            while self.size > self.limit:
                self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[int, int]) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.size -= entry.rows.nbytes


def _version(t: Tensor) -> int:
    """The number of writes to a tensor; in inference mode nobody counts."""
    return 0 if t.is_inference() else t._version


@dataclass(frozen=True, eq=False)
class LazyRows(FileRows):
    """A decoder [features, width] or [features, slots, width] in one file, or slot by slot in several.

    planes: the complete decoder, or one [features, width] for each slot. wanted: the type of the rows that come out;
    None: as ops take what is stored. cache: of rows that were read. gain ([(slots,) width], or what stretches to that)
    and share ([features]) multiply the rows, in float32 at the least.
    """

    planes: tuple[Plane, ...] = ()
    wanted: torch.dtype | None = None
    cache: RowCache = field(default_factory=lambda: RowCache(0))
    gain: Tensor | None = None
    share: Tensor | None = None

    DTYPES = tuple(DTYPES.values())

    @classmethod
    def of(
        cls,
        planes: Sequence[Any],
        stacked: bool,
        wanted: torch.dtype | None,
        cache: RowCache,
        gain: Tensor | None = None,
        share: Tensor | None = None,
    ) -> LazyRows:
        """A decoder of these planes. stacked: planes are slots, otherwise there is one, which holds them all."""
        first = planes[0]
        shape = (first.shape[0], len(planes), *first.shape[1:]) if stacked else tuple(first.shape)
        return cls(first.path, first.offset, shape, first.dtype, tuple(planes), wanted, cache, gain, share)

    def __post_init__(self) -> None:
        for plane in self.planes:
            needed = (plane.shape[0] - 1) * plane.stride + prod(plane.shape[1:]) * plane.dtype.itemsize
            size = os.stat(plane.path).st_size
            if plane.shape[0] and plane.offset + needed > size:
                raise ValueError(
                    f"load: {plane.path} must hold {needed} bytes of {plane.name} from {plane.offset} on, "
                    f"got a file of {size} bytes"
                )

    @property
    def dtype(self) -> torch.dtype:
        if self.wanted is not None:
            return self.wanted
        scaled = self.gain is not None or self.share is not None
        return torch.float32 if scaled and self.stored == torch.bfloat16 else super().dtype

    @property
    def reading(self) -> int:
        """Bytes of an entry, besides the one that comes out, while it is read and converted."""
        scaled = self.gain is not None or self.share is not None
        return self.stored.itemsize + (8 if scaled else 0) if scaled or self.stored != self.dtype else 0

    def to(self, *args: Any, **kwargs: Any) -> LazyRows:
        """A copy whose rows are converted as they are read; they come out on the device of the features."""
        return replace(self, wanted=torch.empty(0, dtype=self.dtype).to(*args, **kwargs).dtype)

    def slot(self, slot: int) -> Slot:
        """One slot: [features, width]."""
        return Slot(self.path, self.offset, (self.shape[0], self.shape[2]), self.stored, self, slot)

    def gather(self, features: SparseFeatures) -> tuple[SparseFeatures, Tensor]:
        """Features numbered anew over the rows they use, and those rows: [distinct, (slots,) width]."""
        cached = self.cache.get(self, features)
        if cached is not None:
            return cached
        used, renumbered = features.index.unique(sorted=True, return_inverse=True)
        rows = self.placed(self.rows(used), features.index.device)
        compact = SparseFeatures(features.row_ptr, renumbered, features.value)
        self.cache.put(self, features, compact, rows)
        return compact, rows

    def __getitem__(self, index: Tensor) -> Tensor:
        """Rows of these features, in any order: [len(index), (slots,) width], as of a tensor."""
        used, back = index.unique(sorted=True, return_inverse=True)
        return self.placed(self.rows(used), index.device)[back]

    def placed(self, rows: Tensor, device: Any) -> Tensor:
        """Rows in the type of the decoder, on a device."""
        return in_dtype(f"{self.path}: {self.planes[0].name}", rows, self.dtype).to(device)

    def rows(self, used: Tensor) -> Tensor:
        """Rows of these features, which rise: [distinct, (slots,) width], as stored where nothing multiplies them."""
        used = used.cpu()  # files are read there, and share lies there
        out = torch.empty(len(used), *self.shape[1:], dtype=self.stored)
        single = len(self.planes) == 1 and self.planes[0].shape == self.shape
        targets = [out] if single else [out[:, slot] for slot in range(len(self.planes))]
        for plane, target in zip(self.planes, targets, strict=True):
            _read(plane, used.tolist(), target)
        return self._multiplied(out, used)

    def _multiplied(self, rows: Tensor, used: Tensor) -> Tensor:
        for factor in (self.gain, None if self.share is None else self.share[used].view(-1, *[1] * (rows.ndim - 1))):
            if factor is not None:
                rows = rows.double().mul_(factor).to(self.dtype)
        return rows


@dataclass(frozen=True, eq=False)
class Slot(FileRows):
    """One slot of a decoder in a file: rows are read for all slots at once, and shared."""

    owner: LazyRows
    slot: int

    def __post_init__(self) -> None:
        if not 0 <= self.slot < self.owner.shape[1]:
            raise ValueError(f"Slot: slot must be one of {self.owner.shape[1]} slots, got {self.slot}")

    @property
    def dtype(self) -> torch.dtype:
        return self.owner.dtype

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.owner[index][:, self.slot]

    def gather(self, features: SparseFeatures) -> tuple[SparseFeatures, Tensor]:
        compact, rows = self.owner.gather(features)
        return compact, rows[:, self.slot]


def cached_row_bytes(decoders: Sequence[Any], features: Sequence[SparseFeatures], growth: float = 1.0) -> int:
    """Bytes of decoder rows while features of each layer are in use, and of reading the largest layer's.

    Above the cache's bound a layer's rows are read again each time, and are there beside what it holds. growth: how
    many times these features the prompt has.
    """
    lazy = [(d, f) for d, f in zip(decoders, features, strict=True) if isinstance(d, LazyRows)]
    if not lazy:
        return 0
    counts = [min(d.shape[0], ceil(growth * len(f.index.unique()))) for d, f in lazy]
    sizes = [count * prod(d.shape[1:]) * d.dtype.itemsize for (d, _), count in zip(lazy, counts, strict=True)]
    reading = max(size * d.reading / d.dtype.itemsize for (d, _), size in zip(lazy, sizes, strict=True))
    limit = sum({id(d.cache): d.cache.limit for d, _ in lazy}.values())
    return int(reading) + (sum(sizes) if sum(sizes) <= limit else limit + max(sizes))


def _read(plane: Plane, used: list[int], out: Tensor) -> None:
    """Fill out, [len(used), ...] with contiguous rows, by several threads where there is much to read."""
    size = prod(plane.shape[1:]) * plane.dtype.itemsize
    if not used or not size:
        return
    count = THREADS if len(used) * size >= _PARALLEL else 1
    bounds = [len(used) * n // count for n in range(count + 1)]
    try:
        file = os.open(plane.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(plane, error) from None
    try:
        if plane.state is not None:
            plane.state.check(plane.path, os.fstat(file))
        if count == 1:
            _read_rows(file, plane, used, out)
        else:
            with ThreadPoolExecutor(count) as pool:
                spans = [(begin, end) for begin, end in pairwise(bounds) if begin < end]
                list(pool.map(lambda span: _read_rows(file, plane, used[slice(*span)], out[slice(*span)]), spans))
    except OSError as error:
        raise _unreadable(plane, error) from None
    finally:
        os.close(file)


def _unreadable(plane: Plane, error: OSError) -> OSError:
    return type(error)(f"load: {plane.path} must stay readable while in use, got {error.strerror or error}")


def _read_rows(file: int, plane: Plane, used: list[int], out: Tensor) -> None:
    """Fill out with rows of ascending features; neighbouring rows in one read."""
    size = prod(plane.shape[1:]) * plane.dtype.itemsize
    stride = out.stride(0) * out.element_size()
    flat = out.as_strided((max(0, (len(used) - 1) * out.stride(0) + size // out.element_size()),), (1,))
    buffer = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    adjacent = plane.stride == size
    breaks = [i for i, row in enumerate(used) if i == 0 or not adjacent or row != used[i - 1] + 1]
    for first, last in pairwise([*breaks, len(used)]):
        for begin in range(first, last, _VECTOR):
            end = min(begin + _VECTOR, last)
            if stride == size:
                buffers = [buffer[begin * size : end * size]]
            else:
                buffers = [buffer[i * stride : i * stride + size] for i in range(begin, end)]
            read_into(file, buffers, plane.offset + used[begin] * plane.stride, plane.path)
    _check_finite(plane, used, out)  # while other threads wait for the disk


def is_finite(t: Tensor) -> bool:
    """True if no entry is NaN or infinite, by the bits of exponents: as fast as reading memory once."""
    kind, mask = _EXPONENT[t.dtype]
    bits = (t if t.ndim else t[None]).view(kind).numpy()
    step = max(1, _CHECKED // max(1, bits[:1].size))
    chunks = (bits[begin : begin + step] for begin in range(0, len(bits), step))
    return all(not chunk.size or int((chunk & mask).max()) != mask for chunk in chunks)


def in_dtype(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type, whose range must hold every number."""
    out = t.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(t.dtype).max and not is_finite(out):
        raise ValueError(
            f"load: {name} must hold numbers of {dtype}, whose largest is {torch.finfo(dtype).max:g}, got "
            f"{float(t[~out.isfinite()].flatten()[0]):g}; choose another dtype"
        )
    return out


def _check_finite(plane: Plane, used: Sequence[int], rows: Tensor) -> None:
    if not is_finite(rows):
        row = used[int((~rows.flatten(1).isfinite().all(1)).nonzero()[0, 0])]
        raise ValueError(
            f"load: {plane.path}: {plane.name} must hold finite numbers, got NaN or infinity in row {row}; "
            "is the file damaged?"
        )
