"""Products of float32 matrices on a CPU, each by the library that is fastest at its shape on this machine.

The product in torch is that of the library torch was built with, which can reach half of what a processor does: MKL on
AMD's processors with AVX-512. The first product of a shape class is computed by every provider in turn, and the rates
are written to the cache folder, for every later process on this processor. Ours runs unless another is clearly faster,
because a row of its result is the same whatever the other rows and the number of threads are.

    native   the kernel of csrc/cpu/product.cpp
    amx      that of csrc/cpu/product_of_parts.cpp: each number in three bfloat16 parts, which are the number
    onednn   oneDNN through torch's linear layer, which multiplies by a transposed weight
    torch    torch.mm
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from pycircuit.files.atomic import write_atomically
from pycircuit.files.cache_folder import cache_folder
from pycircuit.files.locks import exclusive

from .dispatch import forced, native_isas
from .processor import processor_name

Provider = Literal["native", "amx", "onednn", "torch"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
ENVIRONMENT = "PYCIRCUIT_PRODUCT"

_KERNEL = "2"  # a kernel of another speed asks for another name
_CLEARLY = 1.1  # times our own rate
_FAR = 1.5  # times the others: a Xeon's AMX ran at 2.7 or at 0.65 TFLOP/s a core, from one minute to the next
_TURNS, _SECONDS = 5, 0.05  # of a comparison: the fewest turns, and the time that further ones are made for
_OPERATIONS, _LONGEST = 4e9, 2048  # of a product that is compared, and its longest side

ShapeClass = tuple[int, int, int, bool]
Rates = dict[str, float]  # operations per second by provider
_rates: dict[ShapeClass, Rates] = {}
_lock = Lock()


def product(
    a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False, divisor: Tensor | None = None
) -> Tensor:
    """Return out = (out + if add) a / divisor @ b: [n, columns].

    a: [n, inner]; b: [inner, columns]; divisor: [n], one number for each row of a, or None. To add with a divisor may
    overwrite a.
    """
    if out is None:
        out = a.new_empty(len(a), b.shape[1])
    _PRODUCTS[provider_of(a, b)](a, b, out, add, divisor)
    return out


def provider_of(a: Tensor, b: Tensor) -> Provider:
    """Return the provider of a product: the forced one, or the fastest of its shape class."""
    if not (_plain(a) and _plain(b) and a.stride(1) == 1 and 1 in b.stride()) or forced()[0] == "reference":
        return "torch"
    chosen = forced_provider()
    if chosen is not None:
        return chosen
    shape = shape_class(a, b)
    if shape not in _rates:
        _measure_once(shape, b)
    return fastest(_rates[shape])


def forced_provider() -> Provider | None:
    """Return the provider that the environment names, if any."""
    name = os.environ.get(ENVIRONMENT) or None
    if name is None:
        return None
    for provider in PROVIDERS:
        if name == provider:
            if provider not in available():
                raise RuntimeError(f"{ENVIRONMENT} must be one of {', '.join(available())} here, got {name!r}")
            return provider
    raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(PROVIDERS)}, got {name!r}")


def available() -> tuple[Provider, ...]:
    """Providers that this process can use with the ISA in use."""
    return _available(forced()[1])


@cache
def _available(isa: str | None) -> tuple[Provider, ...]:
    usable = [name for name, supported in native_isas() if supported]
    has = {
        "native": bool(usable),
        "amx": "amx" in usable and isa in (None, "amx"),
        "onednn": _has_onednn(),
        "torch": True,
    }
    return tuple(provider for provider in PROVIDERS if has[provider])


def fastest(rates: Rates) -> Provider:
    """Return the provider of the highest rate: our own unless another is clearly faster, AMX only if by far."""
    reliable = {p: rates.get(p, 0.0) / (_FAR if p == "amx" else 1.0) for p in available()}
    best = max(available(), key=lambda provider: reliable[provider])
    own = reliable.get("native", 0.0)
    return "native" if own * _CLEARLY > reliable[best] and "native" in available() else best


def shape_class(a: Tensor, b: Tensor) -> ShapeClass:
    """Class of shapes that share a provider: rows, inner size and columns to a factor of four, and b's layout."""
    return _size_class(len(a)), _size_class(a.shape[1]), _size_class(b.shape[1]), b.stride(0) == 1


