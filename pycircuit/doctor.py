"""What pycircuit finds on this machine, and which implementation each op would use here."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import torch

import pycircuit as pc

from .bench import machine_rates
from .ops.dispatch import ImplementationError, Request, native_isas, plan
from .ops.registry import OPS


def examine() -> dict[str, Any]:
    """Everything `pycircuit doctor` says, ready for JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "pycircuit": pc.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": machine_rates.cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "native": _native(),
        "isas": dict(native_isas()),
        "ops": {op: {where: _plan(op, where) for where in dict.fromkeys(("cpu", device))} for op in OPS},
    }


def _installed(package: str) -> str | None:
    try:
        return installed(package)
    except PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_gb": round(found.total_memory / 1e9, 1),
    }


def _native() -> dict[str, Any] | None:
    """The extension module: its compiler, and the CUDA runtime and driver it sees if it was built with CUDA."""
    if not native_isas():
        return None
    from . import _native as module

    cuda = module.cuda()
    versions = None if cuda is None else {"runtime": _version(cuda[0]), "driver": _version(cuda[1])}
    return {"compiler": module.compiler, "cuda": versions}


def _version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _plan(op: str, device: str) -> dict[str, Any]:
    try:
        found = plan(Request(op, device, (torch.float32,)))
    except ImplementationError as forced:  # a doctor says what is wrong, and goes on
        return {"implementation": None, "isa": None, "others": {"forced": str(forced)}}
    first = found.implementation
    others = {
        name: f"could run, {first} comes first" if why == "could run" else why
        for name, why in found.reasons
        if name != first
    }
    return {"implementation": first, "isa": found.isa, "others": others}


def lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) for people; the ops come in `op_lines`."""
    native, cuda = found["native"], (found["native"] or {}).get("cuda")
    gpus = [f"{g['name']} (compute {g['capability']}, {g['memory_gb']:g} GB)" for g in found["gpus"]]
    isas = [name if supported else f"{name} (not on this machine)" for name, supported in found["isas"].items()]
    return [
        ("pycircuit", f"{found['pycircuit']}, Python {found['python']}, {found['system']}"),
        ("CPU", f"{found['cpu']}, {found['threads']} threads"),
        ("kernels", ", ".join(isas) + f"; {native['compiler']}" if native else "not built; reinstall with a compiler"),
        ("CUDA build", f"runtime {cuda['runtime']}, driver {cuda['driver'] or 'none'}" if cuda else "no"),
        ("GPU", "; ".join(gpus) or "none"),
        ("torch", found["torch"]),
        ("triton", found["triton"] or "not installed; pip install 'pycircuit[triton]' for GPUs"),
    ]


def op_lines(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(op, device, what would run, why not the others)."""
    rows = []
    for op, devices in found["ops"].items():
        for device, plan_ in devices.items():
            runs = (plan_["implementation"] or "nothing") + (f" ({plan_['isa']})" if plan_["isa"] else "")
            others = "; ".join(f"{name}: {why}" for name, why in plan_["others"].items())
            rows.append((op, device, runs, others))
    return rows
