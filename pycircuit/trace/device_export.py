"""Copies of a device's tensors to arrays on the host, through two pinned buffers in turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .memory_model import STAGING_BYTES
from .row_store import GrowableArray

_ALIGNED = 64  # bytes


@dataclass
class _Copy:
    """A copy under way: staged in a pinned buffer, from a tensor that must live until it is done, to an array."""

    staged: Tensor
    source: Tensor
    destination: GrowableArray
    offset: int

    def finish(self) -> None:
        """Copy on all of torch's threads: most of the time goes to the first touch of the array's memory."""
        target = self.destination.array[self.offset : self.offset + len(self.staged)]
        torch.from_numpy(target).copy_(self.staged)


@dataclass
class _Buffer:
    """Pinned memory and the copies staged in it. ready: an event after the last of them."""

    memory: Tensor
    ready: Any
    used: int = 0
    copies: list[_Copy] = field(default_factory=list)

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
    """Copies of device tensors to growing arrays: the device fills one pinned buffer, the host empties the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None
        self._buffers: list[_Buffer] | None = None  # being filled, being emptied; none where memory cannot be pinned

    def append(self, source: Tensor, array: GrowableArray) -> None:
        """Append source [n] to an array, which has it after `finish`; source must not change until then."""
        offset = array.extend(len(source))
        if self._buffers is None:
            self._buffers = self._pinned()
        if not self._buffers:
            torch.from_numpy(array.array[offset : array.size]).copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        while len(source):
            with torch.cuda.stream(self._stream):
                count = self._buffers[0].fill(source, array, offset)
            source, offset = source[count:], offset + count
            if len(source):
                self._turn(self._buffers)

    def finish(self) -> None:
        """Wait until the arrays have all that was appended to them."""
        if self._buffers:
            self._turn(self._buffers)
            self._turn(self._buffers)

    def _turn(self, buffers: list[_Buffer]) -> None:
        """Empty the buffer that was filled before this one, and swap the two."""
        buffers[0].ready.record(self._stream)
        buffers[1].empty()
        buffers.reverse()

    def _pinned(self) -> list[_Buffer]:
        if self.device.type != "cuda":
            return []
        try:
            memory = [torch.empty(STAGING_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(2)]
        except RuntimeError:  # the system allows no more locked memory: plain copies work, but slower
            return []
        self._stream = torch.cuda.Stream(self.device)
        return [_Buffer(m, torch.cuda.Event()) for m in memory]