def _size_class(size: int) -> int:
    return min(max(size.bit_length() // 2, 2), 6)


def _plain(t: Tensor) -> bool:
    """True for a float32 matrix in memory, not empty, that no gradient is wanted of."""
    in_memory = type(t) in (Tensor, Parameter) and t.device.type == "cpu" and t.numel() > 0
    return in_memory and t.dtype == torch.float32 and not (t.requires_grad and torch.is_grad_enabled())


# Providers


def _by_torch(a: Tensor, b: Tensor, out: Tensor, add: bool, divisor: Tensor | None) -> None:
    if add:
        out.addmm_(a if divisor is None else a.div_(divisor[:, None]), b.to(a.dtype))
    else:
        torch.mm(a, b.to(a.dtype), out=out)
        if divisor is not None:
            out /= divisor[:, None]


def _by_onednn(a: Tensor, b: Tensor, out: Tensor, add: bool, divisor: Tensor | None) -> None:
    result = torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    if divisor is not None:
        result /= divisor[:, None]
    if add:
        out += result
    else:
        out.copy_(result)


def _by_native(a: Tensor, b: Tensor, out: Tensor, add: bool, divisor: Tensor | None) -> None:
    from . import native

    native.product(a, b, out, add, divisor)


def _by_amx(a: Tensor, b: Tensor, out: Tensor, add: bool, divisor: Tensor | None) -> None:
    from . import native

    native.product(a, b, out, add, divisor, parts=3)


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_PRODUCTS: dict[Provider, Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], None]] = {
    "native": _by_native,
    "amx": _by_amx,
    "onednn": _by_onednn,
    "torch": _by_torch,
}


# Measurement


def measured() -> dict[ShapeClass, Rates]:
    """Return what this machine has measured: operations per second of every provider by shape class."""
    with _lock, suppress(OSError):
        _rates.update(_read(_file()))
    return dict(_rates)


def measure(shape: ShapeClass, b: Tensor) -> Rates:
    """Return operations per second of every provider: the best of calls made in turn."""
    b = b[:_LONGEST, :_LONGEST]
    rows = min(4 ** shape[0], _LONGEST, max(1, int(_OPERATIONS / (2 * b.numel()))))
    a = b.new_full((rows, len(b)), 0.5)
    out = a.new_empty(len(a), b.shape[1])
    samples: dict[Provider, list[float]] = {provider: [] for provider in available()}
    end = time.perf_counter() + _SECONDS
    while len(samples["torch"]) <= _TURNS or time.perf_counter() < end:
        for provider, seconds in samples.items():
            start = time.perf_counter()
            _PRODUCTS[provider](a, b, out, False, None)
            seconds.append(time.perf_counter() - start)
    operations = 2.0 * out.numel() * len(b)
    return {provider: operations / max(min(seconds[1:]), 1e-9) for provider, seconds in samples.items()}


def _measure_once(shape: ShapeClass, b: Tensor) -> None:
    """Find the rates of a shape class in the cache folder, or measure and write them; others wait meanwhile."""
    with _lock:
        if shape in _rates:
            return
        try:
            path = _file()
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(path.with_name(f".{path.name}.lock")):
                _rates.update(_read(path))
                if shape not in _rates:
                    _rates[shape] = measure(shape, b)
                    _write(path)
        except OSError:  # a machine without such a folder measures in every process
            _rates.setdefault(shape, measure(shape, b))


def _file() -> Path:
    """File of this machine's rates: other versions of torch or of the kernel measure again."""
    names = (_KERNEL, processor_name(), torch.__version__, *(name for name, usable in native_isas() if usable))
    text = "-".join("".join(c if c.isalnum() or c in ".+" else "_" for c in name) for name in names)
    return cache_folder() / "products" / f"{text}.json"


def _read(path: Path) -> dict[ShapeClass, Rates]:
    """Rates in a file; none where it is not there or was written by something else."""
    try:
        entries = json.loads(path.read_text())
        return {_parse(key): {str(p): float(rate) for p, rate in rates.items()} for key, rates in entries.items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return {}


def _parse(key: str) -> ShapeClass:
    rows, inner, columns, transposed = key.split()
    return int(rows), int(inner), int(columns), transposed == "transposed"


def _write(path: Path) -> None:
    entries = {
        f"{rows} {inner} {columns} {'transposed' if transposed else 'plain'}": rates
        for (rows, inner, columns, transposed), rates in sorted(_rates.items())
    }
    write_atomically(path, lambda file: file.write(json.dumps(entries, indent=1).encode()))
