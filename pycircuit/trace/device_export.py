"""Copies of a device's tensors to arrays on the host, through pinned buffers that threads empty."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .memory_model import STAGING_BUFFERS, STAGING_BYTES
from .row_store import GrowableArray

_ALIGNED = 64  # bytes
_THREADS = 4  # most of their time goes to the first touch of the arrays' memory


@dataclass
class _Copy:
    """A copy under way: staged in a pinned buffer, from a tensor that must live until it is done, to an array."""

    staged: Tensor
    source: Tensor
    destination: GrowableArray
    offset: int

    def finish(self) -> None:
        """Copy by NumPy, on one thread: torch's own wait busily, and the sweep's host needs the processors."""
        self.destination.array[self.offset : self.offset + len(self.staged)] = self.staged.numpy()


@dataclass
class _Buffer:
    """Pinned memory and the copies staged in it. ready: an event after the last of them.

    full: from now on it is a thread's, until `emptying` is done. An interrupt may come between any two steps: a full
    buffer may lack its `emptying`, and to empty a buffer twice does no harm.
    """

    memory: Tensor
    ready: Any
    used: int = 0
    copies: list[_Copy] = field(default_factory=list)
    full: bool = False
    emptying: Future[None] | None = None

    def fill(self, source: Tensor, array: GrowableArray, offset: int) -> int:
        """Start to copy as much of source [n] as fits; return how much."""
        size = source.element_size()
        count = min(len(source), (len(self.memory) - self.used) // size)
        if count > 0:
            staged = self.memory[self.used : self.used + count * size].view(source.dtype)
            staged.copy_(source[:count], non_blocking=True)
            self.copies.append(_Copy(staged, source, array, offset))
            self.used += -(-count * size // _ALIGNED) * _ALIGNED
        return count

    def empty(self) -> None:
        """Finish all copies."""
        if self.copies:
            self.ready.synchronize()
        for copy in self.copies:
            copy.finish()
        self.copies, self.used = [], 0


class Exporter:
    """Copies of device tensors to growing arrays: the device fills one pinned buffer while threads empty others."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        self._ring: deque[_Buffer] | None = None  # oldest first, then the one to fill; empty: memory cannot be pinned
        self._threads = ThreadPoolExecutor(_THREADS, "pycircuit-export")

    def append(self, source: Tensor, array: GrowableArray) -> None:
        """Append source [n] to an array, which has it after `finish`; source must not change until then."""
        if array.size + len(source) > len(array.array):
            self.finish()  # the array will move
        offset = array.extend(len(source))
        if self._ring is None:
            self._ring = deque(self._pinned())
        if not self._ring:
            torch.from_numpy(array.array[offset : array.size]).copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        while len(source):
            buffer = self._to_fill(self._ring)
            with torch.cuda.stream(self._stream):
                count = buffer.fill(source, array, offset)
            source, offset = source[count:], offset + count
            if len(source):
                self._hand_over(buffer)

    def finish(self) -> None:
        """Wait until the arrays have all that was appended to them."""
        in_use = [buffer for buffer in self._ring or () if buffer.full or buffer.copies]
        for buffer in in_use:
            self._hand_over(buffer)
        for buffer in in_use:
            self._wait(buffer)

    def _to_fill(self, ring: deque[_Buffer]) -> _Buffer:
        """Return a buffer with room: the last, or after it the oldest if it is empty again, or else a further one."""
        while ring[-1].full:
            oldest = ring[0]
            if len(ring) < STAGING_BUFFERS and not (oldest.emptying is not None and oldest.emptying.done()):
                ring.extend(self._pinned())
            if ring[-1].full:
                self._wait(oldest)
                ring.rotate(-1)
        return ring[-1]

    def _hand_over(self, buffer: _Buffer) -> None:
        """Let a thread empty a buffer, unless one does already."""
        buffer.full = True
        if buffer.emptying is None:
            buffer.ready.record(self._stream)
            buffer.emptying = self._threads.submit(buffer.empty)

    def _wait(self, buffer: _Buffer) -> None:
        """Wait until a full buffer is empty, and free it."""
        self._hand_over(buffer)
        assert buffer.emptying is not None
        buffer.emptying.result()
        buffer.emptying, buffer.full = None, False

    def _pinned(self) -> list[_Buffer]:
        """Return a new buffer, or none where the system allows no more locked memory; plain copies work, but slower."""
        if self.device.type != "cuda":
            return []
        try:
            memory = torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:
            return []
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return [_Buffer(memory, torch.cuda.Event())]
