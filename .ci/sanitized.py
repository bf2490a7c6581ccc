"""Runs pytest with the sanitized native module in the place of the installed one, or plants an overrun."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch  # first: its OpenMP is the one to share


def load() -> None:
    """Before pycircuit is imported: its `_native` is the one in PYCIRCUIT_SANITIZED."""
    (path,) = Path(os.environ["PYCIRCUIT_SANITIZED"]).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("pycircuit._native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pycircuit._native"] = module


def overrun() -> None:
    """decode into half the memory it needs: the first thing a sanitizer has to see."""
    import ctypes

    import pycircuit as pc
    from pycircuit.ops import native

    features = pc.SparseFeatures(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1))
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    out = libc.malloc(ctypes.c_size_t(64 * 4 // 2))
    w_dec = torch.ones(1, 64)
    native._native.decode(0, native._sparse(features), native._weights(w_dec), 0, out, 1)


load()
if sys.argv[1] == "overrun":
    overrun()
else:
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
