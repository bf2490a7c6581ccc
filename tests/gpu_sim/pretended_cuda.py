"""Pretended CUDA device: tensors whose device is cuda:0 and that compute on the CPU.

Operations that a GPU cannot do raise errors: tensors of both devices together, NumPy's view of a tensor on the device.
Launches, copies and synchronisations (where the host waits for a value) are counted by call site. Copies to pinned
memory happen only when the host waits for them, and read as NaN before. This needs a process of its own: torch.cuda,
torch.tensor and torch.empty are patched for good.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda", 0)
FREE_BYTES, TOTAL_BYTES = 78 << 30, 80 << 30
PACKAGE = str(Path(__file__).parents[2] / "pycircuit") + "/"

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
NUMBERS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)  # read by the host
SIZED_BY_VALUES = (  # the host waits for the size of the result
    *NUMBERS, aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.bincount.default,
)  # fmt: skip
WITHOUT_LAUNCH = (
    aten.detach.default, aten.alias.default, aten._unsafe_view.default, aten.empty.memory_format,
    aten.empty_strided.default, aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default,
    aten.lift_fresh.default,
)  # fmt: skip

FACTORIES = (
    aten.empty.memory_format, aten.empty_strided.default, aten.zeros.default, aten.ones.default, aten.full.default,
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.linspace.default, aten.eye.default,
    aten.scalar_tensor.default,
)  # fmt: skip
LIBRARY = torch.library.Library("aten", "IMPL")  # registrations live as long as this


class Counts:
    """Counts of the device's work since the last `clear`, by call site in the package."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.synchronisations: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.numbers: Counter[str] = Counter()  # copied to the host

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()

    def totals(self) -> tuple[int, int]:
        """Synchronisations and launches."""
        return sum(self.synchronisations.values()), sum(self.launches.values())

    def __str__(self) -> str:
        lines = []
        for name, counter in vars(self).items():
            lines.append(f"{name}: {sum(counter.values())}")
            lines.extend(f"  {count:6d}  {site}" for site, count in counter.most_common(25))
        return "\n".join(lines)


COUNTS = Counts()


def site(operation: object) -> str:
    """Return the operation and the line of the package that ran it."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    line = "outside" if frame is None else f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
    return f"{line} {operation}"


class CudaTensor(Tensor):
    """A tensor on the pretended device. inner: its numbers, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        tensor.inner = inner.detach()
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"CudaTensor({self.inner!r})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        COUNTS.synchronisations[site("tolist")] += 1
        COUNTS.numbers[site("tolist")] += self.numel()
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        COUNTS.uploads[site("new_tensor")] += 1
        return to_device(ON_CPU(data, dtype=dtype or self.dtype))


def to_device(value: Any) -> Any:
    return CudaTensor(value) if isinstance(value, Tensor) and not isinstance(value, CudaTensor) else value


def to_host(value: Any) -> Any:
    return value.inner if isinstance(value, CudaTensor) else value


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors of arguments, which are tensors or lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Apply `change` to a value, or to the entries of lists."""
    return type(value)([mapped(change, v) for v in value]) if type(value) in (list, tuple) else change(value)


def _made(function: Any) -> Callable[..., Tensor]:
    """Return a factory of tensors whose result is on the device."""

    def call(*args: Any, **options: Any) -> Tensor:
        if function not in WITHOUT_LAUNCH:
            COUNTS.launches[site(function)] += 1
        return to_device(function(*args, **{**options, "device": "cpu"}))

    return call


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation with a tensor or a result on the device."""
    device = kwargs.get("device")
    to_cuda = device is None or device.type == "cuda"
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = mapped(to_host, args), {name: mapped(to_host, v) for name, v in kwargs.items()}
    if function is aten._to_copy.default and device is not None:
        _count_copy(args[0], to_cuda)
        result = function(*inner_args, **inner_kwargs)
        return to_device(result) if to_cuda else result
    if function is aten.copy_.default and len(args) > 2 and args[2] and not isinstance(args[0], CudaTensor):
        _copy_later(*args[:2])
        return args[0]
    if function is aten.copy_.default and isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor):
        _count_copy(args[1], isinstance(args[0], CudaTensor))
        function(*inner_args, **inner_kwargs)
        return args[0]
    _check_devices(function, args, kwargs)
    _count(function, args, kwargs)
    result = (
        _summed_in_float32(**_named(function, inner_args, inner_kwargs))
        if function is aten.addmm.dtype_out
        else function(*inner_args, **inner_kwargs)
    )
    if function in NUMBERS or not to_cuda:
        return result
    return _own_arguments(function, args, kwargs, mapped(to_device, result))


