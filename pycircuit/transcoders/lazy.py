"""Decoders left in their files: the rows of a prompt's active features are read once, and kept while it lives.

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

from pycircuit.ops import FileRows, SparseFeatures
from pycircuit.ops.file_rows import DTYPES

from .resident_pages import State

THREADS = 8  # readers of one file: a disk answers several questions at once
_PARALLEL = 4 << 20  # bytes from which on threads are worth starting
_VECTOR = 512  # rows in one call of the system, which takes at most 1,024
_CHECKED = 1 << 18  # entries looked at together: they stay in the cache
_EXPONENT = {  # all ones in what is NaN or infinite
    torch.bfloat16: (torch.int16, 0x7F80), torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000),
}  # fmt: skip


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
    def state(self) -> State | None: ...


class Cache:
    """Rows that were read, by the features they were read for; the longest unused go first above `most` bytes."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._lock = RLock()
        self._found: OrderedDict[tuple[int, int], tuple[Any, Any, SparseFeatures, Tensor, int]] = OrderedDict()

    def __reduce__(self) -> tuple[type[Cache], tuple[int]]:
        """Copies, also in other processes, begin empty."""
        return Cache, (self.most,)

    def get(self, rows: LazyRows, features: SparseFeatures) -> tuple[SparseFeatures, Tensor] | None:
        with self._lock:
            key = (id(rows), id(features.index))
            entry = self._found.get(key)
            if entry is None or entry[0]() is not features.index or entry[1]() is not rows:
                return None
            if entry[4] != _version(features.index):
                return None
            self._found.move_to_end(key)
            return SparseFeatures(features.row_ptr, entry[2].index, features.value), entry[3]

    def put(self, rows: LazyRows, features: SparseFeatures, compact: SparseFeatures, read: Tensor) -> None:
        size = read.numel() * read.element_size()
        if size > self.most:
            return
        key = (id(rows), id(features.index))
        with self._lock:
            self._drop(key)
            used, owner = (weakref.ref(of, lambda _: self._drop(key)) for of in (features.index, rows))
            self._found[key] = (used, owner, compact, read, _version(features.index))
            self.held += size
            while self.held > self.most:
                self._drop(next(iter(self._found)))

    def _drop(self, key: tuple[int, int]) -> None:
        with self._lock:
            entry = self._found.pop(key, None)
            if entry is not None:
                self.held -= entry[3].numel() * entry[3].element_size()


def _version(t: Tensor) -> int:
    """How often it was written to; in inference mode nobody counts."""
    return 0 if t.is_inference() else t._version


@dataclass(frozen=True, eq=False)
class LazyRows(FileRows):
    """A decoder [features, width] or [features, slots, width] in one file, or slot by slot in several.

    planes: the one place of it, or one [features, width] for each slot. wanted: the type of the rows that come out;
    None: as ops take what is stored. cache: where rows that were read are kept. gain ([(slots,) width], or what
    stretches to that) and share ([features]) multiply the rows, in float32 at the least.
    """

    planes: tuple[Plane, ...] = ()
    wanted: torch.dtype | None = None
    cache: Cache = field(default_factory=lambda: Cache(0))
    gain: Tensor | None = None
    share: Tensor | None = None

    DTYPES = tuple(DTYPES.values())

    @classmethod
    def of(
        cls, planes: Sequence[Any], stacked: bool, wanted: torch.dtype | None, cache: Cache,
        gain: Tensor | None = None, share: Tensor | None = None,
    ) -> LazyRows:  # fmt: skip
        """stacked: planes are slots, otherwise there is one, which holds them all."""
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

    def to(self, *where: Any, **how: Any) -> LazyRows:
        """As of a tensor: another type is given to rows as they are read; their place is that of who asks for them."""
        return replace(self, wanted=torch.empty(0, dtype=self.dtype).to(*where, **how).dtype)

    def slot(self, at: int) -> Slot:
        """[features, width] of one slot."""
        return Slot(self.path, self.offset, (self.shape[0], self.shape[2]), self.stored, self, at)

    def gather(self, features: SparseFeatures) -> tuple[SparseFeatures, Tensor]:
        """The same features numbered anew over the rows they use, and those rows: [distinct, (slots,) width]."""
        held = self.cache.get(self, features)
        if held is not None:
            return held
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
        """Rows in the type they come out in, on a device."""
        return narrowed(f"{self.path}: {self.planes[0].name}", rows, self.dtype).to(device)

    def rows(self, used: Tensor) -> Tensor:
        """Rows of these features, which rise: [distinct, (slots,) width], as stored where nothing multiplies them."""
        used = used.cpu()  # where files are read, and where share lies
        out = torch.empty(len(used), *self.shape[1:], dtype=self.stored)
        whole = len(self.planes) == 1 and self.planes[0].shape == self.shape
        parts = [out] if whole else [out[:, at] for at in range(len(self.planes))]
        for plane, part in zip(self.planes, parts, strict=True):
            _read(plane, used.tolist(), part)
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
    at: int

    def __post_init__(self) -> None:
        if not 0 <= self.at < self.owner.shape[1]:
            raise ValueError(f"Slot: at must be one of {self.owner.shape[1]} slots, got {self.at}")

    @property
    def dtype(self) -> torch.dtype:
        return self.owner.dtype

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.owner[index][:, self.at]

    def gather(self, features: SparseFeatures) -> tuple[SparseFeatures, Tensor]:
        compact, rows = self.owner.gather(features)
        return compact, rows[:, self.at]


