"""Choice of the implementation that runs: a pure function of the request over an ordered list."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec

import torch

from .processor import processor_name
from .registry import IMPLEMENTATIONS

ENVIRONMENT = "PYCIRCUIT_IMPL"


class ImplementationError(RuntimeError):
    """A forced implementation cannot run this call; the message says why."""


@dataclass(frozen=True)
class Request:
    """Op, device and float types of a call: all that dispatch looks at besides the machine."""

    op: str
    device: str
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Machine:
    """Implementations that a machine can use; native, triton and cuda are None, or the reason why not."""

    native: str | None
    isa: str | None
    triton: str | None
    interpreter: bool
    cuda: str | None


@dataclass(frozen=True)
class Explanation:
    """Implementation that would run, and why the others would not."""

    op: str
    implementation: str
    isa: str | None
    reasons: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        head = f"{self.op}: {self.implementation}" + (f" ({self.isa})" if self.isa else "")
        return "\n".join([head, *(f"  {name:<10}{why}" for name, why in self.reasons)])


@dataclass(frozen=True)
class Ran:
    """Op that ran last in this context, with its implementation and ISA."""

    op: str
    implementation: str
    isa: str | None

    @classmethod
    def of(cls, explanation: Explanation) -> Ran:
        return cls(explanation.op, explanation.implementation, explanation.isa)


PARTS_ISAS = ("bf16", "amx")  # have instructions for products of bfloat16 numbers; what is not made of such is v4's


@cache
def native_isas() -> tuple[tuple[str, bool], ...]:
    """(name, supported by this machine) of every ISA in the native module; empty without the module."""
    if find_spec("pycircuit._native") is None:
        return ()
    from pycircuit import _native

    return tuple(_native.isas())


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _has_cuda() -> bool:
    return torch.cuda.is_available()


@cache
def _machine(isa: str | None, interpreter: bool, has_triton: bool, has_cuda: bool) -> Machine:
    built = native_isas()
    usable = [name for name, supported in built if supported]
    native = None
    if not built:
        native = "the extension module is not built; reinstall pycircuit with a C++ compiler present"
    elif isa is not None and isa not in usable:
        native = f"isa {isa!r} is not one this machine can run ({', '.join(usable)})"
    return Machine(
        native=native,
        isa=None if native else (isa or usable[-1]),
        triton=None if has_triton else "triton is not installed; pip install 'pycircuit[triton]'",
        interpreter=interpreter,
        cuda=None if has_cuda else "no CUDA device",
    )


def machine(isa: str | None = None) -> Machine:
    """Capabilities of this process; `isa` narrows the native module to one of its tables."""
    return _machine(isa, os.environ.get("TRITON_INTERPRET") == "1", _has_triton(), _has_cuda())


def multiplies_bfloat16() -> bool:
    """True where native ops run, by an ISA that multiplies bfloat16 numbers, with float32 sums, faster than float32.

    AVX512_BF16 does on AMD's processors; Intel's take three cycles for it, and it runs there only where it is forced.
    """
    isa = _native_isa()
    return isa == "amx" or (isa == "bf16" and (forced()[1] == isa or "AMD" in processor_name()))


def encode_screens() -> bool:
    """True where native ops run by AMX, on which encode rounds rows to bfloat16 to find what may be active."""
    return _native_isa() == "amx"


def _native_isa() -> str | None:
    """ISA of native ops, or None where another implementation is forced."""
    name, isa = forced()
    return machine(isa).isa if name in (None, "native") else None


def obstacle(name: str, request: Request, machine: Machine) -> str | None:
    """Reason why `name` cannot run the request, or None."""
    if name == "reference":
        return None
    exact = [t for t in request.dtypes if t not in (torch.float32, torch.bfloat16)]
    if exact:
        return f"takes float32 and bfloat16, not {str(exact[0]).removeprefix('torch.')}"
    if name == "native":
        if machine.native:
            return machine.native
        return None if request.device == "cpu" else f"tensors are on {request.device}, not on the CPU"
    if machine.triton:
        return machine.triton
    if request.device == "cuda" or (request.device == "cpu" and machine.interpreter):
        return None
    return f"tensors are on {request.device}; Triton needs CUDA, or TRITON_INTERPRET=1 set before Python starts"


@lru_cache(maxsize=256)  # pure, and called before every op
def choose(request: Request, machine: Machine, forced: str | None) -> Explanation:
    """First implementation in order that can run; a forced one that cannot raises."""
    obstacles = {name: obstacle(name, request, machine) for name in IMPLEMENTATIONS}
    if forced is not None:
        if obstacles[forced]:
            raise ImplementationError(f"{request.op}: {forced} was forced but cannot run: {obstacles[forced]}")
        chosen, why = forced, "forced"
    else:
        # The interpreter is for tests: Triton on the CPU runs only when forced.
        order = [n for n in IMPLEMENTATIONS if not (n == "triton" and request.device == "cpu")]
        chosen, why = next(n for n in order if obstacles[n] is None), "first that can run"
    reasons = []
    for name in IMPLEMENTATIONS:
        can = "could run" if name != "triton" or request.device != "cpu" else "could run, interpreted; only if forced"
        reasons.append((name, why if name == chosen else obstacles[name] or can))
    return Explanation(request.op, chosen, machine.isa if chosen == "native" else None, tuple(reasons))


_forced: ContextVar[tuple[str | None, str | None]] = ContextVar("pycircuit_forced", default=(None, None))
_last: ContextVar[Ran | None] = ContextVar("pycircuit_last", default=None)


class use:
    """Force an implementation: until the next `use`, or inside `with pc.use("reference"):`.

    name: "native", "triton", "reference", or None to choose automatically. isa: one table of the native
    module ("baseline", "v3", "v4", "bf16", "amx"). The environment variable PYCIRCUIT_IMPL sets the starting value. The
    choice applies to this thread (or asyncio task) only: a new thread starts from the environment again.
    """

    def __init__(self, name: str | None, isa: str | None = None) -> None:
        if name is not None and name not in IMPLEMENTATIONS:
            raise ValueError(f"use: name must be one of {', '.join(IMPLEMENTATIONS)} or None, got {name!r}")
        if isa is not None and name != "native":
            raise ValueError(f"use: isa goes with 'native', got {name!r}")
        if isa is not None and isa not in dict(native_isas()):
            known = ", ".join(n for n, _ in native_isas()) or "none: the extension module is not built"
            raise ValueError(f"use: isa must be one this build has ({known}), got {isa!r}")
        self._now = (name, isa)
        self._before = _forced.get()
        _forced.set(self._now)

    def __enter__(self) -> use:
        _forced.set(self._now)  # again, so that one object can be entered twice
        return self

    def __exit__(self, *_: object) -> None:
        _forced.set(self._before)


def forced() -> tuple[str | None, str | None]:
    """Forced (implementation, isa)."""
    name, isa = _forced.get()
    if name is None and (name := os.environ.get(ENVIRONMENT) or None) and name not in IMPLEMENTATIONS:
        raise ValueError(f"{ENVIRONMENT} must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return name, isa


def plan(request: Request) -> Explanation:
    name, isa = forced()
    return choose(request, machine(isa), name)


def record(ran: Ran) -> None:
    _last.set(ran)


def last_run() -> Ran | None:
    """Op that ran last in this context, with its implementation and ISA."""
    return _last.get()


def implementations_for(device: str, dtype: torch.dtype) -> Iterator[tuple[str, str | None]]:
    """(name, obstacle) of every implementation, for doctor."""
    for name in IMPLEMENTATIONS:
        yield name, obstacle(name, Request("", device, (dtype,)), machine())