def _named(function: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names of their schema."""
    return dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs


def _summed_in_float32(
    self: Tensor, mat1: Tensor, mat2: Tensor, out: Tensor, out_dtype: Any, beta: int = 1, alpha: int = 1
) -> Tensor:
    """Run addmm of bfloat16 matrices into float32, which torch has for a GPU only."""
    return torch.addmm(self, mat1.float(), mat2.float(), beta=beta, alpha=alpha, out=out)


def _count_copy(source: Tensor, to_cuda: bool) -> None:
    if not isinstance(source, CudaTensor):
        COUNTS.uploads[site("copy")] += 1
    elif to_cuda:
        COUNTS.launches[site("copy")] += 1
    else:
        COUNTS.synchronisations[site("copy to the host")] += 1
        COUNTS.numbers[site("copy to the host")] += source.numel()


PENDING_COPIES: list[Callable[[], Any]] = []  # copies to pinned memory


def _copy_later(target: Tensor, source: Tensor) -> None:
    """Copy when the host waits for an event recorded after this call."""
    assert any(pinned.data_ptr() <= target.data_ptr() < pinned.data_ptr() + pinned.nbytes for pinned in PINNED)
    COUNTS.numbers[site("copy to the host")] += source.numel()
    target.view(torch.uint8).fill_(255)  # NaN in any type that is copied
    inner = to_host(source)
    PENDING_COPIES.append(lambda: target.copy_(inner))


class PretendedEvent:
    """An event that completes the copies that were under way when it was recorded."""

    def record(self, stream: Any = None) -> None:
        self.before = list(PENDING_COPIES)

    def synchronize(self) -> None:
        COUNTS.synchronisations[site("event")] += 1
        for copy in self.before:
            if copy in PENDING_COPIES:
                PENDING_COPIES.remove(copy)
                copy()


class PretendedStream:
    """A stream whose work is done at once, except for copies to pinned memory."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: PretendedEvent) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _check_devices(function: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Check devices as CUDA does: numbers without dimensions, and indices, may come from the host."""
    tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
    host_tensors = [t for t in tensors if not isinstance(t, CudaTensor) and t.ndim]
    if not host_tensors or not any(isinstance(t, CudaTensor) for t in tensors):
        return
    if function in INDEXED:
        if isinstance(args[0], CudaTensor):
            COUNTS.uploads[site("index")] += 1
            return
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    shapes = [tuple(t.shape) for t in host_tensors]
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"({function} in {site('')}, {shapes} on the CPU)"
    )


def _count(function: Any, args: Any, kwargs: dict[str, Any]) -> None:
    waits = function in SIZED_BY_VALUES
    if function in INDEXED:
        masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
        filled = len(args) > 2 and args[2].numel() == 1  # one number behind a mask is filled in without a wait
        waits = bool(masks) and not filled
    if function is aten.repeat_interleave.Tensor:
        waits = kwargs.get("output_size") is None
    if waits:
        COUNTS.synchronisations[site(function)] += 1
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
    if not views and function not in WITHOUT_LAUNCH and function not in NUMBERS:
        COUNTS.launches[site(function)] += 1


def _own_arguments(function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Any:
    """Return the argument itself where the operation wrote to it in place."""
    returns = function._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return result
    names = [a.name for a in function._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _named(function, args, kwargs)[names[0]]


ON_CPU: Callable[..., Tensor] = torch.tensor


def _tensor(data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> Tensor:
    if device is None or torch.device(device).type != "cuda":
        return ON_CPU(data, dtype=dtype, device=device, **options)
    COUNTS.uploads[site("torch.tensor")] += 1
    return to_device(ON_CPU(data, dtype=dtype, device="cpu", **options))


EMPTY: Callable[..., Tensor] = torch.empty
PINNED: list[Tensor] = []


def _empty(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
    tensor = EMPTY(*size, **options)
    if pin_memory:
        PINNED.append(tensor)
    return tensor


def _to(t: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Run Tensor.to with "cuda" as cuda:0: the guard has no current device."""
    if arguments and arguments[0] in ("cuda", torch.device("cuda")):
        arguments = (DEVICE, *arguments[1:])
    if options.get("device") in ("cuda", torch.device("cuda")):
        options["device"] = DEVICE
    return TO(t, *arguments, **options)


TO = Tensor.to


def install() -> None:
    """Patch torch until the process ends."""
    # The guard of the meta device, which does nothing, serves as CUDA's.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 22).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[14]
    for factory in FACTORIES:
        LIBRARY.impl(factory, _made(factory), "CUDA")
    torch.cuda._lazy_init = lambda: None
    torch.cuda.mem_get_info = lambda device=None: (FREE_BYTES, TOTAL_BYTES)
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda device=None: 0
    torch.cuda.empty_cache = lambda: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.cuda.Event, torch.cuda.Stream = PretendedEvent, PretendedStream
    torch.cuda.current_stream = PretendedStream
    torch.cuda.stream = lambda stream: stream
    torch.empty = _empty
    torch.tensor = _tensor
    Tensor.to, Tensor.pin_memory = _to, lambda t: t
