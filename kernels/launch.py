"""Launches of kernels. Triton's own look at the arguments takes the host longer than the launch, so it is done once.

What a compiled kernel depends on is in a key: types, alignments and numbers that are specialised, constants, device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from pycircuit.kernels.config import Config

LARGEST = 2**31 - 1  # whole numbers up to here are passed in 32 bits
_specialised: dict[int, list[tuple[bool, bool]]] = {}  # by kernels, which live as long as this module
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}  # with the values of the constants


def launch(kernel: Any, grid: Sequence[int], arguments: Sequence[Any], c: Config, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor.

    arguments: all but the constants, which are the kernel's last parameters.
    """
    device = arguments[0].get_device()
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, arguments, c, **constants)
        return
    if not isinstance(kernel, triton.runtime.JITFunction):  # interpreted
        kernel[tuple(grid)](*arguments, **constants, **c.launch())
        return
    key = (id(kernel), device, c, *constants.values(), *_signature(arguments, _parameters(kernel)))
    if key in _compiled:
        compiled, values = _compiled[key]
        compiled[(*grid, 1, 1)](*arguments, *values)
    else:
        options = {**constants, **c.launch()}
        values = tuple(options[p.name] for p in kernel.params if p.is_constexpr)
        _compiled[key] = kernel[tuple(grid)](*arguments, **options), values


def _parameters(kernel: Any) -> list[tuple[bool, bool]]:
    """Return of every parameter that is no constant if Triton specialises its value, and a pointer's alignment."""
    if id(kernel) not in _specialised:
        _specialised[id(kernel)] = [
            (not p.do_not_specialize, not (p.do_not_specialize or p.do_not_specialize_on_alignment))
            for p in kernel.params
            if not p.is_constexpr
        ]
    return _specialised[id(kernel)]


def _signature(arguments: Sequence[Any], parameters: Sequence[tuple[bool, bool]]) -> list[Any]:
    """Return what the compiled kernel depends on of each argument."""
    signature: list[Any] = []
    for argument, (specialised, aligned) in zip(arguments, parameters, strict=True):
        kind = type(argument)
        if kind is int:
            signature.append(argument if specialised else argument > LARGEST)
        elif kind is float:
            signature.append(kind)
        else:  # a tensor
            signature.append(argument.dtype)
            if aligned:
                signature.append(argument.data_ptr() % 16)
    return signature