def kept_bytes(decoders: Sequence[Any], features: Sequence[SparseFeatures], growth: float = 1.0) -> int:
    """Bytes of decoder rows while features of each layer are in use, and of what reading the largest layer's takes.

    Above the cache's bound a layer's rows are read again each time, and are there beside what it holds. growth: how
    many times these features the prompt has.
    """
    lazy = [(d, f) for d, f in zip(decoders, features, strict=True) if isinstance(d, LazyRows)]
    if not lazy:
        return 0
    counts = [min(d.shape[0], ceil(growth * len(f.index.unique()))) for d, f in lazy]
    sizes = [count * prod(d.shape[1:]) * d.dtype.itemsize for (d, _), count in zip(lazy, counts, strict=True)]
    reading = max(size * d.reading / d.dtype.itemsize for (d, _), size in zip(lazy, sizes, strict=True))
    most = sum({id(d.cache): d.cache.most for d, _ in lazy}.values())
    return int(reading) + (sum(sizes) if sum(sizes) <= most else most + max(sizes))


def _read(plane: Plane, used: list[int], out: Tensor) -> None:
    """out: [len(used), ...], its rows contiguous each; several threads where there is much to read."""
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
        work = [(file, plane, used[a:b], out[a:b], size) for a, b in pairwise(bounds) if a < b]
        if count == 1:
            _read_part(work[0])
        else:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(_read_part, work))
    except OSError as error:
        raise _unreadable(plane, error) from None
    finally:
        os.close(file)


def _unreadable(plane: Plane, error: OSError) -> OSError:
    return type(error)(f"load: {plane.path} must stay readable while in use, got {error.strerror or error}")


def _read_part(work: tuple[int, Plane, list[int], Tensor, int]) -> None:
    """Neighbouring rows in one read."""
    file, plane, used, out, size = work
    stride = out.stride(0) * out.element_size()
    flat = out.as_strided((max(0, (len(used) - 1) * out.stride(0) + size // out.element_size()),), (1,))
    into = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    close = plane.stride == size
    breaks = [i for i, row in enumerate(used) if i == 0 or not close or row != used[i - 1] + 1]
    for first, last in pairwise([*breaks, len(used)]):
        for begin in range(first, last, _VECTOR):
            end = min(begin + _VECTOR, last)
            if stride == size:
                buffers = [into[begin * size : end * size]]
            else:
                buffers = [into[i * stride : i * stride + size] for i in range(begin, end)]
            _fill(file, plane, buffers, plane.offset + used[begin] * plane.stride)
    _check_finite(plane, used, out)  # while other threads wait for the disk


def _fill(file: int, plane: Plane, buffers: list[memoryview], at: int) -> None:
    while buffers:  # one read may stop short, and never passes 2 GB
        count = os.preadv(file, buffers, at)
        if count == 0:
            raise ValueError(f"load: {plane.path} must not shrink while in use, got its end at byte {at}")
        at += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if buffers:
            buffers[0] = buffers[0][count:]


def is_finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite, by the bits of exponents: no faster way over memory than reading it once."""
    kind, mask = _EXPONENT[t.dtype]
    bits = (t if t.ndim else t[None]).view(kind).numpy()
    step = max(1, _CHECKED // max(1, bits[:1].size))
    parts = (bits[begin : begin + step] for begin in range(0, len(bits), step))
    return all(not part.size or int((part & mask).max()) != mask for part in parts)


def narrowed(name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type, whose range holds every number."""
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
